"""Attention against what a user would pick instead: the same work, interleaved in one run, medians and ratios.

A provider whose result does not match the reference is shown as wrong, and no ratio is printed for it.
Knows the public API only; `saccade bench attention` runs it.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from saccade.bench.shapes import SHAPES, Shape
from saccade.core.masks import Mask
from saccade.testing import peak_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """One piece of work: a packed row of documents (one document: an ordinary sequence), causal or not."""

    name: str
    lengths: tuple[int, ...]
    shape: Shape
    causal: bool = True
    window: int | None = None
    alibi: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def mask(self) -> Mask | None:
        parts: list[Mask] = [saccade.Documents(list(self.lengths))] if len(self.lengths) > 1 else []
        parts += [saccade.Causal()] if self.causal else []
        parts += [saccade.Window(self.window, 0)] if self.window is not None else []
        mask = parts[0] if parts else None
        for part in parts[1:]:
            mask = mask & part if mask is not None else part
        return mask

    def slopes(self) -> Tensor:
        heads = self.shape.heads
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


@dataclass
class Row:
    """What was measured of one provider on one work."""

    work: str
    provider: str
    dtype: str
    backward: bool
    milliseconds: float | None = None
    peak_mib: float | None = None
    gflops: float | None = None
    note: str = ""
    ratio: float | None = None
    """Time of this provider over that of Saccade's fastest backend: above 1, Saccade is faster."""


Provider = Callable[[Tensor, Tensor, Tensor], Tensor]


def works(lengths: tuple[int, ...], shape: Shape) -> list[Work]:
    """The standard list: lengths full and causal, packed documents, a window, ALiBi."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(16, 257, (64,), generator=generator).tolist()
    return [
        *(Work(f"causal {n}", (n,), shape) for n in lengths),
        Work(f"full {longest}", (longest,), shape, causal=False),
        Work("packed 64 × 16–256", tuple(short), shape),
        Work("packed 5 × 72–2000", (72, 300, 700, 1100, 2000), shape),
        Work(f"window 256 of {longest}", (longest,), shape, window=255),
        Work(f"ALiBi causal {longest}", (longest,), shape, alibi=True),
    ]


def providers(work: Work, device: torch.device, flex: bool) -> dict[str, Provider]:
    """Saccade's backends and every alternative that can do this work, as functions of q, k, v `[1, M, H, K]`."""
    mask = work.mask()
    ranges = None if mask is None else mask.lower(1, work.tokens, work.tokens, device)
    slopes = work.slopes().to(device)
    bias = saccade.Alibi(slopes) if work.alibi else None
    found: dict[str, Provider] = {}
    for name in saccade.BACKENDS:
        if name != "reference":
            found[f"saccade:{name}"] = partial(saccade.attention, mask=ranges, bias=bias, backend=name)
    gqa = work.shape.heads != work.shape.kv_heads
    dense: Tensor | None = None
    if len(work.lengths) > 1 or work.window is not None or work.alibi:
        visible = mask.materialize(work.tokens, work.tokens, device=device)[0] if mask is not None else None
        dense = visible
        if work.alibi and visible is not None:
            row = torch.arange(work.tokens, device=device)
            far = (row[:, None] - row).abs()
            dense = torch.where(visible, -slopes[:, None, None] * far, -torch.inf)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = work.causal and dense is None
        added = dense.to(q.dtype) if dense is not None and dense.dtype != torch.bool else dense
        q, k, v = map(heads_first, (q, k, v))
        return heads_first(F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=plain, enable_gqa=gqa))

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        H, G = work.shape.heads, work.shape.kv_heads
        q, k, v = map(heads_first, (q, k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)))
        score = (q @ k.transpose(-1, -2)).float() * work.shape.dim**-0.5
        if dense is not None and dense.dtype != torch.bool:
            score = score + dense
        elif mask is not None:
            seen = dense if dense is not None else torch.ones_like(score[0, 0], dtype=torch.bool).tril()
            score = score.masked_fill(~seen, -torch.inf)
        return heads_first(score.softmax(-1).to(v.dtype) @ v)

    found["sdpa"] = sdpa
    if work.tokens <= 4096:
        found["dense softmax"] = softmax
    if len(work.lengths) > 1:
        found |= _by_document(work, gqa)
    if flex:
        found |= _flex(work, mask, device, gqa)
    found |= _installed(work, device)
    return found


def _by_document(work: Work, gqa: bool) -> dict[str, Provider]:
    """What users do who have no packing: one call per document, or a padded batch with a dense mask."""
    lengths = list(work.lengths)
    longest = max(lengths)

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(a, b, c, is_causal=work.causal, enable_gqa=gqa).transpose(1, 2)
            for a, b, c in zip(*(x.transpose(1, 2).split(lengths, 2) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(parts, 1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.nn.utils.rnn.pad_sequence(list(x[0].split(lengths)), batch_first=True) for x in (q, k, v))
        # Padding stands behind the keys, so causality hides it from every real query.
        keys = torch.arange(longest, device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if work.causal else keys[:, None, None],
            is_causal=work.causal,
            enable_gqa=gqa,
        ).transpose(1, 2)
        return out[keys][None]

    return {"sdpa per document": each, "sdpa padded": padded}


def _flex(work: Work, mask: Mask | None, device: torch.device, gqa: bool) -> dict[str, Provider]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = work.tokens
    document = torch.repeat_interleave(torch.arange(len(work.lengths)), torch.tensor(work.lengths), output_size=n).to(
        device
    )
    slopes = work.slopes().to(device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ok = document[i] == document[j]
        if work.causal:
            ok = ok & (j <= i)
        return ok & (j >= i - work.window) if work.window is not None else ok

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j).abs()

    block = None if mask is None else create_block_mask(seen, None, None, n, n, device=str(device))
    compiled = torch.compile(flex_attention, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out = compiled(q, k, v, score_mod=alibi if work.alibi else None, block_mask=block, enable_gqa=gqa)
        return out.transpose(1, 2)

    return {"flex compiled": run}


def _installed(work: Work, device: torch.device) -> dict[str, Provider]:
    """Other attention libraries, where they are installed and the work is one they can do (they need a GPU)."""
    found: dict[str, Provider] = {}
    if device.type != "cuda" or work.alibi or work.shape.heads != work.shape.kv_heads:
        return found
    plain = len(work.lengths) == 1 and work.window is None
    if find_spec("flash_attn") is not None and plain:
        from flash_attn import flash_attn_func

        found["flash_attn"] = lambda q, k, v: flash_attn_func(q, k, v, causal=work.causal)
    if find_spec("xformers") is not None and plain:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        bias = LowerTriangularMask() if work.causal else None
        found["xformers"] = lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias)
    return found


def measure(work: Work, dtype: str, backward: bool, device: torch.device, rounds: int, flex: bool) -> list[Row]:
    """One row per provider: checked against the reference, then timed in turns, median over the rounds."""
    generator = torch.Generator().manual_seed(1)
    shape = work.shape

    def random(heads: int) -> Tensor:
        x = torch.randn((1, work.tokens, heads, shape.dim), generator=generator)
        return x.to(device, DTYPES[dtype]).requires_grad_(backward)

    q, k, v = random(shape.heads), random(shape.kv_heads), random(shape.kv_heads)
    mask = work.mask()
    ranges = None if mask is None else mask.lower(1, work.tokens, work.tokens, device)
    area = work.tokens**2 if ranges is None else int((ranges.hi - ranges.lo).sum())
    flops = 4 * area * shape.heads * shape.dim * (3.5 if backward else 1)
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    exact = _sampled_reference(work, q, k, v)
    for name, provider in providers(work, device, flex).items():
        row = rows[name] = Row(work.name, name, dtype, backward)

        def run(provider: Provider = provider) -> Tensor:
            out = provider(q, k, v)
            if backward:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            return out

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = run()
        except Exception as error:
            row.note = f"cannot: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
            continue
        difference = _sampled_error(out, exact)
        if not difference < 0.02:
            row.note = f"WRONG: differs from the reference by {difference:.2g}"
            continue
        row.peak_mib = peak_memory(run) / 2**20
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, measured in runs.items():
            times[name].append(_timed(measured, device))
    for name, seen in times.items():
        rows[name].milliseconds = statistics.median(seen) * 1e3
        rows[name].gflops = flops / statistics.median(seen) / 1e9
    ours = [row.milliseconds for row in rows.values() if row.provider.startswith("saccade") and row.milliseconds]
    for row in rows.values():
        if ours and row.milliseconds is not None:
            row.ratio = row.milliseconds / min(ours)
    return list(rows.values())


def _sampled_reference(work: Work, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, out) of the reference in fp64 for rows spread over the work: the whole would need the whole matrix."""
    rows = torch.linspace(0, work.tokens - 1, min(64, work.tokens)).long().unique().to(q.device)
    q, k, v = (x.detach().double() for x in (q[:, rows], k, v))
    mask = work.mask()
    ranges = None if mask is None else mask.lower(1, work.tokens, work.tokens, q.device)
    chosen = None
    if ranges is not None:
        chosen = saccade.KeyRanges(ranges.lo[..., rows], ranges.hi[..., rows], ranges.diagonal[..., rows])
    bias = saccade.Alibi(work.slopes().double().to(q.device)) if work.alibi else None
    return rows, saccade.attention(q, k, v, mask=chosen, bias=bias, backend="reference")


def _sampled_error(out: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    rows, want = exact
    return float((out.detach()[:, rows].double() - want).abs().max())


def _timed(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@dataclass
class Bench:
    """Time and peak memory of attention, beside what a user would pick instead."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Sequence lengths, in tokens."""
    shape: str = "small"
    """Heads and head dim, by the name of a model."""
    dtype: tuple[str, ...] = ("fp32",)
    """fp32, bf16, fp16."""
    backward: tuple[bool, ...] = (False, True)
    """Forward only, forward and backward, or both."""
    rounds: int = 5
    """Times that every provider is timed, in turns; the median counts."""
    flex: bool = False
    """Include compiled flex_attention, which takes a C++ compiler and some 10 s a work."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path = field(default_factory=lambda: Path("runs/bench-attention"))
    """Folder for results.json, results.md and results.png."""


def main(options: Bench) -> list[Row]:
    """Run the benchmark, print the table as it grows, and write the JSON, the table and the plot."""
    if options.shape not in SHAPES:
        raise ValueError(f"shape: got {options.shape!r}, want one of {', '.join(SHAPES)}")
    for name in options.dtype:
        if name not in DTYPES:
            raise ValueError(f"dtype: got {name!r}, want one of {', '.join(DTYPES)}")
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    print(HEADER)
    for work in works(options.lengths, SHAPES[options.shape]):
        for dtype in options.dtype:
            for backward in options.backward:
                new = measure(work, dtype, backward, device, options.rounds, options.flex)
                rows += new
                print("\n".join(map(line, new)), flush=True)
                _write(
                    options.out / "results.json", json.dumps({"machine": machine(), "rows": list(map(asdict, rows))})
                )
    _write(options.out / "results.md", "\n".join([HEADER, *map(line, rows)]) + "\n")
    plot(rows, options.out / "results.png")
    print(f"\nwritten: {options.out}")
    return rows


HEADER = (
    "| work | dtype | pass | provider | ms | GFLOP/s | peak MiB | time ÷ Saccade's |\n|---|---|---|---|--:|--:|--:|--:|"
)


def line(row: Row) -> str:
    """A row of the table."""
    what = "fwd+bwd" if row.backward else "fwd"
    if row.milliseconds is None or row.gflops is None or row.ratio is None:
        return f"| {row.work} | {row.dtype} | {what} | {row.provider} | {row.note} | | | |"
    numbers = f"{row.milliseconds:.1f} | {row.gflops:.0f} | {row.peak_mib:.1f} | {row.ratio:.2f}"
    return f"| {row.work} | {row.dtype} | {what} | {row.provider} | {numbers} |"


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "saccade": saccade.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def plot(rows: list[Row], path: Path) -> None:
    """Two panels: time and peak memory of forward and backward against length, causal."""
    from matplotlib.figure import Figure

    chosen = [r for r in rows if r.work.startswith("causal") and r.milliseconds is not None]
    chosen = [r for r in chosen if r.backward] or chosen
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for provider in dict.fromkeys(r.provider for r in chosen):
        mine = [r for r in chosen if r.provider == provider and r.dtype == chosen[0].dtype]
        x = [int(r.work.split()[1]) for r in mine]
        for axes, y in zip(panels, ([r.milliseconds for r in mine], [r.peak_mib for r in mine]), strict=True):
            axes.plot(x, y, marker="o", markersize=4, label=provider)
    for axes, title in zip(panels, ("time, ms", "peak extra memory, MiB"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        lengths = sorted({int(r.work.split()[1]) for r in chosen})
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    what = "forward + backward" if chosen and chosen[0].backward else "forward"
    figure.suptitle(f"causal attention, {what}, {chosen[0].dtype if chosen else ''}")
    figure.savefig(path, dpi=130)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
