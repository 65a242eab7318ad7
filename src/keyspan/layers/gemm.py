"""Linear maps at the precision of `torch.autocast`, fast also on CPUs that have no bf16 or fp16 instructions.

A CPU without such instructions multiplies bf16 or fp16 matrices element by element, 3 to 80 times slower than
fp32 (measured with AVX2). There, `linear` rounds the operands to the low dtype, multiplies them in fp32 and
rounds the result once: what a GEMM in the low dtype with fp32 accumulation computes, at the speed of fp32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Names in `torch.cpu.get_capabilities` of the instruction sets with which oneDNN multiplies a dtype natively.
_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # A torch that cannot be asked has no get_capabilities; fp32 is then right everywhere, if not the fastest.
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    onednn = torch.backends.mkldnn.is_available()
    return bool(onednn) and any(has.get(name) for name in _INSTRUCTIONS[dtype])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies(device_type: str, dtype: torch.dtype) -> bool:
    """Whether devices of this type have instructions of their own for products of matrices of `dtype`."""
    return device_type != "cpu" or dtype not in _INSTRUCTIONS or _cpu_multiplies(dtype)


def gemm_dtype(x: Tensor, **weights: Tensor | None) -> torch.dtype:
    """The dtype in which `x` is multiplied here: autocast's where it is on (never for fp64), else its own.

    Raises ValueError where a weight, named by its keyword, has another dtype and autocast does not settle it.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    for name, weight in weights.items():
        if weight is not None and weight.dtype != x.dtype:
            raise ValueError(f"{name}: got {weight.dtype}, want {x.dtype} like the input (or torch.autocast)")
    return x.dtype


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, held in what this device multiplies at full speed: `dtype` itself or fp32."""
    x = x.to(dtype)
    return x if multiplies(x.device.type, dtype) else x.float()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias` of operands rounded to `dtype`, itself rounded once. Call with autocast off."""
    bias = None if bias is None else operand(bias, dtype)
    return F.linear(operand(x, dtype), operand(weight, dtype), bias).to(dtype)


def input_gradient(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of `product` for x, rounded. Autocast off."""
    rows = operand(grad, dtype).reshape(-1, grad.shape[-1])
    return (rows @ operand(weight, dtype)).to(dtype).view(*grad.shape[:-1], weight.shape[1])


def parameter_gradients(
    grad: Tensor, x: Tensor, dtype: torch.dtype, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `product` for weight and bias, rounded; None where not wanted. Autocast off."""
    rows = operand(grad, dtype).reshape(-1, grad.shape[-1])
    dweight = (rows.t() @ operand(x, dtype).reshape(-1, x.shape[-1])).to(dtype) if wanted[0] else None
    return dweight, rows.sum(0).to(dtype) if wanted[1] else None


class _RoundedLinear(torch.autograd.Function):
    """`product` as one node: what is saved is x in the low dtype, not the fp32 copies that are multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        low = x.to(dtype)
        ctx.save_for_backward(low, weight)
        ctx.dtype, ctx.dtypes = dtype, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return product(low, weight, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dx = input_gradient(grad, weight, ctx.dtype) if ctx.needs_input_grad[0] else None
            grads = (dx, *parameter_gradients(grad, low, ctx.dtype, ctx.needs_input_grad[1:3]))
        return *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` that stays fast in bf16 and fp16 on every CPU.

    x [..., D], weight [C, D], bias [C] -> [..., C], in autocast's dtype where autocast is on, else in x's.
    Where the CPU multiplies that dtype natively, on other devices, and for fp32 and fp64, it is `F.linear`.
    Elsewhere the operands, the result and the gradients are rounded to that dtype and the products are fp32;
    such a result can be differentiated once. Raises ValueError where dtypes differ and autocast is off.
    """
    dtype = gemm_dtype(x, weight=weight, bias=bias)
    if multiplies(x.device.type, dtype):
        return F.linear(x, weight, bias)
    result: Tensor = _RoundedLinear.apply(x, weight, bias, dtype)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `linear`: same parameters, same state dict, same initial values."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        return linear(input, self.weight, self.bias)
