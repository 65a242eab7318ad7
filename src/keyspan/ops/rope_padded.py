"""Rotary embedding of new tokens, and their insertion into a padded key/value cache, in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keyspan.core.checks import check_tensor
from keyspan.layers import rotate
from keyspan.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask


def rope_padded(
    xq: Tensor,
    xk: Tensor,
    xv: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    attn_bias: BlockDiagonalCausalWithOffsetPaddedKeysMask,
    *,
    theta: float = 10000.0,
    linear_scale: float = 1.0,
    use_dynamic_scaling: bool = False,
    dynamic_old_context_len: float = 8192.0,
    dynamic_scale_factor: float = 16.0,
    dynamic_low_freq_factor: float = 1.0,
    dynamic_high_freq_factor: float = 32.0,
    out_q: Tensor | None = None,
    first_seqpos: Tensor | None = None,
    seqpos: Tensor | None = None,
    adjacents: bool = True,
    internal_dtype: str = "",
) -> Tensor:
    """Rotate queries and keys by their positions, and append keys and values to the cache.

    The new tokens of sequence b go to the last used slots of its part of the cache; the lengths of `attn_bias` include
    them. A token's position is its slot's number within that part, plus `first_seqpos[b]`.

    Args:
        xq: `[1, T, H, K]` or `[1, T, G, H, K]`, the packed new queries; xk, xv likewise with the cache's heads.
        cache_k, cache_v: `[1, sequences·padding, heads, K]` or 5-D, written in place; may be expanded over heads.
        attn_bias: lengths of new and of cached tokens.
        theta: base of the frequencies `theta^(−2i / K)`, all divided by `linear_scale`.
        use_dynamic_scaling: rescale low frequencies as Llama 3.1 does, with the `dynamic_*` factors.
        out_q: where to write the result instead of a new tensor.
        first_seqpos: int `[sequences]`; seqpos: int `[T]`, the positions themselves.
        adjacents: whether component pairs are (2i, 2i + 1) or (i, i + K/2).
        internal_dtype: "", "f32" or "f64", the dtype of the angles; the rotation is in fp32 (fp64 for fp64 queries).

    Returns:
        The rotated queries, in xq's shape and dtype.
    """
    for name, x in (("xq", xq), ("xk", xk), ("xv", xv), ("cache_k", cache_k), ("cache_v", cache_v)):
        check_tensor(name, x, xq if name != "xq" else None)
    T = xq.shape[1]
    if xq.dim() not in (4, 5) or xq.shape[0] != 1:
        raise ValueError(f"xq: got shape {list(xq.shape)}, want [1, T, H, K] or [1, T, G, H, K]")
    if not isinstance(attn_bias, BlockDiagonalCausalWithOffsetPaddedKeysMask):
        raise ValueError(
            f"attn_bias: got {type(attn_bias).__name__}, want BlockDiagonalCausalWithOffsetPaddedKeysMask, whose slots "
            "say where the new keys go"
        )
    if first_seqpos is not None and seqpos is not None:
        raise ValueError("seqpos: got first_seqpos too, want at most one of them")
    if internal_dtype not in ("", "f32", "f64"):
        raise ValueError(f"internal_dtype: got {internal_dtype!r}, want '', 'f32' or 'f64'")
    # For the causal mask, the diagonal of a query's row is the slot of its own key.
    ranges = attn_bias.lower(1, T, cache_k.shape[1], xq.device)
    slot = ranges.diagonal[0, 0].long()
    if seqpos is None:
        seqpos = slot - ranges.lo[0, 0]
        if first_seqpos is not None:
            lengths = attn_bias.q_seqinfo.runs()[1].long()
            seqpos = seqpos + torch.repeat_interleave(first_seqpos.to(lengths.device), lengths, output_size=T)

    wide = xq.dtype == torch.float64
    dtype = torch.float64 if wide or internal_dtype == "f64" else torch.float32
    pair = torch.arange(0, xq.shape[-1], 2, device=xq.device, dtype=dtype)
    frequency = theta ** (-pair / xq.shape[-1]) / linear_scale
    if use_dynamic_scaling:
        frequency = _rescaled(
            frequency,
            dynamic_old_context_len,
            dynamic_scale_factor,
            dynamic_low_freq_factor,
            dynamic_high_freq_factor,
        )
    angles = seqpos.to(dtype)[:, None] * frequency
    table = angles.cos(), angles.sin()
    if not wide:
        table = table[0].float(), table[1].float()
    _write(cache_k, slot, rotate(xk, table, adjacents))
    _write(cache_v, slot, xv)
    rotated = rotate(xq, table, adjacents)
    return rotated if out_q is None else out_q.copy_(rotated)


def _rescaled(frequency: Tensor, context: float, factor: float, low: float, high: float) -> Tensor:
    """Divide frequencies of fewer than `low` turns in the old context by `factor`; keep those of more than `high`."""
    turns = context * frequency / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (share + (1 - share) / factor)


def _write(cache: Tensor, slot: Tensor, x: Tensor) -> None:
    # Expanded heads share memory: write it once.
    for dim in range(2, cache.dim() - 1):
        if cache.stride(dim) == 0:
            cache, x = cache.narrow(dim, 0, 1), x.narrow(dim, 0, 1)
    cache.index_copy_(1, slot, x.to(cache.dtype))
