"""How attention is computed: the backends and the choice among them. Knows nothing of layouts or masks.

A backend is a module with three functions:

    reason_against(problem) -> str | None       why it cannot compute this problem
    forward(problem) -> (out, lse)              out [B, M, G, H, V] in output_dtype, lse [B, G, H, M] in compute_dtype
    backward(problem, grad_out, grad_lse, out, lse, needs) -> gradients, one per field of Needs

One for which Python takes longer than a small problem has a fourth:

    record(problem, pointers, shapes) -> (out, lse, again)    forward, and what computes the same on other memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from keyspan.core.problem import Problem

BACKENDS = ("triton", "native", "chunked", "reference")
"""All backends, by name."""

AUTOMATIC = ("triton", "native", "chunked")
"""Those that `backend=None` tries, in this order. The last accepts every problem. On the CPU `triton` is an interpreter
for tests, taken by name alone."""


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


Again: TypeAlias = Callable[[list[int]], list[Tensor] | None]
"""Computes a recorded problem on other memory: from the addresses of the tensors, in the order in which they were
recorded, to the results asked for. None where what it relies on, of torch's settings or the backend's, has changed."""


def mould(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What `cast` makes tensors from: of `x` its dtype and device, and a shape, but no memory to speak of."""
    return x.new_empty(1).expand(tuple(shape))


def cast(mould: Tensor) -> Tensor:
    """A new contiguous tensor; half as long in the making as one whose shape, dtype and device have to be read."""
    return torch.empty_like(mould, memory_format=torch.contiguous_format)


class Recorder(Protocol):
    """The fourth function of some backend modules."""

    def __call__(
        self, problem: Problem, pointers: Sequence[int], shapes: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Again | None]:
        """(out, lse) of `forward`, and what makes them again; None where that cannot be, e.g. since it copies.

        Args:
            problem: no gradients are wanted.
            pointers: addresses of the tensors that will be given anew; of all others the problem may not be told apart.
            shapes: of the results when made again: of `out`, or of `out` and `lse`; as many elements as those have.
        """
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


def choose(problem: Problem, backend: str | None) -> str:
    """The name of the backend that computes this problem.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: where the backend asked for by name cannot; it is never replaced by another.
    """
    if backend is None:
        for name in AUTOMATIC[:-1]:
            if (name != "triton" or problem.query.is_cuda) and load(name).reason_against(problem) is None:
                return name
        return AUTOMATIC[-1]
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, want one of {', '.join(BACKENDS)} or None")
    reason = load(backend).reason_against(problem)
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot compute this: {reason}")
    return backend
