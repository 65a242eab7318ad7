"""The processes of a run: which data each has, how they share a model, and how they agree.

`torchrun` starts them. They form a mesh of data × context: ranks that differ in `data` have other micro-batches, ranks
that differ in `context` share the rows of the same ones. Weights are copies that are kept equal (DDP), or are cut
across all ranks (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from keyspan import Causal, Documents
from keyspan.info import find_device
from keyspan.models.gpt import GPT
from keyspan.parallel import Context, Partition
from keyspan.training.config import TrainConfig
from keyspan.training.packing import Batch

T = TypeVar("T")


class Objective(nn.Module):
    """A GPT whose forward is its loss, or what an evaluation asks: the module that DDP and FSDP wrap."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, targets: Tensor, lengths: Any, context: Context | None = None, scores: bool = False
    ) -> Any:
        """The loss, see `GPT.loss`; with `scores`, the logits of all rows."""
        if scores:
            return self.model.logits(self.model(tokens, lengths, context=context))
        return self.model.loss(tokens, targets, lengths, context=context)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as this one sees them. Without arguments: this one alone."""

    rank: int = 0
    world: int = 1
    context: int = 1
    """Ranks that share the rows of a micro-batch; `world / context` have micro-batches of their own."""
    device: torch.device | None = None
    context_group: Any = None

    @property
    def data(self) -> int:
        """Ranks, or groups of them, with micro-batches of their own."""
        return self.world // self.context

    @property
    def data_rank(self) -> int:
        return self.rank // self.context

    @property
    def context_rank(self) -> int:
        return self.rank % self.context

    @property
    def first(self) -> bool:
        """Whether this rank writes and reports."""
        return self.rank == 0

    def part(self, batch: Batch) -> tuple[Batch, Context | None]:
        """The rows of a micro-batch that this rank has, with the lengths of all documents."""
        if self.context == 1:
            return batch, None
        T = len(batch.tokens)
        partition = Partition.balanced(Documents(batch.lengths) & Causal(), T, self.context)
        tokens, targets = (partition.take(x, self.context_rank, 0) for x in (batch.tokens, batch.targets))
        return Batch(tokens, targets, batch.lengths), Context(partition, self.context_group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, on every one of them."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return bool(votes)

    def agree(self, function: Callable[[], T]) -> T:
        """What the first rank's function returns, on every rank; its expected errors are raised on every rank too."""
        if self.world == 1:
            return function()
        found: list[Any] = [None]
        if self.first:
            try:
                found = [(function(), None)]
            except (ValueError, OSError, NotImplementedError) as error:
                found = [(None, error)]
        dist.broadcast_object_list(found)
        result: tuple[T, Exception | None] = found[0]
        if result[1] is not None:
            raise result[1]
        return result[0]

    def seed(self, seed: int, step: int) -> None:
        """Seed torch's generators for a step, each rank's otherwise; not where the process is alone, whose generators
        run on."""
        if self.world > 1:
            torch.manual_seed(hash((seed, step, self.rank)) % 2**63)

    def wrap(self, model: GPT, config: TrainConfig) -> nn.Module:
        """The module whose forward is the loss, and whose backward leaves every rank the gradients of all."""
        objective = Objective(model)
        if self.world == 1:
            return objective
        device = next(model.parameters()).device
        if not config.fsdp:
            ids = [device.index] if device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(objective, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        # The residual stream stays fp32, as on one device: what enters a block is not cast, its weights are.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if config.precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        return objective

    def synchronised(self, objective: object, last: bool) -> AbstractContextManager[Any]:
        """Around a backward pass: DDP adds up the ranks' gradients in the last micro-batch of a step only."""
        return (
            objective.no_sync()
            if isinstance(objective, nn.parallel.DistributedDataParallel) and not last
            else nullcontext()
        )


ALONE = Ranks()


def is_cut(x: Tensor) -> bool:
    """Whether a tensor is cut across ranks; it is a DTensor then, whose module takes half a second to import."""
    return hasattr(x, "full_tensor")


def cut_as(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, cut as `like` is; nothing is sent."""
    if not is_cut(like):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def setting(name: str, default: int) -> int:
    """A number that torchrun sets in the environment."""
    return int(os.environ.get(name, str(default)))


@contextmanager
def connected(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected while the context lasts; those of a process group that there is
    already; else this process alone.

    Raises ValueError where the numbers of ranks do not fit the configuration.
    """
    already = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if already else setting("WORLD_SIZE", 1)
    check_ranks(config, world)
    device = find_device(config.device)
    if world == 1:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", setting("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    if not already:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store, rank, world = next(rendezvous("env://"))
        # torchrun keeps its store when it starts processes again: addresses of dead ones are still in it.
        store = dist.PrefixStore(f"attempt {setting('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
        on = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=on)
    try:
        rank, group = dist.get_rank(), None
        for first in range(0, world if config.context > 1 else 0, config.context):
            members = list(range(first, first + config.context))
            made = dist.new_group(members)
            group = made if rank in members else group
        yield Ranks(rank, world, config.context, device, group)
    finally:
        if not already:
            dist.destroy_process_group()


def check_ranks(config: TrainConfig, world: int) -> None:
    """Raise ValueError where so many ranks do not fit the configuration."""
    if world % config.context:
        raise ValueError(f"context: got {config.context}, want a divisor of the {world} ranks that torchrun started")
    if config.accumulation % (world // config.context):
        raise ValueError(
            f"accumulation: got {config.accumulation} micro-batches a step for {world // config.context} ranks with "
            "data of their own, want a multiple of that"
        )
    if world == 1 and config.fsdp:
        raise ValueError("fsdp: got True with one process, want torchrun with more")
    for name in ("compile", "cuda_graph"):
        if world > 1 and getattr(config, name):
            raise ValueError(f"{name}: got True with {world} ranks, want False")
    if config.fsdp and config.precision == "fp16":
        raise ValueError("precision: got fp16 with fsdp, want fp32 or bf16")
    if setting("TORCHELASTIC_MAX_RESTARTS", 0) and config.out is None and config.resume is None:
        raise ValueError("out: got none with torchrun's --max-restarts, want a folder, where a restart finds the run")
