"""What is timed: forward and backward beside peers, decoding, 8 bits, one long sequence, the machine's ceilings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import keyspan
from on_gpu.board import Board
from on_gpu.checks import STORED
from on_gpu.clock import as_graph, times
from on_gpu.providers import Provider, flex, ours
from on_gpu.works import Work, inputs_of, mask_of

CACHES = 2**30
"""Bytes of keys and values that decoding reads in turn: many times what L2 holds."""


def bench(board: Board, w: Work, chosen: dict[str, Provider], left: Callable[[], float]) -> None:
    """Forward and backward of a work by every provider that can, in turns."""
    torch.manual_seed(0)
    inputs = inputs_of(w)
    go = torch.randn(w.B, w.N, w.H, w.D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    forward, backward, results, memory = {}, {}, {}, {}
    for name, provider in chosen.items():
        if left() < 14:
            return
        try:
            function = provider(w)
            if function is None:
                continue
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = function(*inputs)
            grads = torch.autograd.grad(out, inputs.differentiable, go, retain_graph=True)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            results[name] = [x.detach() for x in (out, *grads)]
            forward[name] = as_graph(torch.no_grad()(partial(function, *inputs)))
            backward[name] = partial(torch.autograd.grad, out, inputs.differentiable, go, retain_graph=True)
            del grads
        except Exception as error:
            print("skip", name, w, _brief(error), flush=True)
    against = next((n for n in ("flex", "cudnn", "flash") if n in results), None)
    for direction, calls, products in (("forward", forward, 2), ("backward", backward, 5)):
        found: dict[str, list[float]] = {n: [] for n in calls}
        for _ in range(2):
            for n, call in calls.items():
                if left() > 6:
                    found[n] += times(call, 60)
        medians = {n: statistics.median(x) for n, x in found.items() if x}
        if "keyspan" not in medians:
            continue
        peers = {n: m for n, m in medians.items() if n != "keyspan"}
        best = min(peers, key=peers.__getitem__) if peers else None
        rates = {n: w.flops(products) / m / 1e9 for n, m in medians.items()}
        off = None
        if against and "keyspan" in results:
            pick = slice(0, 1) if direction == "forward" else slice(1, None)
            pairs = zip(results["keyspan"][pick], results[against][pick], strict=True)
            off = max(_difference(a, b) for a, b in pairs)
        ratio = medians[best] / medians["keyspan"] if best else None
        line = f"{w!s:34s} {direction:8s} " + "  ".join(f"{n} {r:.0f}" for n, r in rates.items())
        line += f"  | x{ratio:.2f} of {best}" if best else ""
        line += "" if off is None else f"  diff {off:.1e}"
        board.add({**w._asdict(), "direction": direction, "ms": medians, "tflops": rates, "ratio": ratio,
                   "best_peer": best, "difference": off, "peak_mib": memory, "line": line})  # fmt: skip


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of a from b, in the norm, as a share of b."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200].replace("\n", " ")


def decode(board: Board, B: int, N: int, H: int, G: int, D: int, page: int | None, left: Callable[[], float]) -> None:
    """One token per sequence; lengths on the device; time with caches that rotate, so that L2 holds none of it."""
    from torch.nn.attention import SDPBackend

    copies = max(2, math.ceil(CACHES / (4 * B * N * G * D)))
    caches = [[torch.randn(1, B * N, G, D, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(copies)]
    q = torch.randn(1, B, H, D, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((B,), N, device="cuda", dtype=torch.int32)
    ones = torch.ones(B, device="cuda", dtype=torch.int32)
    if page:
        table = torch.randperm(B * N // page, device="cuda").int().view(B, -1)
        mask = keyspan.PagedKeys(ones, lengths, table, page) & keyspan.Causal("bottom_right")
    else:
        mask = keyspan.PaddedKeys(ones, lengths, N) & keyspan.Causal("bottom_right")
    ranges = mask.lower(1, B, B * N, "cuda")
    calls: dict[str, Callable[..., Any]] = {
        "keyspan": lambda k, v: keyspan.attention(q, k, v, mask=ranges, backend="triton").view(B, H, D)
    }
    if not page:
        qt = q.view(B, 1, H, D).transpose(1, 2)
        ranges_b = (keyspan.KeyLengths(lengths) & keyspan.Causal("bottom_right")).lower(B, 1, N, "cuda")
        calls["keyspan batch"] = lambda k, v: keyspan.attention(
            q.view(B, 1, H, D), *(x.view(B, N, G, D) for x in (k, v)), mask=ranges_b, backend="triton"
        ).view(B, H, D)
        for name, kind in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

            def peer(k: Any, v: Any, kind: Any = kind) -> Any:
                from torch.nn.attention import sdpa_kernel

                with sdpa_kernel(kind):
                    kv = (x.view(B, N, G, D).transpose(1, 2) for x in (k, v))
                    return F.scaled_dot_product_attention(qt, *kv, enable_gqa=H != G).view(B, H, D)

            calls[name] = peer
    if not page and left() > 150:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        calls["flex"] = lambda k, v: compiled(
            qt, *(x.view(B, N, G, D).transpose(1, 2) for x in (k, v)), enable_gqa=H != G
        ).view(B, H, D)
    # The same numbers in 8 bits, with a scale for each sequence and head, or for each page and head.
    run = page or N
    stored = {
        f"keyspan {name}": [[keyspan.quantize(x, kind, run) for x in cache] for cache in caches]
        for name, kind in STORED.items()
    }
    for name in stored:
        calls[name] = lambda k, v: keyspan.attention(
            q, k[0], v[0], mask=ranges, key_scale=k[1], value_scale=v[1], backend="triton"
        ).view(B, H, D)
    graphs: dict[str, list[Callable[[], Any]]] = {}
    outs: dict[str, torch.Tensor] = {}
    for name, call in calls.items():
        if left() < 8:
            return
        try:
            with torch.no_grad():
                own = stored.get(name, caches)
                outs[name] = call(*own[0]).float()
                graphs[name] = [as_graph(partial(call, *cache)) for cache in own]
        except Exception as error:
            print("skip", name, "decode", _brief(error), flush=True)
    found: dict[str, list[float]] = {n: [] for n in graphs}
    with torch.no_grad():
        for _ in range(3):
            for n, replays in graphs.items():
                for replay in replays[:8]:
                    found[n] += times(replay, 3, 5)
    of_cache = {n: sum(y.numel() * y.element_size() for x in own[0] for y in x) for n, own in stored.items()}
    state = 4 * B * N * G * D
    ms = {n: statistics.median(x) for n, x in found.items() if x}
    rates = {n: of_cache.get(n, state) / m / 1e9 for n, m in ms.items()}
    peers = {n: m for n, m in ms.items() if not n.startswith("keyspan")}
    against_bf16 = {n: [round(ms["keyspan"] / ms[n], 3), _difference(outs[n], outs["keyspan"])]
                    for n in stored if n in ms and "keyspan" in ms}  # fmt: skip
    best = min(peers, key=peers.__getitem__) if peers else None
    ratio = peers[best] / ms["keyspan"] if best else None
    against = next((n for n in outs if n != "keyspan" and n not in stored), None)
    off = _difference(outs["keyspan"], outs[against]) if against else None
    line = f"decode B{B} N{N} H{H}/{G} D{D} {'pages of ' + str(page) if page else 'contiguous'}: "
    line += "  ".join(f"{n} {r:.2f} TB/s ({ms[n] * 1e3:.0f} µs)" for n, r in rates.items())
    line += f"  ratio {ratio} diff {off}; of bf16's speed, and difference: {against_bf16}"
    board.add({"decode": True, "B": B, "N": N, "H": H, "G": G, "D": D, "page": page, "ms": ms, "tb_per_s": rates,
               "ratio": ratio, "best_peer": best, "difference": off, "of_bf16_speed_and_difference": against_bf16,
               "line": line})  # fmt: skip


def forward_stored(board: Board, D: int, kind: str) -> None:
    """Forward with inputs in fp8, and with keys and values in 8 bits, beside bf16."""
    w = Work(2, 2048 // D, 2048 // D, 8192, D, kind)
    x = [torch.randn(w.B, w.N, w.H, D, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    mask = mask_of(kind)
    ranges = None if mask is None else mask.lower(w.B, w.N, w.N, "cuda")
    names = ("query_scale", "key_scale", "value_scale")

    def call(dtype: torch.dtype | None, first: int) -> Callable[[], torch.Tensor]:
        """Attention with inputs from `first` on stored as `dtype`."""
        stored = [keyspan.quantize(t, dtype) for t in x[first:]] if dtype else []
        scales = {name: scale for name, (_, scale) in zip(names[first:], stored, strict=False)}
        inputs = [*x[:first], *(t for t, _ in stored)] if dtype else x
        return lambda: keyspan.attention(*inputs, mask=ranges, backend="triton", output_dtype=torch.bfloat16, **scales)

    calls = {"bf16": call(None, 0), "fp8": call(torch.float8_e4m3fn, 0), "fp8 keys": call(torch.float8_e4m3fn, 1),
             "int8 keys": call(torch.int8, 1)}  # fmt: skip
    outs = {n: f().float() for n, f in calls.items()}
    graphs = {n: as_graph(f) for n, f in calls.items()}
    found: dict[str, list[float]] = {n: [] for n in graphs}
    for _ in range(2):
        for n, replay in graphs.items():
            found[n] += times(replay, 60)
    rates = {n: w.flops(2) / statistics.median(t) / 1e9 for n, t in found.items()}
    off = {n: _difference(y, outs["bf16"]) for n, y in outs.items()}
    line = f"{w} forward, TFLOP/s (difference from bf16): "
    line += ", ".join(f"{n} {r:.0f} ({off[n]:.1e})" for n, r in rates.items())
    board.add({**w._asdict(), "stored_forward": True, "tflops": rates, "difference": off, "line": line})


def long(board: Board, N: int) -> float:
    """One sequence, forward and backward: time and peak memory. The second turn counts; returns forward's rate."""
    q, k, v = (torch.randn(1, N, 1, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ranges = keyspan.Causal().lower(1, N, N, "cuda")
    go = torch.randn_like(q)
    before = torch.cuda.memory_allocated()
    turns = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.time()
        out = keyspan.attention(q, k, v, mask=ranges, backend="triton")
        torch.cuda.synchronize()
        middle = time.time()
        grads = torch.autograd.grad(out, (q, k, v), go)
        torch.cuda.synchronize()
        turns.append([middle - began, time.time() - middle])
        del out, grads
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    forward, backward = turns[-1]
    rate = [2 * N * N * 128 / forward / 1e12, 5 * N * N * 128 / backward / 1e12]
    board.add({"long": N, "seconds": turns[-1], "first": turns[0], "peak_mib": peak, "tflops": rate,
               "line": f"{N} tokens, one head: {forward:.3f} s + {backward:.3f} s, {rate[0]:.0f} and {rate[1]:.0f} "
               f"TFLOP/s, peak {peak:.0f} MiB; the first turn {turns[0][0]:.2f} s + {turns[0][1]:.2f} s"})  # fmt: skip
    return rate[0]


def ceilings(board: Board) -> None:
    """What the machine can do at most: a matrix product, a copy."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / statistics.median(times(as_graph(lambda: x @ y), 200)) / 1e9
    a = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.numel() / statistics.median(times(lambda: b.copy_(a), 200)) / 1e9
    board.head |= {"matmul_tflops": matmul, "copy_tb_per_s": copy}
    print(f"ceilings: matmul {matmul:.0f} TFLOP/s, copy {copy:.2f} TB/s", flush=True)


def warm(w: Work, with_flex: bool) -> dict[str, Any]:
    """Compile what a bench row needs, in a process of its own; torch and Triton keep it on disk."""
    inputs = inputs_of(w)
    for provider in (ours, flex) if with_flex else (ours,):
        call = provider(w)
        if call is None:
            continue
        with torch.no_grad():
            call(*inputs)
        out = call(*inputs)
        torch.autograd.grad(out, inputs.differentiable, torch.randn_like(out))
    torch.cuda.synchronize()
    return {}
