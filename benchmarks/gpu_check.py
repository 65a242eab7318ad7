"""One command for a machine with a GPU: is the Triton backend right there, and how fast is it beside its peers.

    PYTHONPATH=src python benchmarks/gpu_check.py --out $OUT

Needs torch and triton of the machine and nothing else. Runs, in this order and as far as the budget goes: the cases of
the tests against the fp64 reference on the CPU, each twice for bitwise equality (in parallel processes, for most of the
time goes into compilation); the ceilings of the machine; forward and backward beside SDPA and compiled FlexAttention;
decoding, also with a cache of 8 bits; forward with inputs of 8 bits; the overhead of a call; one long sequence. Results
are written as they come: check.jsonl, bench.json, bench.md; at the end bench.png.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]
START = time.time()

import saccade  # noqa: E402
from saccade.backends import load  # noqa: E402
from saccade.core.problem import make_problem  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------- right


def moved(problem: Any, device: str) -> Any:
    """The problem on another device."""
    fields = {k: x.to(device) for k, x in problem._asdict().items() if isinstance(x, torch.Tensor)}
    return problem._replace(**fields, biases=[x.to(device) for x in problem.biases])


def check_case(name: str, dtype_name: str, descriptors: bool) -> dict[str, Any]:
    """One case of the tests on the GPU: errors as shares of what is allowed, and whether a second run is the same."""
    from cases import CASES
    from saccade.backends.triton import launch
    from saccade.core.library import attend
    from saccade.testing import results, tolerances, worst

    if not descriptors:
        launch._descriptors_allowed = lambda x: False
    dtype = getattr(torch, dtype_name)
    case = next(c for c in CASES if c.name == name)
    problem = case.problem(dtype)

    def on_gpu(p: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x.cpu() for x in attend(moved(p, "cuda"), "triton"))

    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, dtype, want)
    first = results(on_gpu, problem, dtype)
    shares = {n: worst(first[n], want[n]) / a if a else float(worst(first[n], want[n]) > 0) for n, a in allowed.items()}
    same = True
    for _ in range(3):
        again = results(on_gpu, problem, dtype)
        same &= all(torch.equal(first[n].nan_to_num(7), again[n].nan_to_num(7)) for n in first)
    return {"worst": max(shares, key=shares.__getitem__), "share": max(shares.values()), "same": same}


def check_large(name: str) -> dict[str, Any]:
    """Real tile sizes and head dimensions against fp32 on the GPU, where only dense formulas are at hand."""
    from saccade.testing import worst

    torch.manual_seed(0)
    sizes = {"D64": (64, 64), "D128": (128, 128), "D256": (256, 256), "K128 V64": (128, 64), "D96": (96, 96)}
    which, kind = name.split(", ")
    K, V = sizes[which]
    masks = {
        "full": None,
        "causal": saccade.Causal(),
        "packed": saccade.Documents([300, 5, 700, 19, 1024]) & saccade.Causal(),
        "window": saccade.Causal() & saccade.Window(300, 0) & saccade.Sinks(4),
        "alibi": saccade.Causal(),
        "table": saccade.Causal(),
        "bias": saccade.Causal(),
    }
    M, G, H = 2048, 2, 2
    q, k, v = (torch.randn(1, M, h, d, device="cuda", dtype=torch.bfloat16) for h, d in ((G * H, K), (G, K), (G, V)))
    extra = {"alibi": torch.rand(4, device="cuda") * 0.1, "table": torch.randn(4, 129, device="cuda"),
             "bias": torch.randn(4, M, M, device="cuda")}.get(kind)  # fmt: skip
    go = torch.randn(1, M, G * H, V, device="cuda", dtype=torch.bfloat16)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        x = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        e = None if extra is None else extra.clone().requires_grad_()
        bias = {"alibi": saccade.Alibi, "table": saccade.RelativeBias}[kind](e) if kind in ("alibi", "table") else e
        out = saccade.attention(*x, mask=masks[kind], bias=bias, backend=backend)
        inputs = x if e is None else [*x, e]
        return [t.detach().float() for t in (out, *torch.autograd.grad(out, inputs, go.to(dtype)))]

    want, got = run("reference", torch.float32), run("triton", torch.bfloat16)
    same = True
    for _ in range(5):
        same &= all(torch.equal(a, b) for a, b in zip(got, run("triton", torch.bfloat16), strict=True))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    if not all(math.isfinite(worst(a, b)) for a, b in zip(got, want, strict=True)):
        errors.append(math.inf)
    return {"worst": str([f"{e:.1e}" for e in errors]), "share": max(errors) / 1e-2, "same": same}


STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SLOT = 2048


def check_stored(name: str) -> dict[str, Any]:
    """Keys and values of 8 bits at real tile sizes, forward, against fp32 over the same numbers."""
    torch.manual_seed(0)
    size, query, kept, kind = name.split(", ")
    D, dtype, G, H = int(size[1:]), STORED[kept], 2, 4
    few = kind in ("decode", "paged")
    lengths = torch.tensor([1500, 3, 777, SLOT], device="cuda", dtype=torch.int32)
    ones = torch.ones_like(lengths)
    M, N = (len(lengths), len(lengths) * SLOT) if few else (SLOT, SLOT)
    masks: dict[str, Callable[[], Any]] = {
        "full": lambda: None,
        "causal": saccade.Causal,
        "decode": lambda: saccade.PaddedKeys(ones, lengths, SLOT) & saccade.Causal("bottom_right"),
        "paged": lambda: (
            saccade.PagedKeys(ones, lengths, torch.randperm(N // 64, device="cuda").int().view(M, -1), 64)
            & saccade.Causal("bottom_right")
        ),
    }
    run = {"decode": SLOT, "paged": 64}.get(kind)
    q, k, v = (torch.randn(1, n, h, D, device="cuda") for n, h in ((M, G * H), (N, G), (N, G)))
    mask = masks[kind]()
    scales = {}
    k, scales["key_scale"] = saccade.quantize(k, dtype, run)
    v, scales["value_scale"] = saccade.quantize(v, dtype, run)
    if query == "fp8":
        q, scales["query_scale"] = saccade.quantize(q, dtype, 1)
    else:
        q = q.to(getattr(torch, query))

    def attend(query: torch.Tensor, backend: str) -> torch.Tensor:
        return saccade.attention(query, k, v, mask=mask, backend=backend, output_dtype=torch.float32, **scales)

    want, got = attend(q if query == "fp8" else q.float(), "reference"), attend(q, "triton")
    same = all(torch.equal(got, attend(q, "triton")) for _ in range(5))
    error = float((got - want).norm() / want.norm()) if bool(torch.isfinite(got).all()) else math.inf
    return {"worst": f"{error:.1e}", "share": error / 1e-2, "same": same}


def guarded(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    began = time.time()
    try:
        found = function(*args)
    except Exception as error:  # a failing case is a result, and the others go on
        found = {"error": f"{type(error).__name__}: {error}"[-600:], "trace": traceback.format_exc()[-1500:]}
    return {"name": " · ".join(map(str, args)), "seconds": round(time.time() - began, 1), **found}


def check_jobs(every: int) -> list[tuple[Any, ...]]:
    """The checks at real sizes and every n-th of the small ones, as a function and its arguments."""
    from cases import CASES

    kinds = ("full", "causal", "packed", "window", "alibi", "table", "bias")
    large: list[tuple[Any, ...]] = [(check_large, f"{d}, {k}") for k in kinds for d in ("D128", "D64", "D256")]
    large += [(check_large, f"{d}, causal") for d in ("K128 V64", "D96")]
    few = ("decode", "paged")
    for query, kept, which in (
        ("bfloat16", "int8", (*few, "causal")),
        ("bfloat16", "fp8", (*few, "causal")),
        ("fp8", "fp8", ("causal", "full", "paged")),
    ):
        large += [(check_stored, f"{d}, {query}, {kept}, {k}") for k in which for d in ("D128", "D64", "D256")]
    large += [(check_stored, f"D128, float16, {kept}, {k}") for kept in STORED for k in few]
    jobs: list[tuple[Any, ...]] = [(check_case, case.name, "bfloat16", True) for case in CASES]
    jobs += [(check_case, case.name, "float32", True) for case in CASES[::2]]
    jobs += [(check_case, case.name, "float16", False) for case in CASES[1::4]]
    return large + jobs[::every]


def check_all(out: Path, futures: list[Future[dict[str, Any]]], seconds: float) -> bool:
    """Wait for the checks and tell what failed."""
    bad = []
    done = 0
    with (out / "check.jsonl").open("w") as log:
        try:
            for future in as_completed(futures, timeout=seconds):
                found = future.result()
                done += 1
                log.write(json.dumps(found) + "\n")
                log.flush()
                if "error" in found or not found["share"] <= 1 or not found["same"]:
                    bad.append(found)
                    print("BAD", {k: v for k, v in found.items() if k != "trace"}, flush=True)
        except TimeoutError:
            pass
    print(f"checks: {done - len(bad)} good, {len(bad)} bad, {len(futures) - done} not reached", flush=True)
    return not bad


# ----------------------------------------------------------------------------------------------------------------- fast

FLUSH: list[torch.Tensor] = []


def flush() -> None:
    """Put something else into the L2 cache."""
    if not FLUSH:
        FLUSH.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    FLUSH[0].zero_()


def as_graph(function: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of a CUDA graph of one call; the call itself where it cannot be captured."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except Exception:
        torch.cuda.synchronize()
        return function
    return graph.replay


def times(call: Callable[[], Any], milliseconds: float, most: int = 40) -> list[float]:
    """Milliseconds of single calls, the L2 cache flushed before each."""

    def events() -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    a, b = events()
    a.record()
    call()
    b.record()
    torch.cuda.synchronize()
    n = max(3, min(most, int(milliseconds / max(a.elapsed_time(b), 1e-3))))
    pairs = []
    for _ in range(n):
        flush()
        a, b = events()
        a.record()
        call()
        b.record()
        pairs.append((a, b))
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairs]


Work = dict[str, Any]


def works(quick: bool) -> list[Work]:
    """What is timed, the most telling first. `B`, `H` (query heads), `G` (key heads), `N`, `D`, `kind`."""

    def of(D: int, N: int, kind: str, H: int | None = None, G: int | None = None, tokens: int = 16384) -> Work:
        H = H or 2048 // D
        return {"B": max(1, tokens // N), "H": H, "G": G or H, "N": N, "D": D, "kind": kind}

    found = [of(128, 8192, "causal"), of(128, 8192, "full"), of(64, 8192, "causal"), of(256, 8192, "causal")]
    found += [of(128, 16384, k) for k in ("packed", "window", "alibi", "table")] + [of(64, 16384, "table")]
    found += [of(128, 8192, "causal", 32, 8), of(64, 8192, "full"), of(256, 8192, "full")]
    if not quick:
        found += [of(128, n, k) for n in (1024, 2048, 4096, 16384, 32768) for k in ("full", "causal")]
        found += [of(64, n, k) for n in (1024, 16384) for k in ("full", "causal")]
        found += [of(64, 16384, k) for k in ("packed", "window", "alibi")]
    return found


DOCUMENTS = [4096, 512, 2048, 1024, 128, 3072, 256, 1536, 64, 768, 2048, 832]  # 16384 tokens


def label(w: Work) -> str:
    return f"D{w['D']} B{w['B']} H{w['H']}/{w['G']} N{w['N']} {w['kind']}"


def visible(w: Work) -> float:
    """Visible pairs of one head of one batch entry."""
    n = w["N"]
    if w["kind"] in ("full",):
        return n * n
    if w["kind"] == "packed":
        return sum(m * (m + 1) / 2 for m in DOCUMENTS)
    if w["kind"] == "window":
        return sum(min(i + 1, 1024) for i in range(n))
    return n * (n + 1) / 2


def ours(w: Work, bias_grad: bool) -> Callable[..., Any]:
    masks = {
        "full": None,
        "packed": saccade.Documents(DOCUMENTS) & saccade.Causal(),
        "window": saccade.Causal() & saccade.Window(1023, 0),
    }
    mask = masks.get(w["kind"], saccade.Causal())
    # Lowered once a step, outside of the layers; so is flex's block mask.
    ranges = None if mask is None else mask.lower(w["B"], w["N"], w["N"], "cuda")

    def call(q: Any, k: Any, v: Any, extra: Any) -> Any:
        bias = None
        if w["kind"] == "alibi":
            bias = saccade.Alibi(extra)
        if w["kind"] == "table":
            bias = saccade.RelativeBias(extra)
        out = saccade.attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=ranges, bias=bias, backend="triton")
        return out.transpose(1, 2)

    return call


def sdpa(backend: Any) -> Callable[..., Any]:
    from torch.nn.attention import sdpa_kernel

    def make(w: Work, bias_grad: bool) -> Callable[..., Any] | None:
        if not sdpa_can(w):
            return None

        def call(q: Any, k: Any, v: Any, extra: Any) -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=w["kind"] == "causal",
                                                      enable_gqa=w["H"] != w["G"])  # fmt: skip

        return call

    return make


def sdpa_can(w: Work) -> bool:
    return w["kind"] in ("full", "causal")


FLEX_TABLE = {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 16, "bwd_num_stages": 1,
              "bwd_num_warps": 4, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}  # fmt: skip
"""The fastest of three that were tried on an H100, forward and backward."""


def flex(w: Work, bias_grad: bool) -> Callable[..., Any] | None:
    if sdpa_can(w):  # faster peers are at hand, and compiling takes long
        return None
    # Backward is called more than once.
    torch._functorch.config.donated_buffer = False
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    document = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).cuda()
    visibility = {
        "full": None,
        "packed": lambda b, h, i, j: (document[i] == document[j]) & (i >= j),
        "window": lambda b, h, i, j: (i >= j) & (i - j < 1024),
    }.get(w["kind"], lambda b, h, i, j: i >= j)
    blocks = None if visibility is None else create_block_mask(visibility, None, None, w["N"], w["N"], device="cuda")

    def call(q: Any, k: Any, v: Any, extra: Any) -> Any:
        score = None
        if w["kind"] == "alibi":
            score = lambda s, b, h, i, j: s - extra[h] * (i - j)  # noqa: E731
        if w["kind"] == "table":
            score = lambda s, b, h, i, j: s + extra[h, torch.clamp(j - i, -128, 128) + 128]  # noqa: E731
        # By itself it asks for more shared memory than there is where a table takes a gradient.
        options = FLEX_TABLE if w["kind"] == "table" else None
        return compiled(
            q, k, v, score_mod=score, block_mask=blocks, enable_gqa=w["H"] != w["G"], kernel_options=options
        )

    return call


def providers() -> dict[str, Callable[..., Any]]:
    from torch.nn.attention import SDPBackend

    return {
        "saccade": ours,
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "flex": flex,
    }


class Board:
    """Rows of results, written after each."""

    def __init__(self, out: Path):
        self.out, self.rows, self.head = out, list[dict[str, Any]](), dict[str, Any]()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        line = row.pop("line")
        print(line, flush=True)
        if "direction" not in row and "decode" not in row:
            row["text"] = line
        (self.out / "bench.json").write_text(json.dumps({**self.head, "rows": self.rows}, indent=1))
        (self.out / "bench.md").write_text(self.table())

    def table(self) -> str:
        """What was timed, as the documentation shows it."""
        ceiling = self.head.get("matmul_tflops", math.nan)
        lines = [", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.head.items()), "",
                 "| work | pass | Saccade TFLOP/s | of GEMM | peers' TFLOP/s | best peer's time ÷ Saccade's | peak MiB |",
                 "|---|---|--:|--:|---|--:|--:|"]  # fmt: skip
        for row in self.rows:
            if "tflops" in row and "direction" in row:
                rates = dict(row["tflops"])
                own = rates.pop("saccade", math.nan)
                peers = ", ".join(f"{n} {r:.0f}" for n, r in rates.items()) or "–"
                ratio = f"{row['ratio']:.2f} ({row['best_peer']})" if row["ratio"] else "–"
                peak = f"{row['peak_mib']['saccade']:.0f}" if "saccade" in row["peak_mib"] else "–"
                lines.append(f"| {label(row)} | {row['direction']} | {own:.0f} | {own / ceiling:.0%} | {peers} | {ratio} "
                             f"| {peak} |")  # fmt: skip
        lines += ["", "| decoding | TB/s of keys and values, read once | µs |", "|---|---|---|"]
        for row in self.rows:
            if row.get("decode"):
                name = f"B{row['B']} N{row['N']} H{row['H']}/{row['G']} D{row['D']} "
                name += f"pages of {row['page']}" if row["page"] else "contiguous"
                rates = ", ".join(f"{n} {r:.2f}" for n, r in row["tb_per_s"].items())
                spent = ", ".join(f"{n} {ms * 1e3:.0f}" for n, ms in row["ms"].items())
                lines.append(f"| {name} | {rates} | {spent} |")
        lines += ["", *(row["text"] for row in self.rows if "text" in row)]
        return "\n".join(lines) + "\n"

    def plot(self) -> None:
        """TFLOP/s of every work and provider, forward and backward, as bars."""
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            return
        timed = [row for row in self.rows if "direction" in row]
        labels = list(dict.fromkeys(label(row) for row in timed))
        names = [n for n in ("saccade", "cudnn", "flash", "efficient", "flex") if any(n in r["tflops"] for r in timed)]
        if not labels:
            return
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.55 * len(labels)), sharex=True, sharey=True)
        height = 0.8 / len(names)
        for direction, axis in zip(("forward", "backward"), axes, strict=True):
            for n, name in enumerate(names):
                at, rates = [], []
                for row in timed:
                    if row["direction"] == direction and name in row["tflops"]:
                        # Those that have a rate stand together.
                        before = sum(x in row["tflops"] for x in names[:n])
                        at.append(labels.index(label(row)) + (before + 0.5) * height - 0.4)
                        rates.append(row["tflops"][name])
                axis.barh(at, rates, height=height, label=name)
            axis.axvline(self.head.get("matmul_tflops", 0), color="grey", linestyle="--", linewidth=1)
            axis.set_title(f"{direction}, bf16")
            axis.set_xlabel("TFLOP/s over the visible area (dashed: a large matrix product)")
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].invert_yaxis()
        axes[1].legend(loc="lower right")
        figure.suptitle(f"{self.head['device']}, torch {self.head['torch']}, triton {self.head['triton']}")
        figure.tight_layout()
        figure.savefig(self.out / "bench.png", dpi=100)
        pyplot.close(figure)


def bench(board: Board, w: Work, chosen: dict[str, Callable[..., Any]], left: Callable[[], float]) -> None:
    B, H, G, N, D = (w[n] for n in "BHGND")
    torch.manual_seed(0)

    def make(heads: int) -> torch.Tensor:
        # Each as its library stores it would differ; [B, N, H, D] in memory is what a model has.
        x = torch.randn(B, N, heads, D, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).detach().requires_grad_()

    q, k, v = make(H), make(G), make(G)
    shape = {"alibi": (H,), "table": (H, 257)}.get(w["kind"])
    extra = None if shape is None else torch.rand(shape, device="cuda").requires_grad_(w["kind"] == "table")
    go = torch.randn(B, N, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    inputs = [q, k, v] + ([extra] if w["kind"] == "table" else [])
    forward, backward, results, memory = {}, {}, {}, {}
    for name, provider in chosen.items():
        if left() < 14:
            return
        try:
            function = provider(w, w["kind"] == "table")
            if function is None:
                continue

            def no_grad(f: Any = function) -> Any:
                with torch.no_grad():
                    return f(q, k, v, extra)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            # Made on a side stream, as what is captured later must be.
            out = function(q, k, v, extra)
            grads = torch.autograd.grad(out, inputs, go, retain_graph=True)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            results[name] = [x.detach() for x in (out, *grads)]
            forward[name] = as_graph(no_grad)
            backward[name] = partial(torch.autograd.grad, out, inputs, go, retain_graph=True)
            del grads
        except Exception as error:
            print("skip", name, label(w), f"{type(error).__name__}: {error}"[:200].replace("\n", " "), flush=True)
    against = next((n for n in ("flex", "cudnn", "flash") if n in results), None)
    for direction, calls in (("forward", forward), ("backward", backward)):
        found: dict[str, list[float]] = {n: [] for n in calls}
        for _ in range(2):
            for n, call in calls.items():
                if left() > 6:
                    found[n] += times(call, 60)
        area = visible(w) * B * H
        flops = area * D * (4 if direction == "forward" else 10)
        medians = {n: statistics.median(x) for n, x in found.items() if x}
        if "saccade" not in medians:
            continue
        peers = {n: m for n, m in medians.items() if n != "saccade"}
        best = min(peers, key=peers.__getitem__) if peers else None
        rates = {n: flops / m / 1e9 for n, m in medians.items()}
        off = None
        if against and "saccade" in results:
            pick = slice(0, 1) if direction == "forward" else slice(1, None)
            off = max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))
                      for a, b in zip(results["saccade"][pick], results[against][pick], strict=True))  # fmt: skip
        ratio = medians[best] / medians["saccade"] if best else None
        line = f"{label(w):34s} {direction:8s} " + "  ".join(f"{n} {r:.0f}" for n, r in rates.items())
        line += f"  | x{ratio:.2f} of {best}" if best else ""
        board.add({**w, "direction": direction, "ms": medians, "tflops": rates, "ratio": ratio, "best_peer": best,
                   "difference": off, "peak_mib": memory, "line": line + (f"  diff {off:.1e}" if off is not None else "")})  # fmt: skip
    del forward, backward, results


def decode(board: Board, B: int, N: int, H: int, G: int, D: int, page: int | None, left: Callable[[], float]) -> None:
    """One token per sequence; lengths on the device; time with caches that rotate, so that L2 holds none of it."""
    from torch.nn.attention import SDPBackend

    copies = max(2, math.ceil(2**30 / (4 * B * N * G * D)))
    caches = [[torch.randn(1, B * N, G, D, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(copies)]
    q = torch.randn(1, B, H, D, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((B,), N, device="cuda", dtype=torch.int32)
    ones = torch.ones(B, device="cuda", dtype=torch.int32)
    if page:
        table = torch.randperm(B * N // page, device="cuda").int().view(B, -1)
        mask = saccade.PagedKeys(ones, lengths, table, page) & saccade.Causal("bottom_right")
        ranges = mask.lower(1, B, B * N, "cuda")
    else:
        mask = saccade.PaddedKeys(ones, lengths, N) & saccade.Causal("bottom_right")
        ranges = mask.lower(1, B, B * N, "cuda")
    calls: dict[str, Callable[..., Any]] = {
        "saccade": lambda k, v: saccade.attention(q, k, v, mask=ranges, backend="triton").view(B, H, D)
    }
    if not page:
        qt = q.view(B, 1, H, D).transpose(1, 2)
        ranges_b = (saccade.KeyLengths(lengths) & saccade.Causal("bottom_right")).lower(B, 1, N, "cuda")
        calls["saccade batch"] = lambda k, v: saccade.attention(
            q.view(B, 1, H, D), k.view(B, N, G, D), v.view(B, N, G, D), mask=ranges_b, backend="triton").view(B, H, D)  # fmt: skip
        for name, kind in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

            def peer(k: Any, v: Any, kind: Any = kind) -> Any:
                from torch.nn.attention import sdpa_kernel

                with sdpa_kernel(kind):
                    kv = (x.view(B, N, G, D).transpose(1, 2) for x in (k, v))
                    return F.scaled_dot_product_attention(qt, *kv, enable_gqa=H != G).view(B, H, D)

            calls[name] = peer
    if not page and left() > 150:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        calls["flex"] = lambda k, v: compiled(
            qt, *(x.view(B, N, G, D).transpose(1, 2) for x in (k, v)), enable_gqa=H != G).view(B, H, D)  # fmt: skip
    # The same numbers in 8 bits, with a scale for each sequence and head, or for each page and head.
    run = page or N
    stored = {
        f"saccade {name}": [[saccade.quantize(x, kind, run) for x in cache] for cache in caches]
        for name, kind in STORED.items()
    }
    for name in stored:
        calls[name] = lambda k, v: saccade.attention(
            q, k[0], v[0], mask=ranges, key_scale=k[1], value_scale=v[1], backend="triton").view(B, H, D)  # fmt: skip
    graphs: dict[str, list[Callable[[], Any]]] = {}
    outs: dict[str, torch.Tensor] = {}
    for name, call in calls.items():
        if left() < 8:
            return
        try:
            with torch.no_grad():
                own = stored.get(name, caches)
                outs[name] = call(*own[0]).float()
                graphs[name] = [as_graph(partial(call, *cache)) for cache in own]
        except Exception as error:
            print("skip", name, "decode", f"{type(error).__name__}: {error}"[:200].replace("\n", " "), flush=True)
    found: dict[str, list[float]] = {n: [] for n in graphs}
    with torch.no_grad():
        for _ in range(3):
            for n, replays in graphs.items():
                for replay in replays[:8]:
                    found[n] += times(replay, 3, 5)
    of_cache = {n: sum(y.numel() * y.element_size() for x in own[0] for y in x) for n, own in stored.items()}
    state = 4 * B * N * G * D
    ms = {n: statistics.median(x) for n, x in found.items() if x}
    rates = {n: of_cache.get(n, state) / m / 1e9 for n, m in ms.items()}
    peers = {n: m for n, m in ms.items() if not n.startswith("saccade")}
    against_bf16 = {n: [round(ms["saccade"] / ms[n], 3), float((outs[n] - outs["saccade"]).norm() / outs["saccade"].norm())]
                    for n in stored if n in ms and "saccade" in ms}  # fmt: skip
    best = min(peers, key=peers.__getitem__) if peers else None
    ratio = peers[best] / ms["saccade"] if best else None
    against = next((n for n in outs if n != "saccade" and n not in stored), None)
    off = float((outs["saccade"] - outs[against]).norm() / outs[against].norm()) if against else None
    line = f"decode B{B} N{N} H{H}/{G} D{D} {'pages of ' + str(page) if page else 'contiguous'}: "
    line += "  ".join(f"{n} {r:.2f} TB/s ({ms[n] * 1e3:.0f} µs)" for n, r in rates.items())
    board.add({"decode": True, "B": B, "N": N, "H": H, "G": G, "D": D, "page": page, "ms": ms, "tb_per_s": rates,
               "ratio": ratio, "best_peer": best, "difference": off, "of_bf16_speed_and_difference": against_bf16,
               "line": f"{line}  ratio {ratio} diff {off}; of bf16's speed, and difference: {against_bf16}"})  # fmt: skip


def forward_stored(board: Board, D: int, kind: str) -> None:
    """Forward with inputs in fp8, and with keys and values in 8 bits, beside bf16."""
    w = {"B": 2, "H": 2048 // D, "G": 2048 // D, "N": 8192, "D": D, "kind": kind}
    x = [torch.randn(w["B"], w["N"], w["H"], D, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    ranges = saccade.Causal().lower(w["B"], w["N"], w["N"], "cuda") if kind == "causal" else None
    names = ("query_scale", "key_scale", "value_scale")

    def call(dtype: torch.dtype | None, first: int) -> Callable[[], torch.Tensor]:
        """Attention with inputs from `first` on stored as `dtype`."""
        stored = [saccade.quantize(t, dtype) for t in x[first:]] if dtype else []
        scales = {name: scale for name, (_, scale) in zip(names[first:], stored, strict=False)}
        inputs = [*x[:first], *(t for t, _ in stored)] if dtype else x
        return lambda: saccade.attention(*inputs, mask=ranges, backend="triton", output_dtype=torch.bfloat16, **scales)

    calls = {"bf16": call(None, 0), "fp8": call(torch.float8_e4m3fn, 0), "fp8 keys": call(torch.float8_e4m3fn, 1),
             "int8 keys": call(torch.int8, 1)}  # fmt: skip
    outs = {n: f().float() for n, f in calls.items()}
    graphs = {n: as_graph(f) for n, f in calls.items()}
    found: dict[str, list[float]] = {n: [] for n in graphs}
    for _ in range(2):
        for n, replay in graphs.items():
            found[n] += times(replay, 60)
    flops = visible(w) * w["B"] * w["H"] * D * 4
    rates = {n: flops / statistics.median(t) / 1e9 for n, t in found.items()}
    off = {n: float((y - outs["bf16"]).norm() / outs["bf16"].norm()) for n, y in outs.items()}
    line = f"{label(w)} forward, TFLOP/s (difference from bf16): "
    line += ", ".join(f"{n} {r:.0f} ({off[n]:.1e})" for n, r in rates.items())
    board.add({**w, "stored_forward": True, "tflops": rates, "difference": off, "line": line})


def overhead(board: Board) -> None:
    """Microseconds the host spends on a call that the device is done with at once."""
    q = torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    ranges = saccade.Causal().lower(1, 128, 128, "cuda")
    found = {}
    problem = make_problem(q, q, q, mask=ranges)[0]
    for name, f in {
        "saccade, launch alone": lambda: load("triton").forward(problem),
        "saccade": lambda: saccade.attention(q, q, q, mask=ranges, backend="triton"),
        "saccade, no mask": lambda: saccade.attention(q, q, q, backend="triton"),
        "sdpa": lambda: F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True),
    }.items():
        with torch.no_grad():
            for _ in range(50):
                f()
            spans = []
            for _ in range(20):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(20):
                    f()
                spans.append((time.perf_counter() - began) / 20 * 1e6)
        found[name] = statistics.median(spans)
    board.add({"overhead_us": found, "line": f"host µs per call: { {n: round(x, 1) for n, x in found.items()} }"})


def long(board: Board, N: int) -> float:
    """One sequence, forward and backward: time and peak memory. The second turn counts; returns forward's rate."""
    q, k, v = (torch.randn(1, N, 1, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ranges = saccade.Causal().lower(1, N, N, "cuda")
    go = torch.randn_like(q)
    before = torch.cuda.memory_allocated()
    turns = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.time()
        out = saccade.attention(q, k, v, mask=ranges, backend="triton")
        torch.cuda.synchronize()
        middle = time.time()
        grads = torch.autograd.grad(out, (q, k, v), go)
        torch.cuda.synchronize()
        turns.append([middle - began, time.time() - middle])
        del out, grads
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    forward, backward = turns[-1]
    rate = [2 * N * N * 128 / forward / 1e12, 5 * N * N * 128 / backward / 1e12]
    board.add({"long": N, "seconds": turns[-1], "first": turns[0], "peak_mib": peak, "tflops": rate,
               "line": f"{N} tokens, one head: {forward:.3f} s + {backward:.3f} s, {rate[0]:.0f} and {rate[1]:.0f} "
               f"TFLOP/s, peak {peak:.0f} MiB; the first turn {turns[0][0]:.2f} s + {turns[0][1]:.2f} s"})  # fmt: skip
    return rate[0]


def ceilings(board: Board) -> None:
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / statistics.median(times(as_graph(lambda: x @ y), 200)) / 1e9
    a = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.numel() / statistics.median(times(lambda: b.copy_(a), 200)) / 1e9
    board.head |= {"matmul_tflops": matmul, "copy_tb_per_s": copy}
    print(f"ceilings: matmul {matmul:.0f} TFLOP/s, copy {copy:.2f} TB/s", flush=True)


def warm(w: Work, with_flex: bool) -> dict[str, Any]:
    """Compile what a bench row needs, in a process of its own; torch and Triton keep it on disk."""
    B, H, G, N, D = (w[n] for n in "BHGND")
    q, k, v = (
        torch.randn(B, N, h, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in (H, G, G)
    )
    shape = {"alibi": (H,), "table": (H, 257)}.get(w["kind"])
    extra = None if shape is None else torch.rand(shape, device="cuda").requires_grad_(w["kind"] == "table")
    for provider in (ours, flex) if with_flex else (ours,):
        call = provider(w, True)
        if call is None:
            continue
        with torch.no_grad():
            call(q, k, v, extra)
        out = call(q, k, v, extra)
        torch.autograd.grad(out, [q, k, v] + ([extra] if w["kind"] == "table" else []), torch.randn_like(out))
    torch.cuda.synchronize()
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--budget", type=float, default=520, help="seconds in all")
    parser.add_argument("--check", type=float, default=200, help="seconds for the checks; 0 for none")
    parser.add_argument("--every", type=int, default=1, help="of the checks, every n-th")
    parser.add_argument("--quick", action="store_true", help="the most telling shapes only")
    parser.add_argument("--peers", default="cudnn,flash,efficient,flex")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--only", default="", help="regular expression: the shapes whose label it finds")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return given.budget - (time.time() - START)

    board = Board(given.out)
    import triton

    board.head = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "device": torch.cuda.get_device_name()}  # fmt: skip
    print(board.head, flush=True)
    shapes = [w for w in works(given.quick) if re.search(given.only, label(w))]
    with_flex = "flex" in given.peers.split(",")
    one_head = {"B": 1, "H": 1, "G": 1, "N": 2**14, "D": 128, "kind": "causal"}
    # What is timed later is compiled here beside the checks: for both most of the time is the compilers'.
    pool = ProcessPoolExecutor(given.workers, mp_context=get_context("spawn"))
    warming = [pool.submit(guarded, warm, w, with_flex) for w in [*sorted(shapes, key=sdpa_can), one_head]]
    checking = [pool.submit(guarded, *job) for job in check_jobs(given.every)] if given.check else []
    good = check_all(given.out, checking, min(given.check, left() - 30))
    for future in checking:
        future.cancel()
    for found in (job.result() for job in warming):
        if "error" in found:
            print("BAD", found["name"], found["error"], flush=True)
    for process in list(pool._processes.values()):
        process.terminate()
    print(f"compiled after {time.time() - START:.0f} s", flush=True)
    ceilings(board)
    chosen = {n: p for n, p in providers().items() if n == "saccade" or n in given.peers.split(",")}
    first, rest = shapes[:5], shapes[5:]
    for w in first:
        bench(board, w, chosen, left)
    for page in (None, 64):
        if left() > 14:
            guarded_print(decode, board, 32, 8192, 32, 8, 128, page, left)
    for D in (128, 64):
        for kind in ("causal", "full"):
            if left() > 14:
                guarded_print(forward_stored, board, D, kind)
    if left() > 14:
        guarded_print(overhead, board)
    # A million tokens only where they are a matter of seconds.
    if left() > 14 and (guarded_print(long, board, 2**18) or 0) > 100 and left() > 20:
        guarded_print(long, board, 2**20)
    for w in rest:
        if left() > 14:
            bench(board, w, chosen, left)
    for B, N in ((1, 131072), (128, 2048)):
        if left() > 14:
            guarded_print(decode, board, B, N, 32, 8, 128, None, left)
    board.plot()
    print(f"done after {time.time() - START:.0f} s", flush=True)
    sys.exit(0 if good else 1)


def guarded_print(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception:
        print("BAD", traceback.format_exc()[-800:], flush=True)
        return None


if __name__ == "__main__":
    main()
