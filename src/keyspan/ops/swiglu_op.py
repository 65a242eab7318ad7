"""SwiGLU under xFormers' names and in its weight layouts, computed by `keyspan.layers.swiglu`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keyspan import layers
from keyspan.core.checks import check_int, check_tensor
from keyspan.ops.unbind import get_stack_strides, unbind


class SwiGLUOp:
    """The one implementation of SwiGLU, which saves x and the pre-activation for backward. `op=` is a hint."""

    NAME = "keyspan"
    PACKED_WEIGHTS = False

    def supports(self, op: SwiGLUOpDispatch) -> bool:
        return True

    def __call__(self, *args: Tensor | None) -> Tensor:
        """`swiglu` of the arguments (x, w1, b1, w2, b2, w3, b3)."""
        return swiglu(*args)  # type: ignore[arg-type]


SwiGLUEagerOp = SwiGLUOp()


@dataclass
class SwiGLUOpDispatch:
    """The arguments by which xFormers chooses an implementation. There is one, so `op` is always that.

    Attributes:
        device, dtype: of x.
        dtype_autocast_gpu: autocast's dtype where autocast is on, else x's.
        packed_weights: whether w1 and w2 are views of one tensor, as `swiglu_packed` takes them.
        bias_enabled: whether all three linears have a bias.
    """

    device: torch.device | str
    dtype: torch.dtype
    dtype_autocast_gpu: torch.dtype | None
    packed_weights: bool
    bias_enabled: bool

    @property
    def op(self) -> SwiGLUOp:
        return SwiGLUEagerOp

    @staticmethod
    def from_arguments(
        x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w3: Tensor, b3: Tensor | None
    ) -> SwiGLUOpDispatch:
        on = torch.is_autocast_enabled(x.device.type)
        return SwiGLUOpDispatch(
            device=x.device,
            dtype=x.dtype,
            dtype_autocast_gpu=torch.get_autocast_dtype(x.device.type) if on else x.dtype,
            packed_weights=get_stack_strides((w1, w2), 0) is not None,
            bias_enabled=all(b is not None for b in (b1, b2, b3)),
        )


def swiglu(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    op: object = None,
) -> Tensor:
    """`linear(silu(linear(x, w1, b1)) · linear(x, w2, b2), w3, b3)`.

    x `[..., I]`, w1 and w2 `[H, I]`, b1 and b2 `[H]` or None, w3 `[O, H]`, b3 `[O]` or None -> `[..., O]`.
    `op` is a hint.
    """
    check_tensor("x", x)
    check_tensor("w1", w1, x)
    check_tensor("w2", w2, x)
    for name, b in (("b1", b1), ("b2", b2)):
        check_tensor(name, b, x, optional=True)
        if b is not None and b.shape != w1.shape[:1]:
            raise ValueError(f"{name}: got shape {list(b.shape)}, want {list(w1.shape[:1])}")
    if w1.shape != w2.shape:
        raise ValueError(f"w2: got shape {list(w2.shape)}, want {list(w1.shape)} as w1")
    b12 = None
    if b1 is not None or b2 is not None:
        zeros = w1.new_zeros(w1.shape[0])
        b12 = torch.cat([zeros if b is None else b for b in (b1, b2)])
    return layers.swiglu(x, torch.cat([w1, w2]), b12, w3, b3)


def swiglu_packed(
    x: Tensor, w1w2: Tensor, b1b2: Tensor | None, w3: Tensor, b3: Tensor | None, *, op: object = None
) -> Tensor:
    """`swiglu` with w1 and w2 stacked, `[2, H, I]`, and their biases, `[2, H]` or None: no weight is copied."""
    check_tensor("x", x)
    check_tensor("w1w2", w1w2, x)
    check_tensor("b1b2", b1b2, x, optional=True)
    if w1w2.dim() != 3 or w1w2.shape[0] != 2:
        raise ValueError(f"w1w2: got shape {list(w1w2.shape)}, want [2, H, I]")
    return layers.swiglu(x, w1w2.flatten(0, 1), None if b1b2 is None else b1b2.flatten(), w3, b3)


class SwiGLU(nn.Module):
    """The SwiGLU feed-forward layer, with xFormers' parameter names.

    Args:
        in_features, hidden_features, out_features: widths; `out_features=None` means `in_features`.
        bias: whether all linears have one.
        _pack_weights: one linear `w12` `[2·hidden, in]` (x1 is the first half), or two, `w1` and `w2`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = in_features if out_features is None else out_features
        for name in ("in_features", "hidden_features", "out_features"):
            check_int(name, getattr(self, name))
        self.op: object = None
        self.w12: nn.Linear | None = None
        if _pack_weights:
            self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        else:
            self.w1 = nn.Linear(in_features, hidden_features, bias=bias)
            self.w2 = nn.Linear(in_features, hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, self.out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`."""
        if self.w12 is None:
            return swiglu(x, *self._ordered_params())
        return layers.swiglu(x, self.w12.weight, self.w12.bias, self.w3.weight, self.w3.bias)

    def _ordered_params(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
        """(w1, b1, w2, b2, w3, b3), as `swiglu` takes them."""
        if self.w12 is None:
            return (self.w1.weight, self.w1.bias, self.w2.weight, self.w2.bias, self.w3.weight, self.w3.bias)
        w1w2, b1b2, _, _ = self._packed_ordered_params()
        w1, w2 = unbind(w1w2, 0)
        b1, b2 = (None, None) if b1b2 is None else unbind(b1b2, 0)
        return w1, b1, w2, b2, self.w3.weight, self.w3.bias

    def _packed_ordered_params(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(w1w2, b1b2, w3, b3), as `swiglu_packed` takes them."""
        if self.w12 is None:
            raise ValueError("_packed_ordered_params: got a layer with _pack_weights=False, want one with w12")
        shape = (2, self.hidden_features)
        bias = None if self.w12.bias is None else self.w12.bias.unflatten(0, shape)
        return self.w12.weight.unflatten(0, shape), bias, self.w3.weight, self.w3.bias
