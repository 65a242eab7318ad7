"""The registered operator: one forward, one backward, flat arguments.

Registered through torch.library so that torch.compile, autocast, checkpointing and the FLOP counter see one op. Where
nothing observes the op it is bypassed: the dispatcher costs more than a small problem, with gradients many times as
much.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from keyspan.backends import Gradients, Needs, Replay, load, recorder
from keyspan.core import shims
from keyspan.core.problem import Problem
from keyspan.dispatch.cache import CACHE, signature
from keyspan.dispatch.flops import register, register_when_imported

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "torch.dtype": "ScalarType",
}
_PROBLEM = ", ".join(
    f"{_TYPES[str(getattr(kind, '__forward_arg__', kind))]} {name}" for name, kind in Problem.__annotations__.items()
)
NUMBERS = Problem._fields.index("page_size")
"""The fields before this one are tensors (one a list of them); those from here on are numbers."""
_NO_TRANSFORM = (
    "keyspan.attention has no rule for torch.func (vmap, grad, jacrev, …) and batched gradients (is_grads_batched, "
    "jacobian(vectorize=True)); give it the batch as B, and differentiate with torch.autograd, one gradient at a time"
)
DIFFERENTIABLE = Needs._fields[:-1]
"""The differentiable fields of a problem; `biases`, a list, comes behind them."""

_library = torch.library.Library("keyspan", "DEF")
_library.define(f"attention_forward({_PROBLEM}, str backend) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_PROBLEM}, bool[] needs, "
    "str backend) -> Tensor[]"
)


def attend(problem: Problem, backend: str, cached: bool = True) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem: through the registered op, or, where nothing observes the op, without it.

    Args:
        cached: whether to look for a replay of the problem.

    Raises:
        RuntimeError: under forward-mode differentiation, whose tangents the op would drop, and inside `torch.func`.
    """
    if _bypass_allowed(problem):
        inputs = flat(problem) if torch.is_grad_enabled() else []
        if any(x is not None and x.requires_grad for x in inputs):
            out, lse = _Direct.apply(problem, backend, cached, *inputs)  # type: ignore[no-untyped-call]
            return out, lse
        return run_forward(problem, backend, cached)
    _refuse_transforms(problem)
    return cast(tuple[Tensor, Tensor], torch.ops.keyspan.attention_forward(*problem, backend))


def gradients(
    problem: Problem,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
    backend: str,
    cached: bool = True,
) -> list[Tensor | None]:
    """The gradient of each of `flat(problem)`, None where `needs` says that it is not needed."""
    if problem.quantized:
        raise RuntimeError(f"keyspan.attention has no gradient where keys are {problem.key.dtype}")
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # Where autograd records this pass for a second derivative, the op raises the error.
    given = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
    if not torch.compiler.is_compiling() and any(map(shims.transformed, given)):
        raise RuntimeError(_NO_TRANSFORM)
    if not torch.is_grad_enabled() and all(map(shims.plain, given)) and _bypass_allowed(problem):
        return flat(_run_backward(problem, grad_out, grad_lse, out, lse, needs, backend, cached))
    found = torch.ops.keyspan.attention_backward(grad_out, grad_lse, out, lse, *problem, needs, backend)
    return [grad if need else None for grad, need in zip(found, needs, strict=True)]


def flat(of: Problem | Gradients) -> list[Tensor | None]:
    """The differentiable inputs of a problem, or their gradients, in the order in which the ops list them."""
    return [*(getattr(of, name) for name in DIFFERENTIABLE), *of.biases]


def _tensors(problem: Problem) -> list[Tensor]:
    """All tensors of a problem that it has, the dense biases last."""
    return [x for x in problem[:NUMBERS] if isinstance(x, Tensor)] + problem.biases


def _refuse_transforms(problem: Problem) -> None:
    """Raise where torch would drop a derivative silently, or would complain about our registration of the op."""
    if shims.dual_level() and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in flat(problem)
    ):
        raise RuntimeError("keyspan.attention has no forward-mode derivative; use reverse mode")
    if not torch.compiler.is_compiling() and any(map(shims.transformed, _tensors(problem))):
        raise RuntimeError(_NO_TRANSFORM)


def _bypass_allowed(problem: Problem) -> bool:
    """Whether nothing would notice that the dispatcher is bypassed, neither a mode nor one of the tensors."""
    return shims.unobserved() and not problem.query.is_meta and all(map(shims.plain, _tensors(problem)))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast has cast the inputs; inside the backend it is off."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def run_forward(problem: Problem, backend: str, cached: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) by the backend, without the op."""
    module = load(backend)
    with without_autocast(problem.query.device):
        recording = recorder(module) if cached else None
        if recording is None:
            return module.forward(problem)
        given = _tensors(problem)
        found = signature(given)
        if found is None:
            return module.forward(problem)

        def record() -> tuple[list[Tensor], Replay[list[Tensor]] | None]:
            return recording.record_forward(problem, given, problem.shapes)

        form, pointers = found
        key = (backend, _form(problem), form)
        out, lse = CACHE.run(key, pointers, given, lambda: list(module.forward(problem)), record)
        return out, lse


def _run_backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
    backend: str,
    cached: bool,
) -> Gradients:
    module = load(backend)
    backward = (grad_out, grad_lse, out, lse, as_needs(needs))
    with without_autocast(problem.query.device):
        recording = recorder(module) if cached else None
        given = [*_tensors(problem), out, lse, grad_out, *(() if grad_lse is None else (grad_lse,))]
        found = signature(given) if recording is not None else None
        if recording is None or found is None:
            return module.backward(problem, *backward)

        def record() -> tuple[Gradients, Replay[Gradients] | None]:
            return recording.record_backward(problem, given, *backward)

        form, pointers = found
        key = (backend, _form(problem), tuple(needs), grad_lse is None, form)
        return CACHE.run(key, pointers, given, lambda: module.backward(problem, *backward), record)


def _form(problem: Problem) -> tuple[object, ...]:
    """What a problem is apart from its tensors: which of them there are, and the numbers."""
    return tuple(x is None for x in problem[:NUMBERS]), len(problem.biases), problem[NUMBERS:]


def as_needs(flags: list[bool]) -> Needs:
    """The flags of `flat`'s entries by name."""
    count = len(DIFFERENTIABLE)
    return Needs._make([*flags[:count], flags[count:]])


def check_memory(names: Iterable[str], values: Iterable[Any]) -> None:
    """Raise for a tensor whose storage was freed, before something reads it."""
    for name, x in zip(names, values, strict=False):
        if type(x) in shims.PLAIN and x.numel() and not x.is_meta and not x.data_ptr():
            raise ValueError(f"{name}: got a tensor whose storage was freed, want one with memory")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    check_memory(Problem._fields, args)
    out, lse = run_forward(Problem(*args[:-1]).known(), args[-1], cached=True)
    return out.contiguous(), lse.contiguous()  # as the fake says: compiled code relies on the strides


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*args[:-1])
    if problem.seed is not None and shims.recomputes_in_backward():
        raise RuntimeError(
            "keyspan.attention: got dropout_p > 0 under torch.compile with an activation memory budget below 1 or "
            "aggressive recomputation, which draw another dropout pattern in backward; want a budget of 1, or "
            "torch.utils.checkpoint"
        )
    out, lse = problem.shapes
    query = problem.query
    return query.new_empty(out, dtype=problem.output_dtype), query.new_empty(lse, dtype=problem.compute_dtype)


def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    *fields, needs, backend = args
    check_memory(Problem._fields, fields)
    grads = _run_backward(Problem(*fields).known(), grad_out, grad_lse, out, lse, list(needs), backend, cached=True)
    # The op returns tensors only: an empty one stands for a gradient that is not needed.
    return [lse.new_empty(0) if grad is None else grad.contiguous() for grad in flat(grads)]


def _backward_fake(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    *fields, needs, _ = args
    return [
        lse.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(flat(Problem(*fields)), needs, strict=True)
    ]


Form = tuple[torch.Size, torch.dtype, torch.device]


def forms_of(tensors: Iterable[Tensor]) -> list[Form]:
    """What backward relies on in each tensor that autograd saves."""
    return [(x.shape, x.dtype, x.device) for x in tensors]


def check_saved(tensors: Iterable[Tensor], forms: list[Form]) -> None:
    """Raise where a saved tensor comes back in another form: backends read its memory as it was in forward."""
    for got, want in zip(forms_of(tensors), forms, strict=True):
        if got != want:
            (shape, *kind), (other, *other_kind) = got, want
            raise RuntimeError(
                f"keyspan.attention: a tensor saved for backward comes back as {list(shape)} {kind[0]} on {kind[1]}, "
                f"want {list(other)} {other_kind[0]} on {other_kind[1]} as in forward; a hook on saved tensors that "
                "does not restore it, or an assignment to .data?"
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    problem = Problem(*inputs[: len(Problem._fields)])
    saved = [*output, *_tensors(problem)]
    ctx.save_for_backward(*saved)
    ctx.forms = forms_of(saved)
    ctx.present = [isinstance(x, Tensor) for x in problem[:NUMBERS]]
    ctx.numbers = problem[NUMBERS:]
    ctx.backend, *ctx.cached = inputs[len(Problem._fields) :]


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, needed: list[bool]) -> list[Tensor | None]:
    """Of each of `flat(problem)`; `needed` says of all but the dense biases whether it is needed."""
    out, lse, *saved = given = ctx.saved_tensors
    check_saved(given, ctx.forms)
    tensors = iter(saved)
    fields: list[Any] = [next(tensors) if present else None for present in ctx.present]
    problem = Problem(*fields, *ctx.numbers)._replace(biases=[*tensors])
    needs = needed + [x.requires_grad for x in problem.biases]
    return gradients(problem, grad_out, grad_lse, out, lse, needs, ctx.backend, *ctx.cached)


class _Direct(torch.autograd.Function):
    """The op's gradients without the op."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, backend: str, cached: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = run_forward(problem, backend, cached)
        _setup_context(ctx, (*problem, backend, cached), (out, lse))
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[3 : 3 + len(DIFFERENTIABLE)])
        return (None, None, None, *_gradients(ctx, grads[0], grads[1], needed))


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    # A list argument counts as one input; its entries tell for themselves.
    by_field = dict(zip(Problem._fields, ctx.needs_input_grad, strict=False))
    found = _gradients(ctx, grad_out, grad_lse, [bool(by_field[name]) for name in DIFFERENTIABLE])
    count = len(DIFFERENTIABLE)
    by_name = dict(zip(DIFFERENTIABLE, found[:count], strict=True))
    result: list[Any] = [found[count:] if name == "biases" else by_name.get(name) for name in Problem._fields]
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

register_when_imported(register)
