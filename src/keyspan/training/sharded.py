"""Checkpoints of runs on several ranks, by torch.distributed.checkpoint: each rank writes its part, in the background.

    RUN/checkpoints/step-00000500/
        .metadata, __0_0.distcp, …      weights by name, AdamW's moments by name
        state.json                      step, seconds, loss scale; sizes and SHA-256 of the files above, and of itself

They load on any number of ranks and in any arrangement, also in a process alone. As those of one process (see
`keyspan.training.checkpoint`) they are written into a temporary folder, and get their name by one rename when every
rank has written its part.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keyspan.training import checkpoint
from keyspan.training.checkpoint import Progress
from keyspan.training.ranks import Ranks, cut_as, is_cut, rows_of


class Saver:
    """Writes the checkpoints of a run: at once where the process is alone, else in the background, one at a time."""

    def __init__(self, run: Path, ranks: Ranks, saved: int) -> None:
        self.saved = self.begun = saved
        """The steps of the last checkpoint that is whole, and of the last that was begun."""
        self._run, self._ranks = run, ranks
        self._writing: threading.Thread | None = None
        self._failed: list[OSError] = []
        # A group of its own: its collectives come at any time.
        self._group = dist.new_group(backend="gloo") if ranks.world > 1 else None

    def save(
        self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Write a checkpoint, or begin to, on all ranks.

        Raises OSError where the checkpoint before could not be written.
        """
        self.begun = progress.step
        if self._group is None:
            checkpoint.save(self._run, progress, model, optimizer, scaler)
            self.saved = progress.step
            return
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.wait()
        temporary = self._ranks.agree(lambda: checkpoint.temporary_folder(self._run, progress))
        state = {"format": checkpoint.SHARDED, **progress._asdict(), "scaler": scaler.state_dict()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own modules
            writing = async_save(
                _state(model, optimizer), storage_writer=FileSystemWriter(temporary), process_group=self._group
            )
        assert isinstance(writing, Future)

        def finish() -> None:
            """Give the checkpoint its name when every rank has written."""
            try:
                writing.result()
                if self._ranks.first:
                    checkpoint.finish(self._run, temporary, state)
                self.saved = progress.step
            except OSError as error:
                self._failed.append(error)
            except BaseException as error:  # as torch's CheckpointException is one, which says what a rank met
                self._failed.append(OSError(f"{temporary}: the checkpoint could not be written ({_reason(error)})"))

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        self._writing = thread

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None:  # the other ranks may have ended
            self._writing.join(timeout=60)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole, on all ranks; OSError where it could not be written."""
        if self._writing is None:
            return
        self._writing.join()
        self._writing = None
        self._ranks.agree(self._raise)
        self._raise()

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Load weights, and the optimizer's state where one is given, on all ranks, or in a process alone.

    `checkpoint.load` has compared the sums before.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as read

    state = _state(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process is alone
            read(state, storage_reader=FileSystemReader(folder), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise ValueError(f"{folder}: not the checkpoint of this model ({_reason(error)})") from None
    rows = rows_of(model)
    weights: dict[str, Any] = get_model_state_dict(model)
    found = {name: _as_cut(x, weights[name], rows.get(name)) for name, x in state["model"].items()}
    if optimizer is not None:
        moments: dict[str, Any] = {
            name: {k: x if k == "step" else _as_cut(x, weights[name], rows.get(name)) for k, x in of.items()}
            for name, of in state["optimizer"].items()
        }
        set_optimizer_state_dict(model, optimizer, {**_optimizer_state(model, optimizer), "state": moments})
    model.load_state_dict(found, strict=False)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Weights, and AdamW's moments, by the names of parameters; rows in the plain order."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    rows = rows_of(model)
    weights = get_model_state_dict(model)
    state: dict[str, Any] = {"model": {name: _plain(x, rows.get(name)) for name, x in weights.items()}}
    if optimizer is not None:
        state["optimizer"] = {
            name: {k: _plain(x, rows.get(name)) for k, x in of.items()}
            for name, of in _optimizer_state(model, optimizer)["state"].items()
        }
    return state


def _plain(x: Any, rows: Tensor | None) -> Any:
    """A DTensor whose rows are in the order `rows`, put in the plain order and cut by rows; others as they are."""
    if rows is None or not is_cut(x):
        return x
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(x.device.type, (dist.get_world_size(),))
    return distribute_tensor(_whole(x)[rows.argsort().to(x.device)], mesh, [Shard(0)], src_data_rank=None)


def _as_cut(x: Any, like: Tensor, rows: Tensor | None) -> Any:
    """The inverse of `_plain`."""
    return x if rows is None else cut_as(_whole(x), like, rows)


def _whole(x: Any) -> Tensor:
    """All of a DTensor on every rank; gathered one dimension of the mesh after the other, the last one last."""
    from torch.distributed.tensor import Replicate

    *others, last = x.placements
    found: Tensor = x.detach().redistribute(placements=[*(Replicate() for _ in others), last]).full_tensor()
    return found


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    return found


def _reason(error: BaseException) -> str:
    """What a rank met, of an error that torch collected from all of them."""
    failures = getattr(error, "failures", None)
    if failures:
        _, (found, _) = min(failures.items())
        return str(found)
    return f"{type(error).__name__}: {error}".splitlines()[0]
