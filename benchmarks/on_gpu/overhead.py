"""What the host spends on a call."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

import keyspan
from keyspan.backends import load
from keyspan.core.problem import make_problem
from on_gpu.board import Board


def overhead(board: Board) -> None:
    """Microseconds the host spends on a call that the device is done with at once."""
    q = torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    one, cache = (torch.randn(8, n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 2048))
    needed = q.clone().requires_grad_()
    grad = torch.randn_like(q)
    ranges = keyspan.Causal().lower(1, 128, 128, "cuda")
    problem = make_problem(q, q, q, mask=ranges)[0]

    def sdpa(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)

    found = {}
    for name, f in {
        "keyspan": lambda: keyspan.attention(q, q, q, mask=ranges),
        "keyspan, mask=Causal()": lambda: keyspan.attention(q, q, q, mask=keyspan.Causal()),
        "keyspan, no mask": lambda: keyspan.attention(q, q, q),
        "keyspan, decoding in splits": lambda: keyspan.attention(one, cache, cache),
        "keyspan, the long way": lambda: load("triton").forward(make_problem(q, q, q, mask=ranges)[0]),
        "keyspan, launch alone": lambda: load("triton").forward(problem),
        "sdpa": lambda: sdpa(q),
        "keyspan, forward and backward": lambda: torch.autograd.grad(
            keyspan.attention(needed, needed, needed, mask=ranges), needed, grad
        ),
        "sdpa, forward and backward": lambda: torch.autograd.grad(sdpa(needed), needed, grad),
    }.items():
        for _ in range(50):
            f()
        spans = []
        for _ in range(40):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(20):
                f()
            spans.append((time.perf_counter() - began) / 20 * 1e6)
        found[name] = statistics.median(spans)
    board.add({"overhead_us": found, "line": f"host µs per call: { {n: round(x, 1) for n, x in found.items()} }"})
