"""One numerics on a GPU: bits of random forms with `invariant=True`, forward and backward, compared with `torch.equal`.

    PYTHONPATH=src python tests/gpu/device_invariance.py SECONDS [SEED ...]

Each seed runs in a process of its own, which prints its form before it launches anything: a fault ends that seed alone.
Without seeds as many of 0 … 79 as fit into the seconds. The last line counts. A seed that takes longer than the seconds
or than its own limit has no result: most of a seed's time is for compiling. The exit code is 0 if none is bad and some
are good.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SEEDS = 80
LIMIT = 240.0
"""Seconds that one seed may take; most are for compiling."""


def check(seed: int) -> None:
    """Print what a seed draws, then GOOD or the differences."""
    import torch

    import invariance_cases as cases

    class Case(cases.Random):
        """Also heads and lengths that fill the large tiles of a GPU."""

        device = torch.device("cuda")

        def __init__(self, seed: int, dtype: torch.dtype, small: bool = False):
            super().__init__(seed, dtype, small)
            rng = self.rng
            if rng.random() < 0.7:
                self.K = self.V = rng.choice([64, 128, 128, 256])
            if rng.random() < 0.5:
                self.keys = [rng.choice([70, 300, 1023, 1500, 2500]) for _ in self.keys]
                self.queries = [rng.choice([n, min(n, rng.randint(1, 9)), rng.randint(1, n)]) for n in self.keys]
            if rng.random() < 0.6:
                self.term = "none"
            self.fill()

    cases.Random = Case  # type: ignore[misc]
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    case: Any = Case(seed, dtype)
    print(
        f"seed {seed} {str(dtype)[6:]} keys {case.keys} queries {case.queries} G {case.G} H {case.H} K {case.K} "
        f"V {case.V} {case.visible} {case.term} {sorted(case.options)}",
        flush=True,
    )
    cases.check_forms("triton", dtype, seed)
    order = list(range(len(case.keys)))
    case.rng.shuffle(order)
    _, packed = cases.gradients(case, "triton", order, 1)
    for d in order:
        _, alone = cases.gradients(case, "triton", [d], 1)
        for name, x, y in zip("qkv", packed[d], alone[d], strict=True):
            assert torch.equal(x, y), f"d{name} of document {d}: {int((x != y).sum())} of {x.numel()} differ"
    want = cases.gradients_in_a_batch(case, "triton", 1, 0)
    got = cases.gradients_in_a_batch(case, "triton", 3, 2)
    for name, x in want.items():
        assert torch.equal(x, got[name]), f"d{name} in a batch: {int((x != got[name]).sum())} of {x.numel()} differ"
    print("GOOD", flush=True)


def main(seconds: float, seeds: list[int]) -> int:
    deadline = time.monotonic() + seconds

    def job(seed: int) -> bool | None:
        left = deadline - time.monotonic()
        if left < 1:
            return None
        command = [sys.executable, __file__, "seed", str(seed)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=min(left, LIMIT))
            said, error = run.stdout.split("\n"), run.stderr.strip().split("\n")
        except subprocess.TimeoutExpired as expired:
            print(
                "late", (expired.stdout or b"").decode().split("\n")[0], f"| after {min(left, LIMIT):.0f} s", flush=True
            )
            return None
        good = "GOOD" in said
        print("good" if good else "BAD ", said[0], "" if good else "| " + " ".join(error[-3:])[-600:], flush=True)
        return good

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2)) as pool:
        found = list(pool.map(job, seeds))
    print(f"{found.count(True)} good, {found.count(False)} bad, {found.count(None)} without a result")
    return int(False in found or True not in found)


if __name__ == "__main__":
    if sys.argv[1] == "seed":
        check(int(sys.argv[2]))
    else:
        sys.exit(main(float(sys.argv[1]), [int(x) for x in sys.argv[2:]] or list(range(SEEDS))))
