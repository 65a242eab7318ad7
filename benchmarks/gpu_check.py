"""One command for a machine with a GPU: is the Triton backend right there, and how fast is it beside its peers.

    PYTHONPATH=src python benchmarks/gpu_check.py --out $OUT

Needs torch and triton of the machine and nothing else. Runs, in this order and as far as the budget goes: the cases of
the tests against the fp64 reference on the CPU, each several times for bitwise equality (in parallel processes: most of
the time goes into compilation); the ceilings of the machine; forward and backward beside SDPA and compiled
FlexAttention; decoding, also with a cache of 8 bits; forward with inputs of 8 bits; the overhead of a call; one long
sequence. Results are written as they come: check.jsonl, bench.json, bench.md; at the end bench.png. `on_gpu/` has the
parts.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from on_gpu import checks, measure
from on_gpu.board import Board
from on_gpu.overhead import overhead
from on_gpu.providers import providers
from on_gpu.workers import arriving, guarded, guarded_print, processes
from on_gpu.works import PLAIN, Work, works

START = time.time()


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
    peers = given.peers.split(",")
    shapes = [w for w in works(given.quick) if re.search(given.only, str(w))]

    def left() -> float:
        return given.budget - (time.time() - START)

    board = Board(given.out)
    import triton

    board.head = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "device": torch.cuda.get_device_name()}  # fmt: skip
    print(board.head, flush=True)
    # What is timed later is compiled here beside the checks: for both most of the time is the compilers'.
    todo = [*sorted(shapes, key=lambda w: w.kind in PLAIN), Work(1, 1, 1, 2**14, 128, "causal")]
    with processes(given.workers) as pool:
        warming = [pool.submit(guarded, measure.warm, w, "flex" in peers) for w in todo]
        checking = [pool.submit(guarded, *job) for job in checks.jobs(given.every)] if given.check else []
        found = arriving(checking, min(given.check, left() - 30))
        good = checks.report(found, len(checking), given.out / "check.jsonl")
        for warmed in (job.result() for job in warming):
            if "error" in warmed:
                print("BAD", warmed["name"], warmed["error"], flush=True)
    print(f"compiled after {time.time() - START:.0f} s", flush=True)
    measure.ceilings(board)
    chosen = {n: p for n, p in providers().items() if n == "keyspan" or n in peers}
    first, rest = shapes[:5], shapes[5:]
    for w in first:
        measure.bench(board, w, chosen, left)
    for page in (None, 64):
        if left() > 14:
            guarded_print(measure.decode, board, 32, 8192, 32, 8, 128, page, left)
    for D in (128, 64):
        for kind in PLAIN:
            if left() > 14:
                guarded_print(measure.forward_stored, board, D, kind)
    if left() > 14:
        guarded_print(overhead, board)
    # A million tokens only where they are a matter of seconds.
    if left() > 14 and (guarded_print(measure.long, board, 2**18) or 0) > 100 and left() > 20:
        guarded_print(measure.long, board, 2**20)
    for w in rest:
        if left() > 14:
            measure.bench(board, w, chosen, left)
    for B, N in ((1, 131072), (128, 2048)):
        if left() > 14:
            guarded_print(measure.decode, board, B, N, 32, 8, 128, None, left)
    board.plot()
    print(f"done after {time.time() - START:.0f} s", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
