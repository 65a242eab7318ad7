"""Output of the benchmarks: a line for each result as it is measured, JSON, tables in Markdown and pictures.

    python -m keyspan.bench.report results.json picture.png

draws the picture of an earlier run again.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import keyspan
from keyspan.bench.measure import Row
from keyspan.bench.works import TABLE
from keyspan.files import write_file

HEADER = """| row | work | dtype | provider | ms | fastest | rate | peak MiB | Keyspan's rate ÷ its |
|---|---|---|---|--:|--:|--:|--:|--:|"""


@dataclass
class Report:
    """Results of one run, written to `out`/results.json after each."""

    out: Path
    machine: dict[str, Any]
    sections: dict[str, list[Any]] = field(default_factory=dict)
    """Rows by section: `table`, `sweep`, and other names for what has another form, which then has a `text`."""

    def keep(self, section: str, rows: list[Any]) -> None:
        """Keep rows of a benchmark's own kind; it makes its own table of them."""
        self.sections.setdefault(section, []).extend(map(asdict, rows))
        self.write()

    def add(self, section: str, rows: list[Row]) -> None:
        """Print and keep measured rows."""
        print("\n".join(map(line, rows)), flush=True)
        self.keep(section, rows)

    def tell(self, section: str, text: str, **found: Any) -> None:
        """Print and keep results of another form."""
        print(text, flush=True)
        self.sections.setdefault(section, []).append({**found, "text": text})
        self.write()

    def rows(self, section: str) -> list[Row]:
        return [Row(**x) for x in self.sections.get(section, [])]

    def write(self) -> None:
        found = {"machine": self.machine, **self.sections}
        write_file(self.out / "results.json", json.dumps(found, indent=1).encode())

    def markdown(self) -> str:
        """Every section as a table or as lines."""
        parts = [", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.machine.items())]
        for rows in self.sections.values():
            measured = [Row(**x) for x in rows if "text" not in x]
            parts += ["\n".join([HEADER, *map(line, measured)])] if measured else []
            parts += ["\n".join(f"* {x['text']}" for x in rows if "text" in x)] if len(measured) < len(rows) else []
        return "\n\n".join(parts) + "\n"


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are measured on."""
    found: dict[str, Any] = {"torch": torch.__version__, "keyspan": keyspan.__version__}
    if device.type == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {**found, "device": torch.cuda.get_device_name(device)}
    capability = torch.backends.cpu.get_cpu_capability()
    return {**found, "cpu": capability, "threads": torch.get_num_threads(), "device": platform.machine()}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ("---", *["--:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def judged(value: float, wanted: float | None, most: bool = False) -> str:
    """A figure beside the least, or for `most` the largest, that was wanted of it."""
    if wanted is None:
        return f"{value:.2f}"
    met = value <= wanted if most else value >= wanted
    return f"{value:.2f} (wanted {'at most ' if most else ''}{wanted:.2f}: {'met' if met else 'short'})"


def line(row: Row) -> str:
    """What was measured of one provider, as a row of the table under `HEADER`."""
    time = row.note if row.milliseconds is None else f"{row.milliseconds:.3g}"
    fastest = "" if row.fastest is None else f"{row.fastest:.3g}"
    rate = "" if row.rate is None else f"{row.rate:.3g} {row.unit}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.1f}"
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else row.note if row.milliseconds is not None else ""
    ratio += "" if row.difference is None else f" (differs by {row.difference:.1e})"
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
    ratios = [row.ratio for row in rows if row.provider != "keyspan" and row.ratio is not None]
    notes = [f"{row.provider} {row.note}" for row in rows if row.note and row.milliseconds is None]
    notes += list(dict.fromkeys(row.note for row in rows if row.note and row.milliseconds is not None))
    if not ratios:
        return "; ".join(notes) or "not measured"
    best, wanted = min(ratios), TABLE[rows[0].row].wanted.get(dtype)
    return "; ".join([judged(best, wanted), *notes])


def plot_lengths(rows: list[Row], path: Path) -> None:
    """Two panels: time and peak memory of causal attention, forward and backward, against length."""
    from matplotlib.figure import Figure

    chosen = [r for r in rows if r.passes == "fwd+bwd" and r.dtype == rows[0].dtype and r.milliseconds is not None]
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


def plot_rates(rows: list[Row], machine: dict[str, Any], path: Path) -> None:
    """TFLOP/s of every work and provider as bars, the forward pass on the left and the backward pass on the right."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.rate is not None]
    labels = list(dict.fromkeys(row.row for row in timed))
    names = list(dict.fromkeys(row.provider for row in timed))
    figure = Figure(figsize=(12, 1.5 + 0.55 * len(labels)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    height = 0.8 / max(len(names), 1)
    for passes, axes in zip(("fwd", "bwd"), panels, strict=True):
        for name in names:
            at, rates = [], []
            for label in labels:
                group = [row for row in timed if row.passes == passes and row.row == label]
                for n, row in enumerate(group):  # those that have a rate stand together
                    if row.provider == name and row.rate is not None:
                        at.append(labels.index(label) + (n + 0.5) * height - 0.4)
                        rates.append(row.rate / 1e3)
            axes.barh(at, rates, height=height, label=name)
        axes.axvline(machine.get("gemm_tflops", 0), color="grey", linestyle="--", linewidth=1)
        axes.set_title(f"{'forward' if passes == 'fwd' else 'backward'}, bf16")
        axes.set_xlabel("TFLOP/s over the visible area (dashed: a large matrix product)")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].margins(y=0.01)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(len(names), 1))
    figure.suptitle(", ".join(f"{name} {machine[name]}" for name in ("device", "torch", "triton") if name in machine))
    figure.savefig(path, dpi=100)


def draw(found: dict[str, Any], path: Path) -> None:
    """The picture of a run's results: rates on a GPU, else time and memory against length."""
    if found.get("gpu"):
        plot_rates([Row(**x) for x in found["gpu"]], found["machine"], path)
    else:
        plot_lengths([Row(**x) for x in found["sweep"]], path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
