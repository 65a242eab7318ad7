"""The module `flash_attn.cute.interface` of flash-attn-4 (4.0 beta).

Beside version 2 the arguments come in another order, dropout and ALiBi are missing, and a function always returns
`(out, lse)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keyspan.core.checks import check_type
from keyspan.interop.flash_attn import functions
from keyspan.interop.flash_attn.functions import WindowSize

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """Attention over a batch of sequences of one length.

    Args:
        q: `[B, M, Hq, K]`.
        k: `[B, N, H, K]`, H a divisor of Hq.
        v: `[B, N, H, V]`.
        window_size: (left, right), both inclusive, bottom-right; None for no bound.
        learnable_sink: `[Hq]`, the logit of one more key per head with value zero. With a gradient.
        num_splits: of no effect, as `pack_gqa`, `deterministic` and `return_lse` are.
        others: `score_mod`, `mask_mod`, their tensors and block sparsity must be None: they are CuTe code.

    Returns:
        `[B, M, Hq, V]` and lse `[B, Hq, M]`, fp32; both with gradients.
    """
    _refuse(others)
    return functions.flash_attn_func(  # type: ignore[return-value]
        q, k, v, 0.0, softmax_scale, causal, window_size, softcap, learnable_sink=learnable_sink, return_lse=True
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences of different lengths.

    Args:
        q: `[T, Hq, K]` with `cu_seqlens_q`; without it a batch `[B, M, Hq, K]`.
        k: `[Tk, H, K]` with `cu_seqlens_k`; pages `[pages, page_size, H, K]` with `page_table`; else `[B, N, H, K]`.
        v: as k with V in place of K.
        cu_seqlens_q: int `[B + 1]`: where each sequence begins in q, and where the last ends.
        cu_seqlens_k: the same for k.
        seqused_q: must be None.
        seqused_k: int `[B]`: keys in use of each sequence, from its start.
        page_table: int `[B, pages]`. Any page size.
        max_seqlen_q: not needed, as `max_seqlen_k`.
        others: as of `flash_attn_func`.

    Returns:
        `[T, Hq, V]` and lse `[Hq, T]`, or `[B, M, Hq, V]` and `[B, Hq, M]`; lse in fp32; both with gradients.
    """
    _refuse(others | {"seqused_q": seqused_q})
    batched = cu_seqlens_q is None
    B, M = 0, 0
    if cu_seqlens_q is None:
        cu_seqlens_q, (B, M), q = _starts("q", q), q.shape[:2], q.flatten(0, 1)
    if cu_seqlens_k is None and page_table is None:
        cu_seqlens_k, k, v = _starts("k", k), k.flatten(0, 1), v.flatten(0, 1)
    out, lse = functions.flash_attn_varlen_func(  # type: ignore[misc]
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale),
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        seqused_k=seqused_k,
        page_table=page_table,
        learnable_sink=learnable_sink,
        return_lse=True,
    )
    return (out.unflatten(0, (B, M)), lse.unflatten(1, (B, M)).transpose(0, 1)) if batched else (out, lse)


def _starts(name: str, x: Tensor) -> Tensor:
    """`cu_seqlens` of a batch `[B, N, …]`."""
    check_type(name, x, Tensor)
    if x.dim() != 4:
        raise ValueError(f"cu_seqlens: got None with {x.dim()}-D inputs, want int tensors [sequences + 1]")
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def _refuse(others: dict[str, object]) -> None:
    """Raise ValueError for an argument that only CuTe kernels can honour."""
    for name, value in others.items():
        if value is not None:
            hint = (
                "; keyspan.interop.torch.find_ranges takes one that is written in torch" if name == "mask_mod" else ""
            )
            raise ValueError(f"{name}: got {type(value).__name__}, want None{hint}")
