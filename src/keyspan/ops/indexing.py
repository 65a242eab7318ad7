"""Gather and add rows by index, for stochastic depth over nested batches; differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Rows `indices[i]` of `sources[i]`, `[S_i, D_i]`, flattened and joined: `[Σ len(indices[i])·D_i]`."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """`input[index] += alpha · source · scaling`, in place; returns `input`.

    input `[B, M, D]`, index int `[b]` without repetitions, source `[b, M, D]`, scaling `[D]` or None.
    """
    if source.shape != (len(index), *input.shape[1:]):
        raise ValueError(f"source: got shape {list(source.shape)}, want {[len(index), *input.shape[1:]]}")
    scaled = source if scaling is None else source * scaling
    return input.index_add_(0, index, scaled.to(input.dtype), alpha=alpha)
