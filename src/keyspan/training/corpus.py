"""The task `data`: documents that `keyspan prepare` has turned into token shards, packed best-fit.

Shards are memory-mapped: what is in memory is a plan of a few shards, and the batch. A document that is longer than
`max_length` is cut into consecutive pieces. The order of an epoch is drawn from its seed: the shards, then the pieces
of a few shards at a time. Pieces of such a group are packed so that batches are full and cost alike; no document sees
another.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import heappop, heapreplace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyspan.files import read_json
from keyspan.training.packing import Batch

GROUP = 8
"""Shards whose pieces are shuffled and packed together."""


class Piece(NamedTuple):
    """Part of a document: `length` targets of a shard from `start` on."""

    shard: int
    start: int
    length: int
    first: bool
    """Whether it opens its document; else the token before it is its first input."""


@dataclass(frozen=True)
class Corpus:
    """The task `data`: predict each next token of the documents in a prepared folder.

    Args:
        folder: of `keyspan prepare`.
        max_length: most tokens of a piece.
        max_documents: most pieces of a micro-batch; None: as many as fit.

    Raises ValueError where the folder is not prepared, its shards are not those of its index, or one side is empty.
    """

    folder: Path
    max_length: int
    max_documents: int | None = None

    name = "data"
    metric = "bits_per_byte"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length: got {self.max_length}, want at least 2 tokens for a piece")
        for shard in self.index["shards"]:
            for suffix, size in (("bin", self.dtype.itemsize * shard["tokens"]), ("ends", 8 * shard["documents"])):
                path = self.folder / f"{shard['stem']}.{suffix}"
                if not path.is_file() or path.stat().st_size != size:
                    raise ValueError(f"{path}: want a file of {size} bytes, as index.json says; prepare the data again")
        for side in ("train", "held-out"):
            if not self._shards(side):
                raise ValueError(
                    f"data: {self.folder} holds no {side} document; prepare more text, or another held_out"
                )

    @cached_property
    def index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.is_file():
            raise ValueError(f"data: {self.folder} holds no index.json; want a folder of keyspan prepare")
        found = read_json(path)
        if found.get("format") != 1:
            raise ValueError(f"{path}: got format {found.get('format')}, want 1; prepare the data again")
        return found

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = np.dtype(self.index["dtype"]).newbyteorder("<")
        return found

    @property
    def vocab_size(self) -> int:
        size: int = self.index["vocab_size"]
        return size

    @cached_property
    def tokenizer(self) -> tuple[Any, ...]:
        """What tells tokenizers apart."""
        text = b"" if self.tokenizer_file is None else self.tokenizer_file.read_bytes()
        return self.vocab_size, self.stop, self.dtype, text

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json; None where tokens are bytes."""
        name = self.index["tokenizer"]
        return None if name == "bytes" else self.folder / name

    @property
    def stop(self) -> int:
        """The end token."""
        end: int = self.index["end"]
        return end

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of what tells prepared data apart: the form of tokens, and the shards' sizes and checksums."""
        of = [self.index[name] for name in ("vocab_size", "end", "dtype", "shards")]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()

    # Batches

    def train_batch(self, seed: int, index: int, tokens: int) -> Batch:
        """Micro-batch `index` of the run `seed`, at most `tokens` tokens; a function of these numbers alone."""
        return self._batch(self._plans.batch(seed, index, tokens))

    def position(self, seed: int, index: int, tokens: int) -> dict[str, Any] | None:
        """Where the plan is at micro-batch `index`, for `seek`, as JSON holds it; the same on any number of ranks."""
        start = self._plans.start(index)
        if start is None or self._plans._of != (seed, tokens):
            return None
        return {"checksum": self.checksum, **self._form(seed, tokens), **start._asdict()}

    def seek(self, position: dict[str, Any], seed: int, tokens: int) -> None:
        """Plan from there on, not from the first epoch; where it is of another seed or size, plan from the start.

        Raises ValueError for a position in other data.
        """
        if position.get("checksum") != self.checksum:
            raise ValueError(
                f"data: {self.folder} is not what the run was begun with: it was prepared anew, from other text or "
                "with other options; want the data of then, or a new run"
            )
        form = self._form(seed, tokens)
        if {name: position.get(name) for name in form} != form:
            return
        rest = [[Piece(*piece) for piece in part] for part in position["rest"]]
        start = _Start(position["first"], position["epoch"], position["group"], rest)
        self._plans.begin(seed, tokens, start)

    def _form(self, seed: int, tokens: int) -> dict[str, Any]:
        """What the plan is a function of, apart from the folder."""
        return {"seed": seed, "tokens": tokens, "max_length": self.max_length, "max_documents": self.max_documents}

    def held_out(self, tokens: int, limit: int | None = None) -> list[Batch]:
        """The held-out documents in batches of at most `tokens`; with `limit`, as many as come to about that."""
        shards = self._shards("held-out")
        pieces = [piece for n in range(len(shards)) for piece in self._pieces("held-out", n)]
        if limit is not None:
            tokens = min(tokens, limit)
            pieces = pieces[:: max(1, sum(piece.length for piece in pieces) // limit)]
        bins, rest = pack([x for x in pieces if x.length <= tokens], tokens, 1.0)
        cut = [x._replace(length=tokens) for x in pieces if x.length > tokens]
        return [self._batch(x, "held-out") for x in [*bins, *rest, *([x] for x in cut)]]

    def _names(self, pieces: Sequence[Piece], side: str) -> list[str]:
        """Where each piece stands: folder, shard, and its first token there."""
        stems = [shard["stem"] for shard in self._shards(side)]
        return [f"{self.folder.name}/{stems[piece.shard]}:{piece.start}" for piece in pieces]

    def filled(self, seed: int, count: int, tokens: int) -> float:
        """Share of the positions of the first `count` micro-batches that hold a token."""
        used = sum(x.length for n in range(count) for x in self._plans.batch(seed, n, tokens))
        return used / (count * tokens)

    def baselines(self) -> dict[str, float]:
        """None: text has no simple model that is worth its time here."""
        return {}

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text, end tokens counted."""
        shards = self._shards("held-out")
        length: int = sum(x["bytes"] for x in shards)
        return length / max(1, sum(x["tokens"] for x in shards)) or 1.0

    @cached_property
    def _plans(self) -> _Plans:
        return _Plans(self)

    def _shards(self, side: str) -> list[dict[str, Any]]:
        return [shard for shard in self.index["shards"] if shard["side"] == side]

    def _mapped(self, side: str, shard: int) -> NDArray[Any]:
        stem = self._shards(side)[shard]["stem"]
        return np.memmap(self.folder / f"{stem}.bin", self.dtype, mode="r")

    def _pieces(self, side: str, shard: int) -> list[Piece]:
        """The pieces of a shard, in order."""
        ends = np.fromfile(self.folder / f"{self._shards(side)[shard]['stem']}.ends", "<u8").tolist()
        found = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            for at in range(start, end, self.max_length):
                found.append(Piece(shard, at, min(self.max_length, end - at), at == start))
        return found

    def _batch(self, pieces: Sequence[Piece], side: str = "train") -> Batch:
        tokens, targets = [], []
        for piece in pieces:
            data = self._mapped(side, piece.shard)
            stop = piece.start + piece.length
            before = self.stop if piece.first else data[piece.start - 1]
            targets.append(data[piece.start : stop].astype(np.int64))
            tokens.append(np.concatenate([[before], targets[-1][:-1]]))
        return Batch(
            _tensor(tokens), _tensor(targets), [piece.length for piece in pieces], partial(self._names, pieces, side)
        )

    # Text

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / self.index["tokenizer"]))

    def encode(self, text: str) -> list[int]:
        """The end token, which stands before every document, then the tokens of a text."""
        if self.index["tokenizer"] == "bytes":
            return [self.stop, *text.encode()]
        return [self.stop, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is not UTF-8 is shown as U+FFFD, the end token leaves nothing."""
        kept = [token for token in tokens if token != self.stop]
        if self.index["tokenizer"] == "bytes":
            return bytes(kept).decode(errors="replace")
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text


def _tensor(parts: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


class _Start(NamedTuple):
    """Where the plan of a group of shards begins."""

    first: int
    """Number of its first micro-batch."""
    epoch: int
    group: int
    rest: list[list[Piece]]
    """Batches of the groups before that are not full."""


class _Plans:
    """Which pieces a micro-batch holds. Batches are asked for in order, nearly always; the plan goes on from there."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._of: tuple[int, int] | None = None
        self._next = 0
        self._bins: Iterator[list[Piece]] = iter(())
        self._last: list[Piece] = []
        self._starts: list[_Start] = []

    def batch(self, seed: int, index: int, tokens: int) -> list[Piece]:
        if self._of != (seed, tokens) or index < self._next - 1:
            self.begin(seed, tokens, _Start(0, 0, 0, []))
        while self._next <= index:
            self._last = next(self._bins)
            self._next += 1
        return self._last

    def begin(self, seed: int, tokens: int, start: _Start) -> None:
        """Plan from a group on."""
        self._of, self._next, self._starts = (seed, tokens), start.first, []
        self._bins = self._endless(seed, tokens, start)

    def start(self, index: int) -> _Start | None:
        """The group in which the plan is at a micro-batch that was not yet asked for, or lately; None before any."""
        starts = list(self._starts)  # another thread may be planning
        found = [start for start in starts if start.first <= index]
        del self._starts[: max(len(found) - 1, 0)]
        return found[-1] if found else None

    def _endless(self, seed: int, tokens: int, start: _Start) -> Iterator[list[Piece]]:
        corpus = self._corpus
        shards = len(corpus._shards("train"))
        if corpus.max_length > tokens:
            raise ValueError(
                f"max_length: got {corpus.max_length}, want at most tokens = {tokens}, which a batch holds"
            )
        index, epoch, group, rest = start
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(shards).tolist()
            while group * GROUP < shards:
                self._starts.append(_Start(index, epoch, group, rest))
                random = np.random.default_rng([seed, epoch, 1 + group])
                own = order[group * GROUP : (group + 1) * GROUP]
                pieces = [piece for n in own for piece in corpus._pieces("train", n)]
                # Batches that are not full are packed again with the next group.
                pieces += [piece for part in rest for piece in part]
                pieces = [pieces[n] for n in random.permutation(len(pieces))]
                full, rest = packed = pack(pieces, tokens, 0.99, corpus.max_documents)
                if 2 * packed.left() > sum(piece.length for piece in pieces):  # lengths that fill no batch
                    full, rest = [*full, *rest], []
                yield from (full[n] for n in random.permutation(len(full)))
                index, group = index + len(full), group + 1
            yield from rest
            index, epoch, group, rest = index + len(rest), epoch + 1, 0, []


class Packed(NamedTuple):
    """Pieces in bins."""

    full: list[list[Piece]]
    """Those filled to the share asked for, and those that hold as many pieces as a bin may."""
    rest: list[list[Piece]]

    def left(self) -> int:
        """Tokens in bins that are not full."""
        return sum(piece.length for pieces in self.rest for piece in pieces)


def pack(pieces: Sequence[Piece], capacity: int, least: float, most: int | None = None) -> Packed:
    """Pack pieces so that bins are full to a share of at least `least`, hold at most `most` pieces and cost alike.

    The attention of a bin costs the sum of its squared lengths. The longest piece comes first and goes to the cheapest
    bin (longest processing time first, Graham 1969); where that has no room, into the bin that it fills best (best fit
    decreasing, Johnson 1973). Where lengths vary so little that this leaves much, all go where they fit best. Pieces of
    one length keep their order.
    """
    total = sum(piece.length for piece in pieces)
    alike = max(total // capacity, len(pieces) // most if most else 0, 1)
    by_cost = _pack(pieces, capacity, least, most, alike)
    if by_cost.left() <= max(total // 50, capacity):
        return by_cost
    by_fit = _pack(pieces, capacity, least, most, 0)
    return by_fit if by_fit.left() < by_cost.left() else by_cost


def _pack(pieces: Sequence[Piece], capacity: int, least: float, most: int | None, alike: int) -> Packed:
    """Bins, of which so many are to cost alike; further ones are made for what does not fit."""
    bins: list[list[Piece]] = [[] for _ in range(alike)]
    left, cost = [capacity] * alike, [0] * alike
    cheapest = [(0, number) for number in range(alike)]  # a heap; bins leave it where a piece did not fit
    room = [(capacity, number) for number in range(alike)]  # (what is left of a bin, its number), sorted
    for piece in sorted(pieces, key=lambda x: -x.length):
        while cheapest and left[cheapest[0][1]] < piece.length:
            heappop(cheapest)
        if cheapest:
            number = cheapest[0][1]
            room.pop(bisect_left(room, (left[number], number)))
        elif (at := bisect_left(room, (piece.length, -1))) < len(room):
            number = room.pop(at)[1]
        else:
            number = len(bins)
            bins.append([])
            left.append(capacity)
            cost.append(0)
        bins[number].append(piece)
        left[number] -= piece.length
        cost[number] += piece.length**2
        closed = len(bins[number]) == most
        if not closed:
            insort(room, (left[number], number))
        if cheapest and closed:
            heappop(cheapest)
        elif cheapest:
            heapreplace(cheapest, (cost[number], number))
    filled = [
        capacity - left[number] >= least * capacity or (number < alike and len(held) == most)
        for number, held in enumerate(bins)
    ]
    full = [held for held, enough in zip(bins, filled, strict=True) if enough]
    return Packed(full, [held for held, enough in zip(bins, filled, strict=True) if held and not enough])
