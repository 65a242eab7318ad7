"""Which fused kernels a layer runs: Triton's on a GPU, the native library's on a CPU, or torch's functions."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from keyspan.core import shims
from keyspan.layers import compiled_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor, *others: Tensor | None, compiled: bool = False) -> ModuleType | None:
    """`triton_kernels` or `native_kernels` of keyspan.layers for plain tensors of one device; None where torch's
    functions run.

    They run under other modes and transforms, and under `torch.compile`, which fuses them with what surrounds them.
    With `compiled` the kernels run there as ops, of `compiled_kernels`.
    """
    compiling = torch.compiler.is_compiling()
    if (not compiled if compiling else not shims.eager()) or x.dtype not in _DTYPES:
        return None
    given = (x, *(t for t in others if t is not None))
    if any(t.is_floating_point() and t.dtype not in _DTYPES for t in given):
        return None
    # The kernels read memory as it lies: of another device, or of a subclass, it would be no memory of theirs.
    if compiling:
        known = _has_kernels(x.device.type) and all(type(t) in shims.PLAIN and t.device == x.device for t in given)
        return compiled_kernels if known else None
    if not all(shims.plain(t) and t.device == x.device for t in given):
        return None
    return of_device(x.device.type)


def of_device(device_type: str) -> ModuleType | None:
    """The kernels for tensors on devices of this type, if any."""
    return _triton() if device_type == "cuda" else _native() if device_type == "cpu" else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device_type: str) -> bool:
    return of_device(device_type) is not None


@functools.cache
def _triton() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from keyspan.layers import triton_kernels

    return triton_kernels


@functools.cache
def _native() -> ModuleType | None:
    from keyspan.backends.native import binding

    if binding.WHY_ABSENT is not None:
        return None
    from keyspan.layers import native_kernels

    return native_kernels
