"""torch's own attention interfaces, computed by `keyspan.attention`: SDPA's function and FlexAttention's mask_mod.

Depends on torch alone. Layouts are torch's, `[…, heads, tokens, dim]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from keyspan.core.checks import check_device, check_int, check_type
from keyspan.core.masks import Causal, Mask
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import attention
from keyspan.layers.multihead_attention import padding_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's `mask_mod(batch, head, query, key) -> bool`: index tensors that broadcast against one another."""

_PAIRS = 1 << 22
"""Most (query, key) pairs of which `find_ranges` holds the mask at a time."""
_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | KeyRanges | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument by argument.

    Args:
        query: `[…, Hq, M, K]`; without heads `[B, M, K]` or `[M, K]`.
        key: `[…, H, N, K]`. Leading dimensions broadcast against those of query, as in torch.
        value: `[…, H, N, V]`.
        attn_mask: broadcastable to `[…, Hq, M, N]`: bool, true = visible; or floating values that are added to the
            scaled scores, with a gradient where they require one. Also torch's `causal_upper_left` and
            `causal_lower_right`, and beyond torch any mask of Keyspan.
        dropout_p: applied whenever it is not 0, as in torch. The dropped weights are not those torch drops.
        is_causal: query i sees keys up to i: **top-left** alignment, torch's meaning, also where M ≠ N.
        scale: factor on the scores; `None` means `K ** -0.5`.
        enable_gqa: let each key head serve `Hq / H` query heads. Nothing is expanded in memory.

    Returns:
        `[…, Hq, M, V]`. A row that sees no key is 0, as in torch.

    Raises:
        ValueError: for arguments torch refuses too; the message names the argument.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal: got True and an attn_mask, want one of them; Causal() & mask says both")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_type(name, x, Tensor)
        if x.dim() < 2:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want [..., heads, tokens, dim]")
    dims = max(query.dim(), key.dim(), value.dim())
    query, key, value = (x[(None,) * (dims - x.dim())] for x in (query, key, value))
    key, value = _same_heads(query, key, value, enable_gqa)
    lead = torch.broadcast_shapes(*(x.shape[: -3 if dims > 3 else -2] for x in (query, key, value)))
    mask: Tensor | Mask | KeyRanges | None = Causal() if is_causal else None
    bias = None
    if isinstance(attn_mask, CausalBias):
        upper_left = attn_mask.variant == CausalVariant.UPPER_LEFT
        mask = Causal("top_left" if upper_left else "bottom_right")
    elif isinstance(attn_mask, Tensor):
        scores = _flat_scores(attn_mask, lead, dims)
        if attn_mask.dtype != torch.bool:
            bias = scores
        elif dims > 3 and _is_padding(scores, lead.numel(), key.shape[-2]):
            mask = padding_mask(scores[:, 0, 0].expand(lead.numel(), -1))
        else:
            mask = scores
    elif attn_mask is not None:
        mask = attn_mask
    q, k, v = (_flat(x, lead, dims) for x in (query, key, value))
    layout: Literal["bmhk", "bhmk"] = "bhmk" if dims > 3 else "bmhk"
    out = attention(q, k, v, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, layout=layout)
    return out.reshape(*lead, *query.shape[-3 if dims > 3 else -2 : -1], value.shape[-1])


def _same_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor]:
    """Key and value with equally many heads, a divisor of the query's."""
    if query.dim() < 4:
        return key, value
    Hq = query.shape[-3]
    for name, x in (("key", key), ("value", value)):
        heads = x.shape[-3]
        if heads < 1 or (Hq % heads if enable_gqa else heads not in (1, Hq)):
            hint = "; enable_gqa=True lets heads share keys" if heads and Hq % heads == 0 else ""
            want = f"a divisor of query's {Hq}" if enable_gqa else f"{Hq} as in query{hint}"
            raise ValueError(f"{name}: got {heads} heads, want {want}")
    heads = max(key.shape[-3], value.shape[-3])
    if any(heads % x.shape[-3] for x in (key, value)):
        heads = Hq
    key, value = (x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    return key, value


def _flat(x: Tensor, lead: torch.Size, dims: int) -> Tensor:
    """`[…, H, M, D]` to `[B, H, M, D]`, `[…, M, D]` to `[B, M, D]`; a view where strides allow."""
    own = x.shape[-3:] if dims > 3 else x.shape[-2:]
    x = x.expand(*lead, *own)
    return x.reshape(-1, *own) if len(lead) != 1 else x


def _flat_scores(x: Tensor, lead: torch.Size, dims: int) -> Tensor:
    """A mask broadcastable to the scores with the leading dimensions made one."""
    if dims < 4 or x.dim() <= 4:
        return x
    own = x.shape[-3:]
    if all(size == 1 for size in x.shape[:-3]):
        return x.reshape(1, *own)
    return x.expand(*lead, *own).reshape(-1, *own)


def _is_padding(visible: Tensor, B: int, N: int) -> bool:
    """Whether a mask is `[B or 1, H, M, N]` and the same for all heads and queries."""
    if visible.dim() != 4 or visible.shape[0] not in (1, B) or visible.shape[3] != N:
        return False
    return all(visible.shape[d] == 1 or visible.stride(d) == 0 for d in (1, 2))


@contextmanager
def replace_sdpa() -> Iterator[None]:
    """Send every call of `F.scaled_dot_product_attention` inside the block through Keyspan.

        with keyspan.interop.torch.replace_sdpa():
            model(x).sum().backward()

    The function is replaced in `torch.nn.functional` and in every module that has imported it by its name, and put
    back at the end of the block, also after an error. The replacement holds for all threads of the process.
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` in eval mode call a fused kernel of torch instead of the
    function; use `keyspan.layers.MultiheadAttention` there.
    """
    original = F.scaled_dot_product_attention
    holders = [vars(module) for module in list(sys.modules.values()) if getattr(module, "__dict__", None)]
    changed = [names for names in holders if names.get(_NAME) is original]
    for names in changed:
        names[_NAME] = scaled_dot_product_attention
    try:
        yield
    finally:
        for names in changed:
            names[_NAME] = original


class FoundRanges(NamedTuple):
    """What `find_ranges` found."""

    mask: KeyRanges
    """To be passed as `mask=`, to as many calls and layers as wanted."""
    ranges: int
    """Most ranges of keys that a row needs: 0 where no row sees a key; more than 2 only for a dense mask."""
    dense: bool
    """Whether `mask` holds the mask as a bool tensor, because ranges do not describe it."""


def find_ranges(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str = "cpu",
    *,
    dense: bool = False,
) -> FoundRanges:
    """The key ranges of a FlexAttention `mask_mod`, found exactly: the counterpart of `create_block_mask`.

    `mask_mod` is evaluated once for every pair, on the device, in blocks of rows; memory stays linear. Make the ranges
    once and use them for every layer and step. There is no block size: ranges are exact to the key.

    Args:
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, called with int64 index tensors of shapes `[B, 1, 1, 1]`,
            `[1, H, 1, 1]`, `[1, 1, rows, 1]` and `[1, 1, 1, KV_LEN]`; elementwise functions and indexing of captured
            tensors work unchanged.
        B: batch size; `None` for a mask that is the same in the whole batch.
        H: query heads; `None` for a mask that is the same for all heads.
        Q_LEN: query rows.
        KV_LEN: keys.
        device: where the ranges are made.
        dense: keep the mask as a bool tensor `[B, H, Q_LEN, KV_LEN]` where some row needs more than two ranges, or
            heads differ. That tensor is quadratic in length, so it must be asked for.

    Returns:
        The mask, the number of ranges that its rows need, and whether it is dense.

    Raises:
        ValueError: where ranges do not describe the mask and `dense` is False; the message says how many are needed.
    """
    if not callable(mask_mod):
        raise ValueError(f"mask_mod: got {type(mask_mod).__name__}, want a function of (b, h, q_idx, kv_idx)")
    for name, size in (("B", B), ("H", H), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)):
        if size is not None or name.endswith("LEN"):
            check_int(name, size, 0, bits=31)
    device = check_device("device", device)
    b = torch.arange(B or 1, device=device)[:, None, None, None]
    h = torch.arange(H or 1, device=device)[None, :, None, None]
    kv = torch.arange(KV_LEN, device=device)[None, None, None]
    rows = max(1, _PAIRS // max(1, b.numel() * h.numel() * KV_LEN))

    def block(first: int) -> Tensor:
        q = torch.arange(first, min(first + rows, Q_LEN), device=device)[None, None, :, None]
        seen = mask_mod(b, h, q, kv)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise ValueError(f"mask_mod: got a result of {got}, want a bool tensor")
        return seen.expand(b.numel(), h.numel(), q.numel(), KV_LEN)

    if not Q_LEN or not KV_LEN:
        nothing = torch.zeros(1, 1, Q_LEN, device=device, dtype=torch.int32)
        return FoundRanges(_key_ranges(nothing, nothing, KV_LEN), 0, False)
    found = [runs(block(first)) for first in range(0, Q_LEN, rows)]
    lo, hi, count = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    most = int(count.max())
    alike = bool((lo == lo[:, :, :1]).all() and (hi == hi[:, :, :1]).all() and (count == count[:, :1]).all())
    if most <= 2 and alike:
        S = max(most, 1)
        return FoundRanges(_key_ranges(lo[:S, :, 0], hi[:S, :, 0], KV_LEN), most, False)
    if not dense:
        what = f"up to {most} ranges of keys in a row, want at most 2" if most > 2 else "a mask that differs by head"
        raise ValueError(f"mask_mod: got {what}; dense=True keeps it as a tensor of Q_LEN · KV_LEN")
    visible = torch.cat([block(first) for first in range(0, Q_LEN, rows)], 2)
    outer = lo.amin(dim=(0, 2)), hi.amax(dim=(0, 2))
    ranges = _key_ranges(outer[0][None], outer[1][None], KV_LEN)
    return FoundRanges(KeyRanges(ranges.lo, ranges.hi, ranges.diagonal, dense=visible, keys=KV_LEN), most, True)


def runs(visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last run of visible keys in each row, and the number of runs.

    Args:
        visible: bool `[…, M, N]`, N ≥ 1.

    Returns:
        lo, hi: int32 `[2, …, M]`; the second run is empty where a row has fewer than two.
        count: `[…, M]`, runs per row.
    """
    N = visible.shape[-1]
    padded = F.pad(visible, (1, 1))
    starts, ends = padded[..., 1:-1] & ~padded[..., :-2], padded[..., 1:-1] & ~padded[..., 2:]
    count = starts.sum(-1)
    # argmax of 0 and 1 is the first 1, or 0 where there is none.
    first_lo, first_hi = starts.byte().argmax(-1), ends.byte().argmax(-1) + 1
    last_lo, last_hi = N - 1 - starts.flip(-1).byte().argmax(-1), N - ends.flip(-1).byte().argmax(-1)
    none, one = count == 0, count < 2
    first_hi = torch.where(none, first_lo, first_hi)
    last_lo, last_hi = torch.where(one, first_hi, last_lo), torch.where(one, first_hi, last_hi)
    return torch.stack([first_lo, last_lo]).int(), torch.stack([first_hi, last_hi]).int(), count


def _key_ranges(lo: Tensor, hi: Tensor, keys: int) -> KeyRanges:
    """Ranges `[S, B, M]` of rows that stand beside the key of the same number."""
    row = torch.arange(lo.shape[-1], device=lo.device, dtype=torch.int32).expand_as(lo)
    return KeyRanges(lo.contiguous(), hi.contiguous(), row.contiguous(), keys=keys)
