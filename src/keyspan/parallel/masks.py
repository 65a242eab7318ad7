"""A mask cut across ranks: the key ranges of one rank's rows, and which keys travel between the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from keyspan.core.checks import check_device, check_type
from keyspan.core.masks import Mask
from keyspan.core.ranges import KeyRanges
from keyspan.parallel.partition import Partition, lowered

Exchange: TypeAlias = Literal["auto", "ring", "gather"]
MOST_RANGES = 4
"""Ranges of a row in one call: the most that every backend takes."""
LEAST_ROWS = 2**16
"""Rows × query heads of a call that fill a GPU: with fewer, fewer calls are made."""
WAITED = 0.25
"""Heads are cut into slices, and the keys of a slice travel while the slice before is computed. Nothing hides the way
of the first slice: its keys are at most this share of the rank's queries. More slices cost time, since a smaller call
fills a GPU less evenly."""


class Context(NamedTuple):
    """How ranks share the sequences of a model: which rows each holds, and their group."""

    partition: Partition
    group: Any = None
    exchange: Exchange = "auto"

    def cut(self, mask: Mask, device: torch.device) -> ContextMask:
        """A mask of packed rows, cut."""
        return ContextMask(mask, self.partition, group=self.group, device=device, exchange=self.exchange)


class Transfer(NamedTuple):
    """Keys that travel in one collective."""

    send: list[Tensor]
    """For each rank the local rows that it is sent, int64."""
    sent: Tensor
    """Those that any rank is sent, each once, ascending."""
    places: list[Tensor]
    """For each rank where its rows stand among `sent`."""
    receive: list[int]
    """From each rank so many rows."""
    order: list[tuple[int, int, int]]
    """The runs (piece, first row, one past the last) that make the part, keys ascending. Piece 0 is of the rank's own
    keys, piece 1 + r came from rank r."""


@dataclass(frozen=True, eq=False)
class Part:
    """The keys of one round, and what this rank's rows see of them."""

    transfer: Transfer | None
    """None: these are the rank's own keys."""
    own: int
    """How many of the keys are the rank's own: all, none (a round of a ring), or some (gathered)."""
    keys: Tensor
    """Numbers of the keys in the whole sequence, ascending, int64 on the query's device."""
    ranges: list[KeyRanges]
    """One call each; disjoint. Empty where no row sees any of the keys."""


class ContextMask:
    """A mask cut into pieces for ranks that each hold a part of the rows and of the keys.

    Every rank makes it with the same arguments; nothing is communicated. It is made once per batch and serves all
    layers.

    Args:
        mask: over all rows and keys, as `keyspan.attention` takes it. Not paged.
        partition: of the query rows; and of the keys where `keys` is None.
        keys: partition of the keys where it differs.
        group: process group of the ranks, or a one-dimensional DeviceMesh; None for all processes, or this one where
            torch.distributed is not in use.
        batch: batch entries; masks with a length per entry need it.
        device: of query and keys.
        exchange: how keys travel. "ring": the keys of one other rank at a time, the next ones on their way while the
            present ones are used; a rank holds the keys of two others at most, and merges results. "gather": all keys
            that a rank needs; where many travel, of a few heads at a time, those of the next heads on their way
            meanwhile. A row is computed in one call, and nothing is merged. "auto" gathers where that holds no more
            keys and values at a time than a rank has queries and outputs, and else passes them in a ring. Both send a
            rank only the keys that its rows see, so both send the same bytes.

    Raises ValueError where sizes do not fit.
    """

    def __init__(
        self,
        mask: Mask | KeyRanges | Tensor | None,
        partition: Partition,
        keys: Partition | None = None,
        *,
        group: Any = None,
        batch: int = 1,
        device: torch.device | str = "cpu",
        exchange: Exchange = "auto",
    ) -> None:
        check_type("partition", partition, Partition)
        if keys is not None:
            check_type("keys", keys, Partition)
        if exchange not in ("auto", "ring", "gather"):
            raise ValueError(f"exchange: got {exchange!r}, want 'auto', 'ring' or 'gather'")
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        alone = group is None and not dist.is_initialized()
        self.rank, ranks = (0, 1) if alone else (dist.get_rank(self.group), dist.get_world_size(self.group))
        if self.rank < 0:
            raise ValueError("group: got one without this process, want one of its ranks to make the mask")
        self.queries, self.keys = partition, keys or partition
        for name, x in (("partition", self.queries), ("keys", self.keys)):
            if x.ranks != ranks:
                raise ValueError(f"{name}: got pieces for {x.ranks} ranks, want {ranks} as in the group")
        self.exchange, self.device = exchange, check_device("device", device)
        whole = lowered(mask, batch, self.queries.length, self.keys.length)
        rows = [_rows(whole, self.queries.rows(rank)) for rank in range(ranks)]
        # Which keys any row of a rank sees, bool [ranks, N].
        self._seen = torch.stack([_seen(ranges, self.keys.length) for ranges in rows])
        self._own = rows[self.rank]
        self._parts: dict[tuple[str, bool], list[Part]] = {}

    @cached_property
    def ranges(self) -> KeyRanges:
        """The ranges of this rank's rows, in numbers of the whole sequence, on `device`."""
        return self._own.to(self.device)

    @cached_property
    def rows(self) -> Tensor:
        """The numbers of this rank's rows, int64 on `device`."""
        return self.queries.rows(self.rank).to(self.device)

    @cached_property
    def travelling(self) -> list[list[int]]:
        """`travelling[r][s]`: how many keys rank r needs from rank s."""
        owned = [self.keys.rows(rank) for rank in range(self.keys.ranks)]
        counts = [[int(seen[rows].sum()) for rows in owned] for seen in self._seen]
        return [[0 if r == s else n for s, n in enumerate(row)] for r, row in enumerate(counts)]

    def form(self, query_heads: int, kv_heads: int) -> tuple[Literal["ring", "gather"], int]:
        """How keys travel in a call with so many heads, and in how many slices of the heads; the same on every rank."""
        received = max(map(sum, self.travelling))
        held = max(map(self.queries.rows_of, range(self.queries.ranks)))
        possible = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and held * query_heads >= n * LEAST_ROWS]
        possible = possible or [1]
        # The keys of two slices are held at a time.
        small = [n for n in possible if received * kv_heads * min(n, 2) <= held * query_heads * n]
        if self.exchange == "ring" or (self.exchange == "auto" and not small):
            return "ring", 1
        enough = small or possible[-1:]
        ahead = [n for n in enough if received * kv_heads <= WAITED * n * held * query_heads]
        return "gather", min(ahead, default=enough[-1])

    def parts(self, form: Literal["ring", "gather"], positions: bool) -> list[Part]:
        """The rounds of a call, the rank's own keys first.

        Args:
            positions: whether a bias counts positions. Then each run of adjacent keys has ranges of its own, since
                distances jump from one run to the next.
        """
        key = (form, positions)
        if key not in self._parts:
            me, ranks = self.rank, self.keys.ranks
            if form == "gather" and any(map(sum, self.travelling)):
                others = set(range(ranks)) - {me}
                self._parts[key] = [self._received(others, others, positions, with_own=True)]
                return self._parts[key]
            found = [self._part(None, self.keys.rows(me), positions)]
            for step in range(1, ranks):
                if any(self.travelling[r][(r - step) % ranks] for r in range(ranks)):
                    sources, targets = ({(me + sign * step) % ranks} for sign in (-1, 1))
                    found.append(self._received(sources, targets, positions))
            self._parts[key] = found
        return self._parts[key]

    def _received(self, sources: set[int], targets: set[int], positions: bool, with_own: bool = False) -> Part:
        """The part of the keys that this rank receives from some ranks, while it sends its own to others."""
        ranks, nothing = range(self.keys.ranks), torch.arange(0)
        own, mine = self.keys.rows(self.rank), self._seen[self.rank]
        send = [self._seen[r][own].nonzero()[:, 0] if r in targets else nothing for r in ranks]
        come = [(rows := self.keys.rows(s))[mine[rows]] if s in sources else nothing for s in ranks]
        pieces = [own if with_own else nothing, *come]
        numbers, order = torch.cat(pieces).sort()
        sent = torch.cat(send).unique()
        places = [torch.searchsorted(sent, x) for x in send]
        send, places = ([x.to(self.device) for x in of] for of in (send, places))
        runs = _runs(order, list(map(len, pieces)))
        transfer = Transfer(send, sent.to(self.device), places, list(map(len, come)), runs)
        return self._part(transfer, numbers, positions, len(own) if with_own else None)

    def _part(self, transfer: Transfer | None, keys: Tensor, positions: bool, own_keys: int | None = None) -> Part:
        own = self._own
        # Of ascending keys, those in a range stand side by side.
        lo, hi = (torch.searchsorted(keys, x.long()).int() for x in (own.lo, own.hi))
        hi = torch.maximum(lo, hi)
        diagonal = torch.zeros_like(lo)
        if positions and len(keys):
            jumps = (keys[1:] != keys[:-1] + 1).nonzero()[:, 0] + 1
            first = torch.cat([jumps.new_zeros(1), jumps])
            stop = torch.cat([jumps, jumps.new_tensor([len(keys)])])
            shift = keys[first] - first  # from a place among these keys to the key's number
            first, stop, shift = (x.int()[:, None, None] for x in (first, stop, shift))
            lo, hi, diagonal = torch.broadcast_tensors(
                torch.maximum(lo[:, None], first), torch.minimum(hi[:, None], stop), own.diagonal[:, None] - shift
            )
            lo, hi, diagonal = _packed(*(x.flatten(0, 1) for x in (lo, hi, diagonal)))
        origin = own.origin
        if origin is not None:
            origin = torch.searchsorted(keys, origin.long()).int().clamp(max=max(len(keys) - 1, 0))
        dense = own.dense
        if dense is not None and dense.shape[-1] > 1:
            dense = dense.index_select(-1, keys)
        calls = []
        for s in range(0, len(lo), MOST_RANGES):
            some = slice(s, s + MOST_RANGES)
            # The first part, which has the rank's own keys, has a call in any case: it counts the learned sinks.
            if bool((lo[some] < hi[some]).any()) or (s == 0 and (transfer is None or own_keys is not None)):
                ranges = KeyRanges(
                    lo[some], hi[some], diagonal[some], origin=origin, dense=dense, keys=len(keys),
                    row_keys=_row_keys(lo[some], hi[some]),
                )  # fmt: skip
                calls.append(ranges.to(self.device))
        return Part(transfer, len(keys) if transfer is None else own_keys or 0, keys.to(self.device), calls)


def _runs(order: Tensor, sizes: list[int]) -> list[tuple[int, int, int]]:
    """`Transfer.order` of rows that are numbered through all pieces."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    piece = torch.searchsorted(starts, order, right=True) - 1
    begins = torch.ones_like(order, dtype=torch.bool)
    begins[1:] = (order[1:] != order[:-1] + 1) | (piece[1:] != piece[:-1])
    places = begins.nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in pairwise([*places, len(order)])]
    of = piece[places].tolist()
    firsts = (order[places] - starts[piece[places]]).tolist()
    return [(n, first, first + length) for n, first, length in zip(of, firsts, lengths, strict=True)]


def _row_keys(lo: Tensor, hi: Tensor) -> int:
    """`KeyRanges.row_keys` of ranges on the host."""
    seen = int((hi.long() - lo).clamp(min=0).sum()) / max(lo[0].numel(), 1)
    return 1 << max(0, round(math.log2(max(seen, 1))))


def _rows(ranges: KeyRanges, rows: Tensor) -> KeyRanges:
    """The ranges of some rows."""
    lo, hi, diagonal = (x.index_select(-1, rows) for x in (ranges.lo, ranges.hi, ranges.diagonal))
    dense = ranges.dense
    if dense is not None and dense.dim() > 1 and dense.shape[-2] > 1:
        dense = dense.index_select(-2, rows)
    origin = None if ranges.origin is None else ranges.origin.index_select(-1, rows)
    return replace(ranges, lo=lo, hi=torch.maximum(lo, hi), diagonal=diagonal, origin=origin, dense=dense)


def _seen(ranges: KeyRanges, length: int) -> Tensor:
    """Whether any row sees a key, bool [length]."""
    begins, ends = (torch.bincount(x.flatten().clamp(0, length), minlength=length + 1) for x in (ranges.lo, ranges.hi))
    seen = (begins - ends).cumsum(0)[:length] > 0
    if ranges.dense is not None:
        seen = seen & ranges.dense.reshape(-1, ranges.dense.shape[-1]).any(0)
    return seen


def _packed(lo: Tensor, hi: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges [S, B, M] without those that are empty in every row, each row's others first."""
    filled, order = (lo < hi).sort(dim=0, descending=True, stable=True)
    most = max(int(filled.sum(0).max()), 1) if filled.numel() else 1
    lo, hi, diagonal = (x.gather(0, order)[:most] for x in (lo, hi, diagonal))
    return torch.where(filled[:most], lo, 0), torch.where(filled[:most], hi, 0), diagonal
