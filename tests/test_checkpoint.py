"""Checkpoints: what comes back is what was saved; a broken, foreign or half-written one is refused untouched."""

import errno
import json
import os
import shutil

import pytest
import torch
from torch import nn

from keyspan.files import sha256_of
from keyspan.training import checkpoint
from keyspan.training.checkpoint import MODEL, STATE, TRAINING, Progress


def make(width: int = 3, steps: int = 0, fp16: bool = False):
    """A small model after some steps, with its optimizer and loss scale."""
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    for _ in range(steps):
        scaler.scale(model(torch.randn(5, 4)).pow(2).mul(torch.arange(width)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer, scaler


def picture(model, optimizer, scaler):
    """All that a checkpoint must bring back, as plain lists, the generator's next draws included."""
    state = torch.get_rng_state()
    draws = torch.rand(4).tolist()
    torch.set_rng_state(state)
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    moments = {
        (index, key): tensor.tolist()
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    return weights, moments, scaler.state_dict(), draws


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_round_trip(tmp_path, steps, fp16):
    source = make(steps=steps, fp16=fp16)
    saved = picture(*source)
    folder = checkpoint.save(tmp_path, Progress(steps, 1.5, 2 * steps), *source)
    torch.manual_seed(99)
    target = make(steps=1, fp16=fp16)
    assert picture(*target) != saved
    assert checkpoint.load(folder, *target) == (steps, 1.5, 2 * steps, None)
    assert picture(*target) == saved
    assert sorted(path.name for path in folder.iterdir()) == [MODEL, STATE, TRAINING]


def test_load_weights_only(tmp_path):
    model, optimizer, scaler = make(steps=2)
    checkpoint.save(tmp_path, Progress(2, 0.0), model, optimizer, scaler)
    other, _, _ = make()
    draws = torch.get_rng_state()
    assert checkpoint.load_model(checkpoint.latest(tmp_path), other).step == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert torch.equal(torch.get_rng_state(), draws)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    folder = checkpoint.save(tmp_path, Progress(0, 0.0), model, optimizer, scaler)
    other = Tied()
    checkpoint.load_model(folder, other)
    assert torch.equal(other.a.weight, model.a.weight)
    assert other.b.weight is other.a.weight


def test_a_run_may_change_precision(tmp_path):
    folder = checkpoint.save(tmp_path, Progress(1, 0.0), *make(steps=1, fp16=True))
    model, optimizer, scaler = make()
    assert checkpoint.load(folder, model, optimizer, scaler).step == 1
    assert scaler.state_dict() == {}


def test_old_checkpoints_are_pruned_and_the_newest_is_found(tmp_path):
    parts = make(steps=1)
    for step in (5, 10, 200):
        checkpoint.save(tmp_path, Progress(step, 0.0), *parts)
    with pytest.raises(ValueError, match="step-00000200 is written already"):
        checkpoint.save(tmp_path, Progress(200, 0.0), *parts)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000010", "step-00000200"]
    assert checkpoint.latest(tmp_path).name == "step-00000200"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path / "elsewhere")


def test_foreign_files_beside_checkpoints_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".DS_Store").write_text("a file")
    (folder / ".hidden").mkdir()
    (folder / "step-zero").write_text("notes")
    saved = checkpoint.save(tmp_path, Progress(1, 0.0), *make(steps=1))
    assert checkpoint.latest(tmp_path) == saved
    assert {path.name for path in folder.iterdir()} == {".DS_Store", ".hidden", "step-zero", "step-00000001"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    """Whatever fails, and when: what is then found is the old checkpoint or the new one, never a mixture or none."""
    crashes = 0
    for moment in range(100):
        run = tmp_path / str(moment)
        old = make(steps=1)
        checkpoint.save(run, Progress(1, 0.0), *old)
        new = make(steps=2)
        left = moment
        owner, name = (os, "fsync") if call == "fsync" else (checkpoint.Path, "rename")
        real = getattr(owner, name)

        def failing(*arguments, real=real):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("no space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                checkpoint.save(run, Progress(2, 0.0), *new)
                crashed = False
            except OSError:
                crashed = True
        found = make()
        progress = checkpoint.load(checkpoint.latest(run), *found)
        assert picture(*found)[:2] == picture(*{1: old, 2: new}[progress.step])[:2]
        checkpoint.save(run, Progress(3, 0.0), *new)  # and the next one cleans up
        assert [path.name[:5] for path in (run / "checkpoints").iterdir()] == ["step-"] * 2
        if not crashed:
            break
        crashes += 1
    assert crashes == {"fsync": 7, "rename": 1}[call]


def truncate(folder):
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[:-5])


def flip(folder):
    data = bytearray((folder / TRAINING).read_bytes())
    data[-3] ^= 1
    (folder / TRAINING).write_bytes(data)


def record(folder):
    """Make state.json vouch for the files as they are."""
    state = json.loads((folder / STATE).read_text())
    for name in (MODEL, TRAINING):
        data = (folder / name).read_bytes()
        state["files"][name] = {"bytes": len(data), "sha256": sha256_of(folder / name)}
    sign(folder, state)


def sign(folder, state):
    """Write state.json with the checksum of what it says."""
    state = {key: value for key, value in state.items() if key != "sha256"}
    (folder / STATE).write_text(json.dumps(state | {"sha256": checkpoint._sum_of_state(state)}))


def foreign_bytes(folder):
    (folder / MODEL).write_bytes(b"PK\x03\x04 a pickle in a zip")
    record(folder)


def half_state(folder):
    (folder / STATE).write_text((folder / STATE).read_text()[:-40])


def edit(folder, **changes):
    state = json.loads((folder / STATE).read_text())
    sign(folder, state | changes)


def other_model(folder):
    shutil.rmtree(folder)
    checkpoint.save(folder.parent.parent, Progress(4, 0.0), *make(width=7, steps=1))


def without_a_tensor(folder, name, key):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / name)
    del tensors[key]
    save_file(tensors, folder / name)
    record(folder)


def with_a_tensor(folder, name, key, tensor):
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / name) | {key: tensor}, folder / name)
    record(folder)


BROKEN = {
    "truncated": (truncate, rf"{MODEL}: truncated or foreign: got \d+ bytes"),
    "a flipped bit": (flip, f"{TRAINING}: damaged or foreign"),
    "no model": (lambda f: (f / MODEL).unlink(), f"{MODEL}: missing"),
    "no training state": (lambda f: (f / TRAINING).unlink(), f"{TRAINING}: missing"),
    "no state": (lambda f: (f / STATE).unlink(), f"{STATE}: missing"),
    "half a state": (half_state, f"{STATE}: not JSON"),
    "binary state": (lambda f: (f / STATE).write_bytes(b"\xff\x00"), f"{STATE}: not JSON"),
    "foreign state": (lambda f: (f / STATE).write_text('{"epoch": 3}'), f"{STATE}: not a checkpoint of keyspan"),
    "a list for a state": (lambda f: (f / STATE).write_text("[1]"), f"{STATE}: not a checkpoint of keyspan"),
    "no step": (lambda f: edit(f, step=None), f"{STATE}: got step = None"),
    "a negative step": (lambda f: edit(f, step=-5), f"{STATE}: got step -5"),
    "seconds that are no number": (lambda f: edit(f, seconds=float("nan")), f"{STATE}: got step 4 after nan s"),
    "no sum": (
        lambda f: (f / STATE).write_text((f / STATE).read_text().replace("sha256", "sha257")),
        f"{STATE}: damaged: its SHA-256",
    ),
    "no sizes": (lambda f: edit(f, files={}), f"{STATE}: records no size"),
    "foreign scale": (lambda f: edit(f, scaler={"x": 1}), f"{STATE}: got a loss scale of"),
    "not safetensors": (foreign_bytes, f"{MODEL}: not a safetensors file"),
    "another model": (other_model, f"{MODEL}: 0.weight is .7, 4. torch.float32, want .3, 4."),
    "a weight missing": (lambda f: without_a_tensor(f, MODEL, "1.bias"), f"{MODEL}: lacks 1 .* such as 1.bias"),
    "a weight too many": (lambda f: with_a_tensor(f, MODEL, "z", torch.ones(1)), f"{MODEL}: holds 1 .* such as z"),
    "a wrong dtype": (
        lambda f: with_a_tensor(f, MODEL, "1.bias", torch.ones(3, dtype=torch.float64)),
        f"{MODEL}: 1.bias is .3. torch.float64, want .3. torch.float32",
    ),
    "a moment missing": (
        lambda f: without_a_tensor(f, TRAINING, "0.bias.exp_avg"),
        f"{TRAINING}: lacks 1 .* such as 0.bias.exp_avg",
    ),
    "a moment of another shape": (
        lambda f: with_a_tensor(f, TRAINING, "0.bias.exp_avg", torch.ones(2)),
        f"{TRAINING}: 0.bias.exp_avg is .2. torch.float32, want .3.",
    ),
    "no generator": (lambda f: without_a_tensor(f, TRAINING, "rng.cpu"), f"{TRAINING}: lacks 1 .* rng.cpu"),
    "a short generator": (
        lambda f: with_a_tensor(f, TRAINING, "rng.cpu", torch.zeros(3, dtype=torch.uint8)),
        f"{TRAINING}: rng.cpu is .3. torch.uint8",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_and_change_nothing(tmp_path, name):
    damage, message = BROKEN[name]
    folder = checkpoint.save(tmp_path, Progress(4, 0.0), *make(steps=2, fp16=True))
    damage(folder)
    parts = make(steps=1, fp16=True)
    before = picture(*parts)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(folder, *parts)
    assert str(folder) in str(caught.value)
    assert picture(*parts) == before


def test_every_flipped_bit_of_the_state_is_found(tmp_path):
    folder = checkpoint.save(tmp_path, Progress(400, 12.5), *make(steps=1))
    data = (folder / STATE).read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 7)
        (folder / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=STATE):
            checkpoint.load_model(folder, make()[0])
    (folder / STATE).write_bytes(data)
    assert checkpoint.load_model(folder, make()[0]) == (400, 12.5, 0, None)


def test_a_damaged_newest_checkpoint_names_the_older_one(tmp_path):
    parts = make(steps=1)
    for step in (1, 2):
        checkpoint.save(tmp_path, Progress(step, 0.0), *parts)
    newest, older = checkpoint.latest(tmp_path), tmp_path / "checkpoints" / "step-00000001"
    with pytest.raises(ValueError, match=r"want .7, 4.") as caught, checkpoint.naming_older(tmp_path):
        checkpoint.load_model(newest, make(width=7)[0])  # another model: neither is damaged
    assert str(older) not in str(caught.value)
    flip(newest)
    with pytest.raises(ValueError, match="damaged or foreign") as caught, checkpoint.naming_older(tmp_path):
        checkpoint.load(newest, *parts)
    assert str(caught.value).endswith(f"; {older} is undamaged: to go on from there, remove {newest}")
    shutil.rmtree(newest)
    assert checkpoint.load(checkpoint.latest(tmp_path), *parts).step == 1


def test_a_deletion_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    parts = make(steps=1)
    for step in (1, 2):
        checkpoint.save(tmp_path, Progress(step, 0.0), *parts)

    def cut_short(folder):
        (folder / MODEL).unlink()
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(OSError, match="killed"):
            checkpoint.save(tmp_path, Progress(3, 0.0), *parts)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == [".step-00000001", "step-00000002", "step-00000003"]
    checkpoint.save(tmp_path, Progress(4, 0.0), *parts)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000003", "step-00000004"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '.*{MODEL}'"):
        checkpoint.save(tmp_path, Progress(1, 0.0), *make(steps=1))


def test_files_are_replaced_atomically(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    checkpoint.write_file(path, b"old")

    def full(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            checkpoint.write_file(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    checkpoint.write_file(path, b"new")
    assert path.read_bytes() == b"new"
