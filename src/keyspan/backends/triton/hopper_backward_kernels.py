"""Backward for Hopper (sm_90) in Gluon: all three gradients from five products for each tile of scores.

A program takes one block of 128 keys of a group after another and visits the tiles of queries that see them, from the last
to the first. Its warps have roles: the planner takes the block and finds the tiles; the loader fills a ring by TMA; two
groups of four warps recompute the scores of 64 keys each, transposed, so that weights and score gradients leave the softmax
as left operands of dv and dk, and multiply the score gradients of all 128 by the keys, each for half of dq; the adder adds
that to dq.

dq is summed in memory, in fp32, in a fixed order: the block of keys that is taken n-th among those a tile sees adds n-th. A
counter for each tile says who is next. Programs take their blocks in the same order from a ticket, so nobody waits for a
program that has not begun. Blocks that go from the last tile down all begin at the same tiles, and wait for each other until
they are a tile apart; blocks that are taken from the last to the first and go up begin, under a causal mask, two tiles apart.
For the last block of a tile the adder loads the sum of the others instead, and the groups that compute add theirs to it in
registers and write dq in its dtype.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from keyspan.backends.triton.hopper_kernels import FAR, MOVE, ROWS, _diagonal, _get, _put, _range, _term, tma_load

# Triton 3.8 renames it.
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Once a thread; the tensor is a token.
DONE = gl.constexpr("cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.b32 $0, $1;")
READ = gl.constexpr("cp.async.bulk.wait_group.read 0; mov.b32 $0, $1;")
ACQUIRE = gl.constexpr("ld.acquire.gpu.global.b32 $0, [$1];")
ORDERED = gl.constexpr("fence.proxy.async.global; mov.b32 $0, $1;")

# Entries of a plan, of which there are two: the block's number, group and batch entry, how many tiles it visits; for each
# of up to three ranges the tile it begins with, and the number of tiles from there on, negative if they go down.
BLOCK, GROUP, BATCH, COUNT, START, ENTRIES = map(gl.constexpr, (0, 1, 2, 3, 4, 10))
# For each of the last VISITS tiles: its number among those of all heads; four times the number of blocks it is visited by
# before, plus LAST if no other visits it after, plus 1 if some row does not see all keys. Neither the adder, which comes last,
# nor the groups that compute are ever VISITS tiles behind the loader.
VISIT, VISITS, TILE, RANK, PLAN = map(gl.constexpr, (20, 8, 0, 1, 36))
LAST = gl.constexpr(2)
# Barriers for which the warps that compute wait: two of each in a row, one, VISITS.
QUERY_FULL, GRAD_FULL, PLAN_FULL, KEY_FULL, VALUE_FULL, SUM_READY, VISIT_FULL = map(gl.constexpr, (0, 2, 4, 6, 7, 8, 9))
FULL = gl.constexpr(17)
# And at which they arrive.
QUERY_EMPTY, PLAN_EMPTY, KEY_EMPTY, VALUE_EMPTY, SUM_FULL, PLAN_NEXT, EMPTY = map(gl.constexpr, (0, 2, 4, 5, 6, 7, 8))
GRAD_EMPTY = SUM_FULL
"""Two, of kernels in which queries and gradients are not done with at the same time, and which make no sums."""
EARLY = gl.constexpr(192)
"""How many queries of a block are still to be loaded when the next block is taken."""


class BackwardForm(NamedTuple):
    """What a kernel is compiled for."""

    BM: int
    """Queries of a tile."""
    BN: int
    """Keys of a block."""
    K: int
    """Head dimensions padded to a power of two, 64 or more, then as they are. Up to 128 both are padded to the same."""
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
    """Of a thread that computes, then of one that loads or adds."""
    helper_registers: int


@builtin
def _tma_add(descriptor, at, source, _semantic=None):
    """Adds a tile in shared memory to one in global memory."""
    if hasattr(tma, "async_atomic_add"):  # Triton 3.7 and later
        tma.async_atomic_add(descriptor, at, source, _semantic=_semantic)
    else:
        from triton._C.libtriton import ir

        at = _semantic._convert_to_ir_values(at, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, at, source.handle)


@builtin
def _part(memory, tiles, _semantic=None):
    """The beginning of shared memory, as a block of a descriptor."""
    return memory._reinterpret(tiles.dtype, tiles.block_type.shape, tiles.layout, _semantic=_semantic)


@gluon.jit(do_not_specialize=["heads_at_once", "upward", "items"])
def hopper_backward_kernel(a, score_scale, query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles, sum_tiles, bounds,
                           bounds_s, bounds_b, order, dq_tiles, dk_tiles, dv_tiles, broken, heads_at_once, upward,
                           items, C: gl.constexpr):  # fmt: skip
    """dq [B, M, G · H, K] of tiles that see some key, dk [B, N, G, K] and dv [B, N, G, V], contiguous.

    Grid: (programs). An item is a block of 2 · ROWS keys of one group.

    Args:
        score_scale: what makes scores in log₂ of products.
        stat_tiles: of the statistics, see `stats_pointer`, as one row.
        sum_tiles: of unscaled sums of dq in fp32 [B · G · H · tiles · 32, 256]: 16 rows are 64 × 64 elements in the order
            of registers, see `_in_order`.
        bounds: what `bounds_kernel` made for tiles of BM; None without ranges. Then its strides over ranges and batch.
        order: int32 [1 + B · G · H · tiles], zeros: the ticket, and how many blocks have been added to each tile of dq.
        broken: int32, an entry for each ROWS keys, padded to whole blocks, then for each tile of dq, 0 at the start: whether
            their gradients have a NaN.
        upward: how many runs of `heads_at_once` groups take their blocks from the last to the first, each of which visits
            its tiles from the first to the last; the runs after them go the other way. See `hopper.backward_order`.
    """
    dtype: gl.constexpr = query_tiles.dtype
    queries = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, 1, C.BM, C.K], query_tiles.layout)
    grads = gl.allocate_shared_memory(dtype, [C.stages, 1, 1, 1, C.BM, C.K], grad_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, C.K], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, C.K], value_tiles.layout)
    score_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, C.BM], dtype)
    scores = gl.allocate_shared_memory(dtype, [4, ROWS, C.BM], score_layout)
    sums = gl.allocate_shared_memory(gl.float32, [2, 16, 256], sum_tiles.layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * C.stages, C.BM], stat_tiles.layout)
    staging = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, C.K], value_tiles.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    masks = gl.allocate_shared_memory(gl.int32, [C.stages, C.BM], plain)
    diagonals = masks
    if a.slopes is not None:
        diagonals = gl.allocate_shared_memory(gl.float32, [C.stages, C.BM], plain)
    plan = gl.allocate_shared_memory(gl.int32, [PLAN, 1], plain)
    full = gl.allocate_shared_memory(gl.int64, [FULL, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [EMPTY, 1], mbarrier.MBarrierLayout())
    score_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    score_empty = score_full
    if C.BM > 64:
        # Of barriers that are initialised and not used the compiler takes the memory for something else, while they are
        # barriers still: tickets went through it and were lost when several processes shared the GPU.
        score_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        # The loader itself, and what it loads.
        mbarrier.init(full.index(QUERY_FULL + n), count=2)
        mbarrier.init(empty.index(QUERY_EMPTY + n), count=2)
        mbarrier.init(full.index(GRAD_FULL + n), count=1)
        mbarrier.init(score_full.index(n), count=2)
        if C.BM > 64:
            mbarrier.init(score_empty.index(n), count=2)
        mbarrier.init(full.index(PLAN_FULL + n), count=1)
        mbarrier.init(empty.index(PLAN_EMPTY + n), count=4)
    mbarrier.init(empty.index(PLAN_NEXT), count=1)
    mbarrier.init(full.index(KEY_FULL), count=1)
    mbarrier.init(empty.index(KEY_EMPTY), count=2)
    mbarrier.init(full.index(VALUE_FULL), count=1)
    mbarrier.init(empty.index(SUM_FULL), count=2)
    mbarrier.init(full.index(SUM_READY), count=1)
    for n in gl.static_range(VISITS):
        mbarrier.init(full.index(VISIT_FULL + n), count=1)
    rings = (
        queries,
        grads,
        scores,
        sums,
        keys,
        values,
        staging,
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
            (_keys, (a, score_scale, rings, dq_tiles, dk_tiles, dv_tiles, broken, 0, C)),
            (_keys, (a, score_scale, rings, dq_tiles, dk_tiles, dv_tiles, broken, 1, C)),
            (_loader, (a, tiles, rings, bounds, bounds_s, bounds_b, C)),
            (_adder, (a, sum_tiles, rings, order, C)),
            (_planner, (a, rings, bounds, bounds_s, bounds_b, order, heads_at_once, upward, items, C)),
        ],
        [4, 1, 1, 1],
        [C.registers, C.helper_registers, C.helper_registers, C.helper_registers],
    )


@gluon.jit
def _planner(a, rings, bounds, bounds_s, bounds_b, order, heads_at_once, upward, items, C: gl.constexpr):
    """Takes blocks of keys, each while the last tiles of the one before are loaded, and finds the tiles that see them."""
    empty = rings[-1]
    turn = 0
    running = True
    while running:
        if turn > 0:
            # Not before: other programs wait for a block that has been taken.
            mbarrier.wait(empty.index(PLAN_NEXT), turn - 1 & 1)
        item = _ticket(order)
        _plan_item(a, rings, bounds, bounds_s, bounds_b, turn, item, heads_at_once, upward, items, C)
        running = item < items
        turn += 1


@gluon.jit
def _ticket(counter):
    """A counter's next number. The first lane takes it and the others get it from its register: the result of a scalar
    addition comes through shared memory, at an address of the compiler's choice."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    taken = gl.atomic_add(counter + lane * 0, lane * 0 + 1, mask=lane == 0)
    return gl.max(gl.where(lane == 0, taken, -1), 0)


@gluon.jit
def _plan_item(a, rings, bounds, bounds_s, bounds_b, turn, item, heads_at_once, upward, items, C: gl.constexpr):
    """Plan an item, or the end where there are no more."""
    plan, full, empty = rings[-3], rings[-2], rings[-1]
    at = (plan, turn % 2 * ENTRIES)
    mbarrier.wait(empty.index(PLAN_EMPTY + turn % 2), turn // 2 & 1 ^ 1)
    if item < items:
        blocks = (a.N + C.BN - 1) // C.BN
        # Groups go through all their blocks `heads_at_once` at a time.
        run = item // (heads_at_once * blocks)
        inside = item - run * heads_at_once * blocks
        groups = gl.minimum(heads_at_once, a.B * a.G - run * heads_at_once)
        block = inside // groups
        group = run * heads_at_once + inside % groups
        up = run < upward
        block = gl.where(up, blocks - 1 - block, block)
        _put(at, BLOCK, block)
        _put(at, GROUP, group % a.G)
        _put(at, BATCH, group // a.G)
        count = block * 0
        for s in gl.static_range(max(C.S, 1)):
            start, stop, found = _visible(a, bounds, bounds_s, bounds_b, s, group // a.G, block * C.BN, C)
            _put(at, START + 2 * s, gl.where(up, start, stop - 1))
            _put(at, START + 2 * s + 1, gl.where(up, stop - start, start - stop))
            count += found
        _put(at, COUNT, count * C.H)
    else:
        _put(at, COUNT, item * 0 - 1)
    mbarrier.arrive(full.index(PLAN_FULL + turn % 2), count=1)


@gluon.jit
def _mask_of(a, s, b, i, n0, full, C: gl.constexpr):
    """Of rows i, which keys from n0 on they see in range s, `_packed`, and how far behind n0 the keys beside them are;
    0 where `full` and nothing depends on that."""
    mask = i * 0
    diagonal = mask
    if (not full) | (a.slopes is not None):
        row = gl.minimum(i, a.M - 1)
        lo, hi = _range(a, s, b, row, C)
        if a.slopes is not None:
            diagonal = _diagonal(a, s, b, row, C) - n0
        mask = _packed(lo - n0, hi - n0, C)
    return mask, diagonal


@gluon.jit
def _load_queries(
    a, query_tiles, stat_tiles, queries, rows, full, stage, b, g, h, tile, mask, diagonal, C: gl.constexpr
):
    """Load queries of a tile, and what belongs to them."""
    stats, masks, diagonals = rows
    masks.index(stage).store(mask)
    if a.slopes is not None:
        diagonals.index(stage).store(diagonal.to(gl.float32))
    ready = full.index(QUERY_FULL + stage)
    mbarrier.expect(ready, query_tiles.block_type.nbytes + 8 * C.BM)
    tma_load(query_tiles, [b, g, h, tile * C.BM, 0], ready, queries.index(stage))
    padded = (a.M + 127) // 128 * 128
    stat = 2 * ((b * a.G + g) * C.H + h) * padded + tile * C.BM
    tma_load(stat_tiles, [stat], ready, stats.index(2 * stage))
    tma_load(stat_tiles, [stat + padded], ready, stats.index(2 * stage + 1))
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _loader(a, tiles, rings, bounds, bounds_s, bounds_b, C: gl.constexpr):
    """Loads each block of keys, and the tiles that see some of them."""
    query_tiles, grad_tiles, key_tiles, value_tiles, stat_tiles = tiles
    queries, grads, scores, sums, keys, values, staging, rows, score_full, score_empty, plan, full, empty = rings
    lanes: gl.constexpr = gl.BlockedLayout([C.BM // 32], [32], [1], [0])
    row_tiles = (a.M + C.BM - 1) // C.BM
    turn = 0
    loaded = 0
    t = 0
    mbarrier.wait(full.index(PLAN_FULL), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        group, n0 = b * a.G + g, block * C.BN
        missing = count > 0
        if count == 0:
            mbarrier.arrive(empty.index(PLAN_NEXT), count=1)
        left = count
        for s in gl.static_range(max(C.S, 1)):
            start, span = _get(entry, START + 2 * s), _get(entry, START + 2 * s + 1)
            up = span > 0
            for x in range(gl.maximum(span, -span)):
                tile = start + gl.where(up, x, -x)
                seen, whole, rank, final = _visit(bounds, bounds_s, bounds_b, row_tiles, s, b, block, up, tile, a, C)
                if seen:
                    i = tile * C.BM + gl.arange(0, C.BM, lanes)
                    # Rows behind the last have no weights whatever they see, see `hopper_stats_kernel`.
                    mask, diagonal = _mask_of(a, s, b, i, n0, whole, C)
                    # All heads of the group, before the next tile: blocks that end earlier wait for nobody.
                    for h in range(C.H):
                        stage = t % C.stages
                        head = group * C.H + h
                        at = (plan, VISIT + 2 * (t % VISITS))
                        if left == gl.minimum(count, EARLY // C.BM):
                            mbarrier.arrive(empty.index(PLAN_NEXT), count=1)
                        left -= 1
                        mbarrier.wait(empty.index(QUERY_EMPTY + stage), t // C.stages & 1 ^ 1)
                        _put(at, TILE, head * row_tiles + tile)
                        _put(at, RANK, 4 * rank + LAST * final.to(gl.int32) + 1 - whole.to(gl.int32))
                        mbarrier.arrive(full.index(VISIT_FULL + t % VISITS), count=1)
                        _load_queries(
                            a, query_tiles, stat_tiles, queries, rows, full, stage, b, g, h, tile, mask, diagonal, C
                        )
                        mbarrier.expect(full.index(GRAD_FULL + stage), grad_tiles.block_type.nbytes)
                        tma_load(
                            grad_tiles, [b, g, h, tile * C.BM, 0], full.index(GRAD_FULL + stage), grads.index(stage)
                        )
                        t += 1
                        if missing:
                            # The last to read the values before was the tile before this.
                            last = t - 2 + C.stages
                            mbarrier.wait(empty.index(QUERY_EMPTY + last % C.stages), last // C.stages & 1 ^ 1)
                            mbarrier.expect(full.index(VALUE_FULL), 2 * value_tiles.block_type.nbytes)
                            for n in gl.static_range(2):
                                tma_load(value_tiles, [b, g, n0 + n * ROWS, 0], full.index(VALUE_FULL), values.index(n))
                            # Keys are in use until the block's last product.
                            mbarrier.wait(empty.index(KEY_EMPTY), loaded & 1 ^ 1)
                            mbarrier.expect(full.index(KEY_FULL), 2 * key_tiles.block_type.nbytes)
                            for n in gl.static_range(2):
                                tma_load(key_tiles, [b, g, n0 + n * ROWS, 0], full.index(KEY_FULL), keys.index(n))
                            missing = False
                            loaded += 1
        mbarrier.arrive(empty.index(PLAN_EMPTY + turn % 2), count=1)
        turn += 1
        mbarrier.wait(full.index(PLAN_FULL + turn % 2), turn // 2 & 1)
        count = _get((plan, turn % 2 * ENTRIES), COUNT)


@gluon.jit
def _packed(lo, hi, C: gl.constexpr):
    """The first key that a row sees of a block, and, in the upper half, how many it sees."""
    lo = gl.maximum(gl.minimum(lo, C.BN), 0)
    return lo + (gl.maximum(gl.minimum(hi, C.BN) - lo, 0) << 16)


@gluon.jit
def _visible(a, bounds, bounds_s, bounds_b, s: gl.constexpr, b, n0, C: gl.constexpr):
    """The first tile that sees some of a block's keys, the last plus one, and how many do."""
    tiles = (a.M + C.BM - 1) // C.BM
    start = n0 * 0
    stop = start + tiles
    count = stop
    if C.S > 0:
        CHUNK: gl.constexpr = 256
        at = bounds + s * bounds_s + b * bounds_b
        start, stop, count = start + FAR, start, start
        for chunk in range(0, tiles, CHUNK):
            t = chunk + gl.arange(0, CHUNK, gl.BlockedLayout([CHUNK // 32], [32], [1], [0]))
            first = gl.load(at + t, mask=t < tiles, other=FAR)
            last = gl.load(at + 3 * tiles + t, mask=t < tiles, other=0)
            seen = (first < n0 + C.BN) & (last > n0)
            start = gl.minimum(start, gl.min(gl.where(seen, t, FAR), 0))
            stop = gl.maximum(stop, gl.max(gl.where(seen, t + 1, 0), 0))
            count += gl.sum(seen.to(gl.int32), 0)
        start = gl.minimum(start, stop)
    return start, stop, count


@gluon.jit
def _visit(bounds, bounds_s, bounds_b, tiles, s: gl.constexpr, b, block, up, tile, a, C: gl.constexpr):
    """Whether a tile sees some of a block's keys, whether its rows see all, how many blocks are added to it before, and
    whether none is after."""
    BN: gl.constexpr = C.BN
    n0 = block * BN
    seen = block >= 0
    full = n0 + BN <= a.N
    count = (a.N + BN - 1) // BN
    rank = gl.where(up, count - 1 - block, block)
    if C.S > 0:
        rank = block * 0
        count = rank
        for other in gl.static_range(max(C.S, 1)):
            at = bounds + other * bounds_s + b * bounds_b + tile
            first = gl.load(at) // BN
            behind = (gl.load(at + 3 * tiles) + BN - 1) // BN
            count += gl.maximum(behind - first, 0)
            rank += gl.maximum(
                gl.where(up, behind - gl.maximum(block + 1, first), gl.minimum(block, behind) - first), 0
            )
            here = (first <= block) & (block < behind)
            if other < s:
                rank += here.to(gl.int32)
            if other == s:
                seen = here
                full = (gl.load(at + tiles) <= n0) & (gl.load(at + 2 * tiles) >= n0 + BN)
    return seen, full, rank, rank + 1 == count


@gluon.jit
def _keys(a, score_scale, rings, dq_tiles, dk_tiles, dv_tiles, broken, ME: gl.constexpr, C: gl.constexpr):
    """dk and dv of one half of the block's keys, and what all its keys add to one half of dq: of the rows of a tile where
    there are 128, else of the columns. With 128 rows that is computed one tile late, so that the two halves do not wait
    for each other's gradients of scores; with 64 the tensor cores would wait for operands instead."""
    LATE: gl.constexpr = C.BM > 64
    queries, grads, scores, sums, keys, values, staging, rows, score_full, score_empty, plan, full, empty = rings
    dtype: gl.constexpr = queries.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.K, 16])
    Q_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row: gl.constexpr = ME * 64 if C.BM > 64 else 0
    column: gl.constexpr = 0 if C.BM > 64 else ME * 64
    zero = gl.full([ROWS, C.BM], 0.0, gl.float32, S_L)
    nothing = gl.full([64, 64], 0.0, gl.float32, Q_L)
    filled = 0
    turn = 0
    loaded = 0
    mbarrier.wait(full.index(PLAN_FULL), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        entry = (plan, turn % 2 * ENTRIES)
        block, g, b = _get(entry, BLOCK), _get(entry, GROUP), _get(entry, BATCH)
        first = (block * 2 + ME) * ROWS
        j = gl.expand_dims(ME * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_L)), 1)
        dk_acc = gl.full([ROWS, C.K], 0.0, gl.float32, K_L)
        dv_acc = gl.full([ROWS, C.K], 0.0, gl.float32, K_L)
        if count > 0:
            mbarrier.wait(full.index(KEY_FULL), loaded & 1)
            stage = filled % C.stages
            mbarrier.wait(full.index(QUERY_FULL + stage), filled // C.stages & 1)
            k = keys.index(ME).reshape([ROWS, C.K])
            q = queries.index(stage).reshape([C.BM, C.K])
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(full.index(VALUE_FULL), loaded & 1)
            s = warpgroup_mma_wait(0, deps=(s,))
            for x in range(count):
                t = filled + x
                stage = t % C.stages
                q = queries.index(stage).reshape([C.BM, C.K])
                mbarrier.wait(full.index(GRAD_FULL + stage), t // C.stages & 1)
                do = grads.index(stage).reshape([C.BM, C.K])
                me = _opaque(ME, t)
                v = values.index(me).reshape([ROWS, C.K])
                dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                order = _get((plan, VISIT + 2 * (t % VISITS)), RANK)
                h = x % C.H
                p = _weights(s, score_scale, a, rows, stage, order % 2 > 0, j, b, g, h, S_L)
                weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, K_L, 2))
                dv_acc = warpgroup_mma(weights, do, dv_acc, is_async=True)
                dp = warpgroup_mma_wait(1, deps=(dp,))
                ds = _score_gradients(p, dp, rows, stage, S_L).to(dtype)
                if LATE:
                    mbarrier.wait(score_empty.index(t % 2), t // 2 & 1 ^ 1)
                # Else: who is here has seen the last products of the step before the last, which read the same memory.
                scores.index(t % 2 * 2 + ME).store(ds)
                fence_async_shared()
                mbarrier.arrive(score_full.index(t % 2), count=1)
                ds = gl.convert_layout(ds, gl.DotOperandLayout(0, K_L, 2))
                dk_acc = warpgroup_mma(ds, q, dk_acc, is_async=True)
                if LATE:
                    # Of the tile before; of no use in a block's first step.
                    mbarrier.wait(score_full.index((t + 1) % 2), (t + 1) // 2 & 1 ^ 1)
                    dq = _products(scores, keys, (t + 1) % 2, row, column, nothing, C)
                else:
                    mbarrier.wait(score_full.index(t % 2), t // 2 & 1)
                    dq = _products(scores, keys, t % 2, row, column, nothing, C)
                # Products read left operands from registers until they are waited for.
                dv_acc, weights, dk_acc, ds = warpgroup_mma_wait(2, deps=(dv_acc, weights, dk_acc, ds))
                mbarrier.arrive(empty.index(QUERY_EMPTY + stage), count=1)
                # The next scores, of anything after the last tile.
                stage = (t + 1) % C.stages
                if x + 1 < count:
                    mbarrier.wait(full.index(QUERY_FULL + stage), (t + 1) // C.stages & 1)
                k = keys.index(me).reshape([ROWS, C.K])
                q = queries.index(stage).reshape([C.BM, C.K])
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(1, deps=(dq,))
                if LATE:
                    if x > 0:
                        mbarrier.arrive(score_empty.index((t + 1) % 2), count=1)
                        order = _get((plan, VISIT + 2 * ((t - 1) % VISITS)), RANK)
                        _hand_over(a, dq, dq_tiles, broken, rings, order, t - 1, b, g, row, column, ME, C)
                else:
                    _hand_over(a, dq, dq_tiles, broken, rings, order, t, b, g, row, column, ME, C)
                s = warpgroup_mma_wait(0, deps=(s,))
            if LATE:
                t = filled + count - 1
                mbarrier.wait(score_full.index(t % 2), t // 2 & 1)
                dq = _products(scores, keys, t % 2, row, column, nothing, C)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                mbarrier.arrive(score_empty.index(t % 2), count=1)
                mbarrier.arrive(empty.index(KEY_EMPTY), count=1)
                order = _get((plan, VISIT + 2 * (t % VISITS)), RANK)
                _hand_over(a, dq, dq_tiles, broken, rings, order, t, b, g, row, column, ME, C)
            else:
                mbarrier.arrive(empty.index(KEY_EMPTY), count=1)
            loaded += 1
        mbarrier.arrive(empty.index(PLAN_EMPTY + turn % 2), count=1)
        # NaN if a gradient is, or infinite, which the repair does not change.
        bad = (gl.sum(dv_acc, 1) + gl.sum(dk_acc, 1)) * 0.0
        at = broken + ((b * a.G + g) * ((a.N + C.BN - 1) // C.BN) + block) * 2 + ME
        gl.store(at + gl.arange(0, ROWS, gl.SliceLayout(1, K_L)) * 0, 1, mask=bad != bad)
        _wait_read()
        _leave(dv_tiles, [b, g, first, 0], dv_acc.to(dtype), staging.index(ME), C.K)
        _wait_read()
        _leave(dk_tiles, [b, g, first, 0], (dk_acc * a.scale).to(dtype), staging.index(ME), C.K)
        filled += count
        turn += 1
        mbarrier.wait(full.index(PLAN_FULL + turn % 2), turn // 2 & 1)
        count = _get((plan, turn % 2 * ENTRIES), COUNT)
    _wait_read()


@gluon.jit
def _products(scores, keys, slot, row: gl.constexpr, column: gl.constexpr, nothing, C: gl.constexpr):
    """What all keys of the block add to one half of dq, asynchronously."""
    dq = nothing
    for half in gl.static_range(2):
        left = scores.index(slot * 2 + half).slice(row, 64, 1).permute((1, 0))
        right = keys.index(half).reshape([ROWS, C.K]).slice(column, 64, 1)
        dq = warpgroup_mma(left, right, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def _hand_over(a, dq, dq_tiles, broken, rings, order, t, b, g, row: gl.constexpr, column: gl.constexpr, ME: gl.constexpr,
               C: gl.constexpr):  # fmt: skip
    """Give the adder one half of what is added to dq of the t-th tile. For the last block of the tile: add it to the sum of
    the others, which the adder has loaded, and write that half of dq.

    Args:
        order: the tile's RANK.
    """
    sums, staging, plan, full, empty = rings[3], rings[6], rings[-3], rings[-2], rings[-1]
    mbarrier.wait(full.index(SUM_READY), t & 1)
    if order & LAST > 0:
        by_thread: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
        others = _in_rows(sums.index(ME).load(by_thread))
        mbarrier.arrive(empty.index(SUM_FULL), count=1)
        dq += gl.where(order > LAST + 1, gl.convert_layout(others, dq.type.layout), 0.0)
        _wait_read()
        tiles = (a.M + C.BM - 1) // C.BM
        number = _get((plan, VISIT + 2 * (t % VISITS)), TILE)
        tile = number - (b * a.G + g) * (C.H * tiles)
        head = g * C.H
        if C.H > 1:
            h = tile // tiles
            tile -= h * tiles
            head += h
        through = _part(staging.index(ME), dq_tiles)
        _leave(dq_tiles, [b, head, tile * C.BM + row, column], (dq * a.scale).to(dq_tiles.dtype), through, 64)
        # As of keys: NaN or infinite.
        bad = gl.sum(dq, 1) * 0.0
        at = broken + a.B * a.G * ((a.N + C.BN - 1) // C.BN) * 2 + number
        gl.store(at + gl.arange(0, 64, bad.type.layout) * 0, 1, mask=bad != bad)
    else:
        sums.index(ME).store(_in_order(dq))
        fence_async_shared()
        mbarrier.arrive(empty.index(SUM_FULL), count=1)


@gluon.jit
def _leave(tiles, at, x, through, columns: gl.constexpr):
    """Write gradients [64, columns] by TMA, which leaves out rows and columns that are not there."""
    through.reshape([64, columns]).store(x)
    fence_async_shared()
    gl.thread_barrier()
    tma_store(tiles, at, through)


@gluon.jit
def _wait_read():
    """Until what has been written by TMA has been read."""
    token = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    gl.inline_asm_elementwise(READ, "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()


@gluon.jit
def _opaque(n, t):
    """The number n, computed anew in each step t of a loop, as far as the compiler knows. Of shared memory at a fixed place
    it would keep the addresses of all slices that products read in registers, and spill them."""
    return gl.inline_asm_elementwise(MOVE, "=r,r", [t * 0 + n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _weights(s, unit, a, rows, stage, partial, j, b, g, h, layout: gl.constexpr):
    """Weights [keys, queries] from scores without ALiBi.

    Args:
        unit: what makes scores in log2 of s.
        rows: of all stages, statistics, masks and diagonals.
        partial: whether some query does not see all keys.
        j: keys, counted from the block's first.
        layout: of the scores.
    """
    stats, masks, diagonals = rows
    by_query: gl.constexpr = gl.SliceLayout(0, layout)
    s = s * unit - gl.expand_dims(stats.index(2 * stage).load(by_query), 0)
    if a.slopes is not None:
        slope = _term(a, a.slopes + b * a.slopes_b + g * a.slopes_g + h * a.slopes_h)
        # In floats, which are exact up to 2^24: converting every distance takes as long as the exponential.
        s -= slope * gl.abs(j.to(gl.float32) - gl.expand_dims(diagonals.index(stage).load(by_query), 0))
    p = gl.exp2(s)
    if partial:
        # The compiler would compare in every tile and drop the branch around this, but for something it must not move.
        j = gl.inline_asm_elementwise(MOVE, "=r,r", [j], dtype=gl.int32, is_pure=False, pack=1)
        mask = masks.index(stage).load(by_query)
        # Below the first key the difference wraps around and is larger than any width.
        n = (j - gl.expand_dims(mask & 65535, 0)).to(gl.uint32, bitcast=True)
        p = gl.where(n < gl.expand_dims((mask >> 16).to(gl.uint32, bitcast=True), 0), p, 0.0)
    return p


@gluon.jit
def _score_gradients(p, dp, rows, stage, layout: gl.constexpr):
    """Gradients of scores from weights and their gradients; the others as of `_weights`."""
    return p * (dp - gl.expand_dims(rows[0].index(2 * stage + 1).load(gl.SliceLayout(0, layout)), 0))


@gluon.jit
def _in_order(x):
    """64 × 64 elements as [16, 256] in the order in which threads hold them, four by four: rows would conflict in the
    banks of shared memory."""
    # Warp, row + 8, row, columns by 8, pair of columns, column.
    x = x.reshape([4, 2, 8, 8, 4, 2])
    return gl.permute(x, [3, 0, 2, 4, 1, 5]).reshape([16, 256])


@gluon.jit
def _in_rows(x):
    """The 64 × 64 elements that `_in_order` was given."""
    # Columns by 8, warp, row, pair of columns, row + 8, column.
    x = x.reshape([8, 4, 8, 4, 2, 2])
    return gl.permute(x, [1, 4, 2, 0, 3, 5]).reshape([64, 64])


@gluon.jit
def _added(turn, token):
    """How many blocks have been added, in every lane; not read until it is needed."""
    address = (turn + token * 0).to(gl.uint64, bitcast=True)
    return gl.inline_asm_elementwise(ACQUIRE, "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _adder(a, sum_tiles, rings, order, C: gl.constexpr):
    """Adds to dq in memory once it is the block's turn."""
    sums, plan, full, empty = rings[3], rings[-3], rings[-2], rings[-1]
    token = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    turns = order + 1
    filled = 0
    turn = 0
    before = 0
    mbarrier.wait(full.index(PLAN_FULL), 0)
    count = _get((plan, 0), COUNT)
    while count >= 0:
        mbarrier.arrive(empty.index(PLAN_EMPTY + turn % 2), count=1)
        for x in range(count):
            t = filled + x
            mbarrier.wait(full.index(VISIT_FULL + t % VISITS), t // VISITS & 1)
            at = (plan, VISIT + 2 * (t % VISITS))
            tile, rank = _get(at, TILE), _get(at, RANK)
            last = rank & LAST > 0
            rank = rank // 4
            others = last & (rank > 0)
            # Asked while the last tile is still being added and this one is computed.
            added = _added(turns + tile, token)
            if not others:
                # What was there has been read.
                mbarrier.arrive(full.index(SUM_READY), count=1)
            if t > 0:
                token = gl.inline_asm_elementwise(DONE, "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)
                gl.thread_barrier()
                gl.atomic_add(turns + before, 1, sem="release", scope="gpu")
            while gl.max(added, 0) < rank:
                added = _added(turns + tile, token)
            if others:
                token = gl.inline_asm_elementwise(ORDERED, "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)
                gl.thread_barrier()
                mbarrier.expect(full.index(SUM_READY), 2 * sum_tiles.block_type.nbytes)
                for n in gl.static_range(2):
                    tma_load(sum_tiles, [tile * 32 + n * 16, 0], full.index(SUM_READY), sums.index(n))
            mbarrier.wait(empty.index(SUM_FULL), t & 1)
            if not last:
                token = gl.inline_asm_elementwise(ORDERED, "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)
                for n in gl.static_range(2):
                    if rank == 0:
                        tma_store(sum_tiles, [tile * 32 + n * 16, 0], sums.index(n))
                    else:
                        _tma_add(sum_tiles, [tile * 32 + n * 16, 0], sums.index(n))
                token = gl.inline_asm_elementwise(READ, "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)
                gl.thread_barrier()
            before = tile
        filled += count
        turn += 1
        mbarrier.wait(full.index(PLAN_FULL + turn % 2), turn // 2 & 1)
        count = _get((plan, turn % 2 * ENTRIES), COUNT)
    if filled > 0:
        token = gl.inline_asm_elementwise(DONE, "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)
        gl.thread_barrier()
        gl.atomic_add(turns + before, 1, sem="release", scope="gpu")
