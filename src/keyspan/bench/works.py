"""The work that benchmarks measure, and the table of what is wanted on it. Knows no provider and no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import keyspan
from keyspan.bench.shapes import SHAPES, Shape
from keyspan.core.masks import Mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs(NamedTuple):
    """What a provider is given."""

    query: Tensor
    """`[1, M, heads, K]`"""
    key: Tensor
    """`[1, N, kv_heads, K]`"""
    value: Tensor
    table: Tensor | None = None
    """`[heads, 2·reach + 1]`, where the work has a relative bias."""


@dataclass(frozen=True)
class Work:
    """One piece of work: a packed row of documents (one document: an ordinary sequence)."""

    lengths: tuple[int, ...]
    shape: Shape
    causal: bool = True
    backward: bool = False
    window: int | None = None
    """A query sees itself and window − 1 keys before it."""
    alibi: bool = False
    reach: int | None = None
    """Reach of a learned relative bias (T5's), whose gradient is part of the backward pass."""
    queries: int | None = None
    """M, where it is not N: decoding."""
    calls: int = 1
    """Calls in one timing, for what is over in microseconds."""

    @property
    def N(self) -> int:
        return sum(self.lengths)

    @property
    def M(self) -> int:
        return self.N if self.queries is None else self.queries

    @property
    def title(self) -> str:
        """What it is, in words."""
        heads, kv_heads, dim = self.shape
        words = ["causal" if self.causal else "full" if self.queries is None else "decode"]
        words += [f"window {self.window}"] if self.window is not None else []
        words += ["ALiBi"] if self.alibi else []
        words += [f"relative table of reach {self.reach}"] if self.reach is not None else []
        if len(self.lengths) > 1:
            words += [f"{len(self.lengths)} documents of {min(self.lengths)}–{max(self.lengths)}"]
        shown = f"H{heads}" if heads == kv_heads else f"H{heads}/{kv_heads}"
        size = f"M{self.M}" if self.queries is None else f"M{self.M} N{self.N}"
        return f"{', '.join(words)}, B1 {shown} {size} K{dim}, {'fwd+bwd' if self.backward else 'fwd'}"

    @property
    def sequence(self) -> bool:
        """Whether it is one ordinary sequence without a bias, which every attention library can do."""
        return len(self.lengths) == 1 and self.window is None and not self.alibi and self.reach is None

    def mask(self) -> Mask | None:
        parts: list[Mask] = [keyspan.Documents(list(self.lengths))] if len(self.lengths) > 1 else []
        parts += [keyspan.Causal()] if self.causal else []
        parts += [keyspan.Window(self.window - 1, 0)] if self.window is not None else []
        mask = parts[0] if parts else None
        for part in parts[1:]:
            mask = mask & part if mask is not None else part
        return mask

    def ranges(self, device: torch.device | str = "cpu") -> keyspan.KeyRanges:
        """The mask lowered; also where there is none."""
        mask = self.mask() or keyspan.KeyLengths([self.N])
        return mask.lower(1, self.M, self.N, device)

    def slopes(self) -> Tensor:
        heads = self.shape.heads
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Random inputs on the CPU, always the same."""
        generator = torch.Generator().manual_seed(1)
        heads, kv_heads, dim = self.shape

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        table = None if self.reach is None else random(heads, 2 * self.reach + 1)
        kv = (1, self.N, kv_heads, dim)
        return Inputs(random(1, self.M, heads, dim), random(*kv), random(*kv), table)

    def flops(self) -> float:
        """Of the two matrix products over the visible area; backward has five."""
        ranges = self.ranges()
        area = int((ranges.hi - ranges.lo).sum())
        return 4.0 * area * self.shape.heads * self.shape.dim * (3.5 if self.backward else 1)

    def bytes(self, dtype: torch.dtype) -> float:
        """Of the inputs, each read once, and of the output."""
        heads, kv_heads, dim = self.shape
        return 2.0 * dtype.itemsize * dim * (self.N * kv_heads + self.M * heads)

    def memory_bound(self, dtype: torch.dtype, threads: int) -> float:
        """Bytes that linear memory allows: results, packed keys, and for each thread sums and 2 MiB of tiles.

        Forward: out and lse; key and value packed. Backward: also the gradients of output, query, key and value; key
        and value each packed by row and by dim; and fp32 sums of their gradients. Those are two for each thread:
        where heads are few, threads share one, and its rows are cut into more runs than threads for balance.
        """
        heads, kv_heads, dim = self.shape
        q, k = self.M * heads * dim * dtype.itemsize, self.N * kv_heads * dim * dtype.itemsize
        lse, tiles = self.M * heads * 4, threads * 2**21
        if not self.backward:
            return q + lse + 2 * k + tiles
        sums = 2 * threads * 2 * self.N * kv_heads * dim * 4
        return (q + lse + q + q + 2 * k) + 4 * k + sums + tiles

    def quick(self) -> Work:
        """The same work, tiny."""
        heads, kv_heads, dim = self.shape
        few = min(kv_heads, 2)
        return replace(
            self,
            lengths=tuple(max(4, n // 64) for n in self.lengths),
            shape=Shape(few * min(heads // kv_heads, 2), few, min(dim, 16)),
            window=None if self.window is None else self.window // 32,
            reach=None if self.reach is None else self.reach // 32,
            calls=min(self.calls, 2),
        )


class Target(NamedTuple):
    """A row of the table: a work, whom it is compared with (the best of them counts), and the ratio wanted by dtype.

    Without a ratio that is wanted the row is measured and not judged.
    """

    work: Work
    against: tuple[str, ...]
    wanted: dict[str, float]


def _short_documents() -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(16, 257, (64,), generator=generator).tolist())


def _wanted(fp32: float, bf16: float) -> dict[str, float]:
    return {"fp32": fp32, "bf16": bf16}


_SMALL, _WIDE, _LLAMA = SHAPES["small"], SHAPES["small-wide"], SHAPES["llama3-8b"]
_DECODE = Work((8192,), _LLAMA, causal=False, queries=1)
_FLEX, _SDPA = ("flex compiled",), ("sdpa",)
_PACKED = ("sdpa padded", "sdpa per document", "sdpa")

TABLE = {
    "full": Target(Work((4096,), _SMALL, causal=False), _SDPA, _wanted(1.15, 2.2)),
    "causal": Target(Work((4096,), _SMALL), _SDPA, _wanted(1.3, 2.4)),
    "causal-train": Target(Work((4096,), _SMALL, backward=True), _SDPA, _wanted(1.2, 1.8)),
    "causal-8k-train": Target(Work((8192,), _WIDE, backward=True), _SDPA, _wanted(1.1, 1.6)),
    "documents-train": Target(Work(_short_documents(), _SMALL, backward=True), _PACKED, _wanted(3, 4)),
    "documents": Target(Work((72, 300, 700, 1100, 2000), _SMALL), _FLEX, _wanted(1.5, 3)),
    "window": Target(Work((8192,), _SMALL, window=256), _FLEX, _wanted(1.5, 2.5)),
    "alibi-train": Target(Work((4096,), _SMALL, backward=True, alibi=True), _SDPA, _wanted(2, 3)),
    "relative-train": Target(
        Work((2048,), _SMALL, causal=False, backward=True, reach=128), ("sdpa", "sdpa embedding"), _wanted(2, 3)
    ),
    "decode": Target(_DECODE, ("sdpa", "sdpa heads first"), _wanted(5, 20)),
    "decode-bandwidth": Target(_DECODE, ("sum",), _wanted(0.8, 0.8)),
    "gemm-share": Target(Work((8192,), SHAPES["two-wide"], causal=False), ("gemm",), _wanted(0.8, 0.75)),
    "overhead": Target(Work((16,), SHAPES["two"], causal=False, calls=200), _SDPA, _wanted(0.4, 0.4)),
    "overhead-train": Target(Work((16,), SHAPES["two"], causal=False, backward=True, calls=200), _SDPA, {}),
    "memory": Target(Work((32768,), SHAPES["one"]), ("bound",), _wanted(1, 1)),
    "memory-train": Target(Work((32768,), SHAPES["one"], backward=True), ("bound",), _wanted(1, 1)),
}
"""What `keyspan bench attention` measures, by the names that `--rows` takes."""
