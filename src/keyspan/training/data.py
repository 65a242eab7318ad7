"""The task `stdlib`: the source code of this Python's standard library, as bytes; text that every machine has.

One file is one document; a longer file is cut into consecutive documents. A token is a byte, or `START`, which opens
each document. A hash of its relative path says whether a file is held out, so the split is the same on each run and
machine. The baselines on the same held-out files, a bigram model and gzip, are here too.
"""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from random import Random

import torch

from keyspan.training.packing import Batch

START = 256
EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders left out: other people's packages, and tests (half of the library's bytes)."""
HELD_OUT_ONE_IN = 20
"""One file in so many is held out."""


def python_files(root: Path | None = None) -> dict[str, bytes]:
    """The non-empty `*.py` files under `root` (default: this Python's standard library) by relative path, sorted."""
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = {path.relative_to(folder): path for path in folder.rglob("*.py")}
    texts = {name.as_posix(): path.read_bytes() for name, path in paths.items() if EXCLUDED.isdisjoint(name.parts)}
    files = {name: texts[name] for name in sorted(texts) if texts[name]}
    if not files:
        raise ValueError(f"root: got {folder}, which holds no Python source; want a folder with *.py files")
    return files


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def is_held_out(name: str) -> bool:
    """Whether the file of this relative path is kept from training."""
    return _hash(name) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class StandardLibrary:
    """The task `stdlib`: predict each next byte of source code.

    `max_length` is the most bytes in one document; `root` is another folder to read instead of the standard library.
    """

    max_length: int
    root: Path | None = None

    name = "stdlib"
    metric = "bits_per_byte"
    vocab_size = START + 1
    stop = None
    bytes_per_token = 1.0

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length: got {self.max_length}, want at least 2 bytes for a document")

    def files(self, *, held_out: bool) -> list[bytes]:
        """The files of one side of the split, in an order fixed by the hash of their paths."""
        return list(_split(self.root)[held_out])

    def documents(self, *, held_out: bool) -> list[bytes]:
        """The same files, cut into consecutive documents of at most `max_length` bytes."""
        return _documents(self.root, self.max_length, held_out)

    def train_batch(self, seed: int, index: int, tokens: int) -> Batch:
        """Micro-batch `index` of the run `seed`: exactly `tokens` bytes of the endless stream of documents.

        The stream is the training documents, shuffled anew for each epoch; a document that a batch's end cuts in two
        goes on in the next batch as a document of its own.
        """
        documents = self.documents(held_out=False)
        total = sum(map(len, documents))
        pieces: list[bytes] = []
        position, end = index * tokens, (index + 1) * tokens
        while position < end:
            epoch, offset = divmod(position, total)
            order, ends = _epoch(seed, epoch, tuple(map(len, documents)))
            place = bisect_right(ends, offset)
            document = documents[order[place]]
            start = len(document) - (ends[place] - offset)
            pieces.append(document[start : start + end - position])
            position += len(pieces[-1])
        return pack_bytes(pieces)

    def held_out(self, tokens: int, limit: int | None = None) -> list[Batch]:
        """The held-out documents in batches of at most `tokens` bytes; with `limit`, as many from all over as come to
        about that number of bytes."""
        documents = self.documents(held_out=True)
        if limit is not None:
            tokens = min(tokens, limit)
            documents = documents[:: max(1, sum(map(len, documents)) // limit)]
        return [pack_bytes(pieces) for pieces in _fill(documents, tokens)]

    def baselines(self) -> dict[str, float]:
        """Bits per byte of simpler models on the held-out files."""
        held_out = self.files(held_out=True)
        return {
            "bigram": bigram_bits_per_byte(self.files(held_out=False), held_out),
            "gzip -9, each file": gzip_bits_per_byte(held_out),
            "gzip -9, one stream": gzip_bits_per_byte([b"".join(held_out)]),
        }

    def encode(self, text: str) -> list[int]:
        """`START`, then the UTF-8 bytes of a text."""
        return [START, *text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; what is not UTF-8 is shown as U+FFFD, and `START` leaves nothing."""
        return bytes(token for token in tokens if token != START).decode(errors="replace")


def pack_bytes(documents: Sequence[bytes]) -> Batch:
    """Pack non-empty documents: each byte is a target, its input is the byte before it or, for the first, `START`."""
    targets = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()
    lengths = [len(document) for document in documents]
    tokens = targets.roll(1)
    tokens[[0, *accumulate(lengths[:-1])]] = START
    return Batch(tokens, targets, lengths)


def _fill(documents: Iterable[bytes], tokens: int) -> Iterator[list[bytes]]:
    pieces: list[bytes] = []
    used = 0
    for document in documents:
        if pieces and used + len(document) > tokens:
            yield pieces
            pieces, used = [], 0
        pieces.append(document)
        used += len(document)
    yield pieces


@lru_cache(maxsize=2)
def _split(root: Path | None) -> tuple[list[bytes], list[bytes]]:
    """(training files, held-out files)."""
    files = python_files(root)
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for name in sorted(files, key=_hash):
        sides[is_held_out(name)].append(files[name])
    if not all(sides):
        raise ValueError(f"root: got {len(files)} Python files, too few for a training and a held-out side; want more")
    return sides


@lru_cache(maxsize=4)
def _documents(root: Path | None, max_length: int, held_out: bool) -> list[bytes]:
    return [
        text[start : start + max_length] for text in _split(root)[held_out] for start in range(0, len(text), max_length)
    ]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, lengths: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The documents' order in one epoch, and where in the epoch's stream each of them ends."""
    order = list(range(len(lengths)))
    Random(f"{seed} stdlib {epoch}").shuffle(order)
    return order, list(accumulate(lengths[i] for i in order))


def bigram_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Bits per byte of a bigram model of bytes counted on `train`, on the files `held_out`.

    Witten–Bell smoothing: P(b | a) = (count(a, b) + followers(a) · P(b)) / (count(a) + followers(a)), where
    followers(a) counts the different bytes seen after a, and P(b) = (count(b) + 1) / (bytes + 256). The first byte of
    a file follows `START`.
    """
    pairs = _pair_counts(train)
    unigram = (pairs.sum(0) + 1) / (pairs.sum() + 256)
    followers = (pairs > 0).sum(1, keepdim=True).clamp(min=1)
    probability = (pairs + followers * unigram) / (pairs.sum(1, keepdim=True) + followers)
    seen = _pair_counts(held_out)
    return float(-(seen * probability.log2()).sum() / seen.sum())


def _pair_counts(files: Iterable[bytes]) -> torch.Tensor:
    """[257, 256] fp64: how often each byte follows each byte (or `START`)."""
    batch = pack_bytes([text for text in files if text])
    return torch.bincount(batch.tokens * 256 + batch.targets, minlength=257 * 256).view(257, 256).double()


def gzip_bits_per_byte(files: Iterable[bytes]) -> float:
    """Bits per byte of `gzip -9`, each file compressed on its own."""
    sizes = [(len(gzip.compress(text, 9, mtime=0)), len(text)) for text in files]
    return 8 * sum(packed for packed, _ in sizes) / sum(plain for _, plain in sizes)
