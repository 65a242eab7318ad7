"""The inference benchmark: every provider answers the same trace, and one that fails is a line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from keyspan import cli
from keyspan.bench import inference
from keyspan.bench.inference import Bench, main, quantile, trace


def test_all_providers_answer_the_trace(tmp_path, capsys):
    words = "bench inference --shape tiny --dtype fp32 --requests 5 --longest 20 --answer 12 --prefix 9 --batch 2"
    assert cli.main([*words.split(), "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert "same answers" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["inference"]
    assert [row["provider"] for row in rows] == [*inference.PROVIDERS, *inference.PEERS]
    for row in rows[len(inference.PROVIDERS) :]:
        assert row["note"] == "not installed here"
    for row in rows[: len(inference.PROVIDERS)]:
        assert row["note"] == ""
        assert row["same"] == 1.0 or "int8" in row["provider"]
        assert (row["memory_share"] is None) == ("int8" in row["provider"])
        assert 0 < row["first_p50"] <= row["first_p95"]
        assert row["single"] > 0
        if Path("/proc/self/clear_refs").exists():
            assert row["memory"] > 0


def test_a_provider_that_fails_is_a_line(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("not here")

    monkeypatch.setitem(inference.PROVIDERS, "transformers, padded", broken)
    rows = main(Bench(shape="tiny", dtype="fp32", requests=2, longest=9, answer=8, repeats=1, out=tmp_path))
    assert rows[0].tokens_per_second > 0
    assert {row.provider: row.note for row in rows}["transformers, padded"] == "RuntimeError: not here"


def test_the_trace_is_the_same_each_time_and_within_its_limits():
    options = Bench(requests=30, longest=50, answer=20, prefix=7)
    requests = trace(options, 100)
    assert requests == trace(options, 100)
    again = trace(options, 100, repeat=1)
    assert [(len(x.prompt), x.tokens) for x in again] == [(len(x.prompt), x.tokens) for x in requests]
    assert all(x.prompt != y.prompt for x, y in zip(requests, again, strict=True))
    for request in requests:
        assert request.prompt[:7] == requests[0].prompt[:7]
        assert 8 <= len(request.prompt) - 7 <= 50
        assert 8 <= request.tokens <= 20
    assert len({len(request.prompt) for request in requests}) > 5
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert quantile([4.0, 3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(range(1, 21), 0.95) == 19


def test_a_peer_of_another_environment_answers_or_says_why(tmp_path):
    """A stand-in for its Python, which answers each request with its prompt's first tokens, then fails."""
    peer = tmp_path / "python"
    peer.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "for line in iter(sys.stdin.readline, ''):\n"
        "    found = [prompt[:n] for prompt, n in json.loads(line)]\n"
        "    times = [[i + 1.0 for i, _ in enumerate(x)] for x in found]\n"
        "    if any(len(x) > 4 for x in found): sys.exit('too long')\n"
        "    print(json.dumps({'tokens': found, 'times': times, 'seconds': 2.0}), flush=True)\n"
    )
    peer.chmod(0o755)
    run = inference.Peer("vllm", str(peer), "", tmp_path, Bench(), torch.device("cpu"))
    served = run([inference.Request([5, 6, 7], 2), inference.Request([8], 1)])
    assert (served.tokens, served.seconds) == ([[5, 6], [8]], 2.0)
    with pytest.raises(RuntimeError, match="too long"):
        run([inference.Request([1] * 9, 9)])
    run.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "huge"}, "shape: got 'huge'"),
        ({"dtype": "fp8"}, "dtype: got 'fp8'"),
        ({"providers": ("mine",)}, "providers: got 'mine'"),
        ({"peers": ("llama=python",)}, "peers: got 'llama=python', want KIND=PYTHON"),
        ({"requests": 0}, "requests: got 0, want at least 1"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        main(Bench(**change))
