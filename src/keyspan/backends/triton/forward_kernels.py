"""Forward kernels: attention of a tile of query rows over the blocks of keys it sees, and the sum of split keys.

Milakov & Gimelshein 2018 (online softmax), Dao et al. 2022; splits as in Flash-Decoding. Knows no launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.nan_repair import any_nan, forward_exact
from keyspan.backends.triton.primitives import (
    INFINITY,
    LN2,
    LOG2E,
    biased,
    block_at,
    blocks_of,
    bounds_of,
    capped,
    ends_of,
    far_of,
    far_terms,
    head_of,
    kept,
    key_scales,
    load_keys,
    range_of,
    rows_of,
    scaled_query,
    slope_of,
    slots_of,
    unit_of,
    visible_of,
    widened,
)


@triton.jit
def forward_kernel(a, key_tiles, value_tiles, out, lse, heads_at_once, splits, C: tl.constexpr):
    """out [splits, B, M, G, H, V] and lse [splits, B, G, H, M] (natural), both contiguous.

    Grid: (tiles · head tiles · G · B, splits). Tiles that come last, the long ones of a causal mask, go first;
    `heads_at_once` heads go through all their tiles before the next do, so that their keys stay in cache.
    """
    tile, h0, g, b = _place(a, tl.program_id(0), heads_at_once, C)
    split = tl.program_id(1)
    i, h, valid = rows_of(a, tile * C.BM, h0, C.BM, C)
    at = head_of(a.q, a.q_b, a.q_g, a.q_h, b, g, h) + i.to(tl.int64) * a.q_m
    columns = tl.arange(0, C.K)
    pointers = at[:, None] + columns[None, :]
    q = tl.load(pointers, mask=(columns < C.k_dim)[None, :], other=0.0) if C.k_dim < C.K else tl.load(pointers)
    factor = 1.0
    if C.scaled:
        q, factor = scaled_query(q, a, b, g, h, i, C)
    slope = slope_of(a, b, g, h if C.pack > 1 else h0)
    ends = ends_of(a, g, h if C.pack > 1 else h0)
    key = a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g
    value = a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g

    m = tl.full([C.BM], -INFINITY, tl.float32)
    l = tl.full([C.BM], 0.0, tl.float32)
    acc = tl.full([C.BM, C.V], 0.0, tl.float32)
    top = l * 0.0
    if a.sinks is not None:
        # A sink is one more key, with this score and a value of zero.
        if split == 0:
            m = tl.load(a.sinks + g * a.sinks_g + h * a.sinks_h).to(tl.float32) * LOG2E
            l = tl.where(m > -INFINITY, 1.0, 0.0)
    for s in tl.static_range(max(C.S, 1)):
        lo, hi, diagonal = range_of(a, s, b, i, C)
        first, full_first, full_last, last = bounds_of(lo, hi)
        begin, t0, t1, f0, f1 = blocks_of(first, full_first, full_last, last, split, splits, C.BN)
        if a.dense is None:
            left, right = far_of(a, begin, f0, f1, lo < hi, diagonal, C.BN)
            far = left - f0 + f1 - right
            acc, l, m, top = _walk(acc, l, m, top, q, a, key, value, key_tiles, value_tiles, b, g, h, i, factor, slope, ends,
                                   lo, hi, diagonal, begin, f0, f0 + far, left, right, f1, f1, last, False,
                                   C)  # fmt: skip
            acc, l, m, top = _walk(acc, l, m, top, q, a, key, value, key_tiles, value_tiles, b, g, h, i, factor, slope, ends,
                                   lo, hi, diagonal, begin, t0, t1 - far, f0, left, right, f1, last, True, C)  # fmt: skip
        else:
            acc, l, m, top = _walk(acc, l, m, top, q, a, key, value, key_tiles, value_tiles, b, g, h, i, factor, slope, ends,
                                   lo, hi, diagonal, begin, t0, t1, t1, t1, t1, t1, last, True, C)  # fmt: skip
    share = tl.where(l > 0, 1.0 / l, 0.0)
    # A NaN among the scores must come out as one.
    share = tl.where(l != l, l, share)
    if a.seed is not None:
        share *= a.keep_scale
    if C.value_run > 0:
        share *= top
    elif a.value_scale is not None:
        share *= tl.load(a.value_scale + b * a.value_scale_b + g * a.value_scale_g).to(tl.float32)
    acc = acc * share[:, None]
    row = ((split * a.B + b).to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
    columns = tl.arange(0, C.V)
    tl.store(out + row[:, None] * C.v_dim + columns[None, :], acc.to(out.dtype.element_ty),
             mask=valid[:, None] & (columns < C.v_dim)[None, :])  # fmt: skip
    stat = ((split * a.B + b).to(tl.int64) * (a.G * C.H) + g * C.H + h) * a.M + i
    tl.store(lse + stat, tl.where(l == 0, -INFINITY, (m + tl.math.log2(l)) * LN2), mask=valid)
    if any_nan(acc):
        tl.debug_barrier()
        forward_exact(a, out, lse, tile, h0, b, g, split, splits, C)


@triton.jit
def _place(a, program, heads_at_once, C: tl.constexpr):
    """Tile, first head of the group, group and batch entry of a program."""
    tiles = tl.cdiv(a.M, C.BM // C.pack)
    head_tiles: tl.constexpr = (C.H + C.pack - 1) // C.pack
    total = a.B * a.G * head_tiles
    run = program // (heads_at_once * tiles)
    inside = program - run * heads_at_once * tiles
    heads = tl.minimum(heads_at_once, total - run * heads_at_once)
    tile = tiles - 1 - inside // heads
    head = run * heads_at_once + inside % heads
    return tile, head % head_tiles * C.pack, head // head_tiles % a.G, head // head_tiles // a.G


@triton.jit
def _walk(acc, l, m, top, q, a, key, value, key_tiles, value_tiles, b, g, h, i, factor, slope, ends, lo, hi, diagonal,
          begin, t0, t1, x0, x1, y0, y1, last, MASKED: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The online softmax over blocks t0 … t1 − 1, counted without x0 … x1 − 1 and y0 … y1 − 1.

    `factor`: what rows of products are to be multiplied by besides the scale; only where the query is scaled. `top`:
    what the accumulator is to be multiplied by; only where values have scales of their own.
    """
    n = tl.arange(0, C.BN)
    slots = n
    if C.page > 0:
        j0 = begin + block_at(t0, x0, x1, y0, y1) * C.BN
        slots = slots_of(a, j0 + n, last, C)
    # Entries of a table must not be staged in shared memory.
    for t in tl.range(t0, t1, num_stages=1 if MASKED and a.table is not None else None):
        j0 = tl.multiple_of(begin + block_at(t, x0, x1, y0, y1) * C.BN, 16)
        j = (j0 + n)[None, :]
        if C.descriptors:
            k = key_tiles.load([b, g, j0, 0]).reshape(C.BN, C.K)
        else:
            k = load_keys(key, a.k_n, slots, j0, last, MASKED, C.BN, C.K, C.k_dim, C.page)
        if q.dtype != tl.float8e4nv:
            k = widened(k, q, C)
        s = tl.dot(q, tl.trans(k), input_precision=C.precision)
        if C.key_run > 0:
            s *= key_scales(a, a.key_scale, a.key_scale_b, a.key_scale_c, a.key_scale_g, b, g, slots, j0 + n, last,
                            C.key_run, C)[None, :]  # fmt: skip
        unit = unit_of(a, MASKED, C)
        by_row: tl.constexpr = C.scaled and C.simple and (a.table is None or not MASKED)
        if by_row:
            unit *= factor
        elif C.scaled:
            s *= factor[:, None]
        s, _ = capped(s, a, MASKED, C)
        shift = 0.0
        if not MASKED:
            tilt, shift = far_terms(a, slope, ends, t < x0, j0, diagonal)
            if a.slopes is not None:
                s += (tilt[:, None] if C.pack > 1 else tilt) * n[None, :].to(tl.float32)
        s = biased(s, a, b, g, h[:, None], i[:, None], j, lo[:, None], hi[:, None], diagonal[:, None],
                   slope[:, None] if C.pack > 1 and a.slopes is not None else slope, MASKED, C)  # fmt: skip
        if MASKED:
            s = tl.where(visible_of(a, b, g, h[:, None], i[:, None], j, lo[:, None], hi[:, None], C), s, -INFINITY)
        highest = tl.maximum(m, tl.max(s, 1) * unit + shift)
        # The pivot stays finite for rows that have seen no key yet, so that no −inf − −inf arises.
        pivot = tl.where(highest == -INFINITY, 0.0, highest)
        p = tl.math.exp2(s * (unit[:, None] if by_row else unit) - (pivot - shift)[:, None])
        shrink = tl.math.exp2(m - pivot)
        l = l * shrink + tl.sum(p, 1)
        if a.seed is not None:
            p = tl.where(kept(a, b, g * C.H + h, i, j0, C.BM, C.BN, C), p, 0.0)
        if C.descriptors:
            v = value_tiles.load([b, g, j0, 0]).reshape(C.BN, C.V)
        else:
            v = load_keys(value, a.v_n, slots, j0, last, MASKED, C.BN, C.V, C.v_dim, C.page)
        if C.value_run > 0:
            scales = key_scales(a, a.value_scale, a.value_scale_b, a.value_scale_c, a.value_scale_g, b, g, slots,
                                j0 + n, last, C.value_run, C)  # fmt: skip
            # A weight times a scale may be of any size: what is accumulated are shares of the largest so far, `top`.
            p *= scales[None, :]
            largest = tl.maximum(top * shrink, tl.max(tl.abs(p), 1))
            part = 1.0 / tl.where(largest == 0, 1.0, largest)
            p *= part[:, None]
            shrink *= top * part
            top = largest
        if C.page > 0:
            # The next block's pages are read now, or their latency would stand before every load of keys.
            j0 = begin + block_at(t + 1, x0, x1, y0, y1) * C.BN
            slots = slots_of(a, j0 + n, last, C)
        v = widened(v, q, C)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=C.precision)
        m = highest
    return acc, l, m, top


@triton.jit
def combine_kernel(parts, part_lse, out, lse, rows, splits, M, heads, V: tl.constexpr, v_dim: tl.constexpr,
                   SPLITS: tl.constexpr):  # fmt: skip
    """Splits summed: parts [splits, B, M, heads, V] with lse [splits, B, heads, M] to out and lse without splits.

    Grid: (B · M · heads).
    """
    row = tl.program_id(0).to(tl.int64)
    stat = (row // heads // M * heads + row % heads) * M + row // heads % M
    n = tl.arange(0, SPLITS)
    x = tl.load(part_lse + n.to(tl.int64) * rows + stat, mask=n < splits, other=-INFINITY)
    peak = tl.max(x, 0)
    weight = tl.math.exp2((x - tl.where(peak == -INFINITY, 0.0, peak)) * LOG2E)
    total = tl.sum(weight, 0)
    columns = tl.arange(0, V)
    part = tl.load(parts + (n.to(tl.int64) * rows + row)[:, None] * v_dim + columns[None, :],
                   mask=(weight > 0)[:, None] & (columns < v_dim)[None, :], other=0.0)  # fmt: skip
    share = weight / tl.where(total == 0, 1.0, total)
    tl.store(
        out + row * v_dim + columns, tl.sum(part * share[:, None], 0).to(out.dtype.element_ty), mask=columns < v_dim
    )
    tl.store(lse + stat, tl.where(total == 0, -INFINITY, peak + tl.math.log2(total) * LN2))
