"""Triton kernels for decoding on a GPU. Imported by the first step that is captured.

Products with one row read each weight once and compute little: what stands before and behind them, a norm and the gate
of SwiGLU, is computed by the same launch. On Hopper and later a kernel starts while the one before it still runs
(programmatic dependent launch): it reads its first weights, then waits for what the other computes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyspan.layers import RMSNorm


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether kernels may start before those in front of them have ended."""
    hopper = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and hasattr(tl.extra.cuda, "gdc_wait")


def _overlap(x: Tensor) -> dict[str, Any]:
    """The arguments of a launch that say so."""
    return {"PDL": True, "launch_pdl": True} if _overlaps(x.device) else {"PDL": False}


@triton.jit
def start_next_and_wait(PDL: tl.constexpr):
    """Let the next kernel start, and wait for all that the kernels before have written."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def rotate_and_store_kernel(x, cosine, sine, keys, values, before, table, stride, width, page, Q, G,
                            HALF: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program for each head of a token: Q of query, G of key, G of value."""
    start_next_and_wait(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, BH)  # [BH]
    inside = pair < HALF
    at = x + token * stride + head * 2 * HALF + pair
    a = tl.load(at, mask=inside)
    b = tl.load(at + HALF, mask=inside)
    position = tl.load(before + token)
    if head < Q + G:
        c = tl.load(cosine + position * HALF + pair, mask=inside)
        s = tl.load(sine + position * HALF + pair, mask=inside)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = tl.fma(wide_a, c, -(wide_b * s)).to(x.dtype.element_ty)  # as `rotary_kernel`
        b = tl.fma(wide_a, s, wide_b * c).to(x.dtype.element_ty)
    if head < Q:
        tl.store(at, a, mask=inside)
        tl.store(at + HALF, b, mask=inside)
    else:
        slot = tl.load(table + token * width + position // page).to(tl.int64) * page + position % page
        row = slot * G + (head - Q) % G
        if head < Q + G:
            to = keys + row * 2 * HALF + pair
        else:
            to = values + row * 2 * HALF + pair
        tl.store(to, a, mask=inside)
        tl.store(to + HALF, b, mask=inside)


def rotate_and_store(
    qkv: Tensor,
    turns: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    storage: tuple[Tensor, Tensor],
    before: Tensor,
    table: Tensor,
    page_size: int,
) -> None:
    """Rotate the query heads of a projection where they lie, and store its rotated key heads and its value heads.

    Args:
        qkv: [T, (Q + 2 G) · K], contiguous; one token of each sequence.
        turns: cosines and sines of all positions, fp32 [positions, K / 2].
        heads: Q and G.
        storage: keys and values of a layer, [1, slots, G, K], contiguous, of qkv's dtype.
        before: each token's position, int64 [T].
        table: the pages of its sequence, int32 [T, width], contiguous.
        page_size: tokens a page.
    """
    half = turns[0].shape[1]
    Q, G = heads
    rotate_and_store_kernel[len(qkv), Q + 2 * G](
        qkv, *turns, *storage, before, table, qkv.stride(0), table.shape[1], page_size, Q, G, half,
        triton.next_power_of_2(half), num_warps=1, **_overlap(qkv),
    )  # fmt: skip


@triton.jit
def row_product_kernel(x, residual, norm, total, weight, bias, out, eps, N, D: tl.constexpr, BN: tl.constexpr,
                       BK: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
                       BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BN of the N outputs a program. With GATE the weight has 2 N rows: silu of the first half times the second."""
    program = tl.program_id(0)
    rows = (program * BN + tl.arange(0, BN)).to(tl.int64)  # [BN]
    here = tl.arange(0, BK)  # [BK]
    at = weight + rows[:, None] * D + here[None, :]
    w = tl.load(at, mask=(rows < N)[:, None] & (here < D)[None, :], other=0.0)  # [BN, BK]
    g = w
    if GATE:
        g = tl.load(at + N.to(tl.int64) * D, mask=(rows < N)[:, None] & (here < D)[None, :], other=0.0)
    start_next_and_wait(PDL)
    sums = tl.zeros([BN, BK], tl.float32)
    gated = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for first in tl.static_range(0, D, BK):
        column = first + here
        inside = column < D
        next_w, next_g = w, g
        if first + BK < D:
            wanted = (rows < N)[:, None] & (column + BK < D)[None, :]
            next_w = tl.load(at + (first + BK), mask=wanted, other=0.0)
            if GATE:
                next_g = tl.load(at + (first + BK) + N.to(tl.int64) * D, mask=wanted, other=0.0)
        v = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)
            v = v.to(total.dtype.element_ty)
            tl.store(total + column, v, mask=inside & (program == 0))
            v = v.to(tl.float32)
        if NORM:
            squares += v * v
            v *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * v[None, :]
        if GATE:
            gated += g.to(tl.float32) * v[None, :]
        w, g = next_w, next_g
    y = tl.sum(sums, 1)
    up = tl.sum(gated, 1)
    if NORM:  # what all numbers of the row share is a factor of the sum
        r = 1.0 / tl.sqrt(tl.sum(squares, 0) / D + eps)
        y *= r
        up *= r
    if BIAS:
        y += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    if GATE:
        if BIAS:
            up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=rows < N)


def row_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    *,
    gate: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm(x + residual) @ weight.T + bias` of one row, and the sum of x and residual, rounded to their dtype.

    x, residual [1, D], weight [N, D], bias [N] -> [1, N] of `dtype`, by default that of x, and [1, D]. With `gate`
    weight and bias have 2 N rows, and the result is silu of the product's first half times its second.
    """
    D, N = x.shape[1], len(weight) // (2 if gate else 1)
    out = x.new_empty((1, N), dtype=dtype)
    total = x if residual is None else torch.empty_like(x)
    BN, BK, warps = _tile(N, D, gate)
    row_product_kernel[(triton.cdiv(N, BN),)](
        x, residual, None if norm is None else norm.weight, total, weight, bias, out,
        0.0 if norm is None else norm.eps, N, D, BN, BK, norm is not None, residual is not None, gate,
        bias is not None, num_warps=warps, **_overlap(x),
    )  # fmt: skip
    return out, total


def _tile(N: int, D: int, gate: bool) -> tuple[int, int, int]:
    """(BN, BK, warps) for N outputs of D inputs, by measurements on an H100."""
    BN, BK, warps = (1, 2048, 4) if gate else (2, 4096, 8) if D >= 4096 else (4, 1024, 4)
    return BN, min(BK, triton.next_power_of_2(D)), warps
