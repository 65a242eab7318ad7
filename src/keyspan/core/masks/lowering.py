"""Lowering: the parts of a mask to key ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keyspan.core.checks import check_int, readable
from keyspan.core.masks.base import Combined, Dense, Frame, Layout, Mask, Union
from keyspan.core.masks.layouts import KeyLengths, PagedKeys, SharedPrompt
from keyspan.core.masks.lengths import Align, on_host
from keyspan.core.masks.visibility import Causal, Prefix, Sinks, Window
from keyspan.core.ranges import KeyRanges

UNBOUNDED = 2**30
"""Stands for "all" in a window; positions below 2²⁹ plus this fit int32."""


def lower_parts(parts: tuple[Mask, ...], batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
    """The ranges of `visible(i, j)`, defined in the package's docstring; two per row where exempt keys lie apart."""
    align = alignment(parts)
    frame = _frame(parts, batch, M, N, device)
    start, stop = frame.start, frame.stop
    diagonal = frame.top_left if align == "top_left" else frame.bottom_right
    far = UNBOUNDED
    if M + N > 2**29:  # sums of positions and windows exceed int32
        start, stop, diagonal, far = start.long(), stop.long(), diagonal.long(), 2**33
    windows = [part for part in parts if isinstance(part, Window)]
    lo, hi = start, stop
    if any(isinstance(part, (Causal, SharedPrompt)) for part in parts):
        hi = torch.minimum(hi, diagonal + 1)
    reach = hi
    for window in windows:
        if window.left is not None:
            lo = torch.maximum(lo, diagonal - min(window.left, far))
        if window.right is not None:
            hi = torch.minimum(hi, diagonal + min(window.right, far) + 1)

    exempt = _exempt(parts, start[:1], stop[:1], reach[:1], far)
    if exempt is not None and all(window.left is None for window in windows):
        # The exempt keys and the visible range both begin at `start`: their union is one range.
        hi = torch.cat([torch.maximum(hi[:1], exempt), hi[1:]])
    elif exempt is not None:
        lo = torch.cat([start[:1], torch.maximum(lo[:1], exempt), lo[1:]])
        hi = torch.cat([exempt, hi])
        start, stop, diagonal = (torch.cat([x[:1], x]) for x in (start, stop, diagonal))
    lo = torch.minimum(torch.maximum(lo, start), stop)
    hi = torch.maximum(torch.minimum(hi, stop), lo)

    dense = None
    for part in parts:
        if isinstance(part, Dense):
            dense = part.visible if dense is None else dense & part.visible
    if dense is not None and dense.device != device:
        raise ValueError(f"mask: got a bool tensor on {dense.device}, want {device}")
    shape = (lo.shape[0], lo.shape[1], M)
    return KeyRanges(
        lo.expand(shape).int(),
        hi.expand(shape).int(),
        diagonal.expand(shape).int(),
        frame.sequence,
        frame.block_table,
        frame.page_size,
        dense,
        N,
        None if frame.at_zero else frame.start[0].expand(shape[1:]).int(),
        _row_keys(parts, align, M, N, device),
    )


def _row_keys(parts: tuple[Mask, ...], align: Align, M: int, N: int, device: torch.device) -> int | Tensor:
    """`KeyRanges.row_keys`. Nothing is read from a device."""
    layout = next((part for part in parts if isinstance(part, Layout)), None)
    causal = any(isinstance(part, Causal) for part in parts)
    sides: list[int] = []  # left and right of each window; −1: without end
    exempt = 0
    for part in parts:
        if isinstance(part, Window):
            sides += [-1 if side is None else side for side in (part.left, 0 if causal else part.right)]
        elif isinstance(part, (Prefix, Sinks)):
            exempt += part.length if isinstance(part, Prefix) else part.count
    queries, keys = (getattr(layout, name, None) for name in ("q_lengths", "k_lengths"))
    if isinstance(layout, KeyLengths):
        queries, keys = None, layout.lengths
    numbers = causal, align == "bottom_right", sides, exempt
    if torch.compiler.is_compiling():  # a number would be a guard
        given = [x for x in (queries, keys) if x is not None]
        if device.type != "cuda" or not given or not all(isinstance(x, Tensor) and x.is_cpu for x in given):
            return 0
        found: Tensor = torch.ops.keyspan.row_keys(queries, keys, M, N, *numbers)
        return found
    if layout is None:
        return _mean_keys([M], [N], N, *numbers)
    queries, keys = on_host(queries), on_host(keys)
    if isinstance(layout, KeyLengths):
        queries = None if keys is None else [M] * len(keys)
    elif keys is None and getattr(layout, "k_lengths", None) is None:
        keys = queries
    return 0 if queries is None or keys is None else _mean_keys(queries, keys, N, *numbers)


def _mean_keys(
    queries: Sequence[int], keys: Sequence[int], N: int, causal: bool, bottom_right: bool, sides: list[int], exempt: int
) -> int:
    """Keys that a row of documents of these lengths sees on average, rounded to a power of two; 0 without rows."""
    if not sum(queries):
        return 0
    width = N
    for left, right in zip(sides[::2], sides[1::2], strict=True):
        width = min(width, sum(N if side < 0 else side for side in (left, right)) + 1)
    width += exempt
    pairs = 0
    for q, k in zip(queries, keys, strict=True):
        first = k - q if bottom_right else 0
        seen = _triangle(q + first) - _triangle(first) - _triangle(q + first - k) + _triangle(first - k)
        pairs += min(seen if causal else q * k, q * width)
    return 1 << max(0, round(math.log2(max(1, pairs) / sum(queries))))


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0


def _row_keys_op(
    q_lengths: Tensor | None, k_lengths: Tensor | None, M: int, N: int, causal: bool, *numbers: Any
) -> Tensor:
    """`_row_keys` as int64 []. Lengths are on the CPU; without q_lengths each document has M queries."""
    queries, keys = (None if x is None else x.tolist() for x in (q_lengths, k_lengths))
    keys = keys if keys is not None else queries or []
    found = _mean_keys([M] * len(keys) if queries is None else queries, keys, N, causal, *numbers)
    return torch.tensor(found, device="cpu")


# Opaque to torch.compile: the lengths are data, which the choice of a kernel reads when the graph runs.
_library = torch.library.Library("keyspan", "FRAGMENT")
_library.define(
    "row_keys(Tensor? q_lengths, Tensor? k_lengths, SymInt M, SymInt N, bool causal, bool bottom_right, int[] sides, "
    "int exempt) -> Tensor"
)
_library.impl("row_keys", _row_keys_op, "CompositeExplicitAutograd")
torch.library.register_fake(
    "keyspan::row_keys", lambda *args: torch.empty((), dtype=torch.int64, device="cpu"), lib=_library
)


def _exempt(parts: tuple[Mask, ...], start: Tensor, stop: Tensor, reach: Tensor, far: int) -> Tensor | None:
    """One past the last key that `Prefix` or `Sinks` exempts, per row; the exempt keys begin at `start`."""
    exempt = None
    for part in parts:
        if isinstance(part, Prefix):
            end = torch.minimum(start + min(part.length, far), stop)
        elif isinstance(part, Sinks):
            end = torch.maximum(torch.minimum(start + min(part.count, far), reach), start)
        else:
            continue
        exempt = end if exempt is None else torch.maximum(exempt, end)
    return exempt


def _frame(parts: tuple[Mask, ...], batch: int, M: int, N: int, device: torch.device) -> Frame:
    for part in parts:
        if isinstance(part, Layout):
            return part.frame(batch, M, N, device)
    row = torch.arange(M, device=device, dtype=torch.int32).reshape(1, 1, M)
    start = torch.zeros_like(row)
    return Frame(start, start + N, row, row + (N - M), at_zero=True)


def alignment(parts: tuple[Mask, ...]) -> Align:
    """The one alignment that the parts name; `top_left` where none does."""
    given = {part.align for part in parts if isinstance(part, (Causal, Window)) and part.align is not None}
    if len(given) > 1:
        raise ValueError(f"align: got {' and '.join(sorted(given))} in one mask, want one of them")
    align: Align = given.pop() if given else "top_left"
    if align == "bottom_right" and any(isinstance(part, SharedPrompt) for part in parts):
        raise ValueError("align: got bottom_right with SharedPrompt, want top_left (its queries are its keys)")
    return align


def sizes_of(parts: tuple[Mask, ...], batch: int | None, M: int | None, N: int | None) -> tuple[int, int, int]:
    """(batch, M, N): those given, else those that the lengths and dense masks tell."""
    known: tuple[int | None, int | None, int | None] = (1, None, None)
    for part in parts:
        if isinstance(part, (Layout, Union)):
            known = part.sizes()
    shapes = [part.visible.shape for part in parts if isinstance(part, Dense)]
    if shapes and not any(isinstance(part, (Layout, Union)) for part in parts):
        shape = (1, 1, *torch.broadcast_shapes(*shapes))
        # A size of 1 may broadcast, so it does not give the number of rows or keys.
        rows, keys = (None if size == 1 else size for size in shape[-2:])
        known = (shape[2] if len(shape) > 5 else 1, rows, keys)
    B, M, N = (given if given is not None else found for given, found in zip((batch, M, N), known, strict=True))
    if B is None or M is None or N is None:
        missing = [name for name, size in (("batch", B), ("M", M), ("N", N)) if size is None]
        raise ValueError(f"{missing[0]}: got None, want a size: {_names(parts)} does not tell it")
    for name, size in (("batch", B), ("M", M), ("N", N)):
        check_int(name, size, 0)
    return B, M, N


def unite(ranges: Sequence[KeyRanges]) -> KeyRanges:
    """The ranges of keys that any of `ranges` sees: sorted, disjoint, and merged where they touch.

    Ranges with different positions (`diagonal`) are not merged. Where they overlap, the one that begins first counts.
    """
    first = ranges[0]
    batch = max(x.lo.shape[1] for x in ranges)
    lo, hi, diagonal = (
        torch.cat([getattr(x, name).expand(-1, batch, -1) for x in ranges]) for name in ("lo", "hi", "diagonal")
    )
    seen = lo < hi
    lo, order = torch.where(seen, lo, torch.iinfo(torch.int32).max).sort(dim=0, stable=True)  # empty ranges come last
    reach = torch.where(seen, hi, 0).gather(0, order).cummax(0).values
    diagonal = diagonal.gather(0, order)
    begins = torch.ones_like(seen)
    begins[1:] = (lo[1:] > reach[:-1]) | (diagonal[1:] != diagonal[:-1])
    hi = reach.clone()
    for s in range(len(lo) - 2, -1, -1):  # a range ends where the last one that continues it does
        hi[s] = torch.where(begins[s + 1], reach[s], hi[s + 1])
    lo[1:] = torch.maximum(lo[1:], reach[:-1])
    begins &= lo < hi
    lo, hi = torch.where(begins, lo, 0), torch.where(begins, hi, 0)
    if readable(begins):  # drop what is empty in all rows
        begins, order = begins.sort(dim=0, descending=True, stable=True)
        most = max(int(begins.sum(0).max()) if begins.numel() else 0, 1)
        lo, hi, diagonal = (x.gather(0, order)[:most] for x in (lo, hi, diagonal))
    origin = None if first.origin is None else first.origin.expand(batch, -1)
    known = [x.row_keys if isinstance(x.row_keys, int) else 0 for x in ranges]
    most = max(known) if all(known) else 0  # of sums of powers of two the largest counts
    return replace(first, lo=lo, hi=hi, diagonal=diagonal, origin=origin, row_keys=most)


def united(members: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """The members of a union with one alignment, or ValueError with the reason why their union is not ranges."""
    if not isinstance(members, tuple) or not members or not all(isinstance(member, Mask) for member in members):
        raise ValueError(f"members: got {members!r}, want a tuple of masks, at least one")
    text = " | ".join(map(repr, members))
    dense = [[id(part.visible) for part in member.parts if isinstance(part, Dense)] for member in members]
    if any(found != dense[0] for found in dense):  # `(a | b) & tensor` has it in all members
        raise ValueError(
            "mask: got a union with a bool tensor, which is not ranges; want a bool tensor: "
            "mask.materialize(M, N) | tensor"
        )
    for member in members:
        if all(isinstance(part, (Layout, Prefix, Sinks)) for part in member.parts) and any(
            isinstance(part, (Prefix, Sinks)) for part in member.parts
        ):
            raise ValueError(
                f"mask: got {text}, want & in place of | beside Prefix and Sinks: Causal() & Prefix(2) shows what "
                "Causal() shows and the first 2 keys"
            )
    pages = [next((part for part in member.parts if isinstance(part, PagedKeys)), None) for member in members]
    if any(layout is not pages[0] for layout in pages):
        raise ValueError("mask: got a union over different pages, want the same PagedKeys object in all members")
    given = {getattr(part, "align", None) for member in members for part in member.parts} - {None}
    if len(given) != 1:
        return members
    align = given.pop()
    return tuple(
        _with_parts([replace(part, align=align) if isinstance(part, Window) else part for part in member.parts])
        for member in members
    )


def _with_parts(parts: Sequence[Mask]) -> Mask:
    return parts[0] if len(parts) == 1 else Combined(tuple(parts))


def check_parts(parts: tuple[Mask, ...]) -> None:
    """Raise where parts of one mask contradict one another."""
    for kind, name in ((Layout, "layout"), (Prefix, "Prefix"), (Sinks, "Sinks")):
        found = [part for part in parts if isinstance(part, kind)]
        if len(found) > 1:
            raise ValueError(f"mask: got {_names(found)}, want at most one {name}")
    alignment(parts)
    for prompt in (part for part in parts if isinstance(part, SharedPrompt)):
        shortest = min(on_host(prompt.prompt_lengths) or [UNBOUNDED])
        for part in parts:
            exempt = part.length if isinstance(part, Prefix) else part.count if isinstance(part, Sinks) else 0
            if exempt > shortest:
                field = "length" if isinstance(part, Prefix) else "count"
                raise ValueError(f"{field}: got {exempt}, want at most the shortest prompt = {shortest}")


def _names(parts: Sequence[Mask]) -> str:
    return " & ".join(type(part).__name__ for part in parts)
