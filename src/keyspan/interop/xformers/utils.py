"""xFormers' benchmark helper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def do_bench_cudagraph(fn: Callable[[], Any], rep: int = 20, grad_to_none: list[Tensor] | None = None) -> float:
    """Milliseconds that `fn` takes in a CUDA graph, as `triton.testing` measures it over `rep` milliseconds."""
    from triton.testing import do_bench_cudagraph as measure

    return float(measure(fn, rep=rep, grad_to_none=grad_to_none))
