"""`make gpu-check` as far as no GPU is needed: what it times, what it writes, that its parts fit together."""

import functools
import importlib
import json
import math
import pickle
import sys
import time
from dataclasses import replace

import pytest
import torch

from keyspan.bench import checks, clock, decoding, gpu_check, measure, providers, works
from keyspan.bench.gpu_check import PASSES, bench, ceilings
from keyspan.bench.overhead import overhead
from keyspan.bench.report import Report, draw, machine
from keyspan.bench.workers import arriving, guarded, processes
from keyspan.bench.works import GPU_DOCUMENTS, KINDS, gpu_work, gpu_works

CPU = torch.device("cpu")


def left():
    return math.inf


def small(kind, **options):
    """A work of this kind, tiny, in rows of 60 tokens."""
    changes = {"packed": {"lengths": (5, 40, 1, 14)}, "window": {"window": 8}, "table": {"reach": 5}}.get(kind, {})
    return gpu_work(kind, 60, 8, 4, 2, **{"batch": 3, **changes, **options})


def test_works_differ_and_begin_with_the_quick_ones():
    every, quick = gpu_works(False), gpu_works(True)
    assert every[: len(quick)] == quick
    assert len({w.name for w in every}) == len(every)
    assert quick[0].title == "causal, B2 H16 M8192 K128, fwd"
    for kind in KINDS:
        assert any(gpu_work(kind, w.N, w.shape.dim) == w for w in quick), kind
    for w in every:
        heads, kv_heads, dim = w.shape
        assert w.batch * w.N >= 16384
        assert heads * dim in (2048, 4096)
        assert heads % kv_heads == 0


@pytest.mark.parametrize("kind", KINDS)
def test_visible_pairs_are_those_of_the_mask(kind):
    w = small(kind)
    mask = w.mask()
    want = 60 * 60 if mask is None else int(mask.materialize(60, 60).sum())
    assert w.visible() == 3 * want
    products = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}
    for passes, count in products.items():
        assert replace(w, passes=passes).flops() == 2 * count * 3 * want * 4 * 8


def test_the_documents_fill_the_work_that_is_timed():
    assert {w.N for w in gpu_works(False) if len(w.lengths) > 1} == {sum(GPU_DOCUMENTS)}


def test_jobs_are_known_in_other_processes():
    jobs = checks.jobs(1, 10)
    assert pickle.loads(pickle.dumps((guarded, measure.warm, jobs))) == (guarded, measure.warm, jobs)
    began = time.time()
    with processes(1) as pool:
        quick = pool.submit(guarded, divmod, 7, 0)
        assert quick.result()["name"] == "7 · 0"
        slow = [pool.submit(time.sleep, 600) for _ in range(3)]
        (found,) = arriving([quick, *slow], 0.1)
        assert found["error"].startswith("ZeroDivisionError")
    assert time.time() - began < 300


@pytest.mark.parametrize(
    ("result", "good"),
    [({"share": 0.5, "same": True}, True), ({"share": torch.nan, "same": True}, False),
     ({"share": 0.5, "same": False}, False), ({"error": "none", "trace": "none"}, False)],
)  # fmt: skip
def test_a_bad_check_is_reported(result, good, tmp_path, capsys):
    assert checks.report(iter([result]), 3, tmp_path / "check.jsonl") == good
    assert f"{int(good)} good, {int(not good)} bad, 2 not reached" in capsys.readouterr().out
    assert len((tmp_path / "check.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path, machine(CPU))


def test_every_kind_is_compared_with_its_peers(report, monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu_peers", lambda work: ["sdpa", "dense softmax"])
    for kind in KINDS:
        bench(report, small(kind, batch=1), ["sdpa"], CPU, "keyspan:chunked", left)
    rows = report.rows("gpu")
    assert [(r.row, r.passes, r.provider) for r in rows] == [
        (small(kind, batch=1).name, passes, provider)
        for kind in KINDS
        for passes in PASSES
        for provider in ("keyspan:chunked", "sdpa")
    ]
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        work = next(small(k, batch=1) for k in KINDS if small(k, batch=1).name == ours.row)
        assert ours.rate == pytest.approx(replace(work, passes=ours.passes).flops() / ours.milliseconds / 1e6)
        if work.reach is None:  # torch has no table without its gather in the mask
            assert peer.difference < 2e-2
        assert peer.ratio is None or peer.ratio == pytest.approx(ours.rate / peer.rate)
        assert ours.peak_mib > 0
    found = json.loads((report.out / "results.json").read_text())
    assert report.markdown().count("| keyspan:chunked |") == len(rows) / 2
    draw(found, report.out / "again.png")
    assert (report.out / "again.png").stat().st_size > 10_000


def test_one_table_compares_with_the_best_peer():
    fields = {"row": "x", "dtype": "bf16"}
    rates = {"keyspan:triton": 500e3, "cudnn": 400e3, "flash_attn.cute": 625e3, "flash_attn.cute deterministic": 250e3}
    rows = [measure.Row(work="a, bwd", provider=name, passes="bwd", rate=x, **fields) for name, x in rates.items()]
    rows += [measure.Row(work="b, fwd", provider="keyspan:triton", passes="fwd", rate=1e3, **fields)]
    rows += [measure.Row(work="c, fwd", provider="cudnn", passes="fwd", rate=1e3, **fields)]
    lines = gpu_check.comparison(rows).splitlines()
    assert lines[2:] == [
        "| a, bwd | 500 | flash_attn.cute 625 | 0.80 | flash_attn.cute deterministic 250 | 2.00 |",
        "| b, fwd | 1 |  |  |  |  |",
    ]


def test_flash_attention_4_alone_is_no_flash_attention_2(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    backward = replace(small("packed"), passes="bwd")
    assert providers.installed(backward) == []
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert providers.installed(backward) == ["flash_attn.cute", "flash_attn.cute deterministic"]
    assert providers.installed(small("packed")) == ["flash_attn.cute"]
    assert providers.installed(replace(small("alibi"), passes="bwd")) == []


@pytest.mark.parametrize("page", [None, 8])
def test_decoding(report, page, monkeypatch):
    monkeypatch.setattr(decoding, "CACHES", 1)
    decoding.decode(report, (3, 32, 4, 2, 16), page, CPU, "chunked", lambda: 100)
    (row,) = report.sections["decoding"]
    assert {"keyspan", "keyspan int8", "keyspan fp8"} <= set(row["ms"])
    for _, difference in row["of_bf16_speed_and_difference"].values():
        assert 0 < difference < 0.1
    name = "pages of 8" if page else "contiguous"
    assert f"* decode B3 N32 H4/2 D16 {name}: keyspan " in report.markdown()


def test_inputs_of_8_bits(report, monkeypatch):
    monkeypatch.setattr(decoding, "gpu_work", functools.partial(decoding.gpu_work, batch=2))
    decoding.forward_stored(report, "causal", 60, 1024, CPU, "chunked")
    (row,) = report.sections["8 bits"]
    assert set(row["tflops"]) == {"bf16", "fp8", "fp8 keys", "int8 keys"}
    assert row["difference"]["bf16"] == 0
    assert all(0 < row["difference"][name] < 0.1 for name in ("fp8", "fp8 keys", "int8 keys"))


def test_a_long_sequence(report):
    assert decoding.long(report, 300, CPU, "chunked") > 0
    assert "300 tokens, one head" in report.markdown()


def test_host_time(report):
    overhead(report, CPU, calls=1, turns=2)
    (row,) = report.sections["overhead"]
    assert {"bf16 keyspan", "bf16 keyspan, with gradients", "fp32 sdpa"} <= set(row["microseconds"])
    assert "× sdpa" in row["text"]
    assert all(x > 0 for x in row["microseconds"].values())


class _Event:
    """A CUDA event on a machine that has none."""

    def __init__(self, **_):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def test_the_clock_of_a_gpu(report, monkeypatch):
    flushed = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(clock, "flush", lambda: flushed.append(1))
    called = []
    times = clock.EventClock(milliseconds=40, most=7).times(lambda: called.append(time.sleep(0.002)))
    assert len(times) == 7
    assert len(called) == len(flushed) == 8  # one to find how many there is time for
    assert all(0.002 <= t < 1 for t in times)
    assert len(clock.EventClock(1e-6).times(lambda: None)) == 3
    monkeypatch.setattr(clock, "as_graph", lambda call: call)
    ceilings(report, CPU, quick=True)
    assert report.machine["gemm_tflops"] > 0
    assert report.machine["copy_tb_per_s"] > 0


def test_works_of_a_gpu_are_timed_by_events():
    assert isinstance(measure.clock_for(small("causal"), torch.device("cuda")), clock.EventClock)
    for work, device in ((works.TABLE["overhead"].work, torch.device("cuda")), (small("causal"), CPU)):
        assert isinstance(measure.clock_for(work, device), clock.WallClock)
