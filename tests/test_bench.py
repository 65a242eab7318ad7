"""The benchmark: every row comes out at tiny sizes, a wrong provider gets no ratio, and nothing measured is lost."""

import json
from dataclasses import replace

import pytest
import torch

from keyspan import cli
from keyspan.bench import attention, measure, providers
from keyspan.bench.attention import Bench, main
from keyspan.bench.bandwidth import fastest_turns
from keyspan.bench.measure import NOISY, Row, compare_rates, spread
from keyspan.bench.report import draw, line, summary, verdict
from keyspan.bench.works import DTYPES, TABLE

CPU = torch.device("cpu")
WORKS = {name: target.work.quick() for name, target in TABLE.items()}


def measured(row, provider, dtype="fp32"):
    """The rows of Keyspan and of another provider on one work, tiny."""
    work = WORKS[row]
    makers = {"keyspan": lambda: providers.make("keyspan", work, DTYPES[dtype], CPU), "other": lambda: provider}
    return measure.measure(row, work, (dtype, DTYPES[dtype]), makers, {}, CPU, repeats=1)


def test_every_row_and_the_sweep_are_measured(tmp_path, capsys):
    words = f"bench attention --quick --no-flex --dtypes fp32 bfloat16 --lengths 512 1024 --out {tmp_path}"
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["threads"] == torch.get_num_threads()
    for name, target in TABLE.items():
        for dtype in ("fp32", "bf16"):
            rows = {r["provider"]: r for r in found["table"] if r["row"] == name and r["dtype"] == dtype}
            assert set(rows) == {"keyspan", *target.against} - {"flex"}
            for row in rows.values():
                assert row["note"] == ""  # one timing has no spread
                assert row["ratio"] > 0
                assert (row["milliseconds"] is None) == (row["provider"] == "bound")
        assert f"| {name} | {target.work.quick().title} | {', '.join(target.against)} |" in shown
    assert {r["row"] for r in found["sweep"]} == {"causal 8", "causal 16"}
    assert {"keyspan:chunked", "sdpa", "dense softmax"} <= {r["provider"] for r in found["sweep"]}
    assert all(r["milliseconds"] > 0 and r["peak_mib"] > 0 for r in found["sweep"])
    assert (tmp_path / "results.png").stat().st_size > 0
    draw(found, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "results.png").read_bytes()
    assert summary([Row(**r) for r in found["table"]], ("fp32", "bf16")) in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("row", "wrong", "name"),
    [
        ("causal", lambda x, out: out * 1.05, "out"),
        ("causal-train", lambda x, out: out * 1.05, "out"),
        ("causal-train", lambda x, out: out.detach() + 0 * x.query + 0 * x.key + 0 * x.value, "dquery"),
        ("causal-train", lambda x, out: out.detach() + 1.05 * (out - out.detach()), "dquery"),
        ("relative-train", lambda x, out: out + 0.05 * (x.table - x.table.detach()).sum(), "dtable"),
    ],
)
def test_a_wrong_provider_is_refused(row, wrong, name, dtype):
    right = providers.make("sdpa", WORKS[row], DTYPES[dtype], CPU)
    ours, refused = measured(row, lambda x: wrong(x, right(x)), dtype)
    assert refused.note.startswith(f"WRONG: {name} differs from the reference by ")
    assert (refused.milliseconds, refused.rate, refused.ratio, refused.peak_mib) == (None, None, None, None)
    assert verdict([ours, refused], dtype) == f"other {refused.note}"
    _, accepted = measured(row, right, dtype)
    assert accepted.note == ""
    assert accepted.ratio > 0


def test_nothing_is_compared_with_a_wrong_result_of_keyspan(monkeypatch):
    right = providers.make("sdpa", WORKS["full"], torch.float32, CPU)
    monkeypatch.setattr("keyspan.attention", lambda q, k, v, **_: q + 0 * (k.sum() + v.sum()))
    ours, other = measured("full", right)
    assert ours.note.startswith("WRONG: out")
    assert other.milliseconds > 0
    assert (ours.ratio, other.ratio) == (None, None)


def test_a_failing_provider_is_shown_with_its_error():
    def fails(x):
        raise RuntimeError("no kernel\nfor this")

    _, other = measured("full", fails)
    assert other.note == "cannot: RuntimeError: no kernel"


def test_the_best_of_the_others_counts():
    def row(provider, ratio, note=""):
        return Row("documents-train", "", provider, "fp32", "fwd+bwd", ratio=ratio, note=note)

    ours = row("keyspan", 1.0)
    assert verdict([ours, row("sdpa", 9.0), row("sdpa padded", 3.1)], "fp32") == "3.10 (wanted 3.00: met)"
    assert verdict([ours, row("sdpa", 9.0), row("sdpa padded", 2.9)], "fp32") == "2.90 (wanted 3.00: short)"
    assert verdict([ours, row("sdpa", 9.0), row("sdpa padded", None, "WRONG")], "fp32") == (
        "9.00 (wanted 3.00: met); sdpa padded WRONG"
    )
    assert verdict([ours], "fp32") == "not measured"
    assert verdict([ours, row("sdpa", 2.0)], "fp16") == "2.00"


def test_timings_that_spread_give_no_ratio():
    def row(provider, spread, rate=1.0):
        return Row("full", "", provider, "fp32", "fwd", milliseconds=1.0, rate=rate, spread=spread)

    assert spread([1.0]) == 0
    assert spread([1.0, 1.0, 1.0, 1.0, 9.0]) == 0  # one outlier
    assert spread([1.0, 1.0, 9.0, 9.0]) == 8 / 5
    for rows in ([row("keyspan", 0.1), row("sdpa", 2.0)], [row("keyspan", 2.0), row("sdpa", 0.1)]):
        noisy = rows[0] if rows[0].spread > 1 else rows[1]
        compare_rates(rows)
        assert rows[1].ratio is None
        assert rows[1].note == f"no ratio: the timings of {noisy.provider} spread by 200%"
        assert line(rows[1]).endswith(f"| {rows[1].note} |")
        assert verdict(rows, "fp32") == rows[1].note
    fine = [row("keyspan", NOISY), row("sdpa", NOISY, rate=0.5)]
    compare_rates(fine)
    assert fine[1].ratio == 2.0


def test_turns_that_anything_held_up_do_not_count_beside_a_read():
    reads = [1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    calls = [9.0, 2.0, 2.0, 2.0, 2.5, 5.0, 5.0, 5.0]  # the first was held up, and so was a read beside two others
    assert fastest_turns(reads, calls) == [(1.0, 2.0), (1.0, 2.5)]
    assert fastest_turns([1.0, 2.0], [4.0]) == [(1.5, 4.0)]


def test_results_are_kept_when_interrupted(tmp_path, monkeypatch):
    real = attention.measure_target

    def stopped(name, *rest):
        if name == "overhead":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(attention, "measure_target", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(Bench(rows=("full", "overhead"), dtypes=("fp32",), quick=True, sweep=False, out=tmp_path))
    rows = json.loads((tmp_path / "results.json").read_text())["table"]
    assert [(r["row"], r["provider"]) for r in rows] == [("full", "keyspan"), ("full", "sdpa")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rows full fast", "rows: got 'fast', want one of full, causal, "),
        ("--dtypes fp8", "dtypes: got 'fp8', want one of fp32, bf16, fp16"),
        ("--shape huge", "shape: got 'huge', want one of gpt2, "),
        ("--repeats 0", "repeats: got 0, want at least 1"),
    ],
)
def test_wrong_options(capsys, tmp_path, options, message):
    assert cli.main(["bench", "attention", "--out", str(tmp_path / "x"), *options.split()]) == 1
    assert capsys.readouterr().err.startswith(f"keyspan: {message}")
    assert not (tmp_path / "x").exists()


def test_the_bound_on_memory_is_linear():
    for name in ("memory", "memory-train"):
        work = TABLE[name].work
        tokens, threads = 32768, 2
        longer = replace(work, lengths=(2 * tokens,))
        tiles = threads * 2**21
        once, twice = (w.memory_bound(torch.float32, threads) - tiles for w in (work, longer))
        assert (work.M, work.N, twice) == (tokens, tokens, 2 * once)
