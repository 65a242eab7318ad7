"""Tiles once more, slowly, where a NaN came out: a hidden key must not reach a row even when it holds NaN or inf.

A hidden key has weight 0, but 0 · NaN = NaN. The kernels do not guard against that; they look at what they have stored
and, where a NaN is among it, call these, which overwrite the tile in steps of 16 × 16. Knows no launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.primitives import (
    INFINITY,
    MAY_REORDER,
    beyond,
    blocks_of,
    bounds_of,
    head_of,
    kept,
    key_scales,
    load_keys,
    load_lse,
    load_stats,
    load_tile,
    range_of,
    raw_gradient,
    row_scale,
    rows_of,
    score_gradient,
    slope_of,
    slots_of,
    visible_of,
    weights_of,
)

STEP = tl.constexpr(16)


@triton.jit
def exact_dot(weight, visible, x, acc, C: tl.constexpr):
    """acc + weight · x, where rows of x reach a result only where visible: what is not finite is taken out of the
    product and put back where it is visible."""
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
def any_nan(x):
    # As one dimension: reducing one after the other does not compile for tensor memory (Triton 3.6, sm_100).
    return tl.max(tl.reshape((x != x).to(tl.int32), [x.shape[0] * x.shape[1]], can_reorder=MAY_REORDER), 0) > 0


@triton.jit
def forward_exact(a, out, lse, tile, h0, b, g, split, splits, C: tl.constexpr):
    """The tile of `forward_kernel` from the lse it has stored."""
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    n = tl.arange(0, STEP)
    columns = tl.arange(0, C.K)
    columns_v = tl.arange(0, C.V)
    for step in tl.range(0, C.BM // STEP, num_stages=1):
        i, h, valid = rows_of(a, tile * C.BM + step * STEP, h0, STEP, C)
        at = head_of(a.q, a.q_b, a.q_g, a.q_h, b, g, h) + i.to(tl.int64) * a.q_m
        pointers = at[:, None] + columns[None, :]
        q = tl.load(pointers, mask=(columns < C.k_dim)[None, :], other=0.0)
        if q.dtype == tl.float8e4nv:
            q = q.to(tl.bfloat16)
        stat = ((split * a.B + b).to(tl.int64) * (a.G * C.H) + g * C.H + h) * a.M + i
        lse2 = load_lse(lse, stat)
        slope = slope_of(a, b, g, h[:, None])
        acc = tl.full([STEP, C.V], 0.0, tl.float32)
        for s in tl.static_range(max(C.S, 1)):
            lo, hi, diagonal = range_of(a, s, b, i, C)
            first, full_first, full_last, last = bounds_of(lo, hi)
            # Splits are cut as the kernel cut them: by what all rows of its tile see.
            rows, _1, _2 = rows_of(a, tile * C.BM, h0, C.BM, C)
            tile_lo, tile_hi, _3 = range_of(a, s, b, rows, C)
            first, full_first, full_last, last = bounds_of(tile_lo, tile_hi)
            begin, t0, t1, f0, f1 = blocks_of(first, full_first, full_last, last, split, splits, C.BN)
            begin, end = begin + t0 * C.BN, tl.minimum(begin + t1 * C.BN, last)
            for t in tl.range(0, tl.cdiv(end - begin, STEP), num_stages=1):
                j0 = tl.multiple_of(begin + t * STEP, 16)
                slots = n
                if C.page > 0:
                    slots = slots_of(a, j0 + n, end, C)
                k = load_keys(key, a.k_n, slots, j0, end, True, STEP, C.K, C.k_dim, C.page)
                v = load_keys(value, a.v_n, slots, j0, end, True, STEP, C.V, C.v_dim, C.page)
                j = (j0 + n)[None, :]
                # Splits end within a range: the next key belongs to the next split.
                until = tl.minimum(hi, end)
                raw = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=C.precision)
                if a.key_scale is not None or a.query_scale is not None:
                    raw *= row_scale(a, b, g, h, i, C)[:, None]
                if C.key_run > 0:
                    raw *= key_scales(a, a.key_scale, a.key_scale_b, a.key_scale_c, a.key_scale_g, b, g, slots, j0 + n,
                                      end, C.key_run, C)[None, :]  # fmt: skip
                if a.value_scale is not None:
                    v = v.to(tl.float32) * key_scales(a, a.value_scale, a.value_scale_b, a.value_scale_c,
                                                      a.value_scale_g, b, g, slots, j0 + n, end, C.value_run, C)[:, None]  # fmt: skip
                v = v.to(q.dtype)
                p, _4 = weights_of(raw, a, b, g, h[:, None], i[:, None], j, lo[:, None], until[:, None],
                                   diagonal[:, None], slope, 0.0, lse2[:, None], True, C)  # fmt: skip
                visible = visible_of(a, b, g, h[:, None], i[:, None], j, lo[:, None], until[:, None], C)
                if a.seed is not None:
                    p = tl.where(kept(a, b, g * C.H + h, i, j0, STEP, STEP, C), p * a.keep_scale, 0.0)
                acc = exact_dot(p, visible, v, acc, C)
        row = ((split * a.B + b).to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
        tl.store(out + row[:, None] * C.v_dim + columns_v[None, :], acc.to(out.dtype.element_ty),
                 mask=valid[:, None] & (columns_v < C.v_dim)[None, :])  # fmt: skip


@triton.jit
def pair_exact(a, grad, grad_b, grad_m, grad_g, grad_h, stats, s: tl.constexpr, b, g, h, i0, j0, end,
               C: tl.constexpr):  # fmt: skip
    """Rows i0 … and keys j0 … of one step: q, k, do [16, ·], weights with dropout, gradient of q·k, where visible."""
    n = tl.arange(0, STEP)
    i = tl.minimum(i0 + n, a.M - 1)
    at = head_of(a.q, a.q_b, a.q_g, a.q_h, b, g, h) + i0.to(tl.int64) * a.q_m
    q = load_tile(at, n, a.q_m, a.M - i0, True, C.K, C.k_dim)
    at = head_of(grad, grad_b, grad_g, grad_h, b, g, h) + i0.to(tl.int64) * grad_m
    do = load_tile(at, n, grad_m, a.M - i0, True, C.V, C.v_dim)
    lse2, delta = load_stats(a, stats, b, g, h, i, C)
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    k = load_keys(key, a.k_n, n, j0, end, True, STEP, C.K, C.k_dim, 0)
    v = load_keys(value, a.v_n, n, j0, end, True, STEP, C.V, C.v_dim, 0)
    lo, hi, diagonal = range_of(a, s, b, i, C)
    hi = tl.where(i0 + n < a.M, tl.minimum(hi, end), lo)
    j = (j0 + n)[None, :]
    raw = tl.dot(q, tl.trans(k), input_precision=C.precision)
    p, unit = weights_of(raw, a, b, g, h, i[:, None], j, lo[:, None], hi[:, None], diagonal[:, None],
                         slope_of(a, b, g, h), 0.0, lse2[:, None], True, C)  # fmt: skip
    visible = visible_of(a, b, g, h, i[:, None], j, lo[:, None], hi[:, None], C)
    dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
    dropped = p
    if a.seed is not None:
        keep = kept(a, b, i * 0 + g * C.H + h, i, j0, STEP, STEP, C)
        dropped = tl.where(keep, p * a.keep_scale, 0.0)
        dp = tl.where(keep, dp * a.keep_scale, 0.0)
    ds = score_gradient(p, tl.where(visible, dp, 0.0), delta[:, None])
    return q, k, do, dropped, ds, raw_gradient(ds, unit, C), visible, j - diagonal[:, None]


@triton.jit
def keys_exact(a, grad, grad_b, grad_m, grad_g, grad_h, stats, dk, dv, b, g, n0, C: tl.constexpr):
    """The block of `keys_kernel`; visits every query."""
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
                lo, hi, _ = range_of(a, s, b, tl.minimum(i0 + n, a.M - 1), C)
                first, _1, _2, last = bounds_of(lo, hi)
                if (first < j0 + STEP) & (last > j0):
                    q, _3, do, p, _4, ds, visible, _5 = pair_exact(a, grad, grad_b, grad_m, grad_g, grad_h, stats,
                                                                   s, b, g, h, i0, j0, a.N, C)  # fmt: skip
                    seen = tl.trans(visible.to(tl.int32)) != 0
                    dv_acc = exact_dot(tl.trans(p), seen, do, dv_acc, C)
                    dk_acc = exact_dot(tl.trans(ds), seen, q, dk_acc, C)
        row = (b.to(tl.int64) * a.N + j0 + n) * a.G + g
        inside = (j0 + n < a.N)[:, None]
        if dk is not None:
            tl.store(dk + row[:, None] * C.k_dim + columns[None, :], (dk_acc * a.scale).to(dk.dtype.element_ty),
                     mask=inside & (columns < C.k_dim)[None, :])  # fmt: skip
        if dv is not None:
            tl.store(dv + row[:, None] * C.v_dim + columns_v[None, :], dv_acc.to(dv.dtype.element_ty),
                     mask=inside & (columns_v < C.v_dim)[None, :])  # fmt: skip


@triton.jit
def queries_exact(a, grad, grad_b, grad_m, grad_g, grad_h, stats, dq, dslopes, dends, b, g, h, tile,
                  C: tl.constexpr):  # fmt: skip
    """The tile of `queries_kernel`."""
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
            lo, hi, _ = range_of(a, s, b, i, C)
            first, _1, _2, last = bounds_of(lo, hi)
            begin = tl.minimum(first, last) // 16 * 16
            for t in tl.range(0, tl.cdiv(last - begin, STEP), num_stages=1):
                _3, k, _4, _5, dbias, ds, visible, distance = pair_exact(
                    a, grad, grad_b, grad_m, grad_g, grad_h, stats, s, b, g, h, i0, begin + t * STEP, last, C)  # fmt: skip
                acc = exact_dot(ds, visible, k, acc, C)
                if dslopes is not None:
                    dslope -= tl.sum(dbias * tl.abs(distance).to(tl.float32), 1)
                if dends is not None:
                    below, above = beyond(a, dbias, distance)
                    low += below
                    high += above
        valid = i0 + n < a.M
        row = (b.to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
        stat = ((b * a.G + g) * C.H + h).to(tl.int64) * a.M
        tl.store(dq + row[:, None] * C.k_dim + columns[None, :], (acc * a.scale).to(dq.dtype.element_ty),
                 mask=valid[:, None] & (columns < C.k_dim)[None, :])  # fmt: skip
        if dslopes is not None:
            tl.store(dslopes + stat + i, dslope, mask=valid)
        if dends is not None:
            tl.store(dends + stat + i, low, mask=valid)
            pairs = tl.num_programs(0) // tl.cdiv(a.M, C.BM)
            tl.store(dends + pairs.to(tl.int64) * a.M + stat + i, high, mask=valid)
