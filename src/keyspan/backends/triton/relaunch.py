"""Launches that were made before, made again: the same kernels, grids and numbers, on other memory.

A call of a few microseconds on the device costs far more on the host when every argument is worked out anew. Knows how
arguments are laid out for a launch, and nothing of what they mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from keyspan.backends import Again, cast, mould
from keyspan.backends.triton.primitives import Arguments
from keyspan.core.problem import Problem

_MOST = 1024
_ALIGNED = 256
"""Bytes of whose multiple addresses are, as torch's allocator makes them."""
_BIASES = Problem._fields.index("biases")
_SEED = Problem._fields.index("seed")


class Seen(NamedTuple):
    """A problem, and what else is given, as launches see it."""

    key: Hashable
    """All that launches depend on apart from where the memory lies."""
    pointers: list[int]


Made = dict[str, Tensor]
"""What launches fill, by name."""
Launched = tuple[Any, tuple[int, ...], list[Any]]
"""Compiled kernel, grid and arguments of a launch."""
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
    return None if _listened_to() else _plans.get(seen.key)


def _listened_to() -> bool:
    """Whether somebody, a profiler, wants to hear of every launch from Triton itself."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def forget() -> None:
    """Forget all launches, e.g. because other tiles shall be used."""
    _plans.clear()


def keep(seen: Seen, calls: list[Launched], made: Made) -> None:
    """Remember launches.

    Args:
        made: the tensors made for them; each time ones like them are made.
    """
    launch = _launcher([*seen.pointers, *(x.data_ptr() for x in made.values())], calls)
    if launch is None:
        return
    names = tuple(made)
    moulds = [mould(x, x.shape) for x in made.values()]
    index = next(iter(made.values())).device.index

    def again(pointers: list[int]) -> Made:
        made = [*map(cast, moulds)]
        launch(pointers + [x.data_ptr() for x in made], _stream(index))
        return dict(zip(names, made, strict=True))

    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[seen.key] = again


def repeated(
    pointers: Sequence[int], calls: list[Launched], made: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> Again | None:
    """What makes launches again.

    Args:
        pointers: addresses of the tensors that will be given anew.
        made: the tensors made for the launches. As many as there are `shapes` are results; nobody reads the others.
    """
    launch = _launcher([*pointers, *(x.data_ptr() for x in made)], calls)
    if launch is None:
        return None
    device, index = made[0].device, made[0].device.index
    moulds = [mould(x, shape) for x, shape in zip(made, shapes, strict=False)]
    sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in made[len(shapes) :]]
    offsets, size = [sum(sizes[:n]) for n in range(len(sizes))], sum(sizes)
    precision = torch.get_float32_matmul_precision()

    def again(pointers: list[int]) -> list[Tensor] | None:
        if _listened_to() or _precision() != precision:
            return None
        made = [*map(cast, moulds)]
        pointers += [x.data_ptr() for x in made]
        stream = _stream(index)
        if size:
            scratch = _scratch(size, device, stream)
            start = scratch.data_ptr()
            pointers += [start + offset for offset in offsets]
        launch(pointers, stream)
        return made

    return again


class _Scratch(threading.local):
    """Memory that launches write to and nobody reads afterwards: one piece for each stream, on which one launch waits for
    the one before. A thread has its own, for two may mix their launches."""

    def __init__(self) -> None:
        self.by_stream: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, size: int, device: torch.device, stream: int) -> Tensor:
        """So many bytes; what is returned must be held until the launches are made."""
        if _capturing():  # a graph may run beside what is launched later
            return torch.empty(size, dtype=torch.uint8, device=device)
        # Each device numbers its streams for itself; 0 is a stream of all of them.
        where = device, stream
        found = self.by_stream.get(where)
        if found is None or found.nbytes < size:
            found = self.by_stream[where] = torch.empty(size, dtype=torch.uint8, device=device)
        return found


_scratch = _Scratch()


def _launcher(pointers: Sequence[int], calls: list[Launched]) -> Callable[[list[int], int], None] | None:
    """What makes launches again on a stream, given the addresses in place of `pointers`; None where it cannot be."""
    if not calls or any(kernel is None for kernel, _, _ in calls):
        return None  # Triton's interpreter compiles nothing
    where: dict[int, int] = {}
    for n, pointer in enumerate(pointers):
        where.setdefault(pointer, n)
    given = next(x for x in calls[0][2] if isinstance(x, Arguments))
    try:
        steps = [_Step(kernel, grid, given, where) for kernel, grid, given in calls]
        template, slots = _template(given, where)
    except KeyError:
        return None  # a copy, which must be made every time
    index = given.q.device.index

    def launch(pointers: list[int], stream: int) -> None:
        if _current_device() != index:
            with torch.cuda.device(index):
                launch(pointers, stream)
            return
        numbers = template.copy()
        for n, at in slots:
            numbers[n] = pointers[at]
        arguments = tuple(numbers)
        for step in steps:
            step(pointers, arguments, stream)

    return launch


# Asked before every launch: what torch's functions of these names ask. A torch without GPUs has none.
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
_precision = torch._C._get_float32_matmul_precision


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
        encoders: list[Callable[[Any], list[Any]]]
        if direct is None:
            runner = kernel[grid]
            self.launch: Callable[..., Any] = lambda grid, stream, *values: runner(*values, stream=stream)
            values: list[Any] = [grid, None]
            encoders = [lambda x: [x]] * len(given)
        else:
            self.launch, values, encoders = direct
        self.stream_at = values.index(None)
        self.arguments_at = self.stream_at  # where there are none, the stream is written over them
        self.maps: list[tuple[int, int, Callable[[int], Any], dict[int, Any]]] = []
        """Position, pointer, how a descriptor is made for it, and those that were made."""
        for x in given:
            if isinstance(x, Arguments):
                self.arguments_at = len(values)
            if isinstance(x, TensorDescriptor):
                encoder = encoders[len(self.maps)]
                self.maps.append((len(values), where[x.base.data_ptr()], _encoder(x, encoder), {}))
                # What follows a descriptor, its shape and strides, is always the same.
                values += encoder(x)
            else:
                values.append(x)
        for n in (self.arguments_at, *(n for n, *_ in self.maps)):
            values[n] = None
        self.values, self.slots = _template(values, where)

    def __call__(self, pointers: list[int], arguments: tuple[Any, ...], stream: int) -> None:
        values = self.values.copy()
        values[self.arguments_at] = arguments
        values[self.stream_at] = stream
        for n, at in self.slots:
            values[n] = pointers[at]
        for n, at, encode, known in self.maps:
            pointer = pointers[at]
            found = known.get(pointer)
            if found is None:
                if len(known) >= _MOST:
                    known.clear()
                found = known[pointer] = encode(pointer)
            values[n] = found
        self.launch(*values)


def _encoder(like: TensorDescriptor, encode: Callable[[Any], list[Any]]) -> Callable[[int], Any]:
    """Makes the descriptor over other memory of the same shape and strides, without checking those again."""
    fields = {**like.__dict__, "base": None}

    def made(pointer: int) -> Any:
        other = object.__new__(TensorDescriptor)
        other.__dict__.update(fields, base=_Address(pointer))
        return encode(other)[0]

    return made


def _direct(kernel: Any, grid: tuple[int, ...]) -> Any:
    """The C function that launches a kernel; its arguments before the kernel's, None in place of the stream;
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
    after = (kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata)
    encoders = [lambda x, of=of: make_tensordesc_arg(x, of) for of in metadata]
    return launch, [*grid, None, *after, None, None, None], encoders
