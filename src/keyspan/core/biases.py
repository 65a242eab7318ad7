"""Bias terms, added to the scaled scores before the softmax."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ADD = (Tensor.__add__, Tensor.__radd__, Tensor.add, operator.add)
"""The functions that torch reports for `+`: in eager mode, when it compiles and when it exports."""


class Bias:
    """Base class of bias terms: they add to one another and to dense tensors."""

    @property
    def terms(self) -> tuple[Bias, ...]:
        return (self,)

    __array_ufunc__ = None  # `array + bias` calls `__radd__` with the whole array

    def __add__(self, other: Bias | Tensor) -> Bias:
        return BiasSum((*self.terms, *as_bias(other).terms))

    def __radd__(self, other: object) -> Bias:
        return self if isinstance(other, int) and other == 0 else as_bias(other) + self  # sum() starts from 0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Bias:
        """`tensor + bias`: torch calls this; its compiler does for `bias + tensor` too, which it reverses."""
        return as_bias(args[0]) + as_bias(args[1]) if func in _ADD else NotImplemented


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """ALiBi (Press et al. 2021): adds `−slope · |diagonal(i) − j|`, never stored. Differentiable in the slopes.

    Args:
        slopes: floating `[H]`, one per query head (`[G, H]` for 5-D queries), or with a leading batch dimension.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        _check_floating("slopes", self.slopes)


@dataclass(frozen=True, eq=False)
class RelativeBias(Bias):
    """A learned bias by relative position: adds `table[h, clamp(j − diagonal(i), −R, R) + R]`. Differentiable.

    T5's and Swin's relative biases have this form (Shaw et al. 2018; Raffel et al. 2020). Buckets are a way to
    fill the table, e.g. `table = weight[:, bucket_of(torch.arange(-R, R + 1))]`.

    Args:
        table: floating `[H, 2R + 1]`, one row per query head (`[G, H, 2R + 1]` for 5-D queries).
    """

    table: Tensor

    def __post_init__(self) -> None:
        _check_floating("table", self.table)
        if self.table.dim() < 2 or self.table.shape[-1] % 2 == 0:
            raise ValueError(f"table: got shape {list(self.table.shape)}, want [H, 2R + 1], an odd last size")


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A tensor broadcastable to `[B, H, M, N]`, of any strides; its gradient is reduced to its own shape."""

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype == torch.bool:
            raise ValueError("bias: got a bool tensor, want floating values to add; a bool tensor goes to mask=")
        _check_floating("bias", self.values)


@dataclass(frozen=True, eq=False)
class BiasSum(Bias):
    """The sum of several terms."""

    members: tuple[Bias, ...]

    @property
    def terms(self) -> tuple[Bias, ...]:
        return self.members


def as_bias(bias: object) -> Bias:
    """`bias` itself, or a tensor as `DenseBias`."""
    if isinstance(bias, Bias):
        return bias
    if isinstance(bias, Tensor):
        return DenseBias(bias)
    raise ValueError(f"bias: got {type(bias).__name__}, want a tensor, Alibi, RelativeBias or a sum of them")


def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got {got}, want a floating tensor")
