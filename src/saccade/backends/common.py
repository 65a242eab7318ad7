"""Maths that two backends use unchanged. Knows no backend."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_matmul(weight: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
    """`weight @ rows`, where a row that a result may not see does not reach it even when it holds NaN or inf.

    A hidden row has weight 0, but 0 · NaN = NaN. So non-finite entries are taken out of the product and put back
    only where they are visible.

    Args:
        weight: `[..., m, n]`, zero where `visible` is false.
        rows: `[..., n, d]`.
        visible: bool, broadcastable to `[..., m, n]`.
    """
    finite = torch.isfinite(rows)
    if bool(finite.all()):
        return weight @ rows
    out = weight @ torch.where(finite, rows, 0)
    seen = visible.to(rows.dtype).expand(*visible.shape[:-2], *weight.shape[-2:])
    for special, found in (
        (torch.nan, torch.isnan(rows)),
        (torch.inf, rows == torch.inf),
        (-torch.inf, rows == -torch.inf),
    ):
        out = out + torch.where(seen @ found.to(rows.dtype) > 0, special, 0)
    return out
