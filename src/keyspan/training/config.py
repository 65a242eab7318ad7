"""Every option of a training run in one dataclass, and the presets of the tasks.

The dataclass is the command line (through tyro, which shows the text below each field as its help) and, as JSON, the
record beside the checkpoint.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from keyspan.core.checks import check_fields, check_int, in_words, is_a

TaskName = Literal["copy", "reverse", "sort", "associative-recall", "addition", "stdlib", "data"]


def sources(data: tuple[str, ...]) -> list[tuple[Path, float]]:
    """(folder, weight) of each source; ValueError for a weight that is none, and for a folder given twice."""
    found = []
    for text in data:
        folder, _, weight = text.rpartition(":")
        try:
            found.append((Path(folder), float(weight)) if folder else (Path(text), 1.0))
        except ValueError:  # a colon that belongs to the path
            found.append((Path(text), 1.0))
        if not 0 < found[-1][1] < math.inf:
            raise ValueError(f"data: got {text}, want a positive weight behind the colon")
    if len({folder for folder, _ in found}) < len(found):
        raise ValueError(f"data: got {' '.join(data)}, want each folder once")
    return found


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are those of the chosen task's preset."""

    task: TaskName = "stdlib"
    """What to learn; chooses the defaults of all else."""
    data: tuple[str, ...] = ()
    """What to learn instead: folders of `keyspan prepare`. Or a folder or file of text, which is prepared first, as
    bytes, into FOLDER.prepared. Of several, FOLDER:WEIGHT says what share of the micro-batches each has; the weight is
    1 where none is given."""
    max_length: int = 1024
    """Longest problem in symbols (copy, reverse, sort), pairs (associative-recall) or digits (addition); longest
    document in bytes (stdlib), or in tokens (data), beyond which it is cut."""

    dim: int = 128
    """Width of the model."""
    layers: int = 2
    """Blocks in the model."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads; divides `heads`."""
    hidden: int | None = None
    """Width of the SwiGLU; by default the model chooses it from `dim`."""
    positions: Literal["rope", "alibi", "none"] = "rope"
    """How the attention knows where tokens stand."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embeddings."""
    dropout: float = 0.0
    """Probability that the model drops an activation while it trains."""

    tokens: int = 4096
    """Tokens packed into one micro-batch."""
    max_documents: int | None = None
    """Most documents of a micro-batch (data); by default as many as fit. Far above the mean it costs nothing."""
    accumulation: int = 1
    """Micro-batches whose gradients make one step, over all ranks: each of n data ranks computes an n-th of them."""
    steps: int = 1000
    """Optimizer steps of the whole run; the learning rate's schedule spans them."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_end: float = 0.1
    """Last learning rate, as a fraction of the peak."""
    warmup: int = 50
    """Steps over which the learning rate rises to its peak."""
    beta2: float = 0.99
    """AdamW's decay of the squared gradients' average (that of the gradients' is 0.9)."""
    weight_decay: float = 0.1
    """AdamW's weight decay; on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    spike: float | None = None
    """Standard deviations above the mean of the losses before, beyond which a loss is a spike; by default none is."""
    spike_window: int = 100
    """How many losses before."""
    on_spike: Literal["stop", "skip"] = "stop"
    """At a spike, or a loss or gradient that is not finite: stop the run, or skip the step and go on. Its documents are
    named either way."""
    tensorboard: bool = False
    """Write the figures for TensorBoard too, into the run's folder; needs the extra tensorboard."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Computation under autocast (weights stay fp32); fp16 scales its loss."""
    invariant: bool = False
    """On a GPU, too, the bits of a token's results depend on its document and the weights alone, not on the
    micro-batch; slower there. Not with compile, context and tensor. On a CPU it changes nothing."""

    compile: bool = False
    """Compile loss and gradients with torch.compile; needs a C++ compiler on a CPU, Triton on a GPU."""
    cuda_graph: bool = False
    """Capture the step as CUDA graphs: faster for small models and batches, whose GPU waits for Python. Not with fp16
    or dropout."""

    context: int = 1
    """With torchrun: ranks that share each micro-batch's rows, which pass one another keys and values; the number of
    ranks is a multiple. Ranks beyond share the micro-batches of a step."""
    tensor: int = 1
    """With torchrun: ranks that share each layer (tensor parallel): each computes some heads of its attention and a
    part of its feed-forward layer. Divides `heads` and `kv_heads`. Neighbouring ranks are chosen."""
    fsdp: bool = False
    """With torchrun: cut weights and optimizer state across all ranks (FSDP2), not a copy on each (DDP)."""

    eval_every: int = 100
    """Steps between evaluations on held-out data."""
    eval_tokens: int = 16_384
    """Held-out tokens of such an evaluation; the last one, and the one that may stop the run, use all."""
    stop_at: float | None = None
    """Stop once so large a share of the held-out problems is answered without an error (not for stdlib and data)."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end, and on Ctrl-C."""

    seed: int = 0
    """Fixes initial weights, data order and dropout."""
    device: str = "auto"
    """Where to train: auto (an accelerator where there is one, else the CPU), or a torch device."""
    backend: str | None = None
    """Attention backend; by default the first that has no reason against it."""
    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: Path | None = None
    """Go on with the run in this folder, under its own configuration; other options given here override it, but for
    those that make the task, the model and the order of the data."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_int("max_length", self.max_length)
        if self.task not in get_args(TaskName):
            raise ValueError(f"task: got {self.task!r}, want one of {', '.join(get_args(TaskName))}")
        if bool(self.data) != (self.task == "data"):
            got = " ".join(self.data) or "none"
            raise ValueError(f"data: got {got} for the task {self.task}, want a folder for the task data alone")
        sources(self.data)
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents: got {self.max_documents}, want at least 1, or none for no limit")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision: got {self.precision!r}, want fp32, bf16 or fp16")
        sizes = ("tokens", "accumulation", "steps", "context", "tensor")
        for name in (*sizes, "eval_every", "eval_tokens", "checkpoint_every"):
            if not 1 <= (got := getattr(self, name)) < 2**31:
                raise ValueError(f"{name}: got {got}, want 1 … 2³¹ − 1")
        if self.spike is not None and not 0 < self.spike < math.inf:
            raise ValueError(f"spike: got {self.spike}, want a positive number of standard deviations, or none")
        if not 2 <= self.spike_window <= 100_000:
            raise ValueError(f"spike_window: got {self.spike_window}, want 2 to 100 000 losses")
        if self.on_spike not in ("stop", "skip"):
            raise ValueError(f"on_spike: got {self.on_spike!r}, want stop or skip")
        if self.cuda_graph and (self.spike is not None or self.on_spike == "skip"):
            raise ValueError("cuda_graph: got True with spike or on_spike skip, want False: a graph stops at NaN alone")
        for name, want in (("compile", False), ("context", 1), ("tensor", 1)):
            if self.invariant and (got := getattr(self, name)) != want:
                raise ValueError(f"{name}: got {got} with invariant, want {want}: sums would be of another order")
        if self.warmup < 0:
            raise ValueError(f"warmup: got {self.warmup}, want 0 or more")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr: got {self.lr}, want a positive number")
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"lr_end: got {self.lr_end}, want a fraction of the peak, 0 to 1")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2: got {self.beta2}, want a number in [0, 1)")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, want 0 or more")
        if not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, want a positive number (inf for none)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, want 0 … 2⁶³ − 1")
        if self.stop_at is not None and (self.task in ("stdlib", "data") or not 0 < self.stop_at <= 1):
            raise ValueError(f"stop_at: got {self.stop_at} for {self.task}, want a share in (0, 1] of a synthetic task")

    def changes(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """By field: the value here and in `other`, where they differ; `out` and `resume` do not count."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: (a, b) for name, (a, b) in pairs.items() if a != b and name not in ("out", "resume")}

    def to_json(self) -> str:
        """This configuration as JSON text."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> TrainConfig:
        """The configuration in JSON text; `source` names it in a ValueError about what is wrong."""
        try:
            values: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not a training configuration ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{source}: not a training configuration (a JSON {type(values).__name__})")
        types = get_type_hints(cls)
        for name, value in values.items():
            if name not in types:
                raise ValueError(f"{source}: unknown option {name}")
            if not is_a(value, types[name], json=True):
                raise ValueError(f"{source}: {name}: got {value!r}, want {in_words(types[name], json=True)}")
            if value is not None and Path in get_args(types[name]):
                values[name] = Path(value)
            elif get_origin(types[name]) is tuple:
                values[name] = tuple(value)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


FIXED = (
    *("task", "data", "dim", "layers", "heads", "kv_heads", "hidden", "positions", "rope_theta", "tie_embeddings"),
    *("embedding_std", "seed", "max_documents"),
)
"""Options that a resumed run cannot change: they make the task, the model, its initial weights and the data's order."""


_SYNTHETIC = TrainConfig(
    task="copy",
    dim=64,
    heads=2,  # of 32; no run with heads of 16 learned associative recall
    kv_heads=2,
    embedding_std=0.125,
    tokens=2048,
    lr=2e-3,
    warmup=100,
    beta2=0.95,
    eval_tokens=8192,
    stop_at=0.99,
)
_REPEAT = replace(_SYNTHETIC, max_length=64, lr=4e-3, tie_embeddings=False, embedding_std=0.5)

PRESETS: dict[TaskName, TrainConfig] = {
    "copy": replace(_REPEAT, task="copy", steps=3000),
    "reverse": replace(_REPEAT, task="reverse", steps=6500, lr_end=0.02),
    "sort": replace(_SYNTHETIC, task="sort", max_length=24, layers=3, positions="none", steps=2000),
    "associative-recall": replace(_SYNTHETIC, task="associative-recall", max_length=16, steps=2000),
    "addition": replace(_SYNTHETIC, task="addition", max_length=4, layers=3, rope_theta=1000.0, steps=2200),
    "stdlib": TrainConfig(
        task="stdlib", max_length=1024, steps=2000, lr=3e-3, embedding_std=0.09, precision="bf16", eval_every=200
    ),
}
"""The default run of each task but `data`, see `preset`."""


def preset(task: TaskName, data: tuple[str, ...] = ()) -> TrainConfig:
    """The default run of a task; for `data`, of a model of 10 million parameters on that folder, or those folders."""
    if not data and task != "data":
        return PRESETS[task]
    return TrainConfig(
        task="data", data=data, dim=320, layers=7, heads=5, kv_heads=5, tokens=8192, steps=2000, lr=1e-3, warmup=100,
        beta2=0.95, embedding_std=0.05, precision="bf16", eval_every=200, eval_tokens=65_536,
    )  # fmt: skip
