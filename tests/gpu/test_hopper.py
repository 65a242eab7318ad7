"""The Hopper kernel without a GPU: on the shared cases by an emulator of Gluon, and what it compiles to."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import gluon_emulator
import pytest
import torch
from gluon_emulator import load

import keyspan
from keyspan.backends.triton import config, hopper, launch
from keyspan.core.problem import make_problem
from keyspan.dispatch.op import attend
from keyspan.testing import tolerances, worst
from keyspan.testing.cases import CASES

FOLDER = Path(hopper.__file__).parent
MODULES = {f"keyspan.backends.triton.{name}": FOLDER / f"{name}.py" for name in ("primitives", "hopper_kernels")}


@functools.cache
def kernels():
    return load(MODULES)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Problems go to the Hopper kernels wherever these have all terms, and run on the emulator, in small tiles."""
    ran = []

    def run(kernel, grid, *arguments, tile):
        assert kernel.fn.__name__ == "hopper_forward_kernel"
        out, lse, counters = *arguments[5:7], arguments[7].tensor
        ran.append(arguments[-1])
        gluon_emulator.run(kernels().hopper_forward_kernel, grid, list(arguments), [out, lse, counters])
        assert not counters.any(), "counters are not set back"

    monkeypatch.setattr(hopper, "reason_against", hopper.missing)
    monkeypatch.setattr(hopper, "tile", lambda problem: config.TileConfig(128, 32, 4, 2, 168))
    monkeypatch.setattr(launch, "run", run)
    return ran


def problem_of(case):
    problem = case.problem(torch.bfloat16)
    return problem._replace(
        **{
            n: x.bfloat16()
            for n, x in problem._asdict().items()
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64
        },
        output_dtype=torch.bfloat16,
    )


def agree(case):
    problem = case.problem(torch.bfloat16)
    want = dict(zip(("out", "lse"), (x.double() for x in attend(problem, "reference")), strict=True))
    with torch.no_grad():
        out, lse = attend(problem_of(case), "triton")
    for name, got in (("out", out.double()), ("lse", lse.double())):
        error, allowed = worst(got, want[name]), tolerances(problem, torch.bfloat16, want)[name]
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


FITTING = [case for case in CASES if case.B * case.M > 0 and hopper.missing(problem_of(case)) is None]


def test_most_kinds_of_cases_fit():
    names = {case.name for case in FITTING}
    assert {"gqa", "window and sinks", "shared prompt", "documents, cross", "relative table, two ranges", "softcap",
            "learned sinks", "alibi by batch", "negative scale", "right padded batch"} <= names  # fmt: skip


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.name)
def test_agrees_with_reference(case, emulated):
    agree(case)
    assert len(emulated) == 1


@pytest.mark.parametrize("name", ["several tiles", "shared prompt", "relative table, two ranges", "softcap"])
def test_three_consumers(name, emulated, monkeypatch):
    monkeypatch.setattr(hopper, "tile", lambda problem: config.TileConfig(192, 32, 4, 3, 128))
    agree(next(case for case in CASES if case.name == name))
    assert emulated[0].consumers == 3


def test_programs_take_many_items(emulated, monkeypatch):
    # More tiles than programs: every program goes through the ring several times.
    monkeypatch.setattr(launch, "_processors", lambda device: 3)
    agree(next(case for case in CASES if case.name == "several tiles"))
    agree(next(case for case in CASES if case.name == "alibi by batch"))


def test_hidden_nan_and_infinity_do_not_reach_a_row():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16).bfloat16() for _ in "qkv")
    mask = keyspan.Documents([33, 37]) & keyspan.Causal()
    v[:, 20], k[:, 30, 0], v[:, 50, 1, 3] = torch.nan, torch.inf, torch.inf
    with torch.no_grad():
        got = keyspan.attention(q, k, v, mask=mask, backend="triton")
    want = keyspan.attention(q.double(), k.double(), v.double(), mask=mask, backend="reference")
    assert worst(got.double(), want) < 0.05
    assert torch.isfinite(got[:, :20]).all()
    assert torch.isnan(got[:, 20:30]).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("phase ^ 1)\n            mbarrier.expect(key_full", "phase)\n            mbarrier.expect(key_full"),
        ("key_tiles.block_type.nbytes", "2 * key_tiles.block_type.nbytes"),
        ("acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))", "pass"),
        ("mbarrier.arrive(query_empty.index(ME), count=1)", "pass"),
        ("gl.where(t < second, j0,", "gl.where(t <= second, j0,"),
        ("if t == _get(plan, START + s):", "if t == 0:"),
        ("(j - gl.expand_dims(lo, 1))", "(j + 1 - gl.expand_dims(lo, 1))"),
        ("gl.store(counters, 0)", "pass"),
    ],
    ids=[
        "wrong phase",
        "wrong bytes",
        "no wait",
        "query not released",
        "wrong block",
        "wrong range",
        "off by one key",
        "no reset",
    ],
)
def test_the_emulator_sees_mistakes(right, wrong, monkeypatch):
    source = MODULES["keyspan.backends.triton.hopper_kernels"].read_text()
    assert right in source
    broken = load(MODULES, lambda text: text.replace(right, wrong))
    monkeypatch.setattr(sys.modules[__name__], "kernels", lambda: broken)
    monkeypatch.setattr(gluon_emulator, "TIMEOUT", 0.5)
    monkeypatch.setattr(launch, "_processors", lambda device: 1)
    with pytest.raises((AssertionError, TimeoutError, TypeError)):
        agree(next(case for case in CASES if case.name == "relative table, two ranges"))


def test_a_reason_is_given_against_each_problem_that_is_not_for_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)

    def reason(M, N, heads, dim, dtype=torch.bfloat16, **given):
        q, k, v = (torch.empty(1, n, heads, dim, dtype=dtype) for n in (M, N, N))
        return hopper.reason_against(make_problem(q, k, v, **given)[0])

    causal = keyspan.Causal()
    assert reason(4096, 4096, 16, 128, mask=causal) is None
    assert reason(4096, 4096, 16, 96) is None
    assert reason(8192, 8192, 64, 64) is None
    assert "float32" in reason(4096, 4096, 16, 128, torch.float32)
    assert "queries" in reason(512, 4096, 32, 128)
    assert "keys" in reason(4096, 77, 32, 128)
    assert "tiles" in reason(1024, 1024, 4, 128)
    assert "mask" in reason(8192, 8192, 64, 64, mask=causal)
    assert "at least 40" in reason(4096, 4096, 16, 32)
    assert "dense bias" in reason(1024, 1024, 32, 128, bias=torch.zeros(1024, 1024))
    assert "dropout" in reason(4096, 4096, 16, 128, dropout_p=0.1)


def test_compiles_for_sm_90():
    """No spills where heads are of up to 128 and rows have one range, few elsewhere; nothing serialised; it fits."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    every = ["--all"] if os.environ.get("KEYSPAN_GPU_TESTS") == "all" else []
    run = subprocess.run(
        [sys.executable, str(here / "offline.py"), "hopper", *every],
        env=environment | {"PYTHONPATH": str(here.parent.parent / "src")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(found) >= 5
    for kernel in found:
        name = f"{kernel['head_dim']} {kernel['kind']}"
        assert min(kernel["wgmma"], kernel["tma"]) > 0, name
        assert kernel["serialised"] == [], name
        assert kernel["shared"] <= 227 * 1024, name
        plain = kernel["kind"] in ("full", "causal")
        # What a branch needs that few tiles take: the next range, scores near the diagonal.
        limit = {64: 4, 128: 0 if plain else 12, 256: 6 if plain else 40}[kernel["head_dim"]]
        assert kernel["loop_spills"] <= limit, (name, kernel)
