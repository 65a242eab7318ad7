"""Rotary position embedding (RoPE): queries and keys are rotated by angles proportional to their position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyspan.core.checks import check_bool, check_int, check_number, check_tensor
from keyspan.layers import compiled_kernels
from keyspan.layers.kernels import kernels_for


def rotary_table(
    positions: Tensor, dim: int, theta: float = 10000.0, scaling: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles `position * theta ** (-2 * pair / dim)`, shared by all layers of a step.

    positions [...] (integers or floats), dim even -> two fp32 tensors [..., dim / 2]. `scaling` changes the
    frequencies [dim / 2], radians per position. Raises ValueError for an odd dim and other arguments that do not fit.
    """
    _check_positions(positions)
    check_int("dim", dim, 0, bits=31)
    check_number("theta", theta, positive=True)
    if scaling is not None and not callable(scaling):
        raise ValueError(f"scaling: got {scaling!r}, want a function of the frequencies or None")
    if dim % 2:
        raise ValueError(f"dim: got {dim}, want an even number (components are rotated in pairs)")
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = theta ** (-pair / dim)
    if scaling is not None:
        frequencies = scaling(frequencies)
    if torch.compiler.is_compiling():
        # Opaque, so that backward reads the table: the compiler would compute it again for each layer.
        table: tuple[Tensor, Tensor] = torch.ops.keyspan.rotary_table(positions, frequencies)
        return table
    return _table(positions, frequencies)


def _check_positions(positions: Any) -> None:
    if not isinstance(positions, Tensor) or positions.dtype == torch.bool:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"positions: got {got}, want a tensor of integers or floats")


def _table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def _table_fake(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, *frequencies.shape)
    return frequencies.new_empty(shape), frequencies.new_empty(shape)


_library = torch.library.Library("keyspan", "FRAGMENT")
_library.define("rotary_table(Tensor positions, Tensor frequencies) -> (Tensor, Tensor)")
_library.impl("rotary_table", _table, "CompositeExplicitAutograd")
torch.library.register_fake("keyspan::rotary_table", _table_fake, lib=_library)


def rotate(x: Tensor, table: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """`rotary` by a table: x [B, M, H, K] or [B, M, G, H, K], table of [M, K / 2] or [B, M, K / 2].

    Raises ValueError where the shapes do not fit.
    """
    check_tensor("x", x)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: got shape {list(x.shape)}, want [B, M, H, K] or [B, M, G, H, K]")
    _check_table(table, x.shape[1], x.shape[-1], x)
    heads = [1] * (x.ndim - 3)
    cos, sin = (t.view(*t.shape[:-1], *heads, t.shape[-1]) for t in table)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, theta: float = 10000.0, interleaved: bool = False) -> Tensor:
    """Rotary position embedding: pair p of x's components turned by `position * theta ** (-2 p / K)` radians.

    The product of a query and a key then depends on their distance alone. Pair p is (p, p + K / 2), as in
    GPT-NeoX and in Llama's Hugging Face weights; with interleaved=True it is (2 p, 2 p + 1), as in the paper
    (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021).

    x [B, M, H, K] or [B, M, G, H, K] with K even, positions [M] or [B, M] -> x's shape and dtype.
    Angles and products are fp32. Raises ValueError where positions do not fit x, and for an odd K.
    """
    check_tensor("x", x)
    _check_positions(positions)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: got shape {list(x.shape)}, want [B, M, H, K] or [B, M, G, H, K]")
    B, M = x.shape[:2]
    if positions.shape not in ((M,), (B, M)):
        raise ValueError(f"positions: got shape {list(positions.shape)}, want [{M}] or [{B}, {M}]")
    return rotate(x, rotary_table(positions, x.shape[-1], theta), interleaved)


def _check_table(table: Any, M: int, K: int, x: Tensor) -> None:
    if not isinstance(table, (tuple, list)) or len(table) != 2:
        raise ValueError(f"table: got {type(table).__name__}, want the cosine and sine of rotary_table")
    for t in table:
        check_tensor("table", t, x)
        if t.ndim < 2 or 2 * t.shape[-1] != K or t.shape[-2] not in (1, M):
            raise ValueError(f"table: got shape {list(t.shape)}, want [{M}, {K} / 2], or the same for each of a batch")


class _Rotate(torch.autograd.Function):
    """As `_RotateInPlace` to tensors of their own, for a compiler, for which nothing is overwritten."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        x = qkv.view(qkv.shape[0], sum(heads), qkv.shape[1] // sum(heads))
        q, k, v = compiled_kernels.rotated_qkv(x, cos, sin, heads, interleaved=interleaved)
        return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (grad[0].contiguous() for grad in grads)
        cos, sin = ctx.saved_tensors
        grad = compiled_kernels.rotate_qkv_backward((q, k, v), cos, sin, interleaved=ctx.interleaved)
        return grad.flatten(1), None, None, None, None


class _RotateInPlace(torch.autograd.Function):
    """Query, key and value heads of a fused projection [T, (q + k + v) · K], the first two rotated where they lie."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], interleaved: bool, kernels: Any
    ) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.kernels = interleaved, kernels
        x = qkv.detach().view(qkv.shape[0], sum(heads), qkv.shape[1] // sum(heads))
        kernels.rotate_qkv(x, cos, sin, heads, interleaved=interleaved)
        # Not mark_dirty: a view of the projection would get its gradient through copies of the whole of it.
        torch.autograd.graph.increment_version(qkv)
        return x.unsqueeze(0).split(heads, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = tuple(grad[0].contiguous() for grad in grads)
        grad = ctx.kernels.rotate_qkv_backward(rows, *ctx.saved_tensors, interleaved=ctx.interleaved)
        return grad.flatten(1), None, None, None, None, None


def rotate_qkv(
    qkv: Tensor, table: tuple[Tensor, Tensor], heads: Sequence[int], interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a fused projection, query and key rotated; by a fused kernel in one pass, where they lie.

    Args:
        qkv: [T, (Hq + 2 G) · K], the projection of T tokens: query, key, then value heads. It is overwritten where a
            fused kernel runs, so that nothing else may use it.
        table: of `rotary_table`, two of [T, K / 2].
        heads: Hq, G, G.

    Returns:
        [1, T, Hq, K], [1, T, G, K], [1, T, G, K], views of one tensor or of two.

    Raises:
        ValueError: where shapes do not fit.
    """
    check_tensor("qkv", qkv)
    if not isinstance(heads, (tuple, list)) or len(heads) != 3:
        raise ValueError(f"heads: got {heads!r}, want three counts: of query, key and value heads")
    for count in heads:
        check_int("heads", count, 0)
    if not sum(heads):
        raise ValueError(f"heads: got {heads!r}, want one head at least")
    check_bool("interleaved", interleaved)
    q, k, v = heads
    if qkv.ndim != 2 or qkv.shape[1] % (q + k + v):
        raise ValueError(f"qkv: got shape {list(qkv.shape)}, want [T, {q + k + v} · K] of {q + k + v} heads")
    _check_table(table, qkv.shape[0], qkv.shape[1] // (q + k + v), qkv)
    T, K = qkv.shape[0], qkv.shape[1] // (q + k + v)
    kernels = kernels_for(qkv, *table, compiled=True)
    if kernels is not None and _in_place(qkv) and all(_is_angles(t, T, K) for t in table):
        heads = (q, k, v)
        if kernels is compiled_kernels:
            query, key, value = _Rotate.apply(qkv, *table, heads, interleaved)  # type: ignore[no-untyped-call]
        else:
            query, key, value = _RotateInPlace.apply(qkv, *table, heads, interleaved, kernels)  # type: ignore[no-untyped-call]
        return query, key, value
    turned, value = qkv.view(1, T, q + k + v, K).split((q + k, v), dim=2)
    query, key = rotate(turned, table, interleaved).split((q, k), dim=2)
    # A copy of the values, where a compiler decides what backward keeps, lets go of the whole projection.
    return query, key, value.clone() if torch.compiler.is_compiling() else value


def _in_place(qkv: Tensor) -> bool:
    return qkv.is_contiguous() and not (qkv.is_leaf and qkv.requires_grad)


def _is_angles(t: Tensor, T: int, K: int) -> bool:
    """Whether a table is what the kernels read; another may still broadcast."""
    return t.shape == (T, K / 2) and t.dtype == torch.float32 and t.is_contiguous()
