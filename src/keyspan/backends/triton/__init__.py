"""The fast path on NVIDIA and AMD GPUs, in Triton: what it refuses. `launch` runs a problem.

Triton is imported when the first problem is run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from keyspan.backends import Gradients, Needs, Replay
from keyspan.core.problem import Problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def reason_against(problem: Problem) -> str | None:
    query = problem.query
    if query.is_cuda:
        reason = _device_reason(query.device.index)
        if reason is not None:
            return reason
    elif not (query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        # On the CPU Triton's interpreter runs the kernels, for tests.
        return f"query is on {query.device}, want a GPU"
    elif {query.dtype, problem.key.dtype} & {torch.bfloat16, torch.float8_e4m3fn} and not _interpreter_fixed():
        return f"query is {query.dtype} and key {problem.key.dtype}, which Triton's interpreter computes wrongly"
    if query.dtype not in _DTYPES:
        return f"query is {query.dtype}, want float32, bfloat16, float16 or float8_e4m3fn"
    if problem.key.dtype == torch.float8_e4m3fn and query.is_cuda:
        reason = _float8_reason(query.device.index)
        if reason is not None:
            return reason
    for name, x in (("query", query), ("value", problem.value)):
        if x.shape[-1] > 256:
            return f"{name} has a head dimension of {x.shape[-1]}, want at most 256"
    if max(problem.row_length, query.shape[1]) >= 2**31 - 2**16:
        return f"there are {problem.row_length} keys and {query.shape[1]} queries in a row, want fewer than 2³¹"
    return None


def _interpreter_fixed() -> bool:
    """Whether tests/gpu/interpreter.py has fixed the types that NumPy does not have."""
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder, "has_fixed_casts", False)


def kernels(problem: Problem) -> str:
    """Which kernels compute the forward and the backward pass of a problem, and why not the faster ones; backward where
    query, key and value need gradients."""
    from keyspan.backends.triton import hopper

    needs = Needs(True, True, True, False, False, problem.sinks is not None, [False] * len(problem.biases))
    forward, backward = hopper.reason_against(problem), hopper.backward_reason_against(problem, needs)
    parts = {
        "queries": hopper.queries_reason_against(problem, needs),
        "keys and values": hopper.keys_reason_against(problem, needs),
    }
    if backward is not None and None in parts.values():
        backward_names = ", ".join(f"of {name} {_family_of(reason)}" for name, reason in parts.items())
    elif forward == backward is not None:
        return f"plain Triton, not Hopper's: {forward}"
    else:
        backward_names = _family_of(backward)
    return f"forward {_family_of(forward)}; backward {backward_names}"


def _family_of(reason: str | None) -> str:
    """Hopper's kernels where there is no reason against them."""
    return "Hopper's, in Gluon" if reason is None else f"plain Triton, not Hopper's: {reason}"


@torch.compiler.assume_constant_result
def _device_reason(index: int) -> str | None:
    return _cached_device_reason(index)


@torch.compiler.assume_constant_result
def _float8_reason(index: int) -> str | None:
    return _cached_float8_reason(index)


# Apart from the functions above: torch's compiler would trace what `functools.cache` wraps, whatever its marks.
@functools.cache
def _cached_device_reason(index: int) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None


@functools.cache
def _cached_float8_reason(index: int) -> str | None:
    # AMD's older GPUs have another e4m3; Triton converts this one there.
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 9):
        return f"key is float8_e4m3fn, which {torch.cuda.get_device_name(index)} cannot convert: want compute capability 8.9"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    from keyspan.backends.triton import launch

    return launch.forward(problem)


def record_forward(
    problem: Problem, given: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> tuple[list[Tensor], Replay[list[Tensor]] | None]:
    from keyspan.backends.triton import launch

    return launch.record_forward(problem, given, shapes)


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    from keyspan.backends.triton import launch

    return launch.backward(problem, grad_out, grad_lse, out, lse, needs)


def record_backward(
    problem: Problem,
    given: Sequence[Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Needs,
) -> tuple[Gradients, Replay[Gradients] | None]:
    from keyspan.backends.triton import launch

    return launch.record_backward(problem, given, grad_out, grad_lse, out, lse, needs)
