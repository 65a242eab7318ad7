"""The registered operator: one forward, one backward, flat arguments. Knows backends by name only.

Registered through torch.library so that torch.compile, autocast, checkpointing and the flop counter see one op.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from keyspan.backends import Gradients, Needs, load
from keyspan.core.observers import plain, unwatched
from keyspan.core.problem import Problem
from keyspan.dispatch.flops import register_when_imported

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? lo, Tensor? hi, Tensor? diagonal, Tensor? sequence, "
    "Tensor? block_table, Tensor? dense, Tensor[] biases, Tensor? slopes, Tensor? table, Tensor? sinks, "
    "Tensor? query_scale, Tensor? key_scale, Tensor? value_scale, Tensor? seed, int page_size, float scale, "
    "float softcap, float dropout_p, ScalarType output_dtype"
)
_DIFFERENTIABLE = ("query", "key", "value", "slopes", "table", "sinks")
_SAVED = Problem._fields.index("page_size")
"""The fields before this one are tensors (one a list of them); those from here on are numbers."""

_library = torch.library.Library("keyspan", "DEF")
_library.define(f"attention_forward({_PROBLEM}, str backend) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_PROBLEM}, bool[] needs, "
    "str backend) -> Tensor[]"
)


def attend(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem: through the registered op, or, where nothing would see the op, without it.

    Raises:
        RuntimeError: under forward-mode differentiation, whose tangents the op would drop, and inside `torch.func`.
    """
    if _unobserved(problem):
        inputs = _inputs(problem) if torch.is_grad_enabled() else []
        if any(x is not None and x.requires_grad for x in inputs):
            out, lse = _Direct.apply(problem, backend, *inputs)  # type: ignore[no-untyped-call]
            return out, lse
        return _run(problem, backend)
    _refuse_transforms(problem)
    return cast(tuple[Tensor, Tensor], torch.ops.keyspan.attention_forward(*problem, backend))


def _refuse_transforms(problem: Problem) -> None:
    """For what torch would drop in silence, or would refuse in words about its own registration."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in _inputs(problem)
    ):
        raise RuntimeError("keyspan.attention has no forward-mode derivative; use reverse mode")
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return
    tensors = (x for x in (*problem[:_SAVED], *problem.biases) if isinstance(x, Tensor))
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        raise RuntimeError(
            "keyspan.attention has no rule for torch.func (vmap, grad, jacrev, …); give it the batch as B, and "
            "differentiate with torch.autograd"
        )


def _unobserved(problem: Problem) -> bool:
    """Whether nothing would notice the op, neither around it nor among its tensors.

    Its dispatch costs more than a small problem, with gradients many times as much.
    """
    if not unwatched() or problem.query.is_meta:  # without values only the op's shapes are to be had
        return False
    tensors = (*cast(tuple[Any, ...], problem[:_SAVED]), *problem.biases)
    return all(x is None or type(x) is list or plain(x) for x in tensors)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # The casts were made before; what runs here sees the caller's autocast still on.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _run(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    with _without_autocast(problem.query.device):
        return load(backend).forward(problem)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    problem, backend = Problem(*args[:-1]), args[-1]
    out, lse = _run(problem, backend)
    return out.contiguous(), lse.contiguous()  # as the fake says: compiled code relies on the strides


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*args[:-1])
    B, M, G, H, _ = problem.query.shape
    out = problem.query.new_empty((B, M, G, H, problem.value.shape[-1]), dtype=problem.output_dtype)
    return out, problem.query.new_empty((B, G, H, M), dtype=problem.compute_dtype)


def _inputs(of: Problem | Gradients) -> list[Tensor | None]:
    """The differentiable inputs of a problem, or their gradients, in the order in which the ops list them."""
    return [getattr(of, name) for name in _DIFFERENTIABLE] + list(of.biases)


def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    *fields, needs, backend = args
    problem = Problem(*fields)
    first = len(_DIFFERENTIABLE)
    with _without_autocast(problem.query.device):
        grads = load(backend).backward(
            problem, grad_out, grad_lse, out, lse, Needs._make([*needs[:first], list(needs[first:])])
        )
    # The op returns tensors only: an empty one stands for a gradient nobody asked for.
    return [lse.new_empty(0) if grad is None else grad.contiguous() for grad in _inputs(grads)]


def _backward_fake(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    *fields, needs, _ = args
    inputs = _inputs(Problem(*fields))
    return [
        lse.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    problem = Problem(*inputs[:-1])
    ctx.save_for_backward(*output, *(x for x in problem[:_SAVED] if isinstance(x, Tensor)), *problem.biases)
    # What was a tensor is put back from the saved ones; the rest is kept as it is.
    ctx.present = [isinstance(x, Tensor) for x in problem[:_SAVED]]
    ctx.numbers = (*problem[_SAVED:],)
    ctx.biases = len(problem.biases)
    ctx.backend = inputs[-1]


def _restore(ctx: Any) -> tuple[Tensor, Tensor, Problem]:
    out, lse, *saved = ctx.saved_tensors
    count = len(saved) - ctx.biases
    tensors, biases = iter(saved[:count]), saved[count:]
    fields: list[Any] = [next(tensors) if present else None for present in ctx.present]
    return out, lse, Problem(*fields, *ctx.numbers)._replace(biases=biases)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, needed: list[bool]) -> list[Tensor | None]:
    """Of each of `_inputs`, None where it is not needed; `needed` says so of all but the dense biases."""
    out, lse, problem = _restore(ctx)
    needs = needed + [x.requires_grad for x in problem.biases]
    if problem.quantized:
        raise RuntimeError(f"keyspan.attention has no gradient where keys are {problem.key.dtype}")
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # With a graph of this pass asked for, the op says that there is none.
    given = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
    direct = not torch.is_grad_enabled() and all(map(plain, given)) and _unobserved(problem)
    run = _backward if direct else torch.ops.keyspan.attention_backward
    grads = run(grad_out, grad_lse, out, lse, *problem, needs, ctx.backend)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class _Direct(torch.autograd.Function):
    """The op's gradients where nothing would see the op."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = _run(problem, backend)
        _setup_context(ctx, (*problem, backend), (out, lse))
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[2 : 2 + len(_DIFFERENTIABLE)])
        return (None, None, *_gradients(ctx, grads[0], grads[1], needed))


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    # A list argument counts as one input; its entries tell for themselves.
    by_field = dict(zip(Problem._fields, ctx.needs_input_grad, strict=False))
    found = _gradients(ctx, grad_out, grad_lse, [bool(by_field[name]) for name in _DIFFERENTIABLE])
    first = len(_DIFFERENTIABLE)
    by_name = dict(zip(_DIFFERENTIABLE, found[:first], strict=True))
    result: list[Any] = [found[first:] if name == "biases" else by_name.get(name) for name in Problem._fields]
    return (*result, None)


def _autograd_twice(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("keyspan.attention is differentiable once: its backward has no backward")


for _name, _body, _fake, _gradient, _context in (
    ("attention_forward", _forward, _forward_fake, _autograd, _setup_context),
    ("attention_backward", _backward, _backward_fake, _autograd_twice, None),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"keyspan::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"keyspan::{_name}", _gradient, setup_context=_context, lib=_library)

register_when_imported()
