"""Matrix products of block matrices, and with a mask on the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keyspan.core.checks import check_type


def tiled_matmul(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Block matrix product: `out[i][j] = Σₖ a[i][k] @ b[k][j]`, differentiable."""
    for name, blocks in (("a", a), ("b", b)):
        check_type(name, blocks, list, tuple)
        for row in blocks:
            check_type(name, row, list, tuple)
            for block in row:
                check_type(name, block, Tensor)
    for k, row in enumerate(b):
        height, widths = {x.shape[0] for x in row}, {blocks[k].shape[1] for blocks in a if len(blocks) == len(b)}
        if widths and height != widths:
            raise ValueError(
                f"b: got blocks of {sorted(height)} rows in row {k}, want {sorted(widths)}, as a's columns"
            )
    if any(len(row) != len(b) for row in a):
        raise ValueError(f"a: got rows of {[len(row) for row in a]} blocks, want {len(b)}, the number of rows of b")
    columns = list(zip(*b, strict=True))
    return [[torch.cat(list(row), 1) @ torch.cat(column, 0) for column in columns] for row in a]


def masked_matmul(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """`a @ b`, −inf where a bool mask is false, or with a floating mask added."""
    given: dict[str, Tensor] = {"a": a, "b": b} if mask is None else {"a": a, "b": b, "mask": mask}
    for name, x in given.items():
        check_type(name, x, Tensor)
        if x.device != a.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, want one on {a.device} as a")
    if a.dim() < 2:
        raise ValueError(f"a: got shape {list(a.shape)}, want [..., M, K]")
    if b.dim() < 2 or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        raise ValueError(
            f"b: got {b.dtype} of shape {list(b.shape)}, want {a.dtype} of {a.shape[-1]} rows, the columns of a"
        )
    scores = a @ b
    if mask is None:
        return scores
    try:
        torch.broadcast_shapes(mask.shape, scores.shape)
    except RuntimeError:
        want = list(scores.shape)
        raise ValueError(f"mask: got shape {list(mask.shape)}, want one that broadcasts to {want}") from None
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
