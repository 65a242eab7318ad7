"""Backward kernels: recomputation from lse (Dao et al. 2022), each gradient summed by one program in a fixed order.

No atomics: keys' gradients are summed over the query tiles that see them, queries' over the key blocks they see, and a
bias's over the dimensions it broadcasts over. Knows no launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.nan_repair import any_nan, keys_exact, queries_exact
from keyspan.backends.triton.primitives import (
    FAR,
    beyond,
    block_at,
    blocks_of,
    bounds_of,
    ends_of,
    far_of,
    far_terms,
    head_of,
    kept,
    load_keys,
    load_lse,
    load_stats,
    load_tile,
    range_of,
    raw_gradient,
    rows_of,
    score_gradient,
    slope_of,
    span_of,
    stats_at,
    weights_of,
)


@triton.jit
def stats_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, out, grad_lse, lse, stats, C: tl.constexpr):
    """Stats, see `stats_at`: lse in log₂; delta = Σ over V of grad · out [B, M, G, H, V], less the gradient of lse.

    Grid: (tiles · H · G · B).
    """
    M, G = a.M, a.G
    tiles = tl.cdiv(M, C.BM)
    i = tl.program_id(0) % tiles * C.BM + tl.arange(0, C.BM)
    bgh = tl.program_id(0) // tiles
    b, g, h = bgh // (G * C.H), bgh // C.H % G, bgh % C.H
    columns = tl.arange(0, C.V)
    mask = (i < M)[:, None] & (columns < C.v_dim)[None, :]
    at = head_of(grad, grad_b, grad_g, grad_h, b, g, h) + i.to(tl.int64) * grad_m
    x = tl.load(at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    row = (b.to(tl.int64) * M + i) * (G * C.H) + g * C.H + h
    x *= tl.load(out + row[:, None] * C.v_dim + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(x, 1)
    stat = bgh.to(tl.int64) * M + i
    if grad_lse is not None:
        total -= tl.load(grad_lse + stat, mask=i < M, other=0.0)
    at, rows = stats_at(a, stats, b, g, h, C)
    tl.store(at + i, load_lse(lse, stat), mask=i < M)
    tl.store(at + rows + i, total, mask=i < M)


@triton.jit
def bounds_kernel(a, bounds, C: tl.constexpr):
    """first, full_first, full_last, last, lowest and highest diagonal of every query tile: int32 [S, B or 1, 6, tiles].

    Grid: (tiles · (B or 1), S).
    """
    tiles = tl.cdiv(a.M, C.BM)
    tile, b, s = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    i, _, valid = rows_of(a, tile * C.BM, 0, C.BM, C)
    lo, hi, diagonal = range_of(a, s, b, i, C)
    first, full_first, full_last, last = bounds_of(lo, tl.where(valid, hi, lo))
    lowest, highest = span_of(lo < hi, diagonal)
    at = bounds + s * 6 * tl.num_programs(0) + b * 6 * tiles + tile
    tl.store(at, first)
    tl.store(at + tiles, full_first)
    tl.store(at + 2 * tiles, full_last)
    tl.store(at + 3 * tiles, last)
    tl.store(at + 4 * tiles, lowest)
    tl.store(at + 5 * tiles, highest)


@triton.jit
def keys_kernel(a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g, grad_h, stats, bounds, bounds_s,
                bounds_b, dk, dv, C: tl.constexpr):  # fmt: skip
    """dk [B, N, G, K] and dv [B, N, G, V], contiguous, or one of them alone. Grid: (key blocks · G · B).

    Works on transposed tiles [keys, queries], so that weights leave the softmax as left operands of dv and dk.
    """
    blocks = tl.cdiv(a.N, C.BN)
    program = tl.program_id(0)
    block, g, b = program % blocks, program // blocks % a.G, program // blocks // a.G
    n = tl.arange(0, C.BN)
    n0 = block * C.BN
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    k = load_keys(key, a.k_n, n, n0, a.N, True, C.BN, C.K, C.k_dim, 0)
    v = load_keys(value, a.v_n, n, n0, a.N, True, C.BN, C.V, C.v_dim, 0)
    dk_acc = tl.full([C.BN, C.K], 0.0, tl.float32)
    dv_acc = tl.full([C.BN, C.V], 0.0, tl.float32)
    for s in tl.static_range(max(C.S, 1)):
        t0, t1, f0, f1, right, left = _tiles_of(a, bounds, bounds_s, bounds_b, s, b, n0, C)
        if a.dense is None:
            far = right - f0 + f1 - left
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g,
                                        grad_h, stats, dk, dv, s, b, g, n0, f0, f0 + far, right, left, f1, f1,
                                        False, C)  # fmt: skip
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g,
                                        grad_h, stats, dk, dv, s, b, g, n0, t0, t1 - far, f0, right, left, f1,
                                        True, C)  # fmt: skip
        else:
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g,
                                        grad_h, stats, dk, dv, s, b, g, n0, t0, t1, t1, t1, t1, t1,
                                        True, C)  # fmt: skip
    if a.seed is not None:
        dv_acc *= a.keep_scale
    row = (b.to(tl.int64) * a.N + n0 + n) * a.G + g
    inside = (n0 + n < a.N)[:, None]
    if dk is not None:
        columns = tl.arange(0, C.K)
        tl.store(dk + row[:, None] * C.k_dim + columns[None, :], (dk_acc * a.scale).to(dk.dtype.element_ty),
                 mask=inside & (columns < C.k_dim)[None, :])  # fmt: skip
    if dv is not None:
        columns = tl.arange(0, C.V)
        tl.store(dv + row[:, None] * C.v_dim + columns[None, :], dv_acc.to(dv.dtype.element_ty),
                 mask=inside & (columns < C.v_dim)[None, :])  # fmt: skip
    if any_nan(dk_acc) | any_nan(dv_acc):
        tl.debug_barrier()
        keys_exact(a, grad, grad_b, grad_m, grad_g, grad_h, stats, dk, dv, b, g, n0, C)


@triton.jit
def _tiles_of(a, bounds, bounds_s, bounds_b, s: tl.constexpr, b, n0, C: tl.constexpr):
    """Query tiles that see any of keys n0 … n0 + BN − 1 lie in t0 … t1 − 1; those in f0 … f1 − 1 see them all.

    Of these the keys lie wholly beyond the table's reach, or to one side of the diagonal: to the right for tiles before
    `right`, to the left for tiles from `left` on. Without terms that depend on position all are such tiles.
    """
    tiles = tl.cdiv(a.M, C.BM)
    zero = n0 * 0
    right_last, left_first, right_count, left_count = zero, zero + FAR, zero, zero
    if C.S == 0:
        t0, t1, f0 = zero, zero + tiles, zero
        f1 = tl.where(n0 + C.BN <= a.N, zero + a.M // C.BM, zero)
    else:
        CHUNK: tl.constexpr = 256
        at = bounds + s * bounds_s + b * bounds_b
        t0, t1, f0, f1, count = zero + FAR, zero, zero + FAR, zero, zero
        for chunk in tl.range(0, tiles, CHUNK):
            t = chunk + tl.arange(0, CHUNK)
            inside = t < tiles
            first = tl.load(at + t, mask=inside, other=FAR)
            full_first = tl.load(at + tiles + t, mask=inside, other=FAR)
            full_last = tl.load(at + 2 * tiles + t, mask=inside, other=0)
            last = tl.load(at + 3 * tiles + t, mask=inside, other=0)
            seen = (first < n0 + C.BN) & (last > n0)
            full = (full_first <= n0) & (full_last >= n0 + C.BN)
            t0 = tl.minimum(t0, tl.min(tl.where(seen, t, FAR), 0))
            t1 = tl.maximum(t1, tl.max(tl.where(seen, t + 1, 0), 0))
            f0 = tl.minimum(f0, tl.min(tl.where(full, t, FAR), 0))
            f1 = tl.maximum(f1, tl.max(tl.where(full, t + 1, 0), 0))
            count += tl.sum(full.to(tl.int32), 0)
            if (a.slopes is not None) or (a.table is not None):
                is_left = full & (n0 + (C.BN - 1) - tl.load(at + 4 * tiles + t, mask=inside, other=0) <= -a.reach)
                is_right = full & (n0 - tl.load(at + 5 * tiles + t, mask=inside, other=0) >= a.reach)
                left_first = tl.minimum(left_first, tl.min(tl.where(is_left, t, FAR), 0))
                right_last = tl.maximum(right_last, tl.max(tl.where(is_right, t + 1, 0), 0))
                left_count += tl.sum(is_left.to(tl.int32), 0)
                right_count += tl.sum(is_right.to(tl.int32), 0)
        # Full tiles that do not follow one another are treated as the others.
        run = (count > 0) & (count == f1 - f0)
        t0 = tl.minimum(t0, t1)
        f0 = tl.where(run, f0, t0)
        f1 = tl.where(run, f1, t0)
    right, left = f1, f1
    if (a.slopes is not None) or (a.table is not None):
        # So are far tiles that are not a run at either end of the full ones.
        left = tl.where((left_count > 0) & (left_first + left_count == f1), tl.maximum(left_first, f0), f1)
        right = tl.where((right_count > 0) & (right_last - right_count == f0), tl.minimum(right_last, left), f0)
    return t0, t1, f0, f1, right, left


@triton.jit
def _keys_walk(dk, dv, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g, grad_h, stats, dk_out,
               dv_out, s: tl.constexpr, b, g, n0, t0, t1, x0, x1, y0, y1, MASKED: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """dk and dv of one key block over query tiles t0 … t1 − 1 of all heads, counted without x0 … x1 − 1 and
    y0 … y1 − 1."""
    count = tl.maximum(t1 - t0, 0)
    r = tl.arange(0, C.BM)
    n = tl.arange(0, C.BN)
    j = (n0 + n)[:, None]
    slope, ends = slope_of(a, b, g, 0), ends_of(a, g, 0)
    for u in tl.range(0, count * C.H, num_stages=1 if MASKED and a.table is not None else None):
        h = u // tl.maximum(count, 1) if C.H > 1 else u * 0
        t = t0 + (u - h * count)
        i0 = block_at(t, x0, x1, y0, y1) * C.BM
        if C.descriptors:
            q = query_tiles.load([b, g, h, i0, 0]).reshape(C.BM, C.K)
        else:
            at = head_of(a.q, a.q_b, a.q_g, a.q_h, b, g, h) + i0.to(tl.int64) * a.q_m
            q = load_tile(at, r, a.q_m, a.M - i0, MASKED, C.K, C.k_dim)
        raw = tl.dot(k, tl.trans(q), input_precision=C.precision)
        # What there is of a query takes as many registers as a tile's row has columns: each is read where it is needed.
        i = i0 + r
        lo, hi, diagonal = range_of(a, s, b, i, C, i < a.M if MASKED else None)
        lo, hi, diagonal, i_ = lo[None, :], hi[None, :], diagonal[None, :], i[None, :]
        stat, rows = stats_at(a, stats, b, g, h, C)
        lse2 = tl.load(stat + i)[None, :]
        slope_h, ends_h = slope, ends
        if C.H > 1:
            slope_h, ends_h = slope_of(a, b, g, h), ends_of(a, g, h)
        tilt = 0.0
        if not MASKED:
            tilt, shift = far_terms(a, slope_h, ends_h, t >= x0, n0, diagonal)
            tilt, lse2 = tilt * n[:, None].to(tl.float32), lse2 - shift
        p, unit = weights_of(raw, a, b, g, h, i_, j, lo, hi, diagonal, slope_h, tilt, lse2, MASKED, C)
        if C.descriptors:
            do = grad_tiles.load([b, g, h, i0, 0]).reshape(C.BM, C.V)
        else:
            at = head_of(grad, grad_b, grad_g, grad_h, b, g, h) + i0.to(tl.int64) * grad_m
            do = load_tile(at, r, grad_m, a.M - i0, MASKED, C.V, C.v_dim)
        dropped = p
        if dk_out is not None:
            dp = tl.dot(v, tl.trans(do), input_precision=C.precision)
        if a.seed is not None:
            keep = tl.trans(kept(a, b, i * 0 + g * C.H + h, i, n0, C.BM, C.BN, C))
            dropped = tl.where(keep, p, 0.0)
            if dk_out is not None:
                dp = tl.where(keep, dp * a.keep_scale, 0.0)
        if dk_out is not None:
            # Nothing was written behind the last row, and a NaN there would not be hidden.
            delta = tl.load(stat + rows + i, mask=i < a.M if MASKED else None, other=0.0 if MASKED else None)
            ds = raw_gradient(p * (dp - delta[None, :]), unit, C)
        if dv_out is not None:
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=C.precision)
        if dk_out is not None:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=C.precision)
    return dk, dv


@triton.jit
def queries_kernel(a, key_tiles, value_tiles, grad, grad_b, grad_m, grad_g, grad_h, out, grad_lse, lse, stats, dq,
                   dslopes, dends, C: tl.constexpr):  # fmt: skip
    """dq [B, M, G, H, K]; stats as `stats_kernel` makes them, for it has been read what that takes; where asked for, per
    row, the slope's gradient [B, G, H, M] and those of the table's first and last entry [2, B, G, H, M].

    Grid: (tiles · H · G · B).
    """
    tiles = tl.cdiv(a.M, C.BM)
    program = tl.program_id(0)
    # Long rows of a causal mask first.
    tile, head = tiles - 1 - program % tiles, program // tiles
    h, g, b = head % C.H, head // C.H % a.G, head // C.H // a.G
    i, _, valid = rows_of(a, tile * C.BM, 0, C.BM, C)
    r = tl.arange(0, C.BM)
    i0 = tile * C.BM
    # Before the tiles are read: done after them it costs a twentieth of all the time.
    walk = _walk_of(a, 0, b, i, C)
    at = head_of(a.q, a.q_b, a.q_g, a.q_h, b, g, h) + i0.to(tl.int64) * a.q_m
    q = load_tile(at, r, a.q_m, a.M - i0, True, C.K, C.k_dim)
    at = head_of(grad, grad_b, grad_g, grad_h, b, g, h) + i0.to(tl.int64) * grad_m
    do = load_tile(at, r, grad_m, a.M - i0, True, C.V, C.v_dim)
    stat = head.to(tl.int64) * a.M + i
    row = (b.to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
    columns = tl.arange(0, C.V)
    weighted = tl.load(out + row[:, None] * C.v_dim + columns[None, :], mask=(columns < C.v_dim)[None, :], other=0.0)
    delta = tl.sum(do.to(tl.float32) * weighted.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + stat)
    lse2 = load_lse(lse, stat)
    at, rows = stats_at(a, stats, b, g, h, C)
    tl.store(at + i, lse2, mask=valid)
    tl.store(at + rows + i, delta, mask=valid)
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    slope = slope_of(a, b, g, h)
    ends = ends_of(a, g, h)
    acc = tl.full([C.BM, C.K], 0.0, tl.float32)
    # Of a row's slope: Σ ds · distance; and what corrects it for the rounding of `out` in delta: Σ p · distance, Σ p · dp.
    dslope = tl.full([C.BM], 0.0, tl.float32)
    reached = dslope
    exact = dslope
    # Of the table's two ends: Σ ds beyond its reach.
    low = dslope
    high = dslope
    for s in tl.static_range(max(C.S, 1)):
        if s > 0:
            walk = _walk_of(a, s, b, i, C)
        lo, hi, diagonal, last, begin, t0, t1, f0, f1 = walk
        sums = (dslope, reached, exact, low, high)
        if a.dense is None:
            left, right = far_of(a, begin, f0, f1, lo < hi, diagonal, C.BN)
            far = left - f0 + f1 - right
            acc, sums = _queries_walk(acc, sums, q, do, lse2, delta, a, key, value, key_tiles, value_tiles, b, g, h, i,
                                      slope, ends, lo, hi, diagonal, dslopes, dends, begin, f0, f0 + far, left, right,
                                      f1, f1, last, False, C)  # fmt: skip
            acc, sums = _queries_walk(acc, sums, q, do, lse2, delta, a, key, value, key_tiles, value_tiles, b, g, h, i,
                                      slope, ends, lo, hi, diagonal, dslopes, dends, begin, t0, t1 - far, f0, left,
                                      right, f1, last, True, C)  # fmt: skip
        else:
            acc, sums = _queries_walk(acc, sums, q, do, lse2, delta, a, key, value, key_tiles, value_tiles, b, g, h, i,
                                      slope, ends, lo, hi, diagonal, dslopes, dends, begin, t0, t1, t1, t1, t1, t1,
                                      last, True, C)  # fmt: skip
        dslope, reached, exact, low, high = sums
    columns = tl.arange(0, C.K)
    tl.store(dq + row[:, None] * C.k_dim + columns[None, :], (acc * a.scale).to(dq.dtype.element_ty),
             mask=valid[:, None] & (columns < C.k_dim)[None, :])  # fmt: skip
    if dslopes is not None:
        true = exact
        if grad_lse is not None:
            true -= tl.load(grad_lse + stat)
        dslope -= (delta - true) * reached
        tl.store(dslopes + stat, dslope, mask=valid)
    if dends is not None:
        tl.store(dends + stat, low, mask=valid)
        tl.store(dends + (tl.num_programs(0) // tiles).to(tl.int64) * a.M + stat, high, mask=valid)
    if any_nan(acc):
        tl.debug_barrier()
        queries_exact(a, grad, grad_b, grad_m, grad_g, grad_h, stats, dq, dslopes, dends, b, g, h, tile, C)


@triton.jit
def _walk_of(a, s: tl.constexpr, b, i, C: tl.constexpr):
    """lo, hi and diagonal of rows i in range s, the last key that any of them sees, and the blocks of keys to visit."""
    lo, hi, diagonal = range_of(a, s, b, i, C)
    first, full_first, full_last, last = bounds_of(lo, hi)
    begin, t0, t1, f0, f1 = blocks_of(first, full_first, full_last, last, 0, 1, C.BN)
    return lo, hi, diagonal, last, begin, t0, t1, f0, f1


@triton.jit
def _queries_walk(acc, sums, q, do, lse2, delta, a, key, value, key_tiles, value_tiles, b, g, h, i, slope, ends, lo, hi,
                  diagonal, dslopes, dends, begin, t0, t1, x0, x1, y0, y1, last, MASKED: tl.constexpr,
                  C: tl.constexpr):  # fmt: skip
    """dq and sums of one query tile over key blocks t0 … t1 − 1, counted without x0 … x1 − 1 and y0 … y1 − 1."""
    dslope, reached, exact, low, high = sums
    n = tl.arange(0, C.BN)
    for t in tl.range(t0, t1, num_stages=1 if MASKED and a.table is not None else None):
        j0 = tl.multiple_of(begin + block_at(t, x0, x1, y0, y1) * C.BN, 16)
        j = (j0 + n)[None, :]
        if C.descriptors:
            k = key_tiles.load([b, g, j0, 0]).reshape(C.BN, C.K)
            v = value_tiles.load([b, g, j0, 0]).reshape(C.BN, C.V)
        else:
            k = load_keys(key, a.k_n, n, j0, last, MASKED, C.BN, C.K, C.k_dim, 0)
            v = load_keys(value, a.v_n, n, j0, last, MASKED, C.BN, C.V, C.v_dim, 0)
        raw = tl.dot(q, tl.trans(k), input_precision=C.precision)
        tilt, shift = 0.0, 0.0
        if not MASKED:
            tilt, shift = far_terms(a, slope, ends, t < x0, j0, diagonal)
            tilt = tilt * n[None, :].to(tl.float32)
        p, unit = weights_of(raw, a, b, g, h, i[:, None], j, lo[:, None], hi[:, None], diagonal[:, None], slope, tilt,
                             (lse2 - shift)[:, None], MASKED, C)  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
        if a.seed is not None:
            dp = tl.where(kept(a, b, i * 0 + g * C.H + h, i, j0, C.BM, C.BN, C), dp * a.keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if dslopes is not None:
            distance = tl.abs(j - diagonal[:, None]).to(tl.float32)
            dslope -= tl.sum(ds * distance, 1)
            reached += tl.sum(p * distance, 1)
            exact += tl.sum(tl.where(p > 0, p * dp, 0.0), 1)
        if dends is not None:
            if MASKED:
                below, above = beyond(a, ds, j - diagonal[:, None])
                low += below
                high += above
            else:
                total = tl.sum(ds, 1)
                low += tl.where(t < x0, total, 0.0)
                high += tl.where(t < x0, 0.0, total)
        ds = raw_gradient(ds, unit, C)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=C.precision)
    return acc, (dslope, reached, exact, low, high)


@triton.jit
def _score_tile(a, grad, grad_b, grad_m, grad_g, grad_h, stats, s: tl.constexpr, b, g, h, i, valid, i0, j0, last,
                C: tl.constexpr):  # fmt: skip
    """Gradient of the biased scores of one tile [BM, BN], 0 where hidden; and lo < hi and diagonal of its rows."""
    r, n = tl.arange(0, C.BM), tl.arange(0, C.BN)
    at = head_of(a.q, a.q_b, a.q_g, a.q_h, b, g, h) + i0.to(tl.int64) * a.q_m
    q = load_tile(at, r, a.q_m, a.M - i0, True, C.K, C.k_dim)
    at = head_of(grad, grad_b, grad_g, grad_h, b, g, h) + i0.to(tl.int64) * grad_m
    do = load_tile(at, r, grad_m, a.M - i0, True, C.V, C.v_dim)
    lse2, delta = load_stats(a, stats, b, g, h, i, C)
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    k = load_keys(key, a.k_n, n, j0, last, True, C.BN, C.K, C.k_dim, 0)
    v = load_keys(value, a.v_n, n, j0, last, True, C.BN, C.V, C.v_dim, 0)
    lo, hi, diagonal = range_of(a, s, b, i, C)
    hi = tl.where(valid, hi, lo)
    raw = tl.dot(q, tl.trans(k), input_precision=C.precision)
    j = (j0 + n)[None, :]
    p, _ = weights_of(raw, a, b, g, h, i[:, None], j, lo[:, None], hi[:, None], diagonal[:, None],
                      slope_of(a, b, g, h), 0.0, lse2[:, None], True, C)  # fmt: skip
    dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
    if a.seed is not None:
        dp = tl.where(kept(a, b, i * 0 + g * C.H + h, i, j0, C.BM, C.BN, C), dp * a.keep_scale, 0.0)
    return score_gradient(p, dp, delta[:, None])


@triton.jit
def bias_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, dbias, Bb, Gb, Hb, Mb, Nb, C: tl.constexpr):
    """dbias [Bb, Gb, Hb, Mb, Nb], contiguous, each dimension 1 or as the scores'; summed over those that are 1.

    Grid: (key blocks or 1 · row tiles or 1 · Hb · Gb · Bb). A program owns one tile and walks all that maps to it.
    """
    tiles, blocks = tl.cdiv(a.M, C.BM), tl.cdiv(a.N, C.BN)
    own_tiles, own_blocks = tl.cdiv(Mb, C.BM), tl.cdiv(Nb, C.BN)
    block_p, tile_p = tl.program_id(0) % own_blocks, tl.program_id(0) // own_blocks % own_tiles
    bgh = tl.program_id(0) // own_blocks // own_tiles
    b_p, g_p, h_p = bgh // (Gb * Hb), bgh // Hb % Gb, bgh % Hb
    # How many of each dimension fall on this program's tile.
    b_n, g_n, h_n = a.B // Bb, a.G // Gb, C.H // Hb
    t_n = tl.where(Mb == 1, tiles, 1)
    n_n = tl.where(Nb == 1, blocks, 1)
    r = tl.arange(0, C.BM)
    total = tl.full([C.BM, C.BN], 0.0, tl.float32)
    for u in tl.range(0, b_n * g_n * h_n * t_n * n_n):
        block = block_p + u % n_n
        tile = tile_p + u // n_n % t_n
        x = u // n_n // t_n
        h, g, b = h_p + x % h_n, g_p + x // h_n % g_n, b_p + x // h_n // g_n
        i0, j0 = tile * C.BM, block * C.BN
        i = tl.minimum(i0 + r, a.M - 1)
        for s in tl.static_range(max(C.S, 1)):
            lo, hi, _ = range_of(a, s, b, i, C)
            first, _1, _2, last = bounds_of(lo, hi)
            if (first < j0 + C.BN) & (last > j0):
                total += _score_tile(a, grad, grad_b, grad_m, grad_g, grad_h, stats, s, b, g, h, i, i0 + r < a.M,
                                     i0, j0, tl.minimum(last, a.N), C)  # fmt: skip
    row = (bgh.to(tl.int64) * Mb + tile_p * C.BM) * Nb + block_p * C.BN
    n = tl.arange(0, C.BN)
    i, j = tile_p * C.BM + r, block_p * C.BN + n
    kind = dbias.dtype.element_ty
    if Mb == 1 and Nb == 1:
        tl.store(dbias + row, tl.sum(tl.sum(total, 1), 0).to(kind))
    elif Mb == 1:
        tl.store(dbias + row + n, tl.sum(total, 0).to(kind), mask=j < Nb)
    elif Nb == 1:
        tl.store(dbias + row + r, tl.sum(total, 1).to(kind), mask=i < Mb)
    else:
        at = dbias + row + r.to(tl.int64)[:, None] * Nb + n[None, :]
        tl.store(at, total.to(kind), mask=(i < Mb)[:, None] & (j < Nb)[None, :])


@triton.jit
def table_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, parts, C: tl.constexpr):
    """Parts [slots, G, H, 2R + 1] of the relative table's gradient, but for its two ends, which `queries_kernel` sums.

    Grid: (slots, G · H). A slot takes every `slots`-th query tile and, of the keys, those within reach. Scores of a tile
    are summed along its diagonals: a gather shifts each row by its diagonal, so that a column holds one distance.
    """
    W: tl.constexpr = 2 * C.BN
    slot, slots, gh = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    g, h = gh // C.H, gh % C.H
    tiles = tl.cdiv(a.M, C.BM)
    r, w = tl.arange(0, C.BM), tl.arange(0, W)
    part = parts + (slot * a.G * C.H + gh).to(tl.int64) * (2 * a.reach + 1)
    for turn in tl.range(0, tl.cdiv(2 * a.reach + 1, W)):
        tl.store(part + turn * W + w, 0.0, mask=turn * W + w < 2 * a.reach + 1)
    for turn in tl.range(0, tl.cdiv(tiles * a.B - slot, slots)):
        item = slot + turn * slots
        tile, b = item % tiles, item // tiles
        i0 = tile * C.BM
        i = tl.minimum(i0 + r, a.M - 1)
        for s in tl.static_range(max(C.S, 1)):
            lo, hi, diagonal = range_of(a, s, b, i, C)
            first, _1, _2, last = bounds_of(lo, hi)
            lowest, highest = span_of(lo < hi, diagonal)
            # Where no row sees anything, `last` is 0 and the span is empty.
            begin = tl.maximum(first, tl.minimum(lowest, last + a.reach) - a.reach + 1) // 16 * 16
            end = tl.minimum(last, highest + a.reach)
            for block in tl.range(0, tl.cdiv(end - tl.minimum(begin, end), C.BN)):
                j0 = begin + block * C.BN
                ds = _score_tile(a, grad, grad_b, grad_m, grad_g, grad_h, stats, s, b, g, h, i, i0 + r < a.M,
                                 i0, j0, last, C)  # fmt: skip
                for window in tl.range(0, tl.cdiv(C.BN + highest - lowest, W)):
                    d0 = j0 - highest + window * W
                    column = (d0 + w)[None, :] + (diagonal - j0)[:, None]
                    shifted = tl.gather(ds, tl.minimum(tl.maximum(column, 0), C.BN - 1), 1)
                    x = tl.sum(tl.where((column >= 0) & (column < C.BN), shifted, 0.0), 0)
                    d = d0 + w
                    inside = (d > -a.reach) & (d < a.reach)
                    at = part + d + a.reach
                    # What one thread wrote in the last round another may read in this one.
                    tl.debug_barrier()
                    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)
