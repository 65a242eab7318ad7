"""The module `flash_attn.flash_attn_interface` (2.8): the public functions, and the halves that ring attention calls.

A half computes forward or backward of one block without autograd. The backward takes output and lse of attention over
more keys than the block's, as after a merge, and writes its gradients into tensors it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keyspan.core.biases import Alibi
from keyspan.core.masks import Documents, Mask
from keyspan.core.problem import make_problem
from keyspan.dispatch.choose import choose
from keyspan.interop.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from keyspan.interop.flash_attn.functions import _visible

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Forward = tuple[Tensor, Tensor, None, None]


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> Forward:
    """(out, lse, None, None) of `flash_attn_func`; `dropout_p` must be 0, as no state of a generator is handed on."""
    _no_dropout(dropout_p)
    window = (window_size_left, window_size_right)
    out, lse = flash_attn_func(  # type: ignore[misc]
        q, k, v, 0.0, softmax_scale, causal, window, softcap, alibi_slopes, return_lse=True
    )
    return out, lse, None, None


@torch.no_grad()
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> Forward:
    """(out, lse, None, None) of `flash_attn_varlen_func`; `dropout_p` must be 0."""
    _no_dropout(dropout_p)
    if leftpad_k is not None:
        raise ValueError("leftpad_k: got a tensor, want None")
    starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    window = (window_size_left, window_size_right)
    out, lse = flash_attn_varlen_func(  # type: ignore[misc]
        *(q, k, v, *starts, 0.0, softmax_scale, causal, window, softcap, alibi_slopes),
        block_table=block_table,
        seqused_k=seqused_k,
        return_lse=True,
    )
    return out, lse, None, None


@torch.no_grad()
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Write the gradients of a batch to `dq`, `dk`, `dv`; lse is `[B, Hq, M]`. Returns Σ dout · out, `[B, Hq, M]`."""
    _no_dropout(dropout_p)
    visible = _visible(causal, (window_size_left, window_size_right), alibi_slopes is not None)
    given = (q, k, v, dout, out, softmax_lse)
    return _backward(given, (dq, dk, dv), visible, softmax_scale, softcap, alibi_slopes)


@torch.no_grad()
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Write the gradients of packed sequences to `dq`, `dk` and `dv`; lse is `[Hq, T]`. Returns Σ dout · out."""
    _no_dropout(dropout_p)
    mask: Mask = Documents.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    visible = _visible(causal, (window_size_left, window_size_right), alibi_slopes is not None)
    given = tuple(x[None] for x in (q, k, v, dout, out, softmax_lse))
    into = tuple(None if x is None else x[None] for x in (dq, dk, dv))
    return _backward(given, into, mask if visible is None else mask & visible, softmax_scale, softcap, alibi_slopes)[0]


def _no_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"dropout_p: got {dropout_p}, want 0: the halves hand on no state of a generator")


def _backward(
    given: tuple[Tensor, ...],
    into: tuple[Tensor | None, ...],
    mask: Mask | None,
    scale: float | None,
    softcap: float,
    slopes: Tensor | None,
) -> Tensor:
    q, k, v, dout, out, lse = given
    bias = None if slopes is None else Alibi(slopes)
    problem, _ = make_problem(q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap or None)
    G, H = problem.query.shape[2:4]
    needs = [x is not None for x in into] + [False] * 3
    grads = torch.ops.keyspan.attention_backward(
        dout.to(q.dtype).unflatten(2, (G, H)),
        None,
        out.to(q.dtype).unflatten(2, (G, H)),
        lse.unflatten(1, (G, H)).to(problem.compute_dtype).contiguous(),
        *problem,
        needs,
        choose(problem, None),
    )
    for target, grad in zip(into, grads[:3], strict=True):
        if target is not None:
            target.copy_(grad.reshape(target.shape))
    return (dout.float() * out.float()).sum(-1).transpose(1, 2)
