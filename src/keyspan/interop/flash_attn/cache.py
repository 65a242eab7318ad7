"""flash-attn's attention over a key/value cache, contiguous or paged, with new tokens appended in place."""

from __future__ import annotations

import torch
from torch import Tensor

from keyspan.core.biases import Alibi
from keyspan.core.checks import check_int, check_type
from keyspan.core.masks import GappyKeys, KeyLengths, Mask, PagedKeys
from keyspan.dispatch.api import attention
from keyspan.interop.flash_attn.functions import WindowSize, _visible, check_shapes
from keyspan.layers.rope import rotate


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and attend to what is in it then.

    Args:
        q: `[B, M, Hq, K]`.
        k_cache: `[B, N, H, K]`, or pages `[pages, page_size, H, K]` with `block_table`. Written to where `k` is given.
        v_cache: as k_cache with V in place of K.
        k: new keys `[B, new, H, K]`, written behind the `cache_seqlens` tokens of each sequence; or None.
        v: new values.
        rotary_cos: `[positions, rotary_dim / 2]`, or None. Rotates the new keys at their positions, and q: at the same
            positions where the mask is causal or a window, all at position `cache_seqlens` otherwise.
        rotary_sin: the same.
        cache_seqlens: tokens in the cache before this call, int or int `[B]`; `None` means N.
        cache_batch_idx: int `[B]`: the row of the cache that each sequence has; `None` for the first B.
        cache_leftpad: int `[B]`: first token in use of each row; not for pages.
        block_table: int `[B, pages]` (version 4: `page_table`); any page size.
        softmax_scale: factor on the scores; `None` means `K ** -0.5`.
        causal: bottom-right: the last query sees all tokens.
        window_size: (left, right), inclusive; −1 or None for no bound.
        softcap: 0 for none.
        rotary_interleaved: pairs are (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
        alibi_slopes: `[Hq]`, or `[B, Hq]` where the cache is neither paged nor indexed.
        num_splits: not needed; accepted.
        return_softmax_lse: also return lse.
        learnable_sink: `[Hq]`, the logit of one more key per head with value zero.

    Returns:
        `[B, M, Hq, V]`, with lse `[B, Hq, M]` where asked for. No gradient reaches the cache's new entries.

    Raises:
        ValueError: for arguments that contradict each other; the message names the argument.
    """
    table = block_table if page_table is None else page_table
    check_shapes(4, q=q, k_cache=k_cache, v_cache=v_cache)
    for name, x, dims in (
        ("k", k, 4), ("v", v, 4), ("block_table", table, 2), ("cache_batch_idx", cache_batch_idx, 1),
        ("cache_leftpad", cache_leftpad, 1),
    ):  # fmt: skip
        if x is not None:
            check_shapes(dims, **{name: x})
    if alibi_slopes is not None:
        check_type("alibi_slopes", alibi_slopes, Tensor)
    B, M = q.shape[:2]
    if (k is None) != (v is None):
        raise ValueError("k, v: got one of them, want both or none")
    if table is not None and (cache_leftpad is not None or cache_batch_idx is not None):
        raise ValueError("block_table: got a tensor beside cache_leftpad or cache_batch_idx, want it alone")
    size = k_cache.shape[1] if table is None else table.shape[1] * k_cache.shape[1]
    if cache_seqlens is None:
        cache_seqlens = size
    if not isinstance(cache_seqlens, Tensor):
        check_int("cache_seqlens", cache_seqlens, 0, bits=31)
        cache_seqlens = torch.full((B,), cache_seqlens, device=q.device)
    if cache_seqlens.shape != (B,) or cache_seqlens.device != q.device:
        got = f"shape {list(cache_seqlens.shape)} on {cache_seqlens.device}"
        raise ValueError(f"cache_seqlens: got {got}, want an int, or [{B}] on {q.device} as q")
    before = cache_seqlens.to(torch.int64)
    lengths = before
    if k is not None and v is not None:
        new = before[:, None] + torch.arange(k.shape[1], device=q.device)
        if q.device.type == "cpu" and int(new.max()) >= size:
            raise ValueError(f"cache_seqlens: got room for {size} tokens, want {int(new.max()) + 1} with the new ones")
        k = _rotated(k, rotary_cos, rotary_sin, new, rotary_interleaved)
        _append("k", k_cache, k, new, cache_batch_idx, table)
        _append("v", v_cache, v, new, cache_batch_idx, table)
        lengths = before + k.shape[1]
    if rotary_cos is not None:
        moves = causal or any(n is not None and n >= 0 for n in window_size)
        step = torch.arange(M, device=q.device) if moves else torch.zeros(M, dtype=torch.int64, device=q.device)
        q = _rotated(q, rotary_cos, rotary_sin, before[:, None] + step, rotary_interleaved)

    first = None if cache_leftpad is None else cache_leftpad.to(torch.int64)
    in_use = lengths if first is None else lengths - first
    visible = _visible(causal, window_size, alibi_slopes is not None)
    if alibi_slopes is not None and alibi_slopes.dim() == 2 and (table is not None or cache_batch_idx is not None):
        raise ValueError("alibi_slopes: got one row for each sequence with a paged or indexed cache, want [heads]")
    each = torch.full((B,), M, device=q.device)
    layout: Mask
    if table is not None:
        layout = PagedKeys(each, in_use, table, k_cache.shape[1])
    elif cache_batch_idx is not None:
        start = cache_batch_idx.to(torch.int64) * size
        layout = GappyKeys(each, start if first is None else start + first, in_use)
    else:
        layout = KeyLengths(in_use, first)
    packed = table is not None or cache_batch_idx is not None
    keys, values = k_cache, v_cache
    if packed:
        q, keys, values = (x.flatten(0, 1)[None] for x in (q, k_cache, v_cache))
    else:
        keys, values = keys[:B], values[:B]
    out, lse = attention(
        q,
        keys,
        values,
        mask=layout if visible is None else layout & visible,
        bias=None if alibi_slopes is None else Alibi(alibi_slopes),
        scale=softmax_scale,
        softcap=softcap or None,
        sinks=learnable_sink,
        return_lse=True,
    )
    if packed:
        out, lse = out[0].unflatten(0, (B, M)), lse[0].unflatten(-1, (B, M)).transpose(0, 1)
    return (out, lse) if return_softmax_lse else out


@torch.no_grad()
def _append(name: str, cache: Tensor, new: Tensor, position: Tensor, rows: Tensor | None, table: Tensor | None) -> None:
    """Write `new` `[B, n, H, D]` to the places `position` `[B, n]` of a cache."""
    if new.shape[2:] != cache.shape[2:]:
        raise ValueError(f"{name}: got shape {list(new.shape)}, want [B, new, {cache.shape[2]}, {cache.shape[3]}]")
    if table is not None:
        page_size = cache.shape[1]
        page = table.long().gather(1, position // page_size)
        cache[page, position % page_size] = new.to(cache.dtype)
        return
    row = torch.arange(len(new), device=new.device) if rows is None else rows.long()
    cache[row[:, None], position] = new.to(cache.dtype)


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, position: Tensor, interleaved: bool) -> Tensor:
    """The first `rotary_dim` components of x `[B, n, H, K]`, rotated by the angles at `position` `[B, n]`."""
    if cos is None:
        return x
    if sin is None:
        raise ValueError("rotary_sin: got None, want a tensor as rotary_cos")
    dim = 2 * cos.shape[-1]
    if dim > x.shape[-1]:
        raise ValueError(f"rotary_cos: got {cos.shape[-1]} angles, want at most {x.shape[-1] // 2}, half the head dim")
    turned = rotate(x[..., :dim], (cos[position], sin[position]), interleaved)
    return torch.cat([turned, x[..., dim:]], -1) if dim < x.shape[-1] else turned
