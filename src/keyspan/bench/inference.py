"""`keyspan bench inference`: a trace of mixed requests through the engine, beside what a user would run instead.

Every provider has the same weights and answers greedily. Requests share a beginning, as those of a chat do; prompts and
answers are short and long. All are there at the start.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keyspan.bench.report import machine
from keyspan.files import write_file
from keyspan.inference.engine import Engine
from keyspan.inference.sampling import Sampling
from keyspan.info import find_device
from keyspan.models import GPT, GPTConfig, load, save

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {
    "tiny": GPTConfig(vocab_size=512, dim=64, layers=2, heads=4, kv_heads=2),
    "smollm2-135m": GPTConfig(
        vocab_size=49152, dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, rope_theta=1e5, norm_eps=1e-5
    ),
    "llama-1b": GPTConfig(
        vocab_size=128256, dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192, rope_theta=5e5, norm_eps=1e-5
    ),
}
"""Models of random weights."""


@dataclass
class Bench:
    """Throughput and latency of mixed requests, beside transformers."""

    model: Path | None = None
    """A folder in Hugging Face's format. Default: random weights of `shape`."""
    shape: str = "smollm2-135m"
    """tiny, smollm2-135m or llama-1b."""
    dtype: str = "bf16"
    """fp32 or bf16."""
    requests: int = 12
    """How many requests."""
    prefix: int = 64
    """Tokens that all prompts begin with."""
    longest: int = 384
    """Most tokens of a prompt behind that; the shortest has 8."""
    answer: int = 96
    """Most tokens of an answer; the shortest has 8."""
    batch: int = 8
    """Requests in a padded batch of transformers' generate."""
    repeats: int = 3
    """How often the trace is run by each provider, in turns; medians count."""
    providers: tuple[str, ...] = ()
    """By name; none: all that run here."""
    device: str = "cpu"
    """auto (an accelerator where there is one, else the CPU), or a torch device."""
    out: Path = field(default_factory=lambda: Path("runs/bench-inference"))
    """Folder for results.json and results.md."""


@dataclass
class Request:
    """One request of the trace."""

    prompt: list[int]
    tokens: int
    """Of the answer."""


@dataclass
class Served:
    """What a provider made of a trace: each request's tokens, and when they came, in seconds from the start."""

    tokens: list[list[int]]
    times: list[list[float]]
    seconds: float


@dataclass
class Row:
    """What was measured of one provider."""

    provider: str
    tokens_per_second: float | None = None
    """Of answers, over the whole trace."""
    first_p50: float | None = None
    """Milliseconds to the first token of a request."""
    first_p95: float | None = None
    between_p50: float | None = None
    """Milliseconds between two tokens of a request."""
    between_p95: float | None = None
    single: float | None = None
    """Tokens a second of one request alone."""
    same: float | None = None
    """Share of the requests answered with the tokens of the first provider."""
    note: str = ""


Run = Callable[[Sequence[Request]], Served]


def trace(options: Bench, vocabulary: int) -> list[Request]:
    """The requests, the same for all."""
    source = random.Random(0)

    def between(low: int, high: int) -> int:
        return min(high, max(low, round(source.lognormvariate(0, 0.8) * (low + high) / 6)))

    def draw(count: int) -> list[int]:
        return [source.randrange(3, vocabulary) for _ in range(count)]

    start = draw(options.prefix)
    return [
        Request(start + draw(between(8, options.longest)), between(8, options.answer)) for _ in range(options.requests)
    ]


def make_keyspan(folder: Path, options: Bench, device: torch.device, **engine: Any) -> Run:
    """The engine; a new one for each trace, so that no trace finds the pages of the one before."""
    model = load(folder, DTYPES[options.dtype], device)

    def run(requests: Sequence[Request]) -> Served:
        made = Engine(model, memory=2**30 if device.type == "cpu" else 2**33, **engine)
        begin = time.perf_counter()
        ids = [made.add(x.prompt, Sampling(max_tokens=x.tokens)) for x in requests]
        tokens: dict[str, list[int]] = {id: [] for id in ids}
        times: dict[str, list[float]] = {id: [] for id in ids}
        while made.busy():
            events = made.step()
            now = time.perf_counter() - begin
            for event in events:
                if event.token is not None:
                    tokens[event.id].append(event.token)
                    times[event.id].append(now)
        seconds = time.perf_counter() - begin
        return Served([tokens[id] for id in ids], [times[id] for id in ids], seconds)

    return run


def make_transformers(folder: Path, options: Bench, device: torch.device) -> Run:
    """transformers' generate, in padded batches in the order of arrival."""
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype]).to(device).eval()

    class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
        def __init__(self, begin: float) -> None:
            self.begin, self.times = begin, []  # type: ignore[var-annotated]

        def __call__(self, *_: Any, **__: Any) -> Any:
            self.times.append(time.perf_counter() - self.begin)
            return False

    @torch.inference_mode()
    def run(requests: Sequence[Request]) -> Served:
        begin = time.perf_counter()
        tokens, times = [], []
        for first in range(0, len(requests), options.batch):
            part = requests[first : first + options.batch]
            width, most = max(len(x.prompt) for x in part), max(x.tokens for x in part)
            ids = torch.tensor([[0] * (width - len(x.prompt)) + x.prompt for x in part], device=device)
            seen = torch.tensor([[0] * (width - len(x.prompt)) + [1] * len(x.prompt) for x in part], device=device)
            clock = Clock(begin)
            out = model.generate(
                ids, attention_mask=seen, max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )  # fmt: skip
            for x, row in zip(part, out[:, width:].tolist(), strict=True):
                tokens.append(row[: x.tokens])
                times.append(clock.times[: x.tokens])
        return Served(tokens, times, time.perf_counter() - begin)

    return run


PROVIDERS: dict[str, Callable[[Path, Bench, torch.device], Run]] = {
    "keyspan": make_keyspan,
    "transformers, padded": make_transformers,
}
"""By name."""


def main(options: Bench) -> list[Row]:
    """Run the benchmark, print what is measured, and write JSON and a table."""
    if options.shape not in SHAPES:
        raise ValueError(f"shape: got {options.shape!r}, want one of {', '.join(SHAPES)}")
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: got {options.dtype!r}, want one of {', '.join(DTYPES)}")
    for name in options.providers:
        if name not in PROVIDERS:
            raise ValueError(f"providers: got {name!r}, want some of {'; '.join(PROVIDERS)}")
    for name in ("requests", "batch", "repeats", "answer", "longest"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, want at least 1")
    device = find_device(options.device)
    names = list(options.providers) or [
        name for name in PROVIDERS if name == "keyspan" or find_spec(name.partition(",")[0]) is not None
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if options.model is None:
            torch.manual_seed(0)
            save(GPT(SHAPES[options.shape]), folder)
        vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        requests = trace(options, vocabulary)
        print(
            f"{options.model or options.shape}, {options.dtype}, {device}: {len(requests)} requests, "
            f"{sum(len(x.prompt) for x in requests)} prompt tokens, {sum(x.tokens for x in requests)} to answer"
        )
        rows = measure(names, folder, requests, options, device)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(device), "options": {k: str(v) for k, v in vars(options).items()}}
    found["rows"] = [asdict(row) for row in rows]
    write_file(options.out / "results.json", json.dumps(found, indent=1).encode())
    write_file(options.out / "results.md", f"{table(rows)}\n".encode())
    print(f"\n{table(rows)}\n\nwritten: {options.out}")
    return rows


def measure(
    names: Sequence[str], folder: Path, requests: Sequence[Request], options: Bench, device: torch.device
) -> list[Row]:
    """Each provider runs a few tokens first; then all run the trace, and one request alone, in turns."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    alone = [Request(requests[0].prompt, max(2, options.answer))]
    rows, runs = [Row(name) for name in names], {}
    for row in rows:
        try:
            run = PROVIDERS[row.provider](folder, options, device)
            run([Request(x.prompt[:8], 2) for x in requests[:2]])
        except Exception as error:  # a provider that fails here is a result
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            print(f"{row.provider}: {row.note}", flush=True)
        else:
            runs[row.provider] = run
    served: dict[str, list[Served]] = {name: [] for name in runs}
    single: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            served[name].append(run(requests))
            found = run(alone)
            times = found.times[0]
            single[name].append((len(times) - 1) / (times[-1] - times[0]))
    want = served[next(iter(runs))][0].tokens if runs else []
    for row in rows:
        if row.provider not in runs:
            continue
        mine = served[row.provider]
        first = [[times[0] * 1e3 for times in x.times] for x in mine]
        between = [[(b - a) * 1e3 for times in x.times for a, b in pairwise(times)] for x in mine]
        row.tokens_per_second = median(sum(map(len, x.tokens)) / x.seconds for x in mine)
        row.first_p50, row.first_p95 = (median(quantile(x, q) for x in first) for q in (0.5, 0.95))
        row.between_p50, row.between_p95 = (median(quantile(x, q) for x in between) for q in (0.5, 0.95))
        row.single = median(single[row.provider])
        row.same = sum(a == b for a, b in zip(mine[0].tokens, want, strict=True)) / len(want)
    return rows


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share q of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| provider | tokens/s | first token, ms, p50 / p95 | between tokens, ms, p50 / p95 | alone, tokens/s | same "
        "answers |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.tokens_per_second is None:
            lines.append(f"| {row.provider} | {row.note} | | | | |")
        else:
            lines.append(
                f"| {row.provider} | {row.tokens_per_second:.1f} | {row.first_p50:.0f} / {row.first_p95:.0f} | "
                f"{row.between_p50:.1f} / {row.between_p95:.1f} | {row.single:.1f} | {row.same:.0%} |"
            )
    return "\n".join(lines)
