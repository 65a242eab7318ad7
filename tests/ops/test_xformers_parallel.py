"""Tensor- and sequence-parallel linears on two processes over gloo, against the same products on one."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from keyspan import ops as xops
from keyspan.ops import parallel

RANKS, M, IN, OUTS = 2, 6, 4, [4, 8]
exact = {"rtol": 1e-12, "atol": 1e-12}

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs gloo and fork-free spawn"
)


def shared(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(x: Tensor, rank: int, dim: int = 0) -> Tensor:
    """This rank's chunk of x, as a leaf."""
    return x.chunk(RANKS, dim)[rank].clone().requires_grad_()


def strided(x: Tensor, rank: int, dim: int) -> Tensor:
    """The rows or columns that the linears of this rank hold: every RANKS-th."""
    return x.index_select(dim, torch.arange(rank, x.shape[dim], RANKS))


def column_then_row(rank: int, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """A feed-forward with its hidden layer split over ranks: outputs and gradients equal those of one process."""

    def init(seed: int) -> Callable[[Tensor], None]:
        return lambda w: w.copy_(shared(*w.shape, seed=seed + w.shape[0]))

    torch.set_default_dtype(torch.float64)
    options = {"process_group": group, "bias": False, "sequence_parallel": sequence_parallel}
    column = xops.ColumnParallelLinear(IN, OUTS, gather_output=False, init_method=init(10), **options)
    row = xops.RowParallelLinear(OUTS[1], IN, input_is_parallel=True, init_method=init(20), **options)
    full_x = shared(M, 3, IN, seed=1)
    x = mine(full_x, rank) if sequence_parallel else full_x.clone().requires_grad_()
    short, hidden = column(x)
    out = row(hidden.tanh())

    one_x = full_x.clone().requires_grad_()
    w_short, w_hidden = (shared(n, IN, seed=10 + n).requires_grad_() for n in OUTS)
    w_out = shared(IN, OUTS[1], seed=20 + IN).requires_grad_()
    want_short, want = one_x @ w_short.t(), (one_x @ w_hidden.t()).tanh() @ w_out.t()
    cotangent, short_cotangent = shared(M, 3, IN, seed=2), shared(M, 3, OUTS[0], seed=3)
    ((want * cotangent).sum() + (want_short * short_cotangent).sum()).backward()

    my_cotangent = cotangent.chunk(RANKS)[rank] if sequence_parallel else cotangent
    ((out * my_cotangent).sum() + (short * strided(short_cotangent, rank, 2)).sum()).backward()
    torch.testing.assert_close(out, want.chunk(RANKS)[rank] if sequence_parallel else want, **exact)
    torch.testing.assert_close(short, strided(want_short, rank, 2), **exact)
    grad_x = one_x.grad.chunk(RANKS)[rank] if sequence_parallel else one_x.grad
    torch.testing.assert_close(x.grad, grad_x, **exact)
    for weight, whole in zip(column.weights, (w_short, w_hidden), strict=True):
        torch.testing.assert_close(weight.grad, strided(whole.grad, rank, 0), **exact)
    torch.testing.assert_close(row.weight.grad, strided(w_out.grad, rank, 1), **exact)


def fused(rank: int, group: dist.ProcessGroup) -> None:
    x, weights = shared(M, IN, seed=1), [shared(n, IN, seed=n) for n in OUTS]
    got = xops.fused_allgather_and_linear(mine(x, rank).detach(), weights, group=group)
    for result, weight in zip(got, weights, strict=True):
        torch.testing.assert_close(result, x @ weight.t(), **exact)
    out = torch.empty(M, OUTS[0], dtype=torch.float64)
    xops.fused_allgather_and_linear(mine(x, rank).detach(), weights[0], group=group, out=out)
    torch.testing.assert_close(out, x @ weights[0].t(), **exact)

    inputs = [shared(M, IN, seed=30 + r) for r in range(RANKS)]
    total = sum(i @ weights[0].t() for i in inputs)
    scattered = xops.fused_linear_and_reducescatter(inputs[rank], weights[0], group=group)
    torch.testing.assert_close(scattered, total.chunk(RANKS)[rank], **exact)

    seen: dict[int, Tensor] = {}
    xops.fused_allgather_and_anything(
        [inputs[rank]], lambda shards, source, streams: seen.update({source: shards[0]}), group=group
    )
    assert all(torch.equal(seen[r], inputs[r]) for r in range(RANKS))
    mine_out = torch.empty(M // RANKS, OUTS[0], dtype=torch.float64)

    def matmul(outputs: list[Tensor], target: int, streams: object) -> None:
        outputs[0].copy_(inputs[rank].chunk(RANKS)[target] @ weights[0].t())

    xops.fused_anything_and_reducescatter(matmul, [mine_out], group=group)
    torch.testing.assert_close(mine_out, total.chunk(RANKS)[rank], **exact)

    with pytest.raises(NotImplementedError, match="fp8"):
        xops.fused_allgather_and_linear(x, weights[0], group=group, scale_scattered_input=x, scale_weight=x)
    with pytest.raises(ValueError, match="got 5 rows, want a multiple"):
        parallel.reduce_scatter_along_first_dim(x[:5], process_group=group)
    with pytest.raises(ValueError, match="bias: got True, want False"):
        xops.ColumnParallelLinear(IN, OUTS, process_group=group)
    with pytest.raises(TypeError, match="out_features: got int"):
        xops.ColumnParallelLinear(IN, 4, process_group=group, bias=False, gather_output=False)
    with pytest.raises(ValueError, match="in_features: got 3, want a multiple"):
        xops.RowParallelLinear(3, 4, process_group=group, bias=False, input_is_parallel=True)


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    try:
        fused(rank, group)
        column_then_row(rank, group, sequence_parallel=False)
        column_then_row(rank, group, sequence_parallel=True)
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=RANKS)
