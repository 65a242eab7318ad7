"""Lengths of documents as lists or tensors: checked, read on the host where that waits for nothing, and lowered."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from keyspan.core.checks import readable

Align: TypeAlias = Literal["top_left", "bottom_right"]
Lengths: TypeAlias = Sequence[int] | Tensor
INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of lengths and page numbers; torch lacks arithmetic for other unsigned ones."""


def check_lengths(name: str, lengths: Any) -> tuple[int, ...] | Tensor:
    """Lengths as a tuple of int, or the tensor given. Values on a device are not read, so not checked."""
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.dtype not in INT_DTYPES:
            raise ValueError(f"{name}: got {lengths.dtype} of shape {list(lengths.shape)}, want a 1-D int tensor")
        if readable(lengths) and lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"{name}: got {int(lengths.min())}, want every length ≥ 0")
        return lengths
    try:
        given = list(lengths)
    except TypeError:
        raise ValueError(f"{name}: got {lengths!r}, want a sequence of int or an int tensor") from None
    values = []
    for n in given:
        try:
            value = -1 if isinstance(n, bool) else n if isinstance(n, int) else operator.index(n)
        except (TypeError, RuntimeError, ValueError):
            value = -1
        if value < 0:
            raise ValueError(f"{name}: got {n!r}, want every length an int ≥ 0")
        values.append(value)
    return tuple(values)


def on_host(lengths: Lengths | None) -> list[int] | None:
    """The lengths as a list; `None` for tensors that are not readable."""
    if isinstance(lengths, Tensor):
        return lengths.tolist() if readable(lengths) else None
    return None if lengths is None else list(lengths)


def total_of(lengths: Lengths) -> int | None:
    values = on_host(lengths)
    return None if values is None else sum(values)


def as_tensor(lengths: Lengths, device: torch.device) -> Tensor:
    if isinstance(lengths, Tensor):
        if lengths.device.type == "meta" and device.type != "meta":
            raise ValueError(f"mask: got lengths on meta, which hold no values, want them on {device}")
        # From pinned memory a GPU copies without being waited for.
        return lengths.to(device, non_blocking=device.type == "cuda").to(torch.int32)
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def check_total(name: str, lengths: Lengths, size_name: str, size: int) -> None:
    total = total_of(lengths)
    if total is None:
        return
    exact = not isinstance(lengths, Tensor)
    if total > size or (exact and total != size):
        values = on_host(lengths) or [0]
        cumulative = values[0] == 0 and values[-1] == size and values == sorted(values)
        hint = "; are they cumulative? Documents.from_cu_seqlens takes such" if cumulative else ""
        raise ValueError(f"{name}: got {total} in all, want {'' if exact else 'at most '}{size_name} = {size}{hint}")


def check_align(align: object) -> None:
    if align not in ("top_left", "bottom_right"):
        raise ValueError(f"align: got {align!r}, want 'top_left' or 'bottom_right'")


def set_fields(mask: object, **values: object) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(mask, name, value)


def set_lengths(mask: object, first: str, *others: str, optional: str | None = None) -> None:
    """Set checked lengths of a frozen dataclass, in its `__post_init__`: one entry of each for each of the first."""
    lengths = check_lengths(first, getattr(mask, first))
    set_fields(mask, **{first: lengths})
    if optional is not None and getattr(mask, optional) is not None:
        others = (*others, optional)
    for name in others:
        other = check_lengths(name, getattr(mask, name))
        if len(other) != len(lengths):
            raise ValueError(f"{name}: got {len(other)} documents, want {len(lengths)} as in {first}")
        set_fields(mask, **{name: other})
