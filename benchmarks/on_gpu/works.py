"""The works that are timed on a GPU: shapes, masks, biases, and how many pairs are visible. Knows no peer."""

from __future__ import annotations

from typing import NamedTuple

import torch

import keyspan

DOCUMENTS = [4096, 512, 2048, 1024, 128, 3072, 256, 1536, 64, 768, 2048, 832]
"""Lengths of the packed documents: 16384 tokens."""
WINDOW = 1024
REACH = 128
"""Of the relative table."""
PLAIN = ("full", "causal")
"""Kinds that every attention library has."""


class Work(NamedTuple):
    """One attention, forward or backward, in bf16."""

    B: int
    H: int
    """Query heads."""
    G: int
    """Heads of keys and values."""
    N: int
    D: int
    kind: str
    """full, causal, packed, window, alibi or table; all but the first are causal."""

    def __str__(self) -> str:
        return f"D{self.D} B{self.B} H{self.H}/{self.G} N{self.N} {self.kind}"

    @property
    def visible(self) -> int:
        """Visible pairs of one head of one batch entry."""
        if self.kind == "full":
            return self.N**2
        if self.kind == "window":
            return sum(min(i + 1, WINDOW) for i in range(self.N))
        lengths = DOCUMENTS if self.kind == "packed" else [self.N]
        return sum(m * (m + 1) // 2 for m in lengths)

    def flops(self, products: int) -> float:
        """Of so many products of matrices over the visible area."""
        return 2.0 * products * self.visible * self.B * self.H * self.D


def works(quick: bool) -> list[Work]:
    """What is timed, the most telling first."""

    def of(D: int, N: int, kind: str, H: int | None = None, G: int | None = None) -> Work:
        H = H or 2048 // D
        return Work(max(1, 16384 // N), H, G or H, N, D, kind)

    found = [of(128, 8192, "causal"), of(128, 8192, "full"), of(64, 8192, "causal"), of(256, 8192, "causal")]
    found += [of(128, 16384, k) for k in ("packed", "window", "alibi", "table")] + [of(64, 16384, "table")]
    found += [of(128, 8192, "causal", 32, 8), of(64, 8192, "full"), of(256, 8192, "full")]
    if not quick:
        found += [of(128, n, k) for n in (1024, 2048, 4096, 16384, 32768) for k in PLAIN]
        found += [of(64, n, k) for n in (1024, 16384) for k in PLAIN]
        found += [of(64, 16384, k) for k in ("packed", "window", "alibi")]
    return found


def mask_of(kind: str) -> keyspan.Mask | None:
    """The mask of a kind of work."""
    if kind == "full":
        return None
    if kind == "packed":
        return keyspan.Documents(DOCUMENTS) & keyspan.Causal()
    if kind == "window":
        return keyspan.Causal() & keyspan.Window(WINDOW - 1, 0)
    return keyspan.Causal()


def term_of(kind: str, heads: int) -> torch.Tensor | None:
    """What a bias of this kind is made of, on the GPU: ALiBi's slopes `[heads]`, a table `[heads, 2 · REACH + 1]`."""
    shape = {"alibi": (heads,), "table": (heads, 2 * REACH + 1)}.get(kind)
    return None if shape is None else torch.rand(shape, device="cuda")


def bias_of(kind: str, term: torch.Tensor | None) -> keyspan.Bias | None:
    """The bias of that."""
    if kind == "alibi":
        return keyspan.Alibi(term)
    return keyspan.RelativeBias(term) if kind == "table" else None


class Inputs(NamedTuple):
    """What a provider computes with, and which of it takes a gradient."""

    q: torch.Tensor
    """`[B, H, N, D]`, lying as `[B, N, H, D]` in memory, as it does in a model."""
    k: torch.Tensor
    v: torch.Tensor
    term: torch.Tensor | None

    @property
    def differentiable(self) -> list[torch.Tensor]:
        return [x for x in self if x is not None and x.requires_grad]


def inputs_of(w: Work) -> Inputs:
    """Random inputs on the GPU; a table takes a gradient, slopes do not."""

    def random(heads: int) -> torch.Tensor:
        x = torch.randn(w.B, w.N, heads, w.D, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).detach().requires_grad_()

    q, k, v = random(w.H), random(w.G), random(w.G)
    term = term_of(w.kind, w.H)
    return Inputs(q, k, v, term.requires_grad_() if w.kind == "table" and term is not None else term)
