"""Functions that both `reference` and `chunked` use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dequantized(x: Tensor, scale: Tensor | None, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `x` in `dtype`, each multiplied by its scale.

    Args:
        x: `[B, n, …, d]`.
        scale: `[B, C, …]`, one entry per n / C rows; None: 1.
        rows: a slice without a step, or indices, into the n rows.
    """
    part = x[:, rows].to(dtype)
    if scale is None:
        return part
    if isinstance(rows, slice):
        rows = torch.arange(*rows.indices(x.shape[1]), device=x.device)
    return part * scale[:, rows // max(x.shape[1] // scale.shape[1], 1)].to(dtype)[..., None]


def visible_matmul(
    weight: Tensor,
    rows: Tensor,
    visible: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """`weight @ rows`; NaN and inf of a hidden row do not reach the result.

    A hidden row has weight 0, but 0 · NaN = NaN. So non-finite entries are replaced by 0 in the product, and added
    to those results that see them.

    Args:
        weight: `[..., m, n]`, zero where `visible` is false.
        rows: `[..., n, d]`.
        visible: bool, broadcastable to `[..., m, n]`: result row m sees row n.
        product: what computes a product.
    """
    finite = torch.isfinite(rows)
    if bool(finite.all()):
        return product(weight, rows)
    out = product(weight, torch.where(finite, rows, 0))
    seen = visible.to(rows.dtype).expand(*visible.shape[:-2], *weight.shape[-2:])
    for special, found in (
        (torch.nan, torch.isnan(rows)),
        (torch.inf, rows == torch.inf),
        (-torch.inf, rows == -torch.inf),
    ):
        out = out + torch.where(product(seen, found.to(rows.dtype)) > 0, special, 0)
    return out
