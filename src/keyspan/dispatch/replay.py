"""Calls made again: where nothing watches and nobody wants gradients, only memory differs from the time before.

A call of a few microseconds costs more when all is checked and laid out anew than it does in the kernel. Knows by what
calls are told apart; what is computed, and how it is done again, a backend knows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from keyspan.backends import Again, Recorder, load
from keyspan.core.biases import Alibi, Bias, DenseBias, RelativeBias
from keyspan.core.lowering import EVERYTHING, Kept, kept
from keyspan.core.masks import Mask
from keyspan.core.observers import PLAIN, unwatched
from keyspan.core.problem import Problem
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.op import attend

_MOST = 1024
_TERMS = (Alibi, RelativeBias, DenseBias)

Call = tuple[Hashable, list[int], object]
"""All that a call depends on but where its tensors lie and what they hold; where they lie; and what holds them, for
nobody else may: another thread may forget a mask that was lowered before, and a user's bias may make its terms anew."""
_known: dict[Hashable, Again | None] = {}
"""How calls are made again; None for those that cannot be."""


def look(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    bias: Any,
    others: tuple[Tensor | None, ...] | None,
    numbers: tuple[Any, ...],
) -> Call | None:
    """The call; None for one that must go the long way. Nothing is checked: what is wrong was never made before.

    Args:
        others: further tensors that stand for themselves; None where none is given.
        numbers: whatever else the user gave.
    """
    if not unwatched() or torch._C._is_any_autocast_enabled():
        return None
    found: list[Any] = [numbers]
    told: list[Any] = [query, key, value]
    if others is not None:
        found.append(tuple(x is None for x in others))
        told += [x for x in others if x is not None]
    if isinstance(bias, Tensor):
        found.append(DenseBias)
        told.append(bias)
    elif bias is not None:
        if not isinstance(bias, Bias):
            return None
        for term in bias.terms:
            if type(term) not in _TERMS:
                return None
            found.append(type(term))
            told += vars(term).values()
    pointers: list[int] = []
    held: object = told
    graded = torch.is_grad_enabled()
    try:
        for x in told:
            if type(x) not in PLAIN or x.is_neg() or (graded and x.requires_grad):
                return None
            pointer = x.data_ptr()
            if not pointer and x.numel():  # zeros that have no memory
                return None
            pointers.append(pointer)
            # Kernels are made for aligned memory.
            found += (x.shape, x.stride(), x.dtype, x.device, pointer % 16)
        if mask is not None or bias is not None:
            if type(mask) is KeyRanges:
                seen = mask.seen()
            else:
                known = _kept(EVERYTHING if mask is None else mask, query, key)
                if known is None:
                    return None
                held, seen = (told, known), known.seen
            if seen is None:
                return None
            found.append(seen.form)
            pointers += seen.pointers
    except RuntimeError:  # of a sparse tensor
        return None
    # Tensors are told apart by their addresses, so those that share one must do so again.
    if len(set(pointers)) < len(pointers):
        found.append(tuple(map(pointers.index, pointers)))
    return tuple(found), pointers, held


def _kept(mask: Any, query: Tensor, key: Tensor) -> Kept | None:
    """The mask as it was lowered before."""
    if not isinstance(mask, Mask) or min(query.dim(), key.dim()) < 2:
        return None
    return kept(mask, query.shape[0], query.shape[1], key.shape[1], query.device)


def again(call: Call) -> list[Tensor] | None:
    """The results of a call that was made before; None where it must be made the long way."""
    key, pointers, _ = call
    try:
        known = _known.get(key)
    except TypeError:  # not hashable, so nothing that was accepted before
        return None
    return None if known is None else known(pointers)


def first(call: Call, problem: Problem, backend: str, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call whose like may follow.

    Args:
        shapes: of what the user wants of it: of out, or of out and lse.
    """
    key, pointers, _ = call
    recorder: Recorder | None = getattr(load(backend), "record", None)
    if recorder is None or _known.get(key, recorder) is None:
        return attend(problem, backend)
    out, lse, known = recorder(problem, pointers, shapes)
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = known
    return out, lse
