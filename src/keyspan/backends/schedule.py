"""Which tiles of the score matrix to visit, from key ranges alone. Knows nothing of scores.

A tile is a run of query rows and, per range, the span of keys that any of them sees (`first … last`) with the part
that all of them see (`full_first … full_last`), which needs no predicate. Everything outside the spans is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 2**62


class Span(NamedTuple):
    """Keys `first … last − 1` that some row of a tile sees; all rows see `full_first … full_last − 1`."""

    range: int
    first: int
    full_first: int
    full_last: int
    last: int

    def chunks(self, size: int) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, full) over the left edge, the full part and the right edge, at most `size` keys each."""
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


class Tile(NamedTuple):
    """Query rows `begin … end − 1` of batch entry `batch` (`None`: of every entry alike) and the spans they see."""

    batch: int | None
    begin: int
    end: int
    spans: list[Span]


def uniform_tiles(M: int, N: int, rows: int) -> list[Tile]:
    """Runs of `rows` rows that all see all N keys."""
    return [Tile(None, begin, min(begin + rows, M), [Span(0, 0, 0, N, N)]) for begin in range(0, M, rows)]


def tiles(lo: Tensor, hi: Tensor, rows: int, overhead: float) -> list[Tile]:
    """The cheapest tiling of the visible area by tiles of at most `rows` rows, a power of two.

    A tile costs `overhead` plus one per element of its spans. Runs of rows are merged in pairs as long as that is
    cheaper than keeping them apart, so that short documents share a tile and a decode batch does not.

    Args:
        lo, hi: int32 `[S, B or 1, M]`.
        rows: most rows in a tile.
        overhead: cost of a tile, in elements of one head's score matrix.
    """
    _, B, M = lo.shape
    if M == 0 or B == 0:
        return []
    pad = -M % rows
    empty = lo >= hi
    # An empty row widens no span and leaves no part full.
    low = torch.where(empty, _FAR, lo.long()).cpu()
    high = torch.where(empty, 0, hi.long()).cpu()
    low = torch.nn.functional.pad(low, (0, pad), value=_FAR)
    high = torch.nn.functional.pad(high, (0, pad), value=0)

    # levels[n] describes blocks of 2ⁿ rows: first, full_first, full_last, last, each [S, B, blocks].
    level = (low, low, high, high)
    cost = overhead + (high - low).clamp(min=0).sum(0).double()
    levels, kept_apart = [level], [torch.zeros_like(cost, dtype=torch.bool)]
    size = 1
    while size < rows:
        size *= 2
        first, full_first, full_last, last = (x.unflatten(-1, (-1, 2)) for x in level)
        level = (first.amin(-1), full_first.amax(-1), full_last.amin(-1), last.amax(-1))
        real = (M - torch.arange(level[0].shape[-1]) * size).clamp(0, size)
        merged = overhead + (level[3] - level[0]).clamp(min=0).sum(0) * real
        apart = cost.unflatten(-1, (-1, 2)).sum(-1)
        levels.append(level)
        kept_apart.append(apart < merged)
        cost = torch.minimum(apart, merged)

    split = [x.tolist() if bool(x.any()) else None for x in kept_apart]
    bounds: dict[int, list[list[list[list[int]]]]] = {}  # by level, made on demand: most levels are never read
    found: list[Tile] = []

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
        found.append(Tile(None if B == 1 else b, begin, min(begin + (1 << n), M), seen))

    for b in range(B):
        for block in range(level[0].shape[-1]):
            visit(len(levels) - 1, b, block)
    return found
