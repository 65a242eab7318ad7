"""`xformers.ops.fmha`: memory-efficient attention under xFormers' names. `common` calls `keyspan.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keyspan.core.checks import check_dtype, check_type
from keyspan.ops.fmha import (
    attn_bias,
    ck,
    ck_splitk,
    common,
    cutlass,
    cutlass_blackwell,
    dispatch,
    flash,
    flash3,
    merge_training,
    torch_attention_compat,
    triton_splitk,
)
from keyspan.ops.fmha.attn_bias import VARLEN_BIASES, AttentionBias, BlockDiagonalMask, LowerTriangularMask
from keyspan.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    AttentionOp,
    AttentionOpBase,
    Biases,
    Context,
    FwOp,
    Gradients,
    Inputs,
    check_op,
    check_pair,
    merged,
)
from keyspan.ops.fmha.dispatch import _dispatch_bw, _dispatch_fw, _get_use_fa3, _set_use_fa3
from keyspan.ops.left_out import refuse

MemoryEfficientAttentionCutlassOp = (cutlass.FwOp, cutlass.BwOp)
MemoryEfficientAttentionCutlassFwdFlashBwOp = (cutlass.FwOp, flash.BwOp)
MemoryEfficientAttentionCutlassBlackwellOp = (cutlass_blackwell.FwOp, cutlass_blackwell.BwOp)
MemoryEfficientAttentionFlashAttentionOp = (flash.FwOp, flash.BwOp)
MemoryEfficientAttentionCkOp = (ck.FwOp, ck.BwOp)
MemoryEfficientAttentionSplitKCkOp = (ck_splitk.FwOp, ck.BwOp)

ALL_FW_OPS: list[type[AttentionFwOpBase]] = [
    cutlass.FwOp, cutlass_blackwell.FwOp, flash.FwOp, flash3.FwOp, triton_splitk.FwOp, ck.FwOp, ck_splitk.FwOp,
]  # fmt: skip
ALL_BW_OPS: list[type[AttentionBwOpBase]] = [
    cutlass.BwOp, cutlass_blackwell.BwOp, flash.BwOp, flash3.BwOp, ck.BwOp,
]  # fmt: skip
_OPS_LOOKUP = {op.NAME: op for op in [*ALL_FW_OPS, *ALL_BW_OPS]}


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Biases = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Exact attention in linear memory, differentiable in query, key, value and bias.

    Args:
        query: `[B, M, H, K]`, `[B, M, G, H, K]` or `[B, M, K]`. Packed masks: B = 1, or all entries have these lengths.
        key: as query with N in place of M; its heads may be a divisor of the query's, without `expand`.
        value: as key, with V in place of K.
        attn_bias: a mask of `attn_bias`, a tensor broadcastable to the scores (floating: added after the scale;
            bool: true = visible), or a mask or bias of `keyspan`.
        p: dropout probability, applied whenever it is not 0.
        scale: factor on Q·Kᵀ; `None` for K^-½.
        op: a hint; keyspan chooses its backend itself.
        output_dtype: dtype of the output; `None` for the query's.

    Returns:
        The query's shape with V in place of K. Rows that see no key are 0.

    Raises:
        ValueError: for a wrong argument, named in the message.
    """
    return _memory_efficient_attention(Inputs(query, key, value, attn_bias, p, scale, output_dtype), op)


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Biases = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: FwOp = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`memory_efficient_attention` without autograd."""
    return _memory_efficient_attention_forward(Inputs(query, key, value, attn_bias, p, scale, output_dtype), op)


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Biases = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: FwOp = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) without autograd, for `memory_efficient_attention_backward`.

    lse is fp32, the natural logarithm of the softmax's denominator, `[B, H, M]` or `[B, G, H, M]` (`[B, 1, M]` for 3-D
    inputs), −inf for rows that see no key. With `op=cutlass.FwOp` and a packed mask it is padded, one row per sequence.
    With dropout the seed is an attribute of the tensor: pass the same tensor to backward.
    """
    inputs = Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    out, context = _memory_efficient_attention_forward_requires_grad(inputs, op)
    context.lse.dropout_seed = context.rng_state  # type: ignore[attr-defined]
    return out, context.lse


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Biases = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[AttentionBwOpBase] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from output and lse, packed or padded; both may come from attention over more keys than these.

    `BwOp.apply(Context(lse, output), Inputs(...), grad)` of any operator returns the gradient of a bias tensor too, as
    `db`.
    """
    context = Context(lse, output, rng_state=getattr(lse, "dropout_seed", None))
    inputs = Inputs(query, key, value, attn_bias, p, scale)
    grads = _memory_efficient_attention_backward(context, inputs, grad, op)
    return grads.dq, grads.dk, grads.dv


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Biases = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: AttentionOp | FwOp = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over some of the keys, for `merge_attentions`; differentiable.

    out is in `output_dtype`, by default the query's dtype, and fp32 with `op=triton_splitk.FwOp`, as in xFormers.
    """
    return common.partial(Inputs(query, key, value, attn_bias, p, scale, output_dtype, is_partial=True), op)


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) over all keys from results over disjoint sets of keys; differentiable.

    Args:
        attn_split: a list of `[B, M, H, V]`, `[B, M, G, H, V]` or `[B, M, V]`, or all stacked along a first dimension.
        lse_split: a list of `[B, H, M]`, `[B, G, H, M]` or `[B, 1, M]`, or stacked. Parts with lse −inf are
            ignored.
        write_lse: whether lse is returned; else `None`.
        output_dtype: dtype of the output; `None` for that of `attn_split`.
    """
    check_dtype("output_dtype", output_dtype)
    for name, parts in (("attn_split", attn_split), ("lse_split", lse_split)):
        check_type(name, parts, Tensor, list, tuple)
        if isinstance(parts, Tensor) and not parts.dim():
            raise ValueError(f"{name}: got a tensor without dimensions, want parts stacked along the first")
        for n, part in enumerate(parts):
            check_type(f"{name}[{n}]", part, Tensor)
    out, lse = merged(list(attn_split), list(lse_split), output_dtype)
    return out, lse if write_lse else None


def _memory_efficient_attention(inp: Inputs, op: AttentionOp = None) -> Tensor:
    check_pair(op)
    return common.forward(inp)[0]


def _memory_efficient_attention_forward(inp: Inputs, op: FwOp = None) -> Tensor:
    check_op(op, AttentionFwOpBase)
    with torch.no_grad():
        return common.forward(inp)[0]


def _memory_efficient_attention_forward_requires_grad(inp: Inputs, op: FwOp = None) -> tuple[Tensor, Context]:
    check_op(op, AttentionFwOpBase)
    out, context = (op or AttentionFwOpBase).apply(inp, needs_gradient=True)
    assert context is not None
    return out, context


def _memory_efficient_attention_backward(
    ctx: Context, inp: Inputs, grad: Tensor, op: type[AttentionBwOpBase] | None = None
) -> Gradients:
    check_op(op, AttentionBwOpBase)
    return common.backward(ctx, inp, grad)


class _fMHA:  # noqa: N801
    """xFormers' autograd function; some callers use its `apply`."""

    @staticmethod
    def apply(op: AttentionOp, *inputs: Any) -> Tensor:
        """`inputs`: the fields of `Inputs`, in order."""
        return _memory_efficient_attention(Inputs(*inputs), op)


__getattr__ = refuse(__name__)

__all__ = [
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_partial",
    "merge_attentions",
    "AttentionBias",
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "VARLEN_BIASES",
    "Inputs",
    "Context",
    "Gradients",
    "AttentionOp",
    "AttentionOpBase",
    "AttentionFwOpBase",
    "AttentionBwOpBase",
    "ALL_FW_OPS",
    "ALL_BW_OPS",
    "MemoryEfficientAttentionCutlassOp",
    "MemoryEfficientAttentionCutlassFwdFlashBwOp",
    "MemoryEfficientAttentionCutlassBlackwellOp",
    "MemoryEfficientAttentionFlashAttentionOp",
    "MemoryEfficientAttentionCkOp",
    "MemoryEfficientAttentionSplitKCkOp",
    "_memory_efficient_attention",
    "_memory_efficient_attention_forward",
    "_memory_efficient_attention_forward_requires_grad",
    "_memory_efficient_attention_backward",
    "_dispatch_bw",
    "_dispatch_fw",
    "_get_use_fa3",
    "_set_use_fa3",
    "_OPS_LOOKUP",
    "_fMHA",
    "attn_bias",
    "ck",
    "ck_splitk",
    "common",
    "cutlass",
    "cutlass_blackwell",
    "dispatch",
    "flash",
    "flash3",
    "merge_training",
    "torch_attention_compat",
    "triton_splitk",
]
