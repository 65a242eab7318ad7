"""Each mask class of xFormers by its one-line definition, and random instances."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from keyspan.ops.fmha import attn_bias as masks


class Block(NamedTuple):
    """One block: its queries, its keys, and where key j lies in memory."""

    queries: int
    keys: int
    slot: Callable[[int], int]


class Instance(NamedTuple):
    mask: masks.AttentionBias
    M: int
    N: int
    times: Tensor
    """How often query i sees slot j, `[M, N]`; more than once only where a block repeats a page."""

    @property
    def visible(self) -> Tensor:
        return self.times > 0

    @property
    def unused(self) -> list[int]:
        """Keys that no query sees."""
        return [j for j in range(self.N) if not self.visible[:, j].any()]


def see(i: int, j: int, s: int, w: int, left: int, right: int) -> dict[str, bool]:
    """Whether query i sees key j of its block; s = Nk − Nq, w the causal window, left and right the two-sided one."""
    return {
        "all": True,
        "top-left": j <= i,
        "bottom-right": j <= i + s,
        "top-left window": i - w < j <= i,
        "bottom-right window": i + s - w < j <= i + s,
        "two-sided": i + s - left <= j <= i + s + right,
    }


KINDS: dict[type[masks.AttentionBias], str] = {
    masks.LowerTriangularMask: "top-left",
    masks.LowerTriangularMaskWithTensorBias: "top-left",
    masks.LowerTriangularFromBottomRightMask: "bottom-right",
    masks.LowerTriangularFromBottomRightLocalAttentionMask: "bottom-right window",
    masks.LocalAttentionFromBottomRightMask: "two-sided",
    masks.BlockDiagonalMask: "all",
    masks.BlockDiagonalCausalMask: "top-left",
    masks.BlockDiagonalCausalFromBottomRightMask: "bottom-right",
    masks.BlockDiagonalCausalLocalAttentionMask: "top-left window",
    masks.BlockDiagonalCausalLocalAttentionFromBottomRightMask: "bottom-right window",
    masks.BlockDiagonalPaddedKeysMask: "all",
    masks.BlockDiagonalCausalWithOffsetPaddedKeysMask: "bottom-right",
    masks.BlockDiagonalLocalAttentionPaddedKeysMask: "two-sided",
    masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask: "bottom-right window",
    masks.BlockDiagonalGappyKeysMask: "all",
    masks.BlockDiagonalCausalWithOffsetGappyKeysMask: "bottom-right",
    masks.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask: "two-sided",
    masks.PagedBlockDiagonalPaddedKeysMask: "all",
    masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask: "bottom-right",
    masks.PagedBlockDiagonalCausalLocalPaddedKeysMask: "bottom-right window",
    masks.PagedBlockDiagonalGappyKeysMask: "all",
    masks.PagedBlockDiagonalCausalWithOffsetGappyKeysMask: "bottom-right",
}
"""The 20 classes of xFormers 0.0.35 and the 2 newer ones."""


def by_definition(kind: str, blocks: list[Block], N: int, w: int, left: int, right: int) -> Tensor:
    """`[M, N]`, one query and one key at a time."""
    times = torch.zeros(sum(block.queries for block in blocks), N, dtype=torch.float64)
    row = 0
    for block in blocks:
        for i in range(block.queries):
            for j in range(block.keys):
                if see(i, j, block.keys - block.queries, w, left, right)[kind]:
                    times[row, block.slot(j)] += 1
            row += 1
    return times


@st.composite
def instances(draw: st.DrawFn, cls: type[masks.AttentionBias]) -> Instance:
    """A random small instance of a class, made by its public constructors."""
    kind = KINDS[cls]
    w, left, right = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    options = {"top-left window": (w,), "bottom-right window": (w,), "two-sided": (left, right)}.get(kind, ())

    def instance(mask: masks.AttentionBias, blocks: list[Block], N: int) -> Instance:
        times = by_definition(kind, blocks, N, w, left, right)
        return Instance(mask, times.shape[0], N, times)

    if not issubclass(cls, masks._Blocks):
        M, N = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        if cls is masks.LowerTriangularMaskWithTensorBias:
            options = (torch.zeros(1, 1, M, N),)
        return instance(cls(*options), [Block(M, N, lambda j: j)], N)

    q = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    k = [draw(st.integers(0, 6)) for _ in q]
    if issubclass(cls, masks.BlockDiagonalMask):
        if issubclass(cls, masks.BlockDiagonalCausalFromBottomRightMask):
            k = [max(a, b) for a, b in zip(q, k, strict=True)]
        elif cls is masks.BlockDiagonalCausalLocalAttentionMask:
            k = [max(a - w + 1, b) for a, b in zip(q, k, strict=True)]
        make = {
            masks.BlockDiagonalMask: lambda mask: mask,
            masks.BlockDiagonalCausalMask: lambda mask: mask.make_causal(),
            masks.BlockDiagonalCausalFromBottomRightMask: lambda mask: mask.make_causal_from_bottomright(),
            masks.BlockDiagonalCausalLocalAttentionMask: lambda mask: mask.make_local_attention(w),
            masks.BlockDiagonalCausalLocalAttentionFromBottomRightMask: lambda mask: (
                mask.make_local_attention_from_bottomright(w)
            ),
        }[cls]
        starts = [sum(k[:b]) for b in range(len(k))]
        return instance(make(masks.BlockDiagonalMask.from_seqlens(q, k)), _run_blocks(q, k, starts), sum(k))

    padding = draw(st.integers(max(k), 8))
    if issubclass(cls, masks.BlockDiagonalPaddedKeysMask):
        make_padded = cls.from_seqlens_local if options else cls.from_seqlens
        starts = [b * padding for b in range(len(k))]
        return instance(make_padded(q, padding, k, *options), _run_blocks(q, k, starts), len(k) * padding)
    if issubclass(cls, masks.BlockDiagonalGappyKeysMask):
        N = draw(st.integers(max(k), 20))
        starts = [draw(st.integers(0, N - n)) for n in k]
        make_gappy = cls.from_seqlens_local_gappy if options else cls.from_seqlens
        return instance(make_gappy(q, [*starts, N], k, *options), _run_blocks(q, k, starts), N)

    page_size = draw(st.integers(1, 4))
    gaps = (
        [draw(st.integers(0, 4)) for _ in q] if issubclass(cls, masks.PagedBlockDiagonalGappyKeysMask) else [0] * len(q)
    )
    columns = max(1, *(-(-(gap + n) // page_size) for gap, n in zip(gaps, k, strict=True)))
    pages = draw(st.integers(1, 8))
    # Pages may repeat, in a block and between blocks.
    table = torch.tensor([[draw(st.integers(0, pages - 1)) for _ in range(columns)] for _ in q], dtype=torch.int32)

    def slot_of(b: int) -> Callable[[int], int]:
        def slot(j: int) -> int:
            logical = gaps[b] + j
            return int(table[b, logical // page_size]) * page_size + logical % page_size

        return slot

    blocks = [Block(a, n, slot_of(b)) for b, (a, n) in enumerate(zip(q, k, strict=True))]
    if issubclass(cls, masks.PagedBlockDiagonalGappyKeysMask):
        mask = cls.from_seqlens(q, gaps, k, table, page_size)
    elif options:
        mask = cls.from_seqlens_local(q, k, table, page_size, *options)
    else:
        mask = cls.from_seqlens(q, k, table, page_size)
    return instance(mask, blocks, pages * page_size)


def _run_blocks(q: list[int], k: list[int], starts: list[int]) -> list[Block]:
    return [Block(a, n, lambda j, start=start: start + j) for a, n, start in zip(q, k, starts, strict=True)]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula: q `[B, M, H, K]`, k and v with a divisor of H heads, visible broadcastable `[M, N]`.

    Keys nobody sees may hold NaN, where `visible` is the same for all heads.
    """
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty | ~visible, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return torch.einsum("bhmn,bnhv->bmhv", weights, v), lse


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that take gradients."""
    return [x.detach().clone().requires_grad_() for x in tensors]
