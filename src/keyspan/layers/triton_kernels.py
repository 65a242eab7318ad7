"""Fused Triton kernels of the layers: RMSNorm, rotary embedding, the gate of SwiGLU and GeGLU, cross-entropy.

Each function launches one kernel on contiguous tensors and returns new ones, or writes where it says so. Arithmetic is
fp32; results are rounded once. A row's bits do not depend on the other rows: tiles follow from the width alone, and
kernels are not specialised on T. Imported by the first layer that runs on a GPU. T rows (tokens), D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 4096
"""Elements that a program holds of a matrix at a time: 16 KiB of fp32 registers."""
_PROGRAMS = 528
"""Programs that add up RMSNorm's gradient of the weight, each over its own rows: four a processor of an H100.

The number is fixed, so that the order of the sum does not depend on the device."""


def _on(x: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))


# RMSNorm


@triton.jit(do_not_specialize=["T"])
def rms_norm_forward_kernel(x, residual, weight, total, out, inverse, T, eps, D: tl.constexpr, BT: tl.constexpr,
                            BD: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    column = tl.arange(0, BD)  # [BD]
    inside = (row < T)[:, None] & (column < D)[None, :]  # [BT, BD]
    at = row[:, None] * D + column[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [BT, BD]
    if ADD:
        v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        v = v.to(total.dtype.element_ty)
        tl.store(total + at, v, mask=inside)
        v = v.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / D + eps)  # [BT]
    tl.store(inverse + row, r, mask=row < T)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)  # [BD]
    tl.store(out + at, (v * r[:, None] * w[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(grad, grad_total, x, residual, weight, inverse, dx, dresidual, normed, dweight, T,
                             D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TERMS: tl.constexpr,
                             ADD: tl.constexpr, RESIDUAL: tl.constexpr, NORMED: tl.constexpr,
                             WEIGHT: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BD)  # [BD]
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    sums = tl.zeros([BD], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        row = (tile * BT + tl.arange(0, BT)).to(tl.int64)  # [BT]
        inside = (row < T)[:, None] & (column < D)[None, :]  # [BT, BD]
        at = row[:, None] * D + column[None, :]
        # All loads before the first store, which the compiler cannot move them over.
        r = tl.load(inverse + row, mask=row < T, other=0.0)  # [BT]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [BT, BD]
        if TERMS:
            v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            v = v.to(x.dtype.element_ty).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)  # [BT, BD]
        if ADD:
            more = tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        n = v * r[:, None]  # [BT, BD], the normed rows
        if NORMED:
            tl.store(normed + at, (n * w[None, :]).to(normed.dtype.element_ty), mask=inside)
        if WEIGHT:
            sums += tl.sum(g * n, 0)
        g *= w[None, :]
        d = r[:, None] * (g - n * (tl.sum(g * n, 1) / D)[:, None])
        if ADD:
            d += more
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
        if RESIDUAL:
            tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dweight + tl.program_id(0) * D + column, sums, mask=column < D)


@triton.jit
def column_sums_kernel(parts, out, P, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    column = tl.program_id(0) * BD + tl.arange(0, BD)  # [BD]
    sums = tl.zeros([BP, BD], tl.float32)
    for start in range(0, P, BP):
        row = start + tl.arange(0, BP)  # [BP]
        inside = (row < P)[:, None] & (column < D)[None, :]  # [BP, BD]
        sums += tl.load(parts + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(sums, 0), mask=column < D)


def _column_sums(parts: Tensor) -> Tensor:
    """`parts.sum(0)` of fp32 [P, D]; torch's kernel has too few programs for such a shape."""
    P, D = parts.shape
    out = parts.new_empty(D)
    with _on(parts):
        column_sums_kernel[(triton.cdiv(D, 32),)](parts, out, P, D, 64, 32, num_warps=8)
    return out


def _row_tile(D: int, elements: int = _TILE_ELEMENTS) -> tuple[int, int]:
    """(BT, BD): rows and padded width of a tile."""
    BD = triton.next_power_of_2(D)
    return max(1, elements // BD), BD


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out in `dtype`, x + residual in x's dtype, 1 / rms of its rows in fp32 [T]) of x and residual [T, D]."""
    T, D = x.shape
    BT, BD = _row_tile(D)
    # Loads of another width add in another order.
    x = x.clone() if x.data_ptr() % 16 else x
    residual = residual.clone() if residual is not None and residual.data_ptr() % 16 else residual
    out = torch.empty_like(x, dtype=dtype)
    total = x if residual is None else torch.empty_like(x)
    inverse = torch.empty(T, dtype=torch.float32, device=x.device)
    with _on(x):
        rms_norm_forward_kernel[(triton.cdiv(T, BT),)](
            x, residual, weight, total, out, inverse, T, eps, D, BT, BD, residual is not None, num_warps=_warps(BT * BD)
        )
    return out, total, inverse


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    *,
    weight_too: bool = True,
    residual_dtype: torch.dtype | None = None,
    normed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of RMSNorm, and the norm once more for who has not kept it.

    Args:
        grad: [T, D], the gradient of the norm; grad_total: the other one of what was normed, or None.
        x: [T, D], what was normed, or a term of it; residual: the other term, or None.
        weight: [D]; inverse: fp32 [T], of `rms_norm`.
        weight_too: whether the gradient of weight is wanted.
        residual_dtype: of a second gradient of x, residual's where that is given; None where there is no use for it.
        normed: whether the norm is wanted, in grad's dtype.

    Returns:
        The gradient of x, the same in `residual_dtype`, the gradient of weight in fp32, and the norm with the bits of
        `rms_norm`; None for those that are not wanted.
    """
    T, D = x.shape
    BT, BD = _row_tile(D, _TILE_ELEMENTS // 2)
    dx = torch.empty_like(x)
    dresidual = None if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype)
    out = torch.empty_like(grad) if normed else None
    programs = max(1, min(_PROGRAMS, triton.cdiv(T, BT)))
    parts = torch.empty((programs, D), dtype=torch.float32, device=x.device) if weight_too else None
    with _on(x):
        rms_norm_backward_kernel[(programs,)](
            grad, grad_total, x, residual, weight, inverse, dx, dresidual, out, parts, T, D, BT, BD,
            residual is not None, grad_total is not None, dresidual is not None, normed, weight_too,
            num_warps=_warps(BT * BD),
        )  # fmt: skip
    return dx, dresidual, None if parts is None else _column_sums(parts), out


# Rotary embedding


@triton.jit
def _rotate_heads(source, source_stride, target, target_stride, c, s, row, inside, HEADS: tl.constexpr,
                  ROTATED: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Heads of a tile of tokens from `source` to `target`, rotated by the angles of cosine c and sine s [BT, BH]."""
    pair = tl.arange(0, BH)  # [BH]
    first = (2 * pair if INTERLEAVED else pair)[None, :]
    second = first + (1 if INTERLEAVED else HALF)
    for head in range(HEADS):
        read = source + row[:, None] * source_stride + head * 2 * HALF
        write = target + row[:, None] * target_stride + head * 2 * HALF
        a = tl.load(read + first, mask=inside, other=0.0)  # [BT, BH]
        b = tl.load(read + second, mask=inside, other=0.0)
        if ROTATED:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            # Fused by name: decoding, by another kernel, has the same bits.
            a = tl.fma(wide_a, c, -(wide_b * s)).to(a.dtype)
            b = tl.fma(wide_a, s, wide_b * c).to(b.dtype)
        tl.store(write + first, a, mask=inside)
        tl.store(write + second, b, mask=inside)


@triton.jit(do_not_specialize=["T"])
def rotary_kernel(q, k, v, to_q, to_k, to_v, cosine, sine, T, q_stride, k_stride, v_stride, to_q_stride, to_k_stride,
                  to_v_stride, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr,
                  BT: tl.constexpr, BH: tl.constexpr, BACK: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Q heads of query, K of key and V of value, the first two rotated, from q, k, v to to_q, to_k, to_v."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    pair = tl.arange(0, BH)  # [BH]
    inside = (row < T)[:, None] & (pair < HALF)[None, :]  # [BT, BH]
    angle = row[:, None] * HALF + pair[None, :]
    c = tl.load(cosine + angle, mask=inside, other=0.0)  # [BT, BH]
    s = tl.load(sine + angle, mask=inside, other=0.0)
    if BACK:
        s = -s
    _rotate_heads(q, q_stride, to_q, to_q_stride, c, s, row, inside, Q, True, HALF, BH, INTERLEAVED)
    _rotate_heads(k, k_stride, to_k, to_k_stride, c, s, row, inside, K, True, HALF, BH, INTERLEAVED)
    _rotate_heads(v, v_stride, to_v, to_v_stride, c, s, row, inside, V, False, HALF, BH, INTERLEAVED)


def _rotate(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    table: tuple[Tensor, Tensor],
    heads: Sequence[int],
    *,
    back: bool,
    interleaved: bool,
) -> None:
    """So many heads of query and key are rotated, those of value copied, from and to tensors [T, heads, K].

    Heads of a token lie side by side.
    """
    T, _, K = sources[0].shape
    BH = triton.next_power_of_2(K // 2)
    BT = max(1, _TILE_ELEMENTS // 8 // BH)
    with _on(table[0]):
        rotary_kernel[(triton.cdiv(T, BT),)](
            *sources, *targets, *table, T, *(x.stride(0) for x in (*sources, *targets)), *heads, K // 2, BT, BH, back,
            interleaved, num_warps=2,
        )  # fmt: skip


def rotate_qkv(x: Tensor, cosine: Tensor, sine: Tensor, heads: tuple[int, int, int], *, interleaved: bool) -> None:
    """Rotate query and key heads of x [T, q + k + v heads, K] where they lie. Cosine and sine are fp32 [T, K / 2]."""
    _rotate([x] * 3, [x] * 3, (cosine, sine), (heads[0] + heads[1], 0, 0), back=False, interleaved=interleaved)


def rotated_qkv(
    x: Tensor, cosine: Tensor, sine: Tensor, heads: Sequence[int], *, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rotate_qkv`, to three tensors [T, heads, K] of query, key and value."""
    q, k, v = (x.new_empty((len(x), n, x.shape[2])) for n in heads)
    _rotate(x.split(heads, 1), (q, k, v), (cosine, sine), heads, back=False, interleaved=interleaved)
    return q, k, v


def rotate_qkv_backward(
    grads: tuple[Tensor, Tensor, Tensor], cosine: Tensor, sine: Tensor, *, interleaved: bool
) -> Tensor:
    """The gradient of x, see `rotate_qkv`, of those of its query, key and value [T, heads, K]."""
    T, _, K = grads[0].shape
    heads = [g.shape[1] for g in grads]
    out = grads[0].new_empty((T, sum(heads), K))
    _rotate(grads, out.split(heads, 1), (cosine, sine), heads, back=True, interleaved=interleaved)
    return out


# The gate of SwiGLU and GeGLU


@triton.jit
def _activation(a, GELU: tl.constexpr):
    """(silu(a), its derivative), or those of gelu in its tanh form, which is a · sigmoid(2 u)."""
    if GELU:
        # Beyond, sigmoid is 0 or 1, and the powers may overflow.
        x = tl.minimum(tl.maximum(a, -10.0, propagate_nan=tl.PropagateNan.ALL), 10.0, tl.PropagateNan.ALL)
        twice = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)  # 2 u
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        x, twice, slope = a, a, 1.0
    sigmoid = 1.0 / (1.0 + tl.exp(-twice))
    return a * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid) * slope)


@triton.jit(do_not_specialize=["T"])
def gate_forward_kernel(x12, out, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    column = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    inside = (row < T)[:, None] & (column < D)[None, :]  # [BT, BD]
    at = row[:, None] * (2 * D) + column[None, :]
    a = tl.load(x12 + at, mask=inside, other=0.0).to(tl.float32)  # [BT, BD]
    b = tl.load(x12 + at + D, mask=inside, other=0.0).to(tl.float32)
    # As the unfused formula rounds: the activation in the tensors' dtype, then the product.
    value, _ = _activation(a, GELU)
    gate = value.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row[:, None] * D + column[None, :], (gate * b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(grad, x12, out, dx12, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
                         GELU: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    column = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    inside = (row < T)[:, None] & (column < D)[None, :]  # [BT, BD]
    at = row[:, None] * (2 * D) + column[None, :]
    narrow = row[:, None] * D + column[None, :]
    a = tl.load(x12 + at, mask=inside, other=0.0).to(tl.float32)  # [BT, BD]
    b = tl.load(x12 + at + D, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + narrow, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(a, GELU)
    gate = value.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + narrow, (gate * b).to(out.dtype.element_ty), mask=inside)
    tl.store(dx12 + at, (g * b * slope).to(dx12.dtype.element_ty), mask=inside)
    tl.store(dx12 + at + D, (g * gate).to(dx12.dtype.element_ty), mask=inside)


def _gate_tile(T: int, D: int, width: int) -> tuple[tuple[int, int], int, int]:
    """(grid, BT, BD) for a matrix [T, D], in tiles at most so wide."""
    BD = min(width, triton.next_power_of_2(D))
    BT = max(1, _TILE_ELEMENTS // 2 // BD)
    return (triton.cdiv(T, BT), triton.cdiv(D, BD)), BT, BD


def gate(x12: Tensor, activation: str) -> Tensor:
    """f(x1) · x2 [T, D] of x12 [T, 2 D]; f is silu, or gelu in its tanh form."""
    T, D = x12.shape[0], x12.shape[1] // 2
    out = x12.new_empty((T, D))
    grid, BT, BD = _gate_tile(T, D, 512)
    with _on(x12):
        gate_forward_kernel[grid](x12, out, T, D, BT, BD, activation == "gelu_tanh", num_warps=4)
    return out


def gate_backward(grad: Tensor, x12: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of x12 [T, 2 D], f(x1) · x2 [T, D] computed again), given the gradient of the latter."""
    T, D = grad.shape
    out, dx12 = torch.empty_like(grad), torch.empty_like(x12)
    grid, BT, BD = _gate_tile(T, D, 2048)
    with _on(x12):
        gate_backward_kernel[grid](grad, x12, out, dx12, T, D, BT, BD, activation == "gelu_tanh", num_warps=8)
    return dx12, out


# Cross-entropy


@triton.jit
def _logits(z, bias, at, C, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVICT: tl.constexpr):
    """Logits at columns `at`, capped; −inf beyond the last column."""
    x = tl.load(z + at, mask=at < C, other=-float("inf"), eviction_policy=EVICT).to(tl.float32)
    if BIAS:
        x += tl.load(bias + at, mask=at < C, other=0.0).to(tl.float32)
    if SOFTCAP:
        # tanh by the exponential, which overflows to the right limit.
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
        x = tl.where(at < C, x, -float("inf"))
    return x


@triton.jit
def _logit_gradient(x, shift, gain, less, softcap, SOFTCAP: tl.constexpr):
    """gain · exp(x − lse) − less, the gradient of capped logits x, as that of the logits; shift = −lse · log₂ e."""
    d = gain * tl.exp2(x * 1.4426950408889634 + shift) - less
    if SOFTCAP:
        d *= 1.0 - tl.minimum((x / softcap) * (x / softcap), 1.0)
    return d


@triton.jit
def cross_entropy_kernel(z, z_stride, bias, targets, lse, losses, grads, dz, dz_stride, C, ignore_index, softcap,
                         z_loss, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr,
                         KNOWN: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
                         RUNS: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One row of logits: its lse and loss (where KNOWN, an earlier pass found the lse), then its gradient.

    The gradient may overwrite the logits. A block is RUNS runs of BC columns; a thread has as many of each run, and
    rescales its sum once a block.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    dz += row * dz_stride
    target = tl.load(targets + row)
    counted = target != ignore_index
    known = (target >= 0) & (target < C)
    own = tl.where(known, target, 0) + tl.zeros([1], tl.int64)  # [1]
    own_logit = _logits(z, bias, own, C, softcap, BIAS, SOFTCAP, "")  # [1]
    column = tl.arange(0, RUNS)[:, None] * BC + tl.arange(0, BC)[None, :]  # [RUNS, BC]
    if KNOWN:
        denominator = tl.load(lse + row)
    else:
        peak = tl.full([BC], -float("inf"), tl.float32)
        total = tl.zeros([BC], tl.float32)
        for start in range(0, C, RUNS * BC):
            x = _logits(z, bias, start + column, C, softcap, BIAS, SOFTCAP, "evict_last")  # [RUNS, BC]
            higher = tl.maximum(peak, tl.max(x, 0))
            pivot = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(peak - pivot) + tl.sum(tl.exp(x - pivot[None, :]), 0)
            peak = higher
        top = tl.max(peak, 0)
        pivot = tl.where(top == -float("inf"), 0.0, top)
        denominator = pivot + tl.log(tl.sum(total * tl.exp(peak - pivot), 0))
        loss = denominator - tl.max(own_logit, 0)
        if Z_LOSS:
            loss += z_loss * denominator * denominator
        tl.store(lse + row, denominator)
        tl.store(losses + row, tl.where(counted, tl.where(known, loss, float("nan")), 0.0))
    if GRADIENT:
        factor = 1.0
        if WEIGHTED:
            factor = tl.load(grads + row)
        gain = factor
        if Z_LOSS:
            gain *= 1.0 + 2.0 * z_loss * denominator
        shift = -1.4426950408889634 * denominator
        tl.debug_barrier()  # all threads have the target's logit when one writes over it
        if counted:
            for start in range(0, C, RUNS * BC):
                at = start + column  # [RUNS, BC]
                x = _logits(z, bias, at, C, softcap, BIAS, SOFTCAP, "evict_first")
                d = _logit_gradient(x, shift, gain, 0.0, softcap, SOFTCAP)
                tl.store(dz + at, d.to(dz.dtype.element_ty), mask=at < C, eviction_policy="evict_first")
            tl.debug_barrier()
            d = _logit_gradient(own_logit, shift, gain, factor, softcap, SOFTCAP)
            tl.store(dz + own, d.to(dz.dtype.element_ty), mask=known)
        else:
            for start in range(0, C, RUNS * BC):
                at = start + column
                tl.store(dz + at, tl.zeros([RUNS, BC], dz.dtype.element_ty), mask=at < C)


def cross_entropy_(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    losses: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    grads: Tensor | None = None,
    gradient: bool = False,
) -> Tensor:
    """Cross-entropy of logits z [T, C] in fp32 or of 16 bits, with rows in one piece, which the gradient overwrites.

    Args:
        bias: [C], added to the logits; targets: int64 [T].
        lse: fp32 [T], written where `losses` is given, else read.
        losses: fp32 [T], written; NaN for a target outside [0, C).
        grads: fp32 [T], the gradient of each loss; None for 1.
        gradient: whether the gradient of the logits is wanted, in their dtype.

    Returns:
        z, with the gradient where it is wanted.
    """
    T, C = z.shape
    # Wide programs: few rows are at work at a time, so that the second reading of a row finds it in the L2 cache.
    load = 16 // z.itemsize  # numbers
    BC = min(512 * load, triton.next_power_of_2(C))
    runs = min(4, triton.next_power_of_2(triton.cdiv(C, BC)))
    with _on(z):
        cross_entropy_kernel[(T,)](
            z, z.stride(0), bias, targets, lse, losses, grads, z, z.stride(0), C, ignore_index, softcap or 1.0,
            z_loss, bias is not None, softcap is not None, z_loss != 0, losses is None, gradient,
            grads is not None, runs, BC, num_warps=max(1, BC // (32 * load)),
        )  # fmt: skip
    return z
