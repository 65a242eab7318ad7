"""Forward kernels: attention of a tile of query rows over the blocks of keys it sees, and the merge of split keys.

Milakov & Gimelshein 2018 (online softmax), Dao et al. 2022; splits as in Flash-Decoding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import INFINITY, INT32_MAX, LN2, LOG2E, Heads, KeyValue
from keyspan.backends.triton.blocks import (
    block_number,
    blocks_from,
    expand_rows,
    far_blocks,
    far_run,
    key_blocks,
    key_bounds,
    load_origin,
    load_range,
    near_run,
    query_rows,
    rows_of_document,
    run_in_order,
    whole_run,
)
from keyspan.backends.triton.loads import (
    convert_stored,
    key_pointer,
    key_scales,
    load_keys,
    physical_slots,
    query_pointer,
    rescale_query,
    value_pointer,
    value_scales,
)
from keyspan.backends.triton.nan_repair import has_nan, repair_forward
from keyspan.backends.triton.scores import (
    add_bias,
    dropout_mask,
    exponent_scale,
    exponential,
    far_bias,
    load_position_bias,
    load_sink,
    natural_lse,
    scale_and_cap,
    sum_of_keys,
    visibility,
)


class Softmax(NamedTuple):
    """State of the online softmax."""

    acc: Any
    """[BM, V], weighted values relative to `peak`, divided by `value_factor` where values have scales per run."""
    total: Any
    """[BM], sum of weights relative to `peak`."""
    peak: Any
    """[BM], largest score so far in log₂."""
    value_factor: Any
    """[BM], what `acc` is to be multiplied by."""


class Kept(NamedTuple):
    """Where the sums of segments wait: pointer [programs, BM, V] or None, the number of this program, and which rows of the
    tile are rows, [BM]."""

    pointer: Any
    program: Any
    valid: Any


@triton.jit
def forward_kernel(a, key_tiles, value_tiles, out, lse, totals, sums, heads_at_once, splits, C: tl.constexpr):
    """out [splits, B, M, G, H, V] and lse [splits, B, G, H, M] (natural), both contiguous.

    With several splits `lse` gets the largest score instead, and `totals`, of the same shape, the sum of the weights
    relative to it: rounded together they would not do for the merge, see `RowStats`. Where there are segments
    (`Constants.segment`) split n is segment n of each document, the score is in the unit of scores, and `out` is not
    divided by the sum of the weights. Without splits `sums` [row tiles · head tiles · G · B, BM, V] is scratch, None where
    there is one segment.

    Grid: (row tiles · head tiles · G · B, splits). The last row tiles, which are the long ones of a causal mask, run
    first. `heads_at_once` heads run all their row tiles before the next heads start, so that their keys stay in L2.
    """
    tile, h0, g, b = _program_tile(a, tl.program_id(0), heads_at_once, C)
    split = tl.program_id(1)
    i, h, valid = query_rows(a, tile * C.BM, h0, C.BM, C)  # [BM]
    at = query_pointer(a, Heads(b, g, h), i)  # [BM]
    columns = tl.arange(0, C.K)
    pointers = at[:, None] + columns[None, :]
    q = tl.load(pointers, mask=(columns < C.k_dim)[None, :], other=0.0) if C.k_dim < C.K else tl.load(pointers)
    # q: [BM, K]
    factor = 1.0
    if C.scaled:
        q, factor = rescale_query(q, a, Heads(b, g, h), i, C)
    position = load_position_bias(a, Heads(b, g, h if C.pack > 1 else h0), C)
    kv = KeyValue(key_pointer(a, b, g), value_pointer(a, b, g), key_tiles, value_tiles)

    m = tl.full([C.BM], -INFINITY, tl.float32)
    l = tl.full([C.BM], 0.0, tl.float32)
    acc = tl.full([C.BM, C.V], 0.0, tl.float32)
    value_factor = l * 0.0
    if a.sinks is not None:
        # A sink is one more key with this score and a value of 0; the first split counts it.
        if split == 0:
            m = load_sink(a, Heads(b, g, h), C)
            l = tl.where(m > -INFINITY, 1.0, 0.0)
    state = Softmax(acc, l, m, value_factor)
    heads = Heads(b, g, h)
    if C.segment > 0:
        state = _documents(state, a=a, q=q, factor=factor, kv=kv, heads=heads, i=i, position=position, split=split,
                           splits=splits, kept=Kept(sums, tl.program_id(0), valid), C=C)  # fmt: skip
    else:
        for s in tl.static_range(max(C.S, 1)):
            rows = load_range(a, s, b, i, C)
            blocks = key_blocks(a, rows, split, splits, C.BN)
            if a.dense is None:
                left, right = far_blocks(a, blocks, rows, C.BN)
                far = far_run(blocks.full_start, blocks.full_stop, left, right)
                near = near_run(blocks.start, blocks.stop, blocks.full_start, blocks.full_stop, left, right)
                state = _forward_walk(state, a=a, q=q, factor=factor, kv=kv, heads=heads, rows=rows, position=position,
                                      blocks=blocks, run=far, MASKED=False, C=C)  # fmt: skip
                state = _forward_walk(state, a=a, q=q, factor=factor, kv=kv, heads=heads, rows=rows, position=position,
                                      blocks=blocks, run=near, MASKED=True, C=C)  # fmt: skip
            else:
                run = whole_run(blocks.start, blocks.stop)
                state = _forward_walk(state, a=a, q=q, factor=factor, kv=kv, heads=heads, rows=rows, position=position,
                                      blocks=blocks, run=run, MASKED=True, C=C)  # fmt: skip
    acc, l, m, value_factor = state
    if C.segment == 0 or totals is None:
        acc = acc * output_share(l, value_factor, a, b, g, C)[:, None]
    row = ((split * a.B + b).to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
    columns = tl.arange(0, C.V)
    tl.store(out + row[:, None] * C.v_dim + columns[None, :], acc.to(out.dtype.element_ty),
             mask=valid[:, None] & (columns < C.v_dim)[None, :])  # fmt: skip
    stat = ((split * a.B + b).to(tl.int64) * (a.G * C.H) + g * C.H + h) * a.M + i
    if totals is not None:
        tl.store(lse + stat, m if C.natural or C.segment > 0 else m * LN2, mask=valid)
        tl.store(totals + stat, l, mask=valid)
    else:
        tl.store(lse + stat, row_lse(l, m, a, heads, C), mask=valid)
    if has_nan(acc):
        tl.debug_barrier()
        repair_forward(a, out, lse, totals, tile, h0, b, g, split, splits, C)


@triton.jit
def output_share(l, value_factor, a, b, g, C: tl.constexpr):
    """What a row's accumulator is to be multiplied by."""
    share = tl.where(l > 0, 1.0 / l, 0.0)
    # A NaN among the scores must reach the output.
    share = tl.where(l != l, l, share)
    if a.seed is not None:
        share *= a.keep_scale
    if C.value_run > 0:
        if C.segment == 0:
            share *= value_factor
    elif a.value_scale is not None:
        share *= tl.load(a.value_scale + b * a.value_scale_b + g * a.value_scale_g).to(tl.float32)
    return share


@triton.jit
def row_lse(l, m, a, heads, C: tl.constexpr):
    """lse in natural units of rows with a largest score m and a sum of weights l."""
    lse = natural_lse(m, l, C)
    if a.sinks is not None:
        # A row that sees nothing else: in log₂ its sink may have been clamped.
        sink = tl.load(a.sinks + heads.g * a.sinks_g + heads.h * a.sinks_h).to(tl.float32)
        lse = tl.where((l == 1) & (m == load_sink(a, heads, C)), sink, lse)
    return lse


@triton.jit
def merge_factors(m, other, C: tl.constexpr):
    """The larger of two largest scores, and the factors of the sums relative to either."""
    peak = tl.maximum(m, other)
    pivot = tl.where(peak == -INFINITY, 0.0, peak)
    return peak, exponential(m - pivot, C), exponential(other - pivot, C)


@triton.jit
def _kept_sums(kept, C: tl.constexpr):
    """Pointers [BM, V] to the sums of this program. They are one address and offsets that the compiler knows: addresses by
    output row would stay in registers through all walks."""
    at = tl.arange(0, C.BM)[:, None] * C.V + tl.arange(0, C.V)[None, :]
    return kept.pointer + kept.program.to(tl.int64) * (C.BM * C.V) + at


@triton.jit
def _sums_so_far(kept, again, C: tl.constexpr):
    """acc of the segments that are merged, 0 unless `again`."""
    # Another thread may have stored what this one reads.
    tl.debug_barrier()
    return tl.load(_kept_sums(kept, C), mask=(again & kept.valid)[:, None], other=0.0)


@triton.jit
def _merge_segment(kept, again, part_acc, part_l, part_m, part_factor, l, m, C: tl.constexpr):
    """acc, l and m of all segments: those so far, of which `kept` holds acc if `again`, and one more."""
    if C.value_run > 0:
        part_acc *= part_factor[:, None]
    m, keep, take = merge_factors(m, part_m, C)
    acc = part_acc * 0.0 if kept.pointer is None else _sums_so_far(kept, again, C)
    return tl.fma(part_acc, take[:, None], acc * keep[:, None]), tl.fma(part_l, take, l * keep), m


@triton.jit
def _no_keys(C: tl.constexpr):
    """acc, total, peak and value factor of a tile that has seen no key."""
    acc = tl.full([C.BM, C.V], 0.0, tl.float32)
    row = tl.full([C.BM], 0.0, tl.float32)
    return acc, row, row - INFINITY, row


@triton.jit
def _documents(state, a, q, factor, kv, heads, i, position, split, splits, kept, C: tl.constexpr):
    """The state after all keys of rows i, or with several splits those of one segment: document by document, segment by
    segment.

    A row's sums are those of its own document's blocks, in their order: blocks that it does not see leave them as they
    are. So their bits depend on nothing else that the tile or the call holds. Between two segments the sums so far wait
    in memory: in registers there is room for one accumulator.
    """
    _, l, m, value_factor = state
    if kept.pointer is None:
        # No row has keys in several segments.
        part_acc, part_l, part_m, part_factor = _no_keys(C)
    origin = load_origin(a, heads.b, i, C)
    document = tl.min(origin, 0)
    merged = document * 0
    while document < INT32_MAX:
        first = document * 0 + INT32_MAX
        last = document * 0
        for s in tl.static_range(max(C.S, 1)):
            rows = rows_of_document(load_range(a, s, heads.b, i, C), origin, document)
            first_s, _1, _2, last_s = key_bounds(a, rows.lo, rows.hi)
            first, last = tl.minimum(first, first_s), tl.maximum(last, last_s)
        # Ranges that are not those of a mask may begin before their document.
        anchor = tl.minimum(document, first)
        start = tl.maximum(tl.minimum(first, last) - anchor, 0) // C.segment
        stop = tl.cdiv(tl.maximum(last - anchor, 0), C.segment)
        if splits > 1:
            start, stop = tl.maximum(start, split), tl.minimum(stop, split + 1)
        for segment in tl.range(start, stop):
            if kept.pointer is not None:
                # Anew in each turn: an accumulator that is set to 0 between two loops makes wgmma wait for one another.
                part_acc, part_l, part_m, part_factor = _no_keys(C)
            for s in tl.static_range(max(C.S, 1)):
                rows = rows_of_document(load_range(a, s, heads.b, i, C), origin, document)
                blocks = blocks_from(a, rows, anchor + segment * C.segment, C.segment, C.BN)
                if (a.dense is None) and (a.slopes is None) and (a.table is None):
                    for turn in tl.range(0, 2):
                        masked, full = run_in_order(
                            turn, blocks.start, blocks.stop, blocks.full_start, blocks.full_stop
                        )
                        part = Softmax(part_acc, part_l, part_m, part_factor)
                        part = _forward_walk(part, a=a, q=q, factor=factor, kv=kv, heads=heads, rows=rows,
                                             position=position, blocks=blocks, run=masked, MASKED=True, C=C)  # fmt: skip
                        part = _forward_walk(part, a=a, q=q, factor=factor, kv=kv, heads=heads, rows=rows,
                                             position=position, blocks=blocks, run=full, MASKED=False, C=C)  # fmt: skip
                        part_acc, part_l, part_m, part_factor = part
                else:
                    # Terms by position round differently in blocks that are far from the diagonal of all rows.
                    part = Softmax(part_acc, part_l, part_m, part_factor)
                    part = _forward_walk(part, a=a, q=q, factor=factor, kv=kv, heads=heads, rows=rows, position=position,
                                         blocks=blocks, run=whole_run(blocks.start, blocks.stop), MASKED=True,
                                         C=C)  # fmt: skip
                    part_acc, part_l, part_m, part_factor = part
            if kept.pointer is not None:
                acc, l, m = _merge_segment(kept, merged > 0, part_acc, part_l, part_m, part_factor, l, m, C)
                tl.store(_kept_sums(kept, C), acc, mask=kept.valid[:, None])
                merged += 1
        document = tl.min(tl.where(origin > document, origin, INT32_MAX), 0)
    if kept.pointer is not None:
        acc = _sums_so_far(kept, merged > 0, C)
    else:
        acc, l, m = _merge_segment(kept, merged > 0, part_acc, part_l, part_m, part_factor, l, m, C)
    return Softmax(acc, l, m, value_factor)


@triton.jit
def _program_tile(a, program, heads_at_once, C: tl.constexpr):
    """Row tile, first head of the group, group and batch entry of a program."""
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
def _forward_walk(state, a, q, factor, kv, heads, rows, position, blocks, run, MASKED: tl.constexpr,
                  C: tl.constexpr):  # fmt: skip
    """The state of the online softmax after the blocks of `run`.

    factor: [BM], of products with a rescaled query; see `rescale_query`.
    """
    acc, l, m, value_factor = state
    heads_expanded = Heads(heads.b, heads.g, heads.h[:, None])
    expanded = expand_rows(rows)
    n = tl.arange(0, C.BN)
    slots = n  # [BN]
    if C.page > 0:
        j0 = blocks.begin + block_number(run, run.start) * C.BN
        slots = physical_slots(a, j0 + n, blocks.last, C)
    # Entries of a table must not be staged in shared memory. A third stage of values read by pointers would leave room for
    # one program on an H100 instead of two.
    stages: tl.constexpr = None if not MASKED else 1 if a.table is not None else 2 if C.segment > 0 else None
    for t in tl.range(run.start, run.stop, num_stages=stages):
        j0 = blocks.begin + block_number(run, t) * C.BN
        if C.segment == 0:
            j0 = tl.multiple_of(j0, 16)
        j = (j0 + n)[None, :]  # [1, BN]
        if C.descriptors:
            k = kv.key_tiles.load([heads.b, heads.g, j0, 0]).reshape(C.BN, C.K)
        else:
            k = load_keys(kv.key, a.k_n, slots, j0, blocks.last, MASKED, C.BN, C.K, C.k_dim, C.page)
        if q.dtype != tl.float8e4nv:
            k = convert_stored(k, q, C)
        s = tl.dot(q, tl.trans(k), input_precision=C.precision)  # [BM, BN]
        if C.key_run > 0:
            s *= key_scales(a, heads, slots, j0 + n, blocks.last, C)[None, :]
        unit = exponent_scale(a, MASKED, C)
        by_row: tl.constexpr = C.scaled and C.simple and (a.table is None or not MASKED)
        if by_row:
            unit *= factor
        elif C.scaled:
            s *= factor[:, None]
        s, _ = scale_and_cap(s, a, MASKED, C)
        shift = 0.0
        if not MASKED:
            tilt, shift = far_bias(a, position, t < run.x0, j0, rows.diagonal)
            if a.slopes is not None:
                s += (tilt[:, None] if C.pack > 1 else tilt) * n[None, :].to(tl.float32)
        slope = position.slope[:, None] if C.pack > 1 and a.slopes is not None else position.slope
        s = add_bias(s, a, heads_expanded, expanded, j, slope, MASKED, C)
        if MASKED:
            s = tl.where(visibility(a, heads_expanded, expanded, j, C), s, -INFINITY)
        peak = tl.maximum(m, tl.max(s, 1) * unit + shift)  # [BM]
        # The pivot stays finite for rows that have seen no key yet: −inf − −inf would be NaN.
        pivot = tl.where(peak == -INFINITY, 0.0, peak)
        if C.segment > 0:
            x = tl.fma(s, unit[:, None] if by_row else unit, -pivot[:, None])
        else:
            x = s * (unit[:, None] if by_row else unit) - (pivot - shift)[:, None]
        p = exponential(x, C)  # [BM, BN]
        shrink = exponential(m - pivot, C)
        l = l * shrink + sum_of_keys(p, a, C)
        if a.seed is not None:
            p = tl.where(dropout_mask(a, heads.b, heads.g * C.H + heads.h, rows.i, j0, C.BM, C.BN, C), p, 0.0)
        # A descriptor reads what lies behind the last key, which may be NaN: `repair_forward` rounds differently.
        if C.descriptors and (C.segment == 0 or not MASKED):
            v = kv.value_tiles.load([heads.b, heads.g, j0, 0]).reshape(C.BN, C.V)
        else:
            v = load_keys(kv.value, a.v_n, slots, j0, blocks.last, MASKED, C.BN, C.V, C.v_dim, C.page)
        if C.value_run > 0:
            # A weight times a scale may have any size: what is accumulated are shares of the largest product so far.
            p *= value_scales(a, heads, slots, j0 + n, blocks.last, C)[None, :]
            largest = tl.maximum(value_factor * shrink, tl.max(tl.abs(p), 1))
            # A power of two, so that a block without visible keys leaves the sums as they are.
            largest = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            part = 1.0 / tl.where(largest == 0, 1.0, largest)
            p *= part[:, None]
            shrink *= value_factor * part
            value_factor = largest
        if C.page > 0:
            # Read the next block's pages now: their latency would delay every load of keys.
            j0 = blocks.begin + block_number(run, t + 1) * C.BN
            slots = physical_slots(a, j0 + n, blocks.last, C)
        v = convert_stored(v, q, C)  # [BN, V]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=C.precision)
        m = peak
    return Softmax(acc, l, m, value_factor)


@triton.jit
def combine_kernel(parts, peaks, totals, out, lse, rows, splits, M, heads, V: tl.constexpr, v_dim: tl.constexpr,
                   SPLITS: tl.constexpr):  # fmt: skip
    """Merge of splits: parts [splits, B, M, heads, V] with peaks (natural) and totals [splits, B, heads, M], to out and
    lse without splits.

    Grid: (B · M · heads).
    """
    row = tl.program_id(0).to(tl.int64)
    stat = (row // heads // M * heads + row % heads) * M + row // heads % M
    n = tl.arange(0, SPLITS)
    x = tl.load(peaks + n.to(tl.int64) * rows + stat, mask=n < splits, other=-INFINITY)  # [SPLITS]
    total = tl.load(totals + n.to(tl.int64) * rows + stat, mask=n < splits, other=0.0)  # [SPLITS]
    peak = tl.max(x, 0)
    weight = tl.math.exp2((x - tl.where(peak == -INFINITY, 0.0, peak)) * LOG2E) * total
    total = tl.sum(weight, 0)
    columns = tl.arange(0, V)
    part = tl.load(parts + (n.to(tl.int64) * rows + row)[:, None] * v_dim + columns[None, :],
                   mask=(weight > 0)[:, None] & (columns < v_dim)[None, :], other=0.0)  # fmt: skip
    share = weight / tl.where(total == 0, 1.0, total)
    tl.store(
        out + row * v_dim + columns, tl.sum(part * share[:, None], 0).to(out.dtype.element_ty), mask=columns < v_dim
    )
    tl.store(lse + stat, tl.where(total == 0, -INFINITY, peak + tl.math.log2(total) * LN2))


@triton.jit
def merge_kernel(a, parts, peaks, totals, out, lse, splits, C: tl.constexpr):
    """Merge of segments as `_documents` merges them: parts [splits, B, M, G, H, V] with peaks and totals
    [splits, B, G, H, M], to out and lse without splits.

    Grid: (B · M · G · H).
    """
    row = tl.program_id(0).to(tl.int64)
    count = a.G * C.H
    head, i, b = row % count, row // count % a.M, row // count // a.M
    heads = Heads(b, head // C.H, head % C.H)
    stat = (b * count + head) * a.M + i
    size = (row * 0 + a.B) * a.M * count
    columns = tl.arange(0, C.V)
    acc = tl.full([C.V], 0.0, tl.float32)
    l = tl.sum(acc, 0)
    m = l - INFINITY
    for n in tl.range(0, splits):
        at = n * size
        part = tl.load(parts + (at + row) * C.v_dim + columns, mask=columns < C.v_dim, other=0.0)
        total = tl.load(totals + at + stat)
        m, keep, take = merge_factors(m, tl.load(peaks + at + stat), C)
        acc = tl.fma(part, take, acc * keep)
        l = tl.fma(total, take, l * keep)
    acc *= output_share(l, l, a, b, heads.g, C)
    tl.store(out + row * C.v_dim + columns, acc.to(out.dtype.element_ty), mask=columns < C.v_dim)
    tl.store(lse + stat, row_lse(l, m, a, heads, C))
