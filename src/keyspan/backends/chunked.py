"""Online-softmax attention over chunks of keys, in plain torch: every problem on every device, in O(M) memory.

Derivation: docs/development/algorithm.md. Forward: Milakov & Gimelshein 2018, Rabe & Staats 2021; backward:
recomputation from lse, Dao et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from keyspan.backends import Gradients, Needs
from keyspan.backends.common import dequantized, visible_matmul
from keyspan.backends.schedule import RowBlock, Span, row_blocks, uniform_row_blocks
from keyspan.core.dropout import kept
from keyspan.core.problem import Problem

ROWS = 256
"""Largest number of query rows in a task; a power of two."""
ELEMENTS = 2**19
"""Scores held at a time, over all heads of a task: 2 MiB in fp32, which fits a CPU's L2 or L3 cache."""
OVERHEAD = 80_000
"""Fixed cost of a task, in elements: dozens of torch calls of a few µs, at about 1 ns per element."""
LARGE_LSE = 64
"""Rows with an lse of a larger magnitude have their weights normalised again in backward.

lse = peak + log Σ is rounded to the peak's precision: in fp32 nothing of log Σ is left at a peak of −10⁹, say of a row
that a bias hides wholly, and weights exp(score − lse) sum to N instead of 1. Backward sums such rows' weights first and
divides by the sum. Scores stay in natural units: times log₂e the smallest finite number overflows. The difference
score − lse comes first: only it is small.
"""


def reason_against(problem: Problem) -> str | None:
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    B, M, G, H, _ = problem.query.shape
    V = problem.value.shape[-1]
    out = problem.query.new_zeros((B, M, G, H, V), dtype=problem.output_dtype)
    lse = problem.query.new_full((B, G, H, M), -torch.inf, dtype=problem.compute_dtype)
    for task in _tasks(problem):
        query = task.query()
        peak, total, acc = task.start(V)
        for chunk in task.chunks():
            score, visible, _ = task.scores(query, chunk)
            highest = torch.maximum(peak, score.amax(-1, keepdim=True))
            # The pivot stays finite for rows that have seen no key yet: −inf − −inf would be NaN.
            pivot = highest.masked_fill(highest == -torch.inf, 0)
            weight = score.sub_(pivot).exp_()
            shrink = torch.exp(peak - pivot)
            total = total * shrink + weight.sum(-1, keepdim=True)
            keep = task.keep(chunk)
            if keep is not None:
                weight = weight * keep
            value = task.load_keys(problem.value, chunk, problem.value_scale)
            acc.mul_(shrink)
            if visible is None:
                _add_product(acc, weight, value)
            else:
                acc += _grouped(visible_matmul, weight, value, visible)
            peak = highest
        empty = total == 0  # not where it is NaN
        total.masked_fill_(empty, 1)
        out[task.rows] = task.unpermute(acc.div_(total)).to(out.dtype)
        lse[task.stats] = torch.where(empty, -torch.inf, peak + total.log())[..., 0]
    return out, lse


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    dtype = problem.compute_dtype

    def zeros(x: Tensor | None, needed: bool) -> Tensor | None:
        return x.new_zeros(x.shape, dtype=dtype) if x is not None and needed else None

    dq = zeros(problem.query, needs.query)
    dk, dv = zeros(problem.key, needs.key), zeros(problem.value, needs.value)
    dslopes, dtable, dsinks = (
        zeros(getattr(problem, name), getattr(needs, name)) for name in ("slopes", "table", "sinks")
    )
    dbiases = [zeros(x, needed) for x, needed in zip(problem.biases, needs.biases, strict=True)]
    scores_needed = any(x is not None for x in (dq, dk, dslopes, dtable, *dbiases))

    for task in _tasks(problem):
        query = task.query()
        grad = task.load_rows(grad_out)
        row_lse = lse[task.stats][..., None]
        delta = (grad * task.load_rows(out)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[task.stats][..., None]
        # An empty row has lse −inf. With +inf instead its weights are 0.
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf)
        has_nan = bool(torch.isnan(row_lse).any())
        lost = task.lost_in_lse(query, row_lse)
        sink_weight = None
        if problem.sinks is not None:
            sink_weight = torch.exp(task.heads(problem.sinks.to(dtype))[..., None, None] - row_lse - lost)
            if dsinks is not None:
                dsinks[task.groups] -= torch.where(sink_weight > 0, sink_weight * delta, 0).sum((0, 3, 4))
        dquery = torch.zeros_like(query) if dq is not None else None
        sums = _PositionSums.zeros(row_lse[..., 0], dslopes, dtable)
        for chunk in task.chunks():
            score, visible, slope = task.scores(query, chunk)
            weight = score.sub_(row_lse).sub_(lost).exp_()
            if visible is not None and has_nan:
                weight.masked_fill_(~visible, 0)  # −inf less an lse of NaN
            keep = task.keep(chunk)
            if dv is not None:
                dropped = weight if keep is None else weight * keep
                task.accumulate(dv, chunk, _transposed_product(dropped, grad, visible))
            if not scores_needed:
                continue
            value = task.load_keys(problem.value, chunk)
            dscore = _grouped(torch.matmul, grad, value.transpose(-1, -2))
            if keep is not None:
                dscore.mul_(keep)
            dscore = dscore.sub_(delta).mul_(weight)
            if visible is not None:
                dscore.masked_fill_(~visible, 0)
            for dbias in dbiases:
                if dbias is not None:
                    task.accumulate_bias(dbias, chunk, dscore)
            if sums is not None:
                task.accumulate_by_distance(dtable, sums, chunk, weight, dscore)
            if slope is not None:
                dscore.mul_(slope)
            if dquery is not None:
                key = task.load_keys(problem.key, chunk)
                if visible is None:
                    _add_product(dquery, dscore, key)
                else:
                    dquery += _grouped(visible_matmul, dscore, key, visible)
            if dk is not None:
                task.accumulate(dk, chunk, _transposed_product(dscore, query, visible))
        if sums is not None:
            if sink_weight is not None:
                sums.weight.add_(sink_weight[..., 0])
                sums.grad.sub_((sink_weight * delta)[..., 0])
            if out.dtype == dtype:
                excess = torch.zeros_like(sums.grad)
            else:
                excess = sums.grad if grad_lse is None else sums.grad - grad_lse[task.stats]
                excess = torch.where((sums.weight - 1).abs() < 2e-5, excess, 0)
            task.add_position_sums(dslopes, dtable, sums, excess)
        if dq is not None and dquery is not None:
            dq[task.rows] = task.unpermute(dquery.mul_(problem.scale))

    def like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
        return None if grad is None or x is None else grad.to(x.dtype)

    return Gradients(
        like(dq, problem.query),
        like(dk, problem.key),
        like(dv, problem.value),
        like(dslopes, problem.slopes),
        like(dtable, problem.table),
        like(dsinks, problem.sinks),
        [like(grad, x) for grad, x in zip(dbiases, problem.biases, strict=True)],
    )


class _Chunk(NamedTuple):
    """Keys begin … end − 1 of range `range`; `full`: every row of the task sees them all."""

    range: int
    begin: int
    end: int
    full: bool


class _PositionSums(NamedTuple):
    """Sums over a row's keys, `[b, g, H, m]`, for the gradients of ALiBi slopes and of a table's first and last entry.

    The gradients of a row's scores sum to that of lse, a sink's included, but for the rounding of `out`, which delta
    carries to every score in proportion to its weight. Times the distances, or summed over the many keys of a table's
    end, it can exceed the gradient: it is taken out. Not where `out` is stored as it was computed, and not where
    weights do not sum to 1: there `out` and lse are those of more keys than these.
    """

    grad: Tensor
    weight: Tensor
    by_distance: tuple[Tensor, Tensor] | None
    """Gradients and weights, times the distance."""
    ends: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    """Gradients and weights of the keys at or beyond the table's first distance, and its last."""

    @classmethod
    def zeros(cls, like: Tensor, dslopes: Tensor | None, dtable: Tensor | None) -> _PositionSums | None:
        if dslopes is None and dtable is None:
            return None

        def pair() -> tuple[Tensor, Tensor]:
            return torch.zeros_like(like), torch.zeros_like(like)

        return cls(*pair(), None if dslopes is None else pair(), None if dtable is None else (pair(), pair()))


class _Task(NamedTuple):
    """One row block for some batch entries and groups: loads its inputs and stores its results.

    Tensors of a task are `[b, g, H, m, ·]` for queries and `[b, g, n, ·]` for keys, in the compute dtype.
    """

    problem: Problem
    ranges: tuple[Tensor, Tensor, Tensor]
    """`Problem.ranges`, made once."""
    block: RowBlock
    batches: slice
    groups: slice

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Index of this task in `[B, M, G, H, ·]`."""
        return self.batches, slice(self.block.begin, self.block.end), self.groups

    @property
    def stats(self) -> tuple[slice, slice, slice, slice]:
        """Index of this task in `[B, G, H, M]`."""
        return self.batches, self.groups, slice(None), slice(self.block.begin, self.block.end)

    def load_rows(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """This task's rows of `[B, M, G, H, ·]`, times their scale, as `[b, g, H, m, ·]`."""
        return self.scaled(x, scale, self.rows[1]).permute(0, 2, 3, 1, 4).contiguous()

    def scaled(self, x: Tensor, scale: Tensor | None, rows: slice | Tensor) -> Tensor:
        """Some rows of this task's batch entries and groups, times their scale, in the compute dtype."""
        here = (self.batches, slice(None), self.groups)
        return dequantized(x[here], None if scale is None else scale[here], rows, self.problem.compute_dtype)

    def unpermute(self, x: Tensor) -> Tensor:
        """`[b, g, H, m, ·]` as `[b, m, g, H, ·]`."""
        return x.permute(0, 3, 1, 2, 4)

    def heads(self, x: Tensor) -> Tensor:
        """This task's groups of `[G, H, …]`."""
        return x[self.groups]

    def query(self) -> Tensor:
        return self.load_rows(self.problem.query, self.problem.query_scale) * self.problem.scale

    def start(self, V: int) -> tuple[Tensor, Tensor, Tensor]:
        """Initial maximum, sum of weights and accumulator; a sink is a key with this score and a value of 0."""
        problem = self.problem
        b = len(range(*self.batches.indices(problem.query.shape[0])))
        g = len(range(*self.groups.indices(problem.query.shape[2])))
        shape = (b, g, problem.query.shape[3], self.block.end - self.block.begin)
        acc = problem.query.new_zeros((*shape, V), dtype=problem.compute_dtype)
        peak = acc.new_full((*shape, 1), -torch.inf)
        if problem.sinks is not None:
            peak = self.heads(problem.sinks).to(peak.dtype)[..., None, None].expand(peak.shape)
        return peak, (peak > -torch.inf).to(peak.dtype), acc

    def chunks(self) -> Iterator[_Chunk]:
        problem = self.problem
        per_key = math.prod(self.group_shape) * problem.query.shape[3] * (self.block.end - self.block.begin)
        if problem.quantized:
            # With few rows a chunk would be long, and dequantized keys would take more memory than its scores.
            widest = max(problem.query.shape[-1], problem.value.shape[-1])
            per_key = max(per_key, math.prod(self.group_shape) * widest)
        size = max(64, ELEMENTS // max(per_key, 1) // 64 * 64)
        for span in self.block.spans:
            for begin, end, full in span.chunks(size):
                yield _Chunk(span.range, begin, end, full)

    @property
    def group_shape(self) -> tuple[int, int]:
        B, _, G = self.problem.query.shape[:3]
        return len(range(*self.batches.indices(B))), len(range(*self.groups.indices(G)))

    def load_keys(self, x: Tensor, chunk: _Chunk, scale: Tensor | None = None) -> Tensor:
        """Keys or values of a chunk, times their scale, `[b, g, n, ·]`."""
        slots = self.problem.keys_in_row(chunk.begin, chunk.end)
        rows = slice(chunk.begin, chunk.end) if slots is None else slots
        return self.scaled(x, scale, rows).permute(0, 2, 1, 3).contiguous()

    def accumulate(self, total: Tensor, chunk: _Chunk, grad: Tensor) -> None:
        """Add a gradient `[b, g, n, ·]` of the keys or values that `load_keys` returned."""
        slots = self.problem.keys_in_row(chunk.begin, chunk.end)
        part = total[self.batches, :, self.groups]
        if slots is None:
            part[:, chunk.begin : chunk.end] += grad.permute(0, 2, 1, 3)
        else:
            # Sequences may share a page. index_put sums in a fixed order; index_add on a GPU does not.
            part.transpose(0, 1).index_put_((slots,), grad.permute(2, 0, 1, 3), accumulate=True)

    def scores(self, query: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores `[b, g, H, m, n]`, −inf where hidden; the visible keys (None: all of them); the softcap's slope.

        The slope is the derivative of the capped score by the one before softcap; None without a softcap.
        """
        problem = self.problem
        key = self.load_keys(problem.key, chunk, problem.key_scale)
        score = _grouped(torch.matmul, query, key.transpose(-1, -2))
        slope = None
        if problem.softcap:
            unit = score.div_(problem.softcap).tanh_()
            slope = 1 - unit * unit
            score = unit * problem.softcap
        for bias in problem.biases:
            score += self.load_bias(bias, chunk).to(score.dtype)
        if problem.slopes is not None:
            slopes = problem.slopes.to(score.dtype)
            slopes = slopes[self.batches if slopes.shape[0] > 1 else slice(None), self.groups]
            score -= slopes[..., None, None] * self.distance(chunk).abs()
        if problem.table is not None:
            reach = problem.table.shape[-1] // 2
            table = self.heads(problem.table).to(score.dtype)
            score += table[:, :, self.distance(chunk)[:, 0, 0].clamp(-reach, reach) + reach].movedim(2, 0)
        visible = self.visible(chunk)
        if visible is not None:
            score.masked_fill_(~visible, -torch.inf)
            slope = None if slope is None else slope.masked_fill(~visible, 0)  # may be NaN there
        return score, visible, slope

    def lost_in_lse(self, query: Tensor, lse: Tensor) -> Tensor | float:
        """What rounding took from lse `[b, g, H, m, 1]`, so that weights exp(score − lse − lost) sum to 1; see
        `LARGE_LSE`."""
        large = (lse.abs() > LARGE_LSE) & torch.isfinite(lse)
        if not bool(large.any()):
            return 0.0
        total = torch.zeros_like(lse)
        if self.problem.sinks is not None:
            total += torch.exp(self.heads(self.problem.sinks.to(lse.dtype))[..., None, None] - lse)
        for chunk in self.chunks():
            score, _, _ = self.scores(query, chunk)
            total += score.sub_(lse).exp_().sum(-1, keepdim=True)
        lost = total.log()
        # An lse that was merged with that of other keys differs by more than a rounding, and is right as it is.
        rounding = 4 * torch.finfo(lse.dtype).eps * lse.abs()
        return torch.where(large & (lost.abs() <= rounding), lost, 0)

    def bounds(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """`lo`, `hi` or `diagonal` for this task's rows and a chunk's range, `[b or 1, 1, 1, m, 1]`."""
        batches = self.batches if x.shape[1] > 1 else slice(None)
        return x[chunk.range, batches, self.block.begin : self.block.end][:, None, None, :, None]

    def distance(self, chunk: _Chunk) -> Tensor:
        """Key position minus query position, int `[b or 1, 1, 1, m, n]`."""
        j = torch.arange(chunk.begin, chunk.end, device=self.ranges[2].device, dtype=self.ranges[2].dtype)
        return j - self.bounds(self.ranges[2], chunk)

    def visible(self, chunk: _Chunk) -> Tensor | None:
        visible = None
        if not chunk.full:
            j = torch.arange(chunk.begin, chunk.end, device=self.ranges[0].device, dtype=self.ranges[0].dtype)
            lo, hi = (self.bounds(x, chunk) for x in self.ranges[:2])
            visible = (j >= lo) & (j < hi)
        if self.problem.dense is not None:
            dense = self.load_bias(self.problem.dense, chunk)
            visible = dense if visible is None else dense & visible
        return visible

    def columns(self, chunk: _Chunk) -> Tensor:
        """Columns of dense terms, and keys as dropout counts them: logical keys where keys are paged."""
        return torch.arange(chunk.begin, chunk.end, device=self.problem.query.device) % max(self.problem.N, 1)

    def bias_index(self, x: Tensor) -> tuple[slice, ...]:
        whole = slice(None)
        wanted = (self.batches, self.groups, whole, slice(self.block.begin, self.block.end))
        return tuple(whole if size == 1 else index for size, index in zip(x.shape, wanted, strict=False))

    def load_bias(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """The part of a dense term that this task reads, each dimension 1 where it broadcasts."""
        x = x[self.bias_index(x)]
        if x.shape[-1] == 1:
            return x
        if self.problem.block_table is None:
            return x[..., chunk.begin : chunk.end]
        return x[..., self.columns(chunk)]

    def accumulate_bias(self, total: Tensor, chunk: _Chunk, dscore: Tensor) -> None:
        part = total[self.bias_index(total)]
        broadcast = [dim for dim in range(5) if part.shape[dim] == 1 and dscore.shape[dim] > 1]
        grad = dscore.sum(broadcast, keepdim=True) if broadcast else dscore
        if part.shape[-1] == 1:
            part += grad
        elif self.problem.block_table is None:
            part[..., chunk.begin : chunk.end] += grad
        else:
            # Two sequences of a chunk have the same columns: index_put adds both.
            part.movedim(-1, 0).index_put_((self.columns(chunk),), grad.movedim(-1, 0), accumulate=True)

    def accumulate_by_distance(
        self, dtable: Tensor | None, sums: _PositionSums, chunk: _Chunk, weight: Tensor, dscore: Tensor
    ) -> None:
        """Add a chunk to the row sums, and to the table's entries between its first and last."""
        distance = self.distance(chunk)
        sums.grad.add_(dscore.sum(-1))
        sums.weight.add_(weight.sum(-1))
        if sums.by_distance is not None:
            size = distance.abs()
            sums.by_distance[0].add_((dscore * size).sum(-1))
            sums.by_distance[1].add_((weight * size).sum(-1))
        if dtable is not None and sums.ends is not None:
            reach = dtable.shape[-1] // 2
            # Both are the middle entry where the reach is 0: each key counts in one of them.
            ends = distance <= -reach, distance >= max(reach, 1)
            for end, total in zip(ends, sums.ends, strict=True):
                total[0].add_((dscore * end).sum(-1))
                total[1].add_((weight * end).sum(-1))
            inner = dscore.masked_fill(ends[0] | ends[1], 0)
            index = (distance.clamp(-reach, reach) + reach).long().expand(dscore.shape[0], 1, 1, -1, -1)
            for entry, at in zip(inner, index, strict=True):
                self.heads(dtable).view(-1, dtable.shape[-1]).index_add_(
                    1, at.flatten(), entry.flatten(0, 1).flatten(1)
                )

    def add_position_sums(
        self, dslopes: Tensor | None, dtable: Tensor | None, sums: _PositionSums, excess: Tensor
    ) -> None:
        """Add the row sums to the gradients of the slopes and of the table's first and last entry.

        Args:
            excess: what rounding adds to the gradients of each row's scores, per weight; see `_PositionSums`.
        """
        if dslopes is not None and sums.by_distance is not None:
            grad, weight = sums.by_distance
            part = dslopes[self.batches if dslopes.shape[0] > 1 else slice(None), self.groups]
            part -= (grad - excess * weight).sum(-1).sum_to_size(part.shape)
        if dtable is not None and sums.ends is not None:
            for (grad, weight), entry in zip(sums.ends, (0, -1), strict=True):
                self.heads(dtable)[..., entry] += (grad - excess * weight).sum((0, -1))

    def keep(self, chunk: _Chunk) -> Tensor | None:
        """Dropout's factor of each weight, 0 or 1 / (1 − p), `[b, g, H, m, n]`; None without dropout."""
        problem = self.problem
        if problem.seed is None:
            return None
        B, _, G, H, _ = problem.query.shape
        device = problem.query.device
        keep: Tensor = kept(
            problem.seed,
            problem.dropout_p,
            torch.arange(B, device=device)[self.batches],
            torch.arange(G * H, device=device).view(G, H)[self.groups].flatten(),
            torch.arange(self.block.begin, self.block.end, device=device),
            self.columns(chunk),
        )
        keep = keep.view(keep.shape[0], -1, H, *keep.shape[2:])
        return keep.to(problem.compute_dtype) / (1 - problem.dropout_p)


def _tasks(problem: Problem) -> Iterator[_Task]:
    B, M, G, H, _ = problem.query.shape
    if min(B, M, G * H) == 0:
        return
    ranges = problem.ranges
    rows = min(ROWS, 1 << (M - 1).bit_length())
    entries = B if ranges[0].shape[1] == 1 else 1
    overhead = OVERHEAD / (entries * G * H)
    if problem.lo is None:
        blocks = uniform_row_blocks(M, problem.row_length, rows)
    elif rows >= M and M * problem.row_length <= 2 * overhead:
        # So few elements cost less than making a schedule, and than waiting for the device to read the ranges.
        everything = Span(0, 0, 0, 0, problem.row_length)
        blocks = [RowBlock(None, 0, M, [everything._replace(range=s) for s in range(ranges[0].shape[0])])]
    else:
        blocks = row_blocks(ranges[0], ranges[1], rows, overhead)
    for block in blocks:
        # As many groups, then batch entries, as fit into ELEMENTS with chunks of 64 keys.
        at_once = max(1, ELEMENTS // ((block.end - block.begin) * H * 64))
        group_step, batch_step = min(G, at_once), max(1, at_once // G)
        batches = [slice(b, b + batch_step) for b in range(0, B, batch_step)] if block.batch is None else None
        for batch in batches or [slice(block.batch, (block.batch or 0) + 1)]:
            for g in range(0, G, group_step):
                yield _Task(problem, ranges, block, batch, slice(g, g + group_step))


def _grouped(product, left: Tensor, right: Tensor, *visible: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """product(left, right): [b, g, H, m, x], [b, g, x, y] -> [b, g, H, m, y], as one product per group if it can be."""
    if left.shape[2] > 1 and not visible:
        return product(left.flatten(2, 3), right).unflatten(2, left.shape[2:4])  # type: ignore[no-any-return]
    return product(left, right[:, :, None], *visible)  # type: ignore[no-any-return]


def _add_product(acc: Tensor, left: Tensor, right: Tensor) -> None:
    """acc [b, g, H, m, y] += left [b, g, H, m, x] @ right [b, g, x, y], in place."""
    acc.view(-1, acc[0, 0, :, :, 0].numel(), acc.shape[-1]).baddbmm_(
        left.flatten(2, 3).flatten(0, 1), right.flatten(0, 1)
    )


def _transposed_product(left: Tensor, right: Tensor, visible: Tensor | None) -> Tensor:
    """Σ over heads and rows of left [b, g, H, m, n] × right [b, g, H, m, y] -> [b, g, n, y]."""
    if visible is not None:
        swapped = visible.transpose(-1, -2)
        return visible_matmul(left.transpose(-1, -2), right, swapped).sum(2)
    return left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)
