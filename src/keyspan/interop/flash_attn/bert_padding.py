"""The helpers of `flash_attn.bert_padding` (2.8): padded batches to packed tokens and back. Plain torch indexing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keyspan.core.checks import check_index, check_int, check_type

Unpadded = tuple[Tensor, Tensor, Tensor, int, Tensor]


def _check(name: str, x: Any, dims: int) -> None:
    check_type(name, x, Tensor)
    if x.dim() < dims:
        raise ValueError(f"{name}: got shape {list(x.shape)}, want {dims} dimensions or more")


def _check_mask(name: str, mask: Any, states: Tensor) -> None:
    check_type(name, mask, Tensor)
    if mask.shape != states.shape[:2] or mask.device != states.device:
        got = f"shape {list(mask.shape)} on {mask.device}"
        raise ValueError(f"{name}: got {got}, want {list(states.shape[:2])} on {states.device} as hidden_states")


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """`x[indices]`, with a gradient."""
    _check("x", x, 1)
    check_index("indices", indices, len(x), x.device)
    return x[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros `[first_axis_dim, …]` with `values` at `indices`, with a gradient."""
    _check("values", values, 1)
    check_int("first_axis_dim", first_axis_dim, 0)
    check_index("indices", indices, first_axis_dim, values.device)
    if len(indices) != len(values):
        raise ValueError(f"indices: got {len(indices)}, want one for each of {len(values)} rows")
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> Unpadded:
    """The tokens of a padded batch, packed.

    Args:
        hidden_states: `[B, N, …]`.
        attention_mask: `[B, N]`, bool or int, 1 for a token.
        unused_mask: `[B, N]`, 1 for a place that is kept though it holds no token.

    Returns:
        The kept places `[T, …]`; their numbers in the flattened batch, int64 `[T]`; `cu_seqlens`, int32 `[B + 1]`; the
        largest number of kept places in a row; and the number of tokens per row, int32 `[B]`.
    """
    _check("hidden_states", hidden_states, 2)
    _check_mask("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero()[:, 0]
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    return hidden_states.flatten(0, 1)[indices], indices, starts, longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a batch whose rows hold several short sequences, packed.

    Args:
        hidden_states: `[B, N, …]`.
        attention_mask_in_length: int `[B, N]`: the lengths of a row's sequences, in its first places, 0 behind them.

    Returns:
        As `unpad_input`, but for the last: tokens, indices, `cu_seqlens` of all sequences, the largest length.
    """
    _check("hidden_states", hidden_states, 2)
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    in_row = attention_mask_in_length.sum(-1)
    column = torch.arange(attention_mask_in_length.shape[1], device=in_row.device)
    indices = (column < in_row[:, None]).flatten().nonzero()[:, 0]
    lengths = attention_mask_in_length[attention_mask_in_length > 0].int()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, starts, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens `[T, …]` back to `[batch, seqlen, …]`, zeros elsewhere."""
    check_int("batch", batch, 0)
    check_int("seqlen", seqlen, 0)
    flat: Tensor = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return flat.reshape(batch, seqlen, *flat.shape[1:])
