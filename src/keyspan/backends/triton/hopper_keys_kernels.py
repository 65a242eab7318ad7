"""Gradients of keys and values for Hopper (sm_90) in Gluon, where heads are too wide for the kernel of all three.

A program takes one block of 64 keys of a group after another and visits the tiles of queries that see them. Two groups of
four warps share the work: one recomputes the weights and multiplies them by the output's gradients, for dv; the other
multiplies these by the values, gets the weights through shared memory, and multiplies the scores' gradients by the
queries, for dk. So each holds one accumulator. A loader warp finds the tiles and fills a ring by TMA.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from keyspan.backends.triton.hopper_backward_kernels import (
    BATCH,
    BLOCK,
    COUNT,
    ENTRIES,
    GROUP,
    PLAN,
    VISIT,
    _score_gradients,
    _visible,
    _visit,
    _weights,
)
from keyspan.backends.triton.hopper_kernels import ROWS, _capped, _diagonal, _get, _put, _range, tma_load


class KeysForm(NamedTuple):
    """What a kernel is compiled for."""

    BM: int
    """Queries of a tile."""
    BN: int
    """Keys of a block: 64."""
    K: int
    """Head dimensions padded to a power of two, then as they are."""
    V: int
    k_dim: int
    v_dim: int
    H: int
    S: int
    """Ranges per row; 0 where every key is visible."""
    softcap: bool
    stages: int
    """Tiles in the ring."""
    registers: int
    """Of a thread that computes, then of the loader's."""
    loader_registers: int


@gluon.jit
def hopper_keys_kernel(a, scales, query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles, bounds, bounds_s, bounds_b,
                       dk, dv, broken, counters, heads_at_once, items, C: gl.constexpr):  # fmt: skip
    """dk [B, N, G, K] and dv [B, N, G, V], contiguous.

    Grid: (programs). An item is a block of keys of one group. Each program takes the item of its own number, then
    whichever is next.

    Args:
        scales: `Scales`.
        stat_tiles: of the statistics, see `stats_pointer`, as one row.
        bounds: what `bounds_kernel` made for tiles of BM; None without ranges. Then its strides over ranges and batch.
        broken: int32, two entries for each block: whether its dk, and its dv, have a NaN.
        counters: as of `hopper_forward_kernel`.
    """
    STAGES: gl.constexpr = C.stages
    dtype: gl.constexpr = query_tiles.dtype
    queries = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, 1, C.BM, C.K], query_tiles.layout)
    grads = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, 1, C.BM, C.V], grad_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, C.K], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, C.V], value_tiles.layout)
    weight_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, C.BM], dtype)
    weights = gl.allocate_shared_memory(dtype, [2, ROWS, C.BM], weight_layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * C.stages, C.BM], stat_tiles.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    masks = gl.allocate_shared_memory(gl.int32, [3 * C.stages, C.BM], plain)
    plan = gl.allocate_shared_memory(gl.int32, [PLAN, 1], plain)
    key_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    plan_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    plan_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    grad_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    grad_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(key_full.index(0), count=1)
    mbarrier.init(key_empty.index(0), count=1)
    mbarrier.init(value_full.index(0), count=1)
    mbarrier.init(value_empty.index(0), count=1)
    for n in gl.static_range(STAGES):
        # The loader itself, and what it loads.
        mbarrier.init(query_full.index(n), count=2)
        # The last to read a query is its product for dk, which comes after its weights.
        mbarrier.init(query_empty.index(n), count=1)
        mbarrier.init(grad_full.index(n), count=1)
        mbarrier.init(grad_empty.index(n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(plan_full.index(n), count=1)
        mbarrier.init(plan_empty.index(n), count=2)
        mbarrier.init(weight_full.index(n), count=1)
        mbarrier.init(weight_empty.index(n), count=1)
    rings = (
        (queries, query_full, query_empty),
        (grads, grad_full, grad_empty),
        (weights, weight_full, weight_empty),
        (keys, key_full, key_empty),
        (values, value_full, value_empty),
        (stats, masks),
        (plan, plan_full, plan_empty),
    )
    tiles = (query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles)
    gl.warp_specialize(
        [
            (_value_gradients, (a, scales, rings, dv, broken, C)),
            (_key_gradients, (a, scales, rings, dk, broken, C)),
            (_loader, (a, tiles, rings, bounds, bounds_s, bounds_b, counters, heads_at_once, items, C)),
        ],
        [4, 1],
        [C.registers, C.loader_registers],
    )


@gluon.jit
def _loader(a, tiles, rings, bounds, bounds_s, bounds_b, counters, heads_at_once, items, C: gl.constexpr):
    """Takes a block of keys, finds the tiles that see some of them, and loads both."""
    query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles = tiles
    queries, query_full, query_empty = rings[0]
    grads, grad_full, grad_empty = rings[1]
    keys, key_full, key_empty = rings[3]
    values, value_full, value_empty = rings[4]
    stats, masks = rings[5]
    plan, plan_full, plan_empty = rings[6]
    lanes: gl.constexpr = gl.BlockedLayout([C.BM // 32], [32], [1], [0])
    blocks = (a.N + C.BN - 1) // C.BN
    row_tiles = (a.M + C.BM - 1) // C.BM
    padded = (a.M + 127) // 128 * 128
    item = gl.program_id(0)
    turn = 0
    loaded = 0
    t = 0
    while item < items:
        # Groups go through all their blocks `heads_at_once` at a time.
        run = item // (heads_at_once * blocks)
        inside = item - run * heads_at_once * blocks
        groups = gl.minimum(heads_at_once, a.B * a.G - run * heads_at_once)
        block = inside // groups
        group = run * heads_at_once + inside % groups
        g, b = group % a.G, group // a.G
        n0 = block * C.BN
        start0, stop0, count = _visible(a, bounds, bounds_s, bounds_b, 0, b, n0, C)
        start1, stop1, start2, stop2 = start0, stop0, start0, stop0
        if C.S > 1:
            start1, stop1, found = _visible(a, bounds, bounds_s, bounds_b, 1, b, n0, C)
            count += found
        if C.S > 2:
            start2, stop2, found = _visible(a, bounds, bounds_s, bounds_b, 2, b, n0, C)
            count += found
        slot = turn % 2
        mbarrier.wait(plan_empty.index(slot), turn // 2 & 1 ^ 1)
        _put((plan, slot * ENTRIES), BLOCK, block)
        _put((plan, slot * ENTRIES), GROUP, g)
        _put((plan, slot * ENTRIES), BATCH, b)
        _put((plan, slot * ENTRIES), COUNT, count * C.H)
        mbarrier.arrive(plan_full.index(slot), count=1)
        missing = count > 0
        for s in gl.static_range(max(C.S, 1)):
            start, stop = start0, stop0
            if s == 1:
                start, stop = start1, stop1
            if s == 2:
                start, stop = start2, stop2
            for x in range(stop - start):
                tile = stop - 1 - x
                seen, full, _ = _visit(bounds, bounds_s, bounds_b, row_tiles, s, b, block, tile, a, C)
                if seen:
                    i = tile * C.BM + gl.arange(0, C.BM, lanes)
                    lo = i * 0
                    width = lo
                    diagonal = lo
                    # Nobody has written statistics of rows behind the last.
                    full = full & ((tile + 1) * C.BM <= a.M)
                    if (not full) | (a.slopes is not None):
                        row = gl.minimum(i, a.M - 1)
                        lo, hi = _range(a, s, b, row, C)
                        if a.slopes is not None:
                            diagonal = _diagonal(a, s, b, row, C)
                        width = gl.where(i < a.M, gl.maximum(hi - lo, 0), 0)
                    for h in range(C.H):
                        stage = t % C.stages
                        head = group * C.H + h
                        mbarrier.wait(query_empty.index(stage), t // C.stages & 1 ^ 1)
                        _put((plan, VISIT), stage, 1 - full.to(gl.int32))
                        masks.index(3 * stage).store(lo)
                        masks.index(3 * stage + 1).store(width)
                        if a.slopes is not None:
                            masks.index(3 * stage + 2).store(diagonal)
                        mbarrier.expect(query_full.index(stage), query_tiles.block_type.nbytes + 8 * C.BM)
                        tma_load(query_tiles, [b, g, h, tile * C.BM, 0], query_full.index(stage), queries.index(stage))
                        stat = 2 * head * padded + tile * C.BM
                        tma_load(stat_tiles, [stat], query_full.index(stage), stats.index(2 * stage))
                        tma_load(stat_tiles, [stat + padded], query_full.index(stage), stats.index(2 * stage + 1))
                        mbarrier.arrive(query_full.index(stage), count=1)
                        if missing:
                            mbarrier.wait(key_empty.index(0), loaded & 1 ^ 1)
                            mbarrier.expect(key_full.index(0), key_tiles.block_type.nbytes)
                            tma_load(key_tiles, [b, g, n0, 0], key_full.index(0), keys.index(0))
                        mbarrier.wait(grad_empty.index(stage), t // C.stages & 1 ^ 1)
                        mbarrier.expect(grad_full.index(stage), grad_tiles.block_type.nbytes)
                        tma_load(grad_tiles, [b, g, h, tile * C.BM, 0], grad_full.index(stage), grads.index(stage))
                        if missing:
                            mbarrier.wait(value_empty.index(0), loaded & 1 ^ 1)
                            mbarrier.expect(value_full.index(0), value_tiles.block_type.nbytes)
                            tma_load(value_tiles, [b, g, n0, 0], value_full.index(0), values.index(0))
                            missing = False
                            loaded += 1
                        t += 1
        turn += 1
        item = gl.num_programs(0) + gl.atomic_add(counters, 1)
    slot = turn % 2
    mbarrier.wait(plan_empty.index(slot), turn // 2 & 1 ^ 1)
    _put((plan, slot * ENTRIES), COUNT, item * 0 - 1)
    mbarrier.arrive(plan_full.index(slot), count=1)
    if gl.atomic_add(counters + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _value_gradients(a, scales, rings, dv, broken, C: gl.constexpr):
    """The weights of a block, and dv."""
    queries, query_full, query_empty = rings[0]
    grads, grad_full, grad_empty = rings[1]
    weights, weight_full, weight_empty = rings[2]
    keys, key_full, key_empty = rings[3]
    stats, masks = rings[5]
    plan, plan_full, plan_empty = rings[6]
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    V_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.V, 16])
    zero = gl.full([ROWS, C.BM], 0.0, gl.float32, S_L)
    k = keys.index(0).reshape([ROWS, C.K])
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(plan_full.index(0), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        j = gl.expand_dims(block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_L)), 1)
        acc = gl.full([ROWS, C.V], 0.0, gl.float32, V_L)
        if count > 0:
            mbarrier.wait(key_full.index(0), loaded & 1)
            for x in range(count):
                t = filled + x
                stage = t % C.stages
                mbarrier.wait(query_full.index(stage), t // C.stages & 1)
                q = queries.index(stage).reshape([C.BM, C.K])
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                partial = _get((plan, VISIT), stage) != 0
                s, h = _capped(s, scales, C) if C.softcap else s * scales.score, x % C.H
                p = _weights(s, a, stats, 2 * stage, masks, 3 * stage, partial, j, b, g, h, S_L).to(dtype)
                mbarrier.wait(weight_empty.index(t % 2), t // 2 & 1 ^ 1)
                weights.index(t % 2).store(p)
                mbarrier.arrive(weight_full.index(t % 2), count=1)
                left = gl.convert_layout(p, gl.DotOperandLayout(0, V_L, 2))
                mbarrier.wait(grad_full.index(stage), t // C.stages & 1)
                acc = warpgroup_mma(left, grads.index(stage).reshape([C.BM, C.V]), acc, is_async=True)
                # The product reads its left operand from registers until it is waited for.
                acc, left = warpgroup_mma_wait(0, deps=(acc, left))
                mbarrier.arrive(grad_empty.index(stage), count=1)
            mbarrier.arrive(key_empty.index(0), count=1)
            loaded += 1
        mbarrier.arrive(plan_empty.index(turn % 2), count=1)
        _write(dv, acc, b, block * ROWS, g, a, C.v_dim, C.V)
        bad = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
        gl.store(broken + ((b * a.G + g) * ((a.N + ROWS - 1) // ROWS) + block) * 2 + 1, bad)
        filled += count
        turn += 1
        mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
        count = _get((plan, turn % 2 * ENTRIES), COUNT)


@gluon.jit
def _key_gradients(a, scales, rings, dk, broken, C: gl.constexpr):
    """The gradients of a block's scores, and dk."""
    queries, query_full, query_empty = rings[0]
    grads, grad_full, grad_empty = rings[1]
    weights, weight_full, weight_empty = rings[2]
    values, value_full, value_empty = rings[4]
    stats, masks = rings[5]
    plan, plan_full, plan_empty = rings[6]
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.K, 16])
    zero = gl.full([ROWS, C.BM], 0.0, gl.float32, S_L)
    v = values.index(0).reshape([ROWS, C.V])
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(plan_full.index(0), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        acc = gl.full([ROWS, C.K], 0.0, gl.float32, K_L)
        if count > 0:
            mbarrier.wait(value_full.index(0), loaded & 1)
            for x in range(count):
                t = filled + x
                stage = t % C.stages
                mbarrier.wait(grad_full.index(stage), t // C.stages & 1)
                do = grads.index(stage).reshape([C.BM, C.V])
                dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                dp = warpgroup_mma_wait(0, deps=(dp,))
                mbarrier.arrive(grad_empty.index(stage), count=1)
                # Whoever wrote the weights has seen the query and its statistics arrive, but this has to, too.
                mbarrier.wait(query_full.index(stage), t // C.stages & 1)
                mbarrier.wait(weight_full.index(t % 2), t // 2 & 1)
                p = weights.index(t % 2).load(S_L).to(gl.float32)
                mbarrier.arrive(weight_empty.index(t % 2), count=1)
                ds = _score_gradients(p, dp, stats, 2 * stage, S_L)
                if C.softcap:
                    # The capped score is log p + lse.
                    lse = gl.expand_dims(stats.index(2 * stage).load(gl.SliceLayout(0, S_L)), 0)
                    tanh = (gl.log2(p) + lse) * (1.0 / scales.cap)
                    ds *= 1.0 - tanh * tanh
                # Statistics of rows behind the last may be NaN.
                ds = gl.where(p == 0, 0.0, ds).to(dtype)
                left = gl.convert_layout(ds, gl.DotOperandLayout(0, K_L, 2))
                acc = warpgroup_mma(left, queries.index(stage).reshape([C.BM, C.K]), acc, is_async=True)
                acc, left = warpgroup_mma_wait(0, deps=(acc, left))
                mbarrier.arrive(query_empty.index(stage), count=1)
            mbarrier.arrive(value_empty.index(0), count=1)
            loaded += 1
        mbarrier.arrive(plan_empty.index(turn % 2), count=1)
        _write(dk, acc * a.scale, b, block * ROWS, g, a, C.k_dim, C.K)
        bad = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
        gl.store(broken + ((b * a.G + g) * ((a.N + ROWS - 1) // ROWS) + block) * 2, bad)
        filled += count
        turn += 1
        mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
        count = _get((plan, turn % 2 * ENTRIES), COUNT)


@gluon.constexpr_function
def _wide(D):
    """The layout in which gradients [ROWS, D] are written: the four threads that hold 2 columns of 8 each have exchanged
    theirs for 8 neighbours each."""
    left = [[0, 32 << n] for n in range((D // 64).bit_length())]
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], *left]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, D])


@gluon.jit
def _write(to, x, b, first, g, a, dim: gl.constexpr, D: gl.constexpr):
    """Write gradients [ROWS, D] of keys first …"""
    wide: gl.constexpr = _wide(D)
    n = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    columns = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, wide)), 0)
    row = gl.expand_dims((b.to(gl.int64) * a.N + n) * a.G + g, 1)
    x = gl.convert_layout(x.to(to.dtype.element_ty), wide)
    gl.store(to + row * dim + columns, x, mask=gl.expand_dims(n < a.N, 1) & (columns < dim))
