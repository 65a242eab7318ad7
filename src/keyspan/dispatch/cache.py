"""The cache of what repeated calls need: lowered masks and replays of recorded computations.

A replay computes what a recorded computation did, from the addresses of other tensors with the same signature. It skips
checks, layout and the choice of a backend, which take longer than a small problem.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from keyspan.backends import Replay
from keyspan.core import shims
from keyspan.core.masks import Mask
from keyspan.core.problem import EVERYTHING
from keyspan.core.ranges import KeyRanges

T = TypeVar("T")
LARGEST_MASK = 2**17
"""Most entries of a cached lowered tensor: 0.5 MiB. Next to attention over more rows, lowering takes no time."""


def signature(tensors: Iterable[Tensor]) -> tuple[tuple[object, ...], list[int]] | None:
    """What recorded computations depend on: shape, strides, dtype, device and alignment of each tensor, and which of
    them share an address. And their addresses. None where a pointer does not say all about one of the tensors."""
    form: list[object] = []
    pointers: list[int] = []
    plain = shims.PLAIN
    try:
        for x in tensors:
            if type(x) not in plain or x.is_neg():
                return None
            pointer = x.data_ptr()
            if not pointer and (x.numel() or x.is_meta):  # zeros without memory, freed storage
                return None
            pointers.append(pointer)
            form += (x.shape, x.stride(), x.dtype, x.device, pointer % 16)  # kernels are compiled for an alignment
    except RuntimeError:  # sparse
        return None
    if len(set(pointers)) < len(pointers):
        form.append(tuple(map(pointers.index, pointers)))
    return tuple(form), pointers


class Cache:
    """A bounded dict of replays and lowered masks that evicts what was not used for longest.

    A computation is recorded when its key comes for the second time: recording costs more than computing once, and a
    key-value cache that grows by a key with each call brings a new signature each time.
    """

    def __init__(self, entries: int = 1024, nbytes: int = 64 * 2**20):
        self.most_entries, self.most_bytes = entries, nbytes
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything, the counts too."""
        with self.lock:
            self.entries.clear()
            self.seen: OrderedDict[int, None] = OrderedDict()
            self.nbytes = self.hits = self.misses = self.recorded = 0

    def state(self) -> dict[str, int]:
        """Entries, bytes of lowered masks, and counts since the last `clear`."""
        counts = {"hits": self.hits, "misses": self.misses, "recorded": self.recorded}
        return {"entries": len(self.entries), "bytes": self.nbytes, **counts}

    def get(self, key: Hashable) -> Any:
        """What was put, or None."""
        found = self.entries.get(key)
        if found is not None and len(self.entries) > self.most_entries // 2:  # otherwise nothing is evicted soon
            try:  # contextlib.suppress takes longer than the rest
                self.entries.move_to_end(key)
            except KeyError:  # another thread has evicted it since
                return found
        return found

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value; the bytes that it holds are those its attribute `nbytes` says."""
        with self.lock:
            self.nbytes += getattr(value, "nbytes", 0) - getattr(self.entries.get(key), "nbytes", 0)
            self.entries[key] = value
            while len(self.entries) > self.most_entries or (self.nbytes > self.most_bytes and len(self.entries) > 1):
                self.nbytes -= getattr(self.entries.popitem(last=False)[1], "nbytes", 0)

    def second_sight(self, key: Hashable) -> bool:
        """Whether a computation that was not replayed is recorded now. Its first sight leaves a hash and no entry."""
        self.misses += 1
        code, seen = hash(key), self.seen
        if code in seen:
            return self.get(key) is not NO_REPLAY
        seen[code] = None
        if len(seen) > _MOST_SEEN:
            seen.popitem(last=False)
        return False

    def compute(self, key: Hashable, compute: Callable[[], T], record: Callable[[], tuple[T, Any]]) -> T:
        """Compute what was not replayed, and record it on second sight: the one place that decides so.

        Args:
            key: everything that the computation depends on, the signature of its tensors included.
            compute: the computation.
            record: the same, and what the cache keeps for its replay; None where it cannot be replayed.
        """
        if not self.second_sight(key):
            return compute()
        made, replay = record()
        self.recorded += replay is not None
        self.put(key, NO_REPLAY if replay is None else replay)
        return made

    def run(
        self,
        key: Hashable,
        pointers: list[int],
        tensors: Sequence[Tensor],
        compute: Callable[[], T],
        record: Callable[[], tuple[T, Replay[T] | None]],
    ) -> T:
        """Replay, or else `compute`.

        Args:
            pointers: addresses of `tensors`.
        """
        found = self.get(key)
        if callable(found):
            results: T | None = found(pointers, tensors)
            if results is not None:  # no setting of torch or the backend has changed
                self.hits += 1
                return results
        return self.compute(key, compute, record)


_MOST_SEEN = 4096
"""Most hashes kept of keys that were seen; the oldest go first."""
NO_REPLAY = "a computation that cannot be replayed"
"""In place of a replay."""
CACHE = Cache()


class Lowered(NamedTuple):
    """A lowered mask in the cache."""

    ranges: KeyRanges
    nbytes: int


def caches_masks(device: torch.device) -> bool:
    """Whether lowered masks are cached on this device now."""
    return shims.eager() and mask_key(EVERYTHING, device) is not None


def mask_key(mask: Mask, device: torch.device) -> Hashable | None:
    """What a lowered mask depends on besides batch, M and N, where torch runs eagerly; None where it is not cached."""
    kind, index = device.type, device.index  # read once: each access builds an object
    if kind == "cpu":
        return mask.cache_key()
    # The memory of a CUDA graph belongs to the graph; and another stream might read a mask before it is written.
    if kind != "cuda" or index is None or shims.cuda_capturing():
        return None
    key = mask.cache_key()
    return None if key is None else (key, shims.cuda_stream(index))


def lower(mask: Mask, batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
    """`mask.lower(…)`, cached for masks that are determined by numbers; nobody writes to the result."""
    key = mask_key(mask, device) if shims.eager() else None
    if key is None:
        return mask.lower(batch, M, N, device)
    found = CACHE.get(("mask", key, batch, M, N, device))
    if found is not None:
        ranges: KeyRanges = found.ranges
        return ranges
    with torch.inference_mode(False):  # autograd may save it
        made = mask.lower(batch, M, N, device)
    if made.lo.numel() <= LARGEST_MASK:
        nbytes = sum(x.nbytes for x in made.tensors())
        CACHE.put(("mask", key, batch, M, N, device), Lowered(made, nbytes))
    return made
