"""Masks lowered, and those that are numbers alone kept: most calls bring the mask that the one before brought.

What holds tensors is lowered each time, for these may have been written to; so is what a user made, who may have more
than its fields say. Knows nothing of what a mask means.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from keyspan.core.masks import Combined, Mask
from keyspan.core.observers import untouched
from keyspan.core.ranges import KeyRanges, Seen

_MOST = 32
_LARGEST = 2**17
"""Most entries of a tensor that is kept: 0.5 MiB. Beside attention over more rows than that lowering takes no time."""


class Kept(NamedTuple):
    """A mask that was lowered; nobody writes to it, so it is looked at once."""

    ranges: KeyRanges
    seen: Seen


_kept: dict[Hashable, Kept] = {}


EVERYTHING = Combined(())
"""The mask that hides nothing, lowered where a bias needs positions."""


def lower(mask: Mask, batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
    """`mask.lower`, or what it gave the last time."""
    key = _key(mask, batch, M, N, device)
    if key is None:
        return mask.lower(batch, M, N, device)
    found = _kept.get(key)
    if found is not None:
        return found.ranges
    with torch.inference_mode(False):  # others may save it for backward
        made = mask.lower(batch, M, N, device)
    seen = made.seen()
    if seen is not None and made.lo.numel() <= _LARGEST:
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[key] = Kept(made, seen)
    return made


def kept(mask: Mask, batch: int, M: int, N: int, device: torch.device) -> Kept | None:
    """What `lower` would give without making it."""
    return _kept.get(_key(mask, batch, M, N, device))


def keeps(device: torch.device) -> bool:
    """Whether masks that are numbers alone are kept on this device now: not where what is made is not for everybody."""
    if not untouched():
        return False
    if device.type == "cuda":
        # Memory of a graph is not for those outside.
        return device.index is not None and not torch._C._cuda_isCurrentStreamCapturing()
    return device.type == "cpu"


def _key(mask: Mask, batch: int, M: int, N: int, device: torch.device) -> Hashable:
    """All that the lowered mask depends on; None where it may not be cached."""
    key = mask.cache_key() if keeps(device) else None
    if key is None:
        return None
    # What one stream makes is not there yet for another.
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    return key, batch, M, N, device, stream
