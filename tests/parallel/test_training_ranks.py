"""Training on several ranks: the losses of one process, in every arrangement."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

from keyspan.training import checkpoint
from keyspan.training.config import TrainConfig
from keyspan.training.evaluate import evaluate
from keyspan.training.loop import load_run, read_config, train
from keyspan.training.report import read_metrics

CONFIG = TrainConfig(
    task="sort", max_length=12, dim=16, layers=2, heads=2, kv_heads=1, hidden=16, tokens=96, accumulation=4, steps=4,
    lr=1e-2, warmup=2, eval_every=2, eval_tokens=128, checkpoint_every=2, device="cpu",
)  # fmt: skip


def curve(run):
    records = read_metrics(Path(run))
    return [r["loss"] for r in records if "loss" in r], [r["exact_match"] for r in records if "exact_match" in r]


def arrangements(*options: str) -> None:
    """Runs, one after another; those with "from" go on from half of another run, in an arrangement of their own."""
    for text in options:
        values = json.loads(text)
        if "from" in values:
            run = Path(values.pop("to"))
            if dist.get_rank() == 0:
                halve(Path(values["from"]), run)
            del values["from"]
            dist.barrier()
            config = replace(read_config(run), resume=run, **{"fsdp": False, "context": 1, **values})
        else:
            config = TrainConfig.from_json(text)
        train(config, quiet=True)


def as_json(**changes):
    values = {**json.loads(CONFIG.to_json()), **changes}
    return json.dumps({k: v for k, v in values.items() if v is not None})


ARRANGEMENTS = {
    "data": {}, "context": {"context": 2}, "fsdp": {"fsdp": True}, "context and fsdp": {"fsdp": True, "context": 2},
}  # fmt: skip


def test_every_arrangement_has_the_losses_of_one_process(tmp_path):
    """Two ranks; and the same run again from the checkpoint of another arrangement, one process among them."""
    train(replace(CONFIG, out=tmp_path / "one"), quiet=True)
    losses, held_out = curve(tmp_path / "one")
    options = [as_json(out=str(tmp_path / name), **changes) for name, changes in ARRANGEMENTS.items()]
    # Two go on from the last checkpoint but one, of step 2, of another.
    again = {"context and fsdp": "one", "data": "fsdp"}
    for name, before in again.items():
        places = {"from": str(tmp_path / before), "to": str(tmp_path / f"again {name}")}
        options.append(json.dumps(places | ARRANGEMENTS[name]))
    run_ranks(arrangements, 2, *options)
    for run in [*ARRANGEMENTS, *(f"again {name}" for name in again)]:
        got = curve(tmp_path / run)
        assert got[0] == pytest.approx(losses, abs=1e-5), run
        assert got[1] == held_out, run
    halve(tmp_path / "context and fsdp", tmp_path / "alone")
    train(replace(read_config(tmp_path / "alone"), fsdp=False, context=1, resume=tmp_path / "alone"), quiet=True)
    assert curve(tmp_path / "alone")[0] == pytest.approx(losses, abs=1e-5)
    assert evaluated(tmp_path / "fsdp") == pytest.approx(evaluated(tmp_path / "one"), abs=1e-5)


def evaluated(run):
    """The loss of a run's model, loaded in this process."""
    config, task, model = load_run(run)
    return evaluate(model, task.held_out(config.tokens, config.eval_tokens)).loss


def halve(run, to):
    """A copy of a run as it was at its last checkpoint but one."""
    shutil.copytree(run, to)
    shutil.rmtree(checkpoint.latest(to))
