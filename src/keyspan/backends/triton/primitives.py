"""Device functions that all Triton kernels share: key ranges, loads, bias terms, dropout, softmax weights.

Scores are in log₂, p = 2^(s − lse), so that the scale and the exponential's log₂e are one factor. With a dense bias they
are in natural units (`Constants.natural`): −3.4 · 10³⁸, a common value for hidden keys, overflows in log₂.

Vectors over query rows and over keys are passed expanded ([BM, 1] and [1, BN]; [1, BM] and [BN, 1] where a kernel works
on transposed tiles), so that one function serves both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Arguments(NamedTuple):
    """The problem as kernels see it: pointers (or None), each followed by its element strides, named by dimension."""

    q: Any
    q_b: int
    q_m: int
    q_g: int
    q_h: int
    k: Any
    k_b: int
    k_n: int
    k_g: int
    v: Any
    v_b: int
    v_n: int
    v_g: int
    lo: Any
    lo_s: int
    lo_b: int
    lo_m: int
    hi: Any
    hi_s: int
    hi_b: int
    hi_m: int
    diagonal: Any
    diagonal_s: int
    diagonal_b: int
    diagonal_m: int
    origin: Any
    origin_b: int
    origin_m: int
    sequence: Any
    block_table: Any
    dense: Any
    dense_b: int
    dense_g: int
    dense_h: int
    dense_m: int
    dense_n: int
    bias: Any
    bias_b: int
    bias_g: int
    bias_h: int
    bias_m: int
    bias_n: int
    slopes: Any
    slopes_b: int
    slopes_g: int
    slopes_h: int
    table: Any
    table_g: int
    table_h: int
    reach: int
    sinks: Any
    sinks_g: int
    sinks_h: int
    seed: Any
    B: int
    M: int
    N: int
    """Keys in the row that ranges count in; paged sequences are laid end to end in one row."""
    G: int
    period: int
    """Keys per sequence where sequences are laid end to end: columns of dense terms and dropout repeat after it. Else N."""
    pages: int
    """Pages in memory; 0 where keys are not paged."""
    score_scale: float
    """The scale in the unit of scores, or scale / softcap where there is a softcap."""
    scale: float
    cap: float
    """The softcap in the unit of scores."""
    keep_scale: float
    """1 / (1 − p)."""
    threshold: int
    """Dropout keeps a weight whose 32 random bits, read as a signed number, are at least this."""
    query_scale: Any
    query_scale_b: Any
    query_scale_c: Any
    query_scale_g: Any
    query_scale_h: Any
    key_scale: Any
    key_scale_b: Any
    key_scale_c: Any
    key_scale_g: Any
    value_scale: Any
    value_scale_b: Any
    value_scale_c: Any
    value_scale_g: Any


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    BM: int
    """Rows of a tile: query rows × heads packed."""
    BN: int
    K: int
    """Head dimensions padded to a power of two, then as they are."""
    V: int
    k_dim: int
    v_dim: int
    H: int
    S: int
    """Ranges per row; 0 where every key is visible."""
    pack: int
    """Heads of a group that share a tile as rows."""
    page: int
    """Keys per page; 0 where keys are not paged."""
    natural: bool
    """Scores are in natural units, and statistics have what rounding took from each lse, see `RowStats`."""
    simple: bool
    """Scores are score_scale · q·k with score_scale > 0, plus at most a table's entry: in far tiles the scale folds into the
    exponential."""
    softcap: bool
    periodic: bool
    """Sequences are laid end to end, see `Arguments.period`."""
    wide: bool
    """Offsets of a dense term's columns need 64 bits."""
    descriptors: bool
    """Tiles are read by TMA."""
    precision: str
    """Of products of fp32 tiles: ieee, tf32x3 or tf32; `tl.dot`'s `input_precision`."""
    assembly: str
    """Inline PTX for conversions from 8 bits: none, pure or effectful, see `convert_stored`."""
    scaled: bool
    """Each query row is rescaled and has a factor of its own, see `rescale_query`."""
    query_run: int
    """Query rows that share an entry of the scale; 0 where all of a batch entry and head do."""
    key_run: int
    value_run: int


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INT32_MAX = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(float("inf"))
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
FRACTION_FREE = tl.constexpr(2.0**24)
"""From here on fp32 has no fractions."""
STATS_PADDING = tl.constexpr(128)
"""The statistics of a head are padded to a multiple of this many rows; the rows of every tile divide it."""
# Triton 3.9 warns where `reshape` is told that the order does not matter, and 3.10 rejects the argument.
MAY_REORDER = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


# Kernels build the tuples below from their arguments, so that the functions they call take a handful of arguments.
# A function compiled by Triton takes a tuple with None in it but cannot return one.


class Heads(NamedTuple):
    """The heads that a tile belongs to."""

    b: Any
    """Batch entry, a scalar."""
    g: Any
    """Group, a scalar."""
    h: Any
    """Head within the group: a scalar, or one per row where heads are packed into a tile."""


class Rows(NamedTuple):
    """Query rows in one of their ranges of keys; all fields are [BM], or expanded over keys."""

    i: Any
    lo: Any
    hi: Any
    diagonal: Any


class KeyValue(NamedTuple):
    """Keys and values of a batch entry and group."""

    key: Any
    """Pointer to key 0."""
    value: Any
    key_tiles: Any
    """TMA descriptors of all keys and of all values, or None."""
    value_tiles: Any


class PositionBias(NamedTuple):
    """Terms of a head that depend on the position alone, in log₂; 0 where there are none."""

    slope: Any
    """ALiBi's slope."""
    first: Any
    """First and last entry of the relative table."""
    last: Any


class KeyBlocks(NamedTuple):
    """Blocks of BN keys that a tile of rows visits, numbered from the key `begin` on."""

    begin: Any
    last: Any
    """One past the last key that some row sees."""
    start: Any
    """Blocks start … stop − 1 are visited; every row sees all keys of blocks full_start … full_stop − 1."""
    stop: Any
    full_start: Any
    full_stop: Any


class RowStats(NamedTuple):
    """What backward knows of query rows, each [BM]."""

    lse: Any
    """In the unit of scores; +inf for rows without keys."""
    lost: Any
    """log₂ of the sum of the weights exp(s − lse), 0 unless `Constants.natural`.

    fp32 holds no fraction of an lse of −10⁹, say of a row that a bias hides wholly: log Σ is lost in
    lse = peak + log Σ, and the weights sum to N. So weights are 2^((s − lse) · log₂e − lost).
    """
    delta: Any


class BlockRun(NamedTuple):
    """Block numbers start … stop − 1, counted as if two gaps (x0 … x1 − 1 and y0 … y1 − 1, x1 ≤ y0) did not exist."""

    start: Any
    stop: Any
    x0: Any
    x1: Any
    y0: Any
    y1: Any


class OutputGradient(NamedTuple):
    """Gradient of the output [B, M, G, H, V]: pointer and element strides; rows are contiguous."""

    pointer: Any
    b: Any
    m: Any
    g: Any
    h: Any


class Scales(NamedTuple):
    """Scales of keys or of values [B, C, G]: pointer and element strides."""

    pointer: Any
    b: Any
    c: Any
    g: Any


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
def block_number(run, t):
    """The block that the number t, counted without the gaps, stands for."""
    t += tl.where(t >= run.x0, run.x1 - run.x0, 0)
    return t + tl.where(t >= run.y0, run.y1 - run.y0, 0)


@triton.jit
def head_pointer(x, x_b, x_g, x_h, heads):
    """First row of a head; 64-bit offsets, since heads may be far apart."""
    return x + heads.b.to(tl.int64) * x_b + heads.g.to(tl.int64) * x_g + heads.h.to(tl.int64) * x_h


@triton.jit
def query_pointer(a, heads, i):
    """Query row i of a head; i and the head are scalars or [BM]."""
    return head_pointer(a.q, a.q_b, a.q_g, a.q_h, heads) + i.to(tl.int64) * a.q_m


@triton.jit
def gradient_pointer(grad, heads, i):
    """Row i of the output's gradient; i and the head are scalars or [BM]."""
    return head_pointer(grad.pointer, grad.b, grad.g, grad.h, heads) + i.to(tl.int64) * grad.m


@triton.jit
def key_pointer(a, b, g):
    """Key 0 of a batch entry and group."""
    return a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g


@triton.jit
def value_pointer(a, b, g):
    """Value 0 of a batch entry and group."""
    return a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g


@triton.jit
def load_tile(base, rows, stride, limit, MASKED: tl.constexpr, D: tl.constexpr, dim: tl.constexpr):
    """[rows, D] from rows of `dim` contiguous elements; 0 beyond `dim` and, where masked, from row `limit` on."""
    columns = tl.arange(0, D)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if MASKED and dim < D:
        x = tl.load(pointers, mask=(rows < limit)[:, None] & (columns < dim)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
    elif dim < D:
        x = tl.load(pointers, mask=(columns < dim)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def physical_slots(a, j, last, C: tl.constexpr):
    """Slots in memory of the logical keys j [BN], int64, read from the block table.

    A block of keys may begin or end outside every sequence, where the table holds anything: pages are clamped.
    """
    page = tl.load(a.block_table + j // C.page, mask=j < last, other=0)
    page = tl.minimum(tl.maximum(page, 0), a.pages - 1)
    return page.to(tl.int64) * C.page + j % C.page


@triton.jit
def load_keys(x, stride, slots, j0, last, MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, dim: tl.constexpr,
              page: tl.constexpr):  # fmt: skip
    """Keys or values j0 … j0 + BN − 1 as [BN, D]; x points at key 0 of the batch entry and group."""
    n = tl.arange(0, BN)
    if page > 0:
        columns = tl.arange(0, D)
        pointers = x + slots[:, None] * stride + columns[None, :]
        if dim < D:
            tile = tl.load(pointers, mask=(j0 + n < last)[:, None] & (columns < dim)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(j0 + n < last)[:, None], other=0.0)
    else:
        tile = load_tile(x + j0.to(tl.int64) * stride, n, stride, last - j0, MASKED, D, dim)
    return tile


@triton.jit
def query_factor(a, heads, i, C: tl.constexpr):
    """The factor of a row's products with stored keys [BM]: the query's scale times the keys' if they share one."""
    factor = tl.full([i.shape[0]], 1.0, tl.float32)
    if a.query_scale is not None:
        at = a.query_scale + heads.b * a.query_scale_b + heads.g * a.query_scale_g + heads.h * a.query_scale_h
        if C.query_run > 0:
            at += i // C.query_run * a.query_scale_c
        factor = tl.load(at).to(tl.float32)
    if a.key_scale is not None and C.key_run == 0:
        factor *= tl.load(a.key_scale + heads.b * a.key_scale_b + heads.g * a.key_scale_g).to(tl.float32)
    return factor


@triton.jit
def rescale_query(q, a, heads, i, C: tl.constexpr):
    """The query [BM, K] as the product with stored keys takes it, and the factor [BM] left to multiply products by.

    The factor is positive, since a row's maximum is taken before it is applied; its sign moves to the query.
    """
    factor = query_factor(a, heads, i, C)
    sign = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, factor))
    wide = q.to(tl.float32) * sign[:, None]
    factor = tl.where(factor == 0, 1.0, tl.abs(factor))
    if q.dtype == tl.bfloat16:
        # fp16 has the bits but not the range: rows are divided by the power of two below their largest element.
        size = (tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        size = tl.where(size == 0, 1.0, size)
        wide = (wide / size[:, None]).to(tl.float16)
        factor *= size
    elif q.dtype == tl.float8e4nv and C.BM < 64:
        # Not every GPU multiplies so few rows in 8 bits.
        wide = wide.to(tl.float16)
    else:
        wide = wide.to(q.dtype)
    return wide, factor


@triton.jit
def load_scales(x, b, g, slots, j, last, run: tl.constexpr, C: tl.constexpr):
    """Scales of keys or values j [BN], 0 from `last` on; `run` keys share one (0: all of them do)."""
    where = (slots if C.page > 0 else j).to(tl.uint64)
    at = x.pointer + b * x.b + g * x.g + (where // run * x.c if run > 0 else where * 0)
    return tl.load(at, mask=j < last, other=0.0).to(tl.float32)


@triton.jit
def key_scales(a, heads, slots, j, last, C: tl.constexpr):
    x = Scales(a.key_scale, a.key_scale_b, a.key_scale_c, a.key_scale_g)
    return load_scales(x, heads.b, heads.g, slots, j, last, C.key_run, C)


@triton.jit
def value_scales(a, heads, slots, j, last, C: tl.constexpr):
    x = Scales(a.value_scale, a.value_scale_b, a.value_scale_c, a.value_scale_g)
    return load_scales(x, heads.b, heads.g, slots, j, last, C.value_run, C)


@triton.jit
def convert_stored(x, q, C: tl.constexpr):
    """Keys or values as the product takes them: 8 bits become fp16, which is exact, or fp32 if the query is fp32.

    Assembly that is marked as having effects is not moved behind the change of layout that follows, where each byte
    would be loaded alone.
    """
    pure: tl.constexpr = C.assembly == "pure"
    if x.dtype.primitive_bitwidth > 8:
        wide = x
    elif q.dtype == tl.float32:
        wide = x.to(tl.float32)
    elif C.assembly == "none":
        wide = x.to(tl.float16)
    elif x.dtype == tl.int8:
        # The last byte of 1024 + 128 + x in fp16 is x with its top bit flipped.
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b32 x, c;
            xor.b32 x, $2, 0x80808080;
            mov.b32 c, 0xE480E480;
            prmt.b32 $0, x, 0x64646464, 0x4140;
            prmt.b32 $1, x, 0x64646464, 0x4342;
            add.rn.f16x2 $0, $0, c;
            add.rn.f16x2 $1, $1, c;
            }""", "=r,=r,r", [x], dtype=tl.float16, is_pure=pure, pack=4)  # fmt: skip
    else:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""", "=r,=r,r", [x], dtype=tl.float16, is_pure=pure, pack=4)  # fmt: skip
    return wide


@triton.jit
def dense_column(a, j, C: tl.constexpr):
    """Column of a dense term for keys j."""
    column = j % a.period if C.periodic else j
    return column.to(tl.int64) if C.wide else column


@triton.jit
def visibility(a, heads, rows, j, C: tl.constexpr):
    """Which keys j the rows see; heads and rows are expanded over keys, j over rows."""
    visible = in_range(a, rows, j, C)
    if a.dense is not None:
        column = dense_column(a, j, C)
        row = a.dense + heads.b.to(tl.int64) * a.dense_b + heads.g.to(tl.int64) * a.dense_g
        row += heads.h.to(tl.int64) * a.dense_h + rows.i.to(tl.int64) * a.dense_m
        visible &= tl.load(row + column * a.dense_n, mask=visible, other=0) != 0
    return visible


@triton.jit
def exponent_scale(a, MASKED: tl.constexpr, C: tl.constexpr):
    """The factor still missing from scores: the scale where it folds into the exponential, else 1."""
    return a.score_scale if C.simple and (a.table is None or not MASKED) else 1.0


@triton.jit
def scale_and_cap(s, a, MASKED: tl.constexpr, C: tl.constexpr):
    """Products q·k to scores (without `exponent_scale`), and tanh of the softcap (0 without one)."""
    tanh = 0.0
    if C.softcap:
        x = s * a.score_scale
        square = x * x
        # tanh near 0 by its series: the difference below has an absolute error of one rounding of 1.
        near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        far = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
        tanh = tl.where(square < 0.09, near, far)
        s = tanh * a.cap
    elif (not C.simple) or (MASKED and a.table is not None):
        s = s * a.score_scale
    return s, tanh


@triton.jit
def load_term(pointer, C: tl.constexpr):
    """Terms of a score, as they are stored, in the unit of scores; finite ones stay finite."""
    x = tl.load(pointer).to(tl.float32)
    if not C.natural:
        scaled = x * LOG2E
        x = tl.where(tl.abs(x) < INFINITY, tl.minimum(tl.maximum(scaled, -FLOAT32_MAX), FLOAT32_MAX), x)
    return x


@triton.jit
def load_slope(a, heads, C: tl.constexpr):
    """ALiBi's slope in the unit of scores; 0 without ALiBi."""
    if a.slopes is not None:
        at = a.slopes + heads.b * a.slopes_b + heads.g * a.slopes_g + heads.h * a.slopes_h
        slope = load_term(at, C)
    else:
        slope = 0.0
    return slope


@triton.jit
def load_position_bias(a, heads, C: tl.constexpr):
    """Slope, and the two ends of the relative table, of each head."""
    slope = load_slope(a, heads, C)
    first = 0.0
    last = 0.0
    if a.table is not None:
        table = a.table + heads.g * a.table_g + heads.h * a.table_h
        first = load_term(table, C)
        last = load_term(table + 2 * a.reach, C)
    return PositionBias(slope, first, last)


@triton.jit
def load_sink(a, heads, C: tl.constexpr):
    """Learned sinks in the unit of scores."""
    return load_term(a.sinks + heads.g * a.sinks_g + heads.h * a.sinks_h, C)


@triton.jit
def far_bias(a, position, is_left, j0, diagonal):
    """Position bias of a far tile for key j0 + n: tilt · n plus, per row, shift.

    In a far tile a distance is a difference and one table entry serves all keys: a load or a conversion per score
    would cost more than everything else.
    """
    tilt = 0.0
    shift = 0.0
    if a.slopes is not None:
        tilt = tl.where(is_left, position.slope, -position.slope)
        shift = tilt * (j0 - diagonal).to(tl.float32)
    if a.table is not None:
        shift += tl.where(is_left, position.first, position.last)
    return tilt, shift


@triton.jit
def add_bias(s, a, heads, rows, j, slope, MASKED: tl.constexpr, C: tl.constexpr):
    """Scores plus all bias terms; keys outside lo … hi − 1 get any value.

    Tiles that are not masked are far ones: `far_bias` has what depends on position.
    """
    if MASKED and a.slopes is not None:
        s -= slope * tl.abs(j - rows.diagonal).to(tl.float32)
    if MASKED and a.table is not None:
        entry = tl.minimum(tl.maximum(j - rows.diagonal, -a.reach), a.reach) + a.reach
        s += load_term(a.table + heads.g * a.table_g + heads.h * a.table_h + entry, C)
    if a.bias is not None:
        column = dense_column(a, j, C)
        row = a.bias + heads.b.to(tl.int64) * a.bias_b + heads.g.to(tl.int64) * a.bias_g
        row += heads.h.to(tl.int64) * a.bias_h + rows.i.to(tl.int64) * a.bias_m
        if MASKED:
            s += tl.load(row + column * a.bias_n, mask=in_range(a, rows, j, C), other=0.0).to(tl.float32)
        else:
            s += tl.load(row + column * a.bias_n).to(tl.float32)
    return s


@triton.jit
def exponential(x, C: tl.constexpr):
    """e to a difference of natural scores, or 2 to one of scores in log₂."""
    return tl.math.exp2(x * LOG2E if C.natural else x)


@triton.jit
def natural_lse(peak, total, C: tl.constexpr):
    """lse in natural units from the largest score and the sum of weights relative to it; −inf without weights."""
    lse = peak + tl.math.log2(total) * LN2 if C.natural else (peak + tl.math.log2(total)) * LN2
    return tl.where(total == 0, -INFINITY, lse)


@triton.jit
def dropout_mask(a, b, head, i, j0, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr):
    """Where dropout keeps a weight, bool [BM, BN]: Philox 4x32-10 as in core/dropout.py. `head`, `i`: [BM]."""
    seed = tl.load(a.seed)
    batch = i * 0 + b
    if C.periodic:
        # Sequences may begin anywhere, so each key computes its own four words.
        j = (j0 + tl.arange(0, BN)) % a.period
        zero = i[:, None] * 0
        w0, w1, w2, w3 = tl.philox(seed, (j >> 2)[None, :] + zero, i[:, None] + j[None, :] * 0,
                                   head[:, None] + j[None, :] * 0, batch[:, None] + j[None, :] * 0, 10)  # fmt: skip
        word = (j & 3)[None, :]
        bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    else:
        # j0 is a multiple of 4: the four words of a counter belong to four neighbours.
        block = ((j0 >> 2) + tl.arange(0, BN // 4))[None, :]
        w0, w1, w2, w3 = tl.philox(seed, block + i[:, None] * 0, i[:, None] + block * 0, head[:, None] + block * 0,
                                   batch[:, None] + block * 0, 10)  # fmt: skip
        bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BN))
    # Unsigned order equals signed order with the top bit flipped.
    return (bits.to(tl.int32, bitcast=True) ^ -(2**31)) >= a.threshold


@triton.jit
def softmax_weights(s, a, heads, rows, j, slope, tilt, lse, lost, MASKED: tl.constexpr, C: tl.constexpr):
    """Softmax weights from products q·k and `RowStats`, and the softcap's tanh.

    Heads, rows, lse and lost are expanded over keys; j over rows. In far tiles `lse` has the shift of `far_bias` taken
    off, and `tilt` is expanded over keys.
    """
    s, tanh = scale_and_cap(s, a, MASKED, C)
    if (not MASKED) and a.slopes is not None:
        s += tilt
    s = add_bias(s, a, heads, rows, j, slope, MASKED, C)
    if C.natural:
        # At most lse, up to rounding, which is large where lse is: a score is 64 off at 10⁹.
        s = tl.minimum(s * exponent_scale(a, MASKED, C) - lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = tl.math.exp2(s * LOG2E - lost)
    else:
        p = tl.math.exp2(s * exponent_scale(a, MASKED, C) - lse)
    if MASKED:
        p = tl.where(visibility(a, heads, rows, j, C), p, 0.0)
    return p, tanh


@triton.jit
def score_gradient(p, dp, delta):
    """Gradient of the biased score (natural units) from that of the weight; 0 where hidden even if dp is NaN."""
    return tl.where(p == 0, 0.0, p * (dp - delta))


@triton.jit
def softcap_gradient(ds, tanh, C: tl.constexpr):
    """Gradient of the scaled product from that of the capped score; 0 where that is 0: tanh of a hidden score may be
    NaN."""
    if C.softcap:
        ds = tl.where(ds == 0, 0.0, ds * (1.0 - tanh * tanh))
    return ds


@triton.jit
def stats_pointer(a, stats, heads, C: tl.constexpr):
    """Pointer to a head's lse in stats [B, G, H, 3 or 2, padded M], and the distance from it to the head's delta, and from
    that to what its lse lost, which is there with natural scores.

    Heads begin aligned and no tile ends outside of its head, so that many rows are read at once, without a mask.
    """
    rows = tl.cdiv(a.M, STATS_PADDING) * STATS_PADDING
    return stats + ((heads.b * a.G + heads.g) * C.H + heads.h).to(tl.int64) * ((3 if C.natural else 2) * rows), rows


@triton.jit
def load_stats(a, stats, heads, i, C: tl.constexpr):
    """Statistics of rows i."""
    at, rows = stats_pointer(a, stats, heads, C)
    lost = i.to(tl.float32) * 0.0
    if C.natural:
        lost = tl.load(at + 2 * rows + i)
    return RowStats(tl.load(at + i), lost, tl.load(at + rows + i))


@triton.jit
def load_lse(lse, at, C: tl.constexpr):
    """lse in the unit of scores; +inf, so that all weights are 0, for empty rows.

    In log₂ also for an lse so large that its rounding alone would change a weight by up to 2¹²⁸.
    """
    x = tl.load(lse + at)
    if C.natural:
        x = tl.where(x == -INFINITY, INFINITY, x)
    else:
        x *= LOG2E
        x = tl.where(tl.abs(x) > FRACTION_FREE, INFINITY, x)
    return x


@triton.jit
def lost_in_lse(lse, total):
    """log₂ of rows' sums of weights, where rounding lse explains it.

    A larger difference is that of an lse which was merged with that of other keys, and which is right as it is.
    """
    lost = tl.math.log2(tl.where(total > 0, total, 1.0))
    return tl.where(tl.abs(lost) * LN2 <= 2.0**-22 * tl.abs(lse), lost, 0.0)


@triton.jit
def table_end_sums(a, x, distance):
    """Row sums of x (weights or gradients of scores) over keys of the table's first entry, and over those of its last."""
    below = distance <= -a.reach
    low = tl.sum(tl.where(below, x, 0.0), 1)
    return low, tl.sum(tl.where((distance >= a.reach) & ~below, x, 0.0), 1)
