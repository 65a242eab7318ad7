"""The problems that benchmarks measure: shapes of real models, one attention each, and two tables of them.

`TABLE` is what `keyspan bench attention` measures, with the ratios wanted; `gpu_works` what `make gpu-check` measures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import keyspan
from keyspan.core.masks import Mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Passes = Literal["fwd", "bwd", "fwd+bwd"]
PRODUCTS: dict[Passes, int] = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}
"""Matrix products over the visible area: forward has two, backward five."""


class Shape(NamedTuple):
    """Heads of one attention layer: query heads, key/value heads, head dim."""

    heads: int
    kv_heads: int
    dim: int


SHAPES = {
    "gpt2": Shape(12, 12, 64),
    "llama3-8b": Shape(32, 8, 128),
    "qwen3-0.6b": Shape(16, 8, 128),
    "gemma2-2b": Shape(8, 4, 256),
    "t5-base": Shape(12, 12, 64),
    "dinov2-base": Shape(12, 12, 64),
    "minilm-l6": Shape(12, 12, 32),
    "small": Shape(8, 8, 64),
    "small-wide": Shape(4, 4, 128),
    "two-wide": Shape(2, 2, 128),
    "two": Shape(2, 2, 64),
    "one": Shape(1, 1, 64),
}


class Inputs(NamedTuple):
    """The tensors that a provider computes with."""

    query: Tensor
    """`[B, M, heads, K]`"""
    key: Tensor
    """`[B, N, kv_heads, K]`"""
    value: Tensor
    table: Tensor | None = None
    """`[heads, 2·reach + 1]`, where the work has a relative bias."""


@dataclass(frozen=True)
class Work:
    """One attention problem: rows of packed documents (one document: an ordinary sequence), all rows alike."""

    lengths: tuple[int, ...]
    """Documents of a row."""
    shape: Shape
    batch: int = 1
    """B, the number of rows."""
    causal: bool = True
    passes: Passes = "fwd"
    """What one timing covers; `bwd` is the backward pass alone."""
    window: int | None = None
    """A query sees itself and window − 1 keys before it."""
    alibi: bool = False
    reach: int | None = None
    """Reach of a learned relative bias (T5's), whose gradient is part of the backward pass."""
    queries: int | None = None
    """M, where it is not N: decoding."""
    calls: int = 1
    """Calls in one timing, for calls of a few microseconds."""

    @property
    def N(self) -> int:
        return sum(self.lengths)

    @property
    def M(self) -> int:
        return self.N if self.queries is None else self.queries

    @property
    def backward(self) -> bool:
        return self.passes != "fwd"

    @property
    def title(self) -> str:
        """Kind, sizes and passes, for tables."""
        return f"{self.name}, {self.passes}"

    @property
    def name(self) -> str:
        """Kind and sizes."""
        heads, kv_heads, dim = self.shape
        words = ["causal" if self.causal else "full" if self.queries is None else "decode"]
        words += [f"window {self.window}"] if self.window is not None else []
        words += ["ALiBi"] if self.alibi else []
        words += [f"relative table of reach {self.reach}"] if self.reach is not None else []
        if len(self.lengths) > 1:
            words += [f"{len(self.lengths)} documents of {min(self.lengths)}–{max(self.lengths)}"]
        shown = f"H{heads}" if heads == kv_heads else f"H{heads}/{kv_heads}"
        size = f"M{self.M}" if self.queries is None else f"M{self.M} N{self.N}"
        return f"{', '.join(words)}, B{self.batch} {shown} {size} K{dim}"

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
        mask = self.mask() or keyspan.KeyLengths([self.N] * self.batch)
        return mask.lower(self.batch, self.M, self.N, device)

    def slopes(self, device: torch.device | str = "cpu") -> Tensor:
        """ALiBi's, `[heads]`."""
        heads = self.shape.heads
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        """Random inputs on a device, the same in every call."""
        generator = torch.Generator(device).manual_seed(1)
        heads, kv_heads, dim = self.shape

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        table = None if self.reach is None else random(heads, 2 * self.reach + 1)
        kv = (self.batch, self.N, kv_heads, dim)
        return Inputs(random(self.batch, self.M, heads, dim), random(*kv), random(*kv), table)

    def visible(self) -> int:
        """Visible pairs of a query and a key of one head, over the batch."""
        ranges = replace(self, batch=1).ranges()
        return self.batch * int((ranges.hi.long() - ranges.lo.long()).clamp(min=0).sum())

    def flops(self) -> float:
        """Of the matrix products over the visible area."""
        return 2.0 * PRODUCTS[self.passes] * self.visible() * self.shape.heads * self.shape.dim

    def bytes(self, dtype: torch.dtype) -> float:
        """Of the inputs, each read once, and of the output."""
        heads, kv_heads, dim = self.shape
        return 2.0 * dtype.itemsize * dim * self.batch * (self.N * kv_heads + self.M * heads)

    def memory_bound(self, dtype: torch.dtype, threads: int) -> float:
        """Bytes that linear memory allows: results, packed keys, and for each thread sums and 2 MiB of tiles.

        Forward: out and lse; key and value packed. Backward: also the gradients of output, query, key and value; key
        and value each packed by row and by dim; and fp32 sums of their gradients. Those are two for each thread:
        where heads are few, threads share one, and its rows are cut into more runs than threads for balance.
        """
        heads, kv_heads, dim = self.shape
        q, k = (self.batch * n * h * dim * dtype.itemsize for n, h in ((self.M, heads), (self.N, kv_heads)))
        lse, tiles = self.batch * self.M * heads * 4, threads * 2**21
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
            batch=min(self.batch, 2),
            window=None if self.window is None else max(1, self.window // 32),
            reach=None if self.reach is None else self.reach // 32,
            calls=min(self.calls, 2),
        )


class Target(NamedTuple):
    """A row of the table: a work, what it is compared with (the best of them counts), and the ratio wanted by dtype.

    A row without a wanted ratio is measured and not judged.
    """

    work: Work
    against: tuple[str, ...]
    wanted: dict[str, float]


def _short_documents() -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(16, 257, (64,), generator=generator).tolist())


def _many_heads(heads: int) -> Work:
    """Decoding with so many query heads to each of two key heads: arithmetic bounds it, not memory."""
    return Work((16384,), Shape(2 * heads, 2, 128), causal=False, queries=1)


def _wanted(fp32: float, bf16: float) -> dict[str, float]:
    return {"fp32": fp32, "bf16": bf16}


_SMALL, _WIDE, _LLAMA = SHAPES["small"], SHAPES["small-wide"], SHAPES["llama3-8b"]
_DECODE = Work((8192,), _LLAMA, causal=False, queries=1)
_FLEX, _SDPA = ("flex",), ("sdpa",)
_PACKED = ("sdpa padded", "sdpa per document", "sdpa")
_BOTH: Passes = "fwd+bwd"

TABLE = {
    "full": Target(Work((4096,), _SMALL, causal=False), _SDPA, _wanted(1.15, 2.2)),
    "causal": Target(Work((4096,), _SMALL), _SDPA, _wanted(1.3, 2.4)),
    "causal-train": Target(Work((4096,), _SMALL, passes=_BOTH), _SDPA, _wanted(1.2, 1.8)),
    "causal-8k-train": Target(Work((8192,), _WIDE, passes=_BOTH), _SDPA, _wanted(1.1, 1.6)),
    "documents-train": Target(Work(_short_documents(), _SMALL, passes=_BOTH), _PACKED, _wanted(3, 4)),
    "documents": Target(Work((72, 300, 700, 1100, 2000), _SMALL), _FLEX, _wanted(1.5, 3)),
    "window": Target(Work((8192,), _SMALL, window=256), _FLEX, _wanted(1.5, 2.5)),
    "alibi-train": Target(Work((4096,), _SMALL, passes=_BOTH, alibi=True), _SDPA, _wanted(2, 3)),
    "relative-train": Target(
        Work((2048,), _SMALL, causal=False, passes=_BOTH, reach=128), ("sdpa", "sdpa embedding"), _wanted(2, 3)
    ),
    "decode": Target(_DECODE, ("sdpa", "sdpa heads first"), _wanted(5, 20)),
    "decode-bandwidth": Target(_DECODE, ("read",), _wanted(0.75, 0.75)),
    "decode-heads": Target(_many_heads(16), ("gemm",), _wanted(0.75, 0.75)),
    "decode-48-heads": Target(_many_heads(48), ("gemm",), _wanted(0.75, 0.75)),
    "gemm-share": Target(Work((8192,), SHAPES["two-wide"], causal=False), ("gemm",), _wanted(0.8, 0.75)),
    "overhead": Target(Work((16,), SHAPES["two"], causal=False, calls=200), _SDPA, _wanted(0.4, 0.4)),
    "overhead-train": Target(Work((16,), SHAPES["two"], causal=False, passes=_BOTH, calls=200), _SDPA, {}),
    "memory": Target(Work((32768,), SHAPES["one"]), ("bound",), _wanted(1, 1)),
    "memory-train": Target(Work((32768,), SHAPES["one"], passes=_BOTH), ("bound",), _wanted(1, 1)),
}
"""What `keyspan bench attention` measures, by the names that `--rows` takes."""


GPU_DOCUMENTS = (4096, 512, 2048, 1024, 128, 3072, 256, 1536, 64, 768, 2048, 832)
"""Documents packed into one row of 16384 tokens."""

KINDS: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "causal": {},
    "packed": {"lengths": GPU_DOCUMENTS},
    "window": {"window": 1024},
    "alibi": {"alibi": True},
    "table": {"reach": 128},
}
"""Kinds of attention that are measured on a GPU, as options of `Work`; all but the first are causal."""


def gpu_work(
    kind: str, N: int, dim: int, heads: int | None = None, kv_heads: int | None = None, **options: Any
) -> Work:
    """A work of this kind: 16384 tokens in rows of N, and 2048 / dim heads unless told otherwise."""
    heads = heads or 2048 // dim
    given = {"lengths": (N,), "batch": max(1, 16384 // N), **KINDS[kind], **options}
    return Work(shape=Shape(heads, kv_heads or heads, dim), **given)


def gpu_works(quick: bool) -> list[Work]:
    """Forward passes to measure on a GPU, the most telling first; `quick`: only those."""
    found = [
        gpu_work(kind, 8192, dim) for kind, dim in (("causal", 128), ("full", 128), ("causal", 64), ("causal", 256))
    ]
    found += [gpu_work(kind, 16384, 128) for kind in ("packed", "window", "alibi", "table")]
    found += [gpu_work("table", 16384, 64), gpu_work("causal", 8192, 128, 32, 8)]
    found += [gpu_work("full", 8192, dim) for dim in (64, 256)]
    if not quick:
        plain = ("full", "causal")
        found += [gpu_work(kind, N, 128) for N in (1024, 2048, 4096, 16384, 32768) for kind in plain]
        found += [gpu_work(kind, N, 64) for N in (1024, 16384) for kind in plain]
        found += [gpu_work(kind, 16384, 64) for kind in ("packed", "window", "alibi")]
    return found
