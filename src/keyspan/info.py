"""`keyspan info` and `keyspan explain`: what is installed, which backend runs, and why each other one does not.

Knows the backends by name only and runs no attention. `python -m keyspan.info [--json]` needs torch alone.
"""

from __future__ import annotations

import json as json_module
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keyspan.backends import AUTOMATIC, BACKENDS, choose, load
from keyspan.backends.schedule import row_blocks
from keyspan.core.biases import Alibi, Bias
from keyspan.core.masks import Causal, Documents, Mask, Window
from keyspan.core.problem import Problem, check_dropout, make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import autocast_inputs
from keyspan.dispatch.flops import backward_flops, forward_flops, visible_area


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the accelerator where there is one, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {name!r}, want auto or a torch device that is here ({error})") from None
    return device


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
    for name, value in found.items():
        print(f"{name:<30}{(', '.join(value) or 'none') if isinstance(value, list) else value}")


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run, why not the others, and how much work it is. Printing it gives a table."""

    backend: str
    reasons: dict[str, str | None]
    """By backend: why it cannot, or None."""
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
    mask: Mask | KeyRanges | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    output_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Explanation:
    """What `attention` would do with these arguments, which are the same as there; nothing is computed or drawn.

    Returns:
        The backend chosen, each other one's reason, visible area, FLOPs, bytes and tiles. Printable.
    """
    check_dropout(dropout_p)
    problem, _ = make_problem(
        *autocast_inputs(query, key, value),
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        query_scale=query_scale,
        key_scale=key_scale,
        value_scale=value_scale,
        output_dtype=output_dtype,
    )
    problem = problem._replace(dropout_p=float(dropout_p))  # given only now, because making it draws a seed
    B, M, G, H, K = problem.query.shape
    V, N = problem.value.shape[-1], problem.N
    lo, hi, _ = problem.ranges
    side = 256
    # With an infinite price per tile the scheduler merges all it can: plain runs of rows.
    visited = sum(
        len({n for span in tile.spans for n in range(span.first // side, -(-span.last // side))})
        for tile in row_blocks(lo, hi, side, overhead=float("inf"))
    )
    copies = lo.shape[1]
    total = copies * -(-M // side) * -(-problem.row_length // side)
    moved = B * M * G * H * K * problem.query.element_size()
    moved += problem.key.shape[0] * problem.key.shape[1] * G * (K + V) * problem.key.element_size()
    moved += sum(x.numel() * x.element_size() for x in (query_scale, key_scale, value_scale) if x is not None)
    moved += B * M * G * H * (V * problem.output_dtype.itemsize + problem.compute_dtype.itemsize)
    return Explanation(
        backend=choose(problem, backend),
        reasons={name: load(name).reason_against(problem) for name in BACKENDS},
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


@dataclass
class Explain:
    """Which backend a problem of this shape runs on, why not the others, and how much work it is."""

    queries: int = 4096
    """Queries per batch entry (M)."""
    keys: int | None = None
    """Keys (N); as many as queries by default."""
    batch: int = 1
    """Batch size (B)."""
    heads: int = 8
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; as many as query heads by default."""
    dim: int = 64
    """Head dim of queries, keys and values."""
    dtype: str = "float32"
    """Dtype of queries, keys and values."""
    causal: bool = False
    """Query i sees the keys up to its own position."""
    window: int | None = None
    """Keys before its own that a query sees."""
    documents: tuple[int, ...] = ()
    """Lengths of packed documents; they must add up to the queries."""
    alibi: bool = False
    """Add ALiBi's bias."""
    device: str = "cpu"
    """auto (an accelerator where there is one, else the CPU), or a torch device."""
    json: bool = False
    """Print JSON."""


def explain_main(options: Explain) -> None:
    """Print what `explain` says of a problem given by its sizes."""
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {options.dtype!r}, want the name of a torch dtype, e.g. bfloat16")
    for name in ("queries", "keys", "batch"):
        if (size := getattr(options, name)) is not None and size < 0:
            raise ValueError(f"{name}: got {size}, want 0 or more")
    for name in ("heads", "kv_heads", "dim"):
        if (size := getattr(options, name)) is not None and size < 1:
            raise ValueError(f"{name}: got {size}, want at least 1")
    device = find_device(options.device)
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    keys = options.queries if options.keys is None else options.keys

    def zeros(length: int, heads: int) -> Tensor:
        # One number, expanded: only sizes matter here.
        return torch.zeros((), dtype=dtype, device=device).expand(options.batch, length, heads, options.dim)

    parts: list[Mask] = [Documents(list(options.documents))] if options.documents else []
    parts += [Causal()] if options.causal else []
    parts += [Window(options.window, None)] if options.window is not None else []
    mask = parts[0] if parts else None
    for part in parts[1:]:
        mask = part if mask is None else mask & part
    bias = Alibi(torch.ones(options.heads, device=device)) if options.alibi else None
    query, key = zeros(options.queries, options.heads), zeros(keys, kv_heads)
    found = explain(query, key, key, mask=mask, bias=bias)
    print(json_module.dumps(asdict(found), indent=2) if options.json else found)


if __name__ == "__main__":
    main(json="--json" in sys.argv[1:])
