"""RMSNorm, computed in fp32 whatever the dtype. Backward keeps its input and one number a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keyspan.core.checks import check_dtype, check_int, check_number, check_tensor
from keyspan.layers.gemm import cast
from keyspan.layers.kernels import kernels_for


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    """y = weight · n with n = x · r and r = 1 / rms(x). On the CPU, `F.rms_norm` keeps n as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return cast(wide * r * _wide(weight), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wide, n = _wide(grad), _wide(x) * r
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dn = wide * _wide(weight)
            dx = (r * (dn - n * (n * dn).mean(-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (wide * n).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return dx, dweight, None, None


Kept = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""What backward of a norm needs: what was normed, or x and residual [T, D]; 1 / rms [T]; weight [D]."""


def norm_of_sum(
    kernels: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, terms: bool
) -> tuple[Tensor, Tensor, Kept]:
    """(norm, x + residual, `Kept`) of x and residual [T, D].

    With `terms` these two are kept where the residual has fewer bytes than the sum.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    normed, total, inverse = kernels.rms_norm(x, residual, weight, eps, dtype)
    terms = terms and residual is not None and residual.dtype.itemsize < x.dtype.itemsize
    return normed, total, (x, residual, inverse, weight) if terms else (total, None, inverse, weight)


def norm_gradients(
    kernels: Any,
    kept: Kept,
    grad: Tensor,
    grad_total: Tensor | None,
    needs: Sequence[bool],
    residual_dtype: torch.dtype | None,
    normed: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(gradients of x, residual and weight, those that are needed; the norm [T, D] again where `normed`).

    The gradients of the norm and of the sum are [T, D] when flat. A residual that was not there has dtype None.
    """
    x, residual, inverse, weight = kept
    rounded = residual_dtype if needs[1] and residual_dtype != x.dtype else None
    dx, dresidual, dweight, out = kernels.rms_norm_backward(
        grad.reshape(x.shape).contiguous(),
        None if grad_total is None else grad_total.reshape(x.shape).contiguous(),
        x, residual, weight, inverse, weight_too=needs[2], residual_dtype=rounded, normed=normed,
    )  # fmt: skip
    return (
        dx if needs[0] else None,
        (dx if dresidual is None else dresidual) if needs[1] else None,
        None if dweight is None else dweight.to(weight.dtype),
        out,
    )


class _Fused(torch.autograd.Function):
    """(norm, x + residual) by one kernel; without a residual the norm alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, kernels: Any
    ) -> Any:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        more = None if residual is None else residual.reshape(rows.shape).contiguous()
        out, total, inverse = kernels.rms_norm(rows, more, weight, eps, dtype)
        ctx.save_for_backward(total, None, inverse, weight)
        ctx.kernels, ctx.dtype = kernels, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return out.view(x.shape) if residual is None else (out.view(x.shape), total.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            assert grad_total is not None  # torch calls for one of them
            dresidual = grad_total.to(ctx.dtype) if needs[1] else None
            return grad_total if needs[0] else None, dresidual, None, None, None, None
        dx, dresidual, dweight, _ = norm_gradients(ctx.kernels, ctx.saved_tensors, grad, grad_total, needs, ctx.dtype)
        dx, dresidual = (None if d is None else d.view(grad.shape) for d in (dx, dresidual))
        return dx, dresidual, dweight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight`, the mean over the last dimension.

    Args:
        x: [..., D]; weight: [D].
        eps: added to the mean.
        dtype: of the result; None for x's. A layer whose consumer rounds its input may ask for that dtype at once.

    Returns:
        [..., D]. The arithmetic is fp32 (fp64 for fp64), rounded once. Differentiable once. It is one kernel on a GPU,
        and on a CPU with the native library.

    Raises:
        ValueError: where weight is not [D], and for other arguments that do not fit.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    _check(x, weight, eps, dtype)
    dtype = dtype or x.dtype
    kernels = kernels_for(x, weight) if dtype != torch.float64 else None
    if kernels is not None:
        result: Tensor = _Fused.apply(x, None, weight, eps, dtype, kernels)  # type: ignore[no-untyped-call]
    elif x.is_cuda:  # compiled there: torch's formula is fused with what surrounds it
        result = F.rms_norm(_wide(x), weight.shape, _wide(weight), eps).to(dtype)
    else:
        result = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return result


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(`rms_norm(total, weight)`, total) with total = x + residual in x's dtype, by one kernel as there.

    x and residual [..., D] of one shape; else as `rms_norm`.
    """
    _check(x, weight, eps, dtype)
    check_tensor("residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(f"residual: got shape {list(residual.shape)}, want {list(x.shape)} as x")
    dtype = dtype or x.dtype
    kernels = kernels_for(x, residual, weight) if dtype != torch.float64 else None
    if kernels is not None:
        normed, total = _Fused.apply(x, residual, weight, eps, dtype, kernels)  # type: ignore[no-untyped-call]
    else:
        total = (x + residual).to(x.dtype)
        normed = rms_norm(total, weight, eps, dtype)
    return normed, total


def _check(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight, x)
    check_number("eps", eps)
    check_dtype("dtype", dtype)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, want {list(x.shape[-1:])} (x's last size)")


class RMSNorm(nn.Module):
    """`rms_norm` with its parameter: weight [dim], ones at first. Args: dim, eps (default 1e-6)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_int("dim", dim)
        check_number("eps", eps)
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., dim] -> [..., dim], in `dtype` or x's."""
        return rms_norm(x, self.weight, self.eps, dtype)

    def add(self, x: Tensor, residual: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of x and residual [..., dim], see `add_rms_norm`."""
        return add_rms_norm(x, residual, self.weight, self.eps, dtype)

    def of_sum(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """`add`, or (norm of x, x) where residual is None."""
        return (self(x, dtype), x) if residual is None else self.add(x, residual, dtype)
