"""The attention function for transformers. It reads masks, windows, softcaps and sinks from its arguments alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from keyspan.core.masks import Causal, Documents, Mask, Window
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import attention
from keyspan.interop.transformers.masks import RANGES, key_ranges

_starts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""position_ids -> (version, first token of each token's document, or None where a row is one document)."""
_packed_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""cu_seq_lens_q -> (versions and numbers that the mask depends on, KeyRanges)."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    output_attentions: bool | None = False,
    indices: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register` registers.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: `[B, Hq, M, K]`.
        key: `[B, H, N, K]`, heads not repeated.
        value: `[B, H, N, V]`.
        attention_mask: what `make_mask` returned; or a user's 4-D mask, bool (true = visible) or floating (added).
        dropout: 0 outside training.
        scaling: factor on the scores; `None` means `K ** -0.5`.
        is_causal: what holds where `attention_mask` is None.
        sliding_window: keys that a query sees, its own included; read where documents are given by `cu_seq_lens_q`
            and there is no mask.
        softcap: as of `keyspan.attention` (Gemma 2).
        s_aux: learned sinks `[Hq]` (GPT-OSS).
        position_bias: added to the scores, with a gradient (T5).
        position_ids: `[B or 1, M]`. Where they begin anew in a causal layer without padding, a new document begins,
            with a cache too; transformers' own functions let documents see one another then.
        output_attentions: must not be True: the weights are never made.
        indices: must be None: attention to chosen keys only is refused.
        cache: the paged cache of continuous batching, which is updated first. Its sequences are packed in one row.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, int32 `[documents + 1]`: documents packed in one row.

    Returns:
        `[B, M, Hq, V]`, and `None` for the weights.

    Raises:
        ValueError: for `output_attentions=True`, for `indices`, and for a mask that a model has changed.
    """
    if output_attentions:
        raise ValueError(
            'output_attentions: got True, want False: the weights are never made; use attn_implementation="eager"'
        )
    if indices is not None:
        raise ValueError('indices: got a tensor, want None: keys chosen one by one need attn_implementation="sdpa"')
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, one for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))

    mask: Mask | KeyRanges | Tensor | None
    bias = position_bias
    if attention_mask is None or attention_mask.dtype == torch.int32:
        mask = _of_documents(q, k, attention_mask, causal, sliding_window, position_ids, kwargs)
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask.is_floating_point():
        mask, bias = None, attention_mask if bias is None else bias + attention_mask
    else:
        raise ValueError(f"attention_mask: got {attention_mask.dtype}, want what Keyspan's mask function made, or bool")
    if isinstance(bias, Tensor) and bias.shape[-1] > k.shape[1]:
        bias = bias[..., : k.shape[1]]
    out = attention(q, k, v, mask=mask, bias=bias, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout)
    return out, None


def _of_documents(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> Mask | KeyRanges | None:
    """The mask of a layer that was given ranges or nothing, with documents packed in one row kept apart."""
    M, N = q.shape[1], k.shape[1]
    ranges = None if mask is None else _decoded(mask, N)
    padded = mask is not None and mask.shape[-1] % 2 == 1
    q_starts, k_starts = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if q_starts is not None and q.shape[0] == 1 and (ranges is None or M == N):
        packed = _packed_mask(q_starts, q_starts if k_starts is None else k_starts, M, N, causal, sliding_window)
        if ranges is None:
            return packed
        lo = torch.maximum(ranges.lo, packed.lo)
        return replace(ranges, lo=lo, hi=torch.maximum(torch.minimum(ranges.hi, packed.hi), lo))
    start = None
    if (
        position_ids is not None
        and causal
        and not padded
        and M == N
        and M > 1
        and tuple(position_ids.shape[1:]) == (M,)
    ):
        start = _document_starts(position_ids)
    if start is None:
        return ranges if ranges is not None else Causal() if causal and M > 1 else None
    if ranges is None:
        row = torch.arange(1, M + 1, device=q.device, dtype=torch.int32)
        return key_ranges(start[None], row.expand_as(start)[None].contiguous(), N)
    lo = torch.maximum(ranges.lo, start)
    return replace(ranges, lo=lo, hi=torch.maximum(ranges.hi, lo))


def _decoded(mask: Tensor, N: int) -> KeyRanges:
    """The ranges that `make_mask` put into a tensor."""
    compiling = torch.compiler.is_compiling()
    found = None if compiling else RANGES.get(mask)
    if found is not None and found.keys == N:
        return found  # type: ignore[no-any-return]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] not in (2, 3, 4, 5):
        raise ValueError(
            f"attention_mask: got ranges of shape {list(mask.shape)}, want [B, 1, M, 2 … 5] as Keyspan's mask function "
            'makes them: the model changes its mask; pass a 4-D bool mask, or use attn_implementation="sdpa"'
        )
    lo, hi = (mask[:, 0, :, s : mask.shape[3] // 2 * 2 : 2].permute(2, 0, 1).clone() for s in (0, 1))
    ranges = key_ranges(lo, hi, N)
    if not compiling:
        RANGES[mask] = ranges
    return ranges


def _packed_mask(
    q_starts: Tensor, k_starts: Tensor, M: int, N: int, causal: bool, sliding_window: int | None
) -> KeyRanges:
    """Documents packed in one row, lowered once for all layers of a kind."""
    compiling = torch.compiler.is_compiling()
    form = None if compiling else (q_starts._version, id(k_starts), k_starts._version, M, N, causal, sliding_window)
    known = None if compiling else _packed_masks.get(q_starts)
    if known is not None and known[0] == form:
        return known[2]  # type: ignore[no-any-return]
    mask: Mask = Documents.from_cu_seqlens(q_starts, k_starts)
    if causal:
        mask = mask & Causal("bottom_right")
    if sliding_window is not None:
        reach = sliding_window - 1
        mask = mask & Window(reach, None if causal else reach, "bottom_right")
    ranges = mask.lower(1, M, N, q_starts.device)
    if not compiling:
        _packed_masks[q_starts] = (form, None if k_starts is q_starts else k_starts, ranges)
    return ranges


def _document_starts(position_ids: Tensor) -> Tensor | None:
    """The first token of each token's document, int32 `[B or 1, M]`; None where each row is one document."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        known = _starts.get(position_ids)
        if known is not None and known[0] == position_ids._version:
            return known[1]  # type: ignore[no-any-return]
    row = torch.arange(position_ids.shape[1], device=position_ids.device)
    new = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    start = torch.where(new, row, 0).cummax(-1).values.int()
    if compiling:
        return start
    found = start if bool(new.any()) else None
    _starts[position_ids] = (position_ids._version, found)
    return found
