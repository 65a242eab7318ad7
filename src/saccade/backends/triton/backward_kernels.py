"""Backward kernels: recomputation from lse (Dao et al. 2022), each gradient summed by one program in a fixed order.

No atomics: keys' gradients are summed over the query tiles that see them, queries' over the key blocks they see, and a
bias's over the dimensions it broadcasts over. Knows no launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.backends.triton.exact import any_nan, keys_exact, queries_exact
from saccade.backends.triton.primitives import (
    FAR,
    blocks_of,
    bounds_of,
    kept,
    load_keys,
    load_stats,
    load_tile,
    range_of,
    raw_gradient,
    rows_of,
    score_gradient,
    slope_of,
    weights_of,
)


@triton.jit
def delta_kernel(grad, grad_b, grad_m, grad_g, grad_h, out, grad_lse, delta, M, G, C: tl.constexpr):
    """delta [B, G, H, M] = Σ over V of grad · out [B, M, G, H, V], less the gradient of lse. Grid: (tiles, B · G · H)."""
    i = tl.program_id(0) * C.BM + tl.arange(0, C.BM)
    bgh = tl.program_id(1)
    b, g, h = bgh // (G * C.H), bgh // C.H % G, bgh % C.H
    columns = tl.arange(0, C.V)
    mask = (i < M)[:, None] & (columns < C.v_dim)[None, :]
    at = b.to(tl.int64) * grad_b + g * grad_g + h * grad_h + i.to(tl.int64) * grad_m
    x = tl.load(grad + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    row = (b.to(tl.int64) * M + i) * (G * C.H) + g * C.H + h
    x *= tl.load(out + row[:, None] * C.v_dim + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(x, 1)
    stat = bgh.to(tl.int64) * M + i
    if grad_lse is not None:
        total -= tl.load(grad_lse + stat, mask=i < M, other=0.0)
    tl.store(delta + stat, total, mask=i < M)


@triton.jit
def bounds_kernel(a, bounds, C: tl.constexpr):
    """first, full_first, full_last, last of every query tile: int32 [S, B or 1, 4, tiles]. Grid: (tiles, B or 1, S)."""
    tile, b, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, _, valid = rows_of(a, tile * C.BM, 0, C.BM, C)
    lo, hi, _ = range_of(a, s, b, i, C)
    first, full_first, full_last, last = bounds_of(lo, tl.where(valid, hi, lo))
    at = bounds + ((s * tl.num_programs(1) + b) * 4) * tl.num_programs(0) + tile
    tl.store(at, first)
    tl.store(at + tl.num_programs(0), full_first)
    tl.store(at + 2 * tl.num_programs(0), full_last)
    tl.store(at + 3 * tl.num_programs(0), last)


@triton.jit
def keys_kernel(a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, bounds, bounds_s,
                bounds_b, dk, dv, C: tl.constexpr):  # fmt: skip
    """dk [B, N, G, K] and dv [B, N, G, V], contiguous. Grid: (key blocks · G · B).

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
        t0, t1, f0, f1 = _tiles_of(a, bounds, bounds_s, bounds_b, s, b, n0, C)
        if a.dense is None:
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g,
                                        grad_h, lse, delta, s, b, g, n0, f0, f1, f1, 0, False, C)  # fmt: skip
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g,
                                        grad_h, lse, delta, s, b, g, n0, t0, t1 - (f1 - f0), f0, f1 - f0, True,
                                        C)  # fmt: skip
        else:
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g,
                                        grad_h, lse, delta, s, b, g, n0, t0, t1, t1, 0, True, C)  # fmt: skip
    if a.seed is not None:
        dv_acc *= a.keep_scale
    row = (b.to(tl.int64) * a.N + n0 + n) * a.G + g
    inside = (n0 + n < a.N)[:, None]
    columns = tl.arange(0, C.K)
    tl.store(dk + row[:, None] * C.k_dim + columns[None, :], (dk_acc * a.scale).to(dk.dtype.element_ty),
             mask=inside & (columns < C.k_dim)[None, :])  # fmt: skip
    columns = tl.arange(0, C.V)
    tl.store(dv + row[:, None] * C.v_dim + columns[None, :], dv_acc.to(dv.dtype.element_ty),
             mask=inside & (columns < C.v_dim)[None, :])  # fmt: skip
    if any_nan(dk_acc) | any_nan(dv_acc):
        tl.debug_barrier()
        keys_exact(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, dk, dv, b, g, n0, C)


@triton.jit
def _tiles_of(a, bounds, bounds_s, bounds_b, s: tl.constexpr, b, n0, C: tl.constexpr):
    """Query tiles that see any of keys n0 … n0 + BN − 1 lie in t0 … t1 − 1; those in f0 … f1 − 1 see them all."""
    tiles = tl.cdiv(a.M, C.BM)
    zero = n0 * 0
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
        # Full tiles that do not follow one another are treated as the others.
        run = (count > 0) & (count == f1 - f0)
        t0 = tl.minimum(t0, t1)
        f0 = tl.where(run, f0, t0)
        f1 = tl.where(run, f1, t0)
    return t0, t1, f0, f1


@triton.jit
def _keys_walk(dk, dv, k, v, a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g, grad_h, lse, delta,
               s: tl.constexpr, b, g, n0, t0, t1, gap_at, gap, MASKED: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """dk and dv of one key block over query tiles t0 … t1 − 1 of all heads; tiles from `gap_at` on are counted on."""
    count = tl.maximum(t1 - t0, 0)
    r = tl.arange(0, C.BM)
    j = (n0 + tl.arange(0, C.BN))[:, None]
    for u in tl.range(0, count * C.H):
        h = u // tl.maximum(count, 1) if C.H > 1 else u * 0
        t = t0 + (u - h * count)
        i0 = (t + tl.where(t >= gap_at, gap, 0)) * C.BM
        i = tl.minimum(i0 + r, a.M - 1)
        lo, hi, diagonal = range_of(a, s, b, i, C)
        hi = tl.where(i0 + r < a.M, hi, lo)
        lo, hi, diagonal, i_ = lo[None, :], hi[None, :], diagonal[None, :], i[None, :]
        if C.descriptors:
            q = query_tiles.load([b, g, h, i0, 0]).reshape(C.BM, C.K)
        else:
            at = a.q + b.to(tl.int64) * a.q_b + g * a.q_g + h.to(tl.int64) * a.q_h + i0.to(tl.int64) * a.q_m
            q = load_tile(at, r, a.q_m, a.M - i0, MASKED, C.K, C.k_dim)
        lse2, delta_ = load_stats(lse, delta, ((b * a.G + g) * C.H + h).to(tl.int64) * a.M + i)
        slope = slope_of(a, b, g, h)
        raw = tl.dot(k, tl.trans(q), input_precision=C.precision)
        p, unit = weights_of(raw, a, b, g, h, i_, j, n0, C.BN, lo, hi, diagonal, slope, lse2[None, :], MASKED, C)
        if C.descriptors:
            do = grad_tiles.load([b, g, h, i0, 0]).reshape(C.BM, C.V)
        else:
            at = grad + b.to(tl.int64) * grad_b + g * grad_g + h.to(tl.int64) * grad_h + i0.to(tl.int64) * grad_m
            do = load_tile(at, r, grad_m, a.M - i0, MASKED, C.V, C.v_dim)
        dropped = p
        dp = tl.dot(v, tl.trans(do), input_precision=C.precision)
        if a.seed is not None:
            keep = tl.trans(kept(a, b, i * 0 + g * C.H + h, i, n0, C.BM, C.BN, C))
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * a.keep_scale, 0.0)
        ds = raw_gradient(score_gradient(p, dp, delta_[None, :], MASKED), unit, C)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=C.precision)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=C.precision)
    return dk, dv


@triton.jit
def queries_kernel(a, key_tiles, value_tiles, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, grad_lse, dq, dslopes,
                   C: tl.constexpr):  # fmt: skip
    """dq [B, M, G, H, K], and per row the slope's gradient [B, G, H, M] where asked for. Grid: (tiles · H · G · B)."""
    tiles = tl.cdiv(a.M, C.BM)
    program = tl.program_id(0)
    # Long rows of a causal mask first.
    tile, head = tiles - 1 - program % tiles, program // tiles
    h, g, b = head % C.H, head // C.H % a.G, head // C.H // a.G
    i, _, valid = rows_of(a, tile * C.BM, 0, C.BM, C)
    r = tl.arange(0, C.BM)
    i0 = tile * C.BM
    at = a.q + b.to(tl.int64) * a.q_b + g * a.q_g + h.to(tl.int64) * a.q_h + i0.to(tl.int64) * a.q_m
    q = load_tile(at, r, a.q_m, a.M - i0, True, C.K, C.k_dim)
    at = grad + b.to(tl.int64) * grad_b + g * grad_g + h.to(tl.int64) * grad_h + i0.to(tl.int64) * grad_m
    do = load_tile(at, r, grad_m, a.M - i0, True, C.V, C.v_dim)
    stat = head.to(tl.int64) * a.M + i
    lse2, delta_ = load_stats(lse, delta, stat)
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    acc = tl.full([C.BM, C.K], 0.0, tl.float32)
    # Of a row's slope: Σ ds · distance; and what corrects it for the rounding of `out` in delta: Σ p · distance, Σ p · dp.
    dslope = tl.full([C.BM], 0.0, tl.float32)
    reached = dslope
    exact = dslope
    for s in tl.static_range(max(C.S, 1)):
        lo, hi, diagonal = range_of(a, s, b, i, C)
        first, full_first, full_last, last = bounds_of(lo, hi)
        begin, t0, t1, f0, f1 = blocks_of(first, full_first, full_last, last, 0, 1, C.BN)
        if a.dense is None:
            acc, dslope, reached, exact = _queries_walk(acc, dslope, reached, exact, q, do, lse2, delta_, a, key, value, key_tiles, value_tiles, b, g, h, i,
                                        lo, hi, diagonal, dslopes, begin, f0, f1, f1, 0, last, False, C)  # fmt: skip
            acc, dslope, reached, exact = _queries_walk(acc, dslope, reached, exact, q, do, lse2, delta_, a, key, value, key_tiles, value_tiles, b, g, h, i,
                                        lo, hi, diagonal, dslopes, begin, t0, t1 - (f1 - f0), f0, f1 - f0, last, True,
                                        C)  # fmt: skip
        else:
            acc, dslope, reached, exact = _queries_walk(acc, dslope, reached, exact, q, do, lse2, delta_, a, key, value, key_tiles, value_tiles, b, g, h, i,
                                        lo, hi, diagonal, dslopes, begin, t0, t1, t1, 0, last, True, C)  # fmt: skip
    columns = tl.arange(0, C.K)
    row = (b.to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
    tl.store(dq + row[:, None] * C.k_dim + columns[None, :], (acc * a.scale).to(dq.dtype.element_ty),
             mask=valid[:, None] & (columns < C.k_dim)[None, :])  # fmt: skip
    if dslopes is not None:
        true = exact
        if grad_lse is not None:
            true -= tl.load(grad_lse + stat)
        dslope -= (delta_ - true) * reached
        tl.store(dslopes + stat, dslope, mask=valid)
    if any_nan(acc):
        tl.debug_barrier()
        queries_exact(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, dq, dslopes, b, g, h, tile, C)


@triton.jit
def _queries_walk(acc, dslope, reached, exact, q, do, lse2, delta, a, key, value, key_tiles, value_tiles, b, g, h, i, lo, hi, diagonal,
                  dslopes, begin, t0, t1, gap_at, gap, last, MASKED: tl.constexpr,
                  C: tl.constexpr):  # fmt: skip
    """dq of one query tile over key blocks t0 … t1 − 1; blocks from `gap_at` on are counted `gap` further."""
    n = tl.arange(0, C.BN)
    slope = slope_of(a, b, g, h)
    for t in tl.range(t0, t1):
        j0 = tl.multiple_of(begin + (t + tl.where(t >= gap_at, gap, 0)) * C.BN, 16)
        j = (j0 + n)[None, :]
        if C.descriptors:
            k = key_tiles.load([b, g, j0, 0]).reshape(C.BN, C.K)
            v = value_tiles.load([b, g, j0, 0]).reshape(C.BN, C.V)
        else:
            k = load_keys(key, a.k_n, n, j0, last, MASKED, C.BN, C.K, C.k_dim, 0)
            v = load_keys(value, a.v_n, n, j0, last, MASKED, C.BN, C.V, C.v_dim, 0)
        raw = tl.dot(q, tl.trans(k), input_precision=C.precision)
        p, unit = weights_of(raw, a, b, g, h, i[:, None], j, j0, C.BN, lo[:, None], hi[:, None], diagonal[:, None], slope,
                             lse2[:, None], MASKED, C)  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
        if a.seed is not None:
            dp = tl.where(kept(a, b, i * 0 + g * C.H + h, i, j0, C.BM, C.BN, C), dp * a.keep_scale, 0.0)
        ds = score_gradient(p, dp, delta[:, None], MASKED)
        if dslopes is not None:
            distance = tl.abs(j - diagonal[:, None]).to(tl.float32)
            dslope -= tl.sum(ds * distance, 1)
            reached += tl.sum(p * distance, 1)
            exact += tl.sum(tl.where(p > 0, p * dp, 0.0), 1)
        ds = raw_gradient(ds, unit, C)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=C.precision)
    return acc, dslope, reached, exact


@triton.jit
def _score_tile(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, s: tl.constexpr, b, g, h, i, valid, i0, j0, last,
                C: tl.constexpr):  # fmt: skip
    """Gradient of the biased scores of one tile [BM, BN], 0 where hidden; and lo < hi and diagonal of its rows."""
    r, n = tl.arange(0, C.BM), tl.arange(0, C.BN)
    at = a.q + b.to(tl.int64) * a.q_b + g * a.q_g + h.to(tl.int64) * a.q_h + i0.to(tl.int64) * a.q_m
    q = load_tile(at, r, a.q_m, a.M - i0, True, C.K, C.k_dim)
    at = grad + b.to(tl.int64) * grad_b + g * grad_g + h.to(tl.int64) * grad_h + i0.to(tl.int64) * grad_m
    do = load_tile(at, r, grad_m, a.M - i0, True, C.V, C.v_dim)
    lse2, delta_ = load_stats(lse, delta, ((b * a.G + g) * C.H + h).to(tl.int64) * a.M + i)
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g
    k = load_keys(key, a.k_n, n, j0, last, True, C.BN, C.K, C.k_dim, 0)
    v = load_keys(value, a.v_n, n, j0, last, True, C.BN, C.V, C.v_dim, 0)
    lo, hi, diagonal = range_of(a, s, b, i, C)
    hi = tl.where(valid, hi, lo)
    raw = tl.dot(q, tl.trans(k), input_precision=C.precision)
    j = (j0 + n)[None, :]
    p, _ = weights_of(raw, a, b, g, h, i[:, None], j, j0, C.BN, lo[:, None], hi[:, None], diagonal[:, None], slope_of(a, b, g, h),
                      lse2[:, None], True, C)  # fmt: skip
    dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
    if a.seed is not None:
        dp = tl.where(kept(a, b, i * 0 + g * C.H + h, i, j0, C.BM, C.BN, C), dp * a.keep_scale, 0.0)
    return score_gradient(p, dp, delta_[:, None], True)


@triton.jit
def bias_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, dbias, Bb, Gb, Hb, Mb, Nb, C: tl.constexpr):
    """dbias [Bb, Gb, Hb, Mb, Nb], contiguous, each dimension 1 or as the scores'; summed over those that are 1.

    Grid: (row tiles or 1 · key blocks or 1, Bb · Gb · Hb). A program owns one tile and walks all that maps to it.
    """
    tiles, blocks = tl.cdiv(a.M, C.BM), tl.cdiv(a.N, C.BN)
    own_blocks = tl.cdiv(Nb, C.BN)
    tile_p, block_p = tl.program_id(0) // own_blocks, tl.program_id(0) % own_blocks
    bgh = tl.program_id(1)
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
                total += _score_tile(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, s, b, g, h, i, i0 + r < a.M,
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
def table_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, parts, C: tl.constexpr):
    """Parts [slots, G, H, 2R + 1] (zero before) of the relative table's gradient. Grid: (slots, G · H).

    A slot takes every `slots`-th query tile. Scores of a tile are summed along its diagonals: a gather shifts each row
    by its diagonal, so that a column holds one distance.
    """
    W: tl.constexpr = 2 * C.BN
    slot, slots, gh = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    g, h = gh // C.H, gh % C.H
    tiles = tl.cdiv(a.M, C.BM)
    r, w = tl.arange(0, C.BM), tl.arange(0, W)
    part = parts + (slot * a.G * C.H + gh).to(tl.int64) * (2 * a.reach + 1)
    near_low = 0.0
    near_high = 0.0
    for turn in tl.range(0, tl.cdiv(tiles * a.B - slot, slots)):
        item = slot + turn * slots
        tile, b = item % tiles, item // tiles
        i0 = tile * C.BM
        i = tl.minimum(i0 + r, a.M - 1)
        for s in tl.static_range(max(C.S, 1)):
            lo, hi, diagonal = range_of(a, s, b, i, C)
            first, _1, _2, last = bounds_of(lo, hi)
            lowest = tl.min(tl.where(lo < hi, diagonal, FAR), 0)
            highest = tl.max(tl.where(lo < hi, diagonal, -FAR), 0)
            begin = tl.minimum(first, last) // 16 * 16
            for block in tl.range(0, tl.cdiv(last - begin, C.BN)):
                j0 = begin + block * C.BN
                ds = _score_tile(a, grad, grad_b, grad_m, grad_g, grad_h, lse, delta, s, b, g, h, i, i0 + r < a.M,
                                 i0, j0, last, C)  # fmt: skip
                if j0 - highest >= a.reach:
                    near_high += tl.sum(tl.sum(ds, 1), 0)
                elif j0 + C.BN - 1 - lowest <= -a.reach:
                    near_low += tl.sum(tl.sum(ds, 1), 0)
                else:
                    for window in tl.range(0, tl.cdiv(C.BN + highest - lowest, W)):
                        d0 = j0 - highest + window * W
                        column = (d0 + w)[None, :] + (diagonal - j0)[:, None]
                        shifted = tl.gather(ds, tl.minimum(tl.maximum(column, 0), C.BN - 1), 1)
                        x = tl.sum(tl.where((column >= 0) & (column < C.BN), shifted, 0.0), 0)
                        d = d0 + w
                        near_high += tl.sum(tl.where(d >= a.reach, x, 0.0), 0)
                        near_low += tl.sum(tl.where((d <= -a.reach) & (d < a.reach), x, 0.0), 0)
                        inside = (d > -a.reach) & (d < a.reach)
                        at = part + d + a.reach
                        # What one thread wrote in the last round another may read in this one.
                        tl.debug_barrier()
                        tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)
    # Both ends are one entry where the reach is 0.
    if a.reach == 0:
        tl.store(part, near_low + near_high)
    else:
        tl.store(part, near_low)
        tl.store(part + 2 * a.reach, near_high)
