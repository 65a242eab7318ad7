"""Cross-entropy of a linear head over a large vocabulary, and log-softmax with the same bits.

Cross-entropy holds the logits of one chunk of tokens at a time.

Letters: T tokens, D width, C classes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyspan.core.checks import check_bool, check_int, check_number, check_tensor
from keyspan.dispatch.flops import register_when_imported
from keyspan.layers.gemm import (
    gemm_dtype,
    invariant_kernels,
    multiplies,
    native,
    native_linear,
    native_matmul,
    operand,
    widens,
)  # fmt: skip
from keyspan.layers.kernels import kernels_for

_CHUNKS = {"cpu": (2**23, 1024), "cuda": (704 * 2**20, 2**31)}
"""Bytes of logits held at a time, and most tokens of a chunk: on a GPU enough for a few large products, on a CPU what
its caches still serve."""
_CHUNK_TOKENS = 256
"""At least so many tokens a chunk: thinner products are slow."""


class _Options(NamedTuple):
    ignore_index: int
    softcap: float | None
    z_loss: float
    chunk: int
    invariant: bool
    dtype: torch.dtype
    """Of the products' operands."""


def _logits(hidden: Tensor, weight: Tensor, out: Tensor, invariant: bool) -> Tensor:
    """Logits of one chunk, written to `out` in the operands' dtype."""
    if native(hidden.dtype, hidden, weight):
        return native_linear(hidden, weight, None, out)
    if invariant:
        z: Tensor = invariant_kernels(hidden.dtype, hidden, weight).product(hidden, weight, None, out)
        return z
    return torch.mm(hidden, weight.t(), out=out)


def _buffer(tokens: int, C: int, like: Tensor) -> Tensor:
    """Memory for the logits of so many tokens. On a GPU rows begin at multiples of 128 bytes, for fast products."""
    width = C if like.is_cpu else -(-C // 64) * 64
    return like.new_empty((tokens, width))[:, :C]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`."""
    if native(a.dtype, a, b):
        native_matmul(a, b, out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`total += a.T @ b`, without a product beside the sum where there is a kernel for these dtypes.

    `first`: the sum begins, and what `total` holds is not read.
    """
    if native(a.dtype, a, b):
        native_matmul(a, b, total, transposed=True, accumulate=not first)
    elif total.dtype == a.dtype:
        total.addmm_(a.t(), b, beta=0 if first else 1)
    elif a.is_cuda and widens(a.dtype, total.dtype):
        if first:
            torch.mm(a.t(), b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a.t() @ b)
    else:
        total += a.t() @ b


def _cross_entropy_(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    losses: Tensor | None,
    options: _Options,
    grads: Tensor | None = None,
    gradient: bool = False,
) -> Tensor:
    """`triton_kernels.cross_entropy_` in plain torch: writes losses and lse; the gradient may overwrite the logits."""
    dtype = z.dtype
    z = z if z.dtype == torch.float64 else z.float()
    if bias is not None:
        z += bias
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    counted = targets != options.ignore_index
    target = targets.where(counted, 0).unsqueeze(1)
    weight = z.softmax(1)  # one fused pass; logsumexp, subtraction and exponential would be seven
    if losses is not None:
        # The largest weight is exp(max − lse), at least 1 / C: its logarithm is as exact as a logsumexp.
        torch.sub(z.amax(1), weight.amax(1).log(), out=lse)
        loss = lse - z.gather(1, target).squeeze(1)
        if options.z_loss:
            loss += options.z_loss * lse.square()
        losses.copy_(loss.where(counted, 0.0))
    if not gradient:
        return z
    # d loss / d capped = softmax(capped) · (1 + 2 z_loss · lse) − onehot(target)
    if options.z_loss:
        weight *= (1 + 2 * options.z_loss * lse).unsqueeze(1)
    weight.scatter_(1, target, weight.gather(1, target) - 1)
    if options.softcap is not None:
        # d capped / d logit = 1 − tanh² = 1 − (capped / softcap)²
        weight *= z.div_(options.softcap).square_().neg_().add_(1)
    if grads is not None:
        weight *= grads.where(counted, 0.0).unsqueeze(1)
    elif z.device.type != "cpu" or not counted.all():  # only a CPU can be asked without waiting
        weight *= counted.unsqueeze(1)
    return weight.to(dtype)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    losses: Tensor | None,
    grads: Tensor | None,
    options: _Options,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """All chunks. Writes lse and losses where `losses` is given; returns the gradients of hidden, weight and bias that
    are needed, for losses of gradient `grads` (None: 1), the others empty."""
    T, D = hidden.shape
    if losses is not None and targets.device.type == "cpu":  # a GPU, which gives NaN, is not waited for
        low, high = (int(x) for x in targets.where(targets != options.ignore_index, 0).aminmax()) if T else (0, 0)
        if not 0 <= low <= high < len(weight):
            wanted = f"0 … {len(weight) - 1}, or ignore_index = {options.ignore_index}"
            raise ValueError(f"targets: got classes {low} … {high}, want {wanted}")
    wide = lse.dtype
    product = _gradient_dtype(hidden, options.dtype)
    gradient = any(needs)
    dhidden = hidden.new_empty((T, D) if needs[0] else 0, dtype=product)
    dweight = weight.new_empty(weight.shape if needs[1] else 0, dtype=wide)
    if not T:
        dweight.zero_()
    dbias = hidden.new_zeros(len(weight) if needs[2] else 0, dtype=wide)
    kernels = kernels_for(hidden, weight, bias, targets)
    with torch.autocast(hidden.device.type, enabled=False):
        w = operand(weight, options.dtype)
        chunk = options.chunk
        if chunk < T:
            chunks = -(-T // chunk)
            chunk = min(chunk, -(-T // chunks // 256) * 256)  # as few chunks, of about one size
        buffer = _buffer(min(chunk, T), len(w), w)
        for start in range(0, T, chunk):
            rows = slice(start, min(start + chunk, T))
            h = operand(hidden[rows], options.dtype)
            z = _logits(h, w, buffer[: len(h)], options.invariant)
            part = None if losses is None else losses[rows]
            g = None if grads is None else grads[rows]
            if kernels is None:
                dz = _cross_entropy_(z, bias, targets[rows], lse[rows], part, options, g, gradient)
            else:
                dz = kernels.cross_entropy_(
                    z, bias, targets[rows], lse[rows], part, ignore_index=options.ignore_index,
                    softcap=options.softcap, z_loss=options.z_loss, grads=g, gradient=gradient,
                )  # fmt: skip
            if needs[0]:
                _product(dz, w, dhidden[rows])
            if needs[1]:
                _add_product(dweight, dz, h, first=not start)
            if needs[2]:
                dbias += dz.sum(0, dtype=wide)
            del z, dz  # before the next chunk's are allocated
    return dhidden, dweight, dbias


# Opaque to torch.compile: a loop over chunks would be unrolled, and compiled anew for each number of tokens.
_library = torch.library.Library("keyspan", "FRAGMENT")
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float? softcap, float z_loss, "
    "int chunk, bool invariant, ScalarType dtype, bool[] needs"
)
_library.define(f"linear_cross_entropy({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"linear_cross_entropy_backward(Tensor lse, Tensor grads, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")


def _op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses [T], lse [T], gradients of the losses' sum)."""
    *numbers, needs = rest
    losses, lse = (hidden.new_empty(len(hidden), dtype=_wide(hidden)) for _ in range(2))
    return losses, lse, *_run(hidden, weight, bias, targets, lse, losses, None, _Options(*numbers), needs)


def _op_backward(
    lse: Tensor, grads: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of losses of gradient `grads` [T], whose logits are computed a second time."""
    *numbers, needs = rest
    return _run(hidden, weight, bias, targets, lse, None, grads, _Options(*numbers), needs)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    losses, lse = (hidden.new_empty(hidden.shape[0], dtype=_wide(hidden)) for _ in range(2))
    return losses, lse, *_fake_backward(lse, lse, hidden, weight, bias, targets, *rest)


def _fake_backward(
    lse: Tensor, grads: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype, needs = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0, dtype=_gradient_dtype(hidden, dtype)),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=lse.dtype),
        hidden.new_empty(weight.shape[0] if needs[2] else 0, dtype=lse.dtype),
    )


for _name, _body, _shapes in (
    ("linear_cross_entropy", _op, _fake),
    ("linear_cross_entropy_backward", _op_backward, _fake_backward),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"keyspan::{_name}", _shapes, lib=_library)


def _register_flops(counter: ModuleType) -> None:
    """Tell torch's counter what the ops cost: the product of the logits, and one for each gradient of a matrix."""

    def count(hidden: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(2 * hidden[0] * hidden[1] * weight[0] * (1 + sum(rest[-1][:2])))

    def count_backward(lse: Any, grads: Any, *rest: Any, **kwargs: Any) -> int:
        return count(*rest)

    counter.register_flop_formula(torch.ops.keyspan.linear_cross_entropy)(count)
    counter.register_flop_formula(torch.ops.keyspan.linear_cross_entropy_backward)(count_backward)


register_when_imported(_register_flops)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gradient_dtype(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What products of operands in `dtype` give here, see `operand`."""
    return dtype if multiplies(hidden.device.type, dtype) else torch.float32


class _Sum(torch.autograd.Function):
    """The losses' sum. The gradients are computed beside it, so that the logits are computed once.

    Until backward it holds a gradient of hidden [T, D] and one of weight [C, D], which backward would allocate first.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options, grad: bool
    ) -> Tensor:
        needs = [grad and need for need in ctx.needs_input_grad[:3]]
        losses, _, *grads = torch.ops.keyspan.linear_cross_entropy(hidden, weight, bias, targets, *options, needs)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        total: Tensor = losses.sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in fp32: a loss scale may be past what fp16 holds, and a factor rounded to bf16 shifts all gradients.
        return *(
            (x.to(grad.dtype) * grad).to(dtype) if need else None
            for x, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ), None, None, None  # fmt: skip


class _Each(torch.autograd.Function):
    """The loss of each token. Keeps lse [T] and computes the logits a second time in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> Tensor:
        losses: Tensor
        losses, lse, *_ = torch.ops.keyspan.linear_cross_entropy(
            hidden, weight, bias, targets, *options, [False, False, False]
        )
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.options = options
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = torch.ops.keyspan.linear_cross_entropy_backward(
            lse, grad.contiguous(), hidden, weight, bias, targets, *ctx.options, needs
        )
        inputs = (hidden, weight, bias)
        return *(g.to(x.dtype) if need else None for g, x, need in zip(grads, inputs, needs, strict=True)), None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
    invariant: bool = False,
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T + bias, targets)` without the logits [T, C] as a whole.

    Args:
        hidden: [T, D]; weight: [C, D]; bias: [C] or None.
        targets: int64 [T] in [0, C), or `ignore_index` for a token that does not count.
        softcap: `c` replaces logits z by `c · tanh(z / c)` (Gemma 2); None for none.
        z_loss: factor on the square of the log-denominator, added to each loss (PaLM, Chowdhery et al., 2022).
        reduction: "mean" over the tokens that count (where none does, NaN with gradients of zero, as in torch), "sum",
            or "none" for [T]. A mean or sum computes its gradients in the forward pass; losses of "none" may be
            weighted afterwards, so backward computes the logits a second time.
        chunk: tokens whose logits are held at a time. Default: 704 MiB of logits on a GPU; 8 MiB, and at most 1024
            tokens, on a CPU; at least 256 tokens.
        invariant: on a GPU, too, the loss of a token has the same bits whatever tokens are beside it, see `linear`.
            With reduction "none", and without softcap and bias, they are those of minus `log_softmax` of the logits
            that `linear` gives.

    Returns:
        The loss in nats, fp32 (fp64 for fp64). Products run in autocast's dtype where autocast is on, and logits are
        rounded to it, as those of torch's formula are; the softmax is fp32. Differentiable once.

    Raises:
        ValueError: for arguments that do not fit, on a CPU also for targets outside [0, C); on a GPU, which is not
            waited for, the loss of such a target is NaN. Where `invariant` cannot be kept, as by `linear`.

    Chunked over tokens, with gradients beside the loss, as in Liger Kernel (Hsu et al., 2024); "Cut Your Losses in
    Large-Vocabulary Language Models" (Wijmans et al., 2024) is chunked over the vocabulary too.
    """
    check_tensor("hidden", hidden)
    check_tensor("weight", weight, hidden)
    check_tensor("bias", bias, hidden, optional=True)
    if hidden.ndim != 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, want [T, D]")
    T, D = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != D:
        raise ValueError(f"weight: got shape {list(weight.shape)}, want [C, {D}] (hidden's last size)")
    C = weight.shape[0]
    if not isinstance(targets, Tensor) or targets.device != hidden.device:
        got = f"a tensor on {targets.device}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: got {got}, want a tensor on {hidden.device} like hidden")
    if targets.shape != (T,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: got {targets.dtype} of shape {list(targets.shape)}, want torch.int64 [{T}]")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias: got shape {list(bias.shape)}, want [{C}]")
    check_int("ignore_index", ignore_index, -(2**63))
    check_bool("invariant", invariant)
    if softcap is not None:
        check_number("softcap", softcap, positive=True)
    check_number("z_loss", z_loss)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, want 'mean', 'sum' or 'none'")
    dtype = gemm_dtype(hidden, weight=weight)
    if chunk is None:
        size, most = _CHUNKS.get(hidden.device.type, _CHUNKS["cuda"])
        number = _gradient_dtype(hidden, dtype).itemsize
        chunk = max(_CHUNK_TOKENS, min(most, size // (number * C) // 256 * 256))
    check_int("chunk", chunk)
    options = _Options(ignore_index, softcap, z_loss, chunk, invariant, dtype)
    if reduction == "none":
        losses: Tensor = _Each.apply(hidden, weight, bias, targets, options)  # type: ignore[no-untyped-call]
        return losses
    total: Tensor = _Sum.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, options, torch.is_grad_enabled()
    )
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    # A division by zero would make the gradients NaN too, and with them all that is accumulated.
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any) -> Tensor:
        T, C = x.shape
        # As the logits of `linear_cross_entropy` lie: loads of another width add in another order.
        z = _buffer(T, C, x).copy_(x)
        lse, losses = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
        first = torch.zeros(T, dtype=torch.int64, device=x.device)
        kernels.cross_entropy_(z, None, first, lse, losses, ignore_index=-100, softcap=None, z_loss=0.0)
        y = z.float() - lse[:, None]
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return (grad - y.exp() * grad.sum(1, keepdim=True)).to(ctx.dtype), None


def log_softmax(logits: Tensor) -> Tensor:
    """`torch.log_softmax(logits.float(), -1)`, whose bits in a row do not depend on the other rows, on a GPU too.

    logits [..., C] of fp32, bf16 or fp16 -> fp32 [..., C]; fp64 stays fp64. Differentiable once. A target's entry is,
    bit for bit, minus the loss that `linear_cross_entropy` computes of these logits in this dtype: on a GPU 16-bit
    logits that were cast to fp32 first are summed in another order. Where no kernel of Keyspan runs (see
    `keyspan.layers.kernels`) torch's function does; on a GPU its sums depend on where in memory a row lies.
    """
    check_tensor("logits", logits)
    rows = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
    kernels = kernels_for(rows) if rows.numel() else None
    if kernels is None:
        return rows.log_softmax(-1, dtype=_wide(logits)).view(logits.shape)
    y: Tensor = _LogSoftmax.apply(rows, kernels)  # type: ignore[no-untyped-call]
    return y.view(logits.shape)
