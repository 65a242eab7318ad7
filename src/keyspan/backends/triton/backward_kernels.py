"""Backward kernels: recomputation from lse (Dao et al. 2022), each gradient summed by one program in a fixed order.

No atomics: keys' gradients are summed over the query tiles that see them, queries' over the key blocks they see, and a
bias's over the dimensions it broadcasts over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import INT32_MAX, Heads, KeyValue, OutputGradient, Rows
from keyspan.backends.triton.blocks import (
    block_number,
    blocks_from,
    diagonal_span,
    expand_rows,
    far_blocks,
    far_run,
    key_blocks,
    key_bounds,
    load_origin,
    load_range,
    near_run,
    query_rows,
    rows_of_document,
    run_in_order,
    whole_run,
)
from keyspan.backends.triton.loads import (
    gradient_pointer,
    key_pointer,
    load_keys,
    load_tile,
    query_pointer,
    value_pointer,
)
from keyspan.backends.triton.nan_repair import has_nan, repair_keys, repair_queries
from keyspan.backends.triton.scores import (
    dropout_mask,
    exponential,
    far_bias,
    load_lse,
    load_position_bias,
    load_sink,
    load_slope,
    load_stats,
    lost_in_lse,
    score_gradient,
    softcap_gradient,
    softmax_weights,
    stats_pointer,
    sum_by_halves,
    sum_of_keys,
    table_end_sums,
)


class QueryTiles(NamedTuple):
    """TMA descriptors of the query and of the output's gradient, or None."""

    query: Any
    grad: Any


class Wanted(NamedTuple):
    """What a walk of `keys_kernel` sums: the pointers of dk and dv, each of which may be None."""

    dk: Any
    dv: Any


class TileBounds(NamedTuple):
    """What `bounds_kernel` made: pointer, strides over ranges and batch entries, and of how many tiles at most."""

    pointer: Any
    s: Any
    b: Any
    tiles: Any


class TileStarts(NamedTuple):
    """What `starts_kernel` made: pointer or None, and stride over batch entries."""

    pointer: Any
    b: Any


class VisibleTiles(NamedTuple):
    """Query tiles that see some key of a block: start … stop − 1; all rows of full_start … full_stop − 1 see all keys.

    Of the full tiles those before `right` see the block far to their right (beyond the table's reach, or on that side
    of the diagonal), those from `left` on far to their left. Without terms that depend on position all are far.
    """

    start: Any
    stop: Any
    full_start: Any
    full_stop: Any
    right: Any
    left: Any


class RowSums(NamedTuple):
    """Per-row sums over keys that `queries_kernel` makes besides dq, each [BM]."""

    weight: Any
    """Σ p, a sink's included; with natural units, or where what follows is wanted."""
    total: Any
    """Σ ds, where what follows is wanted."""
    dslope: Any
    """−Σ ds · distance: the gradient of ALiBi's slope."""
    distance: Any
    """Σ p · distance."""
    low: Any
    """Σ ds at or beyond the table's reach on the left: the gradient of its first entry."""
    high: Any
    """The same on the right: its last entry."""
    low_weight: Any
    """Σ p of the keys of `low`."""
    high_weight: Any


@triton.jit
def stats_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, out, grad_lse, lse, stats, C: tl.constexpr):
    """Stats, see `stats_pointer`: lse; delta = Σ over V of grad · out [B, M, G, H, V], less the gradient of lse. Only
    with scores in log₂; else `queries_kernel` makes them.

    Grid: (tiles · H · G · B).
    """
    M, G = a.M, a.G
    tiles = tl.cdiv(M, C.BM)
    i = tl.program_id(0) % tiles * C.BM + tl.arange(0, C.BM)
    bgh = tl.program_id(0) // tiles
    heads = Heads(bgh // (G * C.H), bgh // C.H % G, bgh % C.H)
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    columns = tl.arange(0, C.V)
    mask = (i < M)[:, None] & (columns < C.v_dim)[None, :]
    at = gradient_pointer(grad, heads, i)
    x = tl.load(at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)  # [BM, V]
    row = (heads.b.to(tl.int64) * M + i) * (G * C.H) + heads.g * C.H + heads.h
    x *= tl.load(out + row[:, None] * C.v_dim + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = sum_by_halves(x) if C.segment > 0 else tl.sum(x, 1)  # [BM]
    stat = bgh.to(tl.int64) * M + i
    if grad_lse is not None:
        delta -= tl.load(grad_lse + stat, mask=i < M, other=0.0)
    at, rows = stats_pointer(a, stats, heads, C)
    tl.store(at + i, load_lse(lse, tl.minimum(stat, bgh.to(tl.int64) * M + M - 1), C), mask=i < M)
    tl.store(at + rows + i, delta, mask=i < M)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def starts_kernel(a, starts, C: tl.constexpr):
    """Tiles of queries that begin anew with each document: int32 [B or 1, M + 2], the first row of each tile, M behind the
    last tile, and at the end how many tiles there are.

    Grid: (B or 1).
    """
    CHUNK: tl.constexpr = 1024
    b, n = tl.program_id(0), tl.arange(0, CHUNK)
    at = starts + b.to(tl.int64) * (a.M + 2)
    document, count = b * 0, b * 0
    for chunk in tl.range(0, a.M, CHUNK):
        i = chunk + n
        origin = load_origin(a, b, tl.minimum(i, a.M - 1), C)
        before = load_origin(a, b, tl.minimum(tl.maximum(i - 1, 0), a.M - 1), C)
        # First row of each row's document; `document`: of the chunk's first row, if none begins there.
        first = tl.associative_scan(tl.where((origin != before) & (i < a.M), i, document), 0, _larger)
        begins = (i < a.M) & ((i - first) % C.BM == 0)
        tl.store(at + count + tl.cumsum(begins.to(tl.int32), 0) - 1, i, mask=begins)
        count += tl.sum(begins.to(tl.int32), 0)
        document = tl.max(first, 0)
    for chunk in tl.range(count, a.M + 1, CHUNK):
        tl.store(at + chunk + n, a.M, mask=chunk + n <= a.M)
    tl.store(at + a.M + 1, count)


@triton.jit
def query_tile(a, starts, starts_b, b, tile, C: tl.constexpr):
    """First row of a query tile and one past its last."""
    if starts is None:
        start = tile * C.BM
        stop = a.M
    else:
        start = tl.load(starts + b * starts_b + tile)
        stop = tl.load(starts + b * starts_b + tile + 1)
    return start, stop


@triton.jit
def bounds_kernel(a, starts, starts_b, bounds, tiles, C: tl.constexpr):
    """first, full_first, full_last, last, lowest and highest diagonal of every query tile: int32 [S, B or 1, 6, tiles].

    Grid: (tiles · (B or 1), S), or as many more as there may be tiles of `starts_kernel`.
    """
    tile, b, s = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    start, stop = query_tile(a, starts, starts_b, b, tile, C)
    r = start + tl.arange(0, C.BM)
    i, valid = tl.minimum(r, a.M - 1), r < stop
    rows = load_range(a, s, b, i, C)
    first, full_first, full_last, last = key_bounds(a, rows.lo, tl.where(valid, rows.hi, rows.lo))
    lowest, highest = diagonal_span(rows)
    at = bounds + s * 6 * tl.num_programs(0) + b * 6 * tiles + tile
    tl.store(at, first)
    tl.store(at + tiles, full_first)
    tl.store(at + 2 * tiles, full_last)
    tl.store(at + 3 * tiles, last)
    tl.store(at + 4 * tiles, lowest)
    tl.store(at + 5 * tiles, highest)


@triton.jit
def keys_kernel(a, query_tiles, grad_tiles, grad, grad_b, grad_m, grad_g, grad_h, stats, starts, starts_b, bounds,
                bounds_s, bounds_b, bound_tiles, dk, dv, C: tl.constexpr):  # fmt: skip
    """dk [B, N, G, K] and dv [B, N, G, V], contiguous, or one of them alone. Grid: (key blocks · G · B).

    Works on transposed tiles [BN, BM], so that weights leave the softmax as left operands of dv and dk. `starts`: of
    `starts_kernel`, for invariant results; then a key's gradients are those of its document's tiles in their order, which
    no other tile changes.
    """
    key_count = tl.cdiv(a.N, C.BN)
    program = tl.program_id(0)
    block, g, b = program % key_count, program // key_count % a.G, program // key_count // a.G
    n = tl.arange(0, C.BN)
    n0 = block * C.BN
    k = load_keys(key_pointer(a, b, g), a.k_n, n, n0, a.N, True, C.BN, C.K, C.k_dim, 0)  # [BN, K]
    v = load_keys(value_pointer(a, b, g), a.v_n, n, n0, a.N, True, C.BN, C.V, C.v_dim, 0)  # [BN, V]
    dk_acc = tl.full([C.BN, C.K], 0.0, tl.float32)
    dv_acc = tl.full([C.BN, C.V], 0.0, tl.float32)
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    described, wanted = QueryTiles(query_tiles, grad_tiles), Wanted(dk, dv)
    queries = TileStarts(starts, starts_b)
    for s in tl.static_range(max(C.S, 1)):
        tiles = _visible_tiles(a, TileBounds(bounds, bounds_s, bounds_b, bound_tiles), queries, s, b, n0, C)
        if C.segment > 0:
            for h in tl.range(0, C.H):
                if (a.dense is None) and (a.slopes is None) and (a.table is None):
                    for turn in tl.range(0, 2):
                        masked, full = run_in_order(turn, tiles.start, tiles.stop, tiles.full_start, tiles.full_stop)
                        dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, a=a, k=k, v=v, query_tiles=described, grad=grad,
                                                    stats=stats, queries=queries, wanted=wanted, s=s, b=b, g=g, head=h,
                                                    n0=n0, run=masked, MASKED=True, C=C)  # fmt: skip
                        dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, a=a, k=k, v=v, query_tiles=described, grad=grad,
                                                    stats=stats, queries=queries, wanted=wanted, s=s, b=b, g=g, head=h,
                                                    n0=n0, run=full, MASKED=False, C=C)  # fmt: skip
                else:
                    # Terms by position round differently in tiles that are far from the block's keys.
                    run = whole_run(tiles.start, tiles.stop)
                    dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, a=a, k=k, v=v, query_tiles=described, grad=grad,
                                                stats=stats, queries=queries, wanted=wanted, s=s, b=b, g=g, head=h,
                                                n0=n0, run=run, MASKED=True, C=C)  # fmt: skip
        elif a.dense is None:
            far = far_run(tiles.full_start, tiles.full_stop, tiles.right, tiles.left)
            near = near_run(tiles.start, tiles.stop, tiles.full_start, tiles.full_stop, tiles.right, tiles.left)
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, a=a, k=k, v=v, query_tiles=described, grad=grad, stats=stats,
                                        queries=queries, wanted=wanted, s=s, b=b, g=g, head=None, n0=n0, run=far,
                                        MASKED=False, C=C)  # fmt: skip
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, a=a, k=k, v=v, query_tiles=described, grad=grad, stats=stats,
                                        queries=queries, wanted=wanted, s=s, b=b, g=g, head=None, n0=n0, run=near,
                                        MASKED=True, C=C)  # fmt: skip
        else:
            run = whole_run(tiles.start, tiles.stop)
            dk_acc, dv_acc = _keys_walk(dk_acc, dv_acc, a=a, k=k, v=v, query_tiles=described, grad=grad, stats=stats,
                                        queries=queries, wanted=wanted, s=s, b=b, g=g, head=None, n0=n0, run=run,
                                        MASKED=True, C=C)  # fmt: skip
    if a.seed is not None:
        dv_acc *= a.keep_scale
    row = (b.to(tl.int64) * a.N + n0 + n) * a.G + g
    inside = (n0 + n < a.N)[:, None]
    if dk is not None:
        columns = tl.arange(0, C.K)
        tl.store(dk + row[:, None] * C.k_dim + columns[None, :], (dk_acc * a.scale).to(dk.dtype.element_ty),
                 mask=inside & (columns < C.k_dim)[None, :])  # fmt: skip
    if dv is not None:
        columns = tl.arange(0, C.V)
        tl.store(dv + row[:, None] * C.v_dim + columns[None, :], dv_acc.to(dv.dtype.element_ty),
                 mask=inside & (columns < C.v_dim)[None, :])  # fmt: skip
    if has_nan(dk_acc) | has_nan(dv_acc):
        tl.debug_barrier()
        repair_keys(a, grad, stats, dk, dv, b, g, n0, C)


@triton.jit
def _visible_tiles(a, bounds, queries, s: tl.constexpr, b, n0, C: tl.constexpr):
    """The query tiles that see some of keys n0 … n0 + BN − 1."""
    tiles = tl.cdiv(a.M, C.BM)
    if queries.pointer is not None:
        tiles = tl.load(queries.pointer + b * queries.b + a.M + 1)
    zero = n0 * 0
    right_last, left_first, right_count, left_count = zero, zero + INT32_MAX, zero, zero
    if C.S == 0:
        start, stop, full_start = zero, zero + tiles, zero
        full_stop = tl.where(n0 + C.BN <= a.N, zero + a.M // C.BM, zero)
    else:
        CHUNK: tl.constexpr = 256
        at = bounds.pointer + s * bounds.s + b * bounds.b
        start, stop, full_start, full_stop, count = zero + INT32_MAX, zero, zero + INT32_MAX, zero, zero
        for chunk in tl.range(0, tiles, CHUNK):
            t = chunk + tl.arange(0, CHUNK)  # [CHUNK]
            inside = t < tiles
            first = tl.load(at + t, mask=inside, other=INT32_MAX)
            full_first = tl.load(at + bounds.tiles + t, mask=inside, other=INT32_MAX)
            full_last = tl.load(at + 2 * bounds.tiles + t, mask=inside, other=0)
            last = tl.load(at + 3 * bounds.tiles + t, mask=inside, other=0)
            seen = (first < n0 + C.BN) & (last > n0)
            full = (full_first <= n0) & (full_last >= n0 + C.BN)
            start = tl.minimum(start, tl.min(tl.where(seen, t, INT32_MAX), 0))
            stop = tl.maximum(stop, tl.max(tl.where(seen, t + 1, 0), 0))
            full_start = tl.minimum(full_start, tl.min(tl.where(full, t, INT32_MAX), 0))
            full_stop = tl.maximum(full_stop, tl.max(tl.where(full, t + 1, 0), 0))
            count += tl.sum(full.to(tl.int32), 0)
            if (a.slopes is not None) or (a.table is not None):
                is_left = full & (
                    n0 + (C.BN - 1) - tl.load(at + 4 * bounds.tiles + t, mask=inside, other=0) <= -a.reach
                )
                is_right = full & (n0 - tl.load(at + 5 * bounds.tiles + t, mask=inside, other=0) >= a.reach)
                left_first = tl.minimum(left_first, tl.min(tl.where(is_left, t, INT32_MAX), 0))
                right_last = tl.maximum(right_last, tl.max(tl.where(is_right, t + 1, 0), 0))
                left_count += tl.sum(is_left.to(tl.int32), 0)
                right_count += tl.sum(is_right.to(tl.int32), 0)
        # Full tiles that are not one run of numbers are treated as the others.
        run = (count > 0) & (count == full_stop - full_start)
        start = tl.minimum(start, stop)
        full_start = tl.where(run, full_start, start)
        full_stop = tl.where(run, full_stop, start)
    right, left = full_stop, full_stop
    if (a.slopes is not None) or (a.table is not None):
        # So are far tiles that are not one run at either end of the full ones.
        left = tl.where((left_count > 0) & (left_first + left_count == full_stop),
                        tl.maximum(left_first, full_start), full_stop)  # fmt: skip
        right = tl.where((right_count > 0) & (right_last - right_count == full_start),
                         tl.minimum(right_last, left), full_start)  # fmt: skip
    return VisibleTiles(start, stop, full_start, full_stop, right, left)


@triton.jit
def _keys_walk(dk, dv, a, k, v, query_tiles, grad, stats, queries, wanted, s: tl.constexpr, b, g, head, n0, run,
               MASKED: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """dk and dv of one key block, with the query tiles of `run` added, for one head or, if it is None, all of the group."""
    count = tl.maximum(run.stop - run.start, 0)
    r = tl.arange(0, C.BM)
    n = tl.arange(0, C.BN)
    j = (n0 + n)[:, None]  # [BN, 1]
    position = load_position_bias(a, Heads(b, g, 0), C)
    HEADS: tl.constexpr = C.H if head is None else 1
    for u in tl.range(0, count * HEADS, num_stages=1 if MASKED and a.table is not None else None):
        turn = u // tl.maximum(count, 1) if HEADS > 1 else u * 0
        h = turn if head is None else head
        t = run.start + (u - turn * count)
        i0, stop = query_tile(a, queries.pointer, queries.b, b, block_number(run, t), C)
        heads = Heads(b, g, h)
        if C.descriptors:
            q = query_tiles.query.load([b, g, h, i0, 0]).reshape(C.BM, C.K)
        else:
            q = load_tile(query_pointer(a, heads, i0), r, a.q_m, stop - i0, MASKED, C.K, C.k_dim)
        qk = tl.dot(k, tl.trans(q), input_precision=C.precision)  # [BN, BM]
        # A vector over rows takes as many registers as a row of the tile has columns: each is read where it is needed.
        i = i0 + r
        if MASKED and queries.pointer is not None:
            i = tl.minimum(i, a.M - 1)
        rows = load_range(a, s, b, i, C, i0 + r < stop if MASKED else None)
        expanded = Rows(i[None, :], rows.lo[None, :], rows.hi[None, :], rows.diagonal[None, :])  # each [1, BM]
        stat, padded = stats_pointer(a, stats, heads, C)
        row_lse = tl.load(stat + i)[None, :]
        lost = 0.0
        if C.natural:
            lost = tl.load(stat + 2 * padded + i)[None, :]
        position_h = position
        if C.H > 1:
            position_h = load_position_bias(a, heads, C)
        tilt = 0.0
        if not MASKED:
            tilt, shift = far_bias(a, position_h, t >= run.x0, n0, expanded.diagonal)
            tilt, row_lse = tilt * n[:, None].to(tl.float32), row_lse - shift
        # p: [BN, BM]
        p, tanh = softmax_weights(qk, a, heads, expanded, j, position_h.slope, tilt, row_lse, lost, MASKED, C)
        if C.descriptors:
            do = query_tiles.grad.load([b, g, h, i0, 0]).reshape(C.BM, C.V)
        else:
            do = load_tile(gradient_pointer(grad, heads, i0), r, grad.m, stop - i0, MASKED, C.V, C.v_dim)
        dropped = p
        if wanted.dk is not None:
            dp = tl.dot(v, tl.trans(do), input_precision=C.precision)  # [BN, BM]
        if a.seed is not None:
            keep = tl.trans(dropout_mask(a, b, i * 0 + g * C.H + h, i, n0, C.BM, C.BN, C))
            dropped = tl.where(keep, p, 0.0)
            if wanted.dk is not None:
                dp = tl.where(keep, dp * a.keep_scale, 0.0)
        if wanted.dk is not None:
            # Memory behind the last row is uninitialised: a NaN there would not be hidden.
            delta = tl.load(stat + padded + i, mask=i < a.M if MASKED else None, other=0.0 if MASKED else None)
            ds = softcap_gradient(p * (dp - delta[None, :]), tanh, C)
        if wanted.dv is not None:
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=C.precision)
        if wanted.dk is not None:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=C.precision)
    return dk, dv


@triton.jit
def queries_kernel(a, key_tiles, value_tiles, grad, grad_b, grad_m, grad_g, grad_h, out, grad_lse, lse, stats, dq,
                   dslopes, dends, C: tl.constexpr):  # fmt: skip
    """dq [B, M, G, H, K]; stats, see `stats_pointer`, since their inputs are loaded here anyway; if wanted, per row, the
    gradient of ALiBi's slope [B, G, H, M] and of the table's first and last entry [2, B, G, H, M].

    Grid: (tiles · H · G · B).
    """
    tiles = tl.cdiv(a.M, C.BM)
    program = tl.program_id(0)
    # The last tiles, which are the long ones of a causal mask, run first.
    tile, head = tiles - 1 - program % tiles, program // tiles
    h, g, b = head % C.H, head // C.H % a.G, head // C.H // a.G
    i, _, valid = query_rows(a, tile * C.BM, 0, C.BM, C)  # [BM]
    r = tl.arange(0, C.BM)
    i0 = tile * C.BM
    heads = Heads(b, g, h)
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    # Before the tiles are loaded: behind them it costs 5 % of the kernel's time.
    rows = load_range(a, 0, b, i, C)
    blocks = key_blocks(a, rows, 0, 1, C.BN)
    q = load_tile(query_pointer(a, heads, i0), r, a.q_m, a.M - i0, True, C.K, C.k_dim)  # [BM, K]
    do = load_tile(gradient_pointer(grad, heads, i0), r, grad.m, a.M - i0, True, C.V, C.v_dim)  # [BM, V]
    stat = head.to(tl.int64) * a.M + i
    row = (b.to(tl.int64) * a.M + i) * (a.G * C.H) + g * C.H + h
    columns = tl.arange(0, C.V)
    weighted = tl.load(out + row[:, None] * C.v_dim + columns[None, :], mask=(columns < C.v_dim)[None, :], other=0.0)
    delta = do.to(tl.float32) * weighted.to(tl.float32)
    delta = sum_by_halves(delta) if C.segment > 0 else tl.sum(delta, 1)  # [BM]
    if grad_lse is not None:
        delta -= tl.load(grad_lse + stat)
    row_lse = load_lse(lse, stat, C)
    at, padded = stats_pointer(a, stats, heads, C)
    tl.store(at + i, row_lse, mask=valid)
    tl.store(at + padded + i, delta, mask=valid)
    kv = KeyValue(key_pointer(a, b, g), value_pointer(a, b, g), key_tiles, value_tiles)
    position = load_position_bias(a, heads, C)
    acc = tl.full([C.BM, C.K], 0.0, tl.float32)
    zero = tl.full([C.BM], 0.0, tl.float32)
    weight = zero
    if a.sinks is not None:
        weight += exponential(load_sink(a, heads, C) - row_lse, C)
    sums = RowSums(weight, zero, zero, zero, zero, zero, zero, zero)
    wanted = RowSums(None, None, dslopes, dslopes, dends, dends, dends, dends)
    if C.segment > 0:
        acc, sums = _queries_documents(acc, sums, a=a, q=q, do=do, lse=row_lse, delta=delta, kv=kv, heads=heads, i=i,
                                       position=position, wanted=wanted, C=C)  # fmt: skip
    else:
        for s in tl.static_range(max(C.S, 1)):
            if s > 0:
                rows = load_range(a, s, b, i, C)
                blocks = key_blocks(a, rows, 0, 1, C.BN)
            if a.dense is None:
                left, right = far_blocks(a, blocks, rows, C.BN)
                far = far_run(blocks.full_start, blocks.full_stop, left, right)
                near = near_run(blocks.start, blocks.stop, blocks.full_start, blocks.full_stop, left, right)
                acc, sums = _queries_walk(acc, sums, a=a, q=q, do=do, lse=row_lse, delta=delta, kv=kv, heads=heads, rows=rows,
                                          position=position, wanted=wanted, blocks=blocks, run=far, MASKED=False,
                                          C=C)  # fmt: skip
                acc, sums = _queries_walk(acc, sums, a=a, q=q, do=do, lse=row_lse, delta=delta, kv=kv, heads=heads, rows=rows,
                                          position=position, wanted=wanted, blocks=blocks, run=near, MASKED=True,
                                          C=C)  # fmt: skip
            else:
                run = whole_run(blocks.start, blocks.stop)
                acc, sums = _queries_walk(acc, sums, a=a, q=q, do=do, lse=row_lse, delta=delta, kv=kv, heads=heads, rows=rows,
                                          position=position, wanted=wanted, blocks=blocks, run=run, MASKED=True,
                                          C=C)  # fmt: skip
    rest = zero + 1.0
    if C.natural:
        # What the weights sum to is known now: all sums are linear in them.
        lost = lost_in_lse(row_lse, sums.weight)
        tl.store(at + 2 * padded + i, lost, mask=valid)
        rest = tl.math.exp2(-lost)
        acc *= rest[:, None]
        sums = RowSums(
            sums.weight * rest, sums.total * rest, sums.dslope * rest, sums.distance * rest, sums.low * rest,
            sums.high * rest, sums.low_weight * rest, sums.high_weight * rest,
        )  # fmt: skip
    columns = tl.arange(0, C.K)
    tl.store(dq + row[:, None] * C.k_dim + columns[None, :], (acc * a.scale).to(dq.dtype.element_ty),
             mask=valid[:, None] & (columns < C.k_dim)[None, :])  # fmt: skip
    if (dslopes is not None) or (dends is not None):
        # A row's gradients of scores sum to that of lse, a sink's included, but for the rounding of `out`, which delta
        # carries to each score in proportion to its weight. Times the distances, or summed over the many keys of a
        # table's end, it can exceed the gradient. fp32 rounds no more than these sums do.
        excess = zero
        if q.dtype != tl.float32 or out.dtype.element_ty != tl.float32 or C.precision == "tf32":
            excess = sums.total
            if grad_lse is not None:
                excess -= tl.load(grad_lse + stat)
            if a.sinks is not None:
                excess -= exponential(load_sink(a, heads, C) - row_lse, C) * rest * delta
            # Where weights do not sum to 1, `out` and lse are those of more keys than these.
            rounding = 2e-5 + 2.0**-21 * tl.abs(row_lse)
            excess = tl.where(tl.abs(sums.weight - 1.0) <= rounding, excess, 0.0)
    if dslopes is not None:
        tl.store(dslopes + stat, sums.dslope + excess * sums.distance, mask=valid)
    if dends is not None:
        tl.store(dends + stat, sums.low - excess * sums.low_weight, mask=valid)
        high = dends + (tl.num_programs(0) // tiles).to(tl.int64) * a.M
        tl.store(high + stat, sums.high - excess * sums.high_weight, mask=valid)
    if has_nan(acc):
        tl.debug_barrier()
        repair_queries(a, grad, stats, dq, dslopes, dends, heads, tile, C)


@triton.jit
def _queries_documents(acc, sums, a, q, do, lse, delta, kv, heads, i, position, wanted, C: tl.constexpr):
    """dq and row sums of one query tile, document by document: a row's are those of its own document's blocks, in their
    order, see `_documents` of the forward pass."""
    origin = load_origin(a, heads.b, i, C)
    document = tl.min(origin, 0)
    while document < INT32_MAX:
        for s in tl.static_range(max(C.S, 1)):
            rows = rows_of_document(load_range(a, s, heads.b, i, C), origin, document)
            first, _1, _2, _3 = key_bounds(a, rows.lo, rows.hi)
            blocks = blocks_from(a, rows, tl.minimum(document, first), INT32_MAX, C.BN)
            if (a.dense is None) and (a.slopes is None) and (a.table is None):
                for turn in tl.range(0, 2):
                    masked, full = run_in_order(turn, blocks.start, blocks.stop, blocks.full_start, blocks.full_stop)
                    acc, sums = _queries_walk(acc, sums, a=a, q=q, do=do, lse=lse, delta=delta, kv=kv, heads=heads,
                                              rows=rows, position=position, wanted=wanted, blocks=blocks, run=masked,
                                              MASKED=True, C=C)  # fmt: skip
                    acc, sums = _queries_walk(acc, sums, a=a, q=q, do=do, lse=lse, delta=delta, kv=kv, heads=heads,
                                              rows=rows, position=position, wanted=wanted, blocks=blocks, run=full,
                                              MASKED=False, C=C)  # fmt: skip
            else:
                run = whole_run(blocks.start, blocks.stop)
                acc, sums = _queries_walk(acc, sums, a=a, q=q, do=do, lse=lse, delta=delta, kv=kv, heads=heads, rows=rows,
                                          position=position, wanted=wanted, blocks=blocks, run=run, MASKED=True,
                                          C=C)  # fmt: skip
        document = tl.min(tl.where(origin > document, origin, INT32_MAX), 0)
    return acc, sums


@triton.jit
def _queries_walk(acc, sums, a, q, do, lse, delta, kv, heads, rows, position, wanted, blocks, run,
                  MASKED: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """dq and row sums of one query tile, with the key blocks of `run` added; `wanted`: which sums, None for not."""
    weight, total, dslope, weighted_distance, low, high, low_weight, high_weight = sums
    n = tl.arange(0, C.BN)
    expanded = expand_rows(rows)
    for t in tl.range(run.start, run.stop, num_stages=1 if MASKED and a.table is not None else None):
        j0 = blocks.begin + block_number(run, t) * C.BN
        if C.segment == 0:
            j0 = tl.multiple_of(j0, 16)
        j = (j0 + n)[None, :]  # [1, BN]
        if C.descriptors:
            k = kv.key_tiles.load([heads.b, heads.g, j0, 0]).reshape(C.BN, C.K)
            v = kv.value_tiles.load([heads.b, heads.g, j0, 0]).reshape(C.BN, C.V)
        else:
            k = load_keys(kv.key, a.k_n, n, j0, blocks.last, MASKED, C.BN, C.K, C.k_dim, 0)
            v = load_keys(kv.value, a.v_n, n, j0, blocks.last, MASKED, C.BN, C.V, C.v_dim, 0)
        qk = tl.dot(q, tl.trans(k), input_precision=C.precision)  # [BM, BN]
        tilt, shift = 0.0, 0.0
        if not MASKED:
            tilt, shift = far_bias(a, position, t < run.x0, j0, rows.diagonal)
            tilt = tilt * n[None, :].to(tl.float32)
        p, tanh = softmax_weights(qk, a, heads, expanded, j, position.slope, tilt, (lse - shift)[:, None], 0.0, MASKED,
                                  C)  # fmt: skip
        by_position: tl.constexpr = (wanted.dslope is not None) or (wanted.low is not None)
        # What needs the weights comes before their gradients, which then take the registers of the weights.
        if C.natural or by_position:
            weight += sum_of_keys(p, a, C)
        if wanted.dslope is not None:
            weighted_distance += tl.sum(p * tl.abs(j - expanded.diagonal).to(tl.float32), 1)
        if wanted.low is not None:
            below, above = _end_sums(a, p, j - expanded.diagonal, t < run.x0, MASKED)
            low_weight += below
            high_weight += above
        dp = tl.dot(do, tl.trans(v), input_precision=C.precision)  # [BM, BN]
        if a.seed is not None:
            keep = dropout_mask(a, heads.b, rows.i * 0 + heads.g * C.H + heads.h, rows.i, j0, C.BM, C.BN, C)
            dp = tl.where(keep, dp * a.keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if by_position:
            total += tl.sum(ds, 1)
        if wanted.dslope is not None:
            dslope -= tl.sum(ds * tl.abs(j - expanded.diagonal).to(tl.float32), 1)
        if wanted.low is not None:
            below, above = _end_sums(a, ds, j - expanded.diagonal, t < run.x0, MASKED)
            low += below
            high += above
        ds = softcap_gradient(ds, tanh, C)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=C.precision)
    return acc, RowSums(weight, total, dslope, weighted_distance, low, high, low_weight, high_weight)


@triton.jit
def _end_sums(a, x, distance, is_left, MASKED: tl.constexpr):
    """`table_end_sums`; all of a far tile belongs to one end."""
    if MASKED:
        low, high = table_end_sums(a, x, distance)
    else:
        total = tl.sum(x, 1)
        low, high = tl.where(is_left, total, 0.0), tl.where(is_left, 0.0, total)
    return low, high


@triton.jit
def _score_tile(a, grad, stats, s: tl.constexpr, heads, i, valid, i0, j0, last, C: tl.constexpr):
    """Gradient of the biased scores of one tile [BM, BN], 0 where hidden."""
    r, n = tl.arange(0, C.BM), tl.arange(0, C.BN)
    q = load_tile(query_pointer(a, heads, i0), r, a.q_m, a.M - i0, True, C.K, C.k_dim)
    do = load_tile(gradient_pointer(grad, heads, i0), r, grad.m, a.M - i0, True, C.V, C.v_dim)
    known = load_stats(a, stats, heads, i, C)
    k = load_keys(key_pointer(a, heads.b, heads.g), a.k_n, n, j0, last, True, C.BN, C.K, C.k_dim, 0)
    v = load_keys(value_pointer(a, heads.b, heads.g), a.v_n, n, j0, last, True, C.BN, C.V, C.v_dim, 0)
    rows = load_range(a, s, heads.b, i, C)
    expanded = expand_rows(Rows(i, rows.lo, tl.where(valid, rows.hi, rows.lo), rows.diagonal))
    qk = tl.dot(q, tl.trans(k), input_precision=C.precision)
    j = (j0 + n)[None, :]
    p, _ = softmax_weights(qk, a, heads, expanded, j, load_slope(a, heads, C), 0.0, known.lse[:, None],
                           known.lost[:, None], True, C)  # fmt: skip
    dp = tl.dot(do, tl.trans(v), input_precision=C.precision)
    if a.seed is not None:
        keep = dropout_mask(a, heads.b, i * 0 + heads.g * C.H + heads.h, i, j0, C.BM, C.BN, C)
        dp = tl.where(keep, dp * a.keep_scale, 0.0)
    return score_gradient(p, dp, known.delta[:, None])


@triton.jit
def bias_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, dbias, Bb, Gb, Hb, Mb, Nb, C: tl.constexpr):
    """dbias [Bb, Gb, Hb, Mb, Nb], contiguous, each dimension 1 or as the scores'; summed over those that are 1.

    Grid: (key blocks or 1 · row tiles or 1 · Hb · Gb · Bb). A program owns one tile of dbias and visits all score tiles
    that are summed into it.
    """
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    tiles, blocks = tl.cdiv(a.M, C.BM), tl.cdiv(a.N, C.BN)
    own_tiles, own_blocks = tl.cdiv(Mb, C.BM), tl.cdiv(Nb, C.BN)
    block_p, tile_p = tl.program_id(0) % own_blocks, tl.program_id(0) // own_blocks % own_tiles
    bgh = tl.program_id(0) // own_blocks // own_tiles
    b_p, g_p, h_p = bgh // (Gb * Hb), bgh // Hb % Gb, bgh % Hb
    # How many of each dimension are summed into this program's tile.
    b_n, g_n, h_n = a.B // Bb, a.G // Gb, C.H // Hb
    t_n = tl.where(Mb == 1, tiles, 1)
    n_n = tl.where(Nb == 1, blocks, 1)
    r = tl.arange(0, C.BM)
    total = tl.full([C.BM, C.BN], 0.0, tl.float32)
    for u in tl.range(0, b_n * g_n * h_n * t_n * n_n):
        block = block_p + u % n_n
        tile = tile_p + u // n_n % t_n
        x = u // n_n // t_n
        h, g, b = h_p + x % h_n, g_p + x // h_n % g_n, b_p + x // h_n // g_n
        i0, j0 = tile * C.BM, block * C.BN
        i = tl.minimum(i0 + r, a.M - 1)
        for s in tl.static_range(max(C.S, 1)):
            rows = load_range(a, s, b, i, C)
            first, _1, _2, last = key_bounds(a, rows.lo, rows.hi)
            if (first < j0 + C.BN) & (last > j0):
                total += _score_tile(a=a, grad=grad, stats=stats, s=s, heads=Heads(b, g, h), i=i, valid=i0 + r < a.M,
                                     i0=i0, j0=j0, last=tl.minimum(last, a.N), C=C)  # fmt: skip
    row = (bgh.to(tl.int64) * Mb + tile_p * C.BM) * Nb + block_p * C.BN
    n = tl.arange(0, C.BN)
    i, j = tile_p * C.BM + r, block_p * C.BN + n
    kind = dbias.dtype.element_ty
    if Mb == 1 and Nb == 1:
        tl.store(dbias + row, tl.sum(tl.sum(total, 1), 0).to(kind))
    elif Mb == 1:
        tl.store(dbias + row + n, tl.sum(total, 0).to(kind), mask=j < Nb)
    elif Nb == 1:
        tl.store(dbias + row + r, tl.sum(total, 1).to(kind), mask=i < Mb)
    else:
        at = dbias + row + r.to(tl.int64)[:, None] * Nb + n[None, :]
        tl.store(at, total.to(kind), mask=(i < Mb)[:, None] & (j < Nb)[None, :])


@triton.jit
def table_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, parts, C: tl.constexpr):
    """Parts [slots, G, H, 2R + 1] of the relative table's gradient, but for its two ends, which `queries_kernel` sums.

    Grid: (slots, G · H). A slot takes every `slots`-th query tile and, of the keys, those within reach. The scores of a
    tile are summed along its diagonals: a gather shifts each row by its diagonal, so that a column holds one distance.
    """
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    W: tl.constexpr = 2 * C.BN
    slot, slots, gh = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    g, h = gh // C.H, gh % C.H
    tiles = tl.cdiv(a.M, C.BM)
    r, w = tl.arange(0, C.BM), tl.arange(0, W)
    part = parts + (slot * a.G * C.H + gh).to(tl.int64) * (2 * a.reach + 1)
    for turn in tl.range(0, tl.cdiv(2 * a.reach + 1, W)):
        tl.store(part + turn * W + w, 0.0, mask=turn * W + w < 2 * a.reach + 1)
    for turn in tl.range(0, tl.cdiv(tiles * a.B - slot, slots)):
        item = slot + turn * slots
        tile, b = item % tiles, item // tiles
        i0 = tile * C.BM
        i = tl.minimum(i0 + r, a.M - 1)
        for s in tl.static_range(max(C.S, 1)):
            rows = load_range(a, s, b, i, C)
            first, _1, _2, last = key_bounds(a, rows.lo, rows.hi)
            lowest, highest = diagonal_span(rows)
            # Where no row sees anything, `last` is 0 and the span is empty.
            begin = tl.maximum(first, tl.minimum(lowest, last + a.reach) - a.reach + 1) // 16 * 16
            end = tl.minimum(last, highest + a.reach)
            for block in tl.range(0, tl.cdiv(end - tl.minimum(begin, end), C.BN)):
                j0 = begin + block * C.BN
                ds = _score_tile(a=a, grad=grad, stats=stats, s=s, heads=Heads(b, g, h), i=i, valid=i0 + r < a.M,
                                 i0=i0, j0=j0, last=last, C=C)  # fmt: skip
                for window in tl.range(0, tl.cdiv(C.BN + highest - lowest, W)):
                    d0 = j0 - highest + window * W
                    column = (d0 + w)[None, :] + (rows.diagonal - j0)[:, None]  # [BM, W]
                    shifted = tl.gather(ds, tl.minimum(tl.maximum(column, 0), C.BN - 1), 1)
                    x = tl.sum(tl.where((column >= 0) & (column < C.BN), shifted, 0.0), 0)
                    d = d0 + w
                    inside = (d > -a.reach) & (d < a.reach)
                    at = part + d + a.reach
                    # Another thread may have written in the last round what this one reads now.
                    tl.debug_barrier()
                    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)
