"""Attention beside the fastest read of the same keys and values: what share of the memory's rate decoding reaches.

The two calls take turns, call by call, over caches that rotate, so that nothing of one is left in a CPU's cache. Both
read the same tensors with the same number of threads. The read is a dot product of keys and values, or a sum of each,
whichever is faster; it takes both as fp32 numbers, whatever they are, in the order of addresses.

A host that limits the rate of a virtual machine for some time holds up both alike, which would flatter attention;
other programs do so too. Therefore each call of attention is compared with the reads before and after it, and only
the turns that took the least time count: those in which nothing held up the reads or the call. Where no read ran at
the machine's rate, the read's row shows it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from keyspan.bench.clock import WallClock
from keyspan.bench.measure import Checker, Row, spread
from keyspan.bench.providers import Provider
from keyspan.bench.works import Inputs, Work

ROTATED = 256 * 2**20
"""Bytes of all caches together: many times what a CPU's cache holds."""
COUNTED = 4
"""One of so many turns counts."""

Read = Callable[[Tensor, Tensor], object]


def measure_bandwidth(
    name: str,
    work: Work,
    dtype: tuple[str, torch.dtype],
    provider: Provider,
    device: torch.device,
    turns: int,
    rotated: int = ROTATED,
) -> list[Row]:
    """A row for the read, with the ratio of the rates, and one for Keyspan; medians of the turns that count.

    Args:
        name: name for the results.
        work: one decoding step.
        dtype: name and dtype of the inputs.
        provider: Keyspan's attention on the work.
        turns: calls of attention.
        rotated: bytes of all caches together.
    """
    first = work.inputs(dtype[1], "cpu")
    rows = [Row(name, work.title, x, dtype[0], work.passes, unit="GB/s") for x in ("read", "keyspan")]
    complaint = Checker(work, first).complaint(provider, device)
    if complaint is not None:
        rows[1].note = complaint
        return rows
    amount = first.key.nbytes + first.value.nbytes
    copies = max(2, math.ceil(rotated / amount))
    query, key, value, _ = first
    caches = [Inputs(*(x.to(device, copy=True) for x in (query, key, value))) for _ in range(copies)]
    clock, rotation = WallClock(device), cycle(caches)

    def seconds(call: Callable[[Inputs], object]) -> float:
        inputs = next(rotation)
        return clock.times(lambda: call(inputs))[0]

    def reading(read: Read) -> Callable[[Inputs], object]:
        return lambda x: read(x.key.view(-1).view(torch.float32), x.value.view(-1).view(torch.float32))

    with torch.no_grad():
        fastest = min((reading(x) for x in (torch.dot, _sums)), key=lambda x: min(seconds(x) for _ in range(6)))
        seconds(provider)
        reads, calls = [seconds(fastest)], []
        for _ in range(turns):
            calls.append(seconds(provider))
            reads.append(seconds(fastest))
    counted = fastest_turns(reads, calls)
    for row, times, own in zip(rows, (reads, calls), zip(*counted, strict=True), strict=True):
        row.milliseconds, row.fastest = statistics.median(own) * 1e3, min(times) * 1e3
        row.spread, row.rate = spread(list(own)), amount / statistics.median(own) / 1e9
    rows[0].ratio, rows[1].ratio = statistics.median(read / call for read, call in counted), 1.0
    return rows


def fastest_turns(reads: list[float], calls: list[float]) -> list[tuple[float, float]]:
    """Seconds of a read and of a call in the turns that took the least time, one in `COUNTED` of all.

    A turn is a call between two reads, whose mean is its read.

    Args:
        reads: seconds of each read, one more than calls.
        calls: seconds of each call; call i lies between reads i and i + 1.
    """
    turns = [((before + after) / 2, call) for before, call, after in zip(reads, calls, reads[1:], strict=False)]
    turns.sort(key=lambda turn: 2 * turn[0] + turn[1])
    return turns[: -(-len(turns) // COUNTED)]


def _sums(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return key.sum(), value.sum()
