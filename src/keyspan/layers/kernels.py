"""Which fused kernels a layer runs: Triton's on a GPU, the native library's on a CPU, or torch's functions."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from keyspan.core import shims

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor) -> ModuleType | None:
    """`triton_kernels` or `native_kernels` of keyspan.layers for a plain tensor; None where torch's functions run.

    They run under torch.compile too, which fuses them with what surrounds them, and under other modes and transforms.
    """
    if torch.compiler.is_compiling() or x.dtype not in _DTYPES or not (shims.eager() and shims.plain(x)):
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
