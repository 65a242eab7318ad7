"""The layers' fused kernels as ops of torch.library, for graphs that `torch.compile` traces: opaque to it.

What a layer keeps for backward is then what its Function saves. Of torch's formulas the compiler's partitioner keeps
whatever a product reads: a gate's output beside its input, a norm beside what was normed.

By the names and with the results of `triton_kernels` and `native_kernels`, which compute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("keyspan", "FRAGMENT")


def _define(name: str, schema: str, body: Any, fake: Any) -> None:
    _library.define(f"{name}{schema}")
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"keyspan::{name}", fake, lib=_library)


def _module(x: Tensor) -> ModuleType:
    from keyspan.layers.kernels import of_device

    found = of_device(x.device.type)
    assert found is not None  # `kernels_for` has asked
    return found


def _none(x: Tensor) -> Tensor:
    """Ops return no None."""
    return x.new_empty(0)


# RMSNorm


def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out, total, inverse = _module(x).rms_norm(x, residual, weight, eps, dtype)
    return out, _none(x) if residual is None else total, inverse


def _rms_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = _none(x) if residual is None else torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype), total, x.new_empty(x.shape[0], dtype=torch.float32)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton_kernels.rms_norm`."""
    out, total, inverse = torch.ops.keyspan.rms_norm(x, residual, weight, eps, dtype)
    return out, x if residual is None else total, inverse


def _rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    weight_too: bool,
    residual_dtype: torch.dtype | None,
    normed: bool,
) -> tuple[Tensor, ...]:
    options = {"weight_too": weight_too, "residual_dtype": residual_dtype, "normed": normed}
    found = _module(x).rms_norm_backward(grad, grad_total, x, residual, weight, inverse, **options)
    return tuple(_none(x) if t is None else t for t in found)


def _rms_norm_backward_fake(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    weight_too: bool,
    residual_dtype: torch.dtype | None,
    normed: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x),
        _none(x) if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype),
        x.new_empty(weight.shape if weight_too else 0, dtype=torch.float32),
        torch.empty_like(grad) if normed else _none(x),
    )


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
    """See `triton_kernels.rms_norm_backward`."""
    dx, dresidual, dweight, out = torch.ops.keyspan.rms_norm_backward(
        grad, grad_total, x, residual, weight, inverse, weight_too, residual_dtype, normed
    )
    return dx, None if residual_dtype is None else dresidual, dweight if weight_too else None, out if normed else None


_define(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _rms_norm,
    _rms_norm_fake,
)
_define(
    "rms_norm_backward",
    "(Tensor grad, Tensor? grad_total, Tensor x, Tensor? residual, Tensor weight, Tensor inverse, bool weight_too, "
    "ScalarType? residual_dtype, bool normed) -> (Tensor, Tensor, Tensor, Tensor)",
    _rms_norm_backward,
    _rms_norm_backward_fake,
)


# Rotary embedding


def _rotated_qkv(
    x: Tensor, cosine: Tensor, sine: Tensor, heads: Sequence[int], interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _module(x).rotated_qkv(x, cosine, sine, heads, interleaved=interleaved)
    return found


def _rotated_qkv_fake(
    x: Tensor, cosine: Tensor, sine: Tensor, heads: Sequence[int], interleaved: bool
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[0], n, x.shape[2]) for n in heads)


def rotated_qkv(
    x: Tensor, cosine: Tensor, sine: Tensor, heads: Sequence[int], *, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton_kernels.rotated_qkv`."""
    q, k, v = torch.ops.keyspan.rotated_qkv(x, cosine, sine, heads, interleaved)
    return q, k, v


def _rotate_qkv_backward(grads: Sequence[Tensor], cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    found: Tensor = _module(cosine).rotate_qkv_backward(tuple(grads), cosine, sine, interleaved=interleaved)
    return found


def _rotate_qkv_backward_fake(grads: Sequence[Tensor], cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    T, _, K = grads[0].shape
    return grads[0].new_empty(T, sum(g.shape[1] for g in grads), K)


def rotate_qkv_backward(
    grads: tuple[Tensor, Tensor, Tensor], cosine: Tensor, sine: Tensor, *, interleaved: bool
) -> Tensor:
    """See `triton_kernels.rotate_qkv_backward`."""
    found: Tensor = torch.ops.keyspan.rotate_qkv_backward(grads, cosine, sine, interleaved)
    return found


_define(
    "rotated_qkv",
    "(Tensor x, Tensor cosine, Tensor sine, int[] heads, bool interleaved) -> (Tensor, Tensor, Tensor)",
    _rotated_qkv,
    _rotated_qkv_fake,
)
_define(
    "rotate_qkv_backward",
    "(Tensor[] grads, Tensor cosine, Tensor sine, bool interleaved) -> Tensor",
    _rotate_qkv_backward,
    _rotate_qkv_backward_fake,
)


# The gate of SwiGLU and GeGLU


def _gate(x12: Tensor, activation: str) -> Tensor:
    found: Tensor = _module(x12).gate(x12, activation)
    return found


def _gate_backward(grad: Tensor, x12: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _module(x12).gate_backward(grad, x12, activation)
    return found


def gate(x12: Tensor, activation: str) -> Tensor:
    """See `triton_kernels.gate`."""
    found: Tensor = torch.ops.keyspan.gate(x12, activation)
    return found


def gate_backward(grad: Tensor, x12: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See `triton_kernels.gate_backward`."""
    dx12, out = torch.ops.keyspan.gate_backward(grad, x12, activation)
    return dx12, out


_define(
    "gate",
    "(Tensor x12, str activation) -> Tensor",
    _gate,
    lambda x12, activation: x12.new_empty(x12.shape[0], x12.shape[1] // 2),
)
_define(
    "gate_backward",
    "(Tensor grad, Tensor x12, str activation) -> (Tensor, Tensor)",
    _gate_backward,
    lambda grad, x12, activation: (torch.empty_like(x12), torch.empty_like(grad)),
)
