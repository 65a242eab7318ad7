"""Progress bars, metrics.jsonl and loss.png of a training run."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from keyspan.files import named_errors, write_file
from keyspan.models.gpt import GPT
from keyspan.training.packing import Batch

if TYPE_CHECKING:
    from keyspan.training.prepare import Prepare

METRICS = "metrics.jsonl"


class Report:
    """A context manager that shows and records a run's steps.

    A run that goes on from `step` keeps the records up to there and appends to them. Without `record` nothing is
    written: of several ranks one does. With `tensorboard` every figure is written for TensorBoard too.
    """

    def __init__(
        self, run: Path, step: int, steps: int, *, quiet: bool = False, record: bool = True, tensorboard: bool = False
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self._path, self._file = run / METRICS, None
        if record:
            kept = [line for line, found in _records(self._path) if found["step"] <= step] if step else []
            write_file(self._path, "".join(kept).encode())
            self._file = self._path.open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._tokens = sum(found.get("tokens", 0) for found in read_metrics(run)) if record and step else 0
        console = Console()
        bar = (
            [BarColumn(table_column=Column(min_width=10))] if console.width >= 80 else []
        )  # the figures fit 50 columns
        self._progress = Progress(
            MofNCompleteColumn(),
            *bar,
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=quiet,
        )
        self._bar = self._progress.add_task("", total=steps, completed=step, figures="")

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, step: int, **figures: float) -> None:
        """Record a step and move the bar."""
        self._write(step, figures)
        self._tokens += int(figures["tokens"])
        text = f"{figures['loss']:.4f} {short(figures['tokens_per_second'])}/s {short(self._tokens)}"
        if "mfu" in figures:
            text += f" {figures['mfu']:.0%}"
        self._progress.update(self._bar, completed=step, figures=text)

    def held_out(self, step: int, text: str, **figures: float) -> None:
        """Record an evaluation and print it above the bar."""
        self._write(step, figures)
        self.say(f"step {step:>6}  {text}")

    def refused(self, step: int, reason: str, documents: Sequence[str]) -> None:
        """Record and print that a step was not taken, and on which documents."""
        self._write(step, {"refused": reason, "documents": list(documents)})
        self.say(f"step {step:>6}  not taken: {reason}{in_words(documents)}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._progress.disable:
            self._progress.console.print(text, highlight=False, markup=False)

    def _write(self, step: int, figures: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        if self._board is not None:
            for name, figure in figures.items():
                if isinstance(figure, float | int):
                    self._board.add_scalar(name, figure, step)
                else:
                    self._board.add_text(name, str(figure), step)
        with named_errors(self._path):
            self._file.write(json.dumps({"step": step, **figures}) + "\n")


def prepare_with_bar(options: Prepare, quiet: bool = False) -> Path:
    """`prepare`, with a bar of how much of the input has been read."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from keyspan.training.prepare import prepare

    progress = Progress(BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(compact=True))
    bar = progress.add_task("", total=None)

    def say(text: str) -> None:
        progress.console.print(text, highlight=False, markup=False)

    def show(done: int, total: int) -> None:
        progress.start()  # nothing is shown where an error comes first
        progress.update(bar, completed=done, total=total)

    if quiet:
        return prepare(options)
    try:
        return prepare(options, say, show)
    finally:
        if progress.live.is_started:
            progress.stop()


def in_words(documents: Sequence[str]) -> str:
    """The end of a sentence that names documents; of many the first few, metrics.jsonl has all."""
    shown, count = ", ".join(documents[:4]), len(documents)
    return f"; documents {shown}{f' and {count - 4} more' if count > 4 else ''}" if documents else ""


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of a file, each with what it says; a crash may have left half a line at its end."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    records = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}: line {number} is not the record of a step: got {line[:40]!r}")
        records.append((line, record))
    return records


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order in which they were written."""
    return [record for _, record in _records(run / METRICS)]


def peak_memory(device: torch.device) -> dict[str, float]:
    """{"memory": bytes}: the accelerator's peak allocation, or the process's peak on the CPU; {} where none can be
    read."""
    if device.type == "cuda":
        return {"memory": float(torch.cuda.max_memory_allocated(device))}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory": float(peak if sys.platform == "darwin" else peak * 1024)}


def short(x: float) -> str:
    """A count in few characters: 1.2k, 34M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""bf16 and fp16 operations per second that these GPUs are sold with, dense."""


def peak_rate(device: torch.device, precision: str) -> float | None:
    """Operations per second of a device in a precision, where its name tells; MFU is the share of them that is used."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def step_flops(model: GPT, batches: Sequence[Batch]) -> float:
    """Operations of a training step on these micro-batches: forward, and twice that backward (Chowdhery et al. 2022).

    Six for each token and weight of a matrix, and twelve for each pair of tokens of a document and number of a head.
    """
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    if not model.config.tie_embeddings:
        weights -= model.embedding.weight.numel()  # looked up, not multiplied
    tokens = sum(len(batch.tokens) for batch in batches)
    pairs = sum(n * (n + 1) / 2 for batch in batches for n in batch.lengths)
    return 6.0 * weights * tokens + 12.0 * pairs * model.config.layers * model.config.heads * model.config.head_dim


def plot(run: Path, metric: str, baselines: Mapping[str, float], bytes_per_token: float = 1.0) -> None:
    """Draw RUN/loss.png: the training loss, the held-out `metric` and, as level lines, the baselines.

    With the metric bits_per_byte all share one axis in that unit; any other has an axis of its own, from 0 to 1.
    """
    from matplotlib.figure import Figure

    records = read_metrics(run)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    same_unit = metric == "bits_per_byte"
    unit = math.log(2) * bytes_per_token if same_unit else 1.0
    steps = [record for record in records if "loss" in record]
    axes.plot([r["step"] for r in steps], [r["loss"] / unit for r in steps], lw=0.8, label="training loss")
    checks = [record for record in records if metric in record]
    held_out = axes if same_unit else axes.twinx()
    name = metric.replace("_", " ")
    held_out.plot([r["step"] for r in checks], [r[metric] for r in checks], "o-", color="C1", label=f"held-out {name}")
    for i, (label, value) in enumerate(baselines.items()):
        axes.axhline(value, color=f"C{2 + i}", ls="--", lw=1, label=f"{label} {value:.2f}")
    axes.set_xlabel("step")
    axes.set_ylabel(name if same_unit else "nats per token")
    if not same_unit:
        held_out.set_ylabel(name)
        held_out.set_ylim(0, 1.02)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(run / "loss.png", picture.getvalue())
