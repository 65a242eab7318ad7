"""`keyspan bench attention`: a table of named works beside what a user would pick instead, and a sweep over lengths."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import keyspan
from keyspan.backends import load
from keyspan.bench import providers
from keyspan.bench.bandwidth import ROTATED, measure_bandwidth
from keyspan.bench.measure import Row, Yardstick, measure, yardstick
from keyspan.bench.report import HEADER, Report, machine, plot_lengths, summary
from keyspan.bench.works import DTYPES, SHAPES, TABLE, Passes, Target, Work
from keyspan.core.problem import make_problem
from keyspan.files import write_file
from keyspan.info import find_device

YARDSTICKS = ("gemm",)
PASSES: tuple[Passes, ...] = ("fwd", "fwd+bwd")
NOTE = """Ratio: Keyspan's rate over that of the best of the others named, both in GFLOP/s over the visible area,
medians of one run; above 1, Keyspan is faster. `read`: GB/s of keys and values, beside the fastest read of the
same tensors by as many threads, call by call, over caches that rotate; the quarter of the turns that took the
least time counts. Where the fastest timing is far below the median, other programs ran: measure that row again;
where half of the timings lie further apart than half of the median, there is no ratio. A result that does not
match the fp64 reference has no ratio. Masks are lowered, and dense masks, ALiBi's bias and flex's block masks are
made, before the timing: a model makes them once per step. The rows `overhead` and `overhead-train` have no mask:
there the whole call is timed.
`memory` compares the peak above the inputs with a bound: results, packed keys and values, and for each thread
two fp32 sums of their gradients (backward) and 2 MiB of tiles; nothing in it grows with M·N."""


@dataclass
class Bench:
    """Time and peak memory of attention, beside what a user would pick instead."""

    rows: tuple[str, ...] = tuple(TABLE)
    """Rows of the table, by name; none: only the sweep."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16, fp16."""
    repeats: int = 7
    """Times that every provider is timed, in turns; the median counts. Slow ones are timed less often."""
    flex: bool = True
    """Include compiled flex_attention, which takes a C++ compiler and some 10 s a work."""
    sweep: bool = True
    """Also measure causal attention at several lengths, and plot time and memory against length."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Lengths of the sweep, in tokens."""
    shape: str = "small"
    """Heads and head dim of the sweep, by the name of a model."""
    device: str = "cpu"
    """auto (an accelerator where there is one, else the CPU), or a torch device."""
    quick: bool = False
    """Tiny sizes, once: whether everything runs. The numbers say nothing."""
    out: Path = field(default_factory=lambda: Path("runs/bench-attention"))
    """Folder for results.json, results.md and results.png."""


def main(options: Bench) -> list[Row]:
    """Run the benchmark, print what is measured as it comes, and write the JSON, the tables and the plot."""
    for name in options.rows:
        if name not in TABLE:
            raise ValueError(f"rows: got {name!r}, want one of {', '.join(TABLE)}")
    short = {str(dtype)[6:]: name for name, dtype in DTYPES.items()}  # torch's own names are accepted too
    options.dtypes = tuple(short.get(name, name) for name in options.dtypes)
    for name in options.dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtypes: got {name!r}, want one of {', '.join(DTYPES)}")
    if options.shape not in SHAPES:
        raise ValueError(f"shape: got {options.shape!r}, want one of {', '.join(SHAPES)}")
    if any(length < 1 for length in options.lengths):
        raise ValueError(f"lengths: got {min(options.lengths)}, want at least 1 token")
    device = find_device(options.device)  # before anything is timed
    if options.repeats < 1:
        raise ValueError(f"repeats: got {options.repeats}, want at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which counts memory, would write on every start
    report = Report(options.out, machine(device))
    print(HEADER)
    for name in options.rows:
        for dtype in options.dtypes:
            report.add("table", measure_target(name, TABLE[name], dtype, options))
    table = report.rows("table")
    if table:
        print(f"\n{summary(table, options.dtypes)}\n\n{NOTE}\n", flush=True)
    if options.sweep:
        print(HEADER)
        for length in options.lengths:
            for dtype in options.dtypes:
                for passes in PASSES:
                    report.add("sweep", measure_length(length, dtype, passes, options))
        plot_lengths(report.rows("sweep"), options.out / "results.png")
    parts = [summary(table, options.dtypes), NOTE] if table else []
    write_file(options.out / "results.md", "\n\n".join([*parts, report.markdown()]).encode())
    print(f"\nwritten: {options.out}")
    return table + report.rows("sweep")


def measure_target(name: str, target: Target, dtype: str, options: Bench) -> list[Row]:
    """Measure one row of the table in one dtype."""
    device = find_device(options.device)
    work = target.work.quick() if options.quick else target.work
    if "read" in target.against:
        provider = providers.make("keyspan", work, DTYPES[dtype], device)
        turns, rotated = (1, 0) if options.quick else (20 * options.repeats, ROTATED)
        return measure_bandwidth(name, work, (dtype, DTYPES[dtype]), provider, device, turns, rotated)
    memory = "bound" in target.against
    left_out = (*YARDSTICKS, "bound", *(() if options.flex else ("flex",)))
    others = [x for x in target.against if x not in left_out]
    others += providers.installed(work) if device.type == "cuda" and not memory else []
    sticks = {x: yardstick(x, DTYPES[dtype], device, options.quick) for x in target.against if x in YARDSTICKS}
    rows = _measure(name, work, dtype, ["keyspan", *others], options, sticks, once=memory)
    if memory:
        limit = Row(name, work.title, "bound", dtype, work.passes)
        limit.peak_mib = work.memory_bound(DTYPES[dtype], torch.get_num_threads()) / 2**20
        peak = rows[0].peak_mib
        limit.ratio = None if peak is None else limit.peak_mib / peak
        rows.append(limit)
    return rows


def measure_length(length: int, dtype: str, passes: Passes, options: Bench) -> list[Row]:
    """Measure one length of the sweep with every backend."""
    device = find_device(options.device)
    work = Work((length,), SHAPES[options.shape], passes=passes)
    work = work.quick() if options.quick else work
    x = torch.empty(1, 1, 1, work.shape.dim, dtype=DTYPES[dtype], device=device)
    problem, _ = make_problem(x, x, x)
    able = [name for name in keyspan.BACKENDS if load(name).reason_against(problem) is None]
    names = [f"keyspan:{name}" for name in able if name != "reference"]
    names += ["sdpa", *(providers.installed(work) if device.type == "cuda" else ())]
    names += ["dense softmax"] if work.N <= 4096 else []  # beyond, its score matrices take gigabytes
    # On a CPU flex_attention has no backward, and compiles anew for each length, longer than all else here takes.
    names += ["flex"] if options.flex and device.type == "cuda" else []
    return _measure(f"causal {work.N}", work, dtype, names, options, {})


def _measure(
    name: str,
    work: Work,
    dtype: str,
    names: list[str],
    options: Bench,
    sticks: dict[str, Yardstick],
    once: bool = False,
) -> list[Row]:
    device = find_device(options.device)
    makers = {x: partial(providers.make, x, work, DTYPES[dtype], device) for x in names}
    repeats = 1 if once or options.quick else options.repeats
    return measure(name, work, (dtype, DTYPES[dtype]), makers, sticks, device, repeats)
