"""Dense softmax attention and its gradient: the definition that every backend is tested against.

Stores all B·H·M·N scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keyspan.backends import Gradients, Needs
from keyspan.backends.common import dequantized, visible_matmul
from keyspan.core.dropout import kept
from keyspan.core.problem import Problem


def reason_against(problem: Problem) -> str | None:
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    a = dense_attention(problem)
    return a.out.movedim(3, 1).to(problem.output_dtype), a.lse


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    a = dense_attention(problem)
    grad = grad_out.to(a.out.dtype).movedim(1, 3)  # [B, G, H, M, V]
    dweight = torch.where(a.visible, grad @ a.value.transpose(-1, -2), 0) * a.keep
    delta = (grad * a.out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    dscore = torch.where(a.visible, a.weight * (dweight - delta), 0)  # of the score with bias
    # The slope of a hidden score may be NaN.
    draw = torch.where(a.visible, dscore * a.slope, 0)  # of the score before softcap
    hidden = a.visible.transpose(-1, -2)

    dquery = visible_matmul(draw, a.key, a.visible).movedim(3, 1) * problem.scale
    dkey = visible_matmul(draw.transpose(-1, -2), a.query * problem.scale, hidden).sum(2)
    dvalue = visible_matmul((a.weight * a.keep).transpose(-1, -2), grad, hidden).sum(2)

    def of_keys(x: Tensor, like: Tensor) -> Tensor:
        x, slots = x.movedim(1, 2), problem.keys_in_row(0, problem.row_length)
        if slots is None:
            return x.to(like.dtype)
        return x.new_zeros(like.shape).index_add_(1, slots, x).to(like.dtype)

    dslopes = dtable = dsinks = None
    if problem.slopes is not None:
        dslopes = (-dscore * a.distance.abs()).sum((-1, -2)).sum_to_size(problem.slopes.shape).to(problem.slopes.dtype)
    if problem.table is not None:
        reach = problem.table.shape[-1] // 2
        index = (a.distance.clamp(-reach, reach) + reach).expand(dscore.shape).movedim(0, 2).flatten(2)
        dtable = torch.zeros_like(problem.table, dtype=dscore.dtype)
        dtable = dtable.scatter_add_(2, index, dscore.movedim(0, 2).flatten(2)).to(problem.table.dtype)
    if problem.sinks is not None:
        dsinks = torch.where(a.sink_weight > 0, -a.sink_weight * delta, 0).sum((0, 3, 4)).to(problem.sinks.dtype)

    def of_bias(bias: Tensor) -> Tensor:
        columns = (torch.arange(problem.row_length, device=bias.device) % max(problem.N, 1)).long()
        by_key = dscore.new_zeros((*dscore.shape[:-1], problem.N)).index_add_(-1, columns, dscore)
        return by_key.sum_to_size(bias.shape).to(bias.dtype)

    return Gradients(
        dquery.to(problem.query.dtype) if needs.query else None,
        of_keys(dkey, problem.key) if needs.key else None,
        of_keys(dvalue, problem.value) if needs.value else None,
        dslopes if needs.slopes else None,
        dtable if needs.table else None,
        dsinks if needs.sinks else None,
        [of_bias(x) if needed else None for x, needed in zip(problem.biases, needs.biases, strict=True)],
    )


class Dense(NamedTuple):
    """All intermediate results of a forward pass; keys are `[B, G, 1, N, ·]`, query rows `[B, G, H, M, ·]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    distance: Tensor
    """Key position minus query position, `[B or 1, 1, 1, M, N]`; 0 where hidden."""
    visible: Tensor
    slope: Tensor
    """Derivative of the capped score by the one before softcap."""
    weight: Tensor
    """Softmax of the scores."""
    sink_weight: Tensor
    """The sink's part of the softmax, `[B, G, H, M, 1]`; 0 without sinks."""
    keep: Tensor
    """0 where dropout drops a weight, else 1 / (1 − p)."""
    out: Tensor
    lse: Tensor


def dense_attention(problem: Problem) -> Dense:
    """The dense formula, differentiable by autograd as well."""
    dtype = problem.compute_dtype
    lo, hi, diagonal = problem.ranges
    everything = slice(None)
    query = dequantized(problem.query, problem.query_scale, everything, dtype).movedim(1, 3)
    slots = problem.keys_in_row(0, problem.row_length)
    key, value = (
        dequantized(x, scale, everything if slots is None else slots, dtype).movedim(1, 2)[:, :, None]
        for x, scale in ((problem.key, problem.key_scale), (problem.value, problem.value_scale))
    )

    j = torch.arange(problem.row_length, device=key.device)
    logical = j % max(problem.N, 1)
    in_range = (j >= lo[..., None]) & (j < hi[..., None])  # [S, B|1, M, N]
    # Ranges are disjoint: a key's distance is counted from the diagonal of the one range that holds it.
    distance = torch.where(in_range, j - diagonal[..., None], 0).sum(0)[:, None, None]
    visible = in_range.any(0)[:, None, None]
    if problem.dense is not None:
        visible = visible & _columns(problem.dense, logical)

    score = (query * problem.scale) @ key.transpose(-1, -2)
    slope = torch.ones_like(score)
    if problem.softcap:
        unit = torch.tanh(score / problem.softcap)
        score, slope = problem.softcap * unit, 1 - unit * unit
    for bias in problem.biases:
        score = score + _columns(bias, logical).to(dtype)
    if problem.slopes is not None:
        score = score - problem.slopes.to(dtype)[..., None, None] * distance.abs()
    if problem.table is not None:
        reach = problem.table.shape[-1] // 2
        relative = problem.table.to(dtype)[:, :, distance[:, 0, 0].clamp(-reach, reach) + reach]
        score = score + relative.movedim(2, 0)

    visible = visible.expand(score.shape)
    score = torch.where(visible, score, -torch.inf)
    shape = (*score.shape[:-1], 1)
    peak = score.detach().amax(-1, keepdim=True) if score.shape[-1] else score.new_full(shape, -torch.inf)
    if problem.sinks is not None:
        sink = problem.sinks.to(dtype)[..., None, None]
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == -torch.inf, 0, peak)
    weight = torch.where(visible, torch.exp(torch.where(visible, score, 0) - peak), 0)
    total = weight.sum(-1, keepdim=True)
    sink_weight = torch.zeros_like(total)
    if problem.sinks is not None:
        sink_weight = torch.exp(sink - peak)
        total = total + sink_weight
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -torch.inf, torch.log(total) + peak)[..., 0]
    weight = torch.where(visible, weight / total, 0)

    keep = torch.ones_like(weight)
    if problem.seed is not None:
        B, G, H, M, _ = score.shape
        b, h, i = (torch.arange(n, device=key.device) for n in (B, G * H, M))
        keep = kept(problem.seed, problem.dropout_p, b, h, i, logical).unflatten(1, (G, H)).to(dtype)
        keep = keep / (1 - problem.dropout_p)
    return Dense(
        query,
        key,
        value,
        distance,
        visible,
        slope,
        weight,
        sink_weight / total,
        keep,
        visible_matmul(weight * keep, value, visible),
        lse,
    )


def _columns(x: Tensor, logical: Tensor) -> Tensor:
    """Columns of a dense term for all keys; with paged keys every sequence repeats the same columns."""
    return x if x.shape[-1] in (1, len(logical)) else x[..., logical]
