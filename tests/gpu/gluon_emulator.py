"""Runs Gluon kernels for Hopper on the CPU: their Python source on NumPy, one thread for each partition of warps.

Kernels are loaded a second time with stand-ins in place of Triton's modules. What goes wrong on a GPU when partitions do
not agree goes wrong here: shared memory starts as NaN; asynchronous products read their operands as late as they may;
barriers count arrivals and bytes, and one that nobody completes raises. Not modelled: layouts, registers, fences.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

TIMEOUT = 20.0
"""Seconds after which a barrier that is not completed is an error."""


class Type:
    """A dtype: how numbers are rounded to it. Floats of fewer than 32 bits are held in fp32."""

    def __init__(self, name: str, numpy: Any, size: int):
        self.name, self.numpy, self.size = name, numpy, size
        self.element_ty, self.primitive_bitwidth = self, 8 * size

    def round(self, x: Any) -> Any:
        if self.name in ("bfloat16", "float16"):
            return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, self.name)).float().numpy()
        return np.asarray(x).astype(self.numpy)


BFLOAT16, FLOAT16 = Type("bfloat16", np.float32, 2), Type("float16", np.float32, 2)
UINT32 = Type("uint32", np.uint32, 4)
FLOAT32, INT32, INT64 = Type("float32", np.float32, 4), Type("int32", np.int32, 4), Type("int64", np.int64, 8)
TYPES = {
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float32: FLOAT32,
    torch.int32: INT32,
    torch.int64: INT64,
}


class Value(np.ndarray):
    """A scalar or tensor in registers: `+=` and the like make a new one."""

    __iadd__, __isub__, __imul__ = np.ndarray.__add__, np.ndarray.__sub__, np.ndarray.__mul__
    type = SimpleNamespace(layout=None)

    def to(self, dtype: Type, bitcast: bool = False) -> Value:
        return value(dtype.round(self))


def value(x: Any) -> Value:
    return np.asarray(x).view(Value)


class Barrier:
    """An mbarrier: a phase is over once all have arrived and all expected bytes have."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int = 1, more: int = 0) -> None:
        with self.changed:
            self.missing -= count
            assert self.missing >= 0, "more arrive at a barrier than its phase has room for"
            self._move(more)

    def _move(self, more: int) -> None:
        self.bytes += more
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.changed.notify_all()

    def landed(self, count: int) -> None:
        with self.changed:
            self._move(-count)

    def wait(self, parity: Any) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity), TIMEOUT):
                raise TimeoutError(f"a barrier waits for parity {parity}: {self.missing} to arrive, {self.bytes} bytes")


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Any, dtype: Type):
        self.data, self.dtype = data, dtype

    def index(self, n: Any) -> Any:
        part = self.data[int(n)]
        return part[0] if self.data.dtype == object else Shared(part, self.dtype)

    def reshape(self, shape: list[int]) -> Shared:
        part = self.data.reshape(shape)
        assert np.shares_memory(part, self.data)
        return Shared(part, self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def _reinterpret(self, dtype: Type, shape: list[int], layout: Any, _semantic: None = None) -> Shared:
        assert dtype is self.dtype
        return Shared(self.data.reshape(-1)[: np.prod(shape)].reshape(shape), dtype)

    def permute(self, order: Iterable[int]) -> Shared:
        return Shared(self.data.transpose(tuple(order)), self.dtype)

    def load(self, layout: Any) -> Value:
        return value(self.data.copy())

    def store(self, x: Any) -> None:
        assert np.shape(x) == self.data.shape
        self.data[...] = self.dtype.round(x)


class Pointer:
    """Global memory; reads and writes outside of it raise."""

    def __init__(self, data: Any, dtype: Type, offset: Any = 0):
        self.data, self.dtype, self.offset = data, dtype, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.dtype, self.offset + np.asarray(offset, np.int64))

    def to(self, dtype: Type, bitcast: bool) -> Pointer:
        """As an address, for assembly."""
        return self


class Descriptor:
    """What TMA copies blocks of; zero outside."""

    def __init__(self, tensor: torch.Tensor, block: list[int]):
        self.dtype, self.block_shape, self.layout = TYPES[tensor.dtype], list(block), None
        self.tensor, self.data, self.stored = tensor, tensor.detach().float().numpy(), False
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)) * self.dtype.size, shape=self.block_shape)

    def load(self, at: list[Any], barrier: Barrier, to: Shared) -> None:
        block = np.zeros(self.block_shape, np.float32)
        starts = [int(x) for x in at]
        inside = [max(0, min(b, n - s)) for s, b, n in zip(starts, self.block_shape, self.data.shape, strict=True)]
        window = tuple(slice(s, s + n) for s, n in zip(starts, inside, strict=True))
        block[tuple(slice(n) for n in inside)] = self.data[window]
        _pause()
        to.data[...] = block
        barrier.landed(self.block_type.nbytes)

    def store(self, at: list[Any], source: Shared, add: bool = False) -> None:
        """Copied once the thread waits for it, as late as it may be."""
        window = tuple(slice(int(s), int(s) + n) for s, n in zip(at, self.block_shape, strict=True))
        to = self.data[window]
        _here.copies.append((to, Shared(source.data[tuple(map(slice, to.shape))], source.dtype), add))
        _here.copies_read = False
        self.stored = True


class Product:
    """The result of an asynchronous product; a number only once it is waited for."""

    type = SimpleNamespace(layout=None)

    def __init__(self) -> None:
        self.result: Value | None = None


_here = threading.local()
_random = random.Random(0)


def _pause() -> None:
    """Let other threads go first, now and then."""
    if _random.random() < 0.1:
        time.sleep(1e-4)


def _resolved(x: Any) -> Any:
    if isinstance(x, Product):
        assert x.result is not None, "a product is used before it is waited for"
        return x.result
    return x


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    found = Product()

    def compute() -> None:
        left = a.data if isinstance(a, Shared) else a
        # In fp64, where sums do not depend on a row's place in the tile, as BLAS's do in fp32.
        product = np.matmul(np.asarray(left, np.float64), np.asarray(b.data, np.float64)).astype(np.float32)
        found.result = value(product + np.asarray(_resolved(acc)) if use_acc else product)

    _here.products.append(compute)
    return found


def warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    _pause()
    while len(_here.products) > num_outstanding:
        _here.products.pop(0)()
    found = tuple(x if isinstance(x, Product) and x.result is None else _resolved(x) for x in deps)
    return found[0] if len(found) == 1 else found


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    offset = np.asarray(pointer.offset)
    found = np.broadcast_to(
        True if mask is None else np.asarray(mask), np.broadcast(offset, mask if mask is not None else 0).shape
    )
    offset = np.where(found, offset, 0)
    assert offset.size == 0 or (offset.min() >= 0 and offset.max() < len(pointer.data)), "a read outside of a tensor"
    return value(np.where(found, pointer.data[offset], np.asarray(other or 0, pointer.data.dtype)))


def _store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    offset, x = np.broadcast_arrays(pointer.offset, x)
    keep = np.broadcast_to(True if mask is None else np.asarray(mask), offset.shape)
    offset = offset[keep]
    assert offset.size == 0 or (offset.min() >= 0 and offset.max() < len(pointer.data)), "a write outside of a tensor"
    pointer.data[offset] = pointer.dtype.round(x[keep])


def _atomic_add(pointer: Pointer, x: Any, mask: Any = None, sem: str = "acq_rel", scope: str = "gpu") -> Value:
    before = _load(pointer, mask)
    _store(pointer, before + x, mask)
    if mask is not None:
        return before
    # Programs run one after the other: what a program waits for has happened, or never will.
    _here.polls = _here.polls + 1 if x == 0 else 0
    if _here.polls > 100:
        raise TimeoutError(f"a counter is {before} and stays so")
    return before


def _assembly(asm: str, constraints: str, given: list[Any], **_: Any) -> Any:
    if "ld.acquire" in asm:
        # Every lane reads one address.
        where = given[0].offset
        return value(np.full(np.shape(where), _atomic_add(Pointer(given[0].data, given[0].dtype, np.max(where)), 0)))
    if "lg2" in asm:
        return value(np.log2(given[0]))
    if "wait_group.read" in asm:
        _here.copies = [(to, Shared(source.data.copy(), source.dtype), add) for to, source, add in _here.copies]
        _here.copies_read = True
    elif "wait_group" in asm:
        if _here.copies and not _here.copies_read:
            time.sleep(2e-3)  # others may write to the source meanwhile
        _land()
    return given[0]


def _land() -> None:
    """The copies of this thread arrive."""
    for to, source, add in _here.copies:
        to[...] = to + source.data if add else source.data
    _here.copies = []


def _allocate(dtype: Type, shape: list[int], layout: Any) -> Shared:
    if layout is Barrier:
        barriers = np.empty(shape, object)
        for n in np.ndindex(*shape):
            barriers[n] = Barrier()
        return Shared(barriers, dtype)
    kind = dtype.numpy
    return Shared(np.full(shape, np.nan if kind == np.float32 else -1, kind), dtype)


def _warp_specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    errors: list[BaseException] = []
    program = _here.program

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _here.program, _here.products, _here.polls = program, [], 0
        _here.copies, _here.copies_read = [], False
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
            assert not _here.products, "a product is never waited for"
            # What has been read arrives once the kernel is over, at the latest.
            assert not any(add for *_, add in _here.copies), "an addition is never waited for"
            assert not _here.copies or _here.copies_read, "a copy is never waited for"
            _land()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, TimeoutError)), errors[0])


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _language() -> dict[str, Any]:
    """What kernels call, as far as ours do."""
    return {
        "constexpr": lambda x: x, "static_range": range, "arange": lambda a, b, layout=None: value(np.arange(a, b, dtype=np.int32)),
        "bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32, "int32": INT32, "int64": INT64, "uint32": UINT32, "uint64": None,
        "full": lambda shape, x, dtype, layout=None: value(np.full(shape, x, dtype.numpy)),
        "where": lambda c, a, b: value(np.where(c, a, b)), "abs": lambda x: value(np.abs(x)),
        "maximum": lambda a, b: value(np.maximum(a, b)), "minimum": lambda a, b: value(np.minimum(a, b)),
        "max": lambda x, axis: value(np.max(x, axis)), "min": lambda x, axis: value(np.min(x, axis)),
        "sum": lambda x, axis: value(np.sum(x, axis)), "exp2": lambda x: value(np.exp2(x)),
        "log2": lambda x: value(np.log2(x)), "expand_dims": lambda x, axis: value(np.expand_dims(x, axis)),
        "convert_layout": lambda x, layout: x, "load": _load, "store": _store, "atomic_add": _atomic_add,
        "allocate_shared_memory": _allocate, "warp_specialize": _warp_specialize, "thread_barrier": _nothing,
        "program_id": lambda axis: value(_here.program[0]), "num_programs": lambda axis: value(_here.program[1]),
        "inline_asm_elementwise": _assembly, "num_warps": lambda: 4, "math": SimpleNamespace(exp2=lambda x: value(np.exp2(x))),
        **dict.fromkeys(("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout",
                         "SwizzledSharedLayout", "DistributedLinearLayout"), _nothing),
        "permute": lambda x, order: x.transpose(order),
        "NVMMASharedLayout": SimpleNamespace(get_default_for=_nothing),
    }  # fmt: skip


def load(paths: dict[str, Path], change: Callable[[str], str] = lambda source: source) -> ModuleType:
    """Modules by name, each of which may import those before it, with stand-ins for Triton; returns the last.

    Args:
        change: makes of a module's source another; for tests of the tests.
    """

    def module(name: str, **fields: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(fields)
        sys.modules[name] = made
        return made

    kept = {name: x for name, x in sys.modules.items() if name.split(".")[0] == "triton" or name in paths}
    for name in kept:
        del sys.modules[name]
    gluon = "triton.experimental.gluon"

    def jit(function=None, **_):
        return jit if function is None else function

    try:
        language = module(f"{gluon}.language", **_language())
        module("triton", jit=jit, __version__="3.6.0", language=module("triton.language", **_language()))
        module("triton.experimental")
        module(gluon, jit=jit, constexpr_function=jit, language=language)
        module(f"{gluon}.language.nvidia")
        barrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier, init=Barrier.init, wait=Barrier.wait, arrive=Barrier.arrive,
            expect=lambda x, count: x.arrive(1, count),
        )  # fmt: skip
        tma = SimpleNamespace(
            async_copy_global_to_shared=Descriptor.load, async_copy_shared_to_global=Descriptor.store,
            async_atomic_add=lambda to, at, source, _semantic=None: to.store(at, source, add=True),
        )  # fmt: skip
        module(f"{gluon}.language.nvidia.hopper", mbarrier=barrier, tma=tma, warpgroup_mma=warpgroup_mma,
               warpgroup_mma_wait=warpgroup_mma_wait, fence_async_shared=_nothing)  # fmt: skip
        module(f"{gluon}.language._core", builtin=jit)
        for name, path in paths.items():
            spec = importlib.util.spec_from_loader(name, loader=None)
            assert spec is not None
            made = importlib.util.module_from_spec(spec)
            sys.modules[name] = made
            made.__dict__["range"] = lambda *bounds: (value(np.int32(n)) for n in range(*map(int, bounds)))
            exec(compile(change(path.read_text()), str(path), "exec"), made.__dict__)
        return made
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "triton" or name in paths]:
            del sys.modules[name]
        sys.modules.update(kept)


class _Memory:
    """Tensors as kernels see them; those written to get their numbers back."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], tuple[torch.Tensor, Any]] = {}
        """The memory and its copy, by address and length."""

    def __call__(self, x: Any) -> Any:
        if hasattr(x, "tensor"):  # counters
            return self(x.tensor)
        if isinstance(x, torch.Tensor):
            length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            if (x.data_ptr(), length) not in self.known:
                flat = x.detach().as_strided((length,), (1,))
                self.known[x.data_ptr(), length] = (
                    flat,
                    (flat.float() if x.is_floating_point() else flat).numpy().copy(),
                )
            return Pointer(self.known[x.data_ptr(), length][1], TYPES[x.dtype])
        if hasattr(x, "block_shape"):
            return Descriptor(x.base, x.block_shape)
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(self, x))
        return x

    def write_back(self, x: torch.Tensor) -> None:
        flat, data = self.known[x.data_ptr(), x.numel()]
        flat.copy_(torch.from_numpy(data))


def run(kernel: Callable[..., None], grid: tuple[int, ...], arguments: list[Any], written: list[torch.Tensor]) -> None:
    """Run all programs of a one-dimensional grid, one after the other.

    Args:
        arguments: as of a launch: tensors, descriptors, numbers, and named tuples of such.
        written: the tensors that the kernel writes to, but for what descriptors describe.
    """
    memory = _Memory()
    given = [memory(x) for x in arguments]
    for program in range(grid[0]):
        _here.program, _here.products, _here.polls = (np.int32(program), np.int32(grid[0])), [], 0
        kernel(*given)
    for x in given:
        if isinstance(x, Descriptor) and x.stored:
            x.tensor.copy_(torch.from_numpy(x.data))
    for x in written:
        memory.write_back(x)
