"""The configuration of a training run: options, files of them, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from keyspan.info import find_device
from keyspan.training.config import PRESETS, TrainConfig
from keyspan.training.loop import (
    make_task,
    train,
)
from test_training import CPU, TINY


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
