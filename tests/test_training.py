"""Training: the schedule, one step, whole runs: equal on two backends, equal after a resume, stopped by Ctrl-C."""

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keyspan import cli
from keyspan.backends.native import binding
from keyspan.cli import parse_train
from keyspan.info import find_device
from keyspan.layers import gemm
from keyspan.training import checkpoint, loop
from keyspan.training.config import PRESETS, TrainConfig
from keyspan.training.data import is_held_out
from keyspan.training.graph import CapturedStep, check_capture
from keyspan.training.guard import Guard
from keyspan.training.loop import (
    learning_rate,
    load_run,
    make_model,
    make_optimizer,
    make_scaler,
    make_task,
    read_config,
    take_step,
    train,
)
from keyspan.training.packing import Batch
from keyspan.training.report import read_metrics

CPU = torch.device("cpu")
TINY = TrainConfig(
    task="reverse",
    max_length=6,
    dim=16,
    layers=2,
    heads=4,
    kv_heads=2,
    tokens=96,
    steps=12,
    warmup=3,
    lr=1e-2,
    eval_every=5,
    eval_tokens=96,
    checkpoint_every=6,
    device="cpu",
)


@pytest.fixture(autouse=True)
def few_held_out_problems(monkeypatch):
    """The last evaluation of 2000 problems would take longer than these runs."""
    monkeypatch.setattr("keyspan.training.tasks.HELD_OUT_PROBLEMS", 60)


def parts(config, dtype=torch.float32):
    """The task, and a model with its optimizer and loss scale, as a run makes them."""
    torch.manual_seed(config.seed)
    task = make_task(config)
    model = make_model(config, task.vocab_size).to(dtype)
    return task, model, make_optimizer(model, config), make_scaler(config, CPU)


def check(found, config, scaler):
    """Raise for the loss and the norm of a step that are not finite."""
    loop.check_finite(*map(float, found), config, scaler)


def losses(run):
    """[(step, loss)] of a run folder."""
    return [(record["step"], record["loss"]) for record in read_metrics(run) if "loss" in record]


def test_schedule_by_hand():
    config = replace(TINY, lr=0.5, lr_end=0.1, warmup=4, steps=12)
    rates = [learning_rate(config, step) for step in range(14)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[8] == pytest.approx((0.5 + 0.05) / 2)  # halfway down the cosine
    assert rates[10] == pytest.approx(0.05 + 0.45 * (1 + math.cos(3 * math.pi / 4)) / 2)
    assert rates[12:] == pytest.approx([0.05, 0.05])
    assert learning_rate(replace(config, warmup=0), 0) == 0.5
    assert learning_rate(replace(config, warmup=100), 11) == pytest.approx(0.5 * 12 / 100)


def test_weight_decay_applies_to_matrices_only():
    _, model, optimizer, _ = parts(TINY)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if "norm" not in name}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_accumulation_equals_one_big_batch():
    config = replace(TINY, clip=math.inf)
    task = make_task(config)
    small = [task.train_batch(0, 0, 30), task.train_batch(0, 1, 120)]
    assert small[0].scored() < small[1].scored() / 2  # so that a mean of means would be wrong
    big = Batch(
        torch.cat([batch.tokens for batch in small]),
        torch.cat([batch.targets for batch in small]),
        small[0].lengths + small[1].lengths,
    )
    results = []
    for batches in (small, [big]):
        _, model, _, scaler = parts(config, torch.float64)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        loss, norm = take_step(model, torch.optim.SGD(model.parameters(), lr=1.0, fused=True), scaler, batches, config)
        gradient = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        results.append((float(loss), float(norm), gradient))
    (loss, norm, gradient), (big_loss, big_norm, big_gradient) = results
    # The loss is reported in fp32, so its share in each micro-batch's gradient is rounded to that.
    eps = torch.finfo(torch.float32).eps
    assert loss == pytest.approx(big_loss, rel=4 * eps)
    assert norm == pytest.approx(big_norm, rel=4 * eps)
    assert (gradient - big_gradient).norm() <= 4 * eps * big_gradient.norm()
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_clipping_scales_the_step_to_the_norm():
    task, model, _, scaler = parts(TINY, torch.float64)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    _, norm = take_step(model, sgd, scaler, [task.train_batch(0, 0, 96)], replace(TINY, clip=0.01))
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(norm) > 0.1
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)


def test_chunked_and_reference_train_alike(tmp_path):
    config = replace(
        TINY, task="sort", steps=50, max_length=16, tokens=256, lr=1e-2, eval_every=100, checkpoint_every=100
    )
    curves = []
    for backend in ("chunked", "reference"):
        train(replace(config, backend=backend, out=tmp_path / backend), quiet=True)
        curves.append(losses(tmp_path / backend))
    assert len(curves[0]) == 50
    assert max(abs(a - b) for (_, a), (_, b) in zip(*curves, strict=True)) <= 1e-5
    assert curves[0][-1][1] < curves[0][0][1] - 0.5  # it did train


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_continues_bit_for_bit(tmp_path, precision):
    config = replace(TINY, precision=precision, dropout=0.2, accumulation=2, out=tmp_path / "whole")
    train(config, quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000012")
    torch.manual_seed(1234)
    half = replace(read_config(tmp_path / "half"), resume=tmp_path / "half")
    result = train(half, quiet=True)
    assert (result.step, result.run) == (12, str(tmp_path / "half"))
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "half")] == list(range(1, 13))
    states = []
    for name in ("whole", "half"):
        folder = checkpoint.latest(tmp_path / name)
        states.append([(folder / file).read_bytes() for file in (checkpoint.MODEL, checkpoint.TRAINING)])
    assert states[0] == states[1]


def test_the_generator_state_shows_in_the_losses(tmp_path):
    """What the generator's state decides shows in the losses, so the test above does test that it is restored."""
    config = replace(TINY, dropout=0.2, steps=3)
    train(replace(config, out=tmp_path / "a"), quiet=True)
    train(replace(config, dropout=0.0, out=tmp_path / "b"), quiet=True)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(tmp_path, precision):
    config = replace(TINY, steps=40, lr=3e-3, checkpoint_every=100)
    for name in ("fp32", precision):
        train(replace(config, precision=name, out=tmp_path / name), quiet=True)
    exact = [loss for _, loss in losses(tmp_path / "fp32")]
    rounded = [loss for _, loss in losses(tmp_path / precision)]
    assert exact != rounded
    assert exact[-1] < exact[0] - 0.3
    assert rounded == pytest.approx(exact, rel=0.05)
    scale = json.loads((checkpoint.latest(tmp_path / precision) / checkpoint.STATE).read_text())["scaler"]
    assert bool(scale) == (precision == "fp16")


def test_fp16_overflow_skips_the_step_and_lowers_the_scale():
    config = replace(TINY, precision="fp16")
    task, model, optimizer, _ = parts(config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    loss, norm = take_step(model, optimizer, scaler, [task.train_batch(0, 0, 96)], config)
    assert math.isfinite(float(loss))
    assert not math.isfinite(float(norm))
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_before_the_step(precision):
    config = replace(TINY, precision=precision)
    task, model, optimizer, scaler = parts(config)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"the loss is nan.*lower lr"):
        check(take_step(model, optimizer, scaler, [task.train_batch(0, 0, 96)], config), config, scaler)
    assert all(torch.equal(p, q) or p.isnan().any() for p, q in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    task, model, optimizer, scaler = parts(TINY)
    hook = model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    batches = [task.train_batch(0, 0, 96)]
    with pytest.raises(FloatingPointError, match=r"gradient's norm is (inf|nan)"):
        check(take_step(model, optimizer, scaler, batches, TINY), TINY, scaler)
    hook.remove()
    # Nor do later steps change them, which were taken before anybody read the figures of this one.
    check(take_step(model, optimizer, scaler, batches, TINY), TINY, scaler)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    _, model, optimizer, scaler = parts(TINY)
    take_step(model, optimizer, scaler, batches, TINY)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Readings(TorchDispatchMode):
    """Counts what would wait for a device: numbers read from tensors on the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_nothing_from_the_device(precision, monkeypatch):
    # As on an accelerator: lengths are a tensor there, which the masks do not read.
    monkeypatch.setattr("keyspan.core.masks.checks.readable", lambda x: False)
    config = replace(TINY, precision=precision, accumulation=2)
    task, model, optimizer, scaler = parts(config)
    for step in range(2):
        batches = loop.train_batches(task, config, step)
        with Readings() as readings:
            found = take_step(model, optimizer, scaler, batches, config, model.loss)
        assert readings.count == len(batches)  # `Batch.scored`, of tensors on the host
    with Readings() as readings:
        check(found, config, scaler)
    assert readings.count == 2


# torch's tracer makes an instance of torch.autograd.Function, against torch's own advice
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_training_equals_eager_training_without_recompiling(tmp_path, monkeypatch, precision):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    config = replace(TINY, precision=precision, accumulation=2, max_length=12)
    for compiled in (False, True):
        train(replace(config, compile=compiled, out=tmp_path / str(compiled)), quiet=True)
    eager, found = losses(tmp_path / "False"), losses(tmp_path / "True")
    error = 1e-5 if precision == "fp32" else 2e-3  # formulas round to bf16 where the fused kernels do not
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in eager], abs=error)
    # One for the first batch's sizes, one for all: 24 batches of different tokens and documents need no more.
    assert len(graphs) == 2


def test_steps_are_read_together_on_an_accelerator(tmp_path, monkeypatch):
    """The records are the same however many steps are read at once, and a step that fails is still named."""
    train(replace(TINY, out=tmp_path / "each"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setitem(loop.READ_EVERY, "cpu", 4)
        train(replace(TINY, out=tmp_path / "four"), quiet=True)
        with pytest.raises(FloatingPointError, match=r"step [12]: the .* holds the run up to step 0"):
            train(replace(TINY, lr=1e30, warmup=0, weight_decay=0.0, out=tmp_path / "bad"), quiet=True)
    kept = ("step", "loss", "lr", "grad_norm", "tokens")
    each, four = (
        [[record.get(name) for name in kept] for record in read_metrics(tmp_path / name)] for name in ("each", "four")
    )
    assert each == four
    model = [(checkpoint.latest(tmp_path / name) / checkpoint.MODEL).read_bytes() for name in ("each", "four")]
    assert model[0] == model[1]
    assert not checkpoint.exists(tmp_path / "bad")


def test_a_guard_judges_by_the_losses_that_were_taken():
    config = replace(TINY, spike=3.0, spike_window=4, on_spike="skip")
    guard, norm = Guard(config, CPU), torch.tensor(1.0)

    def judge(loss, norm=norm):
        return float(guard.judge(torch.tensor(loss), norm))

    assert [judge(x) for x in (9.0, 2.0, math.nan, 2.2, 1.9, 1.8)] == [0, 0, 1, 0, 0, 0]  # too few to tell until here
    assert judge(30.0) == 1
    mean, std = np.mean([2.0, 2.2, 1.9, 1.8]), np.std([2.0, 2.2, 1.9, 1.8], ddof=1)
    assert float(guard.limit) == pytest.approx(mean + 3 * std)
    assert judge(mean + 3.01 * std) == 1
    assert judge(mean + 2.99 * std) == 0
    assert judge(1.0, torch.tensor(math.inf)) == 1
    assert judge(1.0, None) == 0
    stops = Guard(replace(config, on_spike="stop"), CPU, [5.0, 2.0, 2.2, 1.9, 1.8])
    assert [float(stops.judge(torch.tensor(x), norm)) for x in (2.0, 30.0, 2.0)] == [0, 1, 1]
    silent = Guard(replace(TINY, on_spike="skip"), CPU)
    assert [float(silent.judge(torch.tensor(x), norm)) for x in (1.0, 1e9, math.inf)] == [0, 0, 1]


def spoil(monkeypatch, step, factor, seen):
    """The loss of a step, counted from 1, is multiplied; `seen` gets what the weights were before and after it."""
    calls = iter(range(1, 1000))

    def take(model, *arguments):
        if next(calls) != step:
            return take_step(model, *arguments)
        before = [p.detach().clone() for p in model.parameters()]
        arguments = [*arguments[:4], lambda *x: model.loss(*x) * factor, *arguments[5:]]
        found = take_step(model, *arguments)
        seen.extend(zip(before, [p.detach().clone() for p in model.parameters()], strict=True))
        return found

    monkeypatch.setattr(loop, "take_step", take)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("factor", [50.0, math.nan])
def test_a_spike_is_skipped_or_stops_the_run(tmp_path, monkeypatch, precision, factor):
    config = replace(TINY, steps=9, spike=20.0, spike_window=4, precision=precision, checkpoint_every=3, eval_every=100)
    seen: list = []
    spoil(monkeypatch, 7, factor, seen)
    train(replace(config, on_spike="skip", out=tmp_path / "skipped"), quiet=True)
    assert seen
    assert all(torch.equal(a, b) for a, b in seen)
    records = read_metrics(tmp_path / "skipped")
    (refused,) = [r for r in records if "refused" in r]
    assert refused["step"] == 7
    assert re.match(
        "the loss is nan" if math.isnan(factor) else "the loss is .*, a spike: 20 stand", refused["refused"]
    )
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6, 8, 9]
    spoil(monkeypatch, 7, factor, [])
    with pytest.raises(FloatingPointError, match=r"step 7: the loss is .* holds the run up to step 6"):
        train(replace(config, out=tmp_path / "stopped"), quiet=True)
    assert checkpoint.latest(tmp_path / "stopped").name == "step-00000006"
    # A resumed run judges by the losses before.
    spoil(monkeypatch, 1, factor, [])
    with pytest.raises(FloatingPointError, match="step 7: the loss is"):
        train(replace(config, resume=tmp_path / "stopped"), quiet=True)


def test_a_run_that_skips_all_steps_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "IN_A_ROW", 3)
    config = replace(TINY, on_spike="skip", lr=1e30, warmup=0, weight_decay=0.0, steps=50, eval_every=100)
    with pytest.raises(FloatingPointError, match=r"step \d: the .*; 3 steps in a row were skipped; .* up to step 0"):
        train(replace(config, out=tmp_path / "run"), quiet=True)


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
    assert capsys.readouterr().err == "keyspan: train needs tensorboard: pip install tensorboard\n"
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path):
    config = replace(TINY, lr=1e30, warmup=0, weight_decay=0.0, checkpoint_every=1, out=tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step \d+: the .* holds the run up to step \d+"):
        train(config, quiet=True)
    model = load_run(tmp_path / "run", "cpu")[2]
    assert all(p.isfinite().all() for p in model.parameters())


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


def test_an_empty_micro_batch_counts_for_nothing():
    config = replace(TINY, clip=math.inf)
    task = make_task(config)
    full = task.train_batch(0, 0, 96)
    unscored = Batch(full.tokens, torch.full_like(full.targets, -100), full.lengths)
    empty = Batch(full.tokens[:0], full.targets[:0], [])
    results = []
    for batches in ([full], [unscored, full, empty]):
        _, model, optimizer, scaler = parts(config)
        found = take_step(model, optimizer, scaler, batches, config)
        results.append((found, [p.detach().clone() for p in model.parameters()]))
    (want, weights), (got, same) = results
    assert got == want
    assert all(map(torch.equal, weights, same))
    with pytest.raises(ValueError, match="batches: got no scored target"):
        take_step(model, optimizer, scaler, [unscored, empty], config)


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


def test_find_device():
    assert find_device("cpu") == CPU
    assert find_device("auto") == (torch.accelerator.current_accelerator() or CPU)
    with pytest.raises(ValueError, match="device: got 'toaster'"):
        find_device("toaster")


@pytest.mark.parametrize("task", PRESETS)
def test_config_round_trip(task):
    assert PRESETS[task].task == task
    assert TrainConfig.from_json(PRESETS[task].to_json()) == PRESETS[task]
    make_task(PRESETS[task])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "divide"}, "task: got 'divide'"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"tokens": 2**63}, "tokens: got 9223372036854775808, want 1 … 2³¹ − 1"),
        ({"accumulation": 0}, "accumulation: got 0"),
        ({"steps": -1}, "steps: got -1"),
        ({"eval_every": 0}, "eval_every: got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"lr_end": 1.5}, "lr_end: got 1.5"),
        ({"beta2": 1.0}, "beta2: got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"stop_at": 0.0}, "stop_at: got 0.0"),
        ({"task": "stdlib", "stop_at": 0.5}, "stop_at: got 0.5 for stdlib"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**63}, "seed: got 9223372036854775808"),
        ({"invariant": True, "compile": True}, "compile: got True with invariant, want False"),
        ({"invariant": True, "context": 2}, "context: got 2 with invariant, want 1"),
        ({"invariant": True, "tensor": 2}, "tensor: got 2 with invariant, want 1"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "dim"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"max_length": 1}, "max_length"),
        ({"device": "toaster"}, "device"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_bad_options_that_the_model_and_the_task_refuse(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(TINY, out=tmp_path / "run", **change), quiet=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run/config.json: not a training configuration"),
        ("3", "run/config.json: not a training configuration"),
        ('{"stepz": 3}', "run/config.json: unknown option stepz"),
        ("[1]", "run/config.json: not a training configuration"),
        ('{"steps": "many"}', "run/config.json: steps: got 'many', want int"),
        ('{"dim": null}', "run/config.json: dim: got None, want int"),
        ('{"hidden": true}', "run/config.json: hidden: got True, want int or null"),
        ('{"positions": "polar"}', "run/config.json: positions: got 'polar', want one of rope, alibi, none"),
        ('{"out": 3}', "run/config.json: out: got 3, want a path or null"),
        ('{"steps": 0}', "run/config.json: steps: got 0"),
    ],
)
def test_bad_configuration_files(text, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_json(text, "run/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [({}, "got device cpu, want cuda"), ({"precision": "fp16"}, "got "), ({"dropout": 0.1}, "got ")],
)
def test_a_cuda_graph_that_cannot_be(change, message):
    config = replace(TINY, **change)
    _, model, optimizer, _ = parts(config)
    with pytest.raises(ValueError, match=f"cuda_graph: {message}"):
        CapturedStep(model, optimizer, config)
    with pytest.raises(ValueError, match="cuda_graph: got 2 ranks, want one process"):
        check_capture(TINY, torch.device("cuda"), 2)


def test_a_run_that_cannot_be_captured_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: got device cpu, want cuda"):
        train(replace(TINY, cuda_graph=True, out=tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # as above
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_are_steps(precision, compiled):
    config = replace(TINY, precision=precision, accumulation=2, device="cuda")
    found = []
    for captures in (False, True):
        task, model, optimizer, scaler = parts(config)
        model = model.cuda()
        optimizer = make_optimizer(model, config)
        loss_of = torch.compile(model.loss, fullgraph=True) if compiled else None
        captured = CapturedStep(model, optimizer, config, loss_of)
        steps = []
        for step in range(8):
            batches, lr = loop.train_batches(task, config, step), learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if captures:
                steps.append(captured(batches, lr))
            else:
                steps.append(take_step(model, optimizer, scaler, batches, config, loss_of))
        found.append(torch.tensor([[float(x) for x in pair] for pair in steps]))
    assert (found[0][1:, 0] < found[0][0, 0]).all(), "it trains"
    error = 1e-5 if precision == "fp32" else 1e-2
    torch.testing.assert_close(*found, rtol=error, atol=error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_step_that_is_not_finite_changes_nothing():
    task, model, _, _ = parts(TINY)
    model = model.cuda()
    config = replace(TINY, device="cuda")
    captured = CapturedStep(model, make_optimizer(model, config), config)
    batches = loop.train_batches(task, config, 0)
    captured(batches, 1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    captured.loss.fill_(torch.nan)
    for _ in range(2):  # all later ones neither
        captured(batches, 1e-2)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
