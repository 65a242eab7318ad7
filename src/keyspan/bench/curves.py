"""`keyspan bench curves`: whether the loss falls the same in every form of a training step.

One small model is trained on the same batches by every backend, compiled, with accumulated gradients, and on a GPU as
CUDA graphs. In fp32 the losses agree to a part in 100,000; in bf16 they differ by less than those of two seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from keyspan.backends import AUTOMATIC, load
from keyspan.bench.report import Report, machine, markdown_table
from keyspan.core.problem import make_problem
from keyspan.files import write_file
from keyspan.info import find_device
from keyspan.training.config import PRESETS, TrainConfig
from keyspan.training.graph import CapturedStep
from keyspan.training.loop import (
    learning_rate,
    make_model,
    make_optimizer,
    make_scaler,
    make_task,
    take_step,
    train_batches,
)
from keyspan.training.packing import Batch

AGREEMENT = 1e-5
"""Largest difference of fp32 losses, as a share of the loss."""


@dataclass
class Bench:
    """Losses of a small model, in every form in which a step can run."""

    steps: int = 100
    """Optimizer steps of each form."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 for autocast."""
    compile: bool = True
    """Include the compiled step, which takes a C++ compiler on a CPU, and a minute."""
    device: str = "cpu"
    """auto (an accelerator where there is one, else the CPU), or a torch device."""
    out: Path = field(default_factory=lambda: Path("runs/bench-curves"))
    """Folder for results.json and results.md."""


@dataclass
class Row:
    """The losses of one form."""

    precision: str
    form: str
    losses: list[float]
    difference: float = 0.0
    """From the losses of the first form: in fp32 the largest share of a loss, in bf16 the mean in nats."""
    wanted: float | None = None
    """What the difference may be at most; None for what is compared with, and for the other seed."""


def main(options: Bench) -> list[Row]:
    """Train every form, print how far its losses are from the first's, and write JSON and the table."""
    if options.steps < 1:
        raise ValueError(f"steps: got {options.steps}, want at least 1")
    for precision in options.precisions:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precisions: got {precision!r}, want fp32 or bf16")
    device = find_device(options.device)
    config = replace(
        PRESETS["stdlib"], max_length=256, dim=64, tokens=1024, steps=options.steps, warmup=min(20, options.steps),
        device=str(device),
    )  # fmt: skip
    rows = []
    for precision in options.precisions:
        rows += compare(replace(config, precision="bf16" if precision == "bf16" else "fp32"), options)
    header = ("form", "precision", "first loss", "last loss", "difference", "wanted at most")
    lines = [
        (row.form, row.precision, f"{row.losses[0]:.5f}", f"{row.losses[-1]:.5f}", f"{row.difference:.1e}",
         "" if row.wanted is None else f"{row.wanted:.1e}, {'met' if row.difference <= row.wanted else 'not met'}")
        for row in rows
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out, machine(device))
    report.keep("curves", rows)
    table = markdown_table(header, lines)
    write_file(options.out / "results.md", f"{table}\n".encode())
    print(f"\n{table}\n\nfp32: largest share of the loss; bf16: mean over steps, in nats\nwritten: {options.out}")
    return rows


def compare(config: TrainConfig, options: Bench) -> list[Row]:
    """The rows of one precision: the first form, the others, and the first form with another seed."""
    device = torch.device(config.device)
    x = torch.empty(1, 1, 1, 16, device=device, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    problem, _ = make_problem(x, x, x)
    first, *backends = [name for name in (*AUTOMATIC, "reference") if load(name).reason_against(problem) is None]
    config = replace(config, backend=first)
    forms: dict[str, Callable[[], list[float]]] = {f"eager, {first}": lambda: curve(config)}
    for name in backends:
        forms[f"eager, {name}"] = lambda name=name: curve(replace(config, backend=name))  # type: ignore[misc]
    forms["accumulated over 4 parts"] = lambda: curve(config, parts=4)
    if options.compile:
        forms["compiled"] = lambda: curve(replace(config, compile=True))
    if device.type == "cuda":
        forms["CUDA graphs"] = lambda: curve(replace(config, cuda_graph=True))
    if config.precision == "bf16":
        forms["another seed"] = lambda: curve(config, seed=1)
    rows = []
    for name, run in forms.items():
        rows.append(Row(config.precision, name, run()))
        print(f"{config.precision}, {name}: {rows[-1].losses[0]:.5f} to {rows[-1].losses[-1]:.5f}", flush=True)
    for row in rows[1:]:
        pairs = list(zip(row.losses, rows[0].losses, strict=True))
        bf16 = config.precision == "bf16"
        row.difference = mean(abs(a - b) for a, b in pairs) if bf16 else max(abs(a / b - 1) for a, b in pairs)
    for row in rows[1:]:
        if row.form != "another seed":
            row.wanted = rows[-1].difference if config.precision == "bf16" else AGREEMENT
    return rows


def curve(config: TrainConfig, parts: int = 1, seed: int = 0) -> list[float]:
    """The loss of each step of a model whose weights are drawn from `seed`; each batch in so many parts."""
    device = torch.device(config.device)
    task = make_task(config)
    torch.manual_seed(seed)
    model = make_model(config, task.vocab_size).to(device)
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, device)
    loss_of = torch.compile(model.loss, fullgraph=True) if config.compile else None
    captured = CapturedStep(model, optimizer, config, loss_of) if config.cuda_graph else None
    losses: list[Tensor] = []
    for step in range(config.steps):
        batches = [part for batch in train_batches(task, config, step) for part in split(batch, parts)]
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        found = captured(batches, lr) if captured else take_step(model, optimizer, scaler, batches, config, loss_of)
        losses.append(found[0])
    return [float(loss) for loss in losses]


def split(batch: Batch, parts: int) -> list[Batch]:
    """The documents of a batch in so many batches of about as many documents."""
    count = len(batch.lengths)
    ends = [0, *(sum(batch.lengths[: n + 1]) for n in range(count))]
    found = []
    for k in range(parts):
        low, high = count * k // parts, count * (k + 1) // parts
        if low < high:
            rows = slice(ends[low], ends[high])
            found.append(Batch(batch.tokens[rows], batch.targets[rows], batch.lengths[low:high]))
    return found
