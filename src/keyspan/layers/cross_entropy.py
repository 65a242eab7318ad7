"""Cross-entropy of a linear head over a large vocabulary, in chunks of tokens: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyspan.layers.gemm import gemm_dtype, operand

_CHUNK_ELEMENTS = 2**22  # logits held at a time: 16 MiB in fp32
_CHUNK_TOKENS = 256  # but at least so many tokens, or the products would be too thin to be fast


class _Options(NamedTuple):
    ignore_index: int
    softcap: float | None
    chunk: int
    dtype: torch.dtype  # of the product's operands


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """fp32 logits of one chunk (fp64 for fp64); hidden and weight as `operand` made them."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        z = hidden @ weight.t()
        z = z if z.dtype == torch.float64 else z.float()
    if bias is not None:
        z += bias
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each token. Keeps lse [T], and computes the logits a second time in backward.

    Computing the gradients in the forward pass would save that product, but would keep a [C, D] and a [T, D]
    tensor until backward, and could not serve losses that are weighted afterwards (reduction="none").
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> Tensor:
        losses, sums = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            w = operand(weight, options.dtype)
            for start in range(0, max(len(targets), 1), options.chunk):
                rows = slice(start, start + options.chunk)
                z = _logits(operand(hidden[rows], options.dtype), w, bias, options.softcap)
                kept = targets[rows] != options.ignore_index
                target = targets[rows].where(kept, 0).unsqueeze(1)
                lse = z.logsumexp(1)
                losses.append((lse - z.gather(1, target).squeeze(1)).where(kept, 0.0))
                sums.append(lse)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(sums))
        ctx.options = options
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, sums = ctx.saved_tensors
        options: _Options = ctx.options
        need = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if need[0] else None
        dweight = torch.zeros_like(weight, dtype=grad.dtype) if need[1] else None
        dbias = torch.zeros_like(bias, dtype=grad.dtype) if need[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = operand(weight, options.dtype)
            for start in range(0, len(targets), options.chunk):
                rows = slice(start, start + options.chunk)
                h = operand(hidden[rows], options.dtype)
                z = _logits(h, w, bias, options.softcap)
                # d capped / d logit = 1 − tanh² = 1 − (capped / softcap)²
                slope = None if options.softcap is None else 1 - (z / options.softcap).square_()
                kept = targets[rows] != options.ignore_index
                target = targets[rows].where(kept, 0).unsqueeze(1)
                # d loss / d capped = softmax(capped) − onehot(target)
                dz = z.sub_(sums[rows].unsqueeze(1)).exp_()
                dz.scatter_(1, target, dz.gather(1, target) - 1)
                dz *= grad[rows].where(kept, 0.0).unsqueeze(1)
                if slope is not None:
                    dz *= slope
                if dbias is not None:
                    dbias += dz.sum(0)
                dz = dz.to(w.dtype)
                if dhidden is not None:
                    dhidden[rows] = dz @ w
                if dweight is not None:
                    dweight += dz.t() @ h
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T + bias, targets)` whose logits [T, C] never exist as a whole.

    hidden [T, D], weight [C, D], targets [T] int64 in [0, C) or `ignore_index`, bias [C] or None.
    softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
    reduction: "mean" over the tokens not ignored (NaN where all are, as in torch), "sum", or "none" for [T].
    chunk: tokens whose logits are held at a time (default: 16 MiB of them, at least 256 tokens), in forward
    and again in backward, which computes them a second time.

    Returns nats, in fp32 (fp64 for fp64). The product runs in autocast's dtype where autocast is on; its
    result and the softmax are fp32. It can be differentiated once. Raises ValueError for arguments that do
    not fit. Chunked over tokens; "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al., 2024)
    does so over the vocabulary too.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, want [T, D]")
    T, D = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != D:
        raise ValueError(f"weight: got shape {list(weight.shape)}, want [C, {D}] (hidden's last size)")
    C = weight.shape[0]
    if targets.shape != (T,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: got {targets.dtype} of shape {list(targets.shape)}, want torch.int64 [{T}]")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias: got shape {list(bias.shape)}, want [{C}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, want a positive number or None")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, want 'mean', 'sum' or 'none'")
    if chunk is None:
        chunk = max(_CHUNK_TOKENS, _CHUNK_ELEMENTS // C)
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, want at least 1 token")
    options = _Options(ignore_index, softcap, chunk, gemm_dtype(hidden, weight=weight))
    losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, options
    )
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()
