"""RMSNorm, computed in fp32 whatever the dtype, keeping only its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    """y = weight * n with n = x * r and r = 1 / rms(x). On the CPU, `F.rms_norm` keeps n as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (wide * r * _wide(weight)).to(x.dtype)

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
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight`, the mean over the last dimension.

    (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.)
    x [..., D], weight [D] -> [..., D] in x's dtype. The arithmetic is fp32 (fp64 for fp64), rounded once.
    It can be differentiated once. Raises ValueError where weight is not [D].
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, want {list(x.shape[-1:])} (x's last size)")
    if x.is_cuda:  # one fused kernel there, which keeps no more than ours
        return F.rms_norm(_wide(x), weight.shape, _wide(weight), eps).to(x.dtype)
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class RMSNorm(nn.Module):
    """`rms_norm` with its parameter: weight [dim], ones at first. Args: dim, eps (default 1e-6)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim], in x's dtype."""
        return rms_norm(x, self.weight, self.eps)
