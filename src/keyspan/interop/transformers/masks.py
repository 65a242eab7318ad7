"""The mask function for transformers: key ranges, read from a mask function's closure or found in its mask.

A mask travels through the model as its key ranges, in one plain int32 tensor, so caches, checkpointing and compilers
treat it as any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from keyspan.core.ranges import KeyRanges
from keyspan.interop.torch import runs

_PAIRS = 1 << 22
"""Most (query, key) pairs of which a mask is held at a time while its ranges are looked for."""


class Packing(NamedTuple):
    """Which tokens of a padded batch are real."""

    rows: Tensor
    """Indices of the real tokens in the batch laid out as one row, int64 `[T]`."""
    shift: Tensor
    """What takes a key's number in its own row to its number among the real tokens, int32 `[T]`."""
    shape: tuple[int, int]
    """(B, M) of the batch."""


PACKINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask tensor -> Packing, where the mask hides padding."""
RANGES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask tensor -> its KeyRanges: all layers get the same tensor."""


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that `register` registers; arguments as of `transformers.masking_utils.sdpa_mask`.

    Returns:
        `None` where `is_causal` says all (as for `sdpa`). Otherwise the key ranges as int32 `[B, 1, M, 2·S]`,
        `lo, hi` of each range, S = 1 or 2, with one more column where the caller gave a padding mask. A bool mask
        `[B, 1, M, N]` where a row needs more than two ranges, and while torch's compiler traces.
    """
    keys = kv_offset + kv_length
    if (
        q_length == 1
        and mask_function is masking_utils.causal_mask_function
        and allow_is_causal_skip
        and not torch.compiler.is_compiling()
        and q_offset == keys - 1
        and (attention_mask is None or (attention_mask.shape[-1] == keys and bool(attention_mask.all())))
    ):  # a step of decoding without padding
        return None
    whole: dict[str, Any] = {
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    if torch.compiler.is_compiling():
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            q_offset=q_offset,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **whole,
        )
    real = None if attention_mask is None else _real_keys(attention_mask, kv_length, kv_offset)
    query = (torch.arange(q_length, device=device) + q_offset)[None]
    bounds = None if use_vmap else _bounds(mask_function, query)
    span = None if real is None else _one_run(real)
    if bounds is None or (real is not None and span is None):
        found = _search(batch_size, q_length, q_offset, whole)
        if found is None:
            return sdpa_mask(  # type: ignore[no-any-return]
                batch_size=batch_size, q_length=q_length, q_offset=q_offset, allow_is_causal_skip=False, **whole
            )
        lo, hi = found
    else:
        lo = torch.zeros_like(query) if bounds.lo is None else bounds.lo - kv_offset
        hi = torch.full_like(query, kv_length) if bounds.hi is None else bounds.hi - kv_offset
        if span is not None:
            lo, hi = torch.maximum(lo, span[0][:, None]), torch.minimum(hi, span[1][:, None])
        lo = lo.clamp(0, kv_length)
        lo, hi = lo[None].expand(1, batch_size, -1), torch.maximum(hi.clamp(max=kv_length), lo)[None]
        hi = hi.expand_as(lo)
    if len(lo) == 1 and _says_all(lo, hi, kv_length, allow_is_causal_skip, allow_is_bidirectional_skip):
        return None
    columns = [x[..., None] for pair in zip(lo, hi, strict=True) for x in pair]
    if real is not None:
        columns.append(torch.zeros_like(columns[0]))
    mask = torch.cat(columns, -1).int()[:, None]
    RANGES[mask] = key_ranges(lo.int(), hi.int(), kv_length)
    if span is not None and attention_mask is not None and q_length == kv_length == attention_mask.shape[1]:
        PACKINGS[mask] = _packing(attention_mask)
    return mask


def _real_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The keys that are no padding, bool `[B, N]`; what a static cache has room for and no token yet is none."""
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    return F.pad(attention_mask.bool(), (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]


def _one_run(visible: Tensor) -> tuple[Tensor, Tensor] | None:
    """(first, one past the last) visible key per row of `[B, N]`; None where some row has holes."""
    if not visible.shape[1]:
        return None
    lo, hi, count = runs(visible)
    return None if bool((count > 1).any()) else (lo[0].long(), hi[0].long())


def _says_all(lo: Tensor, hi: Tensor, kv_length: int, causal: bool, bidirectional: bool) -> bool:
    """Whether `is_causal` alone says what the ranges say; one query with `is_causal` sees every key."""
    M = lo.shape[-1]
    if bidirectional or (causal and M == 1):
        wanted = torch.full_like(hi, kv_length)
    elif causal:
        wanted = torch.arange(1, M + 1, device=hi.device).clamp(max=kv_length)
    else:
        return False
    return bool(((lo == 0) & (hi == wanted)).all())


def _packing(attention_mask: Tensor) -> Packing:
    real = attention_mask.bool()
    rows = real.flatten().nonzero()[:, 0]
    before = real.flatten().cumsum(0) - 1  # a real token's number among the real ones
    shift = (before - torch.arange(real.shape[1], device=real.device).repeat(len(real)))[rows]
    return Packing(rows, shift.int(), (real.shape[0], real.shape[1]))


def _search(
    batch_size: int, q_length: int, q_offset: int | Tensor, whole: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Ranges of a mask function that is not one of transformers' own; None where two a row do not do."""
    if not whole["kv_length"]:
        nothing = torch.zeros(1, batch_size, q_length, dtype=torch.int32, device=whole["device"])
        return nothing, nothing
    rows = max(1, _PAIRS // (batch_size * whole["kv_length"]))
    found = []
    for first in range(0, q_length, rows):
        block = sdpa_mask(
            batch_size=batch_size,
            q_length=min(rows, q_length - first),
            q_offset=q_offset + first,
            allow_is_causal_skip=False,
            **whole,
        )
        if block.shape[1] != 1:  # differs by head
            return None
        found.append(runs(block[:, 0]))
    lo, hi, count = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    most = int(count.max()) if count.numel() else 0
    return None if most > 2 else (lo[: max(most, 1)], hi[: max(most, 1)])


class Bounds(NamedTuple):
    """Keys `lo ≤ j < hi`, int64 `[B or 1, M]`; None where there is no bound."""

    lo: Tensor | None = None
    hi: Tensor | None = None


def _bounds(function: Callable[..., Tensor], query: Tensor) -> Bounds | None:
    """What a mask function of transformers lets the queries at positions `query` see; None for any other function.

    The functions that transformers makes have no attributes, so they are told apart by their code, and their numbers
    are read from their closures. Code that is not known is never guessed at: its mask is evaluated.
    """
    reader = _READERS.get(getattr(function, "__code__", None))
    if reader is None:
        return None
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return reader(query, **{name: cell.cell_contents for name, cell in zip(names, cells, strict=True)})


def _read_window(query: Tensor, sliding_window: int) -> Bounds:
    return Bounds(query - sliding_window + 1)


def _read_window_both_sides(query: Tensor, sliding_window: int) -> Bounds:
    return Bounds(query - sliding_window, query + sliding_window + 1)


def _read_chunks(query: Tensor, chunk_size: int, left_padding: Tensor) -> Bounds:
    left = left_padding.to(query.device)[:, None]
    start = left + (query - left).div(chunk_size, rounding_mode="floor") * chunk_size
    return Bounds(start, start + chunk_size)


def _read_documents(query: Tensor, packed_sequence_mask: Tensor) -> Bounds:
    numbers = packed_sequence_mask.contiguous()  # never decreasing along a row
    found = [torch.searchsorted(numbers, numbers, right=right) for right in (False, True)]
    start, stop = (x.gather(1, query.expand(len(numbers), -1)) for x in found)
    return Bounds(start, stop)


def _read_positions(query: Tensor, mask_function: Callable[..., Tensor], position_ids: Tensor) -> Bounds | None:
    # Combined by transformers with _read_documents, in whose documents positions grow by one.
    position = position_ids.gather(1, query.expand(len(position_ids), -1))
    inner = _bounds(mask_function, position)
    return None if inner is None else Bounds(*(None if x is None else x + query - position for x in inner))


def _read_all_of(query: Tensor, mask_functions: tuple[Callable[..., Tensor], ...]) -> Bounds | None:
    lo = hi = None
    for function in mask_functions:
        bounds = _bounds(function, query)
        if bounds is None:
            return None
        lo = bounds.lo if lo is None else lo if bounds.lo is None else torch.maximum(lo, bounds.lo)
        hi = bounds.hi if hi is None else hi if bounds.hi is None else torch.minimum(hi, bounds.hi)
    return Bounds(lo, hi)


_ANY = torch.zeros(1, 1, dtype=torch.int64)
_READERS: dict[CodeType | None, Callable[..., Bounds | None]] = {
    masking_utils.causal_mask_function.__code__: lambda query: Bounds(None, query + 1),
    masking_utils.bidirectional_mask_function.__code__: lambda query: Bounds(),
    masking_utils.sliding_window_overlay(1).__code__: _read_window,
    masking_utils.sliding_window_bidirectional_overlay(1).__code__: _read_window_both_sides,
    masking_utils.chunked_overlay(1, _ANY).__code__: _read_chunks,
    masking_utils.packed_sequence_mask_function(_ANY).__code__: _read_documents,
    masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, _ANY).__code__: (
        _read_positions
    ),
    masking_utils.and_masks().__code__: _read_all_of,
}


def key_ranges(lo: Tensor, hi: Tensor, N: int) -> KeyRanges:
    """Ranges `[S, B or 1, M]`; no bias here counts positions, so any numbers do for the diagonal."""
    lo = lo.contiguous()
    return KeyRanges(lo, hi.contiguous(), lo, keys=N)
