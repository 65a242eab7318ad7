"""Checkpoints: safetensors and JSON, written atomically.

    RUN/checkpoints/step-00000500/
        model.safetensors       weights
        training.safetensors    AdamW's moments and step counts, random number generators' states
        state.json              step, seconds, loss scale, place in the data; sizes and sums (SHA-256)

A checkpoint is written into a temporary folder, flushed to disk, and gets its name by one rename: a crash at any moment
leaves the earlier checkpoint as it was, and no name ever stands for a mixture. Loading first verifies everything
(sizes, sums, keys, shapes, dtypes) and only then touches the model; whatever is wrong is a ValueError that names the
file.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keyspan.core.checks import as_path, check_type
from keyspan.files import flush_folder, sha256_of, write_file
from keyspan.training.ranks import cut_as, rows_of

FORMAT, SHARDED = "keyspan checkpoint 3", "keyspan sharded checkpoint 2"
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
METADATA = ".metadata"
"""What torch.distributed.checkpoint calls its index."""
NAME = "step-" + 8 * "[0-9]"
"""What the folders of checkpoints are called, as a pattern; with a dot before it, while they are written."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter."""


class Progress(NamedTuple):
    """How far a run had come when a checkpoint was written."""

    step: int
    """Optimizer steps taken."""
    seconds: float
    """Time spent training."""
    batches: int = 0
    """Micro-batches that these steps took, of all ranks: the number of the next one."""
    data: dict[str, Any] | None = None
    """Where the plan of the data is, see `Corpus.position`."""


def save(
    run: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    keep: int = 2,
) -> Path:
    """Write a checkpoint of the run, drop all but the last `keep`, and return its folder."""
    from safetensors.torch import save as to_bytes

    temporary = temporary_folder(run, progress)
    for name, data in ((MODEL, to_bytes(_weights(model))), (TRAINING, to_bytes(_training_state(model, optimizer)))):
        write_file(temporary / name, data)
    return finish(run, temporary, {"format": FORMAT, **progress._asdict(), "scaler": scaler.state_dict()}, keep)


def temporary_folder(run: Path, progress: Progress) -> Path:
    """A new folder to write a checkpoint into; leftovers of others are removed."""
    parent = run / "checkpoints"
    final = parent / f"step-{progress.step:08d}"
    if final.exists():
        raise ValueError(f"progress: {final} is written already; want a later step")
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f".{NAME}"):
        shutil.rmtree(leftover)
    temporary = parent / f".{final.name}"
    temporary.mkdir()
    return temporary


def finish(run: Path, temporary: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Record the sums of what was written into `temporary`, give it its name, and drop all but the last `keep`
    checkpoints of the run."""
    parent = temporary.parent
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
    }
    state = {**state, "files": files}
    write_file(temporary / STATE, (json.dumps(state | {"sha256": _sum_of_state(state)}, indent=2) + "\n").encode())
    final = parent / temporary.name[1:]
    temporary.rename(final)
    flush_folder(parent)
    for folder in _checkpoints(run)[:-keep]:
        # Renamed first: a deletion that is cut short must not leave half a checkpoint under its name.
        shutil.rmtree(folder.rename(parent / f".{folder.name}"))
    return final


def exists(run: Path) -> bool:
    """Whether the run has a checkpoint."""
    return bool(_checkpoints(run))


def latest(run: Path | str) -> Path:
    """The run's newest checkpoint."""
    run = as_path("run", run)
    found = _checkpoints(run)
    if not found:
        raise ValueError(f"{run}: holds no checkpoint; want a run folder with checkpoints/step-…")
    return found[-1]


@contextmanager
def naming_older(run: Path) -> Iterator[None]:
    """Where the run's newest checkpoint is damaged, add the newest undamaged one to the ValueError."""
    try:
        yield
    except ValueError as error:
        *older, newest = _checkpoints(run) or [run]
        whole = [folder for folder in older if _is_whole(folder)]
        if not whole or _is_whole(newest):
            raise
        raise ValueError(f"{error}; {whole[-1]} is undamaged: to go on from there, remove {newest}") from None


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def verify(checkpoint: Path) -> None:
    """Compare sizes and sums of a checkpoint's files with those that it records; ValueError where one differs."""
    state = _read_state(checkpoint)
    for name in state["files"]:
        _check_file(checkpoint, name, state)


def load_model(checkpoint: Path | str, model: nn.Module) -> Progress:
    """Load the weights of a checkpoint folder."""
    checkpoint = as_path("checkpoint", checkpoint)
    check_type("model", model, nn.Module)
    state = _read_state(checkpoint)
    if state["format"] == SHARDED:
        from keyspan.training import sharded

        verify(checkpoint)
        sharded.load(checkpoint, model, None)
        return _progress(state)
    weights = _read_tensors(checkpoint, MODEL, state)
    _check(checkpoint / MODEL, weights, _weights(model))
    model.load_state_dict(weights, strict=False)
    return _progress(state)


def load(
    checkpoint: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    verified: bool = False,
) -> Progress:
    """Load all that a run needs to go on from a checkpoint folder, the random number generators included.

    All ranks of a run on several load it, whatever numbers of ranks and arrangement it was written with. Where
    `verified`, the sums of a sharded one are not compared again.
    """
    checkpoint = as_path("checkpoint", checkpoint)
    state = _read_state(checkpoint)
    if state["format"] == SHARDED:
        from keyspan.training import sharded

        if not verified:
            verify(checkpoint)
        sharded.load(checkpoint, model, optimizer)
        _load_scale(checkpoint, state, scaler)
        return _progress(state)
    weights = _read_tensors(checkpoint, MODEL, state)
    training = _read_tensors(checkpoint, TRAINING, state)
    _check(checkpoint / MODEL, weights, _weights(model))
    names = _parameter_names(model, optimizer)
    moments = {key: tensor for key, tensor in training.items() if not key.startswith("rng.")}
    wanted = {
        f"{name}.{moment}": torch.zeros(()) if moment == "step" else model.get_parameter(name)
        for name in names
        for moment in MOMENTS
    }
    # AdamW remembers nothing before its first step, which fp16 may skip a few times until the loss scale fits.
    _check(checkpoint / TRAINING, moments, wanted if moments else {})
    # A run may go on with another device or precision: what the checkpoint does not hold starts afresh.
    modules = _generators(next(model.parameters()).device)
    random = {key: training[key] for key in modules if key in training}
    _check(checkpoint / TRAINING, random, {key: modules[key].get_rng_state() for key in {"rng.cpu", *random}})
    _load_scale(checkpoint, state, scaler)
    like, rows = model.state_dict(), rows_of(model)
    model.load_state_dict({name: cut_as(x, like[name], rows.get(name)) for name, x in weights.items()}, strict=False)
    remembered = {
        index: {
            moment: x if moment == "step" else cut_as(x, model.get_parameter(name), rows.get(name))
            for moment in MOMENTS
            for x in (moments[f"{name}.{moment}"],)
        }
        for index, name in enumerate(names if moments else [])
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": remembered})
    for key, random_state in random.items():
        modules[key].set_rng_state(random_state)
    return _progress(state)


def _progress(state: dict[str, Any]) -> Progress:
    return Progress(*(state[name] for name in Progress._fields))


def _load_scale(checkpoint: Path, state: dict[str, Any], scaler: torch.amp.GradScaler) -> None:
    scale = state["scaler"] if scaler.is_enabled() else {}
    if scale and set(scale) != set(scaler.state_dict()):
        raise ValueError(f"{checkpoint / STATE}: got a loss scale of {sorted(scale)}, not one that torch wrote")
    if scale:
        scaler.load_state_dict(scale)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(folder for folder in (run / "checkpoints").glob(NAME) if folder.is_dir())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, a tied tensor once (safetensors stores no aliases)."""
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _generators(device: torch.device) -> dict[str, Any]:
    """The modules whose random number generators a run draws from, by the name of their state."""
    modules: dict[str, Any] = {"rng.cpu": torch}
    if device.type != "cpu":
        modules[f"rng.{device.type}"] = torch.get_device_module(device)
    return modules


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model, optimizer)
    tensors = {
        f"{names[index]}.{moment}": values[moment].contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for moment in MOMENTS
    }
    generators = _generators(next(model.parameters()).device)
    return tensors | {key: module.get_rng_state() for key, module in generators.items()}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; want a checkpoint folder with {MODEL}, {TRAINING} and {STATE}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); truncated or not a checkpoint of keyspan") from None
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, SHARDED):
        raise ValueError(f"{path}: not a checkpoint of keyspan; want format {FORMAT!r} or {SHARDED!r}")
    kinds: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "batches": int,
        "data": (dict, type(None)),
        "scaler": dict,
        "files": dict,
    }
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):
            raise ValueError(f"{path}: got {key} = {state.get(key)!r}; truncated or not a checkpoint of keyspan")
    sha256 = state.pop("sha256", None)
    if sha256 != _sum_of_state(state):
        raise ValueError(f"{path}: damaged: its SHA-256 is not the one that it records")
    if not (state["step"] >= 0 and 0 <= state["seconds"] < math.inf):
        raise ValueError(f"{path}: got step {state['step']} after {state['seconds']} s; not a checkpoint of keyspan")
    for name in (MODEL, TRAINING) if state["format"] == FORMAT else (METADATA, *state["files"]):
        record = state["files"].get(name)
        if not isinstance(record, dict) or set(record) != {"bytes", "sha256"}:
            raise ValueError(f"{path}: records no size and SHA-256 of {name}; not a checkpoint of keyspan")
    return state


def _read_tensors(checkpoint: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    _check_file(checkpoint, name, state)
    path = checkpoint / name
    data = path.read_bytes()
    try:
        tensors: dict[str, Tensor] = from_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    return tensors


def _check_file(checkpoint: Path, name: str, state: dict[str, Any]) -> None:
    """Refuse a file that is not the one recorded."""
    path, wanted = checkpoint / name, state["files"][name]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {STATE} beside it records {wanted['bytes']} bytes") from None
    if size != wanted["bytes"]:
        raise ValueError(f"{path}: truncated or foreign: got {size} bytes, {STATE} records {wanted['bytes']}")
    if sha256_of(path) != wanted["sha256"]:
        raise ValueError(f"{path}: damaged or foreign: its SHA-256 is not the one that {STATE} records")


def _check(path: Path, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse tensors that are not those wanted: their names, shapes and dtypes."""
    if missing := wanted.keys() - got.keys():
        raise ValueError(f"{path}: lacks {len(missing)} of the tensors of this model, such as {min(missing)}")
    if foreign := got.keys() - wanted.keys():
        raise ValueError(f"{path}: holds {len(foreign)} tensors that this model has not, such as {min(foreign)}")
    for name, tensor in wanted.items():
        if (got[name].shape, got[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{path}: {name} is {list(got[name].shape)} {got[name].dtype}, want {list(tensor.shape)} {tensor.dtype}"
            )


def _sum_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
