"""Random masks of every class, dense reference attention, and paged caches, for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keyspan.ops.fmha import attn_bias as masks
from keyspan.ops.fmha.attn_bias import AttentionBias


def create_attn_bias(
    bias_type: Any,
    batch_size: int,
    num_heads: int,
    num_heads_groups: int,
    q_len: int,
    kv_len: int,
    device: torch.device | str,
    dtype: torch.dtype,
    requires_grad: bool,
    fmt: str,
    op: object = None,
    page_size: int | None = None,
) -> AttentionBias | Tensor | None:
    """A random instance of a mask class; the same for the same sizes.

    Packed masks have `batch_size` blocks with `batch_size·q_len` queries and `batch_size·kv_len` keys in all. Paged
    masks have that many slots, rounded up to whole pages.

    Args:
        bias_type: a class of `attn_bias`, `torch.Tensor`, `type(None)` or `None`.
        fmt: "BMK" (the heads are in the batch), "BMHK" or "BMGHK".
    """
    if bias_type in (None, type(None)):
        return None
    heads = {"BMK": (), "BMHK": (num_heads,), "BMGHK": (num_heads_groups, num_heads)}[fmt]
    batch = batch_size * num_heads if fmt == "BMK" else batch_size
    if bias_type in (Tensor, masks.LowerTriangularMaskWithTensorBias):
        values = 3 * torch.randn(batch, *heads, q_len, kv_len, device=device, dtype=dtype)
        values.requires_grad_(requires_grad)
        return values if bias_type is Tensor else masks.LowerTriangularMaskWithTensorBias(values)
    r = random.Random(f"{bias_type.__name__} {batch_size} {q_len} {kv_len}")
    window = r.randint(2, 5)
    sides = {"window_left": r.randint(0, 5), "window_right": r.randint(0, 5)}
    if bias_type is masks.LocalAttentionFromBottomRightMask:
        return masks.LocalAttentionFromBottomRightMask(**sides)
    if bias_type is masks.LowerTriangularFromBottomRightLocalAttentionMask:
        return masks.LowerTriangularFromBottomRightLocalAttentionMask(window)
    if not issubclass(bias_type, masks._Blocks):
        return _made(bias_type())

    q = _parts(r, batch_size * q_len, batch_size)
    more = {name: value for name, value in {"_window_size": window, **sides}.items() if _takes(bias_type, name)}
    if issubclass(bias_type, masks.BlockDiagonalMask):
        if kv_len >= q_len:  # at least as many keys as queries in each block, which some of these classes demand
            k = [n + extra for n, extra in zip(q, _parts(r, batch_size * (kv_len - q_len), batch_size), strict=True)]
        elif issubclass(bias_type, masks.BlockDiagonalCausalFromBottomRightMask):
            raise ValueError(f"kv_len: got {kv_len}, want at least q_len = {q_len} for {bias_type.__name__}")
        else:
            k = _parts(r, batch_size * kv_len, batch_size)
            if "_window_size" in more:  # the last query of each block must see a key
                more["_window_size"] = max(window, *(n - m + 1 for n, m in zip(q, k, strict=True)))
        plain = masks.BlockDiagonalMask.from_seqlens(q, k, device=device)
        return _made(bias_type(plain.q_seqinfo, plain.k_seqinfo, **more))
    k = [r.randint(min(n, kv_len), kv_len) for n in q]
    starts = [b * kv_len + r.randint(0, kv_len - n) for b, n in enumerate(k)]
    if issubclass(bias_type, masks.BlockDiagonalGappyKeysMask):
        starts.append(batch_size * kv_len)
        return _made(bias_type(*masks._gappy(q, starts, k, False, device), **more))
    if issubclass(bias_type, masks.BlockDiagonalPaddedKeysMask):
        return _made(bias_type(*masks._padded(q, kv_len, k, device), **more))
    if page_size is None:
        raise ValueError(f"page_size: got None, want an int for {bias_type.__name__}")
    pages = -(-kv_len // page_size)
    order = list(range(batch_size * pages))
    r.shuffle(order)
    table = torch.tensor(order, dtype=torch.int32, device=device).reshape(batch_size, pages)
    if issubclass(bias_type, masks.PagedBlockDiagonalGappyKeysMask):
        inside = [start - b * kv_len for b, start in enumerate(starts)]
        return _made(bias_type(*masks._gappy(q, inside, k, True, device), table, page_size, **more))
    return _made(bias_type(*masks._padded(q, pages * page_size, k, device), table, page_size, **more))


def _made(mask: Any) -> AttentionBias:
    assert isinstance(mask, AttentionBias)
    return mask


def _parts(r: random.Random, total: int, count: int) -> list[int]:
    """`count` random integers ≥ 0 that add up to `total`."""
    cuts = sorted(r.randint(0, total) for _ in range(count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _takes(bias_type: type, name: str) -> bool:
    return any(name in getattr(c, "__annotations__", {}) for c in bias_type.__mro__)


def ref_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: AttentionBias | Tensor | None = None,
    drop_mask: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Dense attention by its formula, in fp32 or fp64: q `[B, M, K]`, `[B, M, H, K]` or `[B, M, G, H, K]`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query, key, value = (x.to(wide).movedim(1, -2) for x in (q, k, v))
    scores = query @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(attn_bias, AttentionBias):
        attn_bias = attn_bias.materialize(tuple(scores.shape), wide, q.device)
    if attn_bias is not None:
        scores = scores + attn_bias
    # A row without a finite score has no softmax: its weights are 0.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if drop_mask is not None:
        weights = weights * (drop_mask / (1 - p))
    return (weights @ value).movedim(-2, 1)


def ref_attention_bmhk(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: AttentionBias | Tensor | None, scale: float | None = None
) -> Tensor:
    """`ref_attention` for `[B, M, H, K]`."""
    return ref_attention(q, k, v, attn_bias, scale=scale)


def pack_kv_cache(
    cache_k: Tensor, cache_v: Tensor, kv_seqlens: Sequence[int], BLOCK_N: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy a padded cache into pages.

    cache_k, cache_v `[B, N, ...]`, `kv_seqlens[b]` keys in use, BLOCK_N keys a page -> (block_tables int32
    `[B, pages]`, keys `[1, all pages·BLOCK_N, ...]`, values). Entries of the table behind a sequence's last page are 0.
    """
    counts = [-(-n // BLOCK_N) for n in kv_seqlens]
    table = torch.zeros(len(counts), max(counts, default=0), dtype=torch.int32, device=cache_k.device)
    packed = [cache.new_zeros(1, sum(counts) * BLOCK_N, *cache.shape[2:]) for cache in (cache_k, cache_v)]
    page = 0
    for b, (length, count) in enumerate(zip(kv_seqlens, counts, strict=True)):
        table[b, :count] = torch.arange(page, page + count)
        for target, cache in zip(packed, (cache_k, cache_v), strict=True):
            target[0, page * BLOCK_N : page * BLOCK_N + length] = cache[b, :length]
        page += count
    return table, packed[0], packed[1]
