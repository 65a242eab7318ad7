"""RMSNorm under xFormers' names, computed by `keyspan.layers.rms_norm`; unlike xFormers' it has gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keyspan import layers
from keyspan.core.checks import check_int, check_number, check_tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension, in fp32, rounded to x's dtype. `None` is ones."""
    check_tensor("x", x)
    return layers.rms_norm(x, x.new_ones(x.shape[-1]) if weight is None else weight, eps)


def rms_norm_add(x: Tensor, y: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """`x += y` in place, then `rms_norm(x)`."""
    check_tensor("x", x)
    check_tensor("y", y, x)
    if y.shape != x.shape:
        raise ValueError(f"y: got shape {list(y.shape)}, want {list(x.shape)} as x")
    return rms_norm(x.add_(y), weight, eps)


class RMSNorm(nn.Module):
    """`rms_norm` with its parameter. Args: dim, include_weight (default True), eps (default 1e-6)."""

    def __init__(self, dim: int, include_weight: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        check_int("dim", dim)
        check_number("eps", eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if include_weight else None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., dim]` -> `[..., dim]` in x's dtype."""
        return rms_norm(x, self.weight, self.eps)

    def increment_and_forward_(self, x: Tensor, y: Tensor) -> Tensor:
        """`x += y` in place (the residual stream), then the norm of x."""
        return rms_norm_add(x, y, self.weight, self.eps)
