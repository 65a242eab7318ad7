"""Launches compiled kernels again, with the same grids and constants, on other tensors.

A launch by Triton takes far more time on the host than on the device, as it works out every argument each time. A
recorded one only replaces the pointers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keyspan.backends import Replay, empty_like, template
from keyspan.backends.triton.arguments import Arguments
from keyspan.core import shims
from keyspan.core.problem import Problem

_MOST_DESCRIPTORS = 1024
_ALIGNED = 256
"""Addresses are multiples of so many bytes, as torch's allocator makes them."""

Made = dict[str, Tensor]
"""What launches fill, by name."""
Launched = tuple[Any, tuple[int, ...], list[Any]]
"""Compiled kernel, grid and arguments of a launch."""


def recorded(
    problem: Problem,
    given: Sequence[Tensor],
    launches: list[Launched],
    made: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> Replay[list[Tensor]] | None:
    """A replay of launches.

    Args:
        given: the tensors that it is given anew. Those of the problem's mask that are not among them stay as they are.
        made: the tensors that the launches fill. As many as there are `shapes` are results; the others are scratch.
    """
    constants = [x.data_ptr() for x in (problem.lo, problem.hi, problem.diagonal, problem.origin) if x is not None]
    launch = _launcher([*(x.data_ptr() for x in (*given, *made)), *constants], launches)
    if launch is None:
        return None
    device, index = made[0].device, made[0].device.index
    templates = [template(x, shape) for x, shape in zip(made, shapes, strict=False)]
    sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in made[len(shapes) :]]
    offsets, size = [sum(sizes[:n]) for n in range(len(sizes))], sum(sizes)
    precision = shims.float32_precision()

    def replay(pointers: list[int], tensors: Sequence[Tensor]) -> list[Tensor] | None:
        if shims.triton_hooked() or shims.float32_precision() != precision:
            return None
        results = [*map(empty_like, templates)]
        filled = [x.data_ptr() for x in results]
        stream = shims.cuda_stream(index)
        if size:
            scratch = _scratch(size, device, stream)
            start = scratch.data_ptr()
            filled += [start + offset for offset in offsets]
        launch([*pointers, *filled, *constants], stream)
        return results

    return replay


class _Scratch(threading.local):
    """Memory that nobody reads after the launches: one piece for each stream, on which a launch waits for the one before.

    Each thread has its own, for two threads may interleave their launches.
    """

    def __init__(self) -> None:
        self.by_stream: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, size: int, device: torch.device, stream: int) -> Tensor:
        """So many bytes; the caller holds them until the launches are made."""
        if shims.cuda_capturing():  # a graph may run beside what is launched later
            return torch.empty(size, dtype=torch.uint8, device=device)
        # Stream numbers are those of a device; 0 is a stream of each.
        where = device, stream
        found = self.by_stream.get(where)
        if found is None or found.nbytes < size:
            found = self.by_stream[where] = torch.empty(size, dtype=torch.uint8, device=device)
        return found


_scratch = _Scratch()


class Counters:
    """Two int32 that are 0 when a kernel starts and that it sets back to 0; a pointer argument, as a tensor is."""

    dtype = torch.int32

    def __init__(self, device: torch.device, tensor: Tensor | None = None):
        self.tensor = torch.zeros(2, dtype=torch.int32, device=device) if tensor is None else tensor
        self.pointer = self.tensor.data_ptr()

    def data_ptr(self) -> int:
        return self.pointer


_counters: dict[tuple[int | None, int], Counters] = {}
"""By device index and stream."""
_spare: dict[torch.device, tuple[Tensor, Iterator[Tensor]]] = {}
"""Counters for launches in CUDA graphs, which take a pair each: a graph may run beside other launches."""
_MOST_IN_GRAPHS = 4096


def counters(device: torch.device, stream: int) -> Counters:
    """Counters for a launch on a stream. Launches on one stream share theirs, for they run one after the other."""
    cuda = device.type == "cuda"
    if cuda and shims.cuda_capturing():
        # Without spare ones the graph has a launch that makes zeros.
        return Counters(device, next(_spare[device][1], None) if device in _spare else None)
    found = _counters.get((device.index, stream))
    if found is None:
        found = _counters[device.index, stream] = Counters(device)
        if cuda and device not in _spare:
            # 16 bytes each: Triton compiles a kernel once more for addresses that are no multiple of 16.
            every = torch.zeros(_MOST_IN_GRAPHS, 4, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # a graph may run on any stream
            _spare[device] = every, iter(every)
    return found


def _launcher(pointers: Sequence[int], launches: list[Launched]) -> Callable[[list[int], int], None] | None:
    """Launches on a stream, given the addresses in place of `pointers`; None where that cannot be."""
    if not launches or any(kernel is None for kernel, _, _ in launches):
        return None  # Triton's interpreter compiles nothing
    where: dict[int, int] = {}
    for n, pointer in enumerate(pointers):
        where.setdefault(pointer, n)
    given = next(x for x in launches[0][2] if isinstance(x, Arguments))
    device = given.q.device
    counted = next((x for _, _, given in launches for x in given if isinstance(x, Counters)), None)
    if counted is not None:
        where[counted.pointer] = len(pointers)
    try:
        steps = [_Step(kernel, grid, given, where) for kernel, grid, given in launches]
        numbers, slots = _slots(given, where)
    except KeyError:
        return None  # an argument is a copy, which must be made every time
    index = device.index

    def launch(pointers: list[int], stream: int) -> None:
        if shims.cuda_device() != index:
            with torch.cuda.device(index):
                launch(pointers, stream)
            return
        if counted is not None:
            pointers = [*pointers, counters(device, stream).pointer]
        values = numbers.copy()
        for n, at in slots:
            values[n] = pointers[at]
        arguments = tuple(values)
        for step in steps:
            step(pointers, arguments, stream)

    return launch


def _slots(given: Iterable[Any], where: Mapping[int, int]) -> tuple[list[Any], list[tuple[int, int]]]:
    """Arguments without their pointers, and which pointer comes where."""
    values = list(given)
    slots = [(n, where[x.data_ptr()]) for n, x in enumerate(values) if isinstance(x, (Tensor, Counters))]
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
        direct = shims.triton_launcher(kernel)
        encoders: list[Callable[[Any], list[Any]]]
        if direct is None:
            runner = kernel[grid]
            self.launch: Callable[..., Any] = lambda grid, stream, *values: runner(*values, stream=stream)
            values: list[Any] = [grid, None]
            encoders = [lambda x: [x]] * len(given)
        else:
            self.launch, fixed, encoders = direct
            values = [*grid, None, *fixed]
        self.stream_at = values.index(None)
        self.arguments_at = self.stream_at  # where there are none, the stream is written over them
        self.maps: list[tuple[int, int, Callable[[int], Any], dict[int, Any]]] = []
        """Position, pointer, encoder, and the descriptors made before by address."""
        for x in given:
            if isinstance(x, Arguments):
                self.arguments_at = len(values)
            if hasattr(x, "block_shape"):  # a descriptor, Triton's or Gluon's
                encoder = encoders[len(self.maps)]
                self.maps.append((len(values), where[x.base.data_ptr()], _encoder(x, encoder), {}))
                # What follows a descriptor, its shape and strides, is always the same.
                values += encoder(x)
            else:
                values.append(x)
        for n in (self.arguments_at, *(n for n, *_ in self.maps)):
            values[n] = None
        self.values, self.slots = _slots(values, where)

    def __call__(self, pointers: list[int], arguments: tuple[Any, ...], stream: int) -> None:
        values = self.values.copy()
        values[self.arguments_at] = arguments
        values[self.stream_at] = stream
        for n, at in self.slots:
            values[n] = pointers[at]
        for n, at, encode, descriptors in self.maps:
            pointer = pointers[at]
            found = descriptors.get(pointer)
            if found is None:
                if len(descriptors) >= _MOST_DESCRIPTORS:
                    descriptors.clear()
                found = descriptors[pointer] = encode(pointer)
            values[n] = found
        self.launch(*values)


def _encoder(like: Any, encode: Callable[[Any], list[Any]]) -> Callable[[int], Any]:
    """Makes a descriptor over other memory of the same shape and strides, which are not checked again."""
    fields = {**like.__dict__, "base": None}

    def made(pointer: int) -> Any:
        other = object.__new__(type(like))
        other.__dict__.update(fields, base=_Address(pointer))
        return encode(other)[0]

    return made
