"""Forward launches that were made before, made again: the same kernels, grids and numbers, on other memory.

A call of a few microseconds on the device costs far more on the host when every argument is worked out anew. Knows how
arguments are laid out for a launch, and nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.backends.triton.primitives import Arguments
from saccade.core.problem import Problem

_MOST = 1024
_SEED = Problem._fields.index("seed")
_FIELDS = {"q": "query", "k": "key", "v": "value", "bias": "biases"}
"""Pointers of `Arguments` whose name differs from the problem's field."""

Results = tuple[Tensor, Tensor]
_plans: dict[Hashable, Callable[[Problem], Results]] = {}


def key_of(problem: Problem) -> Hashable | None:
    """All that a launch depends on apart from where the memory lies; None where that cannot be told."""
    found: list[Any] = []
    for x in problem[: _SEED + 1]:
        if isinstance(x, list):
            if len(x) > 1:
                return None
            x = x[0] if x else None  # noqa: PLW2901
        if x is None:
            found.append(None)
        else:
            found += (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
    return (problem.query.device, torch.get_float32_matmul_precision(), problem[_SEED + 1 :], *found)


def find(key: Hashable) -> Callable[[Problem], Results] | None:
    return _plans.get(key)


def keep(key: Hashable, problem: Problem, arguments: Arguments, calls: list[Any], like: list[Tensor]) -> None:
    """Remember the launches of a problem.

    Args:
        calls: (compiled kernel, grid, arguments) of each launch.
        like: the tensors made for it; each call makes ones like them. The first two are the results.
    """
    if any(kernel is None for kernel, _, _ in calls):
        return  # Triton's interpreter compiles nothing
    slots = []
    for at, (name, x) in enumerate(zip(Arguments._fields, arguments, strict=True)):
        if isinstance(x, Tensor):
            field = Problem._fields.index(_FIELDS.get(name, name))
            given = problem[field][0] if name == "bias" else problem[field]
            if given.data_ptr() != x.data_ptr():
                return  # a copy, which must be made every time
            slots.append((at, field))
    template = list(arguments)
    shapes = [(x.shape, x.dtype) for x in like]
    index = problem.query.device.index
    key_field, value_field = (Problem._fields.index(x) for x in ("key", "value"))
    biases = Problem._fields.index("biases")
    steps = []
    for kernel, grid, given in calls:
        # How each argument is found: -1 the arguments, -2 and -3 descriptors of keys and values, 0 … a buffer, None itself.
        places: list[int | None] = []
        for x in given:
            if x is arguments:
                places.append(-1)
            elif isinstance(x, TensorDescriptor):
                places.append(-2 if -2 not in places else -3)
            else:
                places.append(next((n for n, y in enumerate(like) if y is x), None))
        steps.append((kernel[(*grid, 1, 1)[:3]], list(given), [(n, p) for n, p in enumerate(places) if p is not None]))

    def again(problem: Problem) -> Results:
        device = problem.query.device
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        numbers = template.copy()
        for at, field in slots:
            x = problem[field]
            numbers[at] = x[0].data_ptr() if field == biases else x.data_ptr()
        for launch, given, places in steps:
            values = given.copy()
            for n, place in places:
                if place >= 0:
                    values[n] = made[place].data_ptr()
                elif place == -1:
                    values[n] = tuple(numbers)
                else:
                    values[n] = _moved(given[n], problem[key_field if place == -2 else value_field])
            launch(*values)
        return made[0], made[1]

    def guarded(problem: Problem) -> Results:
        if torch.cuda.current_device() == index:
            return again(problem)
        with torch.cuda.device(index):
            return again(problem)

    for _, given, places in steps:
        for n, place in places:
            # What is replaced in every call need not be kept alive.
            given[n] = _moved(given[n], None) if place in (-2, -3) else None
    for at, _ in slots:
        template[at] = None
    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[key] = guarded


def _moved(descriptor: Any, base: Tensor | None) -> Any:
    """The descriptor over other memory of the same shape and strides, without checking those again."""
    other = object.__new__(TensorDescriptor)
    other.__dict__.update(descriptor.__dict__)
    other.base = base
    return other
