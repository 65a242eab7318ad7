"""`keyspan report`: the page, and what a browser makes of it; the progress line."""

import io
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from keyspan.cli import main
from keyspan.models.gpt import GPT, GPTConfig
from keyspan.training.config import TrainConfig
from keyspan.training.html import chart, ticks
from keyspan.training.loop import train
from keyspan.training.packing import Batch
from keyspan.training.report import Report, read_metrics, short, step_flops

CONFIG = TrainConfig(
    task="sort", max_length=8, dim=16, layers=1, heads=2, kv_heads=2, hidden=16, tokens=64, steps=12, warmup=2,
    eval_every=4, eval_tokens=64, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in {"plain": {}, "<b>fast": {"lr": 1e-2, "steps": 6}}.items():
        train(replace(CONFIG, out=folder / name, **changes), quiet=True)
    runs = [str(folder / name) for name in ("plain", "<b>fast")]
    out = folder / "report.html"
    assert main(["report", *runs, "--out", str(out), "--samples", "bca=", "--sample-tokens", "5"]) == 0
    return out


def test_the_page_needs_nothing_else_and_shows_all(page):
    text = page.read_text()
    assert not re.search(r"<script|https?:|src=|@import|url\(", text)
    assert "<b>fast" not in text
    assert text.count("&lt;b&gt;fast") >= 3
    for title in ("Training loss", "Held-out exact match", "Tokens per second", "Gradient norm", "Peak memory"):
        assert f"<h2>{title}" in text
    assert text.count("<polyline") >= 10
    assert "12 of 12" in text
    steps = [r for r in read_metrics(page.parent / "plain") if "loss" in r]
    assert f"{100 * sum(r['tokens'] for r in steps) / (64 * 12):.1f} %" in text
    assert "6 of 6" in text
    differing = text[text.index("Where the runs differ") : text.index("<details>")]
    assert "<td>lr</td>" in differing
    assert "<td>dim</td>" not in differing
    assert "Samples" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_lays_it_out(page, tmp_path, width):
    measure = "<script>document.title = [document.documentElement.scrollWidth, innerWidth, " + (
        "new Set([...document.querySelectorAll('.charts .card')].map(x => x.offsetLeft)).size].join()</script></body>"
    )
    copy = tmp_path / "measured.html"
    copy.write_text(page.read_text().replace("</body>", measure))
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [*words, f"--window-size={width},900", "--hide-scrollbars", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    wide, window, columns = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", found).groups())
    assert wide <= window
    assert columns == (2 if width == 1280 else 1)


def test_charts():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3.0, 17.0) == [0, 5, 10, 15]
    assert "not recorded" in chart([("#000", [])], str)
    assert "<circle" in chart([("#000", [(1.0, 2.0)])], str)
    assert [short(x) for x in (3, 999, 1234, 5.6e6, 7.89e9, 1e12)] == ["3", "999", "1.23k", "5.6M", "7.89G", "1T"]


@pytest.mark.parametrize(("words", "message"), [([], "runs: got none"), (["nowhere"], "nowhere: holds no config.json")])
def test_wrong_runs(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 1
    assert message in capsys.readouterr().err


def test_the_progress_line_fits_50_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    with Report(tmp_path, 0, 100_000) as report:
        console = Console(width=50, file=io.StringIO(), force_terminal=True)
        report.step(12_345, loss=10.2345, tokens=123_456_789_000, tokens_per_second=1_234_567.0, mfu=0.456)
        console.print(report._progress.get_renderable())
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    line = next(line for line in text.splitlines() if "12345/100000" in line.replace(" ", ""))
    assert "10.2345 1.23M/s 123G 46%" in line
    assert len(line.rstrip()) <= 50
    assert "…" not in line


def test_flops_of_a_step():
    model = GPT(GPTConfig(vocab_size=32, dim=16, layers=2, heads=2, kv_heads=1, hidden=64, tie_embeddings=False))
    per_block = 16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 64
    tokens = torch.zeros(5, dtype=torch.int64)
    want = 6 * 5 * (2 * per_block + 32 * 16) + 12 * (6 + 3) * 2 * 16
    assert step_flops(model, [Batch(tokens, tokens, [3, 2])]) == want
