"""What comes before and after the backward kernel for Hopper: row statistics; gradients with a NaN. Plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import FRACTION_FREE, INFINITY, LOG2E, Heads, OutputGradient
from keyspan.backends.triton.loads import gradient_pointer
from keyspan.backends.triton.nan_repair import repair_keys, repair_queries
from keyspan.backends.triton.scores import stats_pointer

FINISHED = tl.constexpr(32)
"""Tiles, or blocks of keys, of a program of `hopper_finish_kernel`."""


@triton.jit
def hopper_stats_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, out, grad_lse, lse, stats, order, broken, parts,
                        C: tl.constexpr):  # fmt: skip
    """Stats, see `stats_pointer`: lse in log₂; delta = Σ over V of grad · out [B, M, G, H, V], less the gradient of lse.
    Rows of a tile beyond the last one are as empty ones. Sets `order` and the entries of `broken`, `parts` of them, to 0.

    Grid: (tiles · H · G · B).
    """
    tiles = tl.cdiv(a.M, C.BM)
    program = tl.program_id(0)
    # All heads of a tile lie side by side in memory.
    group = a.G * C.H
    tile = program // group % tiles
    head = program // (group * tiles) * group + program % group
    i = tile * C.BM + tl.arange(0, C.BM)
    there = i < a.M
    heads = Heads(head // (a.G * C.H), head // C.H % a.G, head % C.H)
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    columns = tl.arange(0, C.V)
    mask = there[:, None] & (columns < C.v_dim)[None, :]
    x = tl.load(gradient_pointer(grad, heads, i)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    row = (heads.b.to(tl.int64) * a.M + i) * (a.G * C.H) + heads.g * C.H + heads.h
    x *= tl.load(out + row[:, None] * C.v_dim + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(x, 1)
    stat = head.to(tl.int64) * a.M + i
    if grad_lse is not None:
        delta -= tl.load(grad_lse + stat, mask=there, other=0.0)
    row_lse = tl.load(lse + stat, mask=there, other=-INFINITY) * LOG2E
    # As in `load_lse`: all weights of such rows are 0.
    row_lse = tl.where(tl.abs(row_lse) > FRACTION_FREE, INFINITY, row_lse)
    at, padded = stats_pointer(a, stats, heads, C)
    tl.store(at + i, row_lse)
    tl.store(at + padded + i, delta)
    tl.store(order + 1 + program, 0)
    if program == 0:
        tl.store(order, 0)
    for part in tl.range(program, parts, tl.num_programs(0)):
        tl.store(broken + part, 0)


@triton.jit
def hopper_finish_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, order, broken, dq, dk, dv, C: tl.constexpr):
    """Zeros in dq [B, M, G, H, K] for tiles that see no key; repairs gradients that have a NaN, see `nan_repair`.

    Grid: (⌈tiles · H · G · B / FINISHED⌉ + ⌈key blocks · G · B / FINISHED⌉).
    """
    tiles = tl.cdiv(a.M, C.BM)
    count = tiles * C.H * a.G * a.B
    blocks = tl.cdiv(a.N, C.BN) * a.G * a.B
    program, programs = tl.program_id(0), tl.cdiv(count, FINISHED)
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    n = tl.arange(0, FINISHED)
    if program < programs:
        first = program * FINISHED
        visits = tl.load(order + 1 + first + n, mask=first + n < count, other=1)
        bad = tl.load(broken + 2 * blocks + first + n, mask=first + n < count, other=0)
        if tl.max(tl.where(visits == 0, 1, bad), 0) > 0:
            for at in range(first, tl.minimum(first + FINISHED, count)):
                head = at // tiles
                heads = Heads(head // (a.G * C.H), head // C.H % a.G, head % C.H)
                if tl.load(order + 1 + at) == 0:
                    _clear(a, dq, heads, at % tiles, C)
                if tl.load(broken + 2 * blocks + at) > 0:
                    repair_queries(a, grad, stats, dq, None, None, heads, at % tiles, C)
    else:
        first = (program - programs) * FINISHED
        at = broken + 2 * (first + n)
        bad = tl.load(at, mask=first + n < blocks, other=0) + tl.load(at + 1, mask=first + n < blocks, other=0)
        if tl.max(bad, 0) > 0:
            for block in range(first, tl.minimum(first + FINISHED, blocks)):
                _repair_block(a, grad, stats, broken, dk, dv, block, C)


@triton.jit
def _clear(a, dq, heads, tile, C: tl.constexpr):
    i, columns = tile * C.BM + tl.arange(0, C.BM), tl.arange(0, C.K)
    row = (heads.b.to(tl.int64) * a.M + i) * (a.G * C.H) + heads.g * C.H + heads.h
    mask = (i < a.M)[:, None] & (columns < C.k_dim)[None, :]
    nothing = tl.full([C.BM, C.K], 0.0, tl.float32).to(dq.dtype.element_ty)
    tl.store(dq + row[:, None] * C.k_dim + columns[None, :], nothing, mask=mask)


@triton.jit
def hopper_repair_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, broken, dk, dv, C: tl.constexpr):
    """Repairs gradients of keys and values that have a NaN. Grid: (key blocks · G · B)."""
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    _repair_block(a, grad, stats, broken, dk, dv, tl.program_id(0), C)


@triton.jit
def hopper_repair_queries_kernel(a, grad, grad_b, grad_m, grad_g, grad_h, stats, broken, dq, tiles, C: tl.constexpr):
    """Repairs gradients of queries, BM rows of a head, that have a NaN. Grid: (tiles · H · G · B)."""
    program = tl.program_id(0)
    tile, head = program % tiles, program // tiles
    grad = OutputGradient(grad, grad_b, grad_m, grad_g, grad_h)
    if (tl.load(broken + program) > 0) & (tile * C.BM < a.M):
        heads = Heads(head // (a.G * C.H), head // C.H % a.G, head % C.H)
        repair_queries(a, grad, stats, dq, None, None, heads, tile, C)


@triton.jit
def _repair_block(a, grad, stats, broken, dk, dv, block, C: tl.constexpr):
    if tl.load(broken + 2 * block) + tl.load(broken + 2 * block + 1) > 0:
        blocks = tl.cdiv(a.N, C.BN)
        g, b = block // blocks % a.G, block // blocks // a.G
        repair_keys(a, grad, stats, dk, dv, b, g, block % blocks * C.BN, C)
