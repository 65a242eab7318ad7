"""The processes of a run: which data each has, how they share a model, and how they agree.

`torchrun` starts them. They form a mesh of data × context × tensor: ranks that differ in `data` have other
micro-batches, ranks that differ in `context` share the rows of the same ones, ranks that differ in `tensor` compute a
part of each layer for the same rows. Over data × context, weights are copies that are kept equal (DDP), or are cut
(FSDP2).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

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

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Objective(nn.Module):
    """A GPT whose forward is its loss, or what an evaluation asks: the module that DDP and FSDP wrap."""

    def __init__(self, model: GPT, tensor: DeviceMesh | None = None) -> None:
        super().__init__()
        self.model, self.tensor = model, tensor

    def forward(
        self, tokens: Tensor, targets: Tensor, lengths: Any, context: Context | None = None, scores: bool = False
    ) -> Any:
        """The loss, see `GPT.loss`; with `scores`, the logits of all rows."""
        if scores:
            return self.model.logits(self.model(tokens, lengths, context=context))
        if self.tensor is not None:
            from keyspan.training.tensor import loss

            return loss(self.model, self.model(tokens, lengths, context=context), targets, self.tensor)
        return self.model.loss(tokens, targets, lengths, context=context)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as this one sees them. Without arguments: this one alone."""

    rank: int = 0
    world: int = 1
    context: int = 1
    """Ranks that share the rows of a micro-batch."""
    tensor: int = 1
    """Ranks that share the layers; `world / context / tensor` have micro-batches of their own."""
    device: torch.device | None = None
    context_group: Any = None
    shared_group: Any = None
    """The ranks of data × context; None for all ranks."""
    mesh: DeviceMesh | None = None
    """Where layers are shared: its last dimension is `tensor`, those before are data × context."""

    @property
    def data(self) -> int:
        """Groups of ranks with micro-batches of their own."""
        return self.shared // self.context

    @property
    def shared(self) -> int:
        """Ranks of data × context."""
        return self.world // self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor // self.context

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor % self.context

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
        return batch._replace(tokens=tokens, targets=targets), Context(partition, self.context_group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks of data × context, on every rank."""
        if self.shared > 1:
            dist.all_reduce(x, group=self.shared_group)
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

    def gather(self, names: list[str]) -> list[str]:
        """The names that any rank has, on every rank, each once."""
        if self.world == 1:
            return names
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, names)
        return list(dict.fromkeys(name for of in found for name in of))

    def seed(self, seed: int, step: int) -> None:
        """Seed torch's generators for a step, otherwise for each rank of data × context; not where the process is
        alone, whose generators run on."""
        if self.world > 1:
            torch.manual_seed(hash((seed, step, self.rank // self.tensor)) % 2**63)

    def wrap(self, model: GPT, config: TrainConfig) -> nn.Module:
        """The module whose forward is the loss, and whose backward leaves every rank the gradients of all."""
        objective: nn.Module = Objective(model, None if self.mesh is None else self.mesh["tensor"])
        if self.mesh is not None:
            from keyspan.training.tensor import cut_model

            cut_model(model, self.mesh["tensor"])
        if self.shared > 1:
            objective = self._share(objective, model, config)
        if self.mesh is not None:  # hooks run in the order in which they were registered, and FSDP's gather weights
            from keyspan.training.tensor import localize

            for block in model.blocks:
                localize(block)
            localize(objective, model.blocks)
        return objective

    def _share(self, objective: nn.Module, model: GPT, config: TrainConfig) -> nn.Module:
        """The objective of the model, whose gradients are the mean of those of the ranks of data × context."""
        device = next(model.parameters()).device
        if not config.fsdp and self.mesh is None:
            ids = [device.index] if device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(objective, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.world,)) if self.mesh is None else _before_last(self.mesh)
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


def cut_as(x: Tensor, like: Tensor, rows: Tensor | None = None) -> Tensor:
    """A whole tensor, which every rank has, cut as `like` is, whose rows are in the order `rows`; nothing is sent."""
    if not is_cut(like):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    x = x.to(like.device) if rows is None else x[rows.to(x.device)].to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    """By name of a weight that is a DTensor: the numbers of the plain weight's rows, in the order in which it has them.

    Names are missing where the order is the plain one, see `keyspan.training.tensor`.
    """
    return {f"{name}.weight": m.rows for name, m in model.named_modules() if isinstance(m.__dict__.get("rows"), Tensor)}


def setting(name: str, default: int) -> int:
    """A number that torchrun sets in the environment."""
    return int(os.environ.get(name, str(default)))


@contextmanager
def connected(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected while the context lasts; those of a process group that there is
    already; else this process alone.

    Raises ValueError where the numbers of ranks do not fit the configuration.
    """
    if config.tensor > 1:  # torch advises to flatten the mesh, for the sake of a sum of one number
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
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
        rank = dist.get_rank()
        yield Ranks(
            rank, world, config.context, config.tensor, device,
            _group(rank, world, config.context, config.tensor) if config.context > 1 else None,
            _group(rank, world, world // config.tensor, config.tensor) if config.tensor > 1 else None,
            _mesh(device, world, config) if config.tensor > 1 else None,
        )  # fmt: skip
    finally:
        if not already:
            dist.destroy_process_group()


def _group(rank: int, world: int, size: int, stride: int) -> Any:
    """The group of `size` ranks, `stride` apart, to which this one belongs. All ranks make all groups."""
    found = None
    for block in range(0, world, size * stride):
        for first in range(block, block + stride):
            members = list(range(first, first + size * stride, stride))
            made = dist.new_group(members)
            found = made if rank in members else found
    return found


def _mesh(device: torch.device, world: int, config: TrainConfig) -> DeviceMesh:
    """Where layers are shared: data × context, across which FSDP2 cuts weights or keeps copies, × tensor."""
    from torch.distributed.device_mesh import init_device_mesh

    shared = world // config.tensor
    if config.fsdp:
        return init_device_mesh(device.type, (shared, config.tensor), mesh_dim_names=("shards", "tensor"))
    # FSDP2 keeps copies where each is cut into one piece.
    sizes = (shared, 1, config.tensor)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("copies", "shards", "tensor"))


def _before_last(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names
    assert names is not None
    return mesh[names[:-1]]


def check_ranks(config: TrainConfig, world: int) -> None:
    """Raise ValueError where so many ranks do not fit the configuration."""
    if world % (config.context * config.tensor):
        name, got = ("context", config.context) if config.tensor == 1 else ("tensor", config.tensor)
        times = f" × {config.context} of context" if config.tensor > 1 and config.context > 1 else ""
        raise ValueError(f"{name}: got {got}{times}, want a divisor of the {world} ranks that torchrun started")
    data = world // (config.context * config.tensor)
    if config.accumulation % data:
        raise ValueError(
            f"accumulation: got {config.accumulation} micro-batches a step for {data} ranks with data of their own, "
            "want a multiple of that"
        )
    if world == 1 and config.fsdp:
        raise ValueError("fsdp: got True with one process, want torchrun with more")
    for name in ("compile", "cuda_graph"):
        if world > 1 and getattr(config, name):
            raise ValueError(f"{name}: got True with {world} ranks, want False")
    for name in ("fsdp", "tensor"):
        if getattr(config, name) > 1 - (name == "fsdp") and config.precision == "fp16":
            raise ValueError(f"precision: got fp16 with {name}, want fp32 or bf16")
    if setting("TORCHELASTIC_MAX_RESTARTS", 0) and config.out is None and config.resume is None:
        raise ValueError("out: got none with torchrun's --max-restarts, want a folder, where a restart finds the run")


def check_model(model: GPT, tensor: int) -> None:
    """Raise ValueError where so many ranks cannot share the layers of a model."""
    config = model.config
    if tensor > 1 and (config.qkv_bias or config.out_bias or config.mlp_bias or config.sinks or config.experts):
        raise ValueError(f"tensor: got {tensor} for a model with biases, sinks or experts, want one without")
    for name in ("heads", "kv_heads", "hidden"):
        if getattr(config, name) % tensor:
            raise ValueError(f"tensor: got {tensor} for {name} = {getattr(config, name)}, want a divisor of that")
