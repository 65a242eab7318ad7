"""Training on several ranks: the losses of one process, in every arrangement."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from keyspan.backends.native import binding
from keyspan.cli import parse_train
from keyspan.training import checkpoint, loop
from keyspan.training.config import TrainConfig
from keyspan.training.evaluate import evaluate
from keyspan.training.loop import load_run, read_config, take_step, train
from keyspan.training.prepare import Prepare, prepare
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
            config = replace(read_config(run), resume=run, **{"fsdp": False, "context": 1, "tensor": 1, **values})
        else:
            config = TrainConfig.from_json(text)
        train(config, quiet=True)


def as_json(**changes):
    values = {**json.loads(CONFIG.to_json()), **changes}
    return json.dumps({k: v for k, v in values.items() if v is not None})


ARRANGEMENTS = {
    "context": {"context": 2}, "fsdp": {"fsdp": True, "invariant": binding.LIBRARY is not None},
    "context and fsdp": {"fsdp": True, "context": 2},
}  # fmt: skip


def test_every_arrangement_has_the_losses_of_one_process(tmp_path):
    """Two ranks; data parallelism goes on from half of the run with FSDP, one process from half of the last one."""
    train(replace(CONFIG, out=tmp_path / "one"), quiet=True)
    losses, held_out = curve(tmp_path / "one")
    options = [as_json(out=str(tmp_path / name), **changes) for name, changes in ARRANGEMENTS.items()]
    options.append(as_json(out=str(tmp_path / "fsdp in bf16"), fsdp=True, precision="bf16"))
    options.append(json.dumps({"from": str(tmp_path / "fsdp"), "to": str(tmp_path / "data")}))
    run_ranks(arrangements, 2, *options)
    for run in [*ARRANGEMENTS, "data"]:
        got = curve(tmp_path / run)
        assert got[0] == pytest.approx(losses, abs=1e-5), run
        assert got[1] == held_out, run
    halve(tmp_path / "context and fsdp", tmp_path / "alone")
    train(replace(read_config(tmp_path / "alone"), fsdp=False, context=1, resume=tmp_path / "alone"), quiet=True)
    assert curve(tmp_path / "alone")[0] == pytest.approx(losses, abs=1e-5)
    assert evaluated(tmp_path / "fsdp") == pytest.approx(evaluated(tmp_path / "one"), abs=1e-5)
    train(replace(CONFIG, precision="bf16", out=tmp_path / "bf16"), quiet=True)
    rounded, other = curve(tmp_path / "bf16")[0], curve(tmp_path / "fsdp in bf16")[0]
    far = max(abs(a - b) for a, b in zip(rounded, losses, strict=True))
    assert far > 1e-5
    assert other == pytest.approx(rounded, abs=far), "farther apart than bf16 and fp32"
    damaged_parts(tmp_path / "fsdp")


def damaged_parts(run):
    """A part of a rank that was altered, cut or lost is named, beside the last checkpoint that is whole."""
    older, newest = sorted((run / "checkpoints").iterdir())
    part = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = part.read_bytes()
    altered = bytearray(data)
    altered[len(data) // 2] ^= 1
    for found, message in ((altered, "damaged or foreign"), (data[:-1], "truncated or foreign"), (None, "missing")):
        part.unlink()
        if found is not None:
            part.write_bytes(found)
        with pytest.raises(ValueError, match=rf"{part.name}: {message}.*{older.name} is undamaged"):
            load_run(run)
    part.write_bytes(data)
    load_run(run)


WIDE = {"heads": 4, "kv_heads": 2}
TENSOR = {
    "context × fsdp × tensor": {"fsdp": True, "context": 2, "tensor": 2},
    "fsdp × tensor": {"from": "one", "fsdp": True, "tensor": 2},
    "context × tensor": {"from": "context × fsdp × tensor", "context": 2, "tensor": 2},
    "data × tensor": {"from": "tensor", "tensor": 2},
}  # fmt: skip
"""On four ranks. "from": goes on from half of another run, so that its second half is computed in this arrangement."""


def test_tensor_parallelism_has_the_losses_of_one_process(tmp_path):
    """Alone on two ranks and beside all other kinds, on meshes of one to three dimensions, from others' checkpoints."""
    train(replace(CONFIG, **WIDE, out=tmp_path / "one"), quiet=True)
    losses, held_out = curve(tmp_path / "one")
    alibi = {**WIDE, "positions": "alibi", "tie_embeddings": False, "steps": 2}
    train(replace(CONFIG, **alibi, out=tmp_path / "alibi"), quiet=True)
    two = [as_json(**WIDE, out=str(tmp_path / "tensor"), tensor=2)]
    run_ranks(arrangements, 2, *two, as_json(**alibi, out=str(tmp_path / "alibi of two"), tensor=2))
    assert curve(tmp_path / "alibi of two")[0] == pytest.approx(curve(tmp_path / "alibi")[0], abs=1e-5)
    options = []
    for name, changes in TENSOR.items():
        if "from" in changes:
            places = {"from": str(tmp_path / changes["from"]), "to": str(tmp_path / name)}
            options.append(json.dumps(changes | places))
        else:
            options.append(as_json(**WIDE, out=str(tmp_path / name), **changes))
    run_ranks(arrangements, 4, *options)
    for run in ["tensor", *TENSOR]:
        got = curve(tmp_path / run)
        assert got[0] == pytest.approx(losses, abs=1e-5), run
        assert got[1] == held_out, run
    halve(tmp_path / "context × fsdp × tensor", tmp_path / "alone")
    changes = {"fsdp": False, "context": 1, "tensor": 1, "resume": tmp_path / "alone"}
    train(replace(read_config(tmp_path / "alone"), **changes), quiet=True)
    assert curve(tmp_path / "alone")[0] == pytest.approx(losses, abs=1e-5)
    assert evaluated(tmp_path / "fsdp × tensor") == pytest.approx(evaluated(tmp_path / "one"), abs=1e-5)


def test_a_mixed_run_goes_on_on_another_number_of_ranks(tmp_path):
    """Two sources by weight: one process, then two ranks, then one process again have the losses of one process."""
    folders = []
    for n, words in enumerate((("red", "green", "blue"), ("one", "two", "three", "four"))):
        source = random.Random(n)
        lines = [" ".join(source.choices(words, k=source.randint(3, 40))) for _ in range(400)]
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        folders.append(prepare(Prepare((tmp_path / f"{n}.jsonl",), tmp_path / f"source{n}", held_out=0.1)))
    data = tuple(f"{folder}:{weight}" for folder, weight in zip(folders, (0.7, 0.3), strict=True))
    config = replace(CONFIG, task="data", data=data, max_length=64, max_documents=4, steps=6, checkpoint_every=3)
    assert TrainConfig.from_json(config.to_json()) == config
    train(replace(config, out=tmp_path / "whole"), quiet=True)
    places = {"from": str(tmp_path / "whole"), "to": str(tmp_path / "parts")}  # goes on behind step 3
    run_ranks(arrangements, 2, json.dumps({**places, "checkpoint_every": 1}))
    halve(tmp_path / "parts", tmp_path / "last")  # behind step 5
    train(replace(config, checkpoint_every=1, resume=tmp_path / "last"), quiet=True)
    whole, parts, last = (read_metrics(tmp_path / name) for name in ("whole", "parts", "last"))
    for records in (parts, last):
        assert [r["loss"] for r in records if "loss" in r] == pytest.approx(
            [r["loss"] for r in whole if "loss" in r], abs=1e-5
        )
    bits = [[r["bits_per_byte"] for r in records if "bits_per_byte" in r] for records in (whole, parts, last)]
    assert bits[1] == pytest.approx(bits[0], abs=1e-5)
    assert bits[2] == pytest.approx(bits[0], abs=1e-5)


def evaluated(run):
    """The loss of a run's model, loaded in this process."""
    config, task, model = load_run(run)
    return evaluate(model, task.held_out(config.tokens, config.eval_tokens)).loss


def halve(run, to):
    """A copy of a run as it was at its last checkpoint but one."""
    shutil.copytree(run, to)
    shutil.rmtree(checkpoint.latest(to))


def at_call(number, action):
    """`take_step`, with something done before its call of this number, on rank 1."""
    calls = iter(range(1, 1000))

    def step(*arguments):
        if next(calls) == number and dist.get_rank() == 1:
            action(*arguments)
        return take_step(*arguments)

    return patch.object(loop, "take_step", step)


def faults(folder: str) -> None:
    """What happens to rank 1 is decided upon by both."""
    base = replace(CONFIG, steps=4, checkpoint_every=2, eval_every=100)

    with at_call(2, lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
        result = train(replace(base, out=Path(folder) / "terminated"), quiet=True)
    assert result.interrupted
    assert result.step == 2
    train(replace(base, resume=Path(folder) / "terminated"), quiet=True)
    train(replace(base, out=Path(folder) / "whole"), quiet=True)
    assert curve(Path(folder) / "terminated") == curve(Path(folder) / "whole"), "in one arrangement, bit by bit"

    calls = iter(range(1, 1000))

    def third_is_nan(*arguments):
        if next(calls) != 3 or dist.get_rank() != 1:
            return take_step(*arguments)
        hook = arguments[5].register_forward_hook(lambda module, inputs, loss: loss * math.nan)
        found = take_step(*arguments)
        hook.remove()
        return found

    with patch.object(loop, "take_step", third_is_nan):
        train(replace(base, on_spike="skip", out=Path(folder) / "skipped"), quiet=True)
    if dist.get_rank() == 0:
        records = read_metrics(Path(folder) / "skipped")
        assert [r["step"] for r in records if "refused" in r] == [3]
        assert [r["step"] for r in records if "loss" in r] == [1, 2, 4]
        assert all(math.isfinite(r["loss"]) for r in records if "loss" in r)
    dist.barrier()

    def spoil(model, *_):
        with torch.no_grad():
            model.norm.weight[0] = math.nan

    with at_call(3, spoil), pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.* up to step 2"):
        train(replace(base, out=Path(folder) / "spoilt"), quiet=True)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*_):
        while not (Path(folder) / "full" / "checkpoints" / "step-00000002").exists():  # is written in the background
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    with (
        at_call(3, fill),
        pytest.raises(OSError, match=r"\.step-00000004: the checkpoint could not be written \(.*File too large"),
    ):
        train(replace(base, out=Path(folder) / "full", context=2), quiet=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest(Path(folder) / "full").name == "step-00000002"
    checkpoint.verify(checkpoint.latest(Path(folder) / "full"))
    train(replace(base, resume=Path(folder) / "full", context=2), quiet=True)


def test_faults_of_one_rank(tmp_path):
    """SIGTERM, a NaN and a full disk on one of two ranks: both stop alike, and a resumed run has the same losses."""
    run_ranks(faults, 2, str(tmp_path))
    train(replace(CONFIG, steps=4, eval_every=100, out=tmp_path / "one"), quiet=True)
    for run in ("terminated", "full"):
        assert curve(tmp_path / run)[0] == pytest.approx(curve(tmp_path / "one")[0], abs=1e-5)


KILLED = """
import os, signal, sys
from keyspan import cli
from keyspan.training import loop
step, calls = loop.take_step, iter(range(1, 1000))
def killed(*arguments):
    if next(calls) == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
loop.take_step = killed
sys.exit(cli.main(sys.argv[1:]))
"""


OPTIONS = (
    "--task sort --max-length 12 --dim 16 --layers 1 --heads 2 --kv-heads 1 --hidden 16 --tokens 96 --accumulation 2 "
    "--warmup 2 --eval-every 1000000 --device cpu"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_killed_rank_is_started_again_by_torchrun(tmp_path):
    """The run goes on from its last checkpoint, and ends with the losses of one that nobody killed."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    options = [*OPTIONS.split(), "--steps", "6", "--checkpoint-every", "2", "--out"]
    words = [*TORCHRUN, "--max-restarts", "1", str(script), "train", *options, str(tmp_path / "run")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "-9" in done.stderr
    train(parse_train([*options, str(tmp_path / "one")]), quiet=True)
    assert curve(tmp_path / "run")[0] == pytest.approx(curve(tmp_path / "one")[0], abs=1e-5)
    assert "bits" in done.stdout or "exact match" in done.stdout
    assert done.stdout.count("run folder") == 1


def test_sigterm_to_torchrun_saves_the_run(tmp_path):
    """As a cluster sends it before the time is up: the ranks save after the step in hand, and the run goes on."""
    run = tmp_path / "run"
    words = [
        *TORCHRUN,
        "-m",
        "keyspan",
        "train",
        *OPTIONS.split(),
        "--steps",
        "1000000",
        "--checkpoint-every",
        "1000000",
    ]
    process = subprocess.Popen(
        [*words, "--fsdp", "--out", str(run)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not run.exists() or len(curve(run)[0]) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    taken = curve(run)[0]
    assert checkpoint.latest(run).name == f"step-{len(taken):08d}"
    assert f"interrupted after step {len(taken)}" in out
    train(replace(read_config(run), fsdp=False, resume=run, steps=len(taken) + 2), quiet=True)
    assert curve(run)[0][: len(taken)] == taken
    assert len(curve(run)[0]) == len(taken) + 2
