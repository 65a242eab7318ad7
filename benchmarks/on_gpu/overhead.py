"""What the host spends on a call."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

import saccade
from on_gpu.board import Board
from saccade.backends import load
from saccade.core.problem import make_problem


def overhead(board: Board) -> None:
    """Microseconds the host spends on a call that the device is done with at once."""
    q = torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    ranges = saccade.Causal().lower(1, 128, 128, "cuda")
    found = {}
    problem = make_problem(q, q, q, mask=ranges)[0]
    for name, f in {
        "saccade, launch alone": lambda: load("triton").forward(problem),
        "saccade": lambda: saccade.attention(q, q, q, mask=ranges, backend="triton"),
        "saccade, no mask": lambda: saccade.attention(q, q, q, backend="triton"),
        "sdpa": lambda: F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True),
    }.items():
        with torch.no_grad():
            for _ in range(50):
                f()
            spans = []
            for _ in range(20):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(20):
                    f()
                spans.append((time.perf_counter() - began) / 20 * 1e6)
        found[name] = statistics.median(spans)
    board.add({"overhead_us": found, "line": f"host µs per call: { {n: round(x, 1) for n, x in found.items()} }"})
