"""Measuring providers on one work: each checked, then timed in turns.

On a CPU every result is checked against the fp64 textbook form; `gpu_check` compares results with Keyspan's, and checks
these elsewhere (`checks`).
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from keyspan.bench.clock import Clock, EventClock, WallClock
from keyspan.bench.providers import Provider, laid_out, make
from keyspan.bench.works import Inputs, Passes, Work
from keyspan.core.biases import Alibi, Bias, RelativeBias
from keyspan.core.problem import Problem, make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.testing import peak_memory, results, textbook, tolerances, worst

SECONDS = 6.0
"""Time that one provider may take for its timings on one work, unless that is less than two of them."""
NOISY = 0.5
"""Interquartile range of a provider's timings, as a share of their median, above which no ratio is given."""


@dataclass
class Row:
    """What was measured of one provider on one work."""

    row: str
    work: str
    provider: str
    dtype: str
    passes: Passes
    milliseconds: float | None = None
    """Median."""
    fastest: float | None = None
    """Milliseconds of the fastest timing: far below the median, the machine had other things to do."""
    spread: float | None = None
    """Interquartile range of the timings as a share of the median."""
    rate: float | None = None
    """GFLOP/s over the visible area, or GB/s beside a yardstick of memory."""
    unit: str = "GFLOP/s"
    peak_mib: float | None = None
    """Most memory held at a time above the inputs; of a backward pass alone, also what it needs of forward."""
    difference: float | None = None
    """Of this provider's results from Keyspan's, in the norm and relative to them, where they were compared."""
    note: str = ""
    ratio: float | None = None
    """Keyspan's rate over this provider's: above 1, Keyspan is faster. For a bound on memory: it over the peak."""


class Yardstick(NamedTuple):
    """What the machine can do: a call that is no attention, and how many FLOPs or bytes it takes."""

    run: Callable[[], Tensor]
    amount: float
    unit: str


def yardstick(name: str, dtype: torch.dtype, device: torch.device, quick: bool = False) -> Yardstick:
    """A limit of the machine: `sum`, `copy` or `gemm`.

    `sum` reads 256 MiB, far more than a cache holds; `copy` reads and writes 2 GiB; `gemm` multiplies square matrices
    of 4096, or 8192 on a GPU.
    """
    if name == "sum":
        x = torch.ones(2**12 if quick else 2**26, device=device)
        return Yardstick(x.sum, x.nbytes, "GB/s")
    if name == "copy":
        source = torch.ones(2**12 if quick else 2**31, dtype=torch.int8, device=device)
        return Yardstick(partial(torch.empty_like(source).copy_, source), 2.0 * source.nbytes, "GB/s")
    n = 64 if quick else 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return Yardstick(partial(torch.matmul, a, b), 2.0 * n**3, "GFLOP/s")


def clock_for(work: Work, device: torch.device) -> Clock:
    """Device time for kernels on a GPU; wall time for a CPU and for what a call costs the host."""
    return EventClock() if device.type == "cuda" and work.calls == 1 else WallClock(device)


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
    yardsticks: Mapping[str, Yardstick],
    device: torch.device,
    repeats: int,
    check: bool = True,
    left: Callable[[], float] = lambda: math.inf,
) -> list[Row]:
    """A row per provider and yardstick; a provider that is wrong, or cannot, gets a note and no time.

    Args:
        row: name for the results.
        work: what is to be done.
        dtype: name and dtype of the inputs.
        providers: what makes each provider. Names of Keyspan's own begin with keyspan; the rest are compared with
            the fastest of these.
        yardsticks: run in the same turns; the first of a turn, so that `sum` leaves nothing of the inputs in a cache.
        repeats: visits to each, in turns; fewer where they would take longer than `SECONDS`. The median counts.
        check: compare each result with the fp64 reference; else with Keyspan's result, as a figure.
        left: seconds that are left; nothing new is begun below 8.
    """
    inputs = work.inputs(dtype[1], "cpu" if check else device)
    checker = Checker(work, inputs) if check else None
    clock = clock_for(work, device)
    unit = next((stick.unit for stick in yardsticks.values()), "GFLOP/s")
    amount = work.bytes(dtype[1]) if unit == "GB/s" else work.flops()
    rows = {name: Row(row, work.title, name, dtype[0], work.passes, unit=unit) for name in (*yardsticks, *providers)}
    wall = WallClock(device)
    runs = {name: _Run(x.run, x.amount, 1, wall.times(x.run)[0]) for name, x in yardsticks.items()}
    found: dict[str, list[Tensor]] = {}
    for name, maker in providers.items():
        if left() < 8:
            rows[name].note = "no time left"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                provider = maker()
                if checker is not None and (complaint := checker.complaint(provider, device)) is not None:
                    rows[name].note = complaint
                    continue
                passes = _Passes(provider, laid_out(name, inputs), work, device)
                rows[name].peak_mib, seconds = _peak_and_seconds(passes, wall)
                if checker is None:
                    found[name] = passes.results()
                timed = passes.timed() if work.backward else clock.prepare(passes.timed())
                runs[name] = _Run(timed, amount, work.calls, seconds)
        except Exception as error:  # whatever goes wrong in others' code is what is to be shown of them
            rows[name].note = f"cannot: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:80]}"
    _compare(rows, found)
    found.clear()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            if turn < min(repeats, max(2, int(SECONDS / max(run.seconds * run.calls, 1e-9)))) and left() > 6:
                times[name] += clock.times(run.call, run.calls)
    for name, run in runs.items():
        if times[name]:
            median = statistics.median(times[name])
            rows[name].milliseconds, rows[name].rate = median * 1e3, run.amount / median / 1e9
            rows[name].fastest = min(times[name]) * 1e3
            rows[name].spread = spread(times[name])
    compare_rates(list(rows.values()))
    return list(rows.values())


def warm(work: Work, dtype: torch.dtype, names: list[str]) -> dict[str, str]:
    """Compile what a work's rows need, in a process of its own; torch and Triton keep it on disk."""
    device = torch.device("cuda")
    for name in names:
        provider = make(name, work, dtype, device)
        inputs = work.inputs(dtype, device)
        with torch.no_grad():
            provider(inputs)
        leaves = [x.requires_grad_() for x in inputs if x is not None]
        out = provider(inputs)
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    torch.cuda.synchronize()
    return {}


def spread(times: list[float]) -> float:
    """Interquartile range over the median; 0 for a single timing."""
    if len(times) < 2:
        return 0.0
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return (upper - lower) / median


def compare_rates(rows: list[Row]) -> None:
    """Set the ratios of Keyspan's best rate to the others'; none where timings spread too far to mean anything."""
    timed = [x for x in rows if x.rate is not None]
    ours = max((x for x in timed if x.provider.startswith("keyspan")), key=lambda x: x.rate or 0.0, default=None)
    if ours is None or ours.rate is None:
        return
    for x in timed:
        noisiest = max((ours, x), key=lambda y: y.spread or 0.0)
        if (noisiest.spread or 0.0) > NOISY:
            x.note = f"no ratio: the timings of {noisiest.provider} spread by {noisiest.spread:.0%}"
        elif x.rate:
            x.ratio = ours.rate / x.rate


def _peak_and_seconds(passes: _Passes, wall: WallClock) -> tuple[float, float]:
    """Peak memory above the inputs, in MiB, and the time of one call (the first after the checks)."""
    took: list[float] = []
    return peak_memory(lambda: took.extend(wall.times(passes.all))) / 2**20, took[0]


class _Run(NamedTuple):
    call: Callable[[], object]
    amount: float
    calls: int
    seconds: float = 0.0


class _Passes:
    """The passes of one provider on one work, with inputs of its own on the device."""

    def __init__(self, provider: Provider, x: Inputs, work: Work, device: torch.device) -> None:
        needs = work.backward
        query, key, value = (y.to(device).detach().requires_grad_(needs) for y in x[:3])
        table = None if x.table is None else x.table.to(device).detach().requires_grad_(needs)
        self.inputs = Inputs(query, key, value, table)
        self.leaves = [y for y in self.inputs if y is not None]
        self.provider, self.work = provider, work

    def all(self) -> object:
        """Forward, and backward where the work has one."""
        out = self.provider(self.inputs)
        return torch.autograd.grad(out, self.leaves, torch.ones_like(out)) if self.work.backward else out

    def results(self) -> list[Tensor]:
        """The output, and gradients of a random cotangent."""
        out = self.provider(self.inputs)
        if not self.work.backward:
            return [out]
        cotangent = torch.randn(out.shape, generator=_seeded(out), device=out.device, dtype=out.dtype)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, cotangent)]

    def timed(self) -> Callable[[], object]:
        """What one timing covers."""
        if self.work.passes != "bwd":
            return self.all
        out = self.provider(self.inputs)
        return partial(torch.autograd.grad, out, self.leaves, torch.randn_like(out), retain_graph=True)


def _seeded(like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(2)


def _compare(rows: dict[str, Row], found: dict[str, list[Tensor]]) -> None:
    """Set how far each other provider's results are from Keyspan's."""
    ours = next((x for name, x in found.items() if name.startswith("keyspan")), None)
    for name, results_ in found.items():
        if ours is not None and results_ is not ours:
            rows[name].difference = max(map(difference, results_, ours))


def difference(a: Tensor, b: Tensor) -> float:
    """Of a from b, in the norm, as a share of b."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))
