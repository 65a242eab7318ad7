"""Tile scheduling from key ranges: query rows in blocks, and the blocks of keys that each visits.

A row block belongs to one document, and so do its blocks of keys, which are counted from the document's first key: what
a row computes does not depend on what is packed beside its document.
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

    def chunks(self, origin: int, size: int, most: int) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, full) of chunks in the order of their keys, each of at most `most` blocks of `size` keys counted
        from `origin`; `full`: all rows see all their keys."""
        first, last = (self.first - origin) // size, -(-(self.last - origin) // size)
        full_first = min(max(-(-(self.full_first - origin) // size), first), last)
        full_last = min(max((self.full_last - origin) // size, full_first), last)
        for begin, end, full in (
            (first, full_first, False),
            (full_first, full_last, True),
            (full_last, last, False),
        ):
            for at in range(begin, end, most):
                yield origin + at * size, origin + min(at + most, end) * size, full


class RowBlock(NamedTuple):
    """Query rows begin … end − 1 of batch entry `batch` (None: of every entry), of a document whose first key is
    `origin`, and the spans of keys they see."""

    batch: int | None
    begin: int
    end: int
    origin: int
    spans: list[Span]


def uniform_row_blocks(M: int, N: int, rows: int) -> list[RowBlock]:
    """Blocks of `rows` rows, the last one shorter, that all see all N keys."""
    return [RowBlock(None, begin, min(begin + rows, M), 0, [Span(0, 0, 0, N, N)]) for begin in range(0, M, rows)]


def row_blocks(lo: Tensor, hi: Tensor, origin: Tensor | None, rows: int) -> list[RowBlock]:
    """Blocks of `rows` rows counted from the first row of each document that sees a key; the last one is shorter.

    Args:
        lo, hi: int `[S, B or 1, M]`.
        origin: int `[B or 1, M]`, the first key of each row's document; None: 0.
    """
    S, B, M = lo.shape
    if M == 0 or B == 0:
        return []
    lo, hi = lo.long().cpu(), hi.long().cpu()
    empty = lo >= hi
    # An empty row widens no span, and its block has no full part.
    low, high = torch.where(empty, _NO_KEY, lo).flatten(1), torch.where(empty, 0, hi).flatten(1)
    at = torch.zeros(B, M, dtype=torch.long) if origin is None else origin.long().cpu()
    changes = torch.ones(B, M, dtype=torch.bool)
    changes[:, 1:] = at[:, 1:] != at[:, :-1]
    # A document without keys has the origin of the one behind it: rows before the first that sees a key are apart.
    sees = ~empty.all(0)
    seen = sees.cumsum(1)
    before = torch.where(changes, seen - sees.long(), 0).cummax(1).values
    changes |= sees & (seen == before + 1)
    row = torch.arange(B * M)
    start = torch.where(changes.flatten(), row, 0).cummax(0).values
    begins = ((row - start) % rows == 0).nonzero()[:, 0]
    block = torch.zeros_like(row)
    block[begins[1:]] = 1
    block = block.cumsum(0).expand(S, -1)

    def over_blocks(x: Tensor, reduce: str) -> list[list[int]]:
        return x.new_zeros(S, len(begins)).scatter_reduce_(1, block, x, reduce, include_self=False).tolist()

    bounds = [over_blocks(x, reduce) for x, reduce in ((low, "amin"), (low, "amax"), (high, "amin"), (high, "amax"))]
    origins = at.flatten()[begins].tolist()
    ends = [*begins[1:].tolist(), B * M]
    first = over_blocks(low.clamp(min=0).amin(0, keepdim=True).expand(S, -1), "amin")[0]
    found = []
    for n, (begin, end) in enumerate(zip(begins.tolist(), ends, strict=True)):
        spans = [Span(s, *(x[s][n] for x in bounds)) for s in range(S)]
        spans = [span for span in spans if span.first < span.last]
        b = begin // M
        # Ranges made by hand may begin before their document does.
        found.append(RowBlock(None if B == 1 else b, begin - b * M, end - b * M, min(origins[n], first[n]), spans))
    return found
