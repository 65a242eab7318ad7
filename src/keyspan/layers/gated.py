"""Gated feed-forward layers, SwiGLU and GeGLU, saving half of what eager linears save."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keyspan.core.checks import check_int, check_tensor
from keyspan.layers.gemm import (
    Linear,
    bias_gradient,
    factor,
    gemm_dtype,
    input_gradient,
    native,
    native_matmul,
    product,
    weight_gradient,
)  # fmt: skip
from keyspan.layers.kernels import kernels_for
from keyspan.layers.normed import norm_linear, recomputes
from keyspan.layers.rmsnorm import RMSNorm

Activation = Literal["silu", "gelu_tanh"]
"""Of the gate."""
_CHUNK_NUMBERS = 1 << 21
"""Numbers of the pre-activation that a CPU works on at a time, which its caches hold until the next product."""


class _Gated(torch.autograd.Function):
    """Saves x and the pre-activation x12. Eager saves, beyond these, f(x1) and f(x1) * x2."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w12: Tensor,
        b12: Tensor | None,
        w3: Tensor,
        b3: Tensor | None,
        dtype: torch.dtype,
        activation: Activation,
        invariant: bool,
    ) -> Tensor:
        ctx.dtype, ctx.activation = dtype, activation
        ctx.dtypes = [None if t is None else t.dtype for t in (x, w12, b12, w3, b3)]
        x = x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            x12 = product(x, w12, b12, dtype, invariant)
            y = product(_gate(x12, activation), w3, b3, dtype, invariant)
        ctx.save_for_backward(x, x12, w12, w3)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x12, w12, w3 = ctx.saved_tensors
        by_library = all(ctx.needs_input_grad[n] for n in (0, 1, 3)) and native(ctx.dtype, grad, x, x12, w12, w3)
        with torch.autocast(grad.device.type, enabled=False):
            grads = (_native_backward if by_library else _backward)(grad.to(ctx.dtype), x, x12, w12, w3, ctx)
        return *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None, None, None


def _backward(grad: Tensor, x: Tensor, x12: Tensor, w12: Tensor, w3: Tensor, ctx: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, w12, b12, w3 and b3, those that are needed."""
    dtype, need = ctx.dtype, ctx.needs_input_grad
    dx12, dw3 = _gate_linear_backward(grad, x12, w3, ctx, any(need[:3]), ctx.dtypes[3] if need[3] else None)
    return (
        input_gradient(dx12, w12, dtype, ctx.dtypes[0]) if dx12 is not None and need[0] else None,
        weight_gradient(dx12, x, dtype, ctx.dtypes[1]) if dx12 is not None and need[1] else None,
        bias_gradient(dx12, dtype, ctx.dtypes[2]) if dx12 is not None and need[2] else None,
        dw3,
        bias_gradient(grad, dtype, ctx.dtypes[4]) if need[4] else None,
    )


def _gate_linear_backward(
    grad: Tensor, x12: Tensor, w3: Tensor, ctx: Any, need_x12: bool, to: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x12 where needed, that of w3 in the dtype `to`, or None)."""
    dx12 = None
    if need_x12:
        dx12, h = _gate_backward(input_gradient(grad, w3, ctx.dtype, ctx.dtype), x12, ctx.activation)
    else:
        h = _gate(x12, ctx.activation)
    return dx12, None if to is None else weight_gradient(grad, h, ctx.dtype, to)


class _GateLinear(torch.autograd.Function):
    """The half of a gated layer behind its first product. Saves x12."""

    @staticmethod
    def forward(
        ctx: Any,
        x12: Tensor,
        w3: Tensor,
        b3: Tensor | None,
        dtype: torch.dtype,
        activation: Activation,
        invariant: bool,
    ) -> Tensor:
        ctx.save_for_backward(x12, w3)
        ctx.dtype, ctx.activation, ctx.bias_dtype = dtype, activation, None if b3 is None else b3.dtype
        with torch.autocast(x12.device.type, enabled=False):
            return product(_gate(x12, activation), w3, b3, dtype, invariant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x12, w3 = ctx.saved_tensors
        need = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            dx12, dw3 = _gate_linear_backward(grad, x12, w3, ctx, need[0], w3.dtype if need[1] else None)
            db3 = bias_gradient(grad, ctx.dtype, ctx.bias_dtype) if need[2] else None
        return dx12, dw3, db3, None, None, None


def _native_backward(
    grad: Tensor, x: Tensor, x12: Tensor, w12: Tensor, w3: Tensor, ctx: Any
) -> tuple[Tensor | None, ...]:
    """As `_backward`, some rows at a time: the hidden layer's gradients stay in cache and are never held as a whole."""
    need, dtypes = ctx.needs_input_grad, ctx.dtypes
    dx, (w12, w3) = torch.empty_like(x, dtype=dtypes[0]), (factor(w, ctx.dtype) for w in (w12, w3))
    dw12, dw3 = (torch.empty_like(w, dtype=torch.float32, memory_format=torch.contiguous_format) for w in (w12, w3))
    db12 = torch.zeros(len(w12)) if need[2] else None
    grad, x, x12, dx_rows = (t.reshape(-1, t.shape[-1]) for t in (grad, x, x12, dx))
    for rows in chunks(len(x), x12.shape[1]):
        g = grad[rows]
        dh = native_matmul(g, w3, g.new_empty((len(g), w3.shape[1])))
        dx12, h = _gate_backward(dh, x12[rows], ctx.activation)
        native_matmul(g, h, dw3, transposed=True, accumulate=rows.start > 0)
        native_matmul(dx12, x[rows], dw12, transposed=True, accumulate=rows.start > 0)
        native_matmul(dx12, w12, dx_rows[rows])
        if db12 is not None:
            db12 += dx12.sum(0, dtype=torch.float32)
    return dx, dw12, db12, dw3, bias_gradient(grad, ctx.dtype, dtypes[4]) if need[4] else None


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Runs of rows of about `_CHUNK_NUMBERS` numbers, at least 256 rows; one empty run where there are no rows."""
    size = max(256, _CHUNK_NUMBERS // width // 64 * 64)
    return (slice(start, min(rows, start + size)) for start in range(0, max(1, rows), size))


def _gate(x12: Tensor, activation: Activation) -> Tensor:
    """f(x1) · x2 [..., D] of x12 [..., 2 D], by one kernel where there is one."""
    kernels = kernels_for(x12, compiled=True)
    if kernels is not None:
        h: Tensor = kernels.gate(x12.reshape(-1, x12.shape[-1]), activation)
        return h.view(*x12.shape[:-1], h.shape[-1])
    x1, x2 = x12.chunk(2, dim=-1)
    return (F.silu(x1) if activation == "silu" else F.gelu(x1, approximate="tanh")) * x2


def _gate_backward(dh: Tensor, x12: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(gradient of x12, `_gate(x12)`), given the gradient of the latter; by one kernel where there is one."""
    kernels = kernels_for(x12, compiled=True)
    if kernels is not None:
        rows = x12.reshape(-1, x12.shape[-1])
        dx12, h = kernels.gate_backward(dh.reshape(-1, dh.shape[-1]).contiguous(), rows, activation)
        return dx12.view(x12.shape), h.view(dh.shape)
    x1, x2 = x12.chunk(2, dim=-1)
    if activation == "silu":
        gate, dx1 = F.silu(x1), torch.ops.aten.silu_backward(dh * x2, x1)
    else:
        gate, dx1 = F.gelu(x1, approximate="tanh"), torch.ops.aten.gelu_backward(dh * x2, x1, approximate="tanh")
    return torch.cat([dx1, dh * gate], dim=-1), gate * x2


def _gated(
    x: Tensor,
    w12: Tensor,
    b12: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    activation: Activation,
    invariant: bool,
) -> Tensor:
    check_tensor("x", x)
    check_tensor("w12", w12, x)
    check_tensor("b12", b12, x, optional=True)
    check_tensor("w3", w3, x)
    check_tensor("b3", b3, x, optional=True)
    if w12.ndim != 2 or w12.shape[1] != x.shape[-1] or w12.shape[0] % 2:
        raise ValueError(f"w12: got shape {list(w12.shape)}, want [2 * hidden, {x.shape[-1]}] (x's last size)")
    hidden = w12.shape[0] // 2
    if w3.ndim != 2 or w3.shape[1] != hidden:
        raise ValueError(f"w3: got shape {list(w3.shape)}, want [out, {hidden}] (half of w12's first size)")
    for name, bias, weight in (("b12", b12, w12), ("b3", b3, w3)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: got shape {list(bias.shape)}, want [{weight.shape[0]}]")
    dtype = gemm_dtype(x, w12=w12, b12=b12, w3=w3, b3=b3)
    result: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        x, w12, b12, w3, b3, dtype, activation, invariant
    )
    return result


def swiglu(
    x: Tensor, w12: Tensor, b12: Tensor | None, w3: Tensor, b3: Tensor | None, invariant: bool = False
) -> Tensor:
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020): `linear(silu(x1) * x2, w3, b3)` with
    `x1, x2 = linear(x, w12, b12).chunk(2, -1)`.

    x [..., D], w12 [2 * hidden, D] (the gate x1 is the first half), b12 [2 * hidden] or None, w3 [C, hidden],
    b3 [C] or None -> [..., C], in autocast's dtype where autocast is on, else in x's. No input is changed.
    Backward keeps x and the pre-activation [..., 2 * hidden] and recomputes the rest; the values are those of
    the eager formula. It can be differentiated once. With `invariant` its products are those of `linear` with it.
    Raises ValueError where shapes, dtypes or devices do not fit, and as `linear` does.
    """
    return _gated(x, w12, b12, w3, b3, "silu", invariant)


def geglu(x: Tensor, w12: Tensor, b12: Tensor | None, w3: Tensor, b3: Tensor | None, invariant: bool = False) -> Tensor:
    """GeGLU (ibid.): `swiglu` with `F.gelu(x1, approximate="tanh")` in place of `silu(x1)`."""
    return _gated(x, w12, b12, w3, b3, "gelu_tanh", invariant)


class SwiGLU(nn.Module):
    """`swiglu` with its parameters, named as in xFormers' packed SwiGLU.

    Args: in_features, hidden_features, out_features (default: in_features), bias (default: True).
    Parameters: w12.weight [2 * hidden, in], w12.bias [2 * hidden], w3.weight [out, hidden], w3.bias [out].
    """

    activation: Activation = "silu"

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        check_int("in_features", in_features)
        check_int("hidden_features", hidden_features, bits=62)  # there are twice as many rows
        out_features = in_features if out_features is None else out_features
        check_int("out_features", out_features)
        self.w12 = Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = Linear(hidden_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.w12.packed is not None:
            y: Tensor = self.w3(_gate(self.w12(x), self.activation))
            return y
        return _gated(
            x, self.w12.weight, self.w12.bias, self.w3.weight, self.w3.bias, self.activation, self.w12.invariant
        )

    def of_norm(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(`self(norm(total))`, total), see `norm_linear`, with its `terms`."""
        w12, w3 = self.w12, self.w3
        dtype = gemm_dtype(x)
        # The library's products of the layer as a whole share the caches of a CPU.
        whole = type(w3) is not Linear or native(dtype, x, w12.weight, w3.weight)
        if whole or not recomputes(w12, x, residual, norm):
            normed, total = norm.of_sum(x, residual, dtype)
            return self(normed), total
        x12, total = norm_linear(x, residual, norm, w12, terms=True)
        y: Tensor = _GateLinear.apply(  # type: ignore[no-untyped-call]
            x12, w3.weight, w3.bias, x12.dtype, self.activation, w3.invariant
        )
        return y, total


class GeGLU(SwiGLU):
    """`geglu` with its parameters, those of `SwiGLU`."""

    activation = "gelu_tanh"
