"""Tensor parallelism by DTensor: heads of attention and widths of gated layers cut across ranks.

Every rank has all rows of the residual stream, and computes some heads of each attention and some hidden units of each
gated layer; two sums over the ranks a block put the results together (Megatron-LM, Shoeybi et al., 2019). The output
layer and its loss are computed for a part of the rows on each rank. Weights are DTensors, so FSDP2, clipping and
checkpoints know what they hold; layers, whose kernels take plain tensors, see each rank's part while a module runs.

Two weights hold several matrices below one another: query, key and value, and the two of a gate. Rows of these are put
in another order first, so that a contiguous cut gives each rank its part of every matrix. `ranks.rows_of`
knows the order; checkpoints have the plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from keyspan.layers import SwiGLU, linear_cross_entropy
from keyspan.models.gpt import GPT, Block


def cut_model(model: GPT, mesh: DeviceMesh) -> None:
    """Make the weights of a model, which all ranks have alike, DTensors on a one-dimensional mesh; cut those of blocks.

    The model is one that `ranks.check_model` has let pass.
    """
    config, ranks = model.config, mesh.size()
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, gated = block.attention, block.mlp
        assert isinstance(gated, SwiGLU)
        sizes = [heads * config.head_dim for heads in attention.heads]
        for owner, parts in ((attention.qkv, sizes), (gated.w12, [config.hidden] * 2)):
            order = _dealt(parts, ranks)
            owner.rows = order
            owner.weight = nn.Parameter(_placed(owner.weight[order.to(owner.weight.device)], mesh, Shard(0)))
        for owner in (attention.out, gated.w3):
            owner.weight = nn.Parameter(_placed(owner.weight, mesh, Shard(1)))
        attention.heads = [heads // ranks for heads in attention.heads]
        for inner in (attention, gated):
            inner.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0], mesh), *inputs[1:]))
            inner.register_forward_hook(lambda _, inputs, output: leave(output, mesh))
    if config.positions == "alibi":
        model.slopes = model.slopes.chunk(ranks)[mesh.get_local_rank()]
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not isinstance(p, DTensor):
                setattr(module, name, nn.Parameter(_placed(p, mesh, Replicate())))


def localize(module: nn.Module, apart: nn.Module | None = None) -> None:
    """While `module` runs, let the modules in it, but those in `apart`, see the local parts of their weights."""
    other = set() if apart is None else set(apart.modules())
    owners = [owner for owner in module.modules() if owner not in other]

    def show(*_: Any) -> None:
        for owner in owners:
            for name, p in owner.named_parameters(recurse=False):
                if isinstance(p, DTensor):
                    owner.__dict__[name] = p.to_local()  # found before the parameter of this name

    def hide(*_: Any) -> None:
        for owner in owners:
            for name, _p in owner.named_parameters(recurse=False):
                owner.__dict__.pop(name, None)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)


def loss(model: GPT, hidden: Tensor, targets: Tensor, mesh: DeviceMesh) -> Tensor:
    """As `GPT.loss`, of hidden states that all ranks have; each computes the logits of its part of the rows.

    0 where no target counts.
    """
    rank, ranks = mesh.get_local_rank(), mesh.size()
    own = targets.tensor_split(ranks)[rank]
    mine = enter(hidden, mesh).tensor_split(ranks)[rank]
    nats = linear_cross_entropy(
        mine, enter(model.head_weight, mesh), own, softcap=model.config.logit_softcap, reduction="sum"
    )
    return leave(nats, mesh) / (targets >= 0).sum().clamp(min=1)


def enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x`, which all ranks have alike; its gradient is the sum of theirs."""
    found: Tensor = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    return found


def leave(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' `x`; its gradient, which all ranks have alike, is that of each."""
    found: Tensor = DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()
    return found


def _dealt(sizes: list[int], ranks: int) -> Tensor:
    """Rows of matrices of these sizes, which lie below one another: those of the first rank, of all, come first."""
    parts = [part.chunk(ranks) for part in torch.arange(sum(sizes)).split(sizes)]
    return torch.cat([part[rank] for rank in range(ranks) for part in parts])


def _placed(x: Tensor, mesh: DeviceMesh, placement: Shard | Replicate) -> DTensor:
    return distribute_tensor(x.detach(), mesh, [placement], src_data_rank=None)
