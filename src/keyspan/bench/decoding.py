"""What `make gpu-check` times besides whole passes: decoding, inputs of 8 bits, one long sequence.

All go through the backend that is passed, so that the tests can run them on a CPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import keyspan
from keyspan.bench.clock import Clock, EventClock, WallClock, synchronize
from keyspan.bench.measure import difference
from keyspan.bench.report import Report
from keyspan.bench.works import gpu_work
from keyspan.testing import peak_memory

CACHES = 2**30
"""Bytes of keys and values that decoding reads in turn: many times what L2 holds."""
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _clock(device: torch.device, milliseconds: float, most: int) -> Clock:
    return EventClock(milliseconds, most) if device.type == "cuda" else WallClock(device)


def _medians(clock: Clock, calls: dict[str, list[Callable[[], Any]]], turns: int) -> dict[str, float]:
    """Median seconds of each provider's calls, visited in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, own in calls.items():
            for call in own:
                found[name] += clock.times(call)
    return {name: statistics.median(times) for name, times in found.items() if times}


@torch.no_grad()
def decode(
    report: Report,
    sizes: tuple[int, int, int, int, int],
    page: int | None,
    device: torch.device,
    backend: str | None,
    left: Callable[[], float],
) -> None:
    """One token for each of several sequences, lengths on the device, over caches that rotate so that L2 holds none.

    Args:
        sizes: B sequences, N keys each, query heads, key/value heads, head dim.
        page: keys per page of a paged cache; None: contiguous, beside torch's kernels.
    """
    B, N, H, G, D = sizes
    bf16 = torch.bfloat16
    copies = max(2, math.ceil(CACHES / (4 * B * N * G * D)))
    caches = [[torch.randn(1, B * N, G, D, device=device, dtype=bf16) for _ in "kv"] for _ in range(copies)]
    q = torch.randn(1, B, H, D, device=device, dtype=bf16)
    lengths = torch.full((B,), N, device=device, dtype=torch.int32)
    ones = torch.ones_like(lengths)
    layout: keyspan.PagedKeys | keyspan.PaddedKeys = keyspan.PaddedKeys(ones, lengths, N)
    if page:
        layout = keyspan.PagedKeys(ones, lengths, torch.randperm(B * N // page, device=device).int().view(B, -1), page)
    ranges = (layout & keyspan.Causal("bottom_right")).lower(1, B, B * N, device)
    calls: dict[str, Callable[[Any, Any], Tensor]] = {
        "keyspan": lambda k, v: keyspan.attention(q, k, v, mask=ranges, backend=backend).view(B, H, D)
    }
    if not page:
        calls |= _batched(q, sizes, lengths, device, backend, left)
    # The same numbers in 8 bits, with a scale for each sequence and head, or for each page and head.
    run = page or N
    stored = {
        f"keyspan {name}": [[keyspan.quantize(x, kind, run) for x in cache] for cache in caches]
        for name, kind in STORED.items()
    }
    for name in stored:
        calls[name] = lambda k, v: keyspan.attention(
            q, k[0], v[0], mask=ranges, key_scale=k[1], value_scale=v[1], backend=backend
        ).view(B, H, D)
    clock = _clock(device, 3, 5)
    ready: dict[str, list[Callable[[], Any]]] = {}
    outs: dict[str, Tensor] = {}
    for name, call in calls.items():
        if left() < 8:
            return
        try:
            own: list[Any] = stored.get(name, caches)
            outs[name] = call(*own[0]).float()
            ready[name] = [clock.prepare(partial(call, *cache)) for cache in own[:8]]
        except Exception as error:  # a peer that cannot is left out
            print("skip", name, "decode", f"{type(error).__name__}: {error}"[:200].replace("\n", " "), flush=True)
    ms = {name: seconds * 1e3 for name, seconds in _medians(clock, ready, 3).items()}
    moved = {n: sum(y.numel() * y.element_size() for x in cache[0] for y in x) for n, cache in stored.items()}
    rates = {n: moved.get(n, 4 * B * N * G * D) / m / 1e9 for n, m in ms.items()}
    of_bf16 = {n: (ms["keyspan"] / ms[n], difference(outs[n], outs["keyspan"])) for n in stored if n in ms}
    peers = {n: m for n, m in ms.items() if not n.startswith("keyspan")}
    best = min(peers, key=peers.__getitem__) if peers else None
    ratio = peers[best] / ms["keyspan"] if best else None
    text = f"decode B{B} N{N} H{H}/{G} D{D} {f'pages of {page}' if page else 'contiguous'}: "
    text += ", ".join(f"{n} {r:.2f} TB/s ({ms[n] * 1e3:.0f} µs)" for n, r in rates.items())
    text += (
        f"; {ratio:.2f} × {best} (differs by {difference(outs['keyspan'], outs[best]):.1e})" if best and ratio else ""
    )
    text += "; of bf16's speed: " + ", ".join(f"{n} {r:.2f} (differs by {d:.1e})" for n, (r, d) in of_bf16.items())
    report.tell("decoding", text, sizes=sizes, page=page, ms=ms, tb_per_s=rates, ratio=ratio, best_peer=best,
                of_bf16_speed_and_difference=of_bf16)  # fmt: skip


def _batched(
    q: Tensor,
    sizes: tuple[int, int, int, int, int],
    lengths: Tensor,
    device: torch.device,
    backend: str | None,
    left: Callable[[], float],
) -> dict[str, Callable[[Any, Any], Tensor]]:
    """Keyspan and its peers on the cache as a batch `[B, N, G, D]`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, N, H, G, D = sizes
    by_batch = (keyspan.KeyLengths(lengths) & keyspan.Causal("bottom_right")).lower(B, 1, N, device)
    first = q.view(B, 1, H, D).transpose(1, 2)

    def heads_first(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.view(B, N, G, D).transpose(1, 2), v.view(B, N, G, D).transpose(1, 2)

    def sdpa(k: Tensor, v: Tensor, kernel: SDPBackend) -> Tensor:
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(first, *heads_first(k, v), enable_gqa=H != G)
            return out.view(B, H, D)

    calls: dict[str, Callable[[Any, Any], Tensor]] = {
        "keyspan batch": lambda k, v: keyspan.attention(
            q.view(B, 1, H, D), *(x.view(B, N, G, D) for x in (k, v)), mask=by_batch, backend=backend
        ).view(B, H, D),
        "cudnn": partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION),
        "flash": partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION),
    }
    if left() > 150:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        calls["flex"] = lambda k, v: compiled(first, *heads_first(k, v), enable_gqa=H != G).view(B, H, D)
    return calls


@torch.no_grad()
def forward_stored(report: Report, kind: str, N: int, dim: int, device: torch.device, backend: str | None) -> None:
    """Forward with inputs in fp8, and with keys and values in 8 bits, beside bf16."""
    work = gpu_work(kind, N, dim)
    x = list(work.inputs(torch.bfloat16, device)[:3])
    ranges = work.ranges(device) if work.mask() is not None else None
    names = ("query_scale", "key_scale", "value_scale")

    def call(dtype: torch.dtype | None, first: int) -> Callable[[], Tensor]:
        """Attention with inputs from `first` on stored as `dtype`."""
        stored = [keyspan.quantize(t, dtype) for t in x[first:]] if dtype else []
        scales: dict[str, Any] = {name: scale for name, (_, scale) in zip(names[first:], stored, strict=False)}
        query, key, value = [*x[:first], *(t for t, _ in stored)] if dtype else x
        return lambda: keyspan.attention(
            query, key, value, mask=ranges, backend=backend, output_dtype=torch.bfloat16, **scales
        )

    calls = {"bf16": call(None, 0), "fp8": call(torch.float8_e4m3fn, 0), "fp8 keys": call(torch.float8_e4m3fn, 1),
             "int8 keys": call(torch.int8, 1)}  # fmt: skip
    outs = {n: f().float() for n, f in calls.items()}
    clock = _clock(device, 60, 40)
    seconds = _medians(clock, {n: [clock.prepare(f)] for n, f in calls.items()}, 2)
    rates = {n: work.flops() / s / 1e12 for n, s in seconds.items()}
    off = {n: difference(y, outs["bf16"]) for n, y in outs.items()}
    text = f"{work.title}, TFLOP/s: " + ", ".join(f"{n} {r:.0f} (differs by {off[n]:.1e})" for n, r in rates.items())
    report.tell("8 bits", text, work=work.title, tflops=rates, difference=off)


def long(report: Report, N: int, device: torch.device, backend: str | None) -> float:
    """One sequence, forward and backward: time and peak memory. The second turn counts; returns forward's TFLOP/s."""
    q, k, v = (torch.randn(1, N, 1, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ranges = keyspan.Causal().lower(1, N, N, device)
    cotangent = torch.randn_like(q)
    turns = []

    def turn() -> None:
        synchronize(device)
        began = time.perf_counter()
        out = keyspan.attention(q, k, v, mask=ranges, backend=backend)
        synchronize(device)
        middle = time.perf_counter()
        torch.autograd.grad(out, (q, k, v), cotangent)
        synchronize(device)
        turns.append((middle - began, time.perf_counter() - middle))

    turn()
    peak = peak_memory(turn) / 2**20
    first, (forward, backward) = turns
    rate = [2 * N * N * 128 / forward / 1e12, 5 * N * N * 128 / backward / 1e12]
    text = f"{N} tokens, one head: {forward:.3f} s + {backward:.3f} s, {rate[0]:.0f} and {rate[1]:.0f} TFLOP/s, "
    text += f"peak {peak:.0f} MiB; the first turn {first[0]:.2f} s + {first[1]:.2f} s"
    report.tell("long", text, tokens=N, seconds=turns[-1], first=first, peak_mib=peak, tflops=rate)
    return rate[0]
