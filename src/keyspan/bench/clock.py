"""Two clocks: wall time, and CUDA events around single calls with a cold L2 cache.

A clock has `prepare`, which turns a call into what is timed, and `times`, which returns seconds per call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

_FLUSH: dict[torch.device, torch.Tensor] = {}


class Clock(Protocol):
    def prepare(self, call: Call) -> Call:
        """What is timed of a call without gradients."""

    def times(self, call: Call, calls: int = 1) -> list[float]:
        """Seconds per call of one visit."""


class WallClock:
    """Wall time of `calls` calls, up to where the device is done: one timing a visit."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, call: Call) -> Call:
        return call

    def times(self, call: Call, calls: int = 1) -> list[float]:
        synchronize(self._device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(self._device)
        return [(time.perf_counter() - begin) / calls]


class EventClock:
    """Time on the device of single calls, the L2 cache flushed before each; calls become CUDA graphs where they can.

    Args:
        milliseconds: time that all calls of a visit may take together; at least 3 are made.
        most: no more calls than this.
    """

    def __init__(self, milliseconds: float = 60, most: int = 40) -> None:
        self._milliseconds, self._most = milliseconds, most

    def prepare(self, call: Call) -> Call:
        return as_graph(call)

    def times(self, call: Call, calls: int = 1) -> list[float]:
        (once,) = self._between_events(call, 1)
        count = max(3, min(self._most, int(self._milliseconds / max(once * 1e3, 1e-3))))
        return self._between_events(call, count)

    def _between_events(self, call: Call, count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            flush()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flush() -> None:
    """Overwrite 256 MiB, which evicts everything else from the current GPU's L2 cache."""
    device = torch.device("cuda", torch.cuda.current_device())
    if device not in _FLUSH:
        _FLUSH[device] = torch.empty(256 << 20, dtype=torch.int8, device=device)
    _FLUSH[device].zero_()


def as_graph(call: Call) -> Call:
    """The replay of a CUDA graph of one call; the call itself where it cannot be captured.

    A graph holds addresses alone. The replay holds the call, so that the tensors the call holds are not freed.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        return call

    def replay(held: Call = call) -> None:
        graph.replay()

    return replay
