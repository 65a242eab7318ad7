"""What all Triton kernels share: key ranges, loads, bias terms, dropout, the online softmax. Knows no grid and no launch.

Scores are in units of log₂ throughout: p = 2^(s − lse₂). Vectors over query rows and over keys come expanded
(`[m, 1]` and `[1, n]`, or the other way round where a kernel works on transposed tiles), so one line serves both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Arguments(NamedTuple):
    """The problem as kernels see it: pointers (or None), then element strides named by tensor and dimension."""

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
    """Keys in the row that ranges count in."""
    G: int
    period: int
    """Where keys are paged or laid end to end: keys per sequence, after which dense columns and dropout repeat."""
    pages: int
    """Pages in memory; 0 where keys are not paged."""
    scale2: float
    """scale · log₂e, or scale / softcap where there is a softcap."""
    scale: float
    cap2: float
    """softcap · log₂e."""
    keep_scale: float
    """1 / (1 − p)."""
    threshold: int
    """A weight is kept where its 32 random bits, as a signed number, are at least this."""
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
    simple: bool
    """Scores are scale2 · q·k with scale2 > 0, and a table's term, so that the scale folds into the exponential of a
    far tile."""
    softcap: bool
    periodic: bool
    wide: bool
    """Offsets of a dense term's columns need 64 bits."""
    descriptors: bool
    """Tiles of a plain layout come by TMA."""
    precision: str
    """Of products of fp32 tiles: ieee, tf32x3 or tf32."""
    assembly: str
    """Of conversions from 8 bits, NVIDIA's: none, pure or effectful, see `widened`."""
    scaled: bool
    """Rows of the query are brought into a form with a factor of its own each, see `scaled_query`."""
    query_run: int
    """Rows that share an entry of the query's scale; 0 where all of a batch entry and head do."""
    key_run: int
    value_run: int


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(2.0**24)
"""Beyond it fp32 has no fractions."""
STATS = tl.constexpr(128)
"""To a multiple of this rows of a head's statistics are padded; every tile's rows divide it."""
# Triton 3.9 warns where `reshape` is told that the order does not matter, and 3.10 will not be told.
MAY_REORDER = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.jit
def rows_of(a, start, h0, BM: tl.constexpr, C: tl.constexpr):
    """Query rows, heads of the group and validity of rows start … start + BM − 1, each of which is one head of a query
    row; those beyond the end repeat the last."""
    r = start + tl.arange(0, BM)
    i = r // C.pack
    h = h0 + r % C.pack
    valid = (i < a.M) & (h < C.H)
    return tl.minimum(i, a.M - 1), tl.minimum(h, C.H - 1), valid


@triton.jit
def range_of(a, s: tl.constexpr, b, i, C: tl.constexpr, valid=None):
    """lo, hi and diagonal of rows i in range s; rows that are not valid, where that is given, see nothing."""
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
    if C.page > 0:
        # The row of keys is the sequences' logical keys laid end to end.
        base = tl.load(a.sequence + i) * a.period
        lo += base
        hi += base
        diagonal += base
    return lo, hi, diagonal


@triton.jit
def bounds_of(lo, hi):
    """first, full_first, full_last, last: keys that some of the rows see, and those that all of them see."""
    seen = lo < hi
    first = tl.min(tl.where(seen, lo, FAR), 0)
    full_first = tl.max(tl.where(seen, lo, FAR), 0)
    full_last = tl.min(tl.where(seen, hi, 0), 0)
    last = tl.max(tl.where(seen, hi, 0), 0)
    return first, full_first, full_last, last


@triton.jit
def blocks_of(first, full_first, full_last, last, split, splits, BN: tl.constexpr):
    """begin, then numbers of blocks of BN keys from begin on: those to visit t0 … t1 − 1, those in full f0 … f1 − 1.

    Of several splits each gets an equal run of blocks.
    """
    # Blocks begin at a multiple of 16, so that loads of dense terms and TMA are aligned.
    begin = tl.minimum(first, last) // 16 * 16
    count = tl.cdiv(last - begin, BN)
    share = tl.cdiv(count, splits)
    t0 = tl.minimum(split * share, count)
    t1 = tl.minimum(t0 + share, count)
    f0 = tl.cdiv(tl.minimum(full_first, last) - begin, BN)
    f1 = (tl.maximum(full_last, begin) - begin) // BN
    f0 = tl.minimum(tl.maximum(f0, t0), t1)
    f1 = tl.maximum(tl.minimum(f1, t1), f0)
    return begin, t0, t1, f0, f1


@triton.jit
def far_of(a, begin, f0, f1, seen, diagonal, BN: tl.constexpr):
    """left, right: of the full blocks f0 … f1 − 1 those before `left` and those from `right` on lie wholly beyond the
    table's reach, or to one side of the diagonal, of all rows. Without terms that depend on position all do."""
    left = f1
    right = f1
    if (a.slopes is not None) or (a.table is not None):
        lowest, highest = span_of(seen, diagonal)
        left = tl.minimum(tl.maximum((lowest - a.reach + 1 - begin) // BN, f0), f1)
        right = tl.minimum(tl.maximum(tl.cdiv(highest + a.reach - begin, BN), left), f1)
    return left, right


@triton.jit
def span_of(seen, diagonal):
    """The lowest and the highest diagonal of the rows that see anything."""
    return tl.min(tl.where(seen, diagonal, FAR), 0), tl.max(tl.where(seen, diagonal, -FAR), 0)


@triton.jit
def block_at(t, x0, x1, y0, y1):
    """The t-th block where x0 … x1 − 1 and y0 … y1 − 1 are left out; x1 ≤ y0."""
    t += tl.where(t >= x0, x1 - x0, 0)
    return t + tl.where(t >= y0, y1 - y0, 0)


@triton.jit
def head_of(x, x_b, x_g, x_h, b, g, h):
    """Where a head of the query, or of what lies like it, begins; offsets of 64 bits, since heads may be far apart."""
    return x + b.to(tl.int64) * x_b + g.to(tl.int64) * x_g + h.to(tl.int64) * x_h


@triton.jit
def load_tile(base, rows, stride, limit, MASKED: tl.constexpr, D: tl.constexpr, dim: tl.constexpr):
    """[rows, D] from rows of `dim` contiguous elements; zero beyond `dim` and, where masked, from row `limit` on."""
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
def slots_of(a, j, last, C: tl.constexpr):
    """Where keys j of the row lie in memory, int64; the page is read from the block table.

    A block of keys may begin or end in what belongs to no sequence: what the table says there is anything.
    """
    page = tl.load(a.block_table + j // C.page, mask=j < last, other=0)
    page = tl.minimum(tl.maximum(page, 0), a.pages - 1)
    return page.to(tl.int64) * C.page + j % C.page


@triton.jit
def load_keys(x, stride, slots, j0, last, MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, dim: tl.constexpr,
              page: tl.constexpr):  # fmt: skip
    """Keys or values j0 … j0 + BN − 1 of the row, [BN, D]; x points at key 0 of the batch entry and group."""
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
def row_scale(a, b, g, h, i, C: tl.constexpr):
    """What products with the stored query of rows i, heads h are to be multiplied by, but for scales of runs of keys."""
    scale = tl.full([i.shape[0]], 1.0, tl.float32)
    if a.query_scale is not None:
        at = a.query_scale + b * a.query_scale_b + g * a.query_scale_g + h * a.query_scale_h
        if C.query_run > 0:
            at += i // C.query_run * a.query_scale_c
        scale = tl.load(at).to(tl.float32)
    if a.key_scale is not None and C.key_run == 0:
        scale *= tl.load(a.key_scale + b * a.key_scale_b + g * a.key_scale_g).to(tl.float32)
    return scale


@triton.jit
def scaled_query(q, a, b, g, h, i, C: tl.constexpr):
    """The query as the product with stored keys takes it, and what is left of `row_scale`, [rows]: positive, since the
    largest of a row's products is found before they are multiplied. The sign goes to the query."""
    factor = row_scale(a, b, g, h, i, C)
    sign = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, factor))
    wide = q.to(tl.float32) * sign[:, None]
    factor = tl.where(factor == 0, 1.0, tl.abs(factor))
    if q.dtype == tl.bfloat16:
        # fp16 has the bits but not the range, so rows are divided by a power of two near their largest number.
        size = (tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        size = tl.where(size == 0, 1.0, size)
        wide = (wide / size[:, None]).to(tl.float16)
        factor *= size
    elif q.dtype == tl.float8e4nv and C.BM < 64:
        # Products of fewer rows are not made in 8 bits everywhere.
        wide = wide.to(tl.float16)
    else:
        wide = wide.to(q.dtype)
    return wide, factor


@triton.jit
def key_scales(a, x, x_b, x_c, x_g, b, g, slots, j, last, run: tl.constexpr, C: tl.constexpr):
    """The scales of keys or values j, [n]; `slots` says where paged keys lie, `run` how many share one, 0 for all. 0 from
    `last` on."""
    where = (slots if C.page > 0 else j).to(tl.uint64)
    at = x + b * x_b + g * x_g + (where // run * x_c if run > 0 else where * 0)
    return tl.load(at, mask=j < last, other=0.0).to(tl.float32)


@triton.jit
def widened(x, q, C: tl.constexpr):
    """Keys or values as the product takes them: what is stored in 8 bits in fp16, which holds it exactly, or in fp32
    where the query is; what is not, as it is.

    Something with effects is not moved behind the change of layout that follows, where each byte would be loaded alone.
    """
    pure: tl.constexpr = C.assembly == "pure"
    if x.dtype.primitive_bitwidth > 8:
        wide = x
    elif q.dtype == tl.float32:
        wide = x.to(tl.float32)
    elif C.assembly == "none":
        wide = x.to(tl.float16)
    elif x.dtype == tl.int8:
        # fp16's 1024 + 128 + x has x as its last byte, but for a bit.
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
def column_of(a, j, C: tl.constexpr):
    """Columns of dense terms for keys j of the row."""
    column = j % a.period if C.periodic else j
    return column.to(tl.int64) if C.wide else column


@triton.jit
def visible_of(a, b, g, h, i, j, lo, hi, C: tl.constexpr):
    """Which keys j rows i see; h, i, lo, hi are expanded over rows, j over keys."""
    visible = (j >= lo) & (j < hi)
    if a.dense is not None:
        column = column_of(a, j, C)
        row = a.dense + b.to(tl.int64) * a.dense_b + g.to(tl.int64) * a.dense_g
        row += h.to(tl.int64) * a.dense_h + i.to(tl.int64) * a.dense_m
        visible &= tl.load(row + column * a.dense_n, mask=visible, other=0) != 0
    return visible


@triton.jit
def unit_of(a, MASKED: tl.constexpr, C: tl.constexpr):
    """What scores are still to be multiplied by: the scale where it folds into the exponential, else 1."""
    return a.scale2 if C.simple and (a.table is None or not MASKED) else 1.0


@triton.jit
def capped(s, a, MASKED: tl.constexpr, C: tl.constexpr):
    """Raw products to scores in log₂ but for `unit_of`, and tanh of the scaled score (0 without a softcap)."""
    unit = 0.0
    if C.softcap:
        x = s * a.scale2
        square = x * x
        # Near 0 the difference would leave an error of the size of the cap, so there tanh is its series.
        near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        far = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
        unit = tl.where(square < 0.09, near, far)
        s = unit * a.cap2
    elif (not C.simple) or (MASKED and a.table is not None):
        s = s * a.scale2
    return s, unit


@triton.jit
def far_terms(a, slope, ends, is_left, j0, diagonal):
    """What far tiles add to the score of key j0 + n in log₂: tilt · n and, over rows, shift. Beyond the table's reach
    one entry serves, and a distance is a difference: a load or a conversion per score would cost more than all else."""
    tilt = 0.0
    shift = 0.0
    if a.slopes is not None:
        tilt = tl.where(is_left, slope, -slope)
        shift = tilt * (j0 - diagonal).to(tl.float32)
    if a.table is not None:
        shift += tl.where(is_left, ends[0], ends[1])
    return tilt, shift


@triton.jit
def ends_of(a, g, h):
    """The relative table's first and last entry, in log₂; 0 without a table."""
    first = 0.0
    last = 0.0
    if a.table is not None:
        table = a.table + g * a.table_g + h * a.table_h
        first = tl.load(table).to(tl.float32) * LOG2E
        last = tl.load(table + 2 * a.reach).to(tl.float32) * LOG2E
    return first, last


@triton.jit
def biased(s, a, b, g, h, i, j, lo, hi, diagonal, slope, MASKED: tl.constexpr, C: tl.constexpr):
    """Scores plus all bias terms, in log₂; what is read for keys outside lo … hi − 1 does not matter.

    Tiles that are not masked are far ones: what depends on position comes from `far_terms`.
    """
    if MASKED and a.slopes is not None:
        s -= slope * tl.abs(j - diagonal).to(tl.float32)
    if MASKED and a.table is not None:
        entry = tl.minimum(tl.maximum(j - diagonal, -a.reach), a.reach) + a.reach
        s += tl.load(a.table + g * a.table_g + h * a.table_h + entry).to(tl.float32) * LOG2E
    if a.bias is not None:
        column = column_of(a, j, C)
        row = a.bias + b.to(tl.int64) * a.bias_b + g.to(tl.int64) * a.bias_g
        row += h.to(tl.int64) * a.bias_h + i.to(tl.int64) * a.bias_m
        if MASKED:
            s += tl.load(row + column * a.bias_n, mask=(j >= lo) & (j < hi), other=0.0).to(tl.float32) * LOG2E
        else:
            s += tl.load(row + column * a.bias_n).to(tl.float32) * LOG2E
    return s


@triton.jit
def slope_of(a, b, g, h):
    """ALiBi's slope of each head in log₂; 0 without."""
    if a.slopes is not None:
        slope = tl.load(a.slopes + b * a.slopes_b + g * a.slopes_g + h * a.slopes_h).to(tl.float32) * LOG2E
    else:
        slope = 0.0
    return slope


@triton.jit
def kept(a, b, head, i, j0, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr):
    """Where dropout keeps a weight, [BM, BN]: Philox 4x32-10 as in core/dropout.py. `head`, `i`: [BM]."""
    seed = tl.load(a.seed)
    batch = i * 0 + b
    if C.periodic:
        # Sequences may begin anywhere, so each key works out its own four words.
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
def weights_of(s, a, b, g, h, i, j, lo, hi, diagonal, slope, tilt, lse2, MASKED: tl.constexpr, C: tl.constexpr):
    """Softmax weights from raw products and lse in log₂ (+inf for empty rows), and the softcap's tanh.

    Of far tiles lse2 comes less their shift, and `tilt` comes expanded over keys.
    """
    s, unit = capped(s, a, MASKED, C)
    if (not MASKED) and a.slopes is not None:
        s += tilt
    s = biased(s, a, b, g, h, i, j, lo, hi, diagonal, slope, MASKED, C)
    p = tl.math.exp2(s * unit_of(a, MASKED, C) - lse2)
    if MASKED:
        p = tl.where(visible_of(a, b, g, h, i, j, lo, hi, C), p, 0.0)
    return p, unit


@triton.jit
def score_gradient(p, dp, delta):
    """Gradient of the biased score (natural units) from that of the weight; 0 where hidden even if dp is NaN."""
    return tl.where(p == 0, 0.0, p * (dp - delta))


@triton.jit
def raw_gradient(ds, unit, C: tl.constexpr):
    """Gradient of the scaled product from that of the capped score; 0 where that is, for a hidden product may be NaN."""
    if C.softcap:
        ds = tl.where(ds == 0, 0.0, ds * (1.0 - unit * unit))
    return ds


@triton.jit
def stats_at(a, stats, b, g, h, C: tl.constexpr):
    """Where lse in log₂ of a head's rows lies, and how far behind it delta does, in stats [B, G, H, 2, padded M].

    Heads begin aligned and no tile ends outside of its head, so that many rows are read at once, without a mask.
    """
    rows = tl.cdiv(a.M, STATS) * STATS
    return stats + ((b * a.G + g) * C.H + h).to(tl.int64) * (2 * rows), rows


@triton.jit
def load_stats(a, stats, b, g, h, i, C: tl.constexpr):
    """lse in log₂ and delta of rows i."""
    at, rows = stats_at(a, stats, b, g, h, C)
    return tl.load(at + i), tl.load(at + rows + i)


@triton.jit
def load_lse(lse, at):
    """lse in log₂; +inf, so that all weights are 0, for empty rows and for those hidden by a bias of −10⁹, say: of an lse
    so large the rounding alone makes weights of 2¹²⁸."""
    x = tl.load(lse + at) * LOG2E
    return tl.where(tl.abs(x) > LARGEST, INFINITY, x)


@triton.jit
def beyond(a, ds, distance):
    """Row sums of what belongs to the table's first entry, and to its last one."""
    below = distance <= -a.reach
    low = tl.sum(tl.where(below, ds, 0.0), 1)
    return low, tl.sum(tl.where((distance >= a.reach) & ~below, ds, 0.0), 1)
