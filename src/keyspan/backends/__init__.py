"""How attention is computed: the backends, and what they have in common. `keyspan.dispatch.choose` picks one.

A backend is a module with three functions:

    reason_against(problem) -> str | None       why it cannot compute this problem
    forward(problem) -> (out, lse)              out [B, M, G, H, V] in output_dtype, lse [B, G, H, M] in compute_dtype
    backward(problem, grad_out, grad_lse, out, lse, needs) -> gradients, one per field of Needs

A backend whose Python code takes longer than a small problem also has

    record_forward(problem, given, shapes) -> ((out, lse), replay)
    record_backward(problem, given, …) -> (gradients, replay)

which compute the same and return a replay: a function that does it again on other tensors of the same signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from keyspan.core.problem import Problem

BACKENDS = ("triton", "native", "chunked", "reference")
"""All backends, by name."""

AUTOMATIC = ("triton", "native", "chunked")
"""Those that `backend=None` tries, in this order; the last accepts every problem. On the CPU `triton` is an interpreter
for tests, which runs only when asked for by name."""


class Needs(NamedTuple):
    """Which gradients are asked for; the answer has the same fields with tensors in them."""

    query: bool
    key: bool
    value: bool
    slopes: bool
    table: bool
    sinks: bool
    biases: list[bool]


class Gradients(NamedTuple):
    """Gradients in the shape and dtype of what they belong to; None where none was asked for."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    slopes: Tensor | None
    table: Tensor | None
    sinks: Tensor | None
    biases: list[Tensor | None]


T_co = TypeVar("T_co", covariant=True)


class Replay(Protocol[T_co]):
    """Computes a recorded problem on other tensors."""

    def __call__(self, pointers: list[int], tensors: Sequence[Tensor]) -> T_co | None:
        """The results; None where a setting that the recording relies on has changed.

        Args:
            pointers: addresses of `tensors`. The list is not changed.
            tensors: in the order in which they were recorded, of the same signature.
        """
        ...


def template(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What `empty_like` makes tensors from: it has the dtype and device of `x`, a shape, and no memory to speak of."""
    return x.new_empty(1).expand(tuple(shape))


def empty_like(template: Tensor) -> Tensor:
    """A new contiguous tensor, in half the time that it takes to pass shape, dtype and device."""
    return torch.empty_like(template, memory_format=torch.contiguous_format)


class Recorder(Protocol):
    """The further functions of some backend modules."""

    def record_forward(
        self, problem: Problem, given: Sequence[Tensor], shapes: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], Replay[list[Tensor]] | None]:
        """(out,) or (out, lse) of `forward`, and a replay; None where there is none, e.g. since a tensor is copied.

        Args:
            given: the tensors that the replay is given anew; all others are the problem's own and stay as they are.
            shapes: of `out`, or of `out` and `lse`, as the results and those of replays have them.
        """
        ...

    def record_backward(
        self,
        problem: Problem,
        given: Sequence[Tensor],
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs: Needs,
    ) -> tuple[Gradients, Replay[Gradients] | None]:
        """Gradients of `backward`, and a replay; `given` ends with out, lse, grad_out and, if any, grad_lse."""
        ...


class Backend(Protocol):
    """The three functions of a backend module."""

    def reason_against(self, problem: Problem) -> str | None: ...

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        problem: Problem,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs: Needs,
    ) -> Gradients: ...


def recorder(module: Backend) -> Recorder | None:
    """The backend module, where it can record."""
    return cast(Recorder, module) if hasattr(module, "record_forward") else None


def load(name: str) -> Backend:
    """The backend module of this name."""
    # Plain imports, one per name: torch.compile traces these, and not importlib.
    if name == "triton":
        from keyspan.backends import triton

        return triton
    if name == "native":
        from keyspan.backends import native

        return native
    if name == "chunked":
        from keyspan.backends import chunked

        return chunked
    from keyspan.backends import reference

    return reference
