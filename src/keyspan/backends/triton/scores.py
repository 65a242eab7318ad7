"""Device functions that all Triton kernels share: bias terms, dropout, softmax weights and statistics of rows.

Scores are in log₂, p = 2^(s − lse), so that the scale and the exponential's log₂e are one factor. With a dense bias they
are in natural units (`Constants.natural`): −3.4 · 10³⁸, a common value for hidden keys, overflows in log₂.

Vectors over query rows and over keys are passed expanded ([BM, 1] and [1, BN]; [1, BM] and [BN, 1] where a kernel works
on transposed tiles), so that one function serves both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import (
    FLOAT32_MAX,
    FRACTION_FREE,
    INFINITY,
    LN2,
    LOG2E,
    STATS_PADDING,
    PositionBias,
    RowStats,
)
from keyspan.backends.triton.blocks import in_range


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
def sum_by_halves(x):
    """Row sums of x [rows, columns], in the same order whichever thread holds which element."""
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), 1)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sum_of_keys(x, a, C: tl.constexpr):
    """Row sums of x [BM, BN]. Loads of terms lay scores out anew, in a way that depends on their alignment."""
    if C.segment > 0 and ((a.dense is not None) or (a.bias is not None) or (a.table is not None)):
        total = sum_by_halves(x)
    else:
        total = tl.sum(x, 1)
    return total


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
    if C.periodic or C.segment > 0:
        # Sequences and blocks may begin anywhere, so each key computes its own four words.
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
