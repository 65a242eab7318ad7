"""`keyspan bench inference`: a trace of mixed requests through the engine, beside what a user would run instead.

Every provider has the same weights and answers greedily. Requests share a beginning, as those of a chat do; prompts and
answers are short and long. All are there at the start. Peers that need packages of their own run in a Python
environment of their own (`inference_peers.py`), which an option names.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keyspan.bench.measure import yardstick
from keyspan.bench.report import Report, machine
from keyspan.files import write_file
from keyspan.inference.engine import Engine
from keyspan.inference.sampling import Sampling
from keyspan.info import find_device
from keyspan.models import GPT, GPTConfig, load, save
from keyspan.models.checkpoints import read_config

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
    """A folder in Hugging Face's format, or a .gguf file. Default: random weights of `shape`."""
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
    peers: tuple[str, ...] = ()
    """Peers in Python environments of their own: openvino=PYTHON,FOLDER (made by `optimum-cli export openvino`),
    vllm=PYTHON, llama.cpp=PYTHON,FILE.gguf (package xllamacpp)."""
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
    memory_share: float | None = None
    """Of one request alone: bytes of weights that a token reads, over the time, as a share of what a sum over 256 MiB
    reads in a second."""
    memory: float | None = None
    """MiB that the provider takes at most while it answers. On a CPU resident memory: of a peer its process's, else
    what loading and answering add to this one; on a GPU memory of tensors. None where the system does not tell."""
    same: float | None = None
    """Share of the requests answered with the tokens of the first provider."""
    note: str = ""


Run = Callable[[Sequence[Request]], Served]


def trace(options: Bench, vocabulary: int, repeat: int = 0) -> list[Request]:
    """The requests, the same for all providers. Each repeat has the lengths of the first and tokens of its own, so that
    nobody finds them in a cache."""
    source, tokens = random.Random(0), random.Random(repeat)

    def between(low: int, high: int) -> int:
        return min(high, max(low, round(source.lognormvariate(0, 0.8) * (low + high) / 6)))

    def draw(count: int) -> list[int]:
        return [tokens.randrange(3, vocabulary) for _ in range(count)]

    start = draw(options.prefix)
    return [
        Request(start + draw(between(8, options.longest)), between(8, options.answer)) for _ in range(options.requests)
    ]


def make_keyspan(folder: Path, options: Bench, device: torch.device, int8: bool = False) -> Run:
    """The engine; a new one for each trace, so that no trace finds the pages of the one before."""
    model = load(folder, DTYPES[options.dtype], device)
    if device.type == "cpu":
        model.pack(int8)

    def run(requests: Sequence[Request]) -> Served:
        made = Engine(model, memory=2**28 if device.type == "cpu" else 2**33)
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


def make_continuous(folder: Path, options: Bench, device: torch.device) -> Run:
    """transformers' continuous batching. Its thread, which takes a core while it waits too, ends with each run."""
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype]).to(device).eval()
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=512)

    def run(requests: Sequence[Request]) -> Served:
        manager = model.init_continuous_batching(config, batching)
        manager.start()
        try:
            return answers(manager, requests)
        finally:
            manager.stop(hard_stop=True, timeout=10)

    def answers(manager: Any, requests: Sequence[Request]) -> Served:
        begin = time.perf_counter()
        ids = [manager.add_request(x.prompt, max_new_tokens=x.tokens, record_timestamps=True) for x in requests]
        found: dict[str, Any] = {}
        while len(found) < len(ids):
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError(str(manager.background_thread_status.fatal_error or "no result came in 60 s"))
            found[result.request_id] = result
        seconds = time.perf_counter() - begin
        results = [found[id] for id in ids]
        times = [[at - begin for at in x.timestamps] for x in results]
        return Served([list(x.generated_tokens) for x in results], times, seconds)

    return run


class Peer:
    """A peer in another Python environment: a process that loads the model once and answers traces."""

    def __init__(self, kind: str, python: str, own: str, folder: Path, options: Bench, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError("peers of other environments run on the CPU")
        script = Path(__file__).with_name("inference_peers.py")
        words = [python, str(script), kind, own or str(folder), options.dtype, str(torch.get_num_threads())]
        # Without our own packages.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def __call__(self, requests: Sequence[Request]) -> Served:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps([(x.prompt, x.tokens) for x in requests]), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = process.communicate()[1].strip().splitlines()
            raise RuntimeError(said[-1] if said else f"it ended with code {process.returncode}")
        return Served(**json.loads(line))

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


Maker = Callable[[Path, Bench, torch.device], Run]
PROVIDERS: dict[str, Maker] = {
    "keyspan": make_keyspan,
    "keyspan, int8 weights": partial(make_keyspan, int8=True),
    "transformers, padded": make_transformers,
    "transformers, continuous": make_continuous,
}
"""By name."""
PEERS = ("openvino", "vllm", "llama.cpp")
"""Those of `inference_peers.py`."""


def providers(options: Bench, device: torch.device) -> dict[str, Maker | None]:
    """Whom to run, by name; None for a peer that is not installed."""
    found: dict[str, Maker | None] = dict(PROVIDERS)
    if device.type != "cpu":
        del found["keyspan, int8 weights"]
    given = {}
    for peer in options.peers:
        kind, _, where = peer.partition("=")
        python, _, own = where.partition(",")
        if kind not in PEERS or not Path(python).is_file():
            raise ValueError(f"peers: got {peer!r}, want KIND=PYTHON[,MODEL] with a kind of {', '.join(PEERS)}")
        given[kind] = partial(Peer, kind, python, own)
    found |= {kind: given.get(kind) for kind in PEERS}
    for name in options.providers:
        if name not in found:
            raise ValueError(f"providers: got {name!r}, want some of {'; '.join(found)}")
    if options.providers:
        return {name: found[name] for name in options.providers}
    here = find_spec("transformers") is not None
    return {name: make if here or not name.startswith("transformers") else None for name, make in found.items()}


def main(options: Bench) -> list[Row]:
    """Run the benchmark, print what is measured, and write JSON and a table."""
    if options.shape not in SHAPES:
        raise ValueError(f"shape: got {options.shape!r}, want one of {', '.join(SHAPES)}")
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: got {options.dtype!r}, want one of {', '.join(DTYPES)}")
    for name in ("requests", "batch", "repeats", "answer", "longest"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, want at least 1")
    device = find_device(options.device)
    makers = providers(options, device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if options.model is None:
            torch.manual_seed(0)
            save(GPT(SHAPES[options.shape]), folder)
        elif folder.suffix == ".gguf":
            save(load(folder), Path(scratch))
            folder = Path(scratch)
        vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        requests = trace(options, vocabulary)
        report = Report(options.out, machine(device))
        options.out.mkdir(parents=True, exist_ok=True)
        report.tell(
            "trace",
            f"{options.model or options.shape}, {options.dtype}, {device}: {len(requests)} requests, "
            f"{sum(len(x.prompt) for x in requests)} prompt tokens, {sum(x.tokens for x in requests)} to answer",
            options={k: str(v) for k, v in vars(options).items()},
        )
        repeats = [trace(options, vocabulary, n) for n in range(options.repeats)]
        rows = measure(makers, folder, repeats, options, device)
    for row in rows:
        report.sections.setdefault("inference", []).append(asdict(row))
    report.write()
    text = table(rows)
    write_file(options.out / "results.md", f"{report.sections['trace'][0]['text']}\n\n{text}\n".encode())
    print(f"\n{text}\n\nwritten: {options.out}")
    return rows


def measure(
    makers: dict[str, Maker | None],
    folder: Path,
    repeats: Sequence[Sequence[Request]],
    options: Bench,
    device: torch.device,
) -> list[Row]:
    """Each provider runs a few tokens first; then all run the trace, and one request alone, in turns."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows = [Row(name) for name in makers]
    runs: dict[str, Run] = {}
    served: dict[str, list[Served]] = {}
    single: dict[str, list[float]] = {}
    reads: list[float] = []
    loaded: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        for row in rows:
            make = makers[row.provider]
            if make is None:
                row.note = "not installed here"
                continue
            gc.collect()
            before = _memory(device)
            try:
                run = make(folder, options, device)
                if isinstance(run, Peer):
                    stack.callback(run.close)
                run([Request(x.prompt[-8:], 2) for x in repeats[0][:2]])
            except Exception as error:  # a provider that fails here is a result
                row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
                print(f"{row.provider}: {row.note}", flush=True)
            else:
                runs[row.provider], served[row.provider], single[row.provider] = run, [], []
                if not isinstance(run, Peer):
                    loaded[row.provider] = _memory(device) - before
        for requests in repeats:
            for name, run in runs.items():
                gc.collect()
                reset, before = _reset_peak(device), _memory(device)
                served[name].append(run(requests))
                if isinstance(run, Peer):
                    peak = _process_memory("VmHWM", run.pid)
                else:
                    peak = loaded[name] + _peak(device) - before if reset else math.nan
                peaks[name] = max(peaks.get(name, 0.0), peak)
                found = run([Request(requests[-1].prompt[-32:], max(2, options.answer))])
                times = found.times[0]
                single[name].append((len(times) - 1) / (times[-1] - times[0]))
            if device.type == "cpu":
                reads.append(_read_rate())
    want = served[next(iter(runs))][0].tokens if runs else []
    size = _weight_bytes(folder, DTYPES[options.dtype])
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
        row.memory = None if math.isnan(peaks[row.provider]) else peaks[row.provider]
        if reads and "int8" not in row.provider:
            row.memory_share = row.single * size / median(reads)
        row.same = sum(a == b for a, b in zip(mine[0].tokens, want, strict=True)) / len(want)
    return rows


def _process_memory(field: str, pid: int | str = "self") -> float:
    """MiB of an entry of /proc/PID/status; NaN where there is none."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return math.nan
    found = [line.split() for line in text.splitlines() if line.startswith(f"{field}:")]
    return int(found[0][1]) / 1024 if found else math.nan


def _memory(device: torch.device) -> float:
    """MiB that are taken now."""
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else _process_memory("VmRSS")


def _peak(device: torch.device) -> float:
    """MiB that were taken at most since `_reset_peak`."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _process_memory("VmHWM")


def _reset_peak(device: torch.device) -> bool:
    """Whether the peak is counted from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _read_rate() -> float:
    """Bytes a second of a sum over 256 MiB, the best of five."""
    stick = yardstick("sum", torch.float32, torch.device("cpu"))
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        stick.run()
        best = min(best, time.perf_counter() - begin)
    return stick.amount / best


def _weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of weights that a token reads: all but an embedding that is not the output layer too."""
    with torch.device("meta"):
        model = GPT(read_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))[1])
    untied = 0 if model.config.tie_embeddings else model.embedding.weight.numel()
    return (model.num_parameters() - untied) * dtype.itemsize


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share q of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| provider | tokens/s | first token, ms, p50 / p95 | between tokens, ms, p50 / p95 | alone, tokens/s | of the "
        "read rate | MiB | same answers |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.tokens_per_second is None:
            lines.append(f"| {row.provider} | {row.note} | | | | | | |")
        else:
            share = "" if row.memory_share is None else f"{row.memory_share:.2f}"
            memory = "" if row.memory is None else f"{row.memory:,.0f}"
            lines.append(
                f"| {row.provider} | {row.tokens_per_second:.1f} | {row.first_p50:.0f} / {row.first_p95:.0f} | "
                f"{row.between_p50:.1f} / {row.between_p95:.1f} | {row.single:.1f} | {share} | {memory} | "
                f"{row.same:.0%} |"
            )
    return "\n".join(lines)
