"""Linear maps at the precision of `torch.autocast`; on a CPU by the native library, where it is built.

The library's product (native/linear.h) sums each element of the result in one fixed order: a row's bits depend on that
row and the weight alone, not on the other rows, on the threads or on whether the weight is packed. Sums are fp32, for
bf16 and fp16 too, and rounded once; it is fast also on CPUs that have no instructions for those.

On a GPU torch multiplies, whose kernels for few and for many rows round differently. With `invariant` a Triton kernel
does (triton_product.py), with which a row's bits depend on nothing else there too.

Without the library torch multiplies. A CPU without such instructions then multiplies bf16 or fp16 matrices element by
element, 3 to 80 times slower than fp32 (measured with AVX2): operands are rounded to the low dtype and multiplied in
fp32 there, which gives the same sums at the speed of fp32.
"""

from __future__ import annotations

import functools
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyspan.core.checks import check_factory, check_int, check_tensor
from keyspan.core.shims import eager, plain, profiled

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


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, for results of an autograd Function's forward.

    A cast that changes nothing returns its own argument. Where `torch.compile` of torch 2.11 traces two variables for
    the tensor that forward returns, the gradient is lost: it is zero (pytorch#180642).
    """
    return x if x.dtype == dtype else x.to(dtype)


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, held in what this device multiplies at full speed: `dtype` itself or fp32."""
    x = x.to(dtype)
    return x if multiplies(x.device.type, dtype) else x.float()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, invariant: bool = False) -> Tensor:
    """`x @ weight.T + bias` of operands rounded to `dtype`, itself rounded once. Call with autocast off.

    With `invariant` it raises a ValueError where bits of a row would depend on the other rows.
    """
    if native_multiplies(x, weight, bias, dtype):
        return native_linear(x.to(dtype), factor(weight, dtype), None if bias is None else bias.to(dtype))
    if invariant and _fits(x, weight, bias):
        kernels = invariant_kernels(dtype, x, weight, *(() if bias is None else (bias,)))
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        y: Tensor = kernels.product(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.view(*x.shape[:-1], len(weight))
    bias = None if bias is None else operand(bias, dtype)
    return cast(F.linear(operand(x, dtype), operand(weight, dtype), bias), dtype)


@functools.cache
def _library() -> ModuleType | None:
    """The binding of the native library; None where it is not built."""
    from keyspan.backends.native import binding

    return None if binding.LIBRARY is None else binding


_NATIVE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Dtype` of native/params.h."""
_ROWS, _PANELS, _INT8 = 0, 1, 2
"""`Storage` of native/linear.h."""
PANEL = 64
"""Columns of a packed panel; `LINEAR_PANEL` there."""


def native_multiplies(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the native library computes this product: plain tensors on the CPU that nothing intercepts."""
    return native(dtype, x, weight, *(() if bias is None else (bias,))) and _fits(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these shapes make a product of numbers."""
    return weight.ndim == 2 and x.shape[-1] == weight.shape[1] > 0 and (bias is None or bias.shape == weight.shape[:1])


def invariant_kernels(dtype: torch.dtype, *tensors: Tensor) -> Any:
    """`triton_product`, for tensors whose product the native library does not compute.

    Raises ValueError where no kernel gives a row of a product bits that do not depend on the other rows.
    """
    device = tensors[0].device
    reason = None
    if dtype not in _NATIVE:
        reason = f"{dtype} has no product whose rows do not depend on one another, want fp32, bf16 or fp16"
    elif not eager():
        reason = "a compiler, mode or transform intercepts torch here and computes products in its own way"
    elif device.type not in ("cpu", "cuda"):
        reason = f"there are no such products on {device.type}, want tensors on a CPU or a GPU of NVIDIA or AMD"
    elif not all(plain(x) and x.device == device for x in tensors):
        reason = "tensors are of several devices or of a subclass such as DTensor"
    elif device.type == "cpu":
        reason = "the native library is not built, and torch's products depend on how many rows there are"
    elif find_spec("triton") is None:
        reason = "on a GPU it needs Triton, which is not installed"
    if reason is not None:
        raise ValueError(f"invariant: got True, want False: {reason}")
    from keyspan.layers import triton_product

    return triton_product


def native(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether the native library may multiply these tensors in `dtype`: plain ones on the CPU, nothing intercepts."""
    return dtype in _NATIVE and eager() and all(x.is_cpu and plain(x) for x in tensors) and _library() is not None


def factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What the library multiplies by where that is `weight` rounded to `dtype`: it rounds fp32 itself."""
    return weight if weight.dtype == torch.float32 else weight.to(dtype)


_MANY_ROWS = 96
"""Rows for which the library packs a weight first; `MANY_ROWS` in native/linear.cpp."""


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [..., D], weight [C, D], bias [C] -> [..., C], written to `out` where that is given.

    All of one dtype, but for a weight in fp32, which is rounded to it.
    """
    if weight.dtype != x.dtype:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) >= _MANY_ROWS:
            out = rows.new_empty((len(rows), len(weight))) if out is None else out
            native_matmul(rows, weight, out, b_transposed=True, bias=bias)
            return out.view(*x.shape[:-1], len(weight))
        weight = weight.to(x.dtype)
    if x.dtype != torch.float32 and x.shape[-1] % 2:  # two numbers are read at a time
        x, weight = F.pad(x, (0, 1)), F.pad(weight, (0, 1))
    even = x.dtype == torch.float32 or weight.stride(0) % 2 == 0
    weight = weight if weight.stride(1) == 1 and even else weight.contiguous()
    return _run(x, weight, None, None if bias is None else bias.contiguous(), _ROWS, len(weight), out)


def _run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    storage: int,
    outputs: int,
    out: Tensor | None = None,
) -> Tensor:
    library: Any = _library()
    inputs = x.shape[-1]
    rows = x.reshape(-1, inputs).contiguous()
    out = x.new_empty((len(rows), outputs)) if out is None else out
    call = library.LINEAR.pack(
        rows.data_ptr(), weight.data_ptr(), 0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), library.isa_number(), torch.get_num_threads(),
        _NATIVE[x.dtype], storage, 0, len(rows), inputs, outputs, inputs, weight.stride(0),
    )  # fmt: skip
    with torch.profiler.record_function("keyspan::linear") if profiled() else nullcontext():
        library.LINEAR_PRODUCT(call)
    return out.view(*x.shape[:-1], outputs)


class _LargePages:
    """Memory in pages of 2 MiB where Linux has them: it is read up to a fifth faster than in pages of 4 KiB.

    Tensors take parts of a region one after the other, and keep it alive.
    """

    PAGE, REGION = 2 << 20, 32 << 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: Callable[[], mmap.mmap | None] = lambda: None
        self._used = 0

    def empty(self, count: int) -> Tensor:
        """int32 [count], undefined."""
        if not hasattr(mmap, "MADV_HUGEPAGE") or not count:
            return torch.empty(count, dtype=torch.int32, device="cpu")
        size = -(-4 * count // 64) * 64
        with self._lock:
            region, at = self._region(), self._used
            if region is None or at + size > len(region):
                length = -(-max(size, self.REGION) // self.PAGE) * self.PAGE
                region, at = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                with suppress(OSError):  # a kernel without them
                    region.madvise(mmap.MADV_HUGEPAGE)
                self._region = weakref.ref(region)
            self._used = at + size
        return torch.frombuffer(region, dtype=torch.int32, count=count, offset=at)


_large_pages = _LargePages()


def native_matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    transposed: bool = False,
    b_transposed: bool = False,
    bias: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """out = a @ b + bias, or out += a @ b where `accumulate`, by the native library, see `native`. Returns `out`.

    Args:
        a: [M, K], or where `transposed` [K, M], which stands for its transpose.
        b: [K, N], or where `b_transposed` [N, K], of a's dtype, or in fp32: then it is rounded to that.
        out: [M, N], contiguous, in fp32, bf16 or fp16; fp32 where `accumulate`.
        bias: [N] of a's dtype, or None.

    Sums are fp32, in a fixed order (native/product.h), rounded once.
    """
    library: Any = _library()
    a, b = (x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous() for x in (a, b))
    K, M = a.shape if transposed else a.shape[::-1]
    bias = None if bias is None else bias.contiguous()
    call = library.PRODUCT.pack(
        a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), library.isa_number(),
        torch.get_num_threads(), _NATIVE[a.dtype], _NATIVE[b.dtype], _NATIVE[out.dtype], transposed, b_transposed,
        accumulate, M, K, b.shape[not b_transposed], a.stride(0), b.stride(0),
    )  # fmt: skip
    with torch.profiler.record_function("keyspan::matmul") if profiled() else nullcontext():
        library.MATRIX_PRODUCT(call)
    return out


class PackedWeight:
    """A weight for inference on a CPU, copied into the order in which the native library reads it.

    Args:
        weight: [C, D] of fp32, bf16 or fp16. D must be even for the 2-byte dtypes, a multiple of 4 for int8.
        int8: whether to store 8 bits a number: each row is rounded to multiples of its largest magnitude / 127.

    Its products are, bit for bit, those of the plain weight (of the rounded one for int8). Later changes of the weight
    are not seen.
    """

    def __init__(self, weight: Tensor, int8: bool = False) -> None:
        C, D = weight.shape
        self.outputs, self.inputs, self.dtype = C, D, weight.dtype
        self.scale: Tensor | None = None
        self.storage = _INT8 if int8 else _PANELS
        stored = weight.detach()
        if int8:
            wide = stored.float()
            scale = wide.abs().amax(1) / 127
            self.scale = torch.where(scale == 0, 1, scale)
            stored = (wide / self.scale[:, None]).round().to(torch.int8)
        words = F.pad(stored.contiguous().view(torch.int32), (0, 0, 0, -C % PANEL))
        panels = words.view(-1, PANEL, words.shape[1]).transpose(1, 2)
        self.words = _large_pages.empty(panels.numel()).view(panels.shape).copy_(panels)

    @staticmethod
    def reason_against(weight: Tensor, int8: bool = False) -> str | None:
        """Why this weight cannot be packed, or None."""
        numbers = 4 if int8 else 4 // weight.element_size() if weight.dtype in _NATIVE else 0
        if weight.ndim != 2:
            return "it is packed already"
        if not weight.is_cpu or _library() is None or not numbers:
            return "the native library multiplies fp32, bf16 and fp16 on CPUs, where it is built"
        if weight.shape[1] % numbers:
            return f"a packed weight's rows are multiples of {numbers}, and this one's have {weight.shape[1]} numbers"
        return None

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., D], bias [C] of the weight's dtype -> [..., C]. Without gradients. Raises ValueError for others."""
        if x.dtype != self.dtype or x.shape[-1] != self.inputs or not x.is_cpu:
            raise ValueError(
                f"x: got {x.dtype} of shape {list(x.shape)} on {x.device.type}, "
                f"want {self.dtype} [..., {self.inputs}] on the CPU, as the packed weight"
            )
        return _run(x, self.words, self.scale, bias, self.storage, self.outputs)


def input_gradient(grad: Tensor, weight: Tensor, dtype: torch.dtype, to: torch.dtype) -> Tensor:
    """Gradient of `product` for x, in the dtype `to`. Autocast off."""
    rows, shape = grad.reshape(-1, grad.shape[-1]), (*grad.shape[:-1], weight.shape[1])
    if _native_gradient(dtype, to, grad, weight):
        out = grad.new_empty((len(rows), weight.shape[1]), dtype=to)
        return native_matmul(rows.to(dtype), factor(weight, dtype), out).view(shape)
    return (operand(rows, dtype) @ operand(weight, dtype)).to(dtype).to(to).view(shape)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype, to: torch.dtype) -> Tensor:
    """Gradient of `product` for weight, in the dtype `to`. Autocast off."""
    rows, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if _native_gradient(dtype, to, grad, x):
        out = grad.new_empty((rows.shape[1], x.shape[1]), dtype=to)
        return native_matmul(rows.to(dtype), x.to(dtype), out, transposed=True)
    a, b = operand(rows, dtype).t(), operand(x, dtype)
    if a.is_cuda and widens(a.dtype, to) and not _differentiable(a, b):
        return torch.mm(a, b, out_dtype=to)
    return (a @ b).to(dtype).to(to)


def widens(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether CUDA's product of operands in `dtype` writes its fp32 sums as they are, so that no result is rounded and
    read once more to be widened."""
    return to == torch.float32 and dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None


def bias_gradient(grad: Tensor, dtype: torch.dtype, to: torch.dtype) -> Tensor:
    """Gradient of `product` for bias, in the dtype `to`."""
    return operand(grad, dtype).reshape(-1, grad.shape[-1]).sum(0).to(dtype).to(to)


def _native_gradient(dtype: torch.dtype, to: torch.dtype, *operands: Tensor) -> bool:
    """Whether the native library computes a gradient: it is not to be differentiated itself."""
    return not _differentiable(*operands) and to in _NATIVE and native(dtype, *operands)


def _differentiable(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)


class _Linear(torch.autograd.Function):
    """`product` as one node. It saves x in the dtype that is multiplied, and the weight as it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, invariant: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, bias, dtype, invariant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype, need = ctx.dtype, ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            return (
                input_gradient(grad, weight, dtype, x.dtype) if need[0] else None,
                weight_gradient(grad, x, dtype, weight.dtype) if need[1] else None,
                bias_gradient(grad, dtype, ctx.bias_dtype) if need[2] else None,
                None,
                None,
            )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, invariant: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, on a CPU with the same bits for a row whatever rows are beside it.

    x [..., D], weight [C, D], bias [C] -> [..., C], in autocast's dtype where autocast is on, else in x's.
    fp32, bf16 and fp16 on a CPU are multiplied by the native library, gradients too: their bits do not depend on the
    threads. Without it, on other devices, for fp64, and where a compiler or mode intercepts torch, it is `F.linear`.
    On a CPU without bf16 or fp16 instructions operands, result and gradients are rounded to that dtype and the products
    are fp32.

    With `invariant` a row has the same bits whatever rows are beside it on a GPU too; gradients are torch's. There fp32
    operands are multiplied as three products of tf32, which comes to nearly fp32.

    Raises ValueError where shapes or devices do not fit, where dtypes differ and autocast is off, and where `invariant`
    cannot be kept: for fp64, without Triton on a GPU or the native library on a CPU, and where a compiler or mode
    intercepts torch.
    """
    check_tensor("x", x)
    check_tensor("weight", weight, x)
    check_tensor("bias", bias, x, optional=True)
    if weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"weight: got shape {list(weight.shape)}, want [C, {x.size(-1)}] (x's last size)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, want [{weight.shape[0]}] (weight's first size)")
    dtype = gemm_dtype(x, weight=weight, bias=bias)
    result: Tensor
    by_library = native_multiplies(x, weight, bias, dtype)
    if multiplies(x.device.type, dtype) and not by_library and not invariant:
        result = F.linear(x, weight, bias)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        result = _Linear.apply(x.to(dtype), weight, bias, dtype, invariant)  # type: ignore[no-untyped-call]
    else:
        with torch.autocast(x.device.type, enabled=False):
            result = product(x, weight, bias, dtype, invariant)
    return result


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `linear`: same parameters, same state dict, same initial values."""

    invariant: bool = False
    """As of `linear`."""

    packed: PackedWeight | None = None
    """Set by `pack`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        check_int("in_features", in_features, 0)
        check_int("out_features", out_features, 0)
        check_factory(device, dtype)
        super().__init__(in_features, out_features, bias, device, dtype)

    def pack(self, int8: bool = False) -> None:
        """Multiply by a `PackedWeight` from now on, for inference; the plain weight is given up.

        Raises ValueError where it cannot be packed.
        """
        reason = PackedWeight.reason_against(self.weight, int8)
        if reason is not None:
            raise ValueError(f"weight: {reason}")
        self.packed = PackedWeight(self.weight, int8)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        if self.packed is not None:
            check_tensor("x", input)
            return self.packed.multiply(input, self.bias)
        return linear(input, self.weight, self.bias, self.invariant)
