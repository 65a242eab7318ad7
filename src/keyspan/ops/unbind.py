"""Unbind a packed tensor, and stack parts that lie side by side in memory without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keyspan.core.checks import check_type, is_a


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """`torch.unbind`. Its backward copies the gradients into one tensor.

    xFormers avoids that copy where one kernel wrote all gradients into one tensor. Here a registered operator returns
    them, whose results may not share memory.
    """
    check_type("x", x, Tensor)
    if not is_a(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: got {dim!r}, want {-x.dim()} … {x.dim() - 1}")
    return torch.unbind(x, dim)


def get_stack_strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...] | None:
    """Strides of `torch.stack(tensors, dim)` if it can be a view of their common storage, else None."""
    check_type("tensors", tensors, list, tuple)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise ValueError(f"tensors: got {type(tensors).__name__} of {len(tensors)}, want one tensor at least")
    first = tensors[0]
    if not is_a(dim, int) or not -first.dim() - 1 <= dim <= first.dim():
        raise ValueError(f"dim: got {dim!r}, want {-first.dim() - 1} … {first.dim()}")
    dim = dim + first.dim() + 1 if dim < 0 else dim
    step = tensors[1].storage_offset() - first.storage_offset() if len(tensors) > 1 else first.numel()
    for position, x in enumerate(tensors):
        if (
            x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or (x.dtype, x.shape, x.stride()) != (first.dtype, first.shape, first.stride())
            or x.storage_offset() != first.storage_offset() + position * step
            or step < 0
        ):
            return None
    return (*first.stride()[:dim], int(step), *first.stride()[dim:])


def stack_or_none(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """`torch.stack(tensors, dim)` as a view of their common storage, or None where they do not lie side by side."""
    strides = get_stack_strides(tensors, dim)
    if strides is None:
        return None
    dim = dim + tensors[0].dim() + 1 if dim < 0 else dim
    stacked: Tensor = _StackedView.apply(strides, dim, *tensors)  # type: ignore[no-untyped-call]
    return stacked


class _StackedView(torch.autograd.Function):
    """A strided view over all tensors. `as_strided` alone would send the whole gradient to the first."""

    @staticmethod
    def forward(ctx: Any, strides: tuple[int, ...], dim: int, *tensors: Tensor) -> Tensor:
        ctx.dim = dim
        shape = list(tensors[0].shape)
        shape.insert(dim, len(tensors))
        return tensors[0].as_strided(shape, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *grad.unbind(ctx.dim)
