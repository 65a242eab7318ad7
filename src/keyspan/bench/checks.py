"""Is the Triton backend right on the GPU at hand: the tests' cases, real sizes, keys of 8 bits.

Each check is a function of names alone, for it runs in a process of its own; it returns the `worst` result, its error
as a `share` of what is allowed, and whether further runs gave the `same` bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import keyspan
from keyspan.bench.decoding import STORED
from keyspan.core.problem import Problem


def moved(problem: Problem, device: str) -> Problem:
    """The problem on another device."""
    fields: dict[str, Any] = {k: x.to(device) for k, x in problem._asdict().items() if isinstance(x, torch.Tensor)}
    return problem._replace(**fields, biases=[x.to(device) for x in problem.biases])


def check_case(name: str, dtype_name: str, descriptors: bool) -> dict[str, Any]:
    """One case of the tests on the GPU: errors as shares of what is allowed, and whether a second run is the same."""
    from keyspan.backends.triton import launch
    from keyspan.dispatch.op import attend
    from keyspan.testing import results, tolerances, worst
    from keyspan.testing.cases import CASES

    if not descriptors:
        launch._descriptors_allowed = lambda x: False
    dtype = getattr(torch, dtype_name)
    case = next(c for c in CASES if c.name == name)
    problem = case.problem(dtype)

    def on_gpu(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(moved(p, "cuda"), "triton")
        return out.cpu(), lse.cpu()

    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, dtype, want)
    first = results(on_gpu, problem, dtype)
    shares = {n: worst(first[n], want[n]) / a if a else float(worst(first[n], want[n]) > 0) for n, a in allowed.items()}
    same = True
    for _ in range(3):
        again = results(on_gpu, problem, dtype)
        same &= all(torch.equal(first[n].nan_to_num(7), again[n].nan_to_num(7)) for n in first)
    return {"worst": max(shares, key=shares.__getitem__), "share": max(shares.values()), "same": same}


def check_hopper(name: str) -> dict[str, Any]:
    """One case of the tests by the Hopper kernels, which are not chosen for a problem as small."""
    from keyspan.backends.triton import hopper

    kept = {}
    for kernel in ("", "backward_", "keys_", "queries_"):
        fits = getattr(hopper, f"{kernel}missing")
        kept[f"{kernel}reason_against"] = getattr(hopper, f"{kernel}reason_against")

        def reason(problem: Problem, *needs: Any, fits: Callable[..., str | None] = fits) -> str | None:
            return fits(problem, *needs) if hopper._runs_on(problem.query.device) else "not a Hopper GPU"

        setattr(hopper, f"{kernel}reason_against", reason)
    try:
        return check_case(name, "bfloat16", True)
    finally:
        for kind, chosen in kept.items():
            setattr(hopper, kind, chosen)


def check_repeats(name: str, runs: int) -> dict[str, Any]:
    """Forward and backward of a large work, as a CUDA graph: whether so many runs give the same bits."""
    from keyspan.bench.clock import as_graph
    from keyspan.bench.providers import make
    from keyspan.bench.works import gpu_work

    dim, kind, *grouped = name.split(", ")
    D = int(dim[1:])
    N = 8192 if kind in ("full", "causal") else 16384  # what documents of `gpu_work` fill
    work = gpu_work(kind, N, D, 4096 // D, 1024 // D) if grouped else gpu_work(kind, N, D)
    x = work.inputs(torch.bfloat16, "cuda")
    leaves = [t.requires_grad_() for t in x if t is not None]
    attend = make("keyspan:triton", work, torch.bfloat16, torch.device("cuda"))
    grad = torch.randn_like(x.query)
    found: list[torch.Tensor] = []

    def run() -> None:
        out = attend(x)
        found[:] = out.detach(), *torch.autograd.grad(out, leaves, grad)

    again = as_graph(run)
    again()
    first = [t.clone() for t in found]
    same = True
    for _ in range(runs - 1):
        for t in found:
            t.fill_(math.nan)
        again()
        same &= all(map(torch.equal, first, found))
    return {"worst": name, "share": 0.0 if all(bool(t.isfinite().all()) for t in first) else math.inf, "same": same}


def check_large(name: str) -> dict[str, Any]:
    """Real tile sizes and head dimensions against fp32 on the GPU, where only dense formulas are at hand."""
    from keyspan.testing import worst

    torch.manual_seed(0)
    sizes = {"D64": (64, 64), "D128": (128, 128), "D256": (256, 256), "K128 V64": (128, 64), "D96": (96, 96)}
    which, kind = name.split(", ")
    K, V = sizes[which]
    masks = {
        "full": None,
        "causal": keyspan.Causal(),
        "packed": keyspan.Documents([300, 5, 700, 19, 1024]) & keyspan.Causal(),
        "window": keyspan.Causal() & keyspan.Window(300, 0) & keyspan.Sinks(4),
        "alibi": keyspan.Causal(),
        "table": keyspan.Causal(),
        "bias": keyspan.Causal(),
    }
    M, G, H = 2048, 2, 5  # enough heads for the Hopper kernel to be chosen
    q, k, v = (torch.randn(1, M, h, d, device="cuda", dtype=torch.bfloat16) for h, d in ((G * H, K), (G, K), (G, V)))
    extra = {"alibi": torch.rand(G * H, device="cuda") * 0.1, "table": torch.randn(G * H, 129, device="cuda"),
             "bias": torch.randn(G * H, M, M, device="cuda")}.get(kind)  # fmt: skip
    go = torch.randn(1, M, G * H, V, device="cuda", dtype=torch.bfloat16)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        x = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        e = None if extra is None else extra.clone().requires_grad_()
        kinds: dict[str, Any] = {"alibi": keyspan.Alibi, "table": keyspan.RelativeBias}
        bias = kinds[kind](e) if kind in kinds else e
        out = keyspan.attention(*x, mask=masks[kind], bias=bias, backend=backend)
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


def check_again(name: str) -> dict[str, Any]:
    """Replayed calls, on other memory and in a CUDA graph."""
    from keyspan.dispatch import replay
    from keyspan.dispatch.cache import CACHE

    torch.manual_seed(0)
    M, N, Hq, Hkv, D = {"decode": (1, 8192, 16, 4, 128), "fp32": (300, 300, 4, 4, 64)}.get(
        name, (1024, 1024, 4, 2, 128)
    )
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    mask: Any = keyspan.Causal("bottom_right")
    if name == "ranges":
        mask = (keyspan.Documents([1000, 24]) & keyspan.Causal()).lower(1, M, N, "cuda")
    slopes, table = torch.rand(Hq, device="cuda"), torch.randn(Hq, 65, device="cuda")
    terms: dict[str, dict[str, Any]] = {
        "alibi": {"bias": keyspan.Alibi(slopes)},
        "table": {"bias": keyspan.RelativeBias(table)},
        "bias": {"bias": torch.randn(Hq, M, N, device="cuda") if name == "bias" else None},
        "lse": {"return_lse": True},
        "sinks": {"sinks": torch.randn(Hq, device="cuda"), "softcap": 5.0, "scale": -0.1},
    }

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        found = keyspan.attention(*tensors, mask=mask, backend="triton", **terms.get(name, {}))
        return list(found) if isinstance(found, tuple) else [found]

    lookup = replay.lookup
    same, share = True, 0.0
    with torch.no_grad():
        for turn in range(6):
            tensors = [torch.randn(2, n, h, D, device="cuda", dtype=dtype) for n, h in ((M, Hq), (N, Hkv), (N, Hkv))]
            hits = CACHE.hits
            got = run(tensors)
            replay.lookup = lambda *_: None
            want = run(tensors)
            replay.lookup = lookup
            same &= all(map(torch.equal, got, want))
            if turn > 2 and CACHE.hits == hits:
                share = math.inf  # it was not replayed
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = run(tensors)
        run([torch.randn_like(x) for x in tensors])
        graph.replay()
        same &= all(map(torch.equal, held, want))
    return {"worst": name, "share": share, "same": same}


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
        "causal": keyspan.Causal,
        "decode": lambda: keyspan.PaddedKeys(ones, lengths, SLOT) & keyspan.Causal("bottom_right"),
        "paged": lambda: (
            keyspan.PagedKeys(ones, lengths, torch.randperm(N // 64, device="cuda").int().view(M, -1), 64)
            & keyspan.Causal("bottom_right")
        ),
    }
    run = {"decode": SLOT, "paged": 64}.get(kind)
    q, k, v = (torch.randn(1, n, h, D, device="cuda") for n, h in ((M, G * H), (N, G), (N, G)))
    mask = masks[kind]()
    scales: dict[str, Any] = {}
    k, scales["key_scale"] = keyspan.quantize(k, dtype, run)
    v, scales["value_scale"] = keyspan.quantize(v, dtype, run)
    if query == "fp8":
        q, scales["query_scale"] = keyspan.quantize(q, dtype, 1)
    else:
        q = q.to(getattr(torch, query))

    def attend(query: torch.Tensor, backend: str) -> torch.Tensor:
        out: torch.Tensor = keyspan.attention(
            query, k, v, mask=mask, backend=backend, output_dtype=torch.float32, **scales
        )
        return out

    want, got = attend(q if query == "fp8" else q.float(), "reference"), attend(q, "triton")
    same = all(torch.equal(got, attend(q, "triton")) for _ in range(5))
    error = float((got - want).norm() / want.norm()) if bool(torch.isfinite(got).all()) else math.inf
    return {"worst": f"{error:.1e}", "share": error / 1e-2, "same": same}


def jobs(every: int, repeats: int) -> list[tuple[Any, ...]]:
    """The checks at real sizes and every n-th of the small ones, as a function and its arguments.

    Args:
        repeats: how often forward and backward of each form of the kernels run; 0 for no such check.
    """
    from keyspan.testing.cases import CASES

    large: list[tuple[Any, ...]] = []
    if repeats:
        kinds: tuple[str, ...] = ("causal", "full", "causal, grouped", "packed", "window", "alibi", "table")
        large += [(check_repeats, f"{d}, {k}", repeats) for k in kinds for d in ("D128", "D64", "D256")]
    kinds = ("full", "causal", "packed", "window", "alibi", "table", "bias")
    large += [(check_large, f"{d}, {k}") for k in kinds for d in ("D128", "D64", "D256")]
    large += [(check_large, f"{d}, causal") for d in ("K128 V64", "D96")]
    again = ("causal", "ranges", "decode", "fp32", "alibi", "table", "bias", "lse", "sinks")
    large += [(check_again, name) for name in again]
    few = ("decode", "paged")
    for query, kept, which in (
        ("bfloat16", "int8", (*few, "causal")),
        ("bfloat16", "fp8", (*few, "causal")),
        ("fp8", "fp8", ("causal", "full", "paged")),
    ):
        large += [(check_stored, f"{d}, {query}, {kept}, {k}") for k in which for d in ("D128", "D64", "D256")]
    large += [(check_stored, f"D128, float16, {kept}, {k}") for kept in STORED for k in few]
    large += [(check_hopper, case.name) for case in CASES[::3]]
    small: list[tuple[Any, ...]] = [(check_case, case.name, "bfloat16", True) for case in CASES]
    small += [(check_case, case.name, "float32", True) for case in CASES[::2]]
    # Last: a process that has switched descriptors off never makes one again.
    small += [(check_case, case.name, "float16", False) for case in CASES[1::4]]
    return large + small[::every]


def report(found: Iterable[dict[str, Any]], count: int, log: Path) -> bool:
    """Write what is found of `count` checks as it comes, print what failed, and tell whether nothing did."""
    done = bad = 0
    with log.open("w") as file:
        for result in found:
            done += 1
            file.write(json.dumps(result) + "\n")
            file.flush()
            if "error" in result or not result["share"] <= 1 or not result["same"]:
                bad += 1
                print("BAD", {k: v for k, v in result.items() if k != "trace"}, flush=True)
    print(f"checks: {done - bad} good, {bad} bad, {count - done} not reached", flush=True)
    return not bad
