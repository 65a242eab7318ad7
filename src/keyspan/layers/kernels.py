"""Whether a layer runs its fused Triton kernels."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor) -> ModuleType | None:
    """`keyspan.layers.triton_kernels` for a plain tensor on a GPU with Triton; None where torch's functions run.

    They run under torch.compile too, which fuses them with what surrounds them.
    """
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype not in _DTYPES:
        return None
    if type(x) not in (Tensor, torch.nn.Parameter) or not _has_triton():
        return None
    from keyspan.layers import triton_kernels

    return triton_kernels


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
