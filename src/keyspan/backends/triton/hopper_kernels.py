"""Forward for Hopper (sm_90) in Gluon: warps with roles of their own, in programs that take one tile of queries after another.

As in FlashAttention-3 (Shah et al. 2024): one producer warp fills a ring of key and value tiles by TMA; two or three
consumer warpgroups compute 64 query rows each, and while one computes its softmax the tensor cores work for another. A
planner warp takes the next tile and reads its key ranges while consumers are busy. What a tile executes is kept short:
an SM's instruction cache does not hold three copies of a longer loop.

A tile visits its keys run by run: those that its rows of one document see in one of their ranges. A run's blocks are
counted from the document's first key (`KeyRanges.origin`), and rows of other documents see none of them. A row's bits
therefore do not depend on the rows and documents beside it: a block without a visible key changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from keyspan.backends.triton.arguments import INFINITY, LN2, LOG2E

# Triton 3.8 renames it.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

ROWS = gl.constexpr(64)
"""Query rows of a consumer: those of one wgmma."""
FAR = gl.constexpr(2**31 - 1)
LARGEST = gl.constexpr(3.4028234663852886e38)
MOVE = gl.constexpr("mov.b32 $0, $1;")
PERIOD = gl.constexpr(4096)
"""Keys of a document between blocks that raise a row's pivot."""
TRUSTED = gl.constexpr(2.0**126)
"""The largest sum of weights of a row that is not computed again: 1 / more is no normal number."""
LEAST = gl.constexpr(2.0**-80)
"""The smallest sum with ALiBi that is not computed again: a pivot is greater than all scores where keys near the diagonal
have much lower products than those of the block that raised it."""

# Entries of a plan, which is one run of blocks: the item's first row, head of the group, group and batch entry; which range
# of its rows; the first key and how many blocks; whether the item begins and ends with it (FIRST, LAST); how many blocks of
# the document come before; then, for each consumer, from which key to which all its rows see every key, and to which and
# from which key what depends on position is constant. `bounds` beside it has lo and hi − lo of each row.
ROW, HEAD, GROUP, BATCH, RANGE, BEGIN, COUNT, ENDS, BEFORE, FULL = map(gl.constexpr, range(10))
ENTRIES = gl.constexpr(32)
FIRST, LAST = map(gl.constexpr, (1, 2))
EARLY = gl.constexpr(3)
"""Blocks of keys before an item's last, before whose loads the next item is taken."""


class Form(NamedTuple):
    """What a kernel is compiled for."""

    BM: int
    """Rows of a tile: 64 for each consumer."""
    BN: int
    K: int
    """Head dimensions padded to a power of two, then as they are."""
    V: int
    k_dim: int
    v_dim: int
    H: int
    S: int
    """Ranges per row; 0 where every key is visible."""
    simple: bool
    """Scores are score_scale · q·k with score_scale > 0: the scale folds into the exponential."""
    softcap: bool
    consumers: int
    stages: int
    """Tiles of keys, and of values, in the ring."""
    consumer_registers: int
    producer_registers: int
    lazy: bool = False
    """Forward only: a row keeps its pivot in most blocks, so that weights may be greater than 1; see `_raised`."""
    ahead: bool = False
    """Forward only: the first product of the next item is issued before the results of an item are written."""


class Scales(NamedTuple):
    """Of scores, which are in log₂; with a relative table in natural units: −3.4 · 10³⁸, a common entry for hidden keys,
    overflows in log₂."""

    score: float
    """scale in that unit, or scale / softcap where there is a softcap."""
    cap: float
    """softcap in that unit."""


@gluon.jit
def hopper_forward_kernel(a, scales, query_tiles, key_tiles, value_tiles, out, lse, counters, heads_at_once, items,
                          C: gl.constexpr):  # fmt: skip
    """out [B, M, G, H, V] and lse [B, G, H, M] (natural), both contiguous.

    Grid: (programs). An item is a tile of C.BM rows of one head. Each program takes the item of its own number, then
    whichever is next, because items differ in length.

    Args:
        counters: int32 [2]: items taken beyond the first ones, and programs that are done. The last one to be done sets
            both back to 0, which they are at the start.
    """
    CONSUMERS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.stages
    dtype: gl.constexpr = query_tiles.dtype
    queries = gl.allocate_shared_memory(dtype, [C.consumers, 1, 1, 1, ROWS, C.K], query_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, C.BN, C.K], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, C.BN, C.V], value_tiles.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plans = gl.allocate_shared_memory(gl.int32, [2 * ENTRIES, 1], plain)
    bounds = gl.allocate_shared_memory(gl.int32, [4 * C.consumers, ROWS], plain)
    query_full = gl.allocate_shared_memory(gl.int64, [C.consumers, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [C.consumers, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    stage_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    plan_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    plan_next = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    plan_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(CONSUMERS):
        mbarrier.init(query_full.index(n), count=1)
        mbarrier.init(query_empty.index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(key_full.index(n), count=1)
        mbarrier.init(value_full.index(n), count=1)
        mbarrier.init(stage_empty.index(n), count=C.consumers)
    for n in gl.static_range(2):
        mbarrier.init(plan_full.index(n), count=1)
        mbarrier.init(plan_empty.index(n), count=C.consumers + 1)
    mbarrier.init(plan_next.index(0), count=1)

    rings = (
        (queries, query_full, query_empty),
        (keys, key_full),
        (values, value_full, stage_empty),
        (plans, bounds, plan_full, plan_empty, plan_next),
    )
    if C.consumers == 2:
        gl.warp_specialize(
            [
                (_consumer, (a, scales, rings, out, lse, 0, C)),
                (_consumer, (a, scales, rings, out, lse, 1, C)),
                (_producer, (query_tiles, key_tiles, value_tiles, rings, C)),
                (_planner, (a, rings, counters, heads_at_once, items, C)),
            ],
            [4, 1, 1],
            [C.consumer_registers, C.producer_registers, C.producer_registers],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (a, scales, rings, out, lse, 0, C)),
                (_consumer, (a, scales, rings, out, lse, 1, C)),
                (_consumer, (a, scales, rings, out, lse, 2, C)),
                (_producer, (query_tiles, key_tiles, value_tiles, rings, C)),
                (_planner, (a, rings, counters, heads_at_once, items, C)),
            ],
            [4, 4, 1, 1],
            [C.consumer_registers, C.consumer_registers, C.producer_registers, C.producer_registers],
        )


@gluon.jit
def _place(a, item, heads_at_once, C: gl.constexpr):
    """First row, head of the group, group and batch entry of an item.

    Tiles that come last, the long ones of a causal mask, go first; `heads_at_once` heads go through all their tiles
    before the next do, so that their keys stay in cache.
    """
    tiles = (a.M + C.BM - 1) // C.BM
    run = item // (heads_at_once * tiles)
    inside = item - run * heads_at_once * tiles
    heads = gl.minimum(heads_at_once, a.B * a.G * C.H - run * heads_at_once)
    head = run * heads_at_once + inside % heads
    return (tiles - 1 - inside // heads) * C.BM, head % C.H, head // C.H % a.G, head // C.H // a.G


@gluon.jit
def _term(a, pointer):
    """Terms of a score, as they are stored, in the unit of scores; finite ones stay finite."""
    x = gl.load(pointer).to(gl.float32)
    if a.table is None:
        x = gl.where(gl.abs(x) < INFINITY, gl.minimum(gl.maximum(x * LOG2E, -LARGEST), LARGEST), x)
    return x


@gluon.jit
def _range(a, s, b, i, C: gl.constexpr):
    """lo and hi of rows i in range s."""
    if C.S == 0:
        lo = i * 0
        hi = lo + a.N
    else:
        lo = gl.maximum(gl.load(a.lo + s * a.lo_s + b * a.lo_b + i * a.lo_m), 0)
        hi = gl.minimum(gl.load(a.hi + s * a.hi_s + b * a.hi_b + i * a.hi_m), a.N)
    return lo, hi


@gluon.jit
def _diagonal(a, s, b, i, C: gl.constexpr):
    """The keys beside rows i in range s."""
    return i if C.S == 0 else gl.load(a.diagonal + s * a.diagonal_s + b * a.diagonal_b + i * a.diagonal_m)


@gluon.jit
def _document(a, b, i):
    """The first keys of the documents of rows i."""
    return i * 0 if a.origin is None else gl.load(a.origin + b * a.origin_b + i * a.origin_m)


@gluon.jit
def _planned(a, s, b, row, ME: gl.constexpr, C: gl.constexpr):
    """lo, hi, document and diagonal of a consumer's rows in range s; two rows a thread."""
    i, _ = _rows(a, row + ME * ROWS, gl.BlockedLayout([2], [32], [1], [0]))
    lo, hi = _range(a, s, b, i, C)
    diagonal = lo
    if (a.slopes is not None) or (a.table is not None):
        diagonal = _diagonal(a, s, b, i, C)
    return lo, hi, _document(a, b, i), diagonal


@gluon.jit
def _all_planned(a, s, b, row, C: gl.constexpr):
    """`_planned` of all consumers."""
    first = _planned(a, s, b, row, 0, C)
    second = _planned(a, s, b, row, 1, C)
    third = second
    if C.consumers == 3:
        third = _planned(a, s, b, row, 2, C)
    return first, second, third


@gluon.jit
def _following(rows, after, C: gl.constexpr):
    """The least first key of a document, of those greater than `after`, whose rows see some key; else FAR."""
    CONSUMERS: gl.constexpr = C.consumers
    least = rows[0][0] * 0 + FAR
    for n in gl.static_range(CONSUMERS):
        lo, hi, origin, _ = rows[n]
        least = gl.minimum(least, gl.where((lo < hi) & (origin > after), origin, FAR))
    return gl.min(least, 0)


@gluon.jit
def _ticket(counter, order: gl.constexpr):
    """A counter's next number. The first lane takes it and the others get it from its register: the result of a scalar
    addition comes through shared memory, at an address of the compiler's choice. Any order but "relaxed" waits for
    memory: some thousand cycles."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    taken = gl.atomic_add(counter + lane * 0, lane * 0 + 1, mask=lane == 0, sem=order)
    return gl.max(gl.where(lane == 0, taken, -1), 0)


@gluon.jit
def _planner(a, rings, counters, heads_at_once, items, C: gl.constexpr):
    """Takes items, each once most keys of the one before are on their way, and works out which keys it visits."""
    CONSUMERS: gl.constexpr = C.consumers
    RANGES: gl.constexpr = max(C.S, 1)
    plans, bounds, full, empty, taken = rings[3]
    item = gl.program_id(0)
    turn = 0
    number = 0
    while item < items:
        row, h, g, b = _place(a, item, heads_at_once, C)
        s = row * 0
        rows = _all_planned(a, s, b, row, C)
        document = _following(rows, -1, C)
        for _again in gl.static_range(RANGES - 1):
            if (document == FAR) & (s + 1 < RANGES):
                s += 1
                rows = _all_planned(a, s, b, row, C)
                document = _following(rows, -1, C)
        ends = row * 0 + FIRST
        while ends < LAST:
            # What comes next, for this may be the last run.
            next_s = s
            next_rows = rows
            next_document = _following(rows, document, C)
            for _again in gl.static_range(RANGES - 1):
                if (next_document == FAR) & (next_s + 1 < RANGES):
                    next_s += 1
                    next_rows = _all_planned(a, next_s, b, row, C)
                    next_document = _following(next_rows, -1, C)
            slot = turn % 2
            plan = (plans, slot * ENTRIES)
            first = rows[0][0] * 0 + FAR
            last = rows[0][0] * 0
            for n in gl.static_range(CONSUMERS):
                lo, hi, origin, _ = rows[n]
                seen = (lo < hi) & (origin == document)
                first = gl.minimum(first, gl.where(seen, lo, FAR))
                last = gl.maximum(last, gl.where(seen, hi, 0))
            first = gl.min(first, 0)
            last = gl.max(last, 0)
            before = first * 0
            if first < last:
                # BN is a power of two: this rounds down, also below the document's first key.
                first = document + (first - document & -C.BN)
                before = (first - document) // C.BN
            ends += gl.where(next_document == FAR, LAST, 0)
            mbarrier.wait(empty.index(slot), turn // 2 & 1 ^ 1)
            for n in gl.static_range(CONSUMERS):
                lo, hi, origin, diagonal = rows[n]
                seen = (lo < hi) & (origin == document)
                if C.S > 0:
                    bounds.index((slot * CONSUMERS + n) * 2).store(lo)
                    bounds.index((slot * CONSUMERS + n) * 2 + 1).store(gl.where(seen, hi - lo, 0))
                at = FULL + 4 * n
                _put(plan, at, gl.max(gl.where(seen, lo, FAR), 0))
                _put(plan, at + 1, gl.min(gl.where(seen, hi, 0), 0))
                if (a.slopes is not None) or (a.table is not None):
                    _put(plan, at + 2, gl.min(gl.where(seen, diagonal, FAR), 0) - a.reach + 1)
                    _put(plan, at + 3, gl.max(gl.where(seen, diagonal, -FAR), 0) + a.reach)
            _put(plan, ROW, row)
            _put(plan, HEAD, h)
            _put(plan, GROUP, g)
            _put(plan, BATCH, b)
            _put(plan, RANGE, s)
            _put(plan, BEGIN, first)
            _put(plan, COUNT, gl.maximum(last - first + C.BN - 1, 0) // C.BN)
            _put(plan, ENDS, ends)
            _put(plan, BEFORE, before)
            mbarrier.arrive(full.index(slot), count=1)
            turn += 1
            s = next_s
            rows = next_rows
            document = next_document
            ends = ends & LAST
        # Late, or long items would be taken early by who is busy; early enough to plan while keys of this one are used.
        mbarrier.wait(taken.index(0), number & 1)
        number += 1
        item = gl.num_programs(0) + _ticket(counters, "relaxed")
    mbarrier.wait(empty.index(turn % 2), turn // 2 & 1 ^ 1)
    _put((plans, turn % 2 * ENTRIES), COUNT, item * 0 - 1)
    mbarrier.arrive(full.index(turn % 2), count=1)
    if _ticket(counters + 1, "acq_rel") == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _put(plan, at, x):
    """Write an entry of a plan."""
    plan[0].index(plan[1] + at).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + x)


@gluon.jit
def _get(plan, at):
    """An entry of a plan."""
    return gl.max(plan[0].index(plan[1] + at).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _producer(query_tiles, key_tiles, value_tiles, rings, C: gl.constexpr):
    """Loads each item's rows, and the keys and values they see."""
    CONSUMERS: gl.constexpr = C.consumers
    queries, query_full, query_empty = rings[0]
    keys, key_full = rings[1]
    values, value_full, stage_empty = rings[2]
    plans, bounds, plan_full, plan_empty, taken = rings[3]
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(plan_full.index(0), 0)
    count = _get((plans, 0), COUNT)
    while count >= 0:
        plan = (plans, turn % 2 * ENTRIES)
        row, h, g, b = _get(plan, ROW), _get(plan, HEAD), _get(plan, GROUP), _get(plan, BATCH)
        begin, ends = _get(plan, BEGIN), _get(plan, ENDS)
        for t in range(count):
            j0 = begin + t * C.BN
            if (ends >= LAST) & (t == gl.maximum(count - EARLY, 0)):
                mbarrier.arrive(taken.index(0), count=1)
            stage = (filled + t) % C.stages
            phase = (filled + t) // C.stages & 1
            # Keys are done with when the values of the stage before are, but for the first ones of a run: those when
            # their own values are.
            freed = filled + t - (t > C.stages).to(gl.int32)
            mbarrier.wait(stage_empty.index(freed % C.stages), freed // C.stages & 1 ^ 1)
            mbarrier.expect(key_full.index(stage), key_tiles.block_type.nbytes)
            tma_load(key_tiles, [b, g, j0, 0], key_full.index(stage), keys.index(stage))
            if (t == 0) & (ends % LAST > 0):
                for n in gl.static_range(CONSUMERS):
                    mbarrier.wait(query_empty.index(n), loaded & 1 ^ 1)
                    mbarrier.expect(query_full.index(n), query_tiles.block_type.nbytes)
                    tma_load(query_tiles, [b, g, h, row + n * ROWS, 0], query_full.index(n), queries.index(n))
                loaded += 1
            mbarrier.wait(stage_empty.index(stage), phase ^ 1)
            mbarrier.expect(value_full.index(stage), value_tiles.block_type.nbytes)
            tma_load(value_tiles, [b, g, j0, 0], value_full.index(stage), values.index(stage))
        mbarrier.arrive(plan_empty.index(turn % 2), count=1)
        if (ends >= LAST) & (count == 0):
            mbarrier.arrive(taken.index(0), count=1)
        filled += count
        turn += 1
        mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
        count = _get((plans, turn % 2 * ENTRIES), COUNT)


@gluon.jit
def _rows(a, row, layout: gl.constexpr):
    """A consumer's query rows, and whether they exist; those beyond the end repeat the last."""
    i = row + gl.arange(0, ROWS, layout)
    return gl.minimum(i, a.M - 1), i < a.M


@gluon.jit
def _bounds(a, rings, plan, slot, b, i, ME: gl.constexpr, C: gl.constexpr):
    """lo, hi − lo and diagonal of a consumer's rows i, and their entries of the plan."""
    plans, bounds, plan_full, plan_empty, taken = rings[3]
    if C.S == 0:
        lo = i * 0
        width = lo + a.N
    else:
        lo = bounds.index((slot * C.consumers + ME) * 2).load(i.type.layout)
        width = bounds.index((slot * C.consumers + ME) * 2 + 1).load(i.type.layout)
    diagonal, left, right = lo, 0, 0
    if (a.slopes is not None) or (a.table is not None):
        diagonal = _diagonal(a, _get(plan, RANGE), b, i, C)
        left, right = _get(plan, FULL + 4 * ME + 2), _get(plan, FULL + 4 * ME + 3)
    return lo, width, diagonal, _get(plan, FULL + 4 * ME), _get(plan, FULL + 4 * ME + 1), left, right


@gluon.jit
def _capped(s, scales, C: gl.constexpr):
    """Products to scores, without the scale where that folds into the exponential."""
    if C.softcap:
        x = s * scales.score
        square = x * x
        # tanh near 0 by its series: the difference below has an absolute error of one rounding of 1.
        near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        far = 1.0 - 2.0 / (1.0 + gl.exp2(x * (2.0 * LOG2E)))
        s = gl.where(square < 0.09, near, far) * scales.cap
    elif not C.simple:
        s = s * scales.score
    return s


@gluon.jit
def _position_terms(a, b, g, h):
    """ALiBi's slope, and the first and the last entry of the relative table; 0 without them."""
    slope = 0.0
    first = 0.0
    last = 0.0
    if a.slopes is not None:
        slope = _term(a, a.slopes + b * a.slopes_b + g * a.slopes_g + h * a.slopes_h)
    if a.table is not None:
        table = a.table + g * a.table_g + h * a.table_h
        first = _term(a, table)
        last = _term(a, table + 2 * a.reach)
    return slope, first, last


@gluon.jit
def _near(s, a, g, h, slope, distance):
    """Scores plus what depends on the distance of key and row."""
    if a.slopes is not None:
        s -= slope * gl.abs(distance).to(gl.float32)
    if a.table is not None:
        entry = gl.minimum(gl.maximum(distance, -a.reach), a.reach) + a.reach
        s += _term(a, a.table + g * a.table_g + h * a.table_h + entry)
    return s


@gluon.jit
def _scores(s, a, scales, g, h, terms, bounds, j0, C: gl.constexpr):
    """Products of a consumer's rows with keys j0 … to scores: those returned times a factor plus, by row, a shift.

    What all rows see, far from the diagonal, needs no predicate, and one table entry and differences of distances serve
    all its keys.
    """
    lo, width, diagonal, full_first, full_last, left, right = bounds
    n = gl.expand_dims(gl.arange(0, C.BN, gl.SliceLayout(0, s.type.layout)), 0)
    full = (j0 >= full_first) & (j0 + C.BN <= full_last)
    s = _capped(s, scales, C)
    unit = scales.score if C.simple else 1.0
    shift = 0.0
    if (a.slopes is not None) or (a.table is not None):
        slope, first, last = terms
        is_left = j0 + C.BN <= left
        shift = lo.to(gl.float32) * 0.0
        if full & (is_left | (j0 >= right)):
            if a.slopes is not None:
                tilt = gl.where(is_left, slope, -slope)
                s += tilt * n.to(gl.float32)
                shift += tilt * (j0 - diagonal).to(gl.float32)
            if a.table is not None:
                shift += gl.where(is_left, first, last)
        else:
            s = _near(s, a, g, h, slope, j0 + n - gl.expand_dims(diagonal, 1))
            s = _masked(s, _opaque(n), lo - j0, width)
    elif not full:
        s = _masked(s, _opaque(n), lo - j0, width)
    return s, unit, shift


@gluon.jit
def _opaque(x):
    """Integers as they are, which the compiler must not move: it would compare in every block and drop the branch around
    `_masked`, or keep all n in registers. Which of n and lo spills less was tried for each form."""
    return gl.inline_asm_elementwise(MOVE, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _masked(s, n, lo, width):
    """Scores where rows see the block's n-th key: lo … lo + width − 1 counted from the block's first; else −inf. One of
    n and lo is `_opaque`."""
    # Below lo the difference wraps around and is larger than any width.
    seen = (n - gl.expand_dims(lo, 1)).to(gl.uint32, bitcast=True) < gl.expand_dims(
        width.to(gl.uint32, bitcast=True), 1
    )
    return gl.where(seen, s, -INFINITY)


@gluon.jit
def _exponential(a, x):
    """2 to a difference of scores in log₂, or e to one of natural scores."""
    return gl.exp2(x) if a.table is None else gl.exp2(x * LOG2E)


@gluon.jit
def _by_thread(x, reduce, C: gl.constexpr):
    """Reduce what each of the four threads of a row holds of it: [rows, keys] to [rows, 4], without shuffles. Of eight
    neighbours a thread has two; both halves of the keys are reduced apart, for shorter chains."""
    return reduce(reduce(reduce(x.reshape([ROWS, 2, C.BN // 16, 4, 2]), 4), 2), 1)


@gluon.jit
def _scaled(x, factor):
    """x times a factor of each row."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _weights(a, s, scales, g, h, terms, bounds, j0, number, m, l, acc, C: gl.constexpr):
    """The online softmax of products with keys j0 …, the document's `number`-th block: weights; the new pivots; the new sums
    of weights (`_by_thread`) and of values, but for this block's."""
    if C.lazy:
        lo, width, diagonal, full_first, full_last, _, _ = bounds
        if a.slopes is not None:
            s, unit, shift = _scores(s, a, scales, g, h, terms, bounds, j0, C)
        else:
            s = _capped(s, scales, C)
            unit = scales.score if C.simple else 1.0
            shift = 0.0
            if (j0 < full_first) | (j0 + C.BN > full_last):
                n = gl.expand_dims(gl.arange(0, C.BN, gl.SliceLayout(0, s.type.layout)), 0)
                s = _masked(s, n, _opaque(lo - j0), width)
        pivot = m
        due = number % (PERIOD // C.BN) == 0
        # Every row has its first pivot once this is false, see `_raised`.
        if due | (j0 - full_first < C.BN):
            above = shift
            if a.slopes is not None:
                above += _growth(terms[0], lo, width, diagonal, j0, C)
            m, pivot, l, acc = _raised(s, unit, above, lo, width, j0, due, m, l, acc, C)
        difference = s * unit - gl.expand_dims(pivot - shift, 1)
    else:
        s, unit, shift = _scores(s, a, scales, g, h, terms, bounds, j0, C)
        highest = gl.maximum(m, _largest(s, m, C) * unit + shift)
        # The pivot stays finite for rows that have seen no key yet, so that no −inf − −inf arises.
        pivot = gl.where(highest == -INFINITY, 0.0, highest)
        shrink = _exponential(a, m - pivot)
        m = highest
        acc = _scaled(acc, shrink)
        l = _scaled(l, shrink)
        difference = s * unit - gl.expand_dims(pivot - shift, 1)
    p = _exponential(a, difference)
    return p, m, l + _by_thread(p, gl.sum, C), acc


@gluon.jit
def _raised(s, unit, above, lo, width, j0, due, m, l, acc, C: gl.constexpr):
    """New pivots, and finite ones for this block; sums relative to them.

    A pivot becomes the largest score so far in the row's first block, in the second if the first is cut by lo, and where a
    block is `due`; with ALiBi, plus what its term still grows by (`above`, with the shift of these scores): else scores of
    a steep slope would overflow near the diagonal. It depends on the row alone, and so do the row's bits. Where scores grow by
    more than some 2^126 between, and where all of the first block are −inf, the sum of weights tells: `_finish` has such rows
    computed again.
    """
    highest = gl.maximum(m, _largest(s, m, C) * unit + above)
    highest = gl.where(due | (j0 - lo < C.BN), highest, m)
    pivot = gl.where(highest == -INFINITY, 0.0, highest)
    shrink = gl.exp2(m - pivot)
    sees = (j0 - lo < width) & (lo - j0 < C.BN) & (width > 0)
    shrink = gl.where(sees & (highest == -INFINITY), float("nan"), shrink)
    return highest, pivot, _scaled(l, shrink), _scaled(acc, shrink)


@gluon.jit
def _growth(slope, lo, width, diagonal, j0, C: gl.constexpr):
    """The largest ALiBi term of all keys that a row sees, less the largest of those in the block of keys j0 …"""
    last = lo + width - 1
    first_here = gl.maximum(lo, j0)
    last_here = gl.minimum(last, j0 + C.BN - 1)
    # The nearest key with a slope > 0, else the farthest.
    nearest = gl.abs(gl.minimum(gl.maximum(diagonal, lo), last) - diagonal)
    nearest_here = gl.abs(gl.minimum(gl.maximum(diagonal, first_here), last_here) - diagonal)
    farthest = gl.maximum(gl.abs(lo - diagonal), gl.abs(last - diagonal))
    farthest_here = gl.maximum(gl.abs(first_here - diagonal), gl.abs(last_here - diagonal))
    return gl.maximum(
        slope * (nearest_here - nearest).to(gl.float32), slope * (farthest_here - farthest).to(gl.float32)
    )


@gluon.jit
def _largest(s, like, C: gl.constexpr):
    """The largest of each row, laid out as `like`."""
    return gl.convert_layout(gl.max(_by_thread(s, gl.max, C), 1), like.type.layout)


@gluon.jit
def _product(q, keys, full, n, zero, C: gl.constexpr):
    """Products of the rows with the n-th tile of keys; all products before are waited for as well."""
    stage = n % C.stages
    mbarrier.wait(full.index(stage), n // C.stages & 1)
    tile = keys.index(stage).reshape([C.BN, C.K]).permute((1, 0))
    return warpgroup_mma_wait(0, deps=(warpgroup_mma(q, tile, zero, use_acc=False, is_async=True),))


@gluon.jit
def _consumer(a, scales, rings, out, lse, ME: gl.constexpr, C: gl.constexpr):
    """Computes rows 64 · ME … of each item."""
    queries, query_full, query_empty = rings[0]
    keys, key_full = rings[1]
    values, value_full, stage_empty = rings[2]
    plans, limits, plan_full, plan_empty, taken = rings[3]
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.V, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, S_L)
    q = queries.index(ME).reshape([ROWS, C.K])
    zero = gl.full([ROWS, C.BN], 0.0, gl.float32, S_L)
    m = gl.full([ROWS], -INFINITY, gl.float32, by_row)
    l = _by_thread(zero, gl.sum, C)
    acc = gl.full([ROWS, C.V], 0.0, gl.float32, O_L)
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(plan_full.index(0), 0)
    count = _get((plans, 0), COUNT)
    if C.ahead:
        s = _begun(q, keys, key_full, query_full.index(ME), 0, 0, count, zero, C)
        s = warpgroup_mma_wait(0, deps=(s,))
    while count >= 0:
        plan = (plans, turn % 2 * ENTRIES)
        row, h, g, b = _get(plan, ROW), _get(plan, HEAD), _get(plan, GROUP), _get(plan, BATCH)
        ends = _get(plan, ENDS)
        i, valid = _rows(a, row + ME * ROWS, by_row)
        if a.sinks is not None:
            # A sink is one more key, with this score and a value of zero.
            if ends % LAST > 0:
                m = gl.full([ROWS], 0.0, gl.float32, by_row) + _term(a, a.sinks + g * a.sinks_g + h * a.sinks_h)
        if count > 0:
            begin, before = _get(plan, BEGIN), _get(plan, BEFORE)
            terms = _position_terms(a, b, g, h)
            bounds = _bounds(a, rings, plan, turn % 2, b, i, ME, C)
            if C.ahead:
                if (count == 1) & (ends >= LAST):
                    mbarrier.arrive(query_empty.index(ME), count=1)
            else:
                mbarrier.wait(query_full.index(ME), loaded & 1)
                s = _product(q, keys, key_full, filled, zero, C)
            for t in range(count):
                stage = (filled + t) % C.stages
                # Before the softmax, though needed after it: the compiler mixes instructions between waits only, and
                # exponentials leave room for those that scale sums and convert weights.
                mbarrier.wait(value_full.index(stage), (filled + t) // C.stages & 1)
                p, m, l, acc = _weights(a, s, scales, g, h, terms, bounds, begin + t * C.BN, before + t, m, l, acc, C)
                weights = gl.convert_layout(p.to(dtype), P_L)
                acc = warpgroup_mma(weights, values.index(stage).reshape([C.BN, C.V]), acc, is_async=True)
                if t + 1 < count:
                    s = _product(q, keys, key_full, filled + t + 1, zero, C)
                    if C.ahead:
                        if (t + 2 == count) & (ends >= LAST):
                            mbarrier.arrive(query_empty.index(ME), count=1)
                else:
                    # Anything, so that no registers hold the old scores; but not a constant, which would be set every time.
                    s = gl.inline_asm_elementwise(MOVE, "=r,r", [zero], dtype=gl.float32, is_pure=False, pack=1)
                # The product reads its weights from registers until it is waited for.
                acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
                mbarrier.arrive(stage_empty.index(stage), count=1)
            if ends >= LAST:
                if not C.ahead:
                    mbarrier.arrive(query_empty.index(ME), count=1)
                loaded += 1
            filled += count
        mbarrier.arrive(plan_empty.index(turn % 2), count=1)
        turn += 1
        if C.ahead:
            # Computed while the results of this item are written.
            mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
            count = _get((plans, turn % 2 * ENTRIES), COUNT)
            s = _begun(q, keys, key_full, query_full.index(ME), filled, loaded, count, zero, C)
        if ends >= LAST:
            _finish(a, scales, out, lse, acc, m, l, row + ME * ROWS, h, g, b, C)
            m = gl.full([ROWS], -INFINITY, gl.float32, by_row)
            l = _by_thread(zero, gl.sum, C)
            acc = gl.full([ROWS, C.V], 0.0, gl.float32, O_L)
        if C.ahead:
            s = warpgroup_mma_wait(0, deps=(s,))
        else:
            mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
            count = _get((plans, turn % 2 * ENTRIES), COUNT)


@gluon.jit
def _begun(q, keys, key_full, query_full, n, loaded, count, zero, C: gl.constexpr):
    """Issue the first product of a run of `count` blocks; without blocks, of whatever lies there, which nobody reads."""
    stage = n % C.stages
    if count > 0:
        mbarrier.wait(query_full, loaded & 1)
        mbarrier.wait(key_full.index(stage), n // C.stages & 1)
    tile = keys.index(stage).reshape([C.BN, C.K]).permute((1, 0))
    return warpgroup_mma(q, tile, zero, use_acc=False, is_async=True)


@gluon.jit
def _log2(x):
    """log₂ to 2^-22 in one instruction; Triton's takes 30."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _finish(a, scales, out, lse, acc, m, l, row, h, g, b, C: gl.constexpr):
    """Write a consumer's rows row …: weighted sums of values, pivots and sums of weights become out and lse."""
    by_row: gl.constexpr = m.type.layout
    l = gl.convert_layout(gl.sum(l, 1), by_row)
    if a.sinks is not None:
        # A sink is one more key, with this score and a value of zero.
        sink = _term(a, a.sinks + g * a.sinks_g + h * a.sinks_h)
        l += gl.where(m > -INFINITY, _exponential(a, sink - m), 0.0)
    # A NaN among the scores must come out as one.
    trusted = l <= TRUSTED
    if C.lazy and a.slopes is not None:
        trusted = trusted & ((l >= LEAST) | (m == -INFINITY))
    share = gl.where(trusted, gl.where(l > 0, 1.0 / l, 0.0), float("nan"))
    acc = _scaled(acc, share)
    i, valid = _rows(a, row, by_row)
    stats = lse + (b.to(gl.int64) * (a.G * C.H) + g * C.H + h) * a.M
    natural = (m + _log2(l)) * LN2 if a.table is None else m + _log2(l) * LN2
    natural = gl.where(l == 0, -INFINITY, natural)
    gl.store(stats + i, gl.where(trusted, natural, float("nan")), mask=valid)
    # 16 bytes a thread instead of 4: a quarter of the stores, of whole sectors.
    lanes: gl.constexpr = C.V // 8
    stored: gl.constexpr = gl.BlockedLayout([lanes // 2, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    # Opaque: the compiler would keep offsets of rows in memory over all items.
    r = gl.expand_dims(_opaque(gl.arange(0, ROWS, gl.SliceLayout(1, stored))), 1)
    tile = out + ((b.to(gl.int64) * a.M + row) * (a.G * C.H) + g * C.H + h) * C.v_dim
    columns = gl.expand_dims(gl.arange(0, C.V, gl.SliceLayout(0, stored)), 0)
    inside = r < a.M - row
    if C.v_dim < C.V:
        inside = inside & (columns < C.v_dim)
    result = gl.convert_layout(acc.to(out.dtype.element_ty), stored)
    gl.store(tile + (r * (a.G * C.H * C.v_dim) + columns), result, mask=inside)
    # A hidden value's weight is 0, but 0 · NaN = NaN; weights greater than 1 and large values overflow. Looking for products
    # with 0 that are NaN takes one instruction a number, a comparison three.
    if gl.min((gl.sum(acc * 0.0, 1) == 0).to(gl.int32), 0) == 0:
        gl.thread_barrier()
        _repair(a, scales, out, lse, row, h, g, b, C)


@gluon.jit
def _repair(a, scales, out, lse, row, h, g, b, C: gl.constexpr):
    """Those of a consumer's rows once more whose stored output or lse has a NaN or inf, slowly: from the keys they see alone,
    with the exact largest score. Each warp computes one row at a time, from its first key on."""
    lanes: gl.constexpr = max(C.K, C.V) // 8
    step: gl.constexpr = 2 * 32 // lanes
    RANGES: gl.constexpr = max(C.S, 1)
    tile: gl.constexpr = gl.BlockedLayout([1, 2, 8], [1, 32 // lanes, lanes], [4, 1, 1], [2, 1, 0])
    by_key: gl.constexpr = gl.SliceLayout(2, tile)
    by_column: gl.constexpr = gl.SliceLayout(1, tile)
    n = gl.expand_dims(gl.arange(0, step, gl.SliceLayout(0, by_key)), 0)  # [1, step]
    columns = gl.expand_dims(gl.arange(0, C.K, gl.SliceLayout(0, by_column)), 0)  # [1, K]
    columns_v = gl.expand_dims(gl.arange(0, C.V, gl.SliceLayout(0, by_column)), 0)
    query = a.q + b.to(gl.int64) * a.q_b + g.to(gl.int64) * a.q_g + h.to(gl.int64) * a.q_h
    key = a.k + b.to(gl.int64) * a.k_b + g.to(gl.int64) * a.k_g
    value = a.v + b.to(gl.int64) * a.v_b + g.to(gl.int64) * a.v_g
    slope, _, _ = _position_terms(a, b, g, h)
    for first in range(row, gl.minimum(row + ROWS, a.M), 4):
        i = gl.minimum(first + gl.arange(0, 4, gl.SliceLayout(1, by_key)), a.M - 1)
        i_v = gl.expand_dims(gl.convert_layout(i, gl.SliceLayout(1, by_column)), 1)
        stat = lse + (b.to(gl.int64) * (a.G * C.H) + g * C.H + h) * a.M + i
        to = out + ((b.to(gl.int64) * a.M + i_v) * (a.G * C.H) + g * C.H + h) * C.v_dim + columns_v
        stored = gl.load(stat)
        result = gl.load(to, mask=columns_v < C.v_dim, other=0.0).to(gl.float32)
        good = gl.min((gl.abs(result) <= LARGEST).to(gl.int32), 1)
        broken = (stored != stored) | (gl.convert_layout(good, i.type.layout) == 0)
        if gl.max(broken.to(gl.int32), 0) != 0:
            q = gl.load(query + i_v.to(gl.int64) * a.q_m + columns, mask=columns < C.k_dim, other=0.0).to(gl.float32)
            m = (i * 0).to(gl.float32) - INFINITY
            l = (i * 0).to(gl.float32)
            if a.sinks is not None:
                m = l + _term(a, a.sinks + g * a.sinks_g + h * a.sinks_h)
                l = gl.where(m > -INFINITY, 1.0, 0.0)
            pivot = l
            share = l
            acc = gl.full([4, C.V], 0.0, gl.float32, by_column)
            # Each range twice: for the largest score and the sum of weights, then for values.
            for turn in range(2 * RANGES):
                if turn == RANGES:
                    pivot = gl.where(m == -INFINITY, 0.0, m)
                    share = gl.where(l == 0, 0.0, 1.0 / l)
                lo, hi = _range(a, turn % RANGES, b, i, C)
                diagonal = gl.expand_dims(_diagonal(a, turn % RANGES, b, i, C), 1)
                hi = gl.expand_dims(gl.where(broken, hi, 0), 1)
                lo = gl.expand_dims(lo, 1)
                for t in range(0, gl.max(gl.max(hi - lo, 1), 0), step):
                    j = lo + t + n
                    rows = gl.expand_dims(j, 2)
                    there = gl.expand_dims(j < hi, 2)
                    k = gl.load(
                        key + rows.to(gl.int64) * a.k_n + gl.expand_dims(columns, 1),
                        mask=there & (gl.expand_dims(columns, 1) < C.k_dim),
                        other=0.0,
                    )
                    score = _capped(gl.sum(gl.expand_dims(q, 1) * k.to(gl.float32), 2), scales, C)
                    if C.simple:
                        score *= scales.score
                    score = gl.where(j < hi, _near(score, a, g, h, slope, j - diagonal), -INFINITY)
                    if turn < RANGES:
                        highest = gl.maximum(m, gl.max(score, 1))
                        pivot = gl.where(highest == -INFINITY, 0.0, highest)
                        p = _exponential(a, score - gl.expand_dims(pivot, 1))
                        l = l * _exponential(a, m - pivot) + gl.sum(p, 1)
                        m = highest
                    else:
                        p = _exponential(a, score - gl.expand_dims(pivot, 1)) * gl.expand_dims(share, 1)
                        v = gl.load(
                            value + rows.to(gl.int64) * a.v_n + gl.expand_dims(columns_v, 1),
                            mask=there & (gl.expand_dims(columns_v, 1) < C.v_dim),
                            other=0.0,
                        )
                        acc += gl.sum(gl.where(there, v.to(gl.float32) * gl.expand_dims(p, 2), 0.0), 1)
            again = gl.expand_dims(gl.convert_layout(broken.to(gl.int32), gl.SliceLayout(1, by_column)), 1) != 0
            gl.store(to, acc.to(out.dtype.element_ty), mask=again & (columns_v < C.v_dim))
            if C.lazy:
                gl.store(stat, gl.where(l == 0, -INFINITY, (m + gl.log2(l)) * LN2), mask=stored != stored)
