"""Host time of a small call, whose work takes the device almost no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

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
    """Microseconds that the host spends on a small call: medians of `turns` runs of `calls` calls, the calls in turn.

    Backward is timed with the forward that it needs, gradients of query, key and value.
    """
    timed: dict[str, Callable[[], object]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        q, k, v = (torch.randn(1, 128, 4, 64, device=device, dtype=dtype) for _ in "qkv")
        needed = tuple(x.clone().requires_grad_() for x in (q, k, v))
        ranges = keyspan.Causal().lower(1, 128, 128, device)
        attentions: dict[str, Callable[..., Tensor]] = {
            "keyspan": partial(keyspan.attention, mask=keyspan.Causal()),
            "keyspan, given ranges": partial(keyspan.attention, mask=ranges),
            "keyspan, no mask": keyspan.attention,
            "sdpa": _sdpa,
        }
        for label, call in attentions.items():
            timed[f"{name} {label}"] = partial(call, q, k, v)
            timed[f"{name} {label}, with gradients"] = partial(_gradients, call, needed, torch.randn_like(q))
    one, cache = (torch.randn(8, n, 4, 64, device=device, dtype=torch.bfloat16) for n in (1, 2048))
    timed["bf16 keyspan, decoding in splits"] = lambda: keyspan.attention(one, cache, cache)
    problem = make_problem(one, cache, cache)[0]
    backend = load(choose(problem, None))
    timed["bf16 keyspan, decoding without replay"] = lambda: backend.forward(problem)
    spans: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(turns + 1):
        for name, small in timed.items():
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                small()
            if turn:  # the first turn compiles and records
                spans[name].append((time.perf_counter() - began) / calls * 1e6)
    found = {name: statistics.median(seconds) for name, seconds in spans.items()}

    def text(name: str) -> str:
        dtype, _, rest = name.partition(" ")
        peer = f"{dtype} sdpa" + (", with gradients" if rest.endswith(", with gradients") else "")
        ratio = "" if "sdpa" in name or "decoding" in name else f" ({found[name] / found[peer]:.2f} × sdpa)"
        return f"{name} {found[name]:.1f}{ratio}"

    report.tell("overhead", "host µs per call: " + "; ".join(map(text, found)), microseconds=found)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _gradients(call: Callable[..., Tensor], needed: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*needed), needed, grad)
