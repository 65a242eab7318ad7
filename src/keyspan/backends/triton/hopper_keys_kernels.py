"""Gradients of keys and values for Hopper (sm_90) in Gluon, where heads are too wide for the kernel of all three.

A program takes one block of 64 keys of a group after another and visits the tiles of queries that see them. Two groups of
four warps share the work: one recomputes the weights and multiplies them by the output's gradients, for dv; the other
multiplies these by the values, gets the weights through shared memory, and multiplies the scores' gradients by the
queries, for dk. So each holds one accumulator. A loader warp finds the tiles and fills a ring by TMA.
"""

from __future__ import annotations

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
    EMPTY,
    ENTRIES,
    FULL,
    GRAD_EMPTY,
    GRAD_FULL,
    GROUP,
    KEY_EMPTY,
    KEY_FULL,
    PLAN,
    PLAN_EMPTY,
    PLAN_FULL,
    QUERY_EMPTY,
    QUERY_FULL,
    START,
    VALUE_EMPTY,
    VALUE_FULL,
    VISIT,
    _load_queries,
    _mask_of,
    _opaque,
    _plan_item,
    _score_gradients,
    _visit,
    _weights,
)
from keyspan.backends.triton.hopper_kernels import ROWS, _capped, _get, _put, tma_load


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
    dtype: gl.constexpr = query_tiles.dtype
    queries = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, 1, C.BM, C.K], query_tiles.layout)
    grads = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, 1, C.BM, C.V], grad_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, C.K], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, C.V], value_tiles.layout)
    weight_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, C.BM], dtype)
    weights = gl.allocate_shared_memory(dtype, [2, ROWS, C.BM], weight_layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * C.stages, C.BM], stat_tiles.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    masks = gl.allocate_shared_memory(gl.int32, [C.stages, C.BM], plain)
    diagonals = masks
    if a.slopes is not None:
        diagonals = gl.allocate_shared_memory(gl.float32, [C.stages, C.BM], plain)
    plan = gl.allocate_shared_memory(gl.int32, [PLAN, 1], plain)
    full = gl.allocate_shared_memory(gl.int64, [FULL, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [EMPTY, 1], mbarrier.MBarrierLayout())
    score_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    score_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        # The loader itself, and what it loads.
        mbarrier.init(full.index(QUERY_FULL + n), count=2)
        # The last to read a query is its product for dk, which comes after its weights.
        mbarrier.init(empty.index(QUERY_EMPTY + n), count=1)
        mbarrier.init(full.index(GRAD_FULL + n), count=1)
        mbarrier.init(empty.index(GRAD_EMPTY + n), count=2)
        mbarrier.init(score_full.index(n), count=1)
        mbarrier.init(score_empty.index(n), count=1)
        mbarrier.init(full.index(PLAN_FULL + n), count=1)
        mbarrier.init(empty.index(PLAN_EMPTY + n), count=3)
    mbarrier.init(full.index(KEY_FULL), count=1)
    mbarrier.init(empty.index(KEY_EMPTY), count=1)
    mbarrier.init(full.index(VALUE_FULL), count=1)
    mbarrier.init(empty.index(VALUE_EMPTY), count=1)
    rings = (
        queries,
        grads,
        weights,
        keys,
        values,
        (stats, masks, diagonals),
        score_full,
        score_empty,
        plan,
        full,
        empty,
    )
    tiles = (query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles)
    gl.warp_specialize(
        [
            (_value_gradients, (a, scales, rings, dv, broken, C)),
            (_key_gradients, (a, scales, rings, dk, broken, C)),
            (_loader, (a, tiles, rings, bounds, bounds_s, bounds_b, counters, heads_at_once, items, C)),
        ],
        [4, 1],
        [C.registers, C.helper_registers],
    )


@gluon.jit
def _loader(a, tiles, rings, bounds, bounds_s, bounds_b, counters, heads_at_once, items, C: gl.constexpr):
    """Takes a block of keys, finds the tiles that see some of them, and loads both."""
    query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles = tiles
    queries, grads, weights, keys, values, rows, score_full, score_empty, plan, full, empty = rings
    lanes: gl.constexpr = gl.BlockedLayout([C.BM // 32], [32], [1], [0])
    row_tiles = (a.M + C.BM - 1) // C.BM
    item = gl.program_id(0)
    turn = 0
    loaded = 0
    t = 0
    while item < items:
        _plan_item(a, rings, bounds, bounds_s, bounds_b, turn, item, heads_at_once, 0, items, C)
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        n0 = block * C.BN
        missing = True
        for s in gl.static_range(max(C.S, 1)):
            start, span = _get(entry, START + 2 * s), _get(entry, START + 2 * s + 1)
            for x in range(-span):
                tile = start - x
                seen, whole, _, _ = _visit(bounds, bounds_s, bounds_b, row_tiles, s, b, block, block < 0, tile, a, C)
                if seen:
                    i = tile * C.BM + gl.arange(0, C.BM, lanes)
                    # Nobody has written statistics of rows behind the last.
                    whole = whole & ((tile + 1) * C.BM <= a.M)
                    mask, diagonal = _mask_of(a, s, b, i, n0, whole, C)
                    mask = gl.where(i < a.M, mask, 0)
                    for h in range(C.H):
                        stage = t % C.stages
                        mbarrier.wait(empty.index(QUERY_EMPTY + stage), t // C.stages & 1 ^ 1)
                        _put((plan, VISIT), stage, 1 - whole.to(gl.int32))
                        _load_queries(
                            a, query_tiles, stat_tiles, queries, rows, full, stage, b, g, h, tile, mask, diagonal, C
                        )
                        if missing:
                            mbarrier.wait(empty.index(KEY_EMPTY), loaded & 1 ^ 1)
                            mbarrier.expect(full.index(KEY_FULL), key_tiles.block_type.nbytes)
                            tma_load(key_tiles, [b, g, n0, 0], full.index(KEY_FULL), keys.index(0))
                        mbarrier.wait(empty.index(GRAD_EMPTY + stage), t // C.stages & 1 ^ 1)
                        mbarrier.expect(full.index(GRAD_FULL + stage), grad_tiles.block_type.nbytes)
                        tma_load(
                            grad_tiles, [b, g, h, tile * C.BM, 0], full.index(GRAD_FULL + stage), grads.index(stage)
                        )
                        if missing:
                            mbarrier.wait(empty.index(VALUE_EMPTY), loaded & 1 ^ 1)
                            mbarrier.expect(full.index(VALUE_FULL), value_tiles.block_type.nbytes)
                            tma_load(value_tiles, [b, g, n0, 0], full.index(VALUE_FULL), values.index(0))
                            missing = False
                            loaded += 1
                        t += 1
        mbarrier.arrive(empty.index(PLAN_EMPTY + turn % 2), count=1)
        turn += 1
        item = gl.num_programs(0) + gl.atomic_add(counters, 1)
    _plan_item(a, rings, bounds, bounds_s, bounds_b, turn, item, heads_at_once, 0, items, C)
    if gl.atomic_add(counters + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _value_gradients(a, scales, rings, dv, broken, C: gl.constexpr):
    """The weights of a block, and dv."""
    queries, grads, weights, keys, values, rows, score_full, score_empty, plan, full, empty = rings
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    V_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.V, 16])
    zero = gl.full([ROWS, C.BM], 0.0, gl.float32, S_L)
    j = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, S_L)), 1)
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(full.index(PLAN_FULL), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        acc = gl.full([ROWS, C.V], 0.0, gl.float32, V_L)
        if count > 0:
            mbarrier.wait(full.index(KEY_FULL), loaded & 1)
            for x in range(count):
                t = filled + x
                stage = t % C.stages
                mbarrier.wait(full.index(QUERY_FULL + stage), t // C.stages & 1)
                q = queries.index(stage).reshape([C.BM, C.K])
                k = keys.index(_opaque(0, t)).reshape([ROWS, C.K])
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                partial = _get((plan, VISIT), stage) != 0
                unit, h = scales.score, x % C.H
                if C.softcap:
                    s, unit = _capped(s, scales, C), 1.0
                p = _weights(s, unit, a, rows, stage, partial, j, b, g, h, S_L).to(dtype)
                mbarrier.wait(score_empty.index(t % 2), t // 2 & 1 ^ 1)
                weights.index(t % 2).store(p)
                mbarrier.arrive(score_full.index(t % 2), count=1)
                left = gl.convert_layout(p, gl.DotOperandLayout(0, V_L, 2))
                mbarrier.wait(full.index(GRAD_FULL + stage), t // C.stages & 1)
                acc = warpgroup_mma(left, grads.index(stage).reshape([C.BM, C.V]), acc, is_async=True)
                # The product reads its left operand from registers until it is waited for.
                acc, left = warpgroup_mma_wait(0, deps=(acc, left))
                mbarrier.arrive(empty.index(GRAD_EMPTY + stage), count=1)
            mbarrier.arrive(empty.index(KEY_EMPTY), count=1)
            loaded += 1
        mbarrier.arrive(empty.index(PLAN_EMPTY + turn % 2), count=1)
        _write(dv, acc, b, block * ROWS, g, a, C.v_dim, C.V)
        bad = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
        gl.store(broken + ((b * a.G + g) * ((a.N + ROWS - 1) // ROWS) + block) * 2 + 1, bad)
        filled += count
        turn += 1
        mbarrier.wait(full.index(PLAN_FULL + turn % 2), turn // 2 & 1)
        count = _get((plan, turn % 2 * ENTRIES), COUNT)


@gluon.jit
def _key_gradients(a, scales, rings, dk, broken, C: gl.constexpr):
    """The gradients of a block's scores, and dk."""
    queries, grads, weights, keys, values, rows, score_full, score_empty, plan, full, empty = rings
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.K, 16])
    zero = gl.full([ROWS, C.BM], 0.0, gl.float32, S_L)
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(full.index(PLAN_FULL), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        acc = gl.full([ROWS, C.K], 0.0, gl.float32, K_L)
        if count > 0:
            mbarrier.wait(full.index(VALUE_FULL), loaded & 1)
            for x in range(count):
                t = filled + x
                stage = t % C.stages
                mbarrier.wait(full.index(GRAD_FULL + stage), t // C.stages & 1)
                do = grads.index(stage).reshape([C.BM, C.V])
                v = values.index(_opaque(0, t)).reshape([ROWS, C.V])
                dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                dp = warpgroup_mma_wait(0, deps=(dp,))
                mbarrier.arrive(empty.index(GRAD_EMPTY + stage), count=1)
                # Whoever wrote the weights has seen the query and its statistics arrive, but this has to, too.
                mbarrier.wait(full.index(QUERY_FULL + stage), t // C.stages & 1)
                mbarrier.wait(score_full.index(t % 2), t // 2 & 1)
                p = weights.index(t % 2).load(S_L).to(gl.float32)
                mbarrier.arrive(score_empty.index(t % 2), count=1)
                ds = _score_gradients(p, dp, rows, stage, S_L)
                if C.softcap:
                    # The capped score is log p + lse.
                    lse = gl.expand_dims(rows[0].index(2 * stage).load(gl.SliceLayout(0, S_L)), 0)
                    tanh = (gl.log2(p) + lse) * (1.0 / scales.cap)
                    ds *= 1.0 - tanh * tanh
                # Statistics of rows behind the last may be NaN.
                ds = gl.where(p == 0, 0.0, ds).to(dtype)
                left = gl.convert_layout(ds, gl.DotOperandLayout(0, K_L, 2))
                acc = warpgroup_mma(left, queries.index(stage).reshape([C.BM, C.K]), acc, is_async=True)
                acc, left = warpgroup_mma_wait(0, deps=(acc, left))
                mbarrier.arrive(empty.index(QUERY_EMPTY + stage), count=1)
            mbarrier.arrive(empty.index(VALUE_EMPTY), count=1)
            loaded += 1
        mbarrier.arrive(empty.index(PLAN_EMPTY + turn % 2), count=1)
        _write(dk, acc * a.scale, b, block * ROWS, g, a, C.k_dim, C.K)
        bad = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
        gl.store(broken + ((b * a.G + g) * ((a.N + ROWS - 1) // ROWS) + block) * 2, bad)
        filled += count
        turn += 1
        mbarrier.wait(full.index(PLAN_FULL + turn % 2), turn // 2 & 1)
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
