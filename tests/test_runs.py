"""Run folders: what stands in them, how a run stops, goes on, and what is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from keyspan import cli
from keyspan.backends.native import binding
from keyspan.cli import parse_train
from keyspan.inference import Engine, Sampling
from keyspan.layers import gemm, linear_cross_entropy
from keyspan.training import checkpoint, loop
from keyspan.training.data import is_held_out
from keyspan.training.loop import (
    autocast,
    learning_rate,
    load_run,
    make_task,
    read_config,
    take_step,
    train,
)
from keyspan.training.report import read_metrics
from test_training import TINY, losses

pytestmark = pytest.mark.usefixtures("few_held_out_problems")


def test_figures_for_tensorboard(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(TINY, steps=3, tensorboard=True, out=tmp_path / "run"), quiet=True)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    records = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert [(x.step, x.value) for x in found.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in records
    ]
    assert {"grad_norm", "lr", "tokens_per_second", "exact_match"} <= set(found.Tags()["scalars"])


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert cli.main(["train", "--task", "copy", "--tensorboard", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "keyspan: train needs tensorboard: pip install 'keyspan[tensorboard]'\n"
    assert not (tmp_path / "run").exists()


def test_files_of_a_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = replace(TINY, steps=10)
    result = train(config)
    assert result.run == os.path.join("runs", "reverse")  # noqa: PTH118 (as the platform writes it)
    run = tmp_path / "runs" / "reverse"
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "result.json",
    }
    assert read_config(run) == config
    assert json.loads((run / "result.json").read_text())["held_out"] == result.held_out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    checks = [(record["step"], record["exact_match"]) for record in read_metrics(run) if "exact_match" in record]
    assert [step for step, _ in checks] == [5, 10]
    assert checks[-1][1] == result.held_out
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["lr"] for record in records] == [learning_rate(config, step) for step in range(10)]
    assert all(80 <= record["tokens"] <= 96 for record in records)
    assert records[-1]["seconds"] == result.seconds
    shown = capsys.readouterr().out
    assert "parameters, fp32 on cpu" in shown
    assert "exact match" in shown
    assert train(config, quiet=True).run == os.path.join("runs", "reverse-2")  # noqa: PTH118


def test_a_run_stops_at_stop_at(tmp_path):
    config = replace(TINY, task="copy", max_length=2, steps=4000, lr=2e-2, tokens=256, stop_at=0.05, eval_every=20)
    result = train(replace(config, out=tmp_path / "run"), quiet=True)
    assert result.held_out >= 0.05
    assert result.step < 4000
    assert result.step % 20 == 0
    assert checkpoint.latest(tmp_path / "run").name == f"step-{result.step:08d}"


def test_training_on_text_with_baselines(tmp_path, monkeypatch):
    source = tmp_path / "library"
    source.mkdir()
    for i in range(60):
        (source / f"m{i}.py").write_bytes(b"def f(x):\n    return x\n" * (1 + i % 5))
    assert 0 < sum(is_held_out(f"m{i}.py") for i in range(60)) < 60
    monkeypatch.setattr("keyspan.training.data.sysconfig.get_path", lambda name: str(source))
    from keyspan.training.data import _documents, _split

    _split.cache_clear(), _documents.cache_clear()
    config = replace(TINY, task="stdlib", max_length=64, tokens=512, steps=60, lr=2e-2, precision="bf16")
    result = train(replace(config, out=tmp_path / "run"), quiet=True)
    _split.cache_clear(), _documents.cache_clear()
    assert result.metric == "bits_per_byte"
    assert result.held_out < 3  # of 8 for a model that knows nothing
    assert set(result.baselines) == {"bigram", "gzip -9, each file", "gzip -9, one stream"}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, sent):
    if not hasattr(signal, sent):
        pytest.skip("not a signal of this system")
    run = tmp_path / "run"
    options = "--task copy --max-length 4 --dim 16 --tokens 64 --steps 100000 --eval-every 100000 --device cpu"
    command = [sys.executable, "-m", "keyspan", "train", *options.split(), "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        records = (run / "metrics.jsonl").read_text()
        with pytest.raises(ValueError, match="another process trains in this folder"):
            train(replace(read_config(run), resume=run), quiet=True)
        assert (run / "metrics.jsonl").read_text().startswith(records)
        process.send_signal(getattr(signal, sent))
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    step = losses(run)[-1][0]
    assert f"interrupted after step {step}; go on with: keyspan train --resume {run}" in out.replace("\n", " ")
    assert checkpoint.latest(run).name == f"step-{step:08d}"
    assert json.loads((run / "result.json").read_text())["interrupted"]
    result = train(replace(read_config(run), resume=run, steps=step + 2), quiet=True)
    assert result.step == step + 2
    assert [number for number, _ in losses(run)] == list(range(1, step + 3))


def test_ctrl_c_in_the_last_evaluation_ends_a_run_that_is_done(tmp_path, monkeypatch):
    from keyspan.training import loop

    def evaluate(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return loop.evaluate.__wrapped__(*arguments)

    evaluate.__wrapped__ = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", evaluate)
    result = train(replace(TINY, steps=2, out=tmp_path / "run"), quiet=True)
    assert (result.step, result.interrupted) == (2, False)
    assert result.held_out is not None


def test_ctrl_c_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(replace(TINY, steps=1, out=tmp_path / "run"), quiet=True)
    assert signal.getsignal(signal.SIGINT) is before


def test_load_run(tmp_path):
    train(replace(TINY, out=tmp_path / "run"), quiet=True)
    config, task, model = load_run(tmp_path / "run", "cpu")
    assert config == TINY
    assert task == make_task(TINY)
    assert not model.training
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_run(tmp_path)


def test_a_run_of_another_model_is_refused(tmp_path):
    train(replace(TINY, steps=2, out=tmp_path / "run"), quiet=True)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"layers: got 3, but .*run was begun with 2"):
        train(replace(read_config(tmp_path / "run"), resume=tmp_path / "run", layers=3, steps=4), quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert read_config(tmp_path / "run").layers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sort"}, "task: got sort, but .* was begun with reverse"),
        ({"rope_theta": 500.0}, r"rope_theta: got 500.0, but .* was begun with 10000.0"),
        ({"seed": 1}, "seed: got 1, but .* was begun with 0"),
        ({"steps": 3}, "steps: got 3, but .* is at step 4; want at least that many"),
    ],
)
def test_a_resume_that_contradicts_the_run_is_refused(tmp_path, change, message):
    run = tmp_path / "run"
    train(replace(TINY, steps=4, out=run), quiet=True)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(replace(read_config(run), resume=run, **change), quiet=True)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_resume_says_what_is_changed(tmp_path, capsys):
    run = tmp_path / "run"
    train(replace(TINY, steps=2, out=run), quiet=True)
    train(replace(read_config(run), resume=run, steps=3, lr=0.5))
    shown = " ".join(capsys.readouterr().out.split())
    assert "changed: steps from 2 to 3" in shown
    assert "changed: lr from 0.01 to 0.5" in shown
    assert "changed: tokens" not in shown


@pytest.mark.skipif(binding.LIBRARY is None, reason="products are then torch's, which are not invariant")
def test_an_invariant_run(tmp_path, monkeypatch, capsys):
    """The switch reaches the model, a resumed run keeps it, and where it cannot be kept nothing is written."""
    run, reached = tmp_path / "run", []
    monkeypatch.setattr(loop, "take_step", lambda model, *x: reached.append(model.invariant) or take_step(model, *x))
    train(replace(TINY, steps=2, out=tmp_path / "plain"), quiet=True)
    options = parse_train(["--task", "reverse", "--invariant"])
    assert options.invariant
    train(replace(TINY, steps=2, invariant=options.invariant, out=run), quiet=True)
    assert losses(run) == losses(tmp_path / "plain")  # on a CPU
    train(parse_train(["--resume", str(run), "--steps", "3"]))
    assert "changed: invariant" not in capsys.readouterr().out
    train(parse_train(["--resume", str(run), "--steps", "4", "--no-invariant"]))
    assert "changed: invariant from True to False" in " ".join(capsys.readouterr().out.split())
    assert reached == [False, False, True, True, True, False]
    assert not load_run(tmp_path / "plain")[2].invariant
    monkeypatch.setattr(gemm, "_library", lambda: None)
    with pytest.raises(ValueError, match=r"invariant: got True, want False: the native library is not built"):
        train(replace(TINY, invariant=True, out=tmp_path / "none"), quiet=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(binding.LIBRARY is None, reason="products are then torch's, which are not invariant")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probabilities_of_a_trained_run(tmp_path, monkeypatch, precision):
    """Those of a packed training batch equal those of cached generation, token by token; prompts are of its batches."""
    batches = []
    monkeypatch.setattr(loop, "take_step", lambda *x, **options: batches.extend(x[3]) or take_step(*x, **options))
    train(replace(TINY, steps=20, precision=precision, out=tmp_path / "run"), quiet=True)
    config, _, model = load_run(tmp_path / "run", "cpu")
    documents = [x.tolist() for x in batches[-1].tokens.split(batches[-1].lengths)][:6]
    prompts = [x[: 1 + n % len(x)] for n, x in enumerate(documents)]
    sampling = [Sampling(9, temperature=1.0, seed=n, logprobs=0, ignore_end=True) for n in range(len(prompts))]
    with autocast(config, torch.device("cpu")):
        answers = Engine(model, memory=2**22, step_tokens=7, max_model_len=40).generate(prompts, sampling)
        packed = [prompt + answer.tokens for prompt, answer in zip(prompts, answers, strict=True)]
        tokens, lengths = torch.tensor([token for document in packed for token in document]), [*map(len, packed)]
        hidden = model.train()(tokens, lengths)
        losses = linear_cross_entropy(hidden, model.head_weight, tokens.roll(-1), reduction="none")
    assert losses.requires_grad
    for prompt, answer, own in zip(prompts, answers, losses.split(lengths), strict=True):
        assert torch.equal(-own[len(prompt) - 1 : -1], torch.tensor(answer.logprobs))


def test_a_backend_that_cannot_run_leaves_no_folder(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot compute this: query is on cpu"):
        train(replace(TINY, backend="triton", out=tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    from keyspan.training import loop

    whole = train(replace(TINY, steps=4, out=tmp_path / "whole"), quiet=True)
    for name in ("out", "resume"):
        run = tmp_path / name
        with monkeypatch.context() as patch:
            steps = []

            def killed(*arguments, steps=steps):
                steps.append(1)
                if len(steps) == 3:
                    raise RuntimeError("killed")
                return take_step(*arguments)

            patch.setattr(loop, "take_step", killed)
            with pytest.raises(RuntimeError, match="killed"):
                train(replace(TINY, steps=4, out=run), quiet=True)
        assert not checkpoint.exists(run)
        again = replace(TINY, steps=4, out=run) if name == "out" else replace(read_config(run), resume=run)
        assert train(again, quiet=True).held_out == whole.held_out
        assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_kill_9_at_random_moments(tmp_path):
    """Each start goes on from the last whole checkpoint; the losses are those of a run that nobody killed."""
    words = {
        "task": "reverse", "max-length": 6, "dim": 16, "layers": 2, "heads": 4, "kv-heads": 2, "tokens": 96,
        "steps": 150, "warmup": 3, "lr": 1e-2, "eval-every": 1000, "eval-tokens": 96, "checkpoint-every": 1,
        "device": "cpu",
    }  # fmt: skip
    given = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    run, source = tmp_path / "run", random.Random(0)
    for _ in range(3):
        start = ["--resume", str(run)] if checkpoint.exists(run) else [*given, "--out", str(run)]
        process = subprocess.Popen(
            [sys.executable, "-m", "keyspan", "train", *start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            before = len(read_metrics(run)) if run.exists() else 0
            deadline = time.monotonic() + 100
            while time.monotonic() < deadline and (not run.exists() or len(read_metrics(run)) < before + 3):
                time.sleep(0.01)
            time.sleep(source.random() * 0.2)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL, "ended before it was killed"
    train(replace(read_config(run), resume=run), quiet=True)
    train(replace(read_config(run), out=tmp_path / "whole"), quiet=True)
    assert losses(run) == losses(tmp_path / "whole")


def test_folders_are_not_overwritten(tmp_path):
    train(replace(TINY, steps=1, out=tmp_path / "run"), quiet=True)
    with pytest.raises(ValueError, match=r"out: .* holds a run already"):
        train(replace(TINY, steps=1, out=tmp_path / "run"), quiet=True)
    with pytest.raises(ValueError, match=r"out: got .*elsewhere, want none"):
        train(replace(TINY, resume=tmp_path / "run", out=tmp_path / "elsewhere"), quiet=True)


def test_a_broken_line_of_metrics_is_dropped(tmp_path):
    run = tmp_path / "run"
    train(replace(TINY, steps=6, out=run), quiet=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')  # steps after the checkpoint, then a crash
    train(replace(read_config(run), resume=run, steps=8), quiet=True)
    assert [step for step, _ in losses(run)] == list(range(1, 9))
    assert (7, 1.0) not in losses(run)


@pytest.mark.parametrize("line", [b"hello\n", b"\xff\n", b"3\n", b'{"loss": 1.0}\n'])
def test_foreign_metrics_are_named(tmp_path, line):
    run = tmp_path / "run"
    train(replace(TINY, steps=2, out=run), quiet=True)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 4 is not the record of a step: got "):
        train(replace(read_config(run), resume=run, steps=3), quiet=True)


def test_a_run_that_cannot_be_captured_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: got device cpu, want cuda"):
        train(replace(TINY, cuda_graph=True, out=tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
