"""Losses fall the same in every form of a training step, and a form whose losses do not is seen."""

import json

import pytest
import torch

from keyspan import cli
from keyspan.bench import curves
from keyspan.training.packing import Batch


def test_every_form_has_the_same_losses(tmp_path, capsys):
    assert cli.main(["bench", "curves", "--steps", "8", "--no-compile", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "accumulated" in text
    rows = json.loads((tmp_path / "results.json").read_text())["curves"]
    first = rows[0]["form"]
    assert [row["form"] for row in rows if row["wanted"] is None] == [first, first, "another seed"]
    assert {f"eager, {name}" for name in ("chunked", "reference")} <= {row["form"] for row in rows}
    for row in rows:
        assert row["losses"][-1] < row["losses"][0]
        assert row["wanted"] is None or row["difference"] <= row["wanted"], row
    assert "not met" not in text


def test_a_form_that_trains_otherwise_is_seen(monkeypatch, tmp_path, capsys):
    whole = curves.split
    monkeypatch.setattr(curves, "split", lambda batch, parts: whole(batch, parts)[: max(1, parts - 1)])
    rows = curves.main(curves.Bench(steps=2, precisions=("fp32",), compile=False, out=tmp_path))
    met = {row.form: row.difference <= row.wanted for row in rows if row.wanted is not None}
    assert not met.pop("accumulated over 4 parts")
    assert all(met.values())


def test_parts_of_a_batch_are_its_documents():
    batch = Batch(torch.arange(6), torch.arange(6) + 1, [1, 3, 2])
    parts = curves.split(batch, 2)
    assert [part.lengths for part in parts] == [[1], [3, 2]]
    assert [part.tokens.tolist() for part in parts] == [[0], [1, 2, 3, 4, 5]]
    assert len(curves.split(batch, 8)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps: got 0, want at least 1"), ({"precisions": ("fp8",)}, "precisions: got 'fp8', want fp32")],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        curves.main(curves.Bench(**change))
