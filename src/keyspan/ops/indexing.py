"""Gather and add rows by index, for stochastic depth over nested batches; differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keyspan.core.checks import check_index, check_tensor, check_type
from keyspan.ops.common import BaseOperator


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Rows `indices[i]` of `sources[i]`, `[S_i, D_i]`, flattened and joined: `[Σ len(indices[i])·D_i]`."""
    check_type("sources", sources, list, tuple)
    check_type("indices", indices, list, tuple)
    if len(sources) != len(indices) or not sources:
        raise ValueError(f"indices: got {len(indices)} for {len(sources)} sources, want one for each of at least one")
    for n, (source, index) in enumerate(zip(sources, indices, strict=True)):
        check_type(f"sources[{n}]", source, Tensor)
        if source.dim() != 2:
            raise ValueError(f"sources[{n}]: got shape {list(source.shape)}, want [S, D]")
        check_index(f"indices[{n}]", index, len(source), source.device)
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """`input[index] += alpha · source · scaling`, in place; returns `input`.

    input `[B, M, D]`, index int `[b]` without repetitions, source `[b, M, D]`, scaling `[D]` or None.
    """
    check_tensor("input", input)
    check_tensor("source", source, input)
    check_tensor("scaling", scaling, input, optional=True)
    check_index("index", index, len(input), input.device)
    check_type("alpha", alpha, int, float)
    if scaling is not None and scaling.shape != input.shape[-1:]:
        raise ValueError(f"scaling: got shape {list(scaling.shape)}, want {list(input.shape[-1:])}")
    if source.shape != (len(index), *input.shape[1:]):
        raise ValueError(f"source: got shape {list(source.shape)}, want {[len(index), *input.shape[1:]]}")
    # In fp32 up to the sum, so that it is rounded once.
    wide = torch.promote_types(input.dtype, torch.float32)
    scaled = source.to(wide) if scaling is None else source.to(wide) * scaling.to(wide)
    return input.index_copy_(0, index, (input.index_select(0, index).to(wide) + alpha * scaled).to(input.dtype))


class ScaledIndexAddFw(BaseOperator):
    NAME = "scaled_index_addF"
    OPERATOR_CATEGORY = "indexing"


class ScaledIndexAddBw(BaseOperator):
    NAME = "scaled_index_addB"
    OPERATOR_CATEGORY = "indexing"


class IndexSelect(BaseOperator):
    NAME = "index_select"
    OPERATOR_CATEGORY = "indexing"
