"""Fixes for Triton's CPU interpreter (3.6 to 3.9), so that kernels can be tested without a GPU.

* bf16 is stored as uint16 bits: `dot` multiplies the bits as integers, casts truncate and treat integers as bits. Fixed:
  products are of fp32, casts round to nearest.
* e4m3 is stored as uint8 bits: casts read a NaN as a number, and truncate. Fixed: torch casts.
* NumPy 2.4 and later rejects `int(array([x]))`, which the interpreter uses for loop bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _floats(handle: Any) -> Any:
    """The values of a handle as NumPy floats."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if handle.dtype.scalar == tl.float8e4nv:
        return torch.from_numpy(np.array(handle.data)).view(torch.float8_e4m3fn).float().numpy()
    return handle.data.astype(np.float32) if handle.dtype.scalar == tl.float16 else handle.data


def _to_bfloat16(x: Any) -> Any:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _to_float8(x: Any) -> Any:
    return torch.from_numpy(np.array(x, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


_ENCODE = {tl.bfloat16: _to_bfloat16, tl.float8e4nv: _to_float8}
"""Casts to the types that NumPy does not have."""


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    product = np.matmul(_floats(a), _floats(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _cast(original: Any) -> Any:
    def cast(self: Any, source: Any, to: Any, *rest: Any) -> Any:
        have, want = source.dtype.scalar, to.scalar
        if want in _ENCODE and have != want:
            return interpreter.TensorHandle(_ENCODE[want](_floats(source).astype(np.float32)), want)
        if have in _ENCODE and want.is_floating() and want != have:
            kind = {16: np.float16, 32: np.float32, 64: np.float64}[want.primitive_bitwidth]
            return interpreter.TensorHandle(_floats(source).astype(kind), want)
        return original(self, source, to, *rest)

    return cast


def _patch(original: Any) -> Any:
    def patch(tensor: Any, *rest: Any) -> None:
        original(tensor, *rest)
        index = lambda x: int(np.asarray(x.handle.data).reshape(-1)[0])  # noqa: E731
        if rest:
            rest[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    return patch


def repair() -> None:
    """Install the fixes, once per process."""
    builder = interpreter.InterpreterBuilder
    builder.has_fixed_casts = True  # asked for by keyspan.backends.triton
    builder.create_dot = _dot
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _cast(builder.create_fp_to_fp)
    interpreter._patch_lang_tensor = _patch(interpreter._patch_lang_tensor)
