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
from keyspan.core.ranges import KeyRanges

T = TypeVar("T")
LARGEST_MASK = 2**17
"""Most entries of a cached lowered tensor: 0.5 MiB. Next to attention over more rows, lowering takes no time."""


class Signature(NamedTuple):
    """What recorded computations depend on, and where the tensors lie."""

    form: tuple[object, ...]
    """Shape, strides, dtype, device and alignment of each tensor, and which of them share an address."""
    pointers: list[int]


def signature(tensors: Iterable[Tensor]) -> Signature | None:
    """The signature of some tensors; None where a pointer does not say all about one of them."""
    form: list[object] = []
    pointers: list[int] = []
    try:
        for x in tensors:
            if type(x) not in shims.PLAIN or x.is_neg():
                return None
            pointer = x.data_ptr()
            if not pointer and x.numel():  # zeros without memory, freed storage, the meta device
                return None
            pointers.append(pointer)
            form += (x.shape, x.stride(), x.dtype, x.device, pointer % 16)  # kernels are compiled for an alignment
    except RuntimeError:  # sparse
        return None
    if len(set(pointers)) < len(pointers):
        form.append(tuple(map(pointers.index, pointers)))
    return Signature(tuple(form), pointers)


class Cache:
    """A bounded dict that forgets what was not used for longest.

    A computation is recorded when its key comes for the second time: recording costs more than computing once, and a
    key-value cache that grows by a key with each call brings a new signature each time.
    """

    def __init__(self, entries: int = 2048, nbytes: int = 64 * 2**20):
        self.most_entries, self.most_bytes = entries, nbytes
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        self.nbytes = self.hits = self.misses = self.recorded = 0
        self.lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """What was put, or None."""
        try:
            found = self.entries[key]
            self.entries.move_to_end(key)
        except KeyError:  # also where another thread evicts the key in between
            return None
        return found

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value; the bytes that it holds are those its attribute `nbytes` says."""
        with self.lock:
            self.nbytes += getattr(value, "nbytes", 0) - getattr(self.entries.get(key), "nbytes", 0)
            self.entries[key] = value
            while len(self.entries) > self.most_entries or (self.nbytes > self.most_bytes and len(self.entries) > 1):
                self.nbytes -= getattr(self.entries.popitem(last=False)[1], "nbytes", 0)

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()
            self.nbytes = self.hits = self.misses = self.recorded = 0

    def state(self) -> dict[str, int]:
        """Entries, bytes of lowered masks, and counts since the last `clear`."""
        counts = {"hits": self.hits, "misses": self.misses, "recorded": self.recorded}
        return {"entries": len(self.entries), "bytes": self.nbytes, **counts}

    def second_sight(self, key: Hashable, found: Any) -> bool:
        """Whether to record a computation now, given what `get` found; the first time marks its key."""
        self.misses += 1
        if found is None:
            self.put(key, _SEEN)
        return found is _SEEN

    def run(
        self,
        key: Hashable,
        pointers: list[int],
        tensors: Sequence[Tensor],
        compute: Callable[[], T],
        record: Callable[[], tuple[T, Replay[T] | None]],
    ) -> T:
        """Replay, record or compute.

        Args:
            key: everything that the computation depends on, the signature of `tensors` included.
            pointers: addresses of `tensors`.
            compute: the computation.
            record: the same, and a replay of it; None where it cannot be replayed.
        """
        found = self.get(key)
        if callable(found):
            results: T | None = found(pointers, tensors)
            if results is not None:
                self.hits += 1
                return results
            found = None  # a setting of torch or the backend has changed since
        if not self.second_sight(key, found):
            return compute()
        made, replay = record()
        self.recorded += replay is not None
        self.put(key, NO_REPLAY if replay is None else replay)
        return made


class _Mark:
    """A value of the cache that is no replay."""


_SEEN, NO_REPLAY = _Mark(), _Mark()
CACHE = Cache()


class Lowered(NamedTuple):
    """A lowered mask in the cache."""

    ranges: KeyRanges
    nbytes: int


def caches_masks(device: torch.device) -> bool:
    """Whether lowered masks are cached on this device now."""
    if not shims.eager():
        return False
    if device.type == "cuda":  # the memory of a CUDA graph belongs to the graph
        return device.index is not None and not shims.cuda_capturing()
    return device.type == "cpu"


def mask_key(mask: Mask, device: torch.device) -> Hashable | None:
    """What a lowered mask depends on besides batch, M and N; None where it may not be cached now."""
    key = mask.cache_key() if caches_masks(device) else None
    if key is None or device.type != "cuda":
        return key
    return key, shims.cuda_stream(device.index)  # another stream might read it before it is written


def lower(mask: Mask, batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
    """`mask.lower(…)`, cached for masks that are determined by numbers; nobody writes to the result."""
    key = mask_key(mask, device)
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
