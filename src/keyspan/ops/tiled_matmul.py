"""Matrix products of block matrices, and with a mask on the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tiled_matmul(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Block matrix product: `out[i][j] = Σₖ a[i][k] @ b[k][j]`, differentiable."""
    if any(len(row) != len(b) for row in a):
        raise ValueError(f"a: got rows of {[len(row) for row in a]} blocks, want {len(b)}, the number of rows of b")
    columns = list(zip(*b, strict=True))
    return [[torch.cat(list(row), 1) @ torch.cat(column, 0) for column in columns] for row in a]


def masked_matmul(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """`a @ b`, −inf where a bool mask is false, or with a floating mask added."""
    scores = a @ b
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
