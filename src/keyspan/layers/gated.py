"""The gated feed-forward layer SwiGLU, saving half of what eager linears save."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keyspan.layers.gemm import Linear, gemm_dtype, input_gradient, parameter_gradients, product
from keyspan.layers.kernels import kernels_for


class _SwiGLU(torch.autograd.Function):
    """Saves x and the pre-activation x12. Eager saves, beyond these, silu(x1) and silu(x1) * x2."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w12: Tensor,
        b12: Tensor | None,
        w3: Tensor,
        b3: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dtype = dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w12, b12, w3, b3)]
        x = x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            x12 = product(x, w12, b12, dtype)
            y = product(_gate(x12), w3, b3, dtype)
        ctx.save_for_backward(x, x12, w12, w3)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x12, w12, w3 = ctx.saved_tensors
        need = ctx.needs_input_grad
        below = any(need[:3])  # whether anything before the product with w3 wants a gradient
        dx = dw12 = db12 = None
        with torch.autocast(grad.device.type, enabled=False):
            dx12, h = _gate_backward(input_gradient(grad, w3, ctx.dtype), x12) if below else (None, _gate(x12))
            dw3, db3 = parameter_gradients(grad, h, ctx.dtype, need[3:5])
            if dx12 is not None:
                dx = input_gradient(dx12, w12, ctx.dtype) if need[0] else None
                dw12, db12 = parameter_gradients(dx12, x, ctx.dtype, need[1:3])
        grads = (dx, dw12, db12, dw3, db3)
        return *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None


def _gate(x12: Tensor) -> Tensor:
    """silu(x1) · x2 [..., D] of x12 [..., 2 D], by one kernel where there is one."""
    kernels = kernels_for(x12)
    if kernels is not None:
        h: Tensor = kernels.swiglu_gate(x12.reshape(-1, x12.shape[-1]))
        return h.view(*x12.shape[:-1], h.shape[-1])
    x1, x2 = x12.chunk(2, dim=-1)
    return F.silu(x1) * x2


def _gate_backward(dh: Tensor, x12: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x12, `_gate(x12)`), given the gradient of the latter; by one kernel where there is one."""
    kernels = kernels_for(x12)
    if kernels is not None:
        rows = x12.reshape(-1, x12.shape[-1])
        dx12, h = kernels.swiglu_gate_backward(dh.reshape(-1, dh.shape[-1]).contiguous(), rows)
        return dx12.view(x12.shape), h.view(dh.shape)
    x1, x2 = x12.chunk(2, dim=-1)
    gate = F.silu(x1)
    return torch.cat([torch.ops.aten.silu_backward(dh * x2, x1), dh * gate], dim=-1), gate * x2


def swiglu(x: Tensor, w12: Tensor, b12: Tensor | None, w3: Tensor, b3: Tensor | None) -> Tensor:
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020): `linear(silu(x1) * x2, w3, b3)` with
    `x1, x2 = linear(x, w12, b12).chunk(2, -1)`.

    x [..., D], w12 [2 * hidden, D] (the gate x1 is the first half), b12 [2 * hidden] or None, w3 [C, hidden],
    b3 [C] or None -> [..., C], in autocast's dtype where autocast is on, else in x's. No input is changed.
    Backward keeps x and the pre-activation [..., 2 * hidden] and recomputes the rest; the values are those of
    the eager formula. It can be differentiated once. Raises ValueError where shapes or dtypes do not fit.
    """
    if w12.ndim != 2 or w12.shape[1] != x.shape[-1] or w12.shape[0] % 2:
        raise ValueError(f"w12: got shape {list(w12.shape)}, want [2 * hidden, {x.shape[-1]}] (x's last size)")
    hidden = w12.shape[0] // 2
    if w3.ndim != 2 or w3.shape[1] != hidden:
        raise ValueError(f"w3: got shape {list(w3.shape)}, want [out, {hidden}] (half of w12's first size)")
    for name, bias, weight in (("b12", b12, w12), ("b3", b3, w3)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: got shape {list(bias.shape)}, want [{weight.shape[0]}]")
    dtype = gemm_dtype(x, w12=w12, b12=b12, w3=w3, b3=b3)
    result: Tensor = _SwiGLU.apply(x, w12, b12, w3, b3, dtype)  # type: ignore[no-untyped-call]
    return result


class SwiGLU(nn.Module):
    """`swiglu` with its parameters, named as in xFormers' packed SwiGLU.

    Args: in_features, hidden_features, out_features (default: in_features), bias (default: True).
    Parameters: w12.weight [2 * hidden, in], w12.bias [2 * hidden], w3.weight [out, hidden], w3.bias [out].
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.w12 = Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.w12.packed is not None:
            y: Tensor = self.w3(_gate(self.w12(x)))
            return y
        return swiglu(x, self.w12.weight, self.w12.bias, self.w3.weight, self.w3.bias)
