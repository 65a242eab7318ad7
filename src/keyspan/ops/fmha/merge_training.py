"""Partial attention and merging with gradients, under xFormers' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from keyspan.core.checks import check_type
from keyspan.ops.fmha.common import AttentionOp, Biases, FwOp, Inputs, merged, partial


@dataclass
class Partial:
    """Attention over some of the keys: out `[B, M, H, V]` or `[B, M, G, H, V]`, lse `[B, H, M]` or `[B, G, H, M]`."""

    _attn: Tensor
    _lse: Tensor

    def is_bmghk(self) -> bool:
        return self._attn.dim() == 5

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Partial:
        """Apply `fn`, which may select, reorder or pad along M, to out and to lse, both as `[B, M, ...]`."""
        lse = fn(self._lse.movedim(-1, 1).unsqueeze(-1))
        return Partial(fn(self._attn), lse.squeeze(-1).movedim(1, -1))


def memory_efficient_attention_partial_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Biases = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp | FwOp = None,
    output_dtype: torch.dtype | None = None,
) -> Partial:
    """`memory_efficient_attention_partial`, returned as a `Partial`; differentiable."""
    return Partial(*partial(Inputs(query, key, value, attn_bias, p, scale, output_dtype, is_partial=True), op))


def merge_attentions_autograd(*partials: Partial) -> Tensor:
    """Attention over all keys from partials over disjoint sets of keys; differentiable."""
    if not partials:
        raise ValueError("No partials to merge")
    for n, part in enumerate(partials):
        check_type(f"partials[{n}]", part, Partial)
    return merged([partial._attn for partial in partials], [partial._lse for partial in partials])[0]
