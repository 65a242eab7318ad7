"""A linear layer of a norm of a sum, as one node of autograd: backward keeps the sum and computes the norm again."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keyspan.core.checks import check_tensor
from keyspan.layers.gemm import Linear, bias_gradient, gemm_dtype, input_gradient, product, weight_gradient
from keyspan.layers.kernels import kernels_for
from keyspan.layers.rmsnorm import RMSNorm, norm_gradients, norm_of_sum


class _NormLinear(torch.autograd.Function):
    """(linear of the norm, x + residual); without a residual the former alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        invariant: bool,
        terms: bool,
    ) -> Any:
        kernels = kernels_for(x, compiled=True)
        normed, total, kept = norm_of_sum(kernels, x, residual, scale, eps, dtype, terms)
        ctx.save_for_backward(*kept, weight)
        ctx.dtype, ctx.dtypes = dtype, [None if t is None else t.dtype for t in (residual, bias)]
        with torch.autocast(x.device.type, enabled=False):
            y = product(normed, weight, bias, dtype, invariant)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        dtype, (residual_dtype, bias_dtype), needs = ctx.dtype, ctx.dtypes, ctx.needs_input_grad
        kernels = kernels_for(kept[0], compiled=True)
        with torch.autocast(grad.device.type, enabled=False):
            dnormed = input_gradient(grad, weight, dtype, dtype)
            dx, dresidual, dscale, normed = norm_gradients(
                kernels, kept, dnormed, grad_total, needs, residual_dtype, normed=needs[3]
            )
            dweight = None if normed is None else weight_gradient(grad, normed, dtype, weight.dtype)
            dbias = bias_gradient(grad, dtype, bias_dtype) if needs[4] else None
        return dx, dresidual, dscale, dweight, dbias, None, None, None, None


def norm_linear(
    x: Tensor, residual: Tensor | None, norm: RMSNorm, layer: nn.Module, terms: bool = False
) -> tuple[Tensor, Tensor]:
    """(`layer(norm(total))`, total) with total = x + residual in x's dtype, or x where residual is None.

    Args:
        x, residual: [T, D]. layer: of the norm in the dtype that `Linear` multiplies; any module.
        terms: whether backward keeps x and residual, where that has fewer bytes than x, and adds them again. For an x
            that another layer keeps anyway.

    Where a gradient is wanted and a `Linear` is run by fused kernels, also under `torch.compile`, backward keeps total
    and one number a row. It computes the norm again in the pass that computes the norm's gradient, with the same bits.

    Raises ValueError where an argument has another type, and as the norm and the layer do.
    """
    check_tensor("x", x)
    check_tensor("residual", residual, x, optional=True)
    for name, module, kind in (("norm", norm, RMSNorm), ("layer", layer, nn.Module)):
        if not isinstance(module, kind):
            raise ValueError(f"{name}: got {type(module).__name__}, want {kind.__name__}")
    if recomputes(layer, x, residual, norm):
        dtype = gemm_dtype(x, weight=layer.weight, bias=layer.bias)
        found: Any = _NormLinear.apply(  # type: ignore[no-untyped-call]
            x, residual, norm.weight, layer.weight, layer.bias, norm.eps, dtype, layer.invariant, terms
        )
        return (found, x) if residual is None else found
    normed, total = norm.of_sum(x, residual, gemm_dtype(x))
    return layer(normed), total


def recomputes(layer: nn.Module, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> TypeGuard[Linear]:
    """Whether the layer of the norm is one node of autograd."""
    if type(layer) is not Linear or layer.packed is not None:
        return False
    given = [t for t in (residual, norm.weight, layer.weight, layer.bias) if t is not None]
    fits = x.ndim == 2 and norm.weight.shape == x.shape[1:] and (residual is None or residual.shape == x.shape)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given))
    return fits and wanted and kernels_for(x, *given, compiled=True) is not None
