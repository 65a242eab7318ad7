"""Gradients of queries for Hopper (sm_90) in Gluon, where heads are too wide for the kernel of all three.

A program takes one tile of 128 queries after another and visits the keys they see run by run, as the forward kernel does:
two groups of four warps compute 64 rows each, a producer warp fills the ring of keys and values by TMA, and the forward
kernel's planner warp takes the tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from keyspan.backends.triton.hopper_backward_kernels import _opaque
from keyspan.backends.triton.hopper_kernels import (
    BATCH,
    BEGIN,
    COUNT,
    EARLY,
    ENDS,
    ENTRIES,
    GROUP,
    HEAD,
    LAST,
    MOVE,
    ROW,
    ROWS,
    _bounds,
    _capped,
    _get,
    _planner,
    _rows,
    _term,
    tma_load,
)


@gluon.jit
def hopper_queries_kernel(a, scales, query_tiles, grad_tiles, key_tiles, value_tiles, stats, dq, broken, counters,
                          heads_at_once, items, C: gl.constexpr):  # fmt: skip
    """dq [B, M, G, H, K], contiguous.

    Grid: (programs). An item is a tile of C.BM rows of one head.

    Args:
        scales: `hopper_kernels.Scales`.
        stats: statistics, see `stats_pointer`.
        broken: int32, an entry for each ROWS queries of a head, padded to whole tiles: whether their gradients have a NaN.
        counters: as of `hopper_forward_kernel`.
    """
    CONSUMERS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.stages
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = query_tiles.dtype
    queries = gl.allocate_shared_memory(dtype, [C.consumers, 1, 1, 1, ROWS, C.K], query_tiles.layout)
    grads = gl.allocate_shared_memory(dtype, [C.consumers, 1, 1, 1, ROWS, C.V], grad_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, C.BN, C.K], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [1, 1, 1, C.BN, C.V], value_tiles.layout)
    plans = gl.allocate_shared_memory(gl.int32, [2 * ENTRIES, 1], plain)
    bounds = gl.allocate_shared_memory(gl.int32, [4 * C.consumers, ROWS], plain)
    query_full = gl.allocate_shared_memory(gl.int64, [C.consumers, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [C.consumers, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [C.stages, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    plan_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    plan_next = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    plan_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(CONSUMERS):
        mbarrier.init(query_full.index(n), count=1)
        mbarrier.init(query_empty.index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(key_full.index(n), count=1)
        mbarrier.init(key_empty.index(n), count=C.consumers)
    mbarrier.init(value_full.index(0), count=1)
    mbarrier.init(value_empty.index(0), count=C.consumers)
    for n in gl.static_range(2):
        mbarrier.init(plan_full.index(n), count=1)
        mbarrier.init(plan_empty.index(n), count=C.consumers + 1)
    mbarrier.init(plan_next.index(0), count=1)
    rings = (
        (queries, grads, query_full, query_empty),
        (keys, key_full, key_empty),
        (values, value_full, value_empty),
        (plans, bounds, plan_full, plan_empty, plan_next),
    )
    gl.warp_specialize(
        [
            (_query_gradients, (a, scales, rings, stats, dq, broken, 0, C)),
            (_query_gradients, (a, scales, rings, stats, dq, broken, 1, C)),
            (_producer, (query_tiles, grad_tiles, key_tiles, value_tiles, rings, C)),
            (_planner, (a, rings, counters, heads_at_once, items, C)),
        ],
        [4, 1, 1],
        [C.consumer_registers, C.producer_registers, C.producer_registers],
    )


@gluon.jit
def _producer(query_tiles, grad_tiles, key_tiles, value_tiles, rings, C: gl.constexpr):
    """Loads each item's rows and their gradients, and the keys and values they see."""
    CONSUMERS: gl.constexpr = C.consumers
    queries, grads, query_full, query_empty = rings[0]
    keys, key_full, key_empty = rings[1]
    values, value_full, value_empty = rings[2]
    plans, bounds, plan_full, plan_empty, plan_next = rings[3]
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
            n = filled + t
            stage = n % C.stages
            mbarrier.wait(key_empty.index(stage), n // C.stages & 1 ^ 1)
            mbarrier.expect(key_full.index(stage), key_tiles.block_type.nbytes)
            tma_load(key_tiles, [b, g, j0, 0], key_full.index(stage), keys.index(stage))
            if (t == 0) & (ends % LAST > 0):
                for m in gl.static_range(CONSUMERS):
                    mbarrier.wait(query_empty.index(m), loaded & 1 ^ 1)
                    full = query_full.index(m)
                    mbarrier.expect(full, query_tiles.block_type.nbytes + grad_tiles.block_type.nbytes)
                    tma_load(query_tiles, [b, g, h, row + m * ROWS, 0], full, queries.index(m))
                    tma_load(grad_tiles, [b, g, h, row + m * ROWS, 0], full, grads.index(m))
                loaded += 1
            mbarrier.wait(value_empty.index(0), n & 1 ^ 1)
            mbarrier.expect(value_full.index(0), value_tiles.block_type.nbytes)
            tma_load(value_tiles, [b, g, j0, 0], value_full.index(0), values.index(0))
            if (ends >= LAST) & (t == count - EARLY):
                mbarrier.arrive(plan_next.index(0), count=1)
        mbarrier.arrive(plan_empty.index(turn % 2), count=1)
        if (ends >= LAST) & (count < EARLY):
            mbarrier.arrive(plan_next.index(0), count=1)
        filled += count
        turn += 1
        mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
        count = _get((plans, turn % 2 * ENTRIES), COUNT)


@gluon.jit
def _query_gradients(a, scales, rings, stats, dq, broken, ME: gl.constexpr, C: gl.constexpr):
    """dq of rows 64 · ME … of each item."""
    queries, grads, query_full, query_empty = rings[0]
    keys, key_full, key_empty = rings[1]
    values, value_full, value_empty = rings[2]
    plans, bounds, plan_full, plan_empty, plan_next = rings[3]
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])
    Q_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.K, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, S_L)
    zero = gl.full([ROWS, C.BN], 0.0, gl.float32, S_L)
    n = gl.expand_dims(gl.arange(0, C.BN, gl.SliceLayout(0, S_L)), 0)
    padded = (a.M + 127) // 128 * 128
    tiles = (a.M + C.BM - 1) // C.BM
    acc = gl.full([ROWS, C.K], 0.0, gl.float32, Q_L)
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(plan_full.index(0), 0)
    count = _get((plans, 0), COUNT)
    while count >= 0:
        plan = (plans, turn % 2 * ENTRIES)
        row, h, g, b = _get(plan, ROW), _get(plan, HEAD), _get(plan, GROUP), _get(plan, BATCH)
        ends = _get(plan, ENDS)
        if ends % LAST > 0:
            acc = gl.full([ROWS, C.K], 0.0, gl.float32, Q_L)
        head = (b * a.G + g) * C.H + h
        if count > 0:
            begin = _get(plan, BEGIN)
            # Rows behind the last are as the last, and are not written.
            i, _ = _rows(a, row + ME * ROWS, by_row)
            at = stats + head.to(gl.int64) * (2 * padded) + i
            lse, delta = gl.load(at), gl.load(at + padded)
            lo, width, diagonal, full_first, full_last, _, _ = _bounds(a, rings, plan, turn % 2, b, i, ME, C)
            slope = 0.0
            if a.slopes is not None:
                slope = _term(a, a.slopes + b * a.slopes_b + g * a.slopes_g + h * a.slopes_h)
            mbarrier.wait(query_full.index(ME), loaded & 1)
            for t in range(count):
                j0 = begin + t * C.BN
                stage = (filled + t) % C.stages
                mbarrier.wait(key_full.index(stage), (filled + t) // C.stages & 1)
                k = keys.index(stage).reshape([C.BN, C.K])
                me = _opaque(ME, t)
                q = queries.index(me).reshape([ROWS, C.K])
                do = grads.index(me).reshape([ROWS, C.V])
                v = values.index(me - ME).reshape([C.BN, C.V])
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(value_full.index(0), filled + t & 1)
                dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                unit = scales.score
                if C.softcap:
                    s, unit = _capped(s, scales, C), 1.0
                s = s * unit - gl.expand_dims(lse, 1)
                if a.slopes is not None:
                    # In floats, which are exact up to 2²⁴.
                    s -= slope * gl.abs(n.to(gl.float32) + gl.expand_dims((j0 - diagonal).to(gl.float32), 1))
                p = gl.exp2(s)
                if (j0 < full_first) | (j0 + C.BN > full_last):
                    # The compiler would compare in every tile and drop the branch around this, but for something it must
                    # not move.
                    m = gl.inline_asm_elementwise(MOVE, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)
                    # Below lo the difference wraps around and is larger than any width.
                    seen = (m - gl.expand_dims(lo - j0, 1)).to(gl.uint32, bitcast=True)
                    p = gl.where(seen < gl.expand_dims(width, 1).to(gl.uint32, bitcast=True), p, 0.0)
                dp = warpgroup_mma_wait(0, deps=(dp,))
                mbarrier.arrive(value_empty.index(0), count=1)
                ds = p * (dp - gl.expand_dims(delta, 1))
                if C.softcap:
                    # The capped score is log p + lse.
                    tanh = (gl.log2(p) + gl.expand_dims(lse, 1)) * (1.0 / scales.cap)
                    ds = gl.where(p == 0, 0.0, ds * (1.0 - tanh * tanh))
                left = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, Q_L, 2))
                acc = warpgroup_mma(left, k, acc, is_async=True)
                # The product reads its left operand from registers until it is waited for.
                acc, left = warpgroup_mma_wait(0, deps=(acc, left))
                mbarrier.arrive(key_empty.index(stage), count=1)
            if ends >= LAST:
                mbarrier.arrive(query_empty.index(ME), count=1)
                loaded += 1
            filled += count
        mbarrier.arrive(plan_empty.index(turn % 2), count=1)
        if ends >= LAST:
            i = row + ME * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q_L))
            to = (b.to(gl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
            columns = gl.expand_dims(gl.arange(0, C.K, gl.SliceLayout(0, Q_L)), 0)
            inside = gl.expand_dims(i < a.M, 1)
            if C.k_dim < C.K:
                inside = inside & (columns < C.k_dim)
            gl.store(dq + gl.expand_dims(to, 1) * C.k_dim + columns, (acc * a.scale).to(dtype), mask=inside)
            bad = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
            gl.store(broken + (head * tiles + row // C.BM) * C.consumers + ME, bad)
        turn += 1
        mbarrier.wait(plan_full.index(turn % 2), turn // 2 & 1)
        count = _get((plans, turn % 2 * ENTRIES), COUNT)
