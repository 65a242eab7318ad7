"""Online-softmax attention over blocks of keys, in plain torch: every problem on every device, in O(M) memory.

Derivation: docs/development/algorithm.md. Forward: Milakov & Gimelshein 2018, Rabe & Staats 2021; backward:
recomputation from lse, Dao et al. 2022.

Bits of a row do not depend on what else a call computes (docs/guides/invariance.md). Blocks of keys are counted from
the document's first key and joined in their order, and all matrix products are batches of products of one shape:
torch's libraries round differently for other shapes, and where threads share one product; see `_product`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from keyspan.backends import Gradients, Needs
from keyspan.backends.common import dequantized, visible_matmul
from keyspan.backends.schedule import RowBlock, row_blocks, uniform_row_blocks
from keyspan.core.dropout import kept
from keyspan.core.problem import Problem

ROWS = 256
"""Query rows times heads of a group in a task; more where a group has more heads."""
BLOCK = 128
"""Keys of a block."""
MULTIPLE = 16
"""Rows of products and head dimensions are padded to multiples of this."""
ELEMENTS = 2**19
"""Scores held at a time, over all heads of a task: 2 MiB in fp32, which fits a CPU's L2 or L3 cache."""
LARGE_LSE = 64
"""Rows with an lse of a larger magnitude have their weights normalised again in backward.

lse = peak + log Σ is rounded to the peak's precision: in fp32 nothing of log Σ is left at a peak of −10⁹, say of a row
that a bias hides wholly, and weights exp(score − lse) sum to N instead of 1. Backward sums such rows' weights first and
divides by the sum. Scores stay in natural units: times log₂e the smallest finite number overflows. The difference
score − lse comes first: only it is small.
"""


def reason_against(problem: Problem) -> str | None:
    device = problem.query.device
    if problem.invariant and device.type not in ("cpu", "meta"):
        return f"results are to be invariant, and torch's products on {device} round as their shapes have it"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    B, M, G, H, _ = problem.query.shape
    V = problem.value.shape[-1]
    out = problem.query.new_zeros((B, M, G, H, V), dtype=problem.output_dtype)
    lse = problem.query.new_full((B, G, H, M), -torch.inf, dtype=problem.compute_dtype)
    for task in _tasks(problem):
        query = task.query()
        peak, total, acc = task.start(V)
        spread = query[:, :, None]
        for chunk in task.chunks():
            spread = _spread(query, chunk, spread)
            padded, visible, _ = task.scores(spread, chunk)
            score = task.real_rows(padded)
            highest = torch.cat([peak[:, :, None], score.amax(-1)], 2).cummax(2).values
            # The pivot stays finite for rows that have seen no key yet: −inf − −inf would be NaN.
            pivot = highest.masked_fill(highest == -torch.inf, 0)[:, :, 1:]
            weight = score.sub_(pivot[..., None]).exp_()
            shrink = torch.exp(highest[:, :, :-1] - pivot)
            sums = weight.sum(-1)
            keep = task.keep(chunk)
            if keep is not None:
                weight.mul_(keep)
            value = task.load_keys(problem.value, chunk, problem.value_scale)
            product = task.real_rows(task.visible_product(padded, value, visible))
            for n in range(chunk.blocks):
                total = torch.addcmul(sums[:, :, n], total, shrink[:, :, n])
                acc = torch.addcmul(product[:, :, n], acc, shrink[:, :, n, ..., None])
            peak = highest[:, :, -1]
        empty = total == 0  # not where it is NaN
        total = total.masked_fill(empty, 1)
        out[task.rows] = task.unpermute((acc / total[..., None])[..., :V]).to(out.dtype)
        lse[task.stats] = torch.where(empty, -torch.inf, peak + total.log())
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
        rows = task.load_rows(grad_out)
        row_lse = lse[task.stats]
        delta = (rows * task.load_rows(out)).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[task.stats]
        grad = _padded(rows.flatten(2, 3))
        # An empty row has lse −inf. With +inf instead its weights are 0.
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf)
        has_nan = bool(torch.isnan(row_lse).any())
        lost = task.lost_in_lse(query, row_lse)
        sink_weight = None
        if problem.sinks is not None:
            sink_weight = torch.exp(task.heads(problem.sinks.to(dtype))[..., None] - row_lse - lost)
            if dsinks is not None:
                dsinks[task.groups] -= torch.where(sink_weight > 0, sink_weight * delta, 0).sum((0, 3))
        dquery = torch.zeros_like(query) if dq is not None else None
        sums = _PositionSums.zeros(row_lse, dslopes, dtable)
        spread, spread_grad = query[:, :, None], grad[:, :, None]
        for chunk in task.chunks():
            spread, spread_grad = _spread(query, chunk, spread), _spread(grad, chunk, spread_grad)
            padded, visible, slope = task.scores(spread, chunk)
            weight = task.real_rows(padded)
            weight.sub_(_by_block(row_lse)).sub_(_by_block(lost)).exp_()
            if visible is not None and has_nan:
                weight.masked_fill_(~visible, 0)  # −inf less an lse of NaN
            keep = task.keep(chunk)
            if dv is not None:
                dropped = padded if keep is None else _padded((weight * keep).flatten(3, 4))
                task.accumulate(dv, chunk, task.visible_transposed_product(dropped, spread_grad, visible))
            if not scores_needed:
                continue
            value = task.load_keys(problem.value, chunk)
            padded = task.without_padding_rows(_product(spread_grad, value.transpose(-1, -2)))
            dscore = task.real_rows(padded)
            if keep is not None:
                dscore.mul_(keep)
            dscore.sub_(_by_block(delta)).mul_(weight)
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
                _add_blocks(dquery, task.visible_product(padded, key, visible))
            if dk is not None:
                task.accumulate(dk, chunk, task.visible_transposed_product(padded, spread, visible))
        if sums is not None:
            if sink_weight is not None:
                sums.weight.add_(sink_weight)
                sums.grad.sub_(sink_weight * delta)
            if out.dtype == dtype:
                excess = torch.zeros_like(sums.grad)
            else:
                excess = sums.grad if grad_lse is None else sums.grad - grad_lse[task.stats]
                excess = torch.where((sums.weight - 1).abs() < 2e-5, excess, 0)
            task.add_position_sums(dslopes, dtable, sums, excess)
        if dq is not None and dquery is not None:
            dq[task.rows] = task.unpermute(task.real_rows(dquery.mul_(problem.scale))[..., : dq.shape[-1]])

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
    """Whole blocks of keys, begin … end − 1, of range `range`; the last may reach beyond all keys. `full`: every row of
    the task sees them all."""

    range: int
    begin: int
    end: int
    full: bool

    @property
    def blocks(self) -> int:
        return (self.end - self.begin) // BLOCK


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

    Tensors of a task are `[b, g, H, m, ·]` for queries; `[b, g, c, n, ·]` for the c blocks of n keys of a chunk; and
    `[b, g, c, H, m, n]` for scores. Products take rows of heads and queries as one dimension, and that, `·` of queries
    and `·` of keys padded with zeros: `[b, g, rows, ·]` and `[b, g, c, rows, n]`. All in the compute dtype.
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

    def real_rows(self, x: Tensor) -> Tensor:
        """A view of `[…, rows, ·]` as `[…, H, m, ·]`."""
        sizes = self.problem.query.shape[3], self.block.end - self.block.begin
        found: Tensor = x[..., : math.prod(sizes), :].unflatten(-2, sizes)
        return found

    def without_padding_rows(self, x: Tensor) -> Tensor:
        """`[…, rows, ·]` with zeros in the rows that pad it, in place: a product with NaN is NaN there."""
        x[..., self.problem.query.shape[3] * (self.block.end - self.block.begin) :, :] = 0
        return x

    def heads(self, x: Tensor) -> Tensor:
        """This task's groups of `[G, H, …]`."""
        return x[self.groups]

    def query(self) -> Tensor:
        """`[b, g, rows, ·]`, times the scale."""
        query = self.load_rows(self.problem.query, self.problem.query_scale) * self.problem.scale
        return _padded(query.flatten(2, 3))

    def start(self, V: int) -> tuple[Tensor, Tensor, Tensor]:
        """Initial maximum, sum of weights and accumulator; a sink is a key with this score and a value of 0."""
        problem = self.problem
        shape = (*self.group_shape, problem.query.shape[3], self.block.end - self.block.begin)
        acc = problem.query.new_zeros((*shape, V + -V % MULTIPLE), dtype=problem.compute_dtype)
        peak = acc.new_full(shape, -torch.inf)
        if problem.sinks is not None:
            peak = self.heads(problem.sinks).to(peak.dtype)[..., None].expand(shape)
        return peak, (peak > -torch.inf).to(peak.dtype), acc

    def chunks(self) -> Iterator[_Chunk]:
        problem = self.problem
        rows = problem.query.shape[3] * (self.block.end - self.block.begin)
        # With few rows, keys take more memory than their scores.
        widest = max(rows, problem.query.shape[-1], problem.value.shape[-1])
        most = max(1, ELEMENTS // (math.prod(self.group_shape) * widest * BLOCK))
        for span in self.block.spans:
            for begin, end, full in span.chunks(self.block.origin, BLOCK, most):
                yield _Chunk(span.range, begin, end, full)

    @property
    def group_shape(self) -> tuple[int, int]:
        B, _, G = self.problem.query.shape[:3]
        return len(range(*self.batches.indices(B))), len(range(*self.groups.indices(G)))

    def load_keys(self, x: Tensor, chunk: _Chunk, scale: Tensor | None = None) -> Tensor:
        """Keys or values of a chunk, times their scale, `[b, g, c, n, ·]`; zeros behind the last key."""
        end = min(chunk.end, self.problem.row_length)
        slots = self.problem.keys_in_row(chunk.begin, end)
        part = self.scaled(x, scale, slice(chunk.begin, end) if slots is None else slots).permute(0, 2, 1, 3)
        size = x.shape[-1]
        part = pad(part, (0, -size % MULTIPLE, 0, chunk.end - end)).contiguous()
        found: Tensor = part.unflatten(2, (chunk.blocks, BLOCK))
        return found

    def accumulate(self, total: Tensor, chunk: _Chunk, grad: Tensor) -> None:
        """Add a gradient `[b, g, c, n, ·]` of the keys or values that `load_keys` returned."""
        end = min(chunk.end, self.problem.row_length)
        slots = self.problem.keys_in_row(chunk.begin, end)
        grad = grad.flatten(2, 3)[:, :, : end - chunk.begin, : total.shape[-1]]
        part = total[self.batches, :, self.groups]
        if slots is None:
            part[:, chunk.begin : end] += grad.permute(0, 2, 1, 3)
        else:
            # Sequences may share a page. index_put sums in a fixed order; index_add on a GPU does not.
            part.transpose(0, 1).index_put_((slots,), grad.permute(2, 0, 1, 3), accumulate=True)

    def visible_product(self, weight: Tensor, keys: Tensor, visible: Tensor | None) -> Tensor:
        """weight `[b, g, c, rows, n]` @ keys `[b, g, c, n, ·]`, where NaN and inf reach only the rows that see them."""
        if visible is None or bool(torch.isfinite(keys).all()):
            return _product(weight, keys)
        return visible_matmul(weight, keys, self.padded_visible(visible, weight), _product)

    def visible_transposed_product(self, weight: Tensor, rows: Tensor, visible: Tensor | None) -> Tensor:
        """weightᵀ @ rows `[b, g, c, rows, ·]`, the sum over heads and queries, `[b, g, c, n, ·]`; likewise."""
        transposed = weight.transpose(-1, -2)
        if visible is None or bool(torch.isfinite(rows).all()):
            return _product(transposed, rows)
        return visible_matmul(transposed, rows, self.padded_visible(visible, weight).transpose(-1, -2), _product)

    def padded_visible(self, visible: Tensor, weight: Tensor) -> Tensor:
        """Visible keys as `weight` `[b, g, c, rows, n]`."""
        found = torch.zeros_like(weight, dtype=torch.bool)
        self.real_rows(found).copy_(visible)
        return found

    def scores(self, query: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores `[b, g, c, rows, n]`, −inf where hidden; of their real rows the visible keys (None: all of them) and
        the softcap's slope.

        The slope is the derivative of the capped score by the one before softcap; None without a softcap.

        Args:
            query: `[b, g, c, rows, ·]`.
        """
        problem = self.problem
        key = self.load_keys(problem.key, chunk, problem.key_scale)
        padded = self.without_padding_rows(_product(query, key.transpose(-1, -2)))
        score = self.real_rows(padded)
        slope = None
        if problem.softcap:
            unit = score.div_(problem.softcap).tanh_()
            slope = 1 - unit * unit
            score.mul_(problem.softcap)
        for bias in problem.biases:
            score += self.load_bias(bias, chunk).to(score.dtype)
        if problem.slopes is not None:
            slopes = problem.slopes.to(score.dtype)
            slopes = slopes[self.batches if slopes.shape[0] > 1 else slice(None), self.groups]
            score -= slopes[:, :, None, :, None, None] * self.distance(chunk).abs()
        if problem.table is not None:
            reach = problem.table.shape[-1] // 2
            table = self.heads(problem.table).to(score.dtype)
            index = self.distance(chunk)[:, 0, :, 0].clamp(-reach, reach) + reach  # [b or 1, c, m, n]
            score += table[:, :, index].permute(2, 0, 3, 1, 4, 5)
        visible = self.visible(chunk)
        if visible is not None:
            score.masked_fill_(~visible, -torch.inf)
            slope = None if slope is None else slope.masked_fill(~visible, 0)  # may be NaN there
        return padded, visible, slope

    def lost_in_lse(self, query: Tensor, lse: Tensor) -> Tensor:
        """What rounding took from lse `[b, g, H, m]`, so that weights exp(score − lse − lost) sum to 1; see
        `LARGE_LSE`."""
        large = (lse.abs() > LARGE_LSE) & torch.isfinite(lse)
        if not bool(large.any()):
            return lse.new_zeros(())
        total = torch.zeros_like(lse)
        if self.problem.sinks is not None:
            total += torch.exp(self.heads(self.problem.sinks.to(lse.dtype))[..., None] - lse)
        spread = query[:, :, None]
        for chunk in self.chunks():
            spread = _spread(query, chunk, spread)
            score = self.real_rows(self.scores(spread, chunk)[0])
            _add_blocks(total, score.sub_(_by_block(lse)).exp_().sum(-1))
        lost = total.log()
        # An lse that was merged with that of other keys differs by more than a rounding, and is right as it is.
        rounding = 4 * torch.finfo(lse.dtype).eps * lse.abs()
        return torch.where(large & (lost.abs() <= rounding), lost, 0)

    def bounds(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """`lo`, `hi` or `diagonal` for this task's rows and a chunk's range, `[b or 1, 1, 1, 1, m, 1]`."""
        batches = self.batches if x.shape[1] > 1 else slice(None)
        return x[chunk.range, batches, self.block.begin : self.block.end][:, None, None, None, :, None]

    def positions(self, chunk: _Chunk) -> Tensor:
        """Keys of a chunk, `[c, 1, 1, n]`, to meet `bounds`."""
        x = self.ranges[0]
        return torch.arange(chunk.begin, chunk.end, device=x.device, dtype=x.dtype).view(-1, 1, 1, BLOCK)

    def distance(self, chunk: _Chunk) -> Tensor:
        """Key position minus query position, int `[b or 1, 1, c, 1, m, n]`."""
        return self.positions(chunk) - self.bounds(self.ranges[2], chunk)

    def visible(self, chunk: _Chunk) -> Tensor | None:
        """Which keys of a chunk rows see, as scores with 1 where it broadcasts; None: all of them."""
        visible = None
        if not chunk.full:
            j = self.positions(chunk)
            lo, hi = (self.bounds(x, chunk) for x in self.ranges[:2])
            visible = (j >= lo) & (j < hi)
        if self.problem.dense is not None:
            dense = self.load_bias(self.problem.dense, chunk)
            visible = dense if visible is None else dense & visible
        return visible

    def columns(self, chunk: _Chunk) -> Tensor:
        """Columns of dense terms, and keys as dropout counts them: logical keys where keys are paged."""
        end = min(chunk.end, self.problem.row_length)
        return torch.arange(chunk.begin, end, device=self.problem.query.device) % max(self.problem.N, 1)

    def by_block(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """A term of scores `[b, g, H, m, keys of a chunk or 1]` as `[b, g, c, H, m, n]`; 0 behind the last key."""
        if x.shape[-1] == 1:
            return x.unsqueeze(2)
        found: Tensor = pad(x, (0, chunk.end - chunk.begin - x.shape[-1])).unflatten(-1, (-1, BLOCK)).movedim(-2, 2)
        return found

    def bias_index(self, x: Tensor) -> tuple[slice, ...]:
        whole = slice(None)
        wanted = (self.batches, self.groups, whole, slice(self.block.begin, self.block.end))
        return tuple(whole if size == 1 else index for size, index in zip(x.shape, wanted, strict=False))

    def load_bias(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """The part of a dense term that this task reads, each dimension 1 where it broadcasts, as scores."""
        x = x[self.bias_index(x)]
        if x.shape[-1] > 1:
            paged = self.problem.block_table is not None
            x = x[..., self.columns(chunk)] if paged else x[..., chunk.begin : chunk.end]
        return self.by_block(x, chunk)

    def accumulate_bias(self, total: Tensor, chunk: _Chunk, dscore: Tensor) -> None:
        part = total[self.bias_index(total)]
        if part.shape[-1] == 1:
            by_row = dscore.sum(-1)  # [b, g, c, H, m]
            for n in range(chunk.blocks):
                part += _summed_like(by_row[:, :, n, ..., None], part)
            return
        columns = self.columns(chunk)
        grad = _summed_like(dscore.movedim(2, -2).flatten(-2), part)[..., : len(columns)]
        if self.problem.block_table is None:
            part[..., chunk.begin : chunk.begin + len(columns)] += grad
        else:
            # Two sequences of a chunk have the same columns: index_put adds both.
            part.movedim(-1, 0).index_put_((columns,), grad.movedim(-1, 0), accumulate=True)

    def accumulate_by_distance(
        self, dtable: Tensor | None, sums: _PositionSums, chunk: _Chunk, weight: Tensor, dscore: Tensor
    ) -> None:
        """Add a chunk to the row sums, and to the table's entries between its first and last."""
        distance = self.distance(chunk)
        _add_blocks(sums.grad, dscore.sum(-1))
        _add_blocks(sums.weight, weight.sum(-1))
        if sums.by_distance is not None:
            size = distance.abs()
            _add_blocks(sums.by_distance[0], (dscore * size).sum(-1))
            _add_blocks(sums.by_distance[1], (weight * size).sum(-1))
        if dtable is not None and sums.ends is not None:
            reach = dtable.shape[-1] // 2
            # Both are the middle entry where the reach is 0: each key counts in one of them.
            ends = distance <= -reach, distance >= max(reach, 1)
            for end, total in zip(ends, sums.ends, strict=True):
                _add_blocks(total[0], (dscore * end).sum(-1))
                _add_blocks(total[1], (weight * end).sum(-1))
            inner = dscore.masked_fill(ends[0] | ends[1], 0).transpose(2, 3)  # [b, g, H, c, m, n]
            index = (distance.clamp(-reach, reach) + reach).long()[:, 0, :, 0].expand(dscore.shape[0], -1, -1, -1)
            heads = self.heads(dtable).view(-1, dtable.shape[-1])
            for entry, at in zip(inner, index, strict=True):
                for total, row in zip(heads, entry.flatten(0, 1), strict=True):
                    total.index_add_(0, at.flatten(), row.flatten())  # many times faster than with two dimensions

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
        """Dropout's factor of each weight, 0 or 1 / (1 − p), as scores; None without dropout."""
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
        return self.by_block(keep.to(problem.compute_dtype) / (1 - problem.dropout_p), chunk)


def _tasks(problem: Problem) -> Iterator[_Task]:
    B, M, G, H, _ = problem.query.shape
    if min(B, M, G * H) == 0:
        return
    ranges = problem.ranges
    rows = max(ROWS // H, 1)
    if problem.lo is None:
        blocks = uniform_row_blocks(M, problem.row_length, rows)
    else:
        blocks = row_blocks(*ranges[:2], problem.origin_in_row, rows)
    for block in blocks:
        # As many groups, then batch entries, as fit into ELEMENTS with blocks of keys.
        at_once = max(1, ELEMENTS // ((block.end - block.begin) * H * BLOCK))
        group_step, batch_step = min(G, at_once), max(1, at_once // G)
        batches = [slice(b, b + batch_step) for b in range(0, B, batch_step)] if block.batch is None else None
        for batch in batches or [slice(block.batch, (block.batch or 0) + 1)]:
            for g in range(0, G, group_step):
                yield _Task(problem, ranges, block, batch, slice(g, g + group_step))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, `[…, x, y]` and `[…, y, z]` with all sizes x, y and z fixed by the problem but for x, a multiple of
    MULTIPLE. The leading dimensions are equal.

    Fewer products than threads are repeated: a library that gives several threads one product may divide its sums
    among them.
    """
    leading = left.shape[:-2]
    left, right = left.flatten(0, -3), right.flatten(0, -3)
    count = left.shape[0]
    if left.device.type == "cpu" and count < max(2, torch.get_num_threads()):
        times = -(-max(2, torch.get_num_threads()) // count)
        left, right = _repeated(left, times), _repeated(right, times)
    found: Tensor = torch.bmm(left, right)[:count].unflatten(0, leading)
    return found


def _repeated(x: Tensor, times: int) -> Tensor:
    """`[count, y, z]` repeated over `count`, transposed where x is."""
    return x.repeat(times, 1, 1) if x.stride(-1) == 1 else x.mT.repeat(times, 1, 1).mT


def _padded(x: Tensor) -> Tensor:
    """`[…, rows, ·]` with both padded with zeros to MULTIPLE."""
    return pad(x, (0, -x.shape[-1] % MULTIPLE, 0, -x.shape[-2] % MULTIPLE))


def _spread(x: Tensor, chunk: _Chunk, made: Tensor) -> Tensor:
    """`[b, g, rows, ·]` for each block of a chunk, `[b, g, c, rows, ·]`; `made`: the result for another chunk."""
    if made.shape[2] == chunk.blocks:
        return made
    return x[:, :, None].expand(-1, -1, chunk.blocks, -1, -1).contiguous()


def _by_block(x: Tensor) -> Tensor:
    """A number of each row `[b, g, H, m]`, or a scalar, as scores."""
    return x[:, :, None, ..., None] if x.dim() else x


def _add_blocks(total: Tensor, x: Tensor) -> None:
    """Adds `[b, g, c, …]` to `[b, g, …]`, block by block."""
    for part in x.unbind(2):
        total += part


def _summed_like(x: Tensor, like: Tensor) -> Tensor:
    """x `[b, g, H, m, n]` summed over the dimensions before the last that are 1 in `like`, one after the other: torch
    divides a sum to one number among threads."""
    for dim in (3, 2, 1, 0):
        if like.shape[dim] == 1 < x.shape[dim]:
            x = x.sum(dim, keepdim=True)
    return x
