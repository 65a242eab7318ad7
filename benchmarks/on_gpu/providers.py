"""Attention by us and by others on a work: each makes the call, or says that it cannot. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F

import keyspan
from on_gpu.works import DOCUMENTS, PLAIN, REACH, WINDOW, Work, bias_of, mask_of

Call = Callable[[Any, Any, Any, Any], Any]
"""Of q, k, v `[B, heads, N, D]` and the bias's term."""
Provider = Callable[[Work], "Call | None"]


def ours(w: Work) -> Call:
    mask = mask_of(w.kind)
    # Lowered once a step, outside of the layers; so is flex's block mask.
    ranges = None if mask is None else mask.lower(w.B, w.N, w.N, "cuda")

    def call(q: Any, k: Any, v: Any, term: Any) -> Any:
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        return keyspan.attention(*inputs, mask=ranges, bias=bias_of(w.kind, term), backend="triton").transpose(1, 2)

    return call


def sdpa(backend: Any) -> Provider:
    from torch.nn.attention import sdpa_kernel

    def make(w: Work) -> Call | None:
        if w.kind not in PLAIN:
            return None

        def call(q: Any, k: Any, v: Any, term: Any) -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=w.kind == "causal", enable_gqa=w.H != w.G)

        return call

    return make


FLEX_TABLE = {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 16, "bwd_num_stages": 1,
              "bwd_num_warps": 4, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}  # fmt: skip
"""The fastest of three that were tried on an H100, forward and backward."""


def flex(w: Work) -> Call | None:
    if w.kind in PLAIN:  # faster peers are at hand, and compiling takes long
        return None
    # Backward is called more than once.
    torch._functorch.config.donated_buffer = False
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    document = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).cuda()
    visibility = {
        "packed": lambda b, h, i, j: (document[i] == document[j]) & (i >= j),
        "window": lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
    }.get(w.kind, lambda b, h, i, j: i >= j)
    blocks = create_block_mask(visibility, None, None, w.N, w.N, device="cuda")

    def call(q: Any, k: Any, v: Any, term: Any) -> Any:
        score = None
        if w.kind == "alibi":
            score = lambda s, b, h, i, j: s - term[h] * (i - j)  # noqa: E731
        if w.kind == "table":
            score = lambda s, b, h, i, j: s + term[h, torch.clamp(j - i, -REACH, REACH) + REACH]  # noqa: E731
        # By itself it asks for more shared memory than there is where a table takes a gradient.
        options = FLEX_TABLE if w.kind == "table" else None
        return compiled(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=w.H != w.G, kernel_options=options)

    return call


def providers() -> dict[str, Provider]:
    """By name, as --peers lists them."""
    from torch.nn.attention import SDPBackend

    return {
        "keyspan": ours,
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "flex": flex,
    }
