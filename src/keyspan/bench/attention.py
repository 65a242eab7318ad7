"""Attention against what a user would pick instead: a table of named works, and a sweep over lengths, in one run.

`keyspan bench attention` runs it. Knows how to choose, print, write and plot; measuring is done in `measure`.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

import keyspan
from keyspan.backends import load
from keyspan.bench import providers
from keyspan.bench.measure import Row, Yardstick, measure, yardstick
from keyspan.bench.shapes import SHAPES
from keyspan.bench.works import DTYPES, TABLE, Target, Work
from keyspan.core.problem import make_problem
from keyspan.info import find_device

YARDSTICKS = ("sum", "gemm")
NOTE = """Ratio: Keyspan's rate over that of the best of the others named, both in GFLOP/s over the visible area (for
`sum`: GB/s of keys and values read), medians of one run; above 1, Keyspan is faster. Where
the fastest timing is far below the median, other programs ran: measure that row again. A result that does not match
the fp64 reference has no ratio. Masks are lowered, and dense masks, ALiBi's bias and flex's block masks are made,
before the timing: a model makes them once per step. The rows `overhead` and `overhead-train` have no mask: there
the whole call is timed.
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
    for name in options.dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtypes: got {name!r}, want one of {', '.join(DTYPES)}")
    if options.shape not in SHAPES:
        raise ValueError(f"shape: got {options.shape!r}, want one of {', '.join(SHAPES)}")
    if any(length < 1 for length in options.lengths):
        raise ValueError(f"lengths: got {min(options.lengths)}, want at least 1 token")
    find_device(options.device)  # before anything is timed
    if options.repeats < 1:
        raise ValueError(f"repeats: got {options.repeats}, want at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which counts memory, would write on every start
    table: list[Row] = []
    sweep: list[Row] = []

    def add(rows: list[Row], new: list[Row]) -> None:
        rows += new
        print("\n".join(map(line, new)), flush=True)
        found = {"machine": machine(), "table": list(map(asdict, table)), "sweep": list(map(asdict, sweep))}
        _write(options.out / "results.json", json.dumps(found, indent=1))

    print(HEADER)
    for name in options.rows:
        for dtype in options.dtypes:
            add(table, measure_target(name, TABLE[name], dtype, options))
    if options.rows:
        print(f"\n{summary(table, options.dtypes)}\n\n{NOTE}\n", flush=True)
    if options.sweep:
        print(HEADER)
        for length in options.lengths:
            for dtype in options.dtypes:
                for backward in (False, True):
                    add(sweep, measure_length(length, dtype, backward, options))
        plot(sweep, options.out / "results.png")
    parts = ["\n".join([HEADER, *map(line, rows)]) for rows in (table, sweep) if rows]
    if table:
        parts = [summary(table, options.dtypes), NOTE, *parts]
    _write(options.out / "results.md", "\n\n".join(parts) + "\n")
    print(f"\nwritten: {options.out}")
    return table + sweep


def measure_target(name: str, target: Target, dtype: str, options: Bench) -> list[Row]:
    """Measure one row of the table in one dtype."""
    device = find_device(options.device)
    work = target.work.quick() if options.quick else target.work
    memory = "bound" in target.against
    left_out = (*YARDSTICKS, "bound", *(() if options.flex else ("flex compiled",)))
    others = [x for x in target.against if x not in left_out]
    others += [] if memory else providers.installed(work, device)
    sticks = {x: yardstick(x, DTYPES[dtype], device, options.quick) for x in target.against if x in YARDSTICKS}
    rows = _measure(name, work, dtype, ["keyspan", *others], options, sticks, once=memory)
    if memory:
        limit = Row(name, work.title, "bound", dtype, work.backward)
        limit.peak_mib = work.memory_bound(DTYPES[dtype], torch.get_num_threads()) / 2**20
        peak = rows[0].peak_mib
        limit.ratio = None if peak is None else limit.peak_mib / peak
        rows.append(limit)
    return rows


def measure_length(length: int, dtype: str, backward: bool, options: Bench) -> list[Row]:
    """Measure one length of the sweep with every backend."""
    device = find_device(options.device)
    work = Work((length,), SHAPES[options.shape], backward=backward)
    work = work.quick() if options.quick else work
    x = torch.empty(1, 1, 1, work.shape.dim, dtype=DTYPES[dtype], device=device)
    problem, _ = make_problem(x, x, x)
    able = [name for name in keyspan.BACKENDS if load(name).reason_against(problem) is None]
    names = [f"keyspan:{name}" for name in able if name != "reference"]
    names += ["sdpa", *providers.installed(work, device)]
    names += ["dense softmax"] if work.N <= 4096 else []  # beyond, its score matrices take gigabytes
    # On a CPU flex_attention has no backward, and compiles anew for each length, longer than all else here takes.
    names += ["flex compiled"] if options.flex and device.type == "cuda" else []
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


HEADER = """| row | work | dtype | provider | ms | fastest | rate | peak MiB | Keyspan's rate ÷ its |
|---|---|---|---|--:|--:|--:|--:|--:|"""


def line(row: Row) -> str:
    """What was measured of one provider."""
    time = row.note if row.milliseconds is None else f"{row.milliseconds:.3g}"
    fastest = "" if row.fastest is None else f"{row.fastest:.3g}"
    rate = "" if row.rate is None else f"{row.rate:.3g} {row.unit}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.1f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    cells = (row.row, row.work, row.dtype, row.provider, time, fastest, rate, peak, ratio)
    return f"| {' | '.join(cells)} |"


def summary(rows: list[Row], dtypes: tuple[str, ...]) -> str:
    """The table: a line per named work, and per dtype the ratio to the best of the others, and what was wanted."""
    lines = [
        "| row | work | against | " + " | ".join(dtypes) + " |",
        "|---|---|---|" + "--:|" * len(dtypes),
    ]
    for name in dict.fromkeys(row.row for row in rows):
        cells = [verdict([r for r in rows if r.row == name and r.dtype == dtype], dtype) for dtype in dtypes]
        work = next(row.work for row in rows if row.row == name)
        lines.append(f"| {name} | {work} | {', '.join(TABLE[name].against)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(rows: list[Row], dtype: str) -> str:
    """One cell of the summary. Without a right result of Keyspan and of another there is no ratio to show."""
    others = [row for row in rows if row.provider != "keyspan"]
    ratios = [row.ratio for row in others if row.ratio is not None]
    wrong = [f"{row.provider} {row.note}" for row in rows if row.note]
    if not ratios:
        return "; ".join(wrong) or "not measured"
    best, wanted = min(ratios), TABLE[rows[0].row].wanted.get(dtype)
    judged = "" if wanted is None else f" (wanted {wanted:.2f}: {'met' if best >= wanted else 'short'})"
    return "; ".join([f"{best:.2f}{judged}", *wrong])


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "keyspan": keyspan.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def plot(rows: list[Row], path: Path) -> None:
    """Two panels: time and peak memory of causal attention, forward and backward, against length."""
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row.backward and row.dtype == rows[0].dtype and row.milliseconds is not None]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for provider in dict.fromkeys(row.provider for row in chosen):
        mine = [row for row in chosen if row.provider == provider]
        lengths = [_length(row) for row in mine]
        for axes, y in zip(panels, ([row.milliseconds for row in mine], [row.peak_mib for row in mine]), strict=True):
            axes.plot(lengths, y, marker="o", markersize=4, label=provider)
    for axes, title in zip(panels, ("time, ms", "peak extra memory, MiB"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        ticks = sorted({_length(row) for row in chosen})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    if chosen:
        panels[0].legend(frameon=False)
        figure.suptitle(f"causal attention, forward + backward, {chosen[0].dtype}")
    figure.savefig(path, dpi=130)


def _length(row: Row) -> int:
    return int(row.row.split()[1])


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
