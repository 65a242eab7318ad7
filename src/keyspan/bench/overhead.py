"""Host time of a call whose work the device finishes at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import keyspan
from keyspan.backends import load
from keyspan.bench.clock import synchronize
from keyspan.bench.report import Report
from keyspan.core.problem import make_problem
from keyspan.dispatch.choose import choose


def overhead(report: Report, device: torch.device, calls: int = 20, turns: int = 40) -> None:
    """Microseconds that the host spends on a small call: medians of `turns` runs of `calls` calls."""
    q = torch.randn(1, 128, 4, 64, device=device, dtype=torch.bfloat16)
    one, cache = (torch.randn(8, n, 4, 64, device=device, dtype=torch.bfloat16) for n in (1, 2048))
    needed = q.clone().requires_grad_()
    grad = torch.randn_like(q)
    ranges = keyspan.Causal().lower(1, 128, 128, device)
    problem = make_problem(q, q, q, mask=ranges)[0]
    backend = load(choose(problem, None))

    def sdpa(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)

    timed: dict[str, Callable[[], object]] = {
        "keyspan": lambda: keyspan.attention(q, q, q, mask=ranges),
        "keyspan, mask=Causal()": lambda: keyspan.attention(q, q, q, mask=keyspan.Causal()),
        "keyspan, no mask": lambda: keyspan.attention(q, q, q),
        "keyspan, decoding in splits": lambda: keyspan.attention(one, cache, cache),
        "keyspan, without replay": lambda: backend.forward(make_problem(q, q, q, mask=ranges)[0]),
        "keyspan, launch alone": lambda: backend.forward(problem),
        "sdpa": lambda: sdpa(q),
        "keyspan, forward and backward": lambda: torch.autograd.grad(
            keyspan.attention(needed, needed, needed, mask=ranges), needed, grad
        ),
        "sdpa, forward and backward": lambda: torch.autograd.grad(sdpa(needed), needed, grad),
    }
    found = {}
    for name, call in timed.items():
        for _ in range(calls):
            call()
        spans = []
        for _ in range(turns):
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                call()
            spans.append((time.perf_counter() - began) / calls * 1e6)
        found[name] = statistics.median(spans)
    text = "host µs per call: " + "; ".join(f"{name} {x:.1f}" for name, x in found.items())
    report.tell("overhead", text, microseconds=found)
