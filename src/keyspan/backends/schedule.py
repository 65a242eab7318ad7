"""Tile scheduling from key ranges: query rows in blocks, and the keys that each block visits.

A row block has, per range, the span of keys that any of its rows sees (first … last − 1), and the part of it that all
of them see (full_first … full_last − 1), which needs no mask. Keys outside the spans are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_NO_KEY = 2**62


class Span(NamedTuple):
    """Keys first … last − 1 that some row of a block sees in one range; all rows see full_first … full_last − 1."""

    range: int
    first: int
    full_first: int
    full_last: int
    last: int

    def chunks(self, size: int) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, full) of at most `size` keys each: left edge, full part, right edge."""
        parts = [(self.first, self.last, False)]
        if self.full_first < self.full_last:
            parts = [
                (self.first, self.full_first, False),
                (self.full_first, self.full_last, True),
                (self.full_last, self.last, False),
            ]
        for begin, end, full in parts:
            for at in range(begin, end, size):
                yield at, min(at + size, end), full


class RowBlock(NamedTuple):
    """Query rows begin … end − 1 of batch entry `batch` (None: of every entry) and the spans of keys they see."""

    batch: int | None
    begin: int
    end: int
    spans: list[Span]


def uniform_row_blocks(M: int, N: int, rows: int) -> list[RowBlock]:
    """Blocks of `rows` rows, the last one shorter, that all see all N keys."""
    return [RowBlock(None, begin, min(begin + rows, M), [Span(0, 0, 0, N, N)]) for begin in range(0, M, rows)]


def row_blocks(lo: Tensor, hi: Tensor, rows: int, overhead: float) -> list[RowBlock]:
    """Row blocks that cover the visible area at the lowest cost.

    A block costs `overhead` plus one per element of its spans. Starting from single rows, neighbouring blocks are
    merged in pairs where that is cheaper than keeping both: short documents share a block, a decode batch does not.

    Args:
        lo, hi: int32 `[S, B or 1, M]`.
        rows: largest number of rows in a block, a power of two.
        overhead: cost of a block, in elements of one head's score matrix.
    """
    _, B, M = lo.shape
    if M == 0 or B == 0:
        return []
    pad = -M % rows
    empty = lo >= hi
    # An empty row widens no span, and its block has no full part.
    low = torch.where(empty, _NO_KEY, lo.long()).cpu()
    high = torch.where(empty, 0, hi.long()).cpu()
    low = torch.nn.functional.pad(low, (0, pad), value=_NO_KEY)
    high = torch.nn.functional.pad(high, (0, pad), value=0)

    # levels[n] describes blocks of 2ⁿ rows: first, full_first, full_last, last, each [S, B, blocks].
    level = (low, low, high, high)
    cost = overhead + (high - low).clamp(min=0).sum(0).double()
    levels, separate = [level], [torch.zeros_like(cost, dtype=torch.bool)]
    size = 1
    while size < rows:
        size *= 2
        first, full_first, full_last, last = (x.unflatten(-1, (-1, 2)) for x in level)
        level = (first.amin(-1), full_first.amax(-1), full_last.amin(-1), last.amax(-1))
        real = (M - torch.arange(level[0].shape[-1]) * size).clamp(0, size)
        merged = overhead + (level[3] - level[0]).clamp(min=0).sum(0) * real
        both = cost.unflatten(-1, (-1, 2)).sum(-1)
        levels.append(level)
        separate.append(both < merged)
        cost = torch.minimum(both, merged)

    split = [x.tolist() if bool(x.any()) else None for x in separate]
    bounds: dict[int, list[list[list[list[int]]]]] = {}  # by level, made on first use: most levels are not used
    found: list[RowBlock] = []

    def visit(n: int, b: int, block: int) -> None:
        begin = block << n
        if begin >= M:
            return
        flags = split[n]
        if flags is not None and flags[b][block]:
            visit(n - 1, b, 2 * block)
            visit(n - 1, b, 2 * block + 1)
            return
        if n not in bounds:
            bounds[n] = torch.stack(levels[n], -1).tolist()  # [S][B][blocks][4]
        seen = [Span(s, *row[b][block]) for s, row in enumerate(bounds[n])]
        seen = [span for span in seen if span.first < span.last]
        found.append(RowBlock(None if B == 1 else b, begin, min(begin + (1 << n), M), seen))

    for b in range(B):
        for block in range(level[0].shape[-1]):
            visit(len(levels) - 1, b, block)
    return found
