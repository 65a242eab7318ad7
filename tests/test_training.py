"""Training: the schedule, one step, whole runs: equal on two backends, compiled, and after a resume; captured steps."""

import functools
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keyspan.training import checkpoint, loop
from keyspan.training.config import TrainConfig
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

pytestmark = pytest.mark.usefixtures("few_held_out_problems")
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
    # As on an accelerator: lengths are a tensor there, which the masks do not read, nor is the range of tokens checked.
    for module in ("keyspan.core.checks", "keyspan.core.masks.lengths"):
        monkeypatch.setattr(f"{module}.readable", lambda x: False)
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


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path):
    config = replace(TINY, lr=1e30, warmup=0, weight_decay=0.0, checkpoint_every=1, out=tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step \d+: the .* holds the run up to step \d+"):
        train(config, quiet=True)
    model = load_run(tmp_path / "run", "cpu")[2]
    assert all(p.isfinite().all() for p in model.parameters())


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
