"""What tests and benchmarks share: peak memory, a textbook attention in any dtype, tolerances derived from it, and a
check that results do not depend on how they are computed together.

The textbook form is independent of the backends: dense, a line per term, under autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from keyspan.core.dropout import kept
from keyspan.core.problem import STORED, Problem
from keyspan.testing.invariance import check_invariance as check_invariance


def peak_memory(function: Callable[[], Any]) -> int:
    """Most bytes that torch held at a time during `function()`, above what it held before; CPU or current GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def textbook(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out `[B, M, G, H, V]`, lse `[B, G, H, M]`) with every step in `dtype`, dense; differentiable by autograd."""
    query, key, value = _inputs(problem, dtype)
    score, visible, column = _scores(problem, torch.einsum("bmghk,bngk->bghmn", query, key), dtype)
    if score.shape[-1] == 0:
        nothing = (query.sum() + value.sum()) * 0  # the result is constant, and still of a graph
        out = query.new_zeros((*query.shape[:-1], value.shape[-1])) + nothing
        return out, query.new_full(score.shape[:-1], -torch.inf) + nothing
    # A row without any finite score has no softmax: it is taken out before and set to zero after.
    empty = (score == -torch.inf).all(-1, keepdim=True)
    weight = score.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., : len(column)].masked_fill(~visible, 0)
    # Relative to the peak: torch's gradient of logsumexp is exp(score − lse), which loses log Σ beside a large peak.
    peak = score.detach().amax(-1, keepdim=True).masked_fill(empty, 0)
    lse = (score.masked_fill(empty, 0) - peak).logsumexp(-1) + peak[..., 0]
    lse = lse.masked_fill(empty[..., 0], -torch.inf)
    keep = _dropout_factor(problem, weight, column)
    return torch.einsum("bghmn,bngv->bmghv", weight if keep is None else weight * keep, value), lse


def flash_emulation(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The arithmetic of FlashAttention-2 (Dao 2023) with operands of `dtype`, dense: the error a fused kernel may have.

    Scores, softmax and accumulators are fp32. Forward rounds weights relative to the row's exact maximum to `dtype`
    before their product with the values, and sums the rounded weights. Backward recomputes the weights from lse, and
    rounds weights and gradients of scores to `dtype` before their products. For `results`, like `textbook`.

    Returns:
        (out `[B, M, G, H, V]` in `problem.output_dtype`, lse `[B, G, H, M]` in fp32), differentiable in all inputs.
    """
    query, key, value = (x.float() for x in _inputs(problem, dtype))
    product = _RoundedGradientProduct.apply(query, key, dtype)  # type: ignore[no-untyped-call]
    score, visible, column = _scores(problem, product, torch.float32)
    keep = _dropout_factor(problem, score[..., : len(column)], column)
    visible = visible.expand(*score.shape[:-1], len(column))
    out, lse = _FlashSoftmax.apply(score, value, visible, keep, dtype)  # type: ignore[no-untyped-call]
    return out.to(problem.output_dtype), lse


class _RoundedGradientProduct(torch.autograd.Function):
    """q·k `[B, G, H, M, N]` whose backward rounds the gradient to a dtype before its products."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.dtype = dtype
        return torch.einsum("bmghk,bngk->bghmn", query, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key = ctx.saved_tensors
        grad = grad.to(ctx.dtype).float()
        dquery = torch.einsum("bghmn,bngk->bmghk", grad, key)
        return dquery, torch.einsum("bghmn,bmghk->bngk", grad, query), None


class _FlashSoftmax(torch.autograd.Function):
    """(out, lse) from scores, −inf where hidden, which may have a sink as one more column, and values."""

    @staticmethod
    def forward(
        ctx: Any, score: Tensor, value: Tensor, visible: Tensor, keep: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        N = value.shape[1]
        peak = score.amax(-1, keepdim=True) if score.shape[-1] else score.new_full((*score.shape[:-1], 1), -torch.inf)
        weight = torch.exp(score - torch.where(peak == -torch.inf, 0, peak))
        rounded = weight[..., :N].masked_fill(~visible, 0).to(dtype).float()
        total = rounded.sum(-1) + weight[..., N:].sum(-1)
        lse = torch.where(total == 0, -torch.inf, peak[..., 0] + total.log())
        dropped = rounded if keep is None else rounded * keep
        out = (
            torch.einsum("bghmn,bngv->bmghv", dropped, value)
            / torch.where(total == 0, 1, total).movedim(3, 1)[..., None]
        )
        ctx.save_for_backward(score, value, visible, keep, out.to(dtype).float(), lse)
        ctx.dtype = dtype
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        score, value, visible, keep, out, lse = ctx.saved_tensors
        N = value.shape[1]
        weight = torch.exp(score - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])
        weight[..., :N].masked_fill_(~visible, 0)
        dropped = weight[..., :N] if keep is None else weight[..., :N] * keep
        dvalue = torch.einsum("bghmn,bmghv->bngv", dropped.to(ctx.dtype).float(), grad_out)
        dweight = torch.zeros_like(score)
        dweight[..., :N] = torch.einsum("bmghv,bngv->bghmn", grad_out, value)
        if keep is not None:
            dweight[..., :N] *= keep
        delta = (grad_out * out).sum(-1).movedim(1, 3) - grad_lse
        return weight * (dweight - delta[..., None]), dvalue, None, None, None


def _inputs(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, and keys and values in the row that ranges count in, in `dtype`."""
    slots = problem.keys_in_row(0, problem.row_length)
    query = _dequantized(problem.query, problem.query_scale, dtype)
    key = _dequantized(problem.key, problem.key_scale, dtype)
    value = _dequantized(problem.value, problem.value_scale, dtype)
    return (query, key, value) if slots is None else (query, key[:, slots], value[:, slots])


def _scores(problem: Problem, product: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in `dtype` from products q·k, −inf where hidden, with a sink as one more column; visible keys; columns."""
    lo, hi, diagonal = problem.ranges
    j = torch.arange(problem.row_length)
    column = j % max(problem.N, 1)

    def term(x: Tensor) -> Tensor:
        return x if x.shape[-1] == 1 else x[..., column]

    score = product * problem.scale
    if problem.softcap:
        score = problem.softcap * (score / problem.softcap).tanh()
    bias = torch.zeros((), dtype=dtype)
    for dense in problem.biases:
        bias = bias + term(dense).to(dtype)
    visible = torch.zeros((), dtype=torch.bool)
    for s in range(lo.shape[0]):
        seen = ((j >= lo[s, ..., None]) & (j < hi[s, ..., None]))[:, None, None]
        distance = (j - diagonal[s, ..., None])[:, None, None]
        if problem.slopes is not None:
            bias = bias - torch.where(seen, problem.slopes.to(dtype)[..., None, None] * distance.abs(), 0)
        if problem.table is not None:
            R = problem.table.shape[-1] // 2
            by_key = problem.table.to(dtype)[:, :, distance[:, 0, 0].clamp(-R, R) + R].movedim(2, 0)
            bias = bias + torch.where(seen, by_key, 0)
        visible = visible | seen
    if problem.dense is not None:
        visible = visible & term(problem.dense)
    score = (score + bias).masked_fill(~visible, -torch.inf)
    if problem.sinks is not None:
        sink = problem.sinks.to(dtype)[..., None, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, sink], -1)
    return score, visible, column


def _dropout_factor(problem: Problem, weight: Tensor, column: Tensor) -> Tensor | None:
    """0 or 1 / (1 − p) for each of the weights `[B, G, H, M, N]`; None without dropout."""
    if problem.seed is None:
        return None
    B, G, H, M, _ = weight.shape
    b, h, i = (torch.arange(n) for n in (B, G * H, M))
    keep: Tensor = kept(problem.seed, problem.dropout_p, b, h, i, column).view(weight.shape)
    return keep.to(weight.dtype) / (1 - problem.dropout_p)


def _dequantized(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `x` `[B, n, …, d]` stands for, rounded to `dtype` once."""
    if scale is None:
        return x.to(dtype)
    by_row = scale.double().repeat_interleave(x.shape[1] // scale.shape[1], 1)
    return (x.double() * by_row[..., None]).to(dtype)


def differentiable(problem: Problem) -> dict[str, Tensor]:
    """The differentiable inputs of a problem by name; dense biases as `bias0`, `bias1`, …"""
    names = ("query", "key", "value", "slopes", "table", "sinks")
    found = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    return found | {f"bias{n}": x for n, x in enumerate(problem.biases)}


def with_inputs(problem: Problem, inputs: dict[str, Tensor]) -> Problem:
    """The problem with its differentiable inputs replaced by these, named as `differentiable` names them."""
    fields: dict[str, Any] = {name: x for name, x in inputs.items() if not name.startswith("bias")}
    return problem._replace(biases=[inputs[f"bias{n}"] for n in range(len(problem.biases))], **fields)


def results(
    function: Callable[[Problem], tuple[Tensor, Tensor]], problem: Problem, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output, lse and the gradient of every differentiable input, in fp64, of `function` on the problem in `dtype`.

    The cotangents are fixed pseudo-random numbers, so that results of different functions can be compared. What is
    stored in 8 bits stays so, but for fp64, which holds it exactly; there are no gradients then.
    """
    inputs = {
        name: x.detach() if x.dtype in STORED and dtype != torch.float64 else x.detach().to(dtype)
        for name, x in differentiable(problem).items()
    }
    if not problem.quantized:
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out, lse = function(with_inputs(problem, inputs)._replace(output_dtype=dtype))
    if problem.quantized:
        return {"out": out.double(), "lse": lse.double()}
    grad_out, grad_lse = _cotangents(out, lse)
    cotangents = (grad_out.to(out.dtype), grad_lse.to(lse.dtype))
    grads = torch.autograd.grad((out, lse), list(inputs.values()), cotangents, materialize_grads=True)
    found = {"out": out, "lse": lse} | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)}
    return {name: x.detach().double() for name, x in found.items()}


def _cotangents(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    # Values that every dtype holds: rounding them is no error of a backend.
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16().double()
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    return grad_out, torch.where(lse == -torch.inf, 0, grad_lse)


def _of_rounded_output(problem: Problem, dtype: torch.dtype) -> dict[str, float]:
    """How far the gradients move, by name, where backward starts from an output that was stored in `dtype`.

    It takes the sum of output times its gradient, over V, off each row's gradient of a weight. What rounding adds to
    that sum acts as a gradient of lse, with the sign turned.
    """
    inputs = {name: x.detach().double().requires_grad_() for name, x in differentiable(problem).items()}
    out, lse = textbook(with_inputs(problem, inputs), torch.float64)
    rounding = (out.to(dtype).double() - out).detach().nan_to_num(0, 0, 0)
    added = (_cotangents(out, lse)[0] * rounding).sum(-1).movedim(1, -1)
    moved = torch.autograd.grad(lse, list(inputs.values()), added, materialize_grads=True)
    return {f"d{name}": float(x.abs().max()) if x.numel() else 0.0 for name, x in zip(inputs, moved, strict=True)}


def tolerances(problem: Problem, dtype: torch.dtype, exact: dict[str, Tensor]) -> dict[str, float]:
    """How far from `exact` a result in `dtype` may be, by name.

    Three times the error of the textbook form in that dtype, and three times what storing the output in it does to a
    gradient; and for where the textbook happens to be lucky, one rounding of the largest value to `dtype` and 32 to
    the dtype that backends compute in. With a query of 8 bits bf16 stands in for a finer dtype: weights have then no
    more bits than that.
    """
    if problem.query.dtype in STORED:
        dtype = torch.bfloat16
    dense = results(lambda p: textbook(p, dtype), problem, dtype)
    stored_output = _of_rounded_output(problem, dtype) if exact.keys() - {"out", "lse"} else {}
    stored, computed = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = {}
    for name, x in exact.items():
        largest = float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0
        error = worst(dense[name], x) + stored_output.get(name, 0.0)
        allowed[name] = 3 * error + stored * largest + 32 * computed * (1 + largest)
    return allowed


def rms_error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of the error, by name, over entries that are finite in `exact`."""
    return {
        name: float((got[name] - x)[torch.isfinite(x)].square().mean().sqrt()) for name, x in exact.items() if x.numel()
    }


def worst(got: Tensor, want: Tensor) -> float:
    """Largest difference; infinities and NaN must be in the same places, or the answer is inf."""
    if got.shape != want.shape or not torch.equal(torch.isfinite(got), torch.isfinite(want)):
        return torch.inf
    finite = torch.isfinite(want)
    same = torch.equal(got[~finite].nan_to_num(0), want[~finite].nan_to_num(0))
    return float((got - want)[finite].abs().max()) if finite.any() and same else (0.0 if same else torch.inf)
