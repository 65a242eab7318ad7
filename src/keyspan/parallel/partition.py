"""Which rows of a sequence each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from keyspan.core.checks import check_int, check_type, is_a
from keyspan.core.masks import Combined, Mask, as_mask
from keyspan.core.ranges import KeyRanges

CHUNKS = (1, 2, 4, 8, 16)
"""Chunks per rank that `Partition.balanced` tries, the fewest first: fewer chunks cut fewer documents apart."""


@dataclass(frozen=True)
class Partition:
    """A sequence of rows cut into pieces, each held by one rank; any length, also one that ranks do not divide.

    >>> Partition.balanced(keyspan.Causal(), 16, ranks=2).pieces
    (((0, 4), (12, 16)), ((4, 12),))

    Args:
        pieces: for each rank the runs of rows that it holds, as (first, one past the last), in ascending order. Each
            row of 0 … length − 1 stands in exactly one run.

    Raises ValueError for runs that overlap, leave out rows or are out of order.
    """

    pieces: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        try:
            whole = all(isinstance(n, int) for runs in self.pieces for first, stop in runs for n in (first, stop))
        except (TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"pieces: got {self.pieces!r}, want for each rank its runs of rows (first, stop)")
        for rank, runs in enumerate(self.pieces):
            if any(not 0 <= a < b for a, b in runs) or any(x[1] > y[0] for x, y in pairwise(runs)):
                raise ValueError(f"pieces: got {runs} for rank {rank}, want runs (first, stop) in ascending order")
        at = 0
        for first, stop in sorted(run for runs in self.pieces for run in runs):
            if first != at:
                raise ValueError(f"pieces: got a run from row {first} behind row {at}, want each row held by one rank")
            at = stop

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Partition:
        """Rank r holds the r-th of `ranks` runs of nearly equal length."""
        check_int("length", length, 0, bits=31)
        check_int("ranks", ranks, bits=31)
        return cls._dealt(_bounds(length, ranks), [[rank] for rank in range(ranks)])

    @classmethod
    def balanced(
        cls, mask: Mask | KeyRanges | Tensor | None, length: int, ranks: int, *, batch: int = 1, tolerance: float = 0.05
    ) -> Partition:
        """Ranks hold nearly equal numbers of rows that see nearly equal numbers of keys.

        The rows are cut into chunks of nearly equal length, which are dealt to the ranks by the number of keys that
        they see, the largest first, each to the rank that has the least of those with room (longest processing time
        first, Graham 1969). The number of chunks is the smallest with which no rank sees more than `tolerance` above
        the mean. For a causal mask that is the zig-zag of two chunks a rank.

        Args:
            mask: of self-attention over `length` rows; `None`: every row sees every key.
            batch: batch entries that the mask is for.
        """
        check_int("length", length, 0, bits=31)
        check_int("ranks", ranks, bits=31)
        ranges = lowered(mask, batch, length, length)
        area = (ranges.hi.long() - ranges.lo).clamp(min=0).sum((0, 1))
        total = torch.cat([area.new_zeros(1), area.cumsum(0)])
        best: tuple[float, Partition] | None = None
        for per_rank in CHUNKS:
            if per_rank > 1 and per_rank * ranks > length:
                break
            bounds = _bounds(length, per_rank * ranks)
            ends = total[torch.tensor(bounds)].tolist()
            areas = [b - a for a, b in pairwise(ends)]
            dealt, loads = _deal(areas, ranks)
            excess = max(loads) * ranks / max(sum(loads), 1) - 1
            if best is None or excess < best[0] - 1e-9:
                best = excess, cls._dealt(bounds, dealt)
            if excess <= tolerance:
                break
        assert best is not None
        return best[1]

    @classmethod
    def _dealt(cls, bounds: Sequence[int], chunks: Sequence[Sequence[int]]) -> Partition:
        pieces = []
        for numbers in chunks:
            runs: list[tuple[int, int]] = []
            for n in sorted(numbers):
                first, stop = bounds[n], bounds[n + 1]
                if first == stop:
                    continue
                if runs and runs[-1][1] == first:
                    first = runs.pop()[0]
                runs.append((first, stop))
            pieces.append(tuple(runs))
        return cls(tuple(pieces))

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.pieces)

    @property
    def length(self) -> int:
        """Rows in all."""
        return sum(map(self.rows_of, range(self.ranks)))

    def rows_of(self, rank: int) -> int:
        """How many rows a rank holds."""
        return sum(stop - first for first, stop in self.pieces[rank])

    def rows(self, rank: int) -> Tensor:
        """The numbers of the rows that a rank holds, ascending, int64 on the CPU."""
        return torch.cat([torch.arange(0), *(torch.arange(first, stop) for first, stop in self.pieces[rank])])

    def take(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The rows of a rank from a tensor that has all of them along `dim`."""
        check_type("x", x, Tensor)
        check_int("rank", rank, 0)
        if rank >= self.ranks:
            raise ValueError(f"rank: got {rank}, want 0 … {self.ranks - 1}")
        if not is_a(dim, int) or not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim: got {dim!r}, want {-x.dim()} … {x.dim() - 1}")
        if x.shape[dim] != self.length:
            raise ValueError(f"x: got {x.shape[dim]} rows along dim {dim}, want {self.length}")
        runs = [x.narrow(dim, first, stop - first) for first, stop in self.pieces[rank]]
        return torch.cat(runs or [x.narrow(dim, 0, 0)], dim)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """All rows from the ranks' parts: the inverse of `take`."""
        order = torch.cat([self.rows(rank) for rank in range(self.ranks)]).argsort()
        return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))


def lowered(mask: Mask | KeyRanges | Tensor | None, batch: int, M: int, N: int) -> KeyRanges:
    """Any mask as ranges on the CPU; paged keys are refused."""
    if isinstance(mask, KeyRanges):
        if mask.lo.shape[2] != M or mask.keys not in (None, N):
            raise ValueError(
                f"mask: got ranges of {mask.lo.shape[2]} rows and {mask.keys} keys, want all {M} rows and {N} keys"
            )
        ranges = mask.to("cpu")
    else:
        if mask is not None:
            check_type("mask", mask, Mask, Tensor)
        ranges = (Combined(()) if mask is None else as_mask(mask).to("cpu")).lower(batch, M, N)
    if ranges.block_table is not None:
        raise ValueError("mask: got paged keys, want keys in one row: pages are not cut across ranks")
    return ranges


def _bounds(length: int, count: int) -> list[int]:
    """Where `count` chunks of nearly equal length begin, and the end."""
    return [length * n // count for n in range(count + 1)]


def _deal(areas: Sequence[int], ranks: int) -> tuple[list[list[int]], list[int]]:
    """(numbers of the chunks of each rank, its area): each rank gets one of each `ranks` chunks in descending order."""
    order = sorted(range(len(areas)), key=lambda n: (-areas[n], n))
    chunks: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for first in range(0, len(order), ranks):
        by_load = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, n in zip(by_load, order[first : first + ranks], strict=True):
            chunks[rank].append(n)
            loads[rank] += areas[n]
    return chunks, loads
