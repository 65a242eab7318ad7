"""Fast path for repeated calls: a call with a known signature is replayed with new data pointers.

`lookup` builds the key of a call of `attention`, `replay` runs a recorded call, `record` records one on second sight. A
recorded call also replays its gradients.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from keyspan.backends import Gradients, Recorder, Replay, load, recorder
from keyspan.core import shims
from keyspan.core.biases import Alibi, Bias, DenseBias, RelativeBias
from keyspan.core.masks import Mask
from keyspan.core.problem import DTYPES, EVERYTHING, HeadLayout, Problem
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.cache import CACHE, LARGEST_MASK, mask_key, signature
from keyspan.dispatch.op import (
    DIFFERENTIABLE,
    NUMBERS,
    as_needs,
    attend,
    check_memory,
    check_saved,
    flat,
    forms_of,
    gradients,
    run_forward,
    without_autocast,
)

_FIELD_OF_TERM = {Alibi: "slopes", RelativeBias: "table", DenseBias: "biases"}
_FIELDS = ("query", "key", "value")
_TERMS = ("sinks", "query_scale", "key_scale", "value_scale")
_NUMERIC = (float, int, type(None))
_BIASES = Problem._fields.index("biases")


class Call(NamedTuple):
    """A call of `attention` that may be replayed."""

    key: Hashable
    """Everything that the call depends on apart from addresses and what the tensors hold."""
    pointers: list[int]
    """Addresses of `tensors`."""
    tensors: list[Tensor]
    """Query, key, value, further terms, those of the bias, and those of a mask that is given as `KeyRanges`."""
    fields: tuple[str, ...]
    """The field of the problem that each tensor stands for, without those of the mask."""
    differentiated: bool


def lookup(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    bias: Any,
    terms: tuple[Tensor | None, ...] | None,
    numbers: tuple[Any, ...],
) -> Call | None:
    """The key of a call and its tensors; None for a call that cannot be replayed. Nothing is checked: a wrong call is
    never recorded.

    Args:
        terms: sinks and the scales; None where none is given.
        numbers: (scale, softcap, dropout_p), then all other arguments.
    """
    scale, softcap, dropout_p = numbers[:3]
    if not shims.unobserved() or not (type(scale) in _NUMERIC and type(softcap) in _NUMERIC):
        return None
    if type(dropout_p) not in _NUMERIC or dropout_p:
        return None
    if shims.function_modes():
        return shims.without_default_device(_lookup, query, key, value, mask, bias, terms, numbers)
    return _lookup(query, key, value, mask, bias, terms, numbers)


def _lookup(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    bias: Any,
    terms: tuple[Tensor | None, ...] | None,
    numbers: tuple[Any, ...],
) -> Call | None:
    tensors = [query, key, value]
    fields: tuple[str, ...] = _FIELDS
    if terms is not None:
        for name, x in zip(_TERMS, terms, strict=True):
            if x is not None:
                tensors.append(x)
                fields = (*fields, name)
    if isinstance(bias, Tensor):
        tensors.append(bias)
        fields = (*fields, "biases")
    elif bias is not None:
        if not isinstance(bias, Bias):
            return None
        for term in bias.terms:
            field = _FIELD_OF_TERM.get(type(term))
            if field is None:  # of a user's class
                return None
            tensors += vars(term).values()
            fields = (*fields, field)
    masked: Hashable = None
    if type(mask) is KeyRanges:
        tensors += mask.tensors()
        absent = mask.sequence is None, mask.block_table is None, mask.dense is None, mask.origin is None
        masked = mask.page_size, mask.keys, mask.row_keys, absent
    elif mask is not None or bias is not None:
        if not (mask is None or isinstance(mask, Mask)) or not isinstance(query, Tensor):
            return None
        masked = mask_key(EVERYTHING if mask is None else mask, query.device)
        if masked is None:
            return None
    found = signature(tensors)
    if found is None:
        return None
    if shims.any_autocast() and not _autocast_done(tensors[:3]):
        return None
    needs: tuple[bool, ...] | None = None
    if torch.is_grad_enabled():
        needs = tuple([x.requires_grad for x in tensors])  # a list comprehension is faster than a generator
        if True not in needs:
            needs = None
        elif shims.saved_tensors_hooked():
            return None  # checkpointing compares what a call and its repetition save; a replay saves other tensors
    form, pointers = found
    return Call((numbers, fields, masked, needs, form), pointers, tensors, fields, needs is not None)


def _autocast_done(tensors: Sequence[Tensor]) -> bool:
    """Whether autocast would cast none of these tensors."""
    device = tensors[0].device.type
    return not torch.is_autocast_enabled(device) or all(
        x.dtype not in DTYPES or x.dtype in (torch.float64, torch.get_autocast_dtype(device)) for x in tensors
    )


def replay(call: Call) -> Sequence[Tensor] | None:
    """(out,) or (out, lse) of a call that was recorded, in the user's layout; None for any other."""
    try:
        recorded = CACHE.get(call.key)
    except TypeError:  # an argument that cannot be hashed is wrong
        return None
    if type(recorded) is not _Recorded:
        return None
    if shims.function_modes():
        results = shims.without_default_device(recorded.forward, call.pointers, call.tensors)
    else:
        results = recorded.forward(call.pointers, call.tensors)
    if results is None:  # a setting of torch or the backend has changed since
        return None
    CACHE.hits += 1
    return recorded.differentiable(results, call.tensors) if call.differentiated else results


def compute(call: Call | None, problem: Problem, heads: HeadLayout, backend: str, return_lse: bool) -> Sequence[Tensor]:
    """(out, lse) of a checked call in the user's layout, lse only where asked for; recorded on second sight."""

    def plain() -> Sequence[Tensor]:
        if call is None or call.differentiated:
            out, lse = attend(problem, backend, cached=call is None)
        else:  # nothing observes the op, nothing needs a gradient
            out, lse = run_forward(problem, backend, cached=False)
        return (heads.output(out), heads.lse(lse)) if return_lse else (heads.output(out),)

    def record() -> tuple[Sequence[Tensor], _Recorded | None]:
        assert call is not None
        recording, views = recorder(load(backend)), _views(problem, call)
        if recording is None or views is None:
            return plain(), None
        shapes = heads.shapes(problem)
        if not return_lse and not call.differentiated:
            shapes = shapes[:1]
        with torch.no_grad(), without_autocast(problem.query.device):
            results, forward = recording.record_forward(problem, call.tensors, shapes)
        if forward is None:
            return plain() if call.differentiated else results, None
        held = [x for x in views if isinstance(x, Tensor)]
        recorded = _Recorded(call, results, forward, held, backend, views, problem[NUMBERS:])
        return recorded.differentiable(results, call.tensors) if call.differentiated else results, recorded

    return plain() if call is None else CACHE.compute(call.key, plain, record)


class _View(NamedTuple):
    """A tensor of a problem as a view of a tensor of the call."""

    source: int
    shape: torch.Size
    strides: tuple[int, ...]


_Source = _View | Tensor | None


def _views(problem: Problem, call: Call) -> Sequence[_Source] | None:
    """Where each tensor of the problem comes from, dense biases last: a view of one of the call's, or a cached mask's.

    None where one is a copy and, in a call with gradients, where two terms were added up or an input was expanded.
    """
    if call.differentiated:
        inputs = dict(zip(DIFFERENTIABLE, flat(problem), strict=False))
        terms = iter(problem.biases)
        for name, x in zip(call.fields, call.tensors, strict=False):
            field = next(terms) if name == "biases" else inputs.pop(name, None) if name in DIFFERENTIABLE else x
            if field is None or field.numel() != x.numel():
                return None
    # Without tensors of a mask in the call, its ranges are determined by numbers.
    masked_by_cache = len(call.fields) == len(call.tensors)
    if masked_by_cache and problem.lo is not None and problem.lo.numel() > LARGEST_MASK:
        return None
    views: list[_Source] = []
    ranges = problem.lo, problem.hi, problem.diagonal, problem.origin
    every: list[Any] = [*problem[:_BIASES], *problem[_BIASES + 1 : NUMBERS], *problem.biases]
    names = [*Problem._fields[:_BIASES], *Problem._fields[_BIASES + 1 : NUMBERS], *("biases" for _ in problem.biases)]
    for name, x in zip(names, every, strict=True):
        if isinstance(x, Tensor) and x.data_ptr() in call.pointers:
            same = [n for n, pointer in enumerate(call.pointers) if pointer == x.data_ptr()]
            # Tensors with one address may have different sizes: the one that was given for this field has its own.
            own = [n for n in same if call.fields[n : n + 1] == (name,)]
            views.append(_View((own or same)[0], x.shape, x.stride()))
        elif x is None or (masked_by_cache and any(x is y for y in ranges)):
            views.append(x)
        else:
            return None
    return views


def _laid(x: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy with these strides; dimensions of stride 0, which torch does not write to, are copied once."""
    made = x.new_empty_strided(x.shape, strides)
    once = tuple(slice(None if stride else 1) for stride in strides)
    made[once].copy_(x[once])
    return made


class _Recorded:
    """A recorded call: its forward, and what its backward needs to be recorded and replayed in turn."""

    def __init__(
        self,
        call: Call,
        results: Sequence[Tensor],
        forward: Replay[list[Tensor]],
        held: list[Tensor],
        backend: str,
        views: Sequence[_Source],
        numbers: tuple[Any, ...],
    ):
        self.forward, self.held, self.backend, self.views, self.numbers = forward, held, backend, views, numbers
        self.nbytes = sum(x.nbytes for x in held)
        self.strides = [x.stride() for x in call.tensors]
        self.fields = call.fields
        self.forms = forms_of([*call.tensors, *results])
        order = {name: n for n, name in enumerate(DIFFERENTIABLE)}
        terms = iter(range(len(order), len(order) + len(call.fields)))
        fields = call.fields + ("",) * (len(call.tensors) - len(call.fields))
        self.positions = [next(terms) if name == "biases" else order.get(name) for name in fields]
        """Which gradient of those that `flat` lists each of the call's tensors has; None for none."""
        self.inputs = next(terms)

    def differentiable(self, results: Sequence[Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results (out, lse) as autograd's function of the call's tensors."""
        made: Sequence[Tensor] = _Replayed.apply(self, results, *tensors)  # type: ignore[no-untyped-call]
        return made

    def problem(self, tensors: Sequence[Tensor]) -> Problem:
        """The problem of the call with other tensors."""
        # Hooks on saved tensors may return them with other strides.
        laid = [
            x if x.stride() == strides else _laid(x, strides) for x, strides in zip(tensors, self.strides, strict=True)
        ]
        fields: list[Any] = [
            laid[view.source].as_strided(view.shape, view.strides) if isinstance(view, _View) else view
            for view in self.views
        ]
        last = NUMBERS - 1
        return Problem._make([*fields[:_BIASES], fields[last:], *fields[_BIASES:last], *self.numbers])

    def gradients(
        self, saved: Sequence[Tensor], needed: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> list[Tensor | None]:
        """The gradient of each of the call's tensors."""
        out, lse, *tensors = saved
        every = None
        if grad_out is not None and not torch.is_grad_enabled() and shims.unobserved() and not shims.any_autocast():
            given = [*tensors, out, lse, grad_out] if grad_lse is None else [*tensors, out, lse, grad_out, grad_lse]
            found = signature(given)
            if found is not None:
                form, pointers = found
                key = (self, needed, form)
                replay = CACHE.get(key)
                if callable(replay):
                    every = replay(pointers, given)
                if every is None:
                    every = self._computed(key, given, needed, grad_out, grad_lse)
                else:
                    CACHE.hits += 1
        if every is None:
            flags = self._flags(needed)
            listed = gradients(
                **self._arguments(tensors, out, lse, grad_out, grad_lse),
                needs=flags,
                backend=self.backend,
                cached=False,
            )
        else:
            listed = [*every[:-1], *every.biases]
        return [
            None if n is None or (grad := listed[n]) is None else grad if grad.shape == x.shape else grad.view(x.shape)
            for n, x in zip(self.positions, tensors, strict=True)
        ]

    def _computed(
        self,
        key: Hashable,
        given: list[Tensor],
        needed: Sequence[bool],
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        """Gradients of a backward that was not replayed, recorded on second sight."""
        last = len(self.positions)
        arguments = self._arguments(given[:last], given[last], given[last + 1], grad_out, grad_lse)
        arguments["needs"] = as_needs(self._flags(needed))
        module = load(self.backend)
        return CACHE.compute(
            key,
            lambda: module.backward(**arguments),
            lambda: cast(Recorder, module).record_backward(given=given, **arguments),
        )

    def _flags(self, needed: Sequence[bool]) -> list[bool]:
        """Which entries of `flat` are needed."""
        flags = dict(zip(self.positions, needed, strict=True))
        return [flags.get(n, False) for n in range(self.inputs)]

    def _arguments(
        self, tensors: Sequence[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> dict[str, Any]:
        """The problem and what belongs to its results, as a backend takes them."""
        check_saved([*tensors, out, lse], self.forms)
        check_memory(self.fields, tensors)
        problem = self.problem(tensors)
        of_out, of_lse = problem.shapes
        return {
            "problem": problem,
            "out": out.reshape(of_out),
            "lse": lse.reshape(of_lse),
            "grad_out": None if grad_out is None else grad_out.reshape(of_out),
            "grad_lse": None if grad_lse is None else grad_lse.reshape(of_lse),
        }


class _Replayed(torch.autograd.Function):
    """A replayed call as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, results: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = results
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.recorded = recorded
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors, ctx.needs_input_grad[2:], *grads
        compute = ctx.recorded.gradients
        found = shims.without_default_device(compute, *given) if shims.function_modes() else compute(*given)
        return (None, None, *found)
