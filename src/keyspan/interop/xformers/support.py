"""Generates the table of features by mask class, by trying each: `python -m keyspan.interop.xformers.support`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from keyspan.interop.xformers.attn_bias_utils import create_attn_bias, ref_attention
from keyspan.ops.fmha import attn_bias as masks
from keyspan.ops.fmha import memory_efficient_attention
from keyspan.ops.fmha.attn_bias import AttentionBias

BATCH, QUERIES, KEYS, PAGE = 2, 3, 6, 2


def _case(bias_type: type[AttentionBias], kv_heads: int = 2) -> tuple[AttentionBias, tuple[Tensor, ...]]:
    """A mask of the class, and fp64 query, key and value for it."""
    torch.manual_seed(0)
    mask = create_attn_bias(bias_type, BATCH, 2, 1, QUERIES, KEYS, "cpu", torch.float64, False, "BMHK", page_size=PAGE)
    assert isinstance(mask, AttentionBias)
    batch = 1 if isinstance(mask, masks.VARLEN_BIASES) else BATCH
    packed = BATCH // batch
    shapes = ((QUERIES, 2), (KEYS, kv_heads), (KEYS, kv_heads))
    return mask, tuple(torch.randn(batch, n * packed, h, 4, dtype=torch.float64) for n, h in shapes)


def forward(bias_type: type[AttentionBias]) -> bool:
    """Whether attention with the mask equals the dense formula."""
    mask, (q, k, v) = _case(bias_type)
    return _close(memory_efficient_attention(q, k, v, mask), ref_attention(q, k, v, mask))


def backward(bias_type: type[AttentionBias], kv_heads: int = 2) -> bool:
    """Whether its gradients do."""
    mask, qkv = _case(bias_type, kv_heads)
    q, k, v = (x.requires_grad_() for x in qkv)
    got = memory_efficient_attention(q, k, v, mask)
    want = ref_attention(q, k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1), mask)
    cotangent = torch.randn_like(want)
    grads = torch.autograd.grad(got, (q, k, v), cotangent), torch.autograd.grad(want, (q, k, v), cotangent)
    return _close(got, want) and all(_close(a, b) for a, b in zip(*grads, strict=True))


def grouped_heads(bias_type: type[AttentionBias]) -> bool:
    """Whether query heads may share a key head without `expand`, with gradients."""
    return backward(bias_type, kv_heads=1)


def tensor_bias(bias_type: type[AttentionBias]) -> bool:
    """Whether a broadcast tensor may be added to the scores, with the gradient of finite differences."""
    mask, (q, k, v) = _case(bias_type)
    keys = KEYS if isinstance(mask, masks._PagedBlocks) else k.shape[1]
    bias = torch.randn(2, 1, keys, dtype=torch.float64).requires_grad_()

    def attention(x: Tensor) -> Tensor:
        return memory_efficient_attention(q, k, v, mask.add_bias(x))

    learns = torch.autograd.grad(attention(bias).square().sum(), bias)[0].any()
    return bool(learns) and torch.autograd.gradcheck(attention, bias, raise_exception=False, fast_mode=True)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-11)


COLUMNS: dict[str, Callable[[type[AttentionBias]], bool]] = {
    "forward": forward,
    "backward": backward,
    "tensor bias, with gradient": tensor_bias,
    "grouped heads": grouped_heads,
}


def table() -> str:
    """A Markdown table: a row per mask class with its definition, and a column per feature."""
    lines = [
        f"| class | query i sees key j if | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for bias_type in masks.MASK_CLASSES:
        cells = ["yes" if works(bias_type) else "no" for works in COLUMNS.values()]
        lines.append(f"| `{bias_type.__name__}` | {bias_type.__doc__} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
