"""Which fused kernels a layer runs: Triton's on a GPU, the native library's on a CPU, or torch's functions."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from keyspan.core import shims

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor, *others: Tensor | None) -> ModuleType | None:
    """`triton_kernels` or `native_kernels` of keyspan.layers for plain tensors of one device; None where torch's
    functions run.

    They run under torch.compile too, which fuses them with what surrounds them, and under other modes and transforms.
    """
    if torch.compiler.is_compiling() or not shims.eager() or x.dtype not in _DTYPES:
        return None
    given = (x, *(t for t in others if t is not None))
    # The kernels read memory as it lies: of another device, or of a subclass, it would be no memory of theirs.
    if not all(shims.plain(t) and t.device == x.device for t in given):
        return None
    if any(t.is_floating_point() and t.dtype not in _DTYPES for t in given):
        return None
    return _triton() if x.is_cuda else _native() if x.is_cpu else None


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
