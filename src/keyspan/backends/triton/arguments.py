"""What kernels are given: the arguments and constants of a problem, and the tuples that functions pass on."""

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
    """First key of each row's document; None: 0, or of paged sequences their first key."""
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
    segment: int
    """For invariant results: blocks of keys are counted from the first key of the row's document, and after so many keys, a
    multiple of BN, sums begin anew and are merged; 0 where bits of a row may depend on what its tile holds."""


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
