"""Times candidate tiles of the Triton kernels on this machine's GPU, for the table in backends/triton/config.py.

    PYTHONPATH=src python benchmarks/tune_triton.py --out $OUT [--only forward,128] [--seconds 120]
    PYTHONPATH=src python benchmarks/tune_triton.py --out $OUT --best tune.jsonl --kinds full,window,alibi,table

All candidates are compiled first, in parallel processes. Then each is run, compared with the result of the tile in the
table, and timed twice (the smaller median counts). Results are appended to tune.jsonl, and the best tile of each group
is printed. The table is edited by hand: the fastest tile of one shape can be slow on others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import keyspan
from keyspan.backends import Needs
from keyspan.backends.triton import config
from keyspan.bench.clock import EventClock
from keyspan.bench.workers import arriving, processes
from keyspan.bench.works import KINDS, gpu_work
from keyspan.core.problem import Problem, make_problem


class Candidate(NamedTuple):
    """One tile of one kernel on one kind of work."""

    kernel: str
    head_dim: int
    dtype: str
    kind: str
    tile: tuple[int, int, int, int]


SHARED = 227 * 1024
STORED = ("fp8", "int8 keys", "fp8 keys")
"""Query, keys and values of 8 bits; keys and values of 8 bits with a query in bf16."""


def candidates() -> list[Candidate]:
    """Tiles that may fit, for every group; those that do not compile or launch drop out."""
    found = []
    rows: dict[str, dict[int, Any]] = {
        "forward": {
            64: itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)),
            128: itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)),
            256: itertools.product((64, 128), (32, 64), (4, 8), (2, 3)),
        },
        "keys": {
            64: itertools.product((32, 64, 128), (64, 128), (4, 8), (2, 3)),
            128: itertools.product((32, 64), (64, 128), (4, 8), (1, 2, 3)),
        },
        "keys alone": {256: itertools.product((16, 32, 64), (64, 128), (4, 8), (1, 2, 3))},
        "values alone": {256: itertools.product((32, 64), (64, 128), (4, 8), (1, 2, 3))},
        "queries": {
            64: itertools.product((64, 128), (64, 128), (4, 8), (2, 3)),
            128: itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)),
            256: itertools.product((64, 128), (32, 64), (4, 8), (1, 2)),
        },
    }
    for kernel, by_dim in rows.items():
        for head_dim, tiles in by_dim.items():
            for tile in tiles:
                BM, BN, warps, stages = tile
                # A thread holds its share of the accumulators; beyond this it spills.
                held = {
                    "forward": BM * (BN + head_dim),
                    "keys": BN * 2 * (head_dim + BM),
                    "keys alone": BN * (head_dim + 2 * BM),
                    "values alone": BN * (head_dim + BM),
                    "queries": BM * (2 * BN + head_dim),
                }
                moved = {"forward": 2 * BN * stages + BM, "queries": 2 * (BN * stages + BM)}
                moved_by_keys = 2 * (BM * stages + BN)
                if (
                    held[kernel] / (32 * warps) <= 300
                    and moved.get(kernel, moved_by_keys) * head_dim * 2 <= SHARED
                    and BM * BN >= 64 * 32
                ):
                    found += [Candidate(kernel, head_dim, "bfloat16", kind, tile) for kind in ("causal",)]
    for kernel, head_dim in itertools.product(("forward", "keys", "queries"), (64, 128)):
        for tile in itertools.product((32, 64, 128), (32, 64), (4, 8), (2,)):
            BM, BN, warps, stages = tile
            if 256 <= BM * BN / warps <= 1024 and (BM + BN * stages) * head_dim * 8 <= SHARED:
                found.append(Candidate(kernel, head_dim, "float32", "causal", tile))
    for head_dim, stored in itertools.product((64, 128, 256), STORED):
        for tile in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            BM, BN, warps, _ = tile
            if 16 * warps <= BM and BN * head_dim <= 16384 and BM * (BN + head_dim) / (32 * warps) <= 300:
                found.append(Candidate("forward", head_dim, stored, "causal", tile))
    for kind, stored in itertools.product(("decode", "paged"), STORED[1:]):
        for tile in itertools.product((16,), (32, 64, 128, 256), (2, 4, 8), (2, 3, 4)):
            if 8 <= tile[1] // tile[2] <= 32:
                found.append(Candidate("decode", 128, stored, kind, tile))
    for kernel, head_dim in itertools.product(("table", "bias"), (64, 128)):
        for tile in itertools.product((32, 64), (32, 64), (4, 8), (1, 2)):
            found.append(Candidate(kernel, head_dim, "bfloat16", kernel, tile))
    return found


PROBLEMS: dict[Any, Problem] = {}


def problem_of(c: Candidate) -> Problem:
    """16384 tokens, 2048 / head_dim heads, in sequences of 8192; shorter where that would take too long."""
    key = c[1:4]
    if key not in PROBLEMS:
        torch.manual_seed(0)
        if c.dtype in STORED:
            PROBLEMS[key] = stored_problem(c)
            return PROBLEMS[key]
        dtype = getattr(torch, c.dtype)
        N = 16384 if c.kind == "packed" else 2048 if c.dtype == "float32" or c.kind == "bias" else 8192
        H = 2048 // c.head_dim
        q, k, v = (torch.randn(16384 // N, N, H, c.head_dim, device="cuda", dtype=dtype) for _ in range(3))
        work = gpu_work(c.kind if c.kind in KINDS else "causal", N, c.head_dim)
        bias: keyspan.Bias | torch.Tensor | None = None
        if work.alibi:
            bias = keyspan.Alibi(work.slopes("cuda"))
        if work.reach is not None:
            bias = keyspan.RelativeBias(torch.rand(H, 2 * work.reach + 1, device="cuda"))
        if c.kind == "bias":
            bias = torch.rand(1, H, N, N, device="cuda", dtype=dtype)
        PROBLEMS[key] = make_problem(q, k, v, mask=work.mask(), bias=bias)[0]
    return PROBLEMS[key]


def stored_problem(c: Candidate) -> Problem:
    """The same with inputs of 8 bits; decoding: a token for each of 32 sequences of 8192 keys, 32 query heads on 8."""
    B, M, N, H, G = 2, 8192, 8192, 2048 // c.head_dim, 2048 // c.head_dim
    copies, run = 1, None
    mask: keyspan.Mask = keyspan.Causal()
    if c.kernel == "decode":
        B, M, H, G, copies, run = 1, 32, 32, 8, 32, 64 if c.kind == "paged" else N
        one = torch.ones(M, device="cuda", dtype=torch.int32)
        stored: keyspan.Mask = keyspan.PaddedKeys(one, N * one, N)
        if c.kind == "paged":
            pages = torch.randperm(M * N // run, device="cuda").int().view(M, -1)
            stored = keyspan.PagedKeys(one, N * one, pages, run)
        mask = stored & keyspan.Causal("bottom_right")
    sizes = ((M, H), (N, G), (N, G))
    q, k, v = (torch.randn(B, n, h, c.head_dim, device="cuda", dtype=torch.bfloat16) for n, h in sizes)
    kind = torch.int8 if c.dtype == "int8 keys" else torch.float8_e4m3fn
    # All sequences are the same: the processes that compile would not find room to convert 32 each.
    k, key_scale, v, value_scale = (torch.cat([y] * copies, 1) for x in (k, v) for y in keyspan.quantize(x, kind, run))
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    if c.dtype == "fp8":
        q, scales["query_scale"] = keyspan.quantize(q, kind)
    return make_problem(q, k, v, mask=mask, output_dtype=torch.bfloat16, **scales)[0]


class Ready(NamedTuple):
    """What backward needs, made with the tiles of the table."""

    grad: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


READY: dict[Any, Ready] = {}
table = config.tile


def call(c: Candidate, tile: tuple[int, int, int, int] | None) -> list[torch.Tensor]:
    """The results of the candidate's kernel, with this tile or the table's."""
    from keyspan.backends.triton import launch

    problem = problem_of(c)
    if c.kernel not in ("forward", "decode") and c[1:4] not in READY:
        out, lse = launch.forward(problem)
        READY[c[1:4]] = Ready(torch.randn_like(out), out, lse)
    config.tile = lambda kernel, *a: config.TileConfig(*tile) if tile and kernel == c.kernel else table(kernel, *a)
    try:
        if c.kernel in ("forward", "decode"):
            return list(launch.forward(problem))
        ready = READY[c[1:4]]
        keys, values = (c.kernel in ("keys", alone) for alone in ("keys alone", "values alone"))
        biases = [c.kernel == "bias"] * len(problem.biases)
        needs = Needs(c.kernel == "queries", keys, values, False, c.kernel == "table", False, biases)
        grads = launch.backward(problem, ready.grad, None, ready.out, ready.lse, needs)
        return [x for x in (grads.query, grads.key, grads.value, grads.table, *grads.biases) if x is not None]
    finally:
        config.tile = table


def flops(c: Candidate) -> float:
    p = problem_of(c)
    products = {"keys": 4, "keys alone": 3, "queries": 3}.get(c.kernel, 2)
    return 2 * products * p.visible_pairs() * c.head_dim


def compiled(c: Candidate) -> tuple[Candidate, str | None]:
    """Compile in this process, into the cache on disk, by a launch: what is specialised must be as when it is timed."""
    try:
        call(c, c.tile)
        torch.cuda.synchronize()
    except Exception as error:  # a tile that does not fit is a result
        return c, f"{type(error).__name__}: {error}"[:160].replace("\n", " ")
    return c, None


def timed(c: Candidate, tile: tuple[int, int, int, int] | None) -> float:
    """Median milliseconds."""
    return 1e3 * statistics.median(EventClock(200, most=8).times(lambda: call(c, tile)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--only", default="", help="kernel,head_dim,dtype; empty parts match all")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--best", type=Path, help="an earlier tune.jsonl: its best tiles, on other kinds of work")
    parser.add_argument("--kinds", default="full,window,alibi,table")
    parser.add_argument("--top", type=int, default=5, help="number of tiles of each group of --best")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    kernel, head_dim, dtype, *_ = [*arguments.only.split(","), "", "", ""]
    wanted = [
        c
        for c in candidates()
        if kernel in ("", c.kernel) and head_dim in ("", str(c.head_dim)) and dtype in ("", c.dtype)
    ]
    if arguments.best:
        rows = [json.loads(line) for line in arguments.best.read_text().splitlines()]
        rows.sort(key=lambda r: r["ms"])
        groups = {(r["kernel"], r["head_dim"]): [] for r in rows}  # type: dict[Any, list[Any]]
        for r in rows:
            if r["dtype"] == "bfloat16" and r["kind"] == "causal":
                groups[r["kernel"], r["head_dim"]].append(tuple(r["tile"]))
        wanted = [
            Candidate(k, d, "bfloat16", kind, t)
            for (k, d), tiles in sorted(groups.items())
            for kind in arguments.kinds.split(",")
            for t in tiles[: arguments.top]
            if kernel in ("", k) and head_dim in ("", str(d))
        ]
    good: list[Candidate] = []
    with processes(arguments.workers) as pool:
        futures = [pool.submit(compiled, c) for c in wanted]
        for c, error in arriving(futures, arguments.seconds * 0.6):
            if error is None:
                good.append(c)
            else:
                print("no", *c, error, flush=True)
        if not all(future.done() and not future.cancelled() for future in futures):
            print("not all were compiled", flush=True)
    print(f"{len(good)} of {len(wanted)} compiled in {time.time() - began:.0f} s", flush=True)
    good.sort(key=wanted.index)
    with (arguments.out / "tune.jsonl").open("w") as log:
        for group, members in itertools.groupby(good, key=lambda c: c[:4]):
            rows = []
            for c in members:
                if time.time() - began > arguments.seconds:
                    break
                try:
                    want, got = call(c, None), call(c, c.tile)
                    off = max(
                        float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True)
                    )
                    del want, got
                    ms = min(timed(c, c.tile) for _ in range(2))
                except Exception as error:
                    print("no", *c, f"{type(error).__name__}: {error}"[:160].replace("\n", " "), flush=True)
                    continue
                rows.append((ms, c.tile, off))
                found = {**c._asdict(), "ms": ms, "tflops": flops(c) / ms / 1e9, "difference": off}
                log.write(json.dumps(found) + "\n")
                log.flush()
            rows.sort()
            if rows:
                c = Candidate(*group, rows[0][1])
                now = flops(c) / timed(c, None) / 1e9
                best = [f"{t} {flops(c) / ms / 1e9:.0f}{'' if off < 1e-2 else ' WRONG'}" for ms, t, off in rows[:7]]
                print(*group, f"table {now:.0f}:", "  ".join(best), flush=True)
            PROBLEMS.pop(group[1:], None) if group[0] == "queries" else None
    print(f"done after {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
