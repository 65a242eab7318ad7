"""The layers' kernels on CPUs, in the compiled library (native/layers.h): those of `triton_kernels`, by the same names.

Each function takes contiguous CPU tensors in fp32, bf16 or fp16 and returns new ones, or writes where it says so.
Arithmetic is fp32; results are rounded once. T rows (tokens), D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keyspan.backends.native import binding

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PARTS = 64
"""Runs of rows of which each sums the gradient of RMSNorm's weight: a fixed number, so that threads change no bit."""


def _run(function: str, name: str, pointers: tuple[Tensor | None, ...], *numbers: Any) -> None:
    """Call `function` of the library with the struct `name`."""
    addresses = [0 if x is None else x.data_ptr() for x in pointers]
    state = (binding.isa_number(), torch.get_num_threads())
    getattr(binding.LIBRARY, f"keyspan_{function}")(binding.LAYERS[name].pack(*addresses, *state, *numbers))


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out in `dtype`, x + residual in x's dtype, 1 / rms of its rows in fp32 [T]) of x and residual [T, D]."""
    T, D = x.shape
    out = torch.empty_like(x, dtype=dtype)
    total = x if residual is None else torch.empty_like(x)
    inverse = torch.empty(T, dtype=torch.float32, device="cpu")
    more = DTYPES[x.dtype if residual is None else residual.dtype]
    pointers = (x, residual, weight.float().contiguous(), total, out, inverse, *[None] * 5)
    _run("rms_norm", "rms_norm", pointers, DTYPES[x.dtype], more, DTYPES[dtype], T, D, 0, eps)
    return out, total, inverse


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    *,
    weight_too: bool = True,
    residual_dtype: torch.dtype | None = None,
    normed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of RMSNorm, see `triton_kernels.rms_norm_backward`."""
    T, D = x.shape
    dx = torch.empty_like(x)
    dresidual = None if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype)
    out = torch.empty_like(grad) if normed else None
    parts = max(1, min(_PARTS, T))
    dweight = torch.empty((parts, D), dtype=torch.float32, device="cpu") if weight_too else None
    pointers = (None, residual, weight.float().contiguous(), x, out, inverse, grad, grad_total, dx, dresidual, dweight)
    more = residual_dtype or (x.dtype if residual is None else residual.dtype)
    _run("rms_norm_backward", "rms_norm", pointers, DTYPES[x.dtype], DTYPES[more], DTYPES[grad.dtype], T, D, parts, 0.0)
    return dx, dresidual, None if dweight is None else dweight[0].clone(), out


def rotate_qkv(x: Tensor, cosine: Tensor, sine: Tensor, heads: tuple[int, int, int], *, interleaved: bool) -> None:
    """Rotate query and key heads of x [T, q + k + v heads, K] where they lie. Cosine and sine are fp32 [T, K / 2]."""
    T, every, K = x.shape
    q, k, _ = heads
    stride = every * K
    _run(
        "rotary", "rotary", (x, None, None, cosine, sine, x), DTYPES[x.dtype], T, K,
        q + k, 0, 0, stride, 0, 0, stride, False, interleaved,
    )  # fmt: skip


def rotated_qkv(
    x: Tensor, cosine: Tensor, sine: Tensor, heads: Sequence[int], *, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rotate_qkv`, to three tensors [T, heads, K] of query, key and value."""
    T, every, K = x.shape
    q, k, v = x.split(list(heads), 1)
    turned = [x.new_empty(part.shape) for part in (q, k)]
    for part, out in zip((q, k), turned, strict=True):
        n = part.shape[1]
        _run(
            "rotary", "rotary", (part, None, None, cosine, sine, out), DTYPES[x.dtype], T, K,
            n, 0, 0, every * K, 0, 0, n * K, False, interleaved,
        )  # fmt: skip
    return turned[0], turned[1], v.clone(memory_format=torch.contiguous_format)


def rotate_qkv_backward(
    grads: tuple[Tensor, Tensor, Tensor], cosine: Tensor, sine: Tensor, *, interleaved: bool
) -> Tensor:
    """The gradient of x, see `rotate_qkv`, of those of its query, key and value [T, heads, K]."""
    T, _, K = grads[0].shape
    heads = [g.shape[1] for g in grads]
    out = grads[0].new_empty((T, sum(heads), K))
    strides = [n * K for n in heads]
    _run(
        "rotary", "rotary", (*grads, cosine, sine, out), DTYPES[out.dtype], T, K, *heads, *strides, sum(strides),
        True, interleaved,
    )  # fmt: skip
    return out


ACTIVATIONS = ("silu", "gelu_tanh")
"""`Activation` of native/layers.h."""


def gate(x12: Tensor, activation: str) -> Tensor:
    """f(x1) · x2 [T, D] of x12 [T, 2 D]; f is silu, or gelu in its tanh form."""
    T, D = x12.shape[0], x12.shape[1] // 2
    out = x12.new_empty((T, D))
    _run("gate", "gate", (x12, None, out, None), DTYPES[x12.dtype], ACTIVATIONS.index(activation), T, D)
    return out


def gate_backward(grad: Tensor, x12: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of x12 [T, 2 D], f(x1) · x2 [T, D] computed again), given the gradient of the latter."""
    T, D = grad.shape
    out, dx12 = torch.empty_like(grad), torch.empty_like(x12)
    _run("gate_backward", "gate", (x12, grad, out, dx12), DTYPES[x12.dtype], ACTIVATIONS.index(activation), T, D)
    return dx12, out


def cross_entropy_(
    z: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    losses: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    grads: Tensor | None = None,
    gradient: bool = False,
) -> Tensor:
    """Cross-entropy of logits z [T, C] in fp32 or of 16 bits, which the gradient overwrites.

    Args:
        bias: [C], added to the logits; targets: int64 [T].
        lse: fp32 [T], written where `losses` is given.
        losses: fp32 [T], written; NaN for a target outside [0, C).
        grads: fp32 [T], the gradient of each loss; None for 1.
        gradient: whether the gradient of the logits is wanted, in their dtype.

    Returns:
        z, with the gradient where it is wanted.
    """
    T, C = z.shape
    pointers = (z, None if bias is None else bias.float().contiguous(), targets.contiguous(), lse, losses, grads)
    _run(
        "cross_entropy", "cross_entropy", pointers, DTYPES[z.dtype], z.stride(0), T, C, ignore_index, gradient,
        softcap or 0.0, z_loss,
    )  # fmt: skip
    return z
