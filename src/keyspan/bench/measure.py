"""Measuring providers on one work: each checked against the fp64 textbook form, then timed in turns.

Knows neither who the providers are nor what is wanted of them.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from keyspan.bench.providers import Provider, laid_out
from keyspan.bench.works import Inputs, Work
from keyspan.core.biases import Alibi, Bias, RelativeBias
from keyspan.core.problem import Problem, make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.testing import peak_memory, results, textbook, tolerances, worst

SECONDS = 6.0
"""Time that one provider may take for its timings on one work, unless that is less than two of them."""


@dataclass
class Row:
    """What was measured of one provider on one work."""

    row: str
    work: str
    provider: str
    dtype: str
    backward: bool
    milliseconds: float | None = None
    """Median."""
    fastest: float | None = None
    """Milliseconds of the fastest timing: far below the median, the machine had other things to do."""
    rate: float | None = None
    """GFLOP/s over the visible area, or GB/s beside a yardstick of memory."""
    unit: str = "GFLOP/s"
    peak_mib: float | None = None
    """Most memory held at a time above the inputs."""
    note: str = ""
    ratio: float | None = None
    """Keyspan's rate over this provider's: above 1, Keyspan is faster. For a bound on memory: it over the peak."""


class Yardstick(NamedTuple):
    """What the machine can do: something that is no attention, and how many FLOPs or bytes it takes."""

    run: Callable[[], Tensor]
    amount: float
    unit: str


def yardstick(name: str, dtype: torch.dtype, device: torch.device, quick: bool) -> Yardstick:
    """`sum`: reads 256 MiB, far more than a cache holds. `gemm`: a square matrix product of 4096."""
    if name == "sum":
        x = torch.ones(2**12 if quick else 2**26, device=device)
        return Yardstick(x.sum, x.nbytes, "GB/s")
    n = 64 if quick else 4096
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return Yardstick(partial(torch.matmul, a, b), 2.0 * n**3, "GFLOP/s")


class Checker:
    """The exact answer for rows spread over a work; for all rows it would need the whole score matrix.

    Gradients are checked for a loss over these rows: every key, value and table entry takes part in it.
    """

    def __init__(self, work: Work, inputs: Inputs):
        self.work, self.inputs = work, inputs
        dtype = inputs.query.dtype
        self.rows = torch.linspace(0, work.M - 1, min(64, work.M)).long().unique()
        ranges = work.ranges()
        lo, hi, diagonal = (x[..., self.rows] for x in (ranges.lo, ranges.hi, ranges.diagonal))
        mask = KeyRanges(lo, hi, diagonal)
        bias: Bias | None = Alibi(work.slopes()) if work.alibi else None
        if inputs.table is not None:
            bias = RelativeBias(inputs.table)
        query = inputs.query[:, self.rows]
        self.problem, _ = make_problem(query, inputs.key, inputs.value, mask=mask, bias=bias)
        self.want = results(lambda p: textbook(p, torch.float64), self.problem, torch.float64)
        self.allowed = tolerances(self.problem, dtype, self.want)
        self.names = ("out", "dquery", "dkey", "dvalue", "dtable") if work.backward else ("out",)

    def complaint(self, provider: Provider, device: torch.device) -> str | None:
        """What is wrong with a provider's result, or None."""
        got = self._results(provider, device)
        for name in self.names:
            if name in self.want:
                error = worst(got[name], self.want[name])
                if not error <= self.allowed[name]:
                    return f"WRONG: {name} differs from the reference by {error:.2g}, allowed {self.allowed[name]:.2g}"
        return None

    def _results(self, provider: Provider, device: torch.device) -> dict[str, Tensor]:
        rows, G = self.rows.to(device), self.work.shape.kv_heads

        def out(problem: Problem) -> Tensor:
            query = self.inputs.query.to(device).index_copy(1, rows, problem.query.flatten(2, 3).to(device))
            table = None if problem.table is None else problem.table.flatten(0, 1).to(device)
            found = provider(Inputs(query, problem.key.to(device), problem.value.to(device), table))
            chosen: Tensor = found[:, rows].unflatten(2, (G, -1))
            return chosen.cpu()

        if not self.work.backward:
            with torch.no_grad():
                return {"out": out(self.problem).double()}
        # No provider need give lse: it is the textbook's for all, and so is its part in the gradients.
        dtype = self.inputs.query.dtype
        return results(lambda p: (out(p), textbook(p, dtype)[1]), self.problem, dtype)


def measure(
    row: str,
    work: Work,
    dtype: tuple[str, torch.dtype],
    providers: Mapping[str, Callable[[], Provider]],
    yardsticks: dict[str, Yardstick],
    device: torch.device,
    repeats: int,
) -> list[Row]:
    """A row per provider and yardstick; a provider that is wrong, or cannot, gets a note and no time.

    Args:
        row: name for the results.
        work: what is to be done.
        dtype: name and dtype of the inputs.
        providers: what makes each provider. Names of Keyspan's own begin with keyspan; the rest are compared with
            the fastest of these.
        yardsticks: run in the same turns; the first of a turn, so that `sum` leaves nothing of the inputs in a cache.
        repeats: timings of each, in turns; fewer where they would take longer than `SECONDS`. The median counts.
    """
    inputs = work.inputs(dtype[1])
    checker = Checker(work, inputs)
    unit = next((stick.unit for stick in yardsticks.values()), "GFLOP/s")
    amount = work.bytes(dtype[1]) if unit == "GB/s" else work.flops()
    rows = {name: Row(row, work.title, name, dtype[0], work.backward, unit=unit) for name in (*yardsticks, *providers)}
    runs: dict[str, tuple[Callable[[], object], float, int]] = {
        name: (stick.run, stick.amount, 1) for name, stick in yardsticks.items()
    }
    rounds: dict[str, int] = {}
    for name, make in providers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                provider = make()
                complaint = checker.complaint(provider, device)
        except Exception as error:  # whatever goes wrong in others' code is what is to be shown of them
            complaint = f"cannot: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:80]}"
        if complaint is not None:
            rows[name].note = complaint
            continue
        runs[name] = (_pass(provider, laid_out(name, inputs), work.backward, device), amount, work.calls)
    for name, (run, _, calls) in runs.items():
        took: list[float] = []
        peak = peak_memory(lambda run=run, took=took: took.append(_timed(run, 1, device)))  # type: ignore[misc]
        if name in providers:
            rows[name].peak_mib = peak / 2**20
        rounds[name] = min(repeats, max(2, int(SECONDS / (took[0] * calls))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, (run, _, calls) in runs.items():
            if turn < rounds[name]:
                times[name].append(_timed(run, calls, device))
    for name, (_, done, _) in runs.items():
        median = statistics.median(times[name])
        rows[name].milliseconds, rows[name].rate = median * 1e3, done / median / 1e9
        rows[name].fastest = min(times[name]) * 1e3
    ours = [x.rate for x in rows.values() if x.provider.startswith("keyspan") and x.rate is not None]
    for found in rows.values():
        if ours and found.rate is not None:
            found.ratio = max(ours) / found.rate
    return list(rows.values())


def _pass(provider: Provider, x: Inputs, backward: bool, device: torch.device) -> Callable[[], object]:
    query, key, value = (y.to(device).detach().requires_grad_(backward) for y in x[:3])
    table = None if x.table is None else x.table.to(device).detach().requires_grad_(backward)
    given = Inputs(query, key, value, table)
    inputs = [y for y in given if y is not None]

    def run() -> object:
        out = provider(given)
        return torch.autograd.grad(out, inputs, torch.ones_like(out)) if backward else out

    return run


def _timed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls
