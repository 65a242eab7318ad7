"""`keyspan info` and `keyspan explain`: what is installed, which backend runs, and why each other one does not.

Both need torch alone, and run no attention. `python -m keyspan.info [--json]` is `keyspan info`.
"""

from __future__ import annotations

import argparse
import json as json_module
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keyspan.backends import AUTOMATIC, BACKENDS, load
from keyspan.backends.schedule import row_blocks
from keyspan.core import shims
from keyspan.core.biases import Alibi
from keyspan.core.masks import Causal, Documents, Mask, Window
from keyspan.core.problem import Options, Problem, check_dropout, make_problem
from keyspan.dispatch.api import autocast_inputs
from keyspan.dispatch.cache import CACHE
from keyspan.dispatch.choose import choose
from keyspan.dispatch.flops import backward_flops, forward_flops, visible_area

if TYPE_CHECKING:
    from typing_extensions import Unpack


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the accelerator where there is one, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {name!r}, want auto or a torch device that is here ({reason})") from None
    if device.type == "meta":
        raise ValueError("device: got 'meta', whose tensors hold no numbers; want auto or a device that computes")
    return device


def find_dtype(name: str) -> torch.dtype:
    """The dtype of this name: fp32, bf16, fp16 and the like, or torch's own name."""
    long = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)
    dtype = getattr(torch, long, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {name!r}, want fp32, bf16, fp16, fp64 or the name of a torch dtype")
    return dtype


def collect() -> dict[str, Any]:
    """Versions, devices, and for each backend why it cannot run here, or None."""
    import keyspan
    from keyspan.backends.native import binding  # loads it, which nothing should before it is asked for

    cuda = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    devices = list(dict.fromkeys([find_device("cpu"), find_device("auto")]))
    problems = [make_problem(*(torch.zeros(1, 16, 1, 64, device=device) for _ in range(3)))[0] for device in devices]
    return {
        "keyspan": keyspan.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "native": {
            "instructions": binding.ISAS[binding.isa_number()] if binding.SUPPORTED else None,
            "runs": list(binding.SUPPORTED),
            "threads": binding.threading(),
        },
        "devices": list(map(str, devices)),
        "cuda": cuda,
        "cache": CACHE.state(),
        "private names missing": shims.MISSING,
        "backends": {name: _reason_everywhere(name, problems) for name in BACKENDS},
    }


def _reason_everywhere(name: str, problems: list[Problem]) -> str | None:
    """Why a backend can compute none of these problems, one for each device; None where it can one."""
    reasons = [load(name).reason_against(problem) for problem in problems]
    return None if None in reasons else reasons[-1]


def main(json: bool = False) -> None:
    """Print versions, devices and each backend: available, or why not.

    Args:
        json: as one JSON object.
    """
    found = collect()
    if json:
        print(json_module.dumps(found, indent=2))
        return
    backends = found.pop("backends")
    for name, reason in backends.items():
        chosen = "" if name in AUTOMATIC else " (when asked for by name)"
        print(f"{'attention.' + name:<30}{'available' + chosen if reason is None else 'unavailable: ' + reason}")
    native = found.pop("native")
    if native["runs"]:
        print(f"{'native':<30}{native['instructions']} of {', '.join(native['runs'])}; {native['threads']}")
    cache = found.pop("cache")
    counts = f"{cache['hits']} hits, {cache['misses']} misses, {cache['recorded']} recorded"
    print(f"{'cache of calls':<30}{cache['entries']} entries, {cache['bytes']} bytes of masks; {counts}")
    missing = found.pop("private names missing")
    for name, consequence in missing.items():
        print(f"{name + ' is missing':<30}{consequence}")
    for name, value in found.items():
        print(f"{name:<30}{(', '.join(value) or 'none') if isinstance(value, list) else value}")


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run, why not the others, and how much work it is. Printing it gives a table."""

    backend: str
    reasons: dict[str, str | None]
    """By backend: why it cannot, or None."""
    kernel: str | None
    """Of `triton`: which kernels compute the forward and the backward pass, and why not the faster ones."""
    shape: str
    visible: int
    """Visible (query, key) pairs over batch and heads."""
    pairs: int
    """All of them."""
    forward_flops: int
    backward_flops: int
    bytes: int
    """Of query, key, value, their scales, output and lse: what must be moved at least."""
    tiles: int
    """Tiles of 256 × 256 in which something is visible, per head."""
    tiles_skipped: int
    """Tiles that are not visited at all, per head."""

    def __str__(self) -> str:
        share = self.visible / self.pairs if self.pairs else 0.0
        total = self.tiles + self.tiles_skipped
        lines = [
            ("backend", self.backend),
            *([("kernel", self.kernel)] if self.kernel else []),
            *(
                (f"  {name}", "can" if reason is None else f"cannot: {reason}")
                for name, reason in self.reasons.items()
                if name != self.backend
            ),
            ("problem", self.shape),
            ("visible area", f"{self.visible:,} of {self.pairs:,} pairs ({share:.1%})"),
            ("forward", f"{self.forward_flops / 1e9:,.3f} GFLOP"),
            ("backward", f"{self.backward_flops / 1e9:,.3f} GFLOP"),
            ("least traffic", f"{self.bytes / 2**20:,.2f} MiB"),
            ("tiles", f"{self.tiles:,} visited, {self.tiles_skipped:,} of {total:,} skipped"),
        ]
        return "\n".join(f"{name:<14}{value}" for name, value in lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Explanation:
    """What `attention` would do with these arguments, which are the same as there; nothing is computed or drawn.

    Returns:
        The backend chosen, each other one's reason, visible area, FLOPs, bytes and tiles. Printable.
    """
    dropout_p = options.pop("dropout_p", 0.0)  # making the problem would draw a seed
    check_dropout(dropout_p)
    problem, _ = make_problem(*autocast_inputs(query, key, value), **options)
    problem = problem._replace(dropout_p=float(dropout_p))
    B, M, G, H, K = problem.query.shape
    V, N = problem.value.shape[-1], problem.N
    lo, hi, _ = problem.ranges
    side = 256
    visited = sum(
        len({n for span in tile.spans for n in range(span.first // side, -(-span.last // side))})
        for tile in row_blocks(lo, hi, None, side)
    )
    copies = lo.shape[1]
    total = copies * -(-M // side) * -(-problem.row_length // side)
    moved = B * M * G * H * K * problem.query.element_size()
    moved += problem.key.shape[0] * problem.key.shape[1] * G * (K + V) * problem.key.element_size()
    scales = (options.get("query_scale"), options.get("key_scale"), options.get("value_scale"))
    moved += sum(x.numel() * x.element_size() for x in scales if x is not None)
    moved += B * M * G * H * (V * problem.output_dtype.itemsize + problem.compute_dtype.itemsize)
    chosen = choose(problem, backend)
    return Explanation(
        backend=chosen,
        reasons={name: load(name).reason_against(problem) for name in BACKENDS},
        kernel=load(chosen).kernels(problem) if chosen == "triton" else None,  # type: ignore[attr-defined]
        shape=f"B {B}, M {M}, N {N}, G {G}, H {H}, K {K}, V {V}, {str(problem.query.dtype)[6:]}"
        + (f", keys {str(problem.key.dtype)[6:]}" if problem.quantized else ""),
        visible=visible_area(problem),
        pairs=B * G * H * M * N,
        forward_flops=forward_flops(problem),
        backward_flops=backward_flops(problem),
        bytes=moved,
        tiles=visited,
        tiles_skipped=max(total - visited, 0),
    )


def info_command(words: list[str] | None = None) -> None:
    """`keyspan info`."""
    parser = _parser(
        "info", "Show versions, devices, and of each attention backend whether it is available, or why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    main(**vars(parser.parse_args(words)))


def explain_command(words: list[str] | None = None) -> None:
    """`keyspan explain`: what `explain` says of a problem given by its sizes."""
    parser = _parser(
        "explain", "Which backend computes a problem of this shape, why no other, and how much work it is."
    )
    add = parser.add_argument
    add("--queries", type=int, help="queries per batch entry (M); by default the documents' sum, or 4096")
    add("--keys", type=int, help="keys (N); by default as many as queries")
    add("--batch", type=int, default=1, help="batch size (B)")
    add("--heads", type=int, default=8, help="query heads")
    add("--kv-heads", type=int, help="key/value heads; by default as many as query heads")
    add("--dim", type=int, default=64, help="head dim of queries, keys and values")
    add("--dtype", default="fp32", help="dtype of queries, keys and values: fp32, bf16, fp16 or torch's name")
    add("--causal", action="store_true", help="query i sees the keys up to its own position")
    add("--window", type=int, help="keys before its own that a query sees")
    add("--documents", type=int, nargs="+", default=[], help="lengths of packed documents, which sum to the queries")
    add("--alibi", action="store_true", help="add ALiBi's bias")
    add("--device", default="cpu", help="auto (an accelerator where there is one, else the CPU), or a torch device")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    dtype, device = find_dtype(options.dtype), find_device(options.device)
    for names, least in ((("queries", "keys", "batch"), 0), (("heads", "kv_heads", "dim"), 1)):
        for name in names:
            if (size := getattr(options, name)) is not None and size < least:
                raise ValueError(f"{name}: got {size}, want at least {least}")
    queries = options.queries
    if queries is None:
        queries = sum(options.documents) if options.documents else 4096
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    keys = queries if options.keys is None else options.keys

    def zeros(length: int, heads: int) -> Tensor:
        # One number, expanded: only sizes matter here.
        return torch.zeros((), dtype=dtype, device=device).expand(options.batch, length, heads, options.dim)

    parts: list[Mask] = [Documents(options.documents)] if options.documents else []
    parts += [Causal()] if options.causal else []
    parts += [Window(options.window, None)] if options.window is not None else []
    mask = parts[0] if parts else None
    for part in parts[1:]:
        mask = part if mask is None else mask & part
    bias = Alibi(torch.ones(options.heads, device=device)) if options.alibi else None
    query, key = zeros(queries, options.heads), zeros(keys, kv_heads)
    found = explain(query, key, key, mask=mask, bias=bias)
    print(json_module.dumps(asdict(found), indent=2) if options.json else found)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    """The two commands use argparse, since they must run with torch alone."""
    style = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(prog=f"keyspan {command}", description=description, formatter_class=style)


if __name__ == "__main__":
    info_command()
