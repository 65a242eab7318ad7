"""`keyspan bench training`: one optimizer step of a GPT on packed documents, beside what a user would train instead.

Every provider has the same weights, documents and targets. One whose loss or gradients differ gets no figure.
"""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyspan.bench.clock import synchronize
from keyspan.bench.measure import NOISY, spread
from keyspan.bench.plain_gpt import PlainGPT
from keyspan.bench.report import Report, judged, machine, markdown_table
from keyspan.files import write_file
from keyspan.info import find_device
from keyspan.layers import linear
from keyspan.models.gpt import GPT, GPTConfig
from keyspan.training.packing import pinned


@dataclass(frozen=True)
class Size:
    """A model and the documents of a step."""

    config: GPTConfig
    tokens: int
    shortest: int
    longest: int


SIZES = {
    "tiny": Size(GPTConfig(vocab_size=256, dim=64, layers=2, heads=4, kv_heads=2), 256, 4, 64),
    "10m": Size(GPTConfig(vocab_size=4096, dim=320, layers=7, heads=5, kv_heads=5), 4096, 16, 2048),
    "124m": Size(GPTConfig(vocab_size=50304, dim=768, layers=12, heads=12, kv_heads=4), 32768, 16, 4096),
    "wide": Size(GPTConfig(vocab_size=50304, dim=2048, layers=8, heads=16, kv_heads=4), 16384, 16, 4096),
}
"""By name: `10m` for a CPU, `124m` and `wide` (8 layers of 2048) for a GPU; `tiny` shows that everything runs."""


@dataclass
class Bench:
    """Tokens a second and memory of a training step, beside plain torch and transformers."""

    size: str = "10m"
    """tiny, 10m, 124m or wide."""
    precision: str = "fp32"
    """fp32, or bf16 for autocast."""
    providers: tuple[str, ...] = ()
    """By name; none: all that run here."""
    repeats: int = 5
    """Steps of every provider that are timed, in turns; the median counts."""
    compile: bool = True
    """Include providers that are compiled."""
    limit: float = 300
    """Seconds that each provider may take before it is timed, compilation included; beyond them it gets no figure."""
    device: str = "cpu"
    """auto (an accelerator where there is one, else the CPU), or a torch device."""
    out: Path = field(default_factory=lambda: Path("runs/bench-training"))
    """Folder for results.json, results.md and results.png."""


@dataclass
class Row:
    """What was measured of one provider."""

    provider: str
    tokens_per_second: float | None = None
    milliseconds: float | None = None
    """Median time of a step."""
    spread: float | None = None
    """Interquartile range of the times as a share of the median."""
    host: float | None = None
    """Milliseconds until a step's calls have returned; on a CPU all of them."""
    peak_mib: float | None = None
    """Most memory during a step, weights and optimizer included; of a CPU what is allocated beyond them."""
    mfu: float | None = None
    """Share of the measured rate of a matrix product that the model's own products and visible scores take."""
    arithmetic: float | None = None
    """FLOP of a step, padding and hidden scores included, over those of the tokens and visible scores."""
    ready: float | None = None
    """Seconds until the first steps were done, compilation included."""
    device: dict[str, float] = field(default_factory=dict)
    """Milliseconds that a GPU is busy in a step, by kind of kernel, see `KINDS`."""
    loss: float | None = None
    norm: float | None = None
    """Of all gradients of the first step."""
    note: str = ""


@dataclass
class Documents:
    """The data of a step: packed tokens, targets [T], and lengths."""

    tokens: Tensor
    targets: Tensor
    lengths: list[int]


def documents(size: Size, device: torch.device) -> Documents:
    """Random tokens in documents whose lengths are log-normal, as those of a text corpus are: exp(N(6, 1.1))."""
    generator = torch.Generator().manual_seed(0)
    centre = min(6.0, math.log(size.longest) - 1.6)
    lengths: list[int] = []
    while sum(lengths) < size.tokens:
        drawn = math.exp(float(torch.randn(1, generator=generator)) * 1.1 + centre)
        lengths.append(int(min(size.longest, max(size.shortest, drawn), size.tokens - sum(lengths))))
    tokens, targets = (
        torch.randint(size.config.vocab_size, (size.tokens,), generator=generator).to(device) for _ in range(2)
    )
    return Documents(tokens, targets, lengths)


Loss = Callable[[], Tensor]
"""One micro-batch: its share of the mean loss over all tokens."""


@dataclass
class Trained:
    """A provider: a model, and the micro-batches of its step."""

    model: nn.Module
    batches: list[Loss]


def padded(
    data: Documents, order: Sequence[int], budget: int, multiple: int = 1
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, targets, positions) of batches of whole documents in that order, each at most `budget` with padding.

    Lengths are padded to a multiple of `multiple`.
    """
    parts = list(zip(data.tokens.split(data.lengths), data.targets.split(data.lengths), strict=True))
    groups: list[list[int]] = []
    for n in order:
        group = [*groups[-1], n] if groups else [n]
        longest = max(data.lengths[i] for i in group)
        if groups and -(-longest // multiple) * multiple * len(group) <= budget:
            groups[-1] = group
        else:
            groups.append([n])
    found = []
    for group in groups:
        tokens, targets = (
            nn.utils.rnn.pad_sequence([parts[n][k] for n in group], batch_first=True, padding_value=fill)
            for k, fill in ((0, 0), (1, -100))
        )
        rest = -tokens.shape[1] % multiple
        tokens, targets = F.pad(tokens, (0, rest)), F.pad(targets, (0, rest), value=-100)
        found.append((tokens, targets, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)))
    return found


def in_rows(data: Documents, row: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The documents one after the other, cut into rows of `row` tokens in which they see each other."""
    T = len(data.tokens) // row * row
    shape = (-1, row)
    tokens, targets = data.tokens[:T].view(shape), data.targets[:T].view(shape)
    return [(tokens, targets, torch.arange(row, device=tokens.device).expand_as(tokens))]


def packed(data: Documents) -> tuple[Tensor, Tensor, Tensor]:
    """The documents as one row, positions counted in each."""
    positions = torch.cat([torch.arange(n) for n in data.lengths]).to(data.tokens.device)
    return data.tokens[None], data.targets[None], positions[None]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _plain(
    gpt: GPT,
    data: Documents,
    batches: list[tuple[Tensor, Tensor, Tensor]],
    attend: Callable[..., Tensor],
    fast: bool,
    dynamic: bool | None = None,
) -> Trained:
    """Plain torch on the batches, compiled where `fast`; `dynamic`: once for all their shapes."""
    model = PlainGPT(gpt.config)
    model.load_state_dict(gpt.state_dict())
    model = model.to(data.tokens.device)
    call = torch.compile(model, dynamic=dynamic) if fast else model
    T = len(data.tokens)
    return Trained(model, [partial(_share, call, batch, attend, T) for batch in batches])


def _share(model: Callable[..., Tensor], batch: tuple[Tensor, ...], attend: Any, T: int) -> Tensor:
    return model(*batch, attend) / T


def _keyspan(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    model = GPT(gpt.config)
    model.load_state_dict(gpt.state_dict())
    model = model.to(data.tokens.device)
    lengths = pinned(torch.tensor(data.lengths), data.tokens.device)
    call = torch.compile(model.loss, fullgraph=True) if fast else model.loss
    return Trained(model, [lambda: call(data.tokens, data.targets, lengths)])


def _sdpa_padded(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    batches = padded(data, range(len(data.lengths)), _budget(size), _multiple(fast))
    return _plain(gpt, data, batches, _causal, fast, dynamic=True)


def _sdpa_sorted(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    batches = padded(data, _by_length(data), _budget(size), _multiple(fast))
    return _plain(gpt, data, batches, _causal, fast, dynamic=True)


def _multiple(fast: bool) -> int:
    """Lengths are rounded up to a multiple of this: a product that is compiled for all shapes at once needs it."""
    return 64 if fast else 1


def _sdpa_leaking(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    return _plain(gpt, data, in_rows(data, min(2048, size.tokens)), _causal, fast)


def _sdpa_dense(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    document = torch.repeat_interleave(torch.tensor(data.lengths)).to(data.tokens.device)
    mask = (document[:, None] == document[None]).tril()
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    return _plain(gpt, data, [packed(data)], attend, fast)


def _flex(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, device = len(data.tokens), data.tokens.device
    document = torch.repeat_interleave(torch.tensor(data.lengths)).to(device)
    # With sizes as constants it takes 1 ms instead of 5, but Triton compiles it for minutes at 16384 tokens.
    make = torch.compile(create_block_mask, dynamic=size.tokens < 2**15)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[i] == document[j])

    found = _plain(gpt, data, [packed(data)], _causal, fast)
    call = torch.compile(found.model)

    def loss() -> Tensor:
        mask = make(visible, None, None, T, T, device=device)  # a new one for every batch
        total: Tensor = call(*packed_data, partial(flex_attention, block_mask=mask, enable_gqa=True))
        return total / T

    packed_data = packed(data)
    return Trained(found.model, [loss])


def _llama(gpt: GPT, data: Documents, size: Size, fast: bool, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Trained:
    """transformers' Llama with the same weights."""
    transformers: Any = import_module("transformers")
    c = gpt.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 16,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(_llama_weights(gpt), strict=False)
    model.tie_weights()
    model = model.to(data.tokens.device)
    call = torch.compile(model) if fast else model
    T = len(data.tokens)

    def loss(tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        logits = call(input_ids=tokens, attention_mask=(targets != -100).long()).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / T

    return Trained(model, [partial(loss, *batch) for batch in batches])


def _llama_weights(gpt: GPT) -> dict[str, Tensor]:
    c, weights = gpt.config, gpt.state_dict()
    rows = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
    found = {"model.embed_tokens.weight": weights["embedding.weight"], "model.norm.weight": weights["norm.weight"]}
    for n in range(c.layers):
        ours, theirs = f"blocks.{n}.", f"model.layers.{n}."
        query, key, value = weights[f"{ours}attention.qkv.weight"].split(rows)
        gate, up = weights[f"{ours}mlp.w12.weight"].chunk(2)
        for name, w in (
            ("self_attn.q_proj", query),
            ("self_attn.k_proj", key),
            ("self_attn.v_proj", value),
            ("self_attn.o_proj", weights[f"{ours}attention.out.weight"]),
            ("mlp.gate_proj", gate),
            ("mlp.up_proj", up),
            ("mlp.down_proj", weights[f"{ours}mlp.w3.weight"]),
            ("input_layernorm", weights[f"{ours}attention_norm.weight"]),
            ("post_attention_layernorm", weights[f"{ours}mlp_norm.weight"]),
        ):
            found[f"{theirs}{name}.weight"] = w
    return found


def _llama_padded(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    return _llama(gpt, data, size, fast, padded(data, range(len(data.lengths)), _budget(size)))


def _llama_sorted(gpt: GPT, data: Documents, size: Size, fast: bool) -> Trained:
    return _llama(gpt, data, size, fast, padded(data, _by_length(data), _budget(size)))


def _by_length(data: Documents) -> list[int]:
    return sorted(range(len(data.lengths)), key=lambda n: -data.lengths[n])


def _budget(size: Size) -> int:
    """Tokens of a padded micro-batch, padding included: as many as of a packed one, whose logits then fit too."""
    return size.tokens


Make = Callable[[GPT, Documents, Size, bool], Trained]
PROVIDERS: dict[str, tuple[Make, bool]] = {
    "keyspan": (_keyspan, False),
    "keyspan, compiled": (_keyspan, True),
    "SDPA, padded": (_sdpa_padded, False),
    "SDPA, padded, compiled": (_sdpa_padded, True),
    "SDPA, padded, sorted": (_sdpa_sorted, False),
    "SDPA, padded, sorted, compiled": (_sdpa_sorted, True),
    "SDPA, dense mask": (_sdpa_dense, False),
    "SDPA, dense mask, compiled": (_sdpa_dense, True),
    "SDPA, rows that leak": (_sdpa_leaking, False),
    "SDPA, rows that leak, compiled": (_sdpa_leaking, True),
    "flex, packed, compiled": (_flex, True),
    "transformers, padded": (_llama_padded, False),
    "transformers, padded, sorted": (_llama_sorted, False),
}
"""By name: what makes it, and whether it is compiled."""

KINDS = {
    "attention": r"flash|fmha|flex_attention|hopper_|^(forward|combine|stats|bounds|keys|queries)_kernel|attention",
    "cross-entropy": r"cross_entropy|softmax|nll_loss",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|triton_tem_fused_(add)?mm",
    "optimizer": r"adam|multi_tensor",
}
"""What a step's kernels are for, by their names; the first that fits counts, and the rest is elementwise."""

STEPS_IN_A_ROW = 4
LEAKS = "documents see each other"


class Goal(NamedTuple):
    """What is wanted of a provider beside the fastest of others."""

    ours: str
    against: tuple[str, ...]
    speed: dict[str, float]
    """Least ratio of speeds, by precision."""
    memory: float
    """Largest ratio of peak memories."""


def _eager_or_compiled(name: str) -> tuple[str, str]:
    return name, f"{name}, compiled"


_FLEX = ("flex, packed, compiled",)
GOALS = {
    "10m": (
        Goal("keyspan", (*_eager_or_compiled("SDPA, padded"), "transformers, padded"), {"fp32": 5.0, "bf16": 7.0}, 1.0),
        Goal(
            "keyspan",
            (*_eager_or_compiled("SDPA, padded, sorted"), "transformers, padded, sorted"),
            {"fp32": 1.6, "bf16": 2.3},
            1.0,
        ),
        Goal("keyspan", _eager_or_compiled("SDPA, rows that leak"), {"fp32": 1.5, "bf16": 2.3}, 1.0),
        Goal("keyspan", _eager_or_compiled("SDPA, dense mask"), {"fp32": 3.5, "bf16": 6.5}, 1.0),
    ),
    "124m": (
        Goal("keyspan, compiled", _FLEX, {"bf16": 1.25}, 0.6),
        Goal("keyspan", _FLEX, {"bf16": 0.9}, 1.0),
    ),
    "wide": (
        Goal("keyspan, compiled", _FLEX, {"bf16": 1.1}, 1.0),
        Goal("keyspan, compiled", _eager_or_compiled("SDPA, padded, sorted"), {"bf16": 1.3}, 1.0),
    ),
}
"""By size: what the table is judged by."""


def able(name: str, size: Size, options: Bench, device: torch.device) -> bool:
    """Whether a provider runs here."""
    if PROVIDERS[name][1] and not options.compile:
        return False
    if name.startswith("flex"):  # which has no backward on a CPU
        return device.type == "cuda"
    if "dense mask" in name:  # which takes its square in memory
        return size.tokens <= 4096
    return not name.startswith("transformers") or find_spec("transformers") is not None


def flops(size: Size, tokens: int, pairs: int) -> float:
    """Of a step, forward and backward: the products with weights for so many tokens, and the scores of so many pairs of
    query and key."""
    c = size.config
    per_layer = c.dim * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.dim * c.hidden
    weights = c.layers * per_layer + c.vocab_size * c.dim
    return 6 * tokens * weights + 3 * 4 * c.layers * c.heads * c.head_dim * pairs


def visible_pairs(lengths: Iterable[int]) -> int:
    """Pairs of query and key under a causal mask in rows of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def computed(name: str, size: Size, data: Documents) -> tuple[int, int]:
    """(tokens, pairs of query and key) that a provider computes, padding included."""
    if "padded" in name:
        order = _by_length(data) if "sorted" in name else range(len(data.lengths))
        batches = padded(data, order, _budget(size), _multiple("compiled" in name))
    elif "leak" in name:
        batches = in_rows(data, min(2048, size.tokens))
    elif "dense mask" in name:
        return size.tokens, size.tokens**2
    else:
        return size.tokens, visible_pairs(data.lengths)
    rows = [tokens.shape[1] for tokens, *_ in batches for _ in range(len(tokens))]
    return sum(rows), visible_pairs(rows)


def main(options: Bench) -> list[Row]:
    """Run the benchmark, print what is measured as it comes, and write JSON, table and picture."""
    if options.size not in SIZES:
        raise ValueError(f"size: got {options.size!r}, want one of {', '.join(SIZES)}")
    if options.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: got {options.precision!r}, want fp32 or bf16")
    for name in options.providers:
        if name not in PROVIDERS:
            raise ValueError(f"providers: got {name!r}, want some of {'; '.join(PROVIDERS)}")
    if options.repeats < 1:
        raise ValueError(f"repeats: got {options.repeats}, want at least 1")
    if not options.limit > 0:
        raise ValueError(f"limit: got {options.limit}, want a positive number of seconds")
    device = find_device(options.device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which counts memory, would write on every start
    size = SIZES[options.size]
    data = documents(size, device)
    fill = size.tokens / (max(data.lengths) * len(data.lengths))
    print(
        f"{options.size}, {options.precision}: {size.tokens} tokens in {len(data.lengths)} documents of "
        f"{min(data.lengths)} to {max(data.lengths)}, {fill:.0%} of one padded batch filled"
    )
    torch.manual_seed(0)
    gpt = GPT(size.config)
    names = list(options.providers) or [name for name in PROVIDERS if able(name, size, options, device)]
    rows = measure(names, gpt, data, size, options, device)
    text = "\n\n".join(filter(None, (table(rows), device_table(rows))))
    verdicts = judge(rows, options)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out, machine(device))
    report.keep("rows", rows)
    report.tell("step", f"\n{text}\n", size=options.size, precision=options.precision, documents=data.lengths)
    for verdict in verdicts:
        report.tell("goals", verdict)
    lines = "\n".join(f"* {verdict}" for verdict in verdicts)
    write_file(options.out / "results.md", f"{text}\n\n{lines}\n".encode())
    plot(rows, options, options.out / "results.png")
    print(f"written: {options.out}")
    return rows


def measure(names: list[str], gpt: GPT, data: Documents, size: Size, options: Bench, device: torch.device) -> list[Row]:
    """Each provider's loss and gradients are compared first; then their steps are timed in turns."""
    rows, steps = [], {}
    wanted: dict[str, float] = {}
    for name in names:
        row = Row(name)
        rows.append(row)
        try:
            began = time.perf_counter()
            with time_limit(options.limit):
                make, fast = PROVIDERS[name]
                step = Step(make(gpt, data, size, fast), options, device)
                row.loss, row.norm = step.first()
        except Exception as error:  # a provider that fails here is a result
            row.note = _note(error)
            print(f"{name}: {row.note}", flush=True)
            continue
        got = {"loss": row.loss, "gradient's norm": row.norm}
        wanted = wanted or got
        if "leak" in name:
            row.note = LEAKS
        else:
            row.note = differs(got, wanted, options.precision)
            if row.note:
                continue
        try:
            with time_limit(options.limit):
                for _ in range(2 if fast else 1):  # a second shape or a second step may compile too
                    step.run()
                row.ready = time.perf_counter() - began
                row.peak_mib = step.peak()
        except Exception as error:
            row.note = _note(error)
            print(f"{name}: {row.note}", flush=True)
            continue
        steps[name] = step
        print(f"{name}: loss {row.loss:.4f}", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            times[name].append(step.time())
    work = flops(size, size.tokens, visible_pairs(data.lengths))
    rate = product_rate(options.precision, device)
    for row in rows:
        if row.provider in times:
            seconds = median(total for total, _ in times[row.provider])
            row.milliseconds = seconds * 1e3
            row.spread = spread([total for total, _ in times[row.provider]])
            row.host = median(host for _, host in times[row.provider]) * 1e3
            row.tokens_per_second = size.tokens / seconds
            row.mfu = work / seconds / rate
            row.arithmetic = flops(size, *computed(row.provider, size, data)) / work
            row.device = steps[row.provider].device_times()
    return rows


def differs(got: dict[str, float], wanted: dict[str, float], precision: str) -> str:
    """What of a provider's first step differs from the first provider's; empty where nothing does."""
    tolerances = (
        {"loss": 1e-4, "gradient's norm": 1e-3} if precision == "fp32" else {"loss": 2e-3, "gradient's norm": 2e-2}
    )
    for name, tolerance in tolerances.items():
        if not abs(got[name] - wanted[name]) <= tolerance * abs(wanted[name]):
            return f"its {name} differs: {got[name]:.5f}, not {wanted[name]:.5f}"
    return ""


def _note(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside where it takes longer; on the main thread of a system with signals, else without effect."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s, compilation included")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Step:
    """One optimizer step of a provider: its micro-batches forward and backward, then AdamW."""

    def __init__(self, trained: Trained, options: Bench, device: torch.device) -> None:
        self.trained, self.device = trained, device
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=options.precision == "bf16")
        self.optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> Tensor:
        total = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def gradients(self) -> Tensor:
        """Fills the gradients; returns the loss."""
        total = torch.zeros((), device=self.device)
        for batch in self.trained.batches:
            with self.autocast():
                loss = batch()
            loss.backward()
            total += loss.detach()
        return total

    def first(self) -> tuple[float, float]:
        """Loss and norm of the gradients, without a step of the optimizer."""
        loss = self.gradients()
        grads = [p.grad for p in self.trained.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        self.optimizer.zero_grad()
        return float(loss), float(norm)

    def run(self) -> float:
        return float(self())

    def time(self) -> tuple[float, float]:
        """Seconds of a step, and of the host's part in it: of some steps in a row on an accelerator, which a loop that
        reads the loss once in a while does not wait for."""
        count = 1 if self.device.type == "cpu" else STEPS_IN_A_ROW
        synchronize(self.device)
        begin = time.perf_counter()
        self()
        host = time.perf_counter() - begin
        for _ in range(count - 1):
            self()
        synchronize(self.device)
        return (time.perf_counter() - begin) / count, host

    def peak(self) -> float:
        """MiB, see `Row.peak_mib`. Other providers' weights, which are there too, do not count."""
        if self.device.type != "cuda":
            from keyspan.testing import peak_memory

            return peak_memory(self) / 2**20
        others = torch.cuda.memory_allocated(self.device) - self.resident()
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        return (torch.cuda.max_memory_allocated(self.device) - others) / 2**20

    def device_times(self) -> dict[str, float]:
        """See `Row.device`; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self()
            synchronize(self.device)
        on_device = (event for event in profile.key_averages() if event.device_type.name == "CUDA")
        return by_kind((event.key, event.self_device_time_total / 1e3) for event in on_device)

    def resident(self) -> int:
        """Bytes of weights and optimizer state."""
        parameters = list(self.trained.model.parameters())
        state = [x for p in parameters for x in self.optimizer.state[p].values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*parameters, *state))


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The sums of kernels' times by kind, see `KINDS`; what fits none is "elementwise"."""
    found = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    for name, taken in kernels:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")
        found[kind] += taken
    return found


def product_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product here, torch's or on a CPU the native library's: the best of some."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for product in (torch.matmul, linear) * 5:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            product(a, b)
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2 * n**3 / best


def table(rows: list[Row]) -> str:
    """Markdown."""
    first = next((row for row in rows if row.provider == "keyspan" and row.tokens_per_second), None)
    header = (
        "provider", "tokens/s", "ms a step", "host ms", "peak MiB", "MFU", "ready after s", "arithmetic ÷ Keyspan's",
        "Keyspan's eager speed ÷ its",
    )  # fmt: skip
    lines = []
    for row in rows:
        if row.tokens_per_second is None:
            lines.append((row.provider, row.note, *[""] * 7))
            continue
        ratio = "" if first is None else _ratio(first, row) or f"none: times spread by {_noise(first, row):.0%}"
        name = f"{row.provider} ({row.note})" if row.note else row.provider
        numbers = (f"{row.tokens_per_second:.0f}", f"{row.milliseconds:.1f}", f"{row.host:.1f}", f"{row.peak_mib:.0f}")
        lines.append((name, *numbers, f"{row.mfu:.0%}", f"{row.ready:.0f}", f"{row.arithmetic:.2f}", ratio))
    return markdown_table(header, lines)


def device_table(rows: list[Row]) -> str:
    """Markdown: milliseconds of a step in which a GPU is busy, by kind of kernel. Empty where none was measured."""
    lines = [
        (row.provider, *(f"{taken:.1f}" for taken in row.device.values()), f"{sum(row.device.values()):.1f}")
        for row in rows
        if row.device
    ]
    return markdown_table(("ms on the device", *KINDS, "elementwise", "all"), lines) if lines else ""


def _noise(ours: Row, other: Row) -> float:
    return max(ours.spread or 0.0, other.spread or 0.0)


def _ratio(ours: Row, other: Row) -> str:
    """Our speed over the other's; empty where the times spread too far to say."""
    if ours.tokens_per_second is None or other.tokens_per_second is None or _noise(ours, other) > NOISY:
        return ""
    return f"{ours.tokens_per_second / other.tokens_per_second:.2f}"


def judge(rows: list[Row], options: Bench) -> list[str]:
    """A line for each goal of the size whose providers were measured."""
    by_name = {row.provider: row for row in rows if row.tokens_per_second is not None}
    lines = []
    for goal in GOALS.get(options.size, ()):
        others = [by_name[name] for name in goal.against if name in by_name]
        if goal.ours not in by_name or not others:
            continue
        ours, best = by_name[goal.ours], max(others, key=lambda row: row.tokens_per_second or 0.0)
        leanest = min(others, key=lambda row: row.peak_mib or math.inf)
        ratio = _ratio(ours, best)
        speed = judged(float(ratio), goal.speed.get(options.precision)) if ratio else "times spread too far to say"
        memory = judged((ours.peak_mib or 0.0) / (leanest.peak_mib or math.inf), goal.memory, most=True)
        lines.append(f"{goal.ours} ÷ {best.provider}: speed {speed}; peak memory ÷ {leanest.provider}'s {memory}")
    return lines


def plot(rows: list[Row], options: Bench, path: Path) -> None:
    """Bars: tokens a second and peak memory."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.tokens_per_second is not None]
    figure = Figure(figsize=(10, 1.2 + 0.36 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, values in (
        (panels[0], "tokens per second", [row.tokens_per_second for row in shown]),
        (panels[1], "peak memory of a step, MiB", [row.peak_mib for row in shown]),
    ):
        colours = ["tab:orange" if row.provider.startswith("keyspan") else "tab:blue" for row in shown]
        axes.barh([row.provider for row in shown], values, color=colours)
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.suptitle(f"training step, {options.size}, {options.precision}, {options.device}")
    figure.savefig(path, dpi=130)
