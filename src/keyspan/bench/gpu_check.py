"""One command for a machine with a GPU: is the Triton backend right there, and how fast is it beside its peers.

    PYTHONPATH=src python -m keyspan.bench.gpu_check --out $OUT

Needs the machine's torch and triton and nothing else. In this order and as far as the budget goes: the shared cases
against the fp64 reference on the CPU, each several times for bitwise equality (in parallel processes: most of the time
goes into compilation); the machine's ceilings; forward and backward beside SDPA's kernels, compiled flex_attention,
FlashAttention 2 and 4 and xFormers where they are installed (the others are named); decoding, also with a cache
of 8 bits; forward with inputs of 8 bits; host time of a call; one long sequence. Results are written as they come:
check.jsonl and results.json; at the end results.md, which begins with one table against the best peer, and results.png.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from keyspan.bench import checks, decoding
from keyspan.bench.clock import EventClock
from keyspan.bench.measure import Row, measure, warm, yardstick
from keyspan.bench.overhead import overhead
from keyspan.bench.providers import DETERMINISTIC, OTHERS, gpu_peers, is_installed, make
from keyspan.bench.report import HEADER, Report, machine, markdown_table, plot_rates
from keyspan.bench.workers import arriving, guarded, guarded_print, processes
from keyspan.bench.works import Passes, Work, gpu_work, gpu_works
from keyspan.files import write_file

GPU = torch.device("cuda")
OURS = "keyspan:triton"
PASSES: tuple[Passes, ...] = ("fwd", "bwd")
BF16 = ("bf16", torch.bfloat16)


def main(words: list[str] | None = None) -> int:
    began = time.time()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--budget", type=float, default=520, help="seconds in all")
    parser.add_argument("--check", type=float, default=200, help="seconds for the checks; 0 for none")
    parser.add_argument("--every", type=int, default=1, help="of the checks, every n-th")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each form of the kernels, compared bit by bit")
    parser.add_argument("--quick", action="store_true", help="the most telling shapes only")
    parser.add_argument("--peers", default=",".join(("cudnn", "flash", "efficient", "flex", *OTHERS)))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--only", default="", help="regular expression: the shapes whose name it finds")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    peers = given.peers.split(",")
    shapes = [work for work in gpu_works(given.quick) if re.search(given.only, work.name)]

    def left() -> float:
        return float(given.budget - (time.time() - began))

    absent = ", ".join(name for name in OTHERS if name in peers and not is_installed(name))
    report = Report(given.out, machine(GPU) | ({"not installed": absent} if absent else {}))
    print(report.machine, flush=True)
    # What is timed later is compiled here beside the checks: for both most of the time is the compilers'.
    todo = [*sorted(shapes, key=lambda work: work.sequence), gpu_work("causal", 2**14, 128, 1)]
    with processes(given.workers) as pool:
        warming = [pool.submit(guarded, warm, work, BF16[1], compiled(work, peers)) for work in todo]
        wanted = checks.jobs(given.every, given.repeats) if given.check else []
        checking = [pool.submit(guarded, *job) for job in wanted]
        found = arriving(checking, min(given.check, left() - 30))
        good = checks.report(found, len(checking), given.out / "check.jsonl")
        for warmed in (job.result() for job in warming):
            if "error" in warmed:
                print("BAD", warmed["name"], warmed["error"], flush=True)
    print(f"compiled after {time.time() - began:.0f} s", flush=True)
    time_all(report, shapes, peers, left)
    table = comparison(report.rows("gpu"))
    print(table, flush=True)
    write_file(given.out / "results.md", f"{table}\n\n{report.markdown()}".encode())
    try:
        plot_rates(report.rows("gpu"), report.machine, given.out / "results.png")
    except ImportError:
        print("no picture: matplotlib is not installed", flush=True)
    print(f"done after {time.time() - began:.0f} s", flush=True)
    return 0 if good else 1


def time_all(report: Report, shapes: list[Work], peers: list[str], left: Callable[[], float]) -> None:
    """Everything that is timed, the most telling first, as far as the time goes."""
    ceilings(report, GPU)
    print(HEADER)
    for work in shapes[:5]:
        bench(report, work, peers, GPU, OURS, left)
    for page in (None, 64):
        if left() > 14:
            guarded_print(decoding.decode, report, (32, 8192, 32, 8, 128), page, GPU, "triton", left)
    for dim in (128, 64):
        for kind in ("full", "causal"):
            if left() > 14:
                guarded_print(decoding.forward_stored, report, kind, 8192, dim, GPU, "triton")
    if left() > 14:
        guarded_print(overhead, report, GPU)
    # A million tokens only where they are a matter of seconds.
    if left() > 14 and (guarded_print(decoding.long, report, 2**18, GPU, "triton") or 0) > 100 and left() > 20:
        guarded_print(decoding.long, report, 2**20, GPU, "triton")
    for work in shapes[5:]:
        bench(report, work, peers, GPU, OURS, left)
    for B, N in ((1, 131072), (128, 2048)):
        if left() > 14:
            guarded_print(decoding.decode, report, (B, N, 32, 8, 128), None, GPU, "triton", left)


def comparison(rows: list[Row]) -> str:
    """Keyspan beside the fastest peer, and the fastest of those whose backward pass repeats bit by bit, in TFLOP/s."""
    lines = []
    for work in dict.fromkeys(row.work for row in rows):
        timed = {row.provider: row.rate / 1e3 for row in rows if row.work == work and row.rate is not None}
        ours = timed.pop(OURS, None)
        if ours is None:
            continue
        cells = [work, f"{ours:.0f}"]
        # FlashAttention 2's and cuDNN's backward passes, as torch calls them, add in no fixed order either.
        for peers in (timed, {name: x for name, x in timed.items() if name.endswith(DETERMINISTIC)}):
            best = max(peers, key=lambda name: peers[name], default=None)
            cells += ["", ""] if best is None else [f"{best} {peers[best]:.0f}", f"{ours / peers[best]:.2f}"]
        lines.append(cells)
    return markdown_table(("work", "Keyspan", "best peer", "ratio", "best deterministic peer", "ratio"), lines)


def compiled(work: Work, peers: list[str]) -> list[str]:
    """The providers of a work whose kernels are compiled on first use."""
    return [OURS, *(name for name in gpu_peers(work) if name in peers and name == "flex")]


def bench(
    report: Report, work: Work, peers: list[str], device: torch.device, ours: str, left: Callable[[], float]
) -> None:
    """Forward and backward of a work by Keyspan and every peer that can, in turns."""
    for passes in PASSES:
        if left() < 14:
            return
        this = replace(work, passes=passes)
        names = [ours, *(name for name in gpu_peers(this) if name in peers)]
        makers = {name: partial(make, name, this, BF16[1], device) for name in names}
        rows = measure(work.name, this, BF16, makers, {}, device, repeats=2, check=False, left=left)
        report.add("gpu", rows)


def ceilings(report: Report, device: torch.device, quick: bool = False) -> None:
    """What the machine can do at most: a matrix product in bf16, a copy."""
    clock = EventClock(200)
    for name, unit, scale in (("gemm", "gemm_tflops", 1e12), ("copy", "copy_tb_per_s", 1e12)):
        stick = yardstick(name, torch.bfloat16, device, quick)
        report.machine[unit] = stick.amount / statistics.median(clock.times(clock.prepare(stick.run))) / scale
    report.write()
    print({name: round(report.machine[name], 2) for name in ("gemm_tflops", "copy_tb_per_s")}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
