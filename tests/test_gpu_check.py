"""benchmarks/gpu_check.py as far as no GPU is needed: what it times, what it writes, that its parts fit together."""

import json
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

import keyspan

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from on_gpu import checks, clock, measure, providers, works
from on_gpu.board import Board
from on_gpu.workers import arriving, guarded, processes
from on_gpu.works import Work

KINDS = ("full", "causal", "packed", "window", "alibi", "table")


def test_works_differ_and_begin_with_the_quick_ones():
    every, quick = works.works(False), works.works(True)
    assert every[: len(quick)] == quick
    assert len(set(map(str, every))) == len(every)
    assert str(quick[0]) == "D128 B2 H16/16 N8192 causal"
    assert {w.kind for w in quick} == set(KINDS)
    assert all(w.B * w.N >= 16384 and w.H * w.D in (2048, 4096) and w.H % w.G == 0 for w in every)


@pytest.mark.parametrize("kind", KINDS)
def test_visible_pairs_are_those_of_the_mask(kind, monkeypatch):
    monkeypatch.setattr(works, "DOCUMENTS", [5, 40, 1, 14])
    monkeypatch.setattr(works, "WINDOW", 7)
    mask = works.mask_of(kind)
    want = 60 * 60 if mask is None else int(mask.materialize(60, 60).sum())
    w = Work(3, 4, 2, 60, 8, kind)
    assert w.visible == want
    assert w.flops(2) == 4 * want * 3 * 4 * 8


def test_the_documents_fill_the_work_that_is_timed():
    assert {w.N for w in works.works(False) if w.kind == "packed"} == {sum(works.DOCUMENTS)}


def test_jobs_are_known_in_other_processes():
    jobs = checks.jobs(1)
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
def test_a_bad_check_is_told(result, good, tmp_path, capsys):
    assert checks.report(iter([result]), 3, tmp_path / "check.jsonl") == good
    assert f"{int(good)} good, {int(not good)} bad, 2 not reached" in capsys.readouterr().out
    assert len((tmp_path / "check.jsonl").read_text().splitlines()) == 1


class _Event:
    def __init__(self, **_):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class _OnCpu(TorchFunctionMode):
    """What is asked for on the GPU is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {})}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A board, on a machine whose GPU is the CPU."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(clock, "flush", lambda: None)
    attention = keyspan.attention
    monkeypatch.setattr(keyspan, "attention", lambda *x, backend, **given: attention(*x, backend="chunked", **given))
    board = Board(tmp_path)
    board.head = {"torch": "2", "triton": "3", "device": "none", "matmul_tflops": 1e-3}
    with _OnCpu():
        yield board


def test_bench_and_what_is_written(board, monkeypatch):
    monkeypatch.setattr(works, "DOCUMENTS", [5, 40, 1, 14])
    chosen = {"keyspan": providers.ours, "flash": providers.sdpa(SDPBackend.MATH)}
    for kind in KINDS:
        measure.bench(board, Work(2, 4, 2, 60, 16, kind), chosen, lambda: 100)
    rows = json.loads((board.out / "bench.json").read_text())["rows"]
    assert [(r["kind"], r["direction"]) for r in rows] == [(k, d) for k in KINDS for d in ("forward", "backward")]
    for row in rows:
        w = Work(*(row[name] for name in Work._fields))
        products = 2 if row["direction"] == "forward" else 5
        assert set(row["tflops"]) == ({"keyspan", "flash"} if w.kind in works.PLAIN else {"keyspan"})
        for name, ms in row["ms"].items():
            assert row["tflops"][name] == pytest.approx(w.flops(products) / ms / 1e9)
        if w.kind in works.PLAIN:
            assert row["difference"] < 2e-2
            assert row["ratio"] == row["ms"]["flash"] / row["ms"]["keyspan"]
            assert row["best_peer"] == "flash"
    table = (board.out / "bench.md").read_text()
    assert table.count("| D16 B2 H4/2 N60 ") == len(rows)
    assert "| D16 B2 H4/2 N60 table | backward |" in table
    board.plot()
    assert (board.out / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", [None, 8])
def test_decoding(board, page, monkeypatch):
    monkeypatch.setattr(measure, "CACHES", 1)
    measure.decode(board, 3, 32, 4, 2, 16, page, lambda: 100)
    (row,) = board.rows
    assert {"keyspan", "keyspan int8", "keyspan fp8"} <= set(row["ms"])
    for _, difference in row["of_bf16_speed_and_difference"].values():
        assert 0 < difference < 0.1
    name = "pages of 8" if page else "contiguous"
    assert f"| B3 N32 H4/2 D16 {name} | keyspan " in (board.out / "bench.md").read_text()


def test_a_long_sequence(board):
    assert measure.long(board, 300) > 0
    assert "300 tokens, one head" in (board.out / "bench.md").read_text()
