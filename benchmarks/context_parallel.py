"""Attention of one sequence over several devices, beside torch's `context_parallel` and DeepSpeed's Ulysses.

    torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py            # GPUs by NCCL, else CPUs by gloo
    torchrun … benchmarks/context_parallel.py --tokens 8192 --heads 8 --dim 64

Every way computes forward and backward of the same tensors. The ratio is to one device that computes the whole with the
same kernels; the error is the largest difference of output and gradients to Keyspan's on one device, relative to the
largest value of each. Ulysses (Jacobs et al. 2023) cuts heads, not rows, while it computes; it is left out where
`deepspeed` is not installed. Each rank of a CPU has one thread, and so has the one device.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import keyspan
from keyspan.parallel import ContextMask, Partition, context_attention

CUDA = torch.cuda.is_available()
Grads = list[Tensor]


def lengths_of(tokens: int) -> list[int]:
    """Lengths of documents: log-uniform from 120 to 20,000 tokens, and what is left."""
    found: list[int] = []
    generator = torch.Generator().manual_seed(0)
    while sum(found) < tokens:
        length = int(torch.exp(torch.empty(1).uniform_(4.8, 9.9, generator=generator)))
        found.append(min(length, tokens - sum(found)))
    return found


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def median(call: Callable[[], object], repeats: int, alone: bool = False) -> float:
    """Seconds of a call, of the slowest rank."""
    times = []
    for turn in range(repeats + 2):
        sync()
        if not alone:
            dist.barrier()
        began = time.perf_counter()
        call()
        sync()
        if turn > 1:
            times.append(time.perf_counter() - began)
    found = torch.tensor(sorted(times)[len(times) // 2])
    if not alone:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def error(found: Grads, want: Grads) -> float:
    far = [float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(found, want, strict=True)]
    worst = torch.tensor(max(far))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def results(out: Tensor, inputs: Grads, grad: Tensor) -> Grads:
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def compare(name: str, mask: keyspan.Mask, tensors: Grads, repeats: int, torch_too: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    *inputs, grad = tensors
    whole = [x.requires_grad_() for x in inputs]
    T = grad.shape[1]

    def one() -> Grads:
        return results(keyspan.attention(*whole, mask=mask), whole, grad)

    want = one()
    single = median(one, repeats, alone=True) if rank == 0 else 0.0
    dist.barrier()
    say(f"{name}: one device {single * 1e3:.1f} ms")

    def report(way: str, call: Callable[[], Grads], part: Callable[[Tensor], Tensor], alone: float) -> None:
        worst = error(call(), [part(x) for x in want])
        seconds = median(call, repeats)
        say(f"  {way:42} {seconds * 1e3:8.1f} ms  {alone / seconds:5.2f} x   error {worst:.1e}")

    partition = Partition.balanced(mask, T, ranks)

    def own(x: Tensor) -> Tensor:
        return partition.take(x, rank)

    for exchange in ("gather", "ring"):
        cut = ContextMask(mask, partition, device=grad.device, exchange=exchange)
        mine = [own(x).detach().requires_grad_() for x in whole]
        part = own(grad)

        def call(mine: Grads = mine, cut: ContextMask = cut, part: Tensor = part) -> Grads:
            return results(context_attention(mine[0], mine[1], mine[2], cut), mine, part)

        report(f"Keyspan, {exchange}", call, own, single)
    if find_spec("deepspeed") is None:
        say("  Ulysses: deepspeed is not installed")
    else:
        ulysses(mask, whole, grad, report, single)
    if torch_too:
        torchs(whole, grad, repeats, report)


def contiguous(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size(), 1)[dist.get_rank()]


def ulysses(mask: keyspan.Mask, whole: Grads, grad: Tensor, report: Callable[..., None], single: float) -> None:
    """Whole sequences of some heads on each rank, with Keyspan's kernels and, where all is causal, with torch's."""
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.comm.init_distributed(dist_backend="nccl" if CUDA else "gloo", verbose=False)

    def keyspans(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return keyspan.attention(q, k, v, mask=mask)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).contiguous()

    ways: dict[str, Any] = {"Ulysses with Keyspan's kernels": keyspans}
    if isinstance(mask, keyspan.Causal):
        ways["Ulysses with SDPA"] = sdpa
    mine = [contiguous(x).detach().contiguous().requires_grad_() for x in whole]
    part = contiguous(grad).contiguous()
    for way, local in ways.items():
        layer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

        def call(layer: Any = layer) -> Grads:
            return results(layer(*mine, 0), mine, part)

        report(way, call, contiguous, single)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def torchs(whole: Grads, grad: Tensor, repeats: int, report: Callable[..., None]) -> None:
    """torch's own, of causal attention, on whole rows in its zig-zag."""
    from torch.distributed.tensor.experimental import context_parallel

    rank, ranks, T = dist.get_rank(), dist.get_world_size(), grad.shape[1]
    mesh = init_device_mesh(grad.device.type, (ranks,))
    heads_first = [x.detach().transpose(1, 2).contiguous() for x in (*whole, grad)]
    zigzag = Partition(
        tuple(((r * T // (2 * ranks), (r + 1) * T // (2 * ranks)),
               ((2 * ranks - 1 - r) * T // (2 * ranks), (2 * ranks - r) * T // (2 * ranks))) for r in range(ranks))
    )  # fmt: skip
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        alone = 0.0
        if rank == 0:
            inputs = [x.clone().requires_grad_() for x in heads_first[:3]]

            def one() -> Grads:
                return results(causal(*inputs), inputs, heads_first[3])

            alone = median(one, repeats, alone=True)
        dist.barrier()
        say(f"  torch, one device {alone * 1e3:.1f} ms")
        buffers = [x.clone() for x in heads_first]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            *inputs, part = buffers
            for x in inputs:
                x.requires_grad_()

            def call() -> Grads:
                found = results(causal(*inputs), inputs, part)
                return [x.transpose(1, 2) for x in found]

            try:
                report("torch's context_parallel", call, lambda x: zigzag.take(x, rank), alone)
            finally:
                for x in inputs:
                    x.requires_grad_(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=131072 if CUDA else 8192)
    parser.add_argument("--heads", type=int, default=16 if CUDA else 8)
    parser.add_argument("--dim", type=int, default=128 if CUDA else 64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if CUDA:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    T, H, D = arguments.tokens, arguments.heads, arguments.dim
    dtype = torch.bfloat16 if CUDA else torch.float32
    say(
        f"{dist.get_world_size()} × {torch.cuda.get_device_name() if CUDA else 'one thread'}, torch {torch.__version__}"
    )
    say(f"{T} tokens, {H} heads of {D}, {dtype}; forward and backward")
    lengths = lengths_of(T)
    problems = {
        f"{len(lengths)} documents, causal": (keyspan.Documents(lengths) & keyspan.Causal(), H),
        "causal": (keyspan.Causal(), H),
        f"causal, {H // 4} key heads": (keyspan.Causal(), H // 4),
    }
    for name, (mask, G) in problems.items():
        torch.manual_seed(0)
        tensors = [torch.randn(1, T, heads, D, device=device, dtype=dtype) for heads in (H, G, G, H)]
        # On CPUs torch's is wrong without an error, and has no backward; it takes no grouped keys.
        compare(name, mask, tensors, arguments.repeats, torch_too=CUDA and name == "causal")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
