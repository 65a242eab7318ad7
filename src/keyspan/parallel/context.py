"""Attention of queries, keys and values that are cut across ranks.

Keys are gathered, of all heads or of a few at a time. Or they come rank by rank: each rank attends with its rows to its
own keys and then to those that come, and the results are merged by their lse (Liu et al. 2023, "Ring Attention").
Backward gives every part the lse and the output of all keys, with which its gradients are those of the whole (Dao
2023), and sends the gradients of keys back to where they came from. Nothing but queries, keys, values, output and lse
is kept between forward and backward: keys travel again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyspan.core.biases import Alibi, BiasSum, DenseBias, RelativeBias, as_bias
from keyspan.core.problem import BiasLike, Broadcast, Problem, make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import autocast_inputs
from keyspan.dispatch.choose import choose
from keyspan.dispatch.op import attend, gradients
from keyspan.parallel.masks import ContextMask, Part, Transfer


@overload
def context_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ContextMask, bias: BiasLike = ..., *,
    scale: float | None = ..., softcap: float | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def context_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ContextMask, bias: BiasLike = ..., *,
    scale: float | None = ..., softcap: float | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ContextMask,
    bias: BiasLike = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`keyspan.attention` of a sequence that is cut across ranks: exact, forward and backward.

    All ranks of the mask's group call it, forward and backward, in the same order, with tensors of one dtype that need
    gradients on all ranks or on none: they wait for one another, so where one raises, the others time out. Peak memory
    of a rank is that of its own rows, and of the keys of two other ranks ("ring") or of the keys that its rows see, of
    all heads or a few ("gather"). Results of a ring are merged in fp32, or fp64, by their lse; where a finite bias
    hides all keys of a row, so that its lse is −1e4 or less, the merged row is as exact as an lse of that size.

    Args:
        query: this rank's rows, `[B, M of the rank, Hq, K]` or as `attention` takes it with another number of
            dimensions; `mask.queries.take(whole, rank)` cuts a whole tensor.
        key: this rank's keys, `[B, N of the rank, Hkv, K]`.
        value: as key.
        mask: the mask, cut.
        bias: as `attention` takes it, for the whole sequence: a dense term broadcasts to `[B, Hq, M, N]` of all rows
            and keys, and the rank uses its part. Equal on all ranks.
        sinks: learned logits, equal on all ranks.
        dropout_p: probability of dropping a weight. The pattern is drawn per rank, so it is another one than that of
            one device.
        scale, softcap, return_lse, backend: as in `attention`.

    Gradients of bias terms and sinks, which every rank has, are those of this rank's rows: their sum over the ranks is
    the whole gradient, as for the weights of a layer that all ranks apply to their rows.

    Returns:
        The output of this rank's rows; with `return_lse` also their lse.

    Raises:
        ValueError: for a wrong argument; the message names it.
        NotImplementedError: where the backend asked for by name cannot compute the problem.
    """
    if not isinstance(mask, ContextMask):
        raise ValueError(f"mask: got {type(mask).__name__}, want ContextMask(mask, partition)")
    query, key, value = autocast_inputs(query, key, value)
    for name, x, partition in (("query", query, mask.queries), ("key", key, mask.keys)):
        want = partition.rows_of(mask.rank)
        if isinstance(x, Tensor) and x.dim() >= 3 and x.shape[1] != want:
            raise ValueError(f"{name}: got {x.shape[1]} rows, want {want}, those of rank {mask.rank}")
    terms = () if bias is None else as_bias(bias).terms
    dense = [term.values for term in terms if isinstance(term, DenseBias)]
    by_position = [term for term in terms if isinstance(term, (Alibi, RelativeBias))]
    problem, heads = make_problem(
        query, key, value, bias=BiasSum(tuple(by_position)) if by_position else None, scale=scale, softcap=softcap,
        sinks=sinks, dropout_p=dropout_p,
    )  # fmt: skip
    if problem.quantized:
        raise ValueError(f"key: got {key.dtype}, want a floating dtype: 8-bit keys do not travel between ranks")
    B, M, G, H, _ = problem.query.shape
    sizes = (mask.queries.length, mask.keys.length)
    whole = [Broadcast(heads, B, G, H, *sizes)("bias", x) for x in dense]
    form, slices = mask.form(G * H, G)
    calls: list[_Call] = []
    biases: list[Tensor] = []
    parts = mask.parts(form, bool(by_position))
    own = [x.index_select(3, mask.rows) if x.shape[3] > 1 else x for x in whole]
    for index, part in enumerate(parts):
        cut = [x.index_select(4, part.keys) if x.shape[4] > 1 else x for x in own]
        for ranges in part.ranges:
            hidden = None
            if ranges.dense is not None:
                hidden = Broadcast(heads, B, G, H, M, len(part.keys))("mask", ranges.dense)
            calls.append(_Call(index, ranges, hidden, slice(len(biases), len(biases) + len(cut))))
            biases += cut
    heads_of = [slice(n, n + G // slices) for n in range(0, G, G // slices)]
    plan = _Plan(mask, parts, calls, heads_of, problem._replace(seed=None), backend)
    seed = None
    if problem.seed is not None:
        seed = (problem.seed + mask.rank * 2**32) % 2**62  # ranks differ, whose generators may not, and so do calls
    inputs = (problem.query, problem.key, problem.value, problem.slopes, problem.table, problem.sinks, *biases)
    out, lse = _ContextAttention.apply(plan, seed, *inputs)  # type: ignore[no-untyped-call]
    return (heads.output(out), heads.lse(lse)) if return_lse else heads.output(out)


class _Call(NamedTuple):
    """One attention over some keys of a part."""

    part: int
    ranges: KeyRanges
    dense: Tensor | None
    biases: slice
    """Which of the dense biases it has."""


class _Plan(NamedTuple):
    """What a call computes, but for its tensors."""

    mask: ContextMask
    parts: list[Part]
    calls: list[_Call]
    slices: list[slice]
    """Of the key heads: each is computed after another."""
    problem: Problem
    """The numbers of all calls; its tensors are exchanged."""
    backend: str | None

    @property
    def rounds(self) -> list[tuple[int, slice]]:
        """(part, key heads), in the order in which they are computed."""
        return [(part, heads) for heads in self.slices for part in range(len(self.parts))]

    def problems(
        self, part: int, heads: slice, key: Tensor, value: Tensor, seed: Tensor | None, tensors: _Tensors
    ) -> Iterator[tuple[_Call, Problem]]:
        """Each call on these keys and its problem. Learned sinks count in the first call of all."""
        for number, call in enumerate(self.calls):
            if call.part == part:
                yield call, self.problem._replace(
                    query=tensors.query[:, :, heads], key=key, value=value, lo=call.ranges.lo, hi=call.ranges.hi,
                    diagonal=call.ranges.diagonal, origin=call.ranges.origin, row_keys=int(call.ranges.row_keys),
                    dense=_cut(call.dense, heads, 1),
                    biases=[x if x.shape[1] == 1 else x[:, heads] for x in tensors.biases[call.biases]],
                    slopes=_cut(tensors.slopes, heads, 1), table=_cut(tensors.table, heads, 0),
                    sinks=_cut(tensors.sinks, heads, 0) if number == 0 else None,
                    seed=None if seed is None else seed + number + heads.start * 2**16,
                )  # fmt: skip


def _cut(x: Tensor | None, heads: slice, dim: int) -> Tensor | None:
    """Some key heads of a tensor that has them in a dimension, or broadcasts along it."""
    if x is None or x.shape[dim] == 1:
        return x
    return x.narrow(dim, heads.start, heads.stop - heads.start)


class _Tensors(NamedTuple):
    """The differentiable inputs, in canonical form."""

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor | None
    table: Tensor | None
    sinks: Tensor | None
    biases: list[Tensor]


HEADS = (2, 2, 2, 1, 0, 0)
"""The dimension of key heads in each of `_Tensors` before the biases, which have it in 1."""


class _ContextAttention(torch.autograd.Function):
    """(out `[B, M, G, H, V]`, lse `[B, G, H, M]`) of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, seed: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
        tensors = _Tensors._make([*inputs[:6], list(inputs[6:])])
        # Parts are merged before they are rounded.
        dtype = plan.problem.output_dtype if len(plan.calls) == 1 else plan.problem.compute_dtype
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for part, heads, key, value in _rounds(plan, tensors):
            for _, problem in plan.problems(part, heads, key, value, seed, tensors):
                new = attend(problem._replace(output_dtype=dtype), choose(problem, plan.backend))
                before = found.get(heads.start)
                found[heads.start] = new if before is None else _merge_(before, new)
        results = [found[heads.start] for heads in plan.slices]  # the rank's own keys have a call
        out = _join([x for x, _ in results], 2).to(plan.problem.output_dtype)
        lse = _join([x for _, x in results], 1)
        ctx.plan, ctx.seed = plan, seed
        ctx.save_for_backward(out, lse, *inputs)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *inputs = ctx.saved_tensors
        plan: _Plan = ctx.plan
        tensors = _Tensors._make([*inputs[:6], inputs[6:]])
        needed = list(ctx.needs_input_grad[2:])
        dims = [*HEADS, *(1 for _ in tensors.biases)]
        total: list[dict[int, Tensor]] = [{} for _ in needed]  # of each input by its first key head
        returning: tuple[Transfer, slice, _Message] | None = None

        def add(index: int, heads: slice, grad: Tensor | None) -> None:
            if grad is not None:
                start = heads.start if inputs[index].shape[dims[index]] > 1 else 0
                before = total[index].get(start)
                total[index][start] = grad if before is None else _wide(before).add_(grad)

        def add_returned() -> None:
            """Add the gradients of this rank's keys that other ranks have sent."""
            nonlocal returning
            if returning is None:
                return
            transfer, heads, message = returning
            returning = None
            like = tensors.key[:, :, heads], tensors.value[:, :, heads]
            pairs = message.parts(list(map(len, transfer.send)), like)
            for index, *grads in zip((1, 2), *pairs, strict=True):
                if not needed[index]:
                    continue
                before = total[index].get(heads.start)
                before = torch.zeros_like(like[index - 1]) if before is None else before
                # Later rounds add more: the sum stays in fp32 until all are added.
                before = _wide(before) if len(plan.parts) > 2 else before
                rows = _wide(before.index_select(1, transfer.sent))
                for places, grad in zip(transfer.places, grads, strict=True):
                    rows.index_add_(1, places, _wide(grad))
                total[index][heads.start] = before.index_copy_(1, transfer.sent, rows.to(before.dtype))

        for number, heads, key, value in _rounds(plan, tensors):
            part = plan.parts[number]
            of_keys: list[Tensor | None] = [None, None]
            for call, problem in plan.problems(number, heads, key, value, ctx.seed, tensors):
                needs = [*needed[:5], needed[5] and problem.sinks is not None, *needed[6:][call.biases]]
                found = gradients(
                    problem,
                    None if grad_out is None else grad_out[:, :, heads],
                    None if grad_lse is None else grad_lse[:, heads],
                    out[:, :, heads],
                    lse[:, heads],
                    needs,
                    choose(problem, plan.backend),
                )
                of_keys = [_sum(x, new) for x, new in zip(of_keys, found[1:3], strict=True)]
                for index in (0, 3, 4, 5):
                    add(index, heads, found[index])
                for index, grad in enumerate(found[6:], 6 + call.biases.start):
                    add(index, heads, grad)
                del found  # not held while the next part is computed
            transfer = part.transfer
            if transfer is None:
                for index, grad in zip((1, 2), of_keys, strict=True):
                    add(index, heads, grad)
            elif needed[1] or needed[2]:
                grads = [
                    torch.zeros_like(x) if grad is None else grad.to(x.dtype)
                    for grad, x in zip(of_keys, (key, value), strict=True)
                ]
                add_returned()
                returning = transfer, heads, _send_back(transfer, grads, plan.mask.group)
                for index, grad in zip((1, 2), grads, strict=True):
                    if part.own and needed[index]:
                        add(index, heads, _piece(grad, transfer, 0))
                del grads
            del of_keys
        add_returned()
        joined = [_join([of[n] for n in sorted(of)], dim) if of else None for of, dim in zip(total, dims, strict=True)]
        cast = [None if x is None else x.to(y.dtype) for x, y in zip(joined, inputs, strict=True)]
        return (None, None, *cast)


def _join(slices: list[Tensor], dim: int) -> Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim)


def _merge_(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`keyspan.merge` of two results of a backend, into the memory of the outputs."""
    (out, lse), (other, other_lse) = a, b
    peak = torch.maximum(lse, other_lse)
    peak = torch.where(peak == -torch.inf, 0, peak)
    weight, other_weight = torch.exp(lse - peak), torch.exp(other_lse - peak)
    total = weight + other_weight
    empty = total == 0
    total = torch.where(empty, 1, total)
    for x, share in ((out, weight / total), (other, other_weight / total)):
        x.mul_(share.movedim(-1, 1).unsqueeze(-1))
    return out.add_(other), torch.where(empty, -torch.inf, peak + total.log())


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The sum, in fp32 at least; None stands for nothing."""
    if total is None or new is None:
        return new if total is None else total
    return _wide(total).add_(new)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# How keys travel


class _Message:
    """A collective on its way: to each rank some rows of keys and of values, from each rank others."""

    def __init__(self, sent: Tensor, sizes: list[int], elements: list[int], group: Any) -> None:
        self._sent: Tensor | None = sent  # kept until it has arrived
        self._received = sent.new_empty(sum(elements))
        self._elements = elements
        self._work = dist.all_to_all_single(self._received, sent, elements, sizes, group=group, async_op=True)

    def parts(self, rows: list[int], like: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Wait; then what came from each rank, `[B, rows of it, G, K]` and `[B, rows of it, G, V]`, as `like`."""
        self._work.wait()
        self._sent = None
        found: list[tuple[Tensor, Tensor]] = []
        for n, part in zip(rows, self._received.split(self._elements), strict=True):
            shapes = [(x.shape[0], n, *x.shape[2:]) for x in like]
            sizes = [math.prod(shape) for shape in shapes]
            key, value = (x.view(shape) for x, shape in zip(part.split(sizes), shapes, strict=True))
            found.append((key, value))
        return found


def _fetch(transfer: Transfer, pair: tuple[Tensor, Tensor], group: Any) -> _Message:
    """Send this rank's keys and values to the ranks that need them, and begin to receive theirs."""
    sizes = [x.shape[0] * math.prod(x.shape[2:]) for x in pair]  # of a row
    sent = pair[0].new_empty(sum(map(len, transfer.send)) * sum(sizes))
    at = 0
    for rows in transfer.send:
        for x, size in zip(pair, sizes, strict=True):
            part = sent[at : (at := at + len(rows) * size)].view(x.shape[0], len(rows), *x.shape[2:])
            torch.index_select(x, 1, rows, out=part)
    elements = ([len(rows) * sum(sizes) for rows in transfer.send], [n * sum(sizes) for n in transfer.receive])
    return _Message(sent, *elements, group)


def _send_back(transfer: Transfer, grads: list[Tensor], group: Any) -> _Message:
    """Send gradients of received keys and values, which stand as `_in_order` put them, to their owners, and begin to
    receive those of this rank's."""
    pieces = [_piece(x, transfer, 1 + rank) for rank in range(len(transfer.receive)) for x in grads]
    size = sum(x.shape[0] * math.prod(x.shape[2:]) for x in grads)  # of a row
    sent = torch.cat([x.flatten() for x in pieces])
    return _Message(sent, [n * size for n in transfer.receive], [len(rows) * size for rows in transfer.send], group)


def _in_order(pieces: list[Tensor], transfer: Transfer) -> Tensor:
    """The rows of the rank and of others, keys ascending."""
    runs = [pieces[n][:, first:stop] for n, first, stop in transfer.order]
    return runs[0] if len(runs) == 1 else torch.cat(runs or [pieces[0][:, :0]], 1)


def _piece(x: Tensor, transfer: Transfer, piece: int) -> Tensor:
    """The rows of a piece out of those that `_in_order` put together."""
    runs, at = [], 0
    for n, first, stop in transfer.order:
        if n == piece:
            runs.append(x[:, at : at + stop - first])
        at += stop - first
    return runs[0] if len(runs) == 1 else torch.cat(runs or [x[:, :0]], 1)


def _rounds(plan: _Plan, tensors: _Tensors) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(number of the part, key heads, its keys, its values); the next ones are on their way while the caller uses
    these."""

    def own(heads: slice) -> tuple[Tensor, Tensor]:
        return tensors.key[:, :, heads], tensors.value[:, :, heads]

    def fetch(number: int, heads: slice) -> _Message | None:
        transfer = plan.parts[number].transfer
        return None if transfer is None else _fetch(transfer, own(heads), plan.mask.group)

    rounds = plan.rounds
    coming = fetch(*rounds[0])
    for (number, heads), following in zip(rounds, [*rounds[1:], None], strict=True):
        key, value = own(heads)
        part = plan.parts[number]
        if part.transfer is not None and coming is not None:
            found = [(key, value), *coming.parts(part.transfer.receive, (key, value))]
            key, value = (_in_order([pair[n] for pair in found], part.transfer) for n in (0, 1))
            del found
        coming = None if following is None else fetch(*following)
        yield number, heads, key, value
