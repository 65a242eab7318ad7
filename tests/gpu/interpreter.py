"""Fixes for Triton's CPU interpreter (3.6 to 3.9), so that kernels can be tested without a GPU.

* bf16 is stored as uint16 bits: `dot` multiplies the bits as integers, casts truncate and treat integers as bits. Fixed:
  products are of fp32, casts round to nearest.
* e4m3 is stored as uint8 bits: casts read a NaN as a number, and truncate. Fixed: torch casts.
* NumPy 2.4 and later rejects `int(array([x]))`, which the interpreter uses for loop bounds.
* Nothing checks addresses: a load beside a tensor reads whatever lies there. Fixed: every address that a mask does not
  hide must be an element of an argument.
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


def dot_in_order(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """`_dot` with each element's products added one after the other."""
    left, right = (_floats(x).astype(d.data.dtype) for x in (a, b))
    total = np.zeros_like(d.data)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return interpreter.TensorHandle(total + d.data, d.dtype.scalar)


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


class _Memory:
    """The addresses that the running kernel may access: from the first to the last element of each tensor argument."""

    def __init__(self) -> None:
        self.starts = self.stops = np.zeros(0, np.int64)

    def own(self, arguments: Any) -> None:
        found: list[tuple[int, int]] = []
        self._add(arguments, found)
        merged: list[list[int]] = []
        for start, stop in sorted(found):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(stop, merged[-1][1])
            else:
                merged.append([start, stop])
        self.starts, self.stops = np.array(merged, np.int64).reshape(-1, 2).T

    def _add(self, x: Any, found: list[tuple[int, int]]) -> None:
        if isinstance(x, (tuple, list)):
            for y in x:
                self._add(y, found)
        elif hasattr(x, "block_shape"):  # a descriptor
            self._add(x.base, found)
        elif isinstance(x, torch.Tensor) and x.numel():
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            found.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))

    def check(self, pointers: Any, mask: Any, what: str) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.asarray(pointers.data).astype(np.int64)[np.asarray(mask.data, bool)]
        place = np.searchsorted(self.starts, at, side="right") - 1
        outside = (place < 0) | (at + size > self.stops[np.maximum(place, 0)])
        if outside.any():
            raise AssertionError(f"a {what} of {size} bytes at {at[outside][:4]}, outside of every argument")


def _checked(original: Any, memory: _Memory, mask_at: int, what: str) -> Any:
    def access(self: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
        memory.check(pointers, rest[mask_at], what)
        return original(self, pointers, *rest, **options)

    return access


def _owned(original: Any, memory: _Memory) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory.own([args, tuple(kwargs.values())])
        return original(self, *args, **kwargs)

    return call


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
    memory = _Memory()
    builder.create_masked_load = _checked(builder.create_masked_load, memory, 0, "load")
    builder.create_masked_store = _checked(builder.create_masked_store, memory, 1, "store")
    interpreter.GridExecutor.__call__ = _owned(interpreter.GridExecutor.__call__, memory)
