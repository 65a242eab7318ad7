"""NaN repair: recomputes a tile in 16 × 16 steps when its output has a NaN.

A hidden key must not reach a row even when it holds NaN or inf. It has weight 0, but 0 · NaN = NaN. The kernels do not
guard against that: they test what they have stored and, if a NaN is among it, call these functions to overwrite the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import INFINITY, LOG2E, MAY_REORDER, Heads, Rows
from keyspan.backends.triton.blocks import expand_rows, key_blocks, key_bounds, load_origin, load_range, query_rows
from keyspan.backends.triton.loads import (
    gradient_pointer,
    key_pointer,
    key_scales,
    load_keys,
    load_tile,
    physical_slots,
    query_factor,
    query_pointer,
    value_pointer,
    value_scales,
)
from keyspan.backends.triton.scores import (
    dropout_mask,
    load_lse,
    load_sink,
    load_slope,
    load_stats,
    score_gradient,
    softcap_gradient,
    softmax_weights,
    table_end_sums,
    visibility,
)

STEP = tl.constexpr(16)


class ScoreTile(NamedTuple):
    """What backward needs of one step of rows and keys."""

    q: Any
    """[STEP, K]"""
    k: Any
    grad: Any
    """Gradient of the output, [STEP, V]."""
    dropped: Any
    """Weights after dropout, [rows, keys]."""
    ds: Any
    """Gradient of the biased score, [rows, keys]; 0 where hidden."""
    dqk: Any
    """Gradient of the scaled product of query and key, [rows, keys]; 0 where hidden."""
    visible: Any
    """[rows, keys]"""
    distance: Any
    """Key position minus query position, [rows, keys]."""


@triton.jit
def visible_dot(weight, visible, x, acc, C: tl.constexpr):
    """acc + weight · x, where a row of x reaches a result only if it is visible there.

    Elements that are not finite are taken out of the product and added where they are visible.
    """
    wide = x.to(tl.float32)
    finite = tl.abs(wide) < INFINITY
    acc = tl.dot(weight.to(x.dtype), tl.where(finite, wide, 0.0).to(x.dtype), acc, input_precision=C.precision)
    seen = visible.to(x.dtype)
    nan = tl.dot(seen, tl.where(wide != wide, 1.0, 0.0).to(x.dtype), input_precision=C.precision)
    plus = tl.dot(seen, tl.where(wide == INFINITY, 1.0, 0.0).to(x.dtype), input_precision=C.precision)
    minus = tl.dot(seen, tl.where(wide == -INFINITY, 1.0, 0.0).to(x.dtype), input_precision=C.precision)
    acc += tl.where(nan > 0, float("nan"), 0.0)
    return acc + tl.where(plus > 0, INFINITY, 0.0) + tl.where(minus > 0, -INFINITY, 0.0)


@triton.jit
def has_nan(x):
    # As one dimension: reducing one after the other does not compile for tensor memory (Triton 3.6, sm_100).
    return tl.max(tl.reshape((x != x).to(tl.int32), [x.shape[0] * x.shape[1]], can_reorder=MAY_REORDER), 0) > 0


@triton.jit
def repair_forward(a, out, lse, totals, tile, h0, b, g, split, splits, C: tl.constexpr):
    """Overwrites the output tile of `forward_kernel`, from the lse, or the parts of it, that it has stored."""
    key, value = key_pointer(a, b, g), value_pointer(a, b, g)
    n = tl.arange(0, STEP)
    columns = tl.arange(0, C.K)
    columns_v = tl.arange(0, C.V)
    for step in tl.range(0, C.BM // STEP, num_stages=1):
        i, h, valid = query_rows(a, tile * C.BM + step * STEP, h0, STEP, C)  # [STEP]
        heads = Heads(b, g, h)
        heads_expanded = Heads(b, g, h[:, None])
        pointers = query_pointer(a, heads, i)[:, None] + columns[None, :]
        q = tl.load(pointers, mask=(columns < C.k_dim)[None, :], other=0.0)  # [STEP, K]
        if q.dtype == tl.float8e4nv:
            q = q.to(tl.bfloat16)
        stat = ((split * a.B + b).to(tl.int64) * (a.G * C.H) + g * C.H + h) * a.M + i
        row_lse = load_lse(lse, stat, C)
        if C.segment > 0 and totals is not None:
            row_lse = tl.load(lse + stat)
            row_lse = tl.where(row_lse == -INFINITY, INFINITY, row_lse)
        # The sum of weights relative to `row_lse`: with splits as stored, else 1 up to rounding, see `RowStats`.
        weights = tl.full([STEP], 0.0, tl.float32)
        if totals is not None:
            weights = tl.load(totals + stat)
        elif C.natural and a.sinks is not None:
            weights += tl.math.exp2((load_sink(a, heads, C) - row_lse) * LOG2E)
        slope = load_slope(a, heads_expanded, C)
        acc = tl.full([STEP, C.V], 0.0, tl.float32)
        for s in tl.static_range(max(C.S, 1)):
            rows = load_range(a, s, b, i, C)
            if C.segment == 0:
                # Splits are cut as the kernel cut them: by what all rows of its tile see.
                all_i, _1, _2 = query_rows(a, tile * C.BM, h0, C.BM, C)
                blocks = key_blocks(a, load_range(a, s, b, all_i, C), split, splits, C.BN)
                begin = blocks.begin + blocks.start * C.BN
                end = tl.minimum(blocks.begin + blocks.stop * C.BN, blocks.last)
            else:
                if splits > 1:
                    first = load_origin(a, b, i, C) + split * C.segment
                    lo = tl.maximum(rows.lo, first)
                    rows = Rows(i, lo, tl.minimum(rows.hi, first + C.segment), rows.diagonal)
                begin, _1, _2, end = key_bounds(a, rows.lo, rows.hi)
                begin = tl.minimum(begin, end) // STEP * STEP
            for t in tl.range(0, tl.cdiv(end - begin, STEP), num_stages=1):
                j0 = tl.multiple_of(begin + t * STEP, 16)
                slots = n
                if C.page > 0:
                    slots = physical_slots(a, j0 + n, end, C)
                k = load_keys(key, a.k_n, slots, j0, end, True, STEP, C.K, C.k_dim, C.page)  # [STEP, K]
                v = load_keys(value, a.v_n, slots, j0, end, True, STEP, C.V, C.v_dim, C.page)  # [STEP, V]
                j = (j0 + n)[None, :]
                # Splits end within a range: the next key belongs to the next split.
                expanded = expand_rows(Rows(i, rows.lo, tl.minimum(rows.hi, end), rows.diagonal))
                s_tile = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=C.precision)  # [rows, keys]
                if a.key_scale is not None or a.query_scale is not None:
                    s_tile *= query_factor(a, heads, i, C)[:, None]
                if C.key_run > 0:
                    s_tile *= key_scales(a, heads, slots, j0 + n, end, C)[None, :]
                if a.value_scale is not None:
                    v = v.to(tl.float32) * value_scales(a, heads, slots, j0 + n, end, C)[:, None]
                v = v.to(q.dtype)
                p, _3 = softmax_weights(s_tile, a, heads_expanded, expanded, j, slope, 0.0, row_lse[:, None], 0.0, True,
                                        C)  # fmt: skip
                if C.natural and totals is None:
                    weights += tl.sum(p, 1)
                visible = visibility(a, heads_expanded, expanded, j, C)
                if a.seed is not None:
                    keep = dropout_mask(a, b, g * C.H + h, i, j0, STEP, STEP, C)
                    p = tl.where(keep, p * a.keep_scale, 0.0)
                acc = visible_dot(p, visible, v, acc, C)
        if (C.natural or totals is not None) and (C.segment == 0 or totals is None):
            acc /= tl.where(weights == 0, 1.0, weights)[:, None]
        row = ((split * a.B + b).to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
        tl.store(out + row[:, None] * C.v_dim + columns_v[None, :], acc.to(out.dtype.element_ty),
                 mask=valid[:, None] & (columns_v < C.v_dim)[None, :])  # fmt: skip


@triton.jit
def _score_step(a, grad, stats, s: tl.constexpr, heads, i0, j0, end, C: tl.constexpr):
    """Backward's intermediate results for rows i0 … i0 + 15 and keys j0 … j0 + 15."""
    n = tl.arange(0, STEP)
    i = tl.minimum(i0 + n, a.M - 1)
    q = load_tile(query_pointer(a, heads, i0), n, a.q_m, a.M - i0, True, C.K, C.k_dim)
    do = load_tile(gradient_pointer(grad, heads, i0), n, grad.m, a.M - i0, True, C.V, C.v_dim)
    known = load_stats(a, stats, heads, i, C)
    key, value = key_pointer(a, heads.b, heads.g), value_pointer(a, heads.b, heads.g)
    k = load_keys(key, a.k_n, n, j0, end, True, STEP, C.K, C.k_dim, 0)
    v = load_keys(value, a.v_n, n, j0, end, True, STEP, C.V, C.v_dim, 0)
    rows = load_range(a, s, heads.b, i, C)
    hi = tl.where(i0 + n < a.M, tl.minimum(rows.hi, end), rows.lo)
    rows = expand_rows(Rows(i, rows.lo, hi, rows.diagonal))
    j = (j0 + n)[None, :]
    qk = tl.dot(q, tl.trans(k), input_precision=C.precision)
    p, tanh = softmax_weights(qk, a, heads, rows, j, load_slope(a, heads, C), 0.0, known.lse[:, None],
                              known.lost[:, None], True, C)  # fmt: skip
    visible = visibility(a, heads, rows, j, C)
    dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
    dropped = p
    if a.seed is not None:
        keep = dropout_mask(a, heads.b, i * 0 + heads.g * C.H + heads.h, i, j0, STEP, STEP, C)
        dropped = tl.where(keep, p * a.keep_scale, 0.0)
        dp = tl.where(keep, dp * a.keep_scale, 0.0)
    ds = score_gradient(p, tl.where(visible, dp, 0.0), known.delta[:, None])
    return ScoreTile(q, k, do, dropped, ds, softcap_gradient(ds, tanh, C), visible, j - rows.diagonal)


@triton.jit
def repair_keys(a, grad, stats, dk, dv, b, g, n0, C: tl.constexpr):
    """Overwrites the block of `keys_kernel`; visits every query."""
    n = tl.arange(0, STEP)
    columns, columns_v = tl.arange(0, C.K), tl.arange(0, C.V)
    tiles = tl.cdiv(a.M, STEP)
    for step in tl.range(0, C.BN // STEP, num_stages=1):
        j0 = n0 + step * STEP
        dk_acc = tl.full([STEP, C.K], 0.0, tl.float32)
        dv_acc = tl.full([STEP, C.V], 0.0, tl.float32)
        for s in tl.static_range(max(C.S, 1)):
            for u in tl.range(0, tiles * C.H, num_stages=1):
                h, i0 = n0 * 0 + u // tiles, n0 * 0 + u % tiles * STEP
                rows = load_range(a, s, b, tl.minimum(i0 + n, a.M - 1), C)
                first, _1, _2, last = key_bounds(a, rows.lo, rows.hi)
                if (first < j0 + STEP) & (last > j0):
                    tile = _score_step(a, grad, stats, s, Heads(b, g, h), i0, j0, a.N, C)
                    seen = tl.trans(tile.visible.to(tl.int32)) != 0
                    dv_acc = visible_dot(tl.trans(tile.dropped), seen, tile.grad, dv_acc, C)
                    dk_acc = visible_dot(tl.trans(tile.dqk), seen, tile.q, dk_acc, C)
        row = (b.to(tl.int64) * a.N + j0 + n) * a.G + g
        inside = (j0 + n < a.N)[:, None]
        if dk is not None:
            tl.store(dk + row[:, None] * C.k_dim + columns[None, :], (dk_acc * a.scale).to(dk.dtype.element_ty),
                     mask=inside & (columns < C.k_dim)[None, :])  # fmt: skip
        if dv is not None:
            tl.store(dv + row[:, None] * C.v_dim + columns_v[None, :], dv_acc.to(dv.dtype.element_ty),
                     mask=inside & (columns_v < C.v_dim)[None, :])  # fmt: skip


@triton.jit
def repair_queries(a, grad, stats, dq, dslopes, dends, heads, tile, C: tl.constexpr):
    """Overwrites the tile of `queries_kernel`."""
    n = tl.arange(0, STEP)
    columns = tl.arange(0, C.K)
    for step in tl.range(0, C.BM // STEP, num_stages=1):
        i0 = tile * C.BM + step * STEP
        i = tl.minimum(i0 + n, a.M - 1)
        acc = tl.full([STEP, C.K], 0.0, tl.float32)
        dslope = tl.full([STEP], 0.0, tl.float32)
        low = dslope
        high = dslope
        for s in tl.static_range(max(C.S, 1)):
            rows = load_range(a, s, heads.b, i, C)
            first, _1, _2, last = key_bounds(a, rows.lo, rows.hi)
            begin = tl.minimum(first, last) // 16 * 16
            for t in tl.range(0, tl.cdiv(last - begin, STEP), num_stages=1):
                scores = _score_step(a, grad, stats, s, heads, i0, begin + t * STEP, last, C)
                acc = visible_dot(scores.dqk, scores.visible, scores.k, acc, C)
                if dslopes is not None:
                    dslope -= tl.sum(scores.ds * tl.abs(scores.distance).to(tl.float32), 1)
                if dends is not None:
                    below, above = table_end_sums(a, scores.ds, scores.distance)
                    low += below
                    high += above
        valid = i0 + n < a.M
        row = (heads.b.to(tl.int64) * a.M + i) * (a.G * C.H) + heads.g * C.H + heads.h
        stat = ((heads.b * a.G + heads.g) * C.H + heads.h).to(tl.int64) * a.M
        tl.store(dq + row[:, None] * C.k_dim + columns[None, :], (acc * a.scale).to(dq.dtype.element_ty),
                 mask=valid[:, None] & (columns < C.k_dim)[None, :])  # fmt: skip
        if dslopes is not None:
            tl.store(dslopes + stat + i, dslope, mask=valid)
        if dends is not None:
            tl.store(dends + stat + i, low, mask=valid)
            pairs = tl.num_programs(0) // tl.cdiv(a.M, C.BM)
            tl.store(dends + pairs.to(tl.int64) * a.M + stat + i, high, mask=valid)
