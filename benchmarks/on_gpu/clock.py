"""The clock of a GPU: single calls between events, with a cold cache, as graphs where they can be. Knows no work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FLUSH: list[torch.Tensor] = []


def flush() -> None:
    """Put something else into the L2 cache."""
    if not FLUSH:
        FLUSH.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    FLUSH[0].zero_()


def as_graph(function: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of a CUDA graph of one call; the call itself where it cannot be captured."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except Exception:
        torch.cuda.synchronize()
        return function
    return graph.replay


def times(call: Callable[[], Any], milliseconds: float, most: int = 40) -> list[float]:
    """Milliseconds of single calls, the L2 cache flushed before each.

    Args:
        milliseconds: what all calls may take together; at least 3 are made.
        most: no more calls than this.
    """

    def events() -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    a, b = events()
    a.record()
    call()
    b.record()
    torch.cuda.synchronize()
    n = max(3, min(most, int(milliseconds / max(a.elapsed_time(b), 1e-3))))
    pairs = []
    for _ in range(n):
        flush()
        a, b = events()
        a.record()
        call()
        b.record()
        pairs.append((a, b))
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairs]
