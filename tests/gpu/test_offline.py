"""What the Triton kernels compile to on each architecture: shared memory, spills, matrix instructions.

`KEYSPAN_GPU_TESTS=all` (`make test-gpu-offline`) compiles every configuration instead of a few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from offline import FORWARD, TARGETS, Work, crowded

EVERY = os.environ.get("KEYSPAN_GPU_TESTS") == "all"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory a program may have."""
SPILLS = {"forward_kernel": 0, "queries_kernel": 12, "keys_kernel": 140}
"""Largest number of local loads and stores on sm_90, for 16-bit elements and head dimensions up to 128. keys_kernel has
two accumulators; its spills are in NaN repair. queries_kernel spills values that it needs between and after its walks."""
SPILLS_WITH_LOADS = {"forward_kernel": 40, "queries_kernel": 170, "keys_kernel": 260}
"""The same where every score loads an entry, of a dense bias or of a table in the tiles near the diagonal, and where keys are
read element by element."""

SPILLS_INVARIANT = {"forward_kernel": 30, "queries_kernel": 60, "keys_kernel": 140}
"""The same of invariant results, which need a few registers more."""
SPILLS_SEGMENTS = SPILLS_INVARIANT | {"forward_kernel": 150}
"""The same where a program adds up several segments; what it spills it needs between them, not in the loops over keys."""

PARTS = 8 if EVERY else 1
"""Tests per architecture. Each compiles its share of the works in one process, so that all cores have something to do."""

pytestmark = pytest.mark.timeout(1500)


def compiled(target: str, *what: int | str) -> list[dict[str, Any]]:
    """The kernels of a share of a target's works, or of its products, compiled by another process: in this one they are decorated for the
    interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "offline.py"
    source = Path(__file__).parent.parent.parent / "src"
    run = subprocess.run(
        [sys.executable, str(script), target, *map(str, what), *(["--all"] if EVERY else [])],
        env=environment | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert found
    return found


def name_of(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']} of {kernel['dtype']} {kernel['head_dim']} {kernel['kind']} {kernel['stored']}"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, part):
    kernels = compiled(target, part, PARTS)
    # The first work of each architecture has gradients.
    names = {"forward_kernel", "stats_kernel", "keys_kernel", "queries_kernel"} if part == 0 else {"forward_kernel"}
    assert names <= {k["kernel"] for k in kernels}
    too_much_shared_memory = {name_of(k): k["shared"] for k in kernels if k["shared"] > SHARED[target]}
    assert not too_much_shared_memory
    half = [k for k in kernels if k["dtype"] != "float32"]
    heavy = [k for k in half if k["kernel"] in ("forward_kernel", "keys_kernel", "queries_kernel")]
    without_matrix_units = [name_of(k) for k in heavy if k["wgmma"] + k["mma"] == 0]
    assert not without_matrix_units
    if target != "sm_90":
        return
    assert {name_of(k): k["lost"] for k in kernels if k["lost"]} == {}
    many_rows = [k for k in heavy if k["kind"] not in (*FORWARD, "odd")]
    without_wgmma_and_tma = [name_of(k) for k in many_rows if not (k["wgmma"] and k["tma"])]
    assert not without_wgmma_and_tma
    without_fp8_products = [name_of(k) for k in many_rows if k["dtype"] == "float8_e4m3fn" and not k["wgmma8"]]
    assert not without_fp8_products
    # C7519 notes an instruction that was inserted so that registers can be read; it serialises nothing.
    serialised = {name_of(k): k["serialised"] for k in kernels if set(k["serialised"]) - {"C7519"}}
    assert not serialised
    roomy = [k for k in heavy if not crowded(Work(*(k[name] for name in Work._fields)))]
    limits = {"table": SPILLS_WITH_LOADS, "bias": SPILLS_WITH_LOADS, "odd": SPILLS_WITH_LOADS,
              "invariant": SPILLS_INVARIANT, "segments": SPILLS_SEGMENTS}  # fmt: skip
    spilling = {name_of(k): k["spills"] for k in roomy if k["spills"] > limits.get(k["kind"], SPILLS)[k["kernel"]]}
    assert not spilling
    forward = [k for k in roomy if k["kernel"] == "forward_kernel" and k["kind"] == "segments"]
    assert {name_of(k): k["loop_spills"] for k in forward if k["loop_spills"]} == {}


def test_crowded_forward_spills_only_in_nan_repair():
    kernels = [k for k in compiled("sm_90", 0, 1, "--plain") if k["kernel"] == "forward_kernel"]
    assert kernels
    # fp8 at 256 spills one value before its walks and reloads it after the second.
    limits = {True: SPILLS_WITH_LOADS["forward_kernel"], False: 2}
    assert {name_of(k): k["spills"] for k in kernels if k["spills"] > limits[k["kind"] == "table"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_products_compile(target):
    """Every tile fits, spills nothing and uses matrix instructions; those of 64 rows and more wgmma and TMA on sm_90."""
    kernels = compiled(target, "products")
    assert len(kernels) > 4
    for kernel in kernels:
        BM, described = kernel["tile"][0], kernel["tile"][-1]
        assert kernel["shared"] <= SHARED[target], kernel
        assert kernel["spills"] == 0, kernel
        assert not set(kernel["serialised"]) - {"C7519"}, kernel
        if target == "sm_90":
            assert bool(kernel["wgmma"]) == (BM >= 64), kernel
            assert bool(kernel["tma"]) == described == (BM >= 64), kernel
        assert kernel["wgmma"] + kernel["mma"], kernel
