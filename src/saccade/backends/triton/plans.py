"""Launches that were made before, made again: the same kernels, grids and numbers, on other memory.

A call of a few microseconds on the device costs far more on the host when every argument is worked out anew. Knows how
arguments are laid out for a launch, and nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.backends.triton.primitives import Arguments
from saccade.core.problem import Problem

_MOST = 1024
_BIASES = Problem._fields.index("biases")
_SEED = Problem._fields.index("seed")


class Seen(NamedTuple):
    """A problem, and what else is given, as launches see it."""

    key: Hashable
    """All that launches depend on apart from where the memory lies."""
    pointers: list[int]


Made = dict[str, Tensor]
"""What launches fill, by name."""
_plans: dict[Hashable, Callable[[list[int]], Made]] = {}


def look(problem: Problem, others: Iterable[Tensor | None] = (), more: Hashable = None) -> Seen:
    """The problem and other tensors as launches see them.

    Args:
        more: whatever else launches depend on.
    """
    found: list[Any] = []
    pointers: list[int] = []
    for x in (*problem[:_BIASES], *problem[_BIASES + 1 : _SEED + 1], *problem.biases, *others):
        if x is None:
            found.append(None)
        else:
            pointer = x.data_ptr()
            pointers.append(pointer)
            found += (x.shape, x.stride(), x.dtype, pointer % 16)
    # Pointers are told apart by their values, so those that coincide must do so again.
    shared = tuple(map(pointers.index, pointers)) if len(set(pointers)) < len(pointers) else None
    precision = torch.get_float32_matmul_precision()
    count = len(problem.biases)
    return Seen((problem.query.device, precision, shared, count, more, problem[_SEED + 1 :], *found), pointers)


def find(seen: Seen) -> Callable[[list[int]], Made] | None:
    """What launches again what `seen` needs, given its pointers, and returns what was made."""
    hook = knobs.runtime.launch_enter_hook
    # A profiler wants to hear of every launch from Triton itself.
    return None if getattr(hook, "calls", hook) else _plans.get(seen.key)


def forget() -> None:
    """Forget all launches, e.g. because other tiles shall be used."""
    _plans.clear()


def keep(seen: Seen, calls: list[tuple[Any, tuple[int, ...], list[Any]]], made: Made) -> None:
    """Remember launches.

    Args:
        calls: (compiled kernel, grid, arguments) of each launch.
        made: the tensors made for them; each call makes ones like them.
    """
    if any(kernel is None for kernel, _, _ in calls):
        return  # Triton's interpreter compiles nothing
    where: dict[int, int] = {}
    for n, pointer in enumerate([*seen.pointers, *(x.data_ptr() for x in made.values())]):
        where.setdefault(pointer, n)
    try:
        steps = [_Step(kernel, grid, given, where) for kernel, grid, given in calls]
        template, slots = _template(next(x for x in calls[0][2] if isinstance(x, Arguments)), where)
    except KeyError:
        return  # a copy, which must be made every time
    names = tuple(made)
    shapes = [(x.shape, x.dtype) for x in made.values()]
    device = next(iter(made.values())).device

    def again(pointers: list[int]) -> Made:
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        pointers += [x.data_ptr() for x in made]
        numbers = template.copy()
        for n, at in slots:
            numbers[n] = pointers[at]
        arguments = tuple(numbers)
        stream = _stream(device.index)
        for step in steps:
            step(pointers, arguments, stream)
        return dict(zip(names, made, strict=True))

    def guarded(pointers: list[int]) -> Made:
        if _current_device() == device.index:
            return again(pointers)
        with torch.cuda.device(device.index):
            return again(pointers)

    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[seen.key] = guarded


def _stream(index: int) -> int:
    return int(triton.runtime.driver.active.get_current_stream(index))


_current_device = torch.cuda.current_device


def _template(given: Iterable[Any], where: Mapping[int, int]) -> tuple[list[Any], list[tuple[int, int]]]:
    """Arguments without their pointers, and which pointer comes where."""
    values = list(given)
    slots = [(n, where[x.data_ptr()]) for n, x in enumerate(values) if isinstance(x, Tensor)]
    for n, _ in slots:
        values[n] = None
    return values, slots


class _Address:
    """As much of a tensor as a descriptor needs."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class _Step:
    """One launch."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], given: list[Any], where: Mapping[int, int]):
        grid = (*grid, 1, 1)[:3]
        direct = _direct(kernel, grid)
        self.launch: Callable[..., Any]
        encoders: list[Callable[[Any], list[Any]]]
        if direct is None:
            runner = kernel[grid]
            self.launch = lambda stream, *values: runner(*values, stream=stream)
            self.before: tuple[Any, ...] = ()
            encoders = [lambda x: [x]] * len(given)
        else:
            self.launch, self.before, encoders = direct
        values: list[Any] = []
        self.arguments_at: int | None = None
        self.maps: list[tuple[int, int, Callable[[int], Any], dict[int, Any]]] = []
        """Position, pointer, how a descriptor is made for it, and those that were made."""
        for x in given:
            if isinstance(x, Arguments):
                self.arguments_at = len(values)
            if isinstance(x, TensorDescriptor):
                encode = _encoder(x, encoders[len(self.maps)])
                self.maps.append((len(values), where[x.base.data_ptr()], encode, {}))
                # What follows a descriptor, its shape and strides, is always the same.
                values += encoders[len(self.maps) - 1](x)
            else:
                values.append(x)
        for n, *_ in self.maps:
            values[n] = None
        if self.arguments_at is not None:
            values[self.arguments_at] = None
        self.values, self.slots = _template(values, where)

    def __call__(self, pointers: list[int], arguments: tuple[Any, ...], stream: int) -> None:
        values = self.values.copy()
        for n, at in self.slots:
            values[n] = pointers[at]
        if self.arguments_at is not None:
            values[self.arguments_at] = arguments
        for n, at, encode, known in self.maps:
            pointer = pointers[at]
            found = known.get(pointer)
            if found is None:
                if len(known) >= _MOST:
                    known.clear()
                found = known[pointer] = encode(pointer)
            values[n] = found
        self.launch(*self.before[:3], stream, *self.before[3:], *values)


def _encoder(like: TensorDescriptor, encode: Callable[[Any], list[Any]]) -> Callable[[int], Any]:
    """Makes the descriptor over other memory of the same shape and strides, without checking those again."""
    fields = {**like.__dict__, "base": None}

    def made(pointer: int) -> Any:
        other = object.__new__(TensorDescriptor)
        other.__dict__.update(fields, base=_Address(pointer))
        return encode(other)[0]

    return made


def _direct(kernel: Any, grid: tuple[int, ...]) -> Any:
    """The C function that launches a kernel; its arguments before the kernel's, but for the stream, which is fourth;
    and for each descriptor what makes of it the function's arguments. None where Triton is not one whose ways are known:
    what it does in Python for a launch takes longer than the launch.
    """
    if torch.version.hip is not None or not triton.__version__.startswith("3.6."):
        return None
    run = kernel.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    from triton.backends.nvidia.driver import make_tensordesc_arg

    launch, metadata = run.launch, []
    if isinstance(launch, FunctionType):  # around the C function where there are descriptors
        cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
        launch, metadata = (cells[name].cell_contents for name in ("launcher", "tensordesc_meta"))
    # No scratch memory, no metadata and no hooks of the launch.
    before = (*grid, kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata)
    encoders = [lambda x, of=of: make_tensordesc_arg(x, of) for of in metadata]
    return launch, (*before, None, None, None), encoders
