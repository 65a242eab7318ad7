"""The inference benchmark: every provider answers the same trace, and one that fails is a line."""

import json

import pytest

from keyspan import cli
from keyspan.bench import inference
from keyspan.bench.inference import Bench, main, quantile, trace


def test_all_providers_answer_the_trace(tmp_path, capsys):
    words = "bench inference --shape tiny --dtype fp32 --requests 5 --longest 20 --answer 12 --prefix 9 --batch 2"
    assert cli.main([*words.split(), "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert "same answers" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == list(inference.PROVIDERS)
    for row in rows:
        assert row["note"] == ""
        assert row["same"] == 1.0
        assert 0 < row["first_p50"] <= row["first_p95"]
        assert row["single"] > 0


def test_a_provider_that_fails_is_a_line(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("not here")

    monkeypatch.setitem(inference.PROVIDERS, "transformers, padded", broken)
    rows = main(Bench(shape="tiny", dtype="fp32", requests=2, longest=9, answer=8, repeats=1, out=tmp_path))
    assert rows[0].tokens_per_second > 0
    assert rows[1].note == "RuntimeError: not here"


def test_the_trace_is_the_same_each_time_and_within_its_limits():
    options = Bench(requests=30, longest=50, answer=20, prefix=7)
    requests = trace(options, 100)
    assert requests == trace(options, 100)
    for request in requests:
        assert request.prompt[:7] == requests[0].prompt[:7]
        assert 8 <= len(request.prompt) - 7 <= 50
        assert 8 <= request.tokens <= 20
    assert len({len(request.prompt) for request in requests}) > 5
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert quantile([4.0, 3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(range(1, 21), 0.95) == 19


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "huge"}, "shape: got 'huge'"),
        ({"dtype": "fp8"}, "dtype: got 'fp8'"),
        ({"providers": ("mine",)}, "providers: got 'mine'"),
        ({"requests": 0}, "requests: got 0, want at least 1"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        main(Bench(**change))
