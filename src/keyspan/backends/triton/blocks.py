"""Device functions that all Triton kernels share: which keys rows see, and the blocks of keys that a tile visits."""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import INT32_MAX, BlockRun, KeyBlocks, Rows


@triton.jit
def query_rows(a, start, h0, BM: tl.constexpr, C: tl.constexpr):
    """Query row, head of the group and validity of tile rows start … start + BM − 1, each [BM].

    A tile row is one head of one query row. Tile rows beyond the end repeat the last one and are not valid.
    """
    r = start + tl.arange(0, BM)
    i = r // C.pack
    h = h0 + r % C.pack
    valid = (i < a.M) & (h < C.H)
    return tl.minimum(i, a.M - 1), tl.minimum(h, C.H - 1), valid


@triton.jit
def load_range(a, s: tl.constexpr, b, i, C: tl.constexpr, valid=None):
    """Range s of query rows i [BM]; rows that are not valid, where that is given, have an empty range."""
    if C.S == 0:
        lo = i * 0
        hi = lo + a.N
        if valid is not None:
            hi = tl.where(valid, hi, lo)
        diagonal = i
    else:
        none = None if valid is None else 0
        lo = tl.load(a.lo + s * a.lo_s + b * a.lo_b + i * a.lo_m, mask=valid, other=none)
        hi = tl.load(a.hi + s * a.hi_s + b * a.hi_b + i * a.hi_m, mask=valid, other=none)
        at = a.diagonal + s * a.diagonal_s + b * a.diagonal_b + i * a.diagonal_m
        diagonal = tl.load(at, mask=valid, other=none)
    # Ranges may be written to after they were checked: no range, whatever it holds, makes a kernel access memory outside
    # its tensors. A `lo` below 0 hides nothing, and `key_bounds` begins tiles at 0.
    if C.page > 0:
        # Paged sequences count as one row of keys: their logical keys laid end to end.
        sequence = tl.load(a.sequence + i)
        base = tl.maximum(tl.minimum(sequence, a.N // tl.maximum(a.period, 1) - 1), 0) * a.period
        lo = base + tl.maximum(lo, 0)
        hi = tl.minimum(base + tl.minimum(hi, a.period), a.N)
        diagonal += base
    elif C.S > 0:
        hi = tl.minimum(hi, a.N)
    return Rows(i, lo, hi, diagonal)


@triton.jit
def load_origin(a, b, i, C: tl.constexpr):
    """The first key of the document of rows i [BM], as `load_range` counts keys."""
    if C.page > 0:
        sequence = tl.load(a.sequence + i)
        origin = tl.maximum(tl.minimum(sequence, a.N // tl.maximum(a.period, 1) - 1), 0) * a.period
    elif a.origin is not None:
        origin = tl.minimum(tl.maximum(tl.load(a.origin + b * a.origin_b + i * a.origin_m), 0), a.N)
    else:
        origin = i * 0
    return origin


@triton.jit
def rows_of_document(rows, origin, document):
    """The rows with empty ranges where they are of another document."""
    return Rows(rows.i, rows.lo, tl.where(origin == document, rows.hi, rows.lo), rows.diagonal)


@triton.jit
def expand_rows(rows):
    """Rows [BM] as [BM, 1], to meet keys [1, BN]."""
    return Rows(rows.i[:, None], rows.lo[:, None], rows.hi[:, None], rows.diagonal[:, None])


@triton.jit
def in_range(a, rows, j, C: tl.constexpr):
    """Whether keys j are in the rows' range; rows are expanded over keys, j over rows."""
    if C.S > 0 and C.page == 0 and (a.bias is not None or a.dense is not None):
        # Dense terms are read where this holds.
        j = tl.where(j < a.N, j, INT32_MAX)
    return (j >= rows.lo) & (j < rows.hi)


@triton.jit
def key_bounds(a, lo, hi):
    """first, full_first, full_last, last: some row sees keys first … last − 1, every row full_first … full_last − 1."""
    seen = lo < hi
    first = tl.maximum(tl.min(tl.where(seen, lo, INT32_MAX), 0), 0)
    full_first = tl.max(tl.where(seen, lo, INT32_MAX), 0)
    full_last = tl.min(tl.where(seen, hi, 0), 0)
    last = tl.max(tl.where(seen, hi, 0), 0)
    return first, full_first, full_last, last


@triton.jit
def key_blocks(a, rows, split, splits, BN: tl.constexpr):
    """The blocks of keys that rows visit; with several splits each gets an equal run of the blocks."""
    first, full_first, full_last, last = key_bounds(a, rows.lo, rows.hi)
    # Blocks begin at a multiple of 16, so that loads of dense terms and TMA are aligned.
    begin = tl.minimum(first, last) // 16 * 16
    count = tl.cdiv(last - begin, BN)
    share = tl.cdiv(count, splits)
    start = tl.minimum(split * share, count)
    stop = tl.minimum(start + share, count)
    full_start = tl.cdiv(tl.minimum(full_first, last) - begin, BN)
    full_stop = (tl.maximum(full_last, begin) - begin) // BN
    full_start = tl.minimum(tl.maximum(full_start, start), stop)
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_start)
    return KeyBlocks(begin, last, start, stop, full_start, full_stop)


@triton.jit
def blocks_from(a, rows, begin, limit: tl.constexpr, BN: tl.constexpr):
    """The blocks of keys that rows visit, counted from key `begin` on, as far as `limit` keys from it."""
    first, full_first, full_last, last = key_bounds(a, rows.lo, rows.hi)
    start = tl.minimum(tl.maximum(first - begin, 0), limit) // BN
    stop = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(last - begin, 0), limit), BN), start)
    full_start = tl.cdiv(tl.minimum(tl.maximum(tl.minimum(full_first, last) - begin, 0), limit), BN)
    full_stop = tl.minimum(tl.maximum(full_last - begin, 0), limit) // BN
    full_start = tl.minimum(tl.maximum(full_start, start), stop)
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_start)
    return KeyBlocks(begin, last, start, stop, full_start, full_stop)


@triton.jit
def far_blocks(a, blocks, rows, BN: tl.constexpr):
    """left, right: of the full blocks, those before `left` and those from `right` on are far ones: beyond the table's
    reach, or to one side of the diagonal, for every row. Without terms that depend on position all full blocks are far.
    """
    left = blocks.full_stop
    right = blocks.full_stop
    if (a.slopes is not None) or (a.table is not None):
        lowest, highest = diagonal_span(rows)
        left = (lowest - a.reach + 1 - blocks.begin) // BN
        left = tl.minimum(tl.maximum(left, blocks.full_start), blocks.full_stop)
        right = tl.minimum(tl.maximum(tl.cdiv(highest + a.reach - blocks.begin, BN), left), blocks.full_stop)
    return left, right


@triton.jit
def diagonal_span(rows):
    """The lowest and the highest diagonal of the rows that see a key."""
    seen = rows.lo < rows.hi
    lowest = tl.min(tl.where(seen, rows.diagonal, INT32_MAX), 0)
    return lowest, tl.max(tl.where(seen, rows.diagonal, -INT32_MAX), 0)


@triton.jit
def far_run(full_start, full_stop, left, right):
    """The far blocks: those before `left`, and those from `right` on."""
    return BlockRun(full_start, full_start + (left - full_start + full_stop - right), left, right, full_stop, full_stop)


@triton.jit
def near_run(start, stop, full_start, full_stop, left, right):
    """The blocks of start … stop − 1 that are not far."""
    return BlockRun(start, stop - (left - full_start + full_stop - right), full_start, left, right, full_stop)


@triton.jit
def whole_run(start, stop):
    """All of blocks start … stop − 1."""
    return BlockRun(start, stop, stop, stop, stop, stop)


@triton.jit
def run_in_order(turn, start, stop, full_start, full_stop):
    """Runs that visit blocks start … stop − 1 in order, in two turns of a walk with a mask and then one without: those
    before the full ones, these, and those behind them."""
    first = turn == 0
    masked = whole_run(tl.where(first, start, full_stop), tl.where(first, full_start, stop))
    return masked, whole_run(tl.where(first, full_start, full_stop), full_stop)


@triton.jit
def block_number(run, t):
    """The block that the number t, counted without the gaps, stands for."""
    t += tl.where(t >= run.x0, run.x1 - run.x0, 0)
    return t + tl.where(t >= run.y0, run.y1 - run.y0, 0)
