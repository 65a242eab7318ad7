"""Matrix products on a GPU in which the bits of a row do not depend on the other rows.

cuBLAS does not promise that: it chooses another kernel, or another split of the sum, for other numbers of rows.

Each number of the result is one sum over K in ascending order, in fp32, rounded once. Tiles have other sizes for few
rows than for many; their matrix instructions add in the same order, whatever the tile (compared bit by bit on a Hopper
GPU by tests/gpu/device_layers.py). Nothing is split over K, and nothing is tuned at run time. Imported by the first
such product.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from keyspan.backends.triton.config import family


class Tile(NamedTuple):
    """Shape of a program's tile, and its launch options."""

    BM: int
    """Rows of x."""
    BN: int
    """Rows of the weight."""
    BK: int
    warps: int
    stages: int
    described: bool = False
    """Whether TMA reads the operands."""


@triton.jit(do_not_specialize=["M"])
def product_kernel(x, weight, bias, out, M, N, K, x_stride, weight_stride, out_stride, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESCRIBED: tl.constexpr,
                   BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tiles of out [M, N], each program every `num_programs`-th."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=DESCRIBED):
        # Tiles of GROUP times BM rows one after the other: they share rows of x and of the weight in the L2 cache.
        first = tile // (GROUP * across) * GROUP
        tall = tl.minimum(down - first, GROUP)
        i = (first + tile % (GROUP * across) % tall) * BM
        j = tile % (GROUP * across) // tall * BN
        row, output = i + tl.arange(0, BM), j + tl.arange(0, BN)  # [BM], [BN]
        sums = tl.zeros([BM, BN], tl.float32)
        if DESCRIBED:
            for k in range(0, K, BK):
                sums = tl.dot(x.load([i, k]), weight.load([j, k]).T, sums, input_precision=PRECISION)
        else:
            column = tl.arange(0, BK)  # [BK]
            x_at = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]  # [BM, BK]
            weight_at = weight + output.to(tl.int64)[None, :] * weight_stride + column[:, None]  # [BK, BN]
            for k in range(0, K, BK):
                a = tl.load(x_at + k, mask=(row < M)[:, None] & (column < K - k)[None, :], other=0.0)
                b = tl.load(weight_at + k, mask=(output < N)[None, :] & (column < K - k)[:, None], other=0.0)
                sums = tl.dot(a, b, sums, input_precision=PRECISION)
        if BIAS:
            sums += tl.load(bias + output, mask=output < N, other=0.0).to(tl.float32)[None, :]
        to = out + row.to(tl.int64)[:, None] * out_stride + output[None, :]
        inside = (row < M)[:, None] & (output < N)[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


Tiles = tuple[Tile, ...]

_HALF: dict[str, Tiles] = {
    "hopper": (
        Tile(128, 256, 64, 8, 3, True), Tile(128, 128, 64, 8, 4, True), Tile(64, 128, 64, 4, 5, True),
        Tile(64, 64, 128, 4, 4, True), Tile(64, 32, 128, 4, 5, True), Tile(64, 16, 256, 4, 4, True),
        Tile(16, 64, 128, 4, 4), Tile(16, 32, 256, 4, 4), Tile(16, 16, 256, 4, 4),
    ),
    # Tiles of 64 rows and more use other instructions than smaller tiles, and their bits have not been compared.
    "blackwell": (Tile(128, 128, 64, 4, 4, True), Tile(128, 64, 64, 4, 4, True), Tile(128, 32, 128, 4, 4, True)),
    # Products with less than 32 rows or outputs have other instructions.
    "amd": (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(32, 32, 64, 4, 2)),
    "": (
        Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4), Tile(16, 64, 128, 4, 3),
        Tile(16, 32, 128, 4, 4),
    ),
}  # fmt: skip
"""Tiles of 16-bit operands by family, "" for the others, from large to small. Those of `hopper` were the fastest on an
H100 among some twenty; the others were compiled, not timed."""
_SINGLE: dict[str, Tiles] = {
    "hopper": (
        Tile(128, 128, 32, 8, 3, True), Tile(128, 64, 32, 8, 3, True), Tile(64, 64, 32, 4, 3, True),
        Tile(64, 32, 32, 4, 4, True), Tile(64, 16, 32, 4, 6, True), Tile(16, 32, 32, 4, 4),
    ),
    "blackwell": (Tile(128, 128, 32, 8, 2), Tile(128, 32, 32, 4, 2)),
    "amd": (Tile(64, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
    "": (Tile(64, 64, 32, 4, 2), Tile(16, 32, 32, 4, 3)),
}  # fmt: skip
"""The same of fp32. All tiles of a family have one BK: the three products of tf32 are added a block at a time."""


def tile(itemsize: int, rows: int, outputs: int, name: str, processors: int) -> Tile:
    """The largest tile with work for seven in ten processors, not much taller than the rows are; else the smallest.

    Args:
        itemsize: bytes of an element.
        rows, outputs: M and N.
        name: a family of `keyspan.backends.triton.config`.
    """
    table = _HALF if itemsize == 2 else _SINGLE
    tiles = table.get(name, table[""])
    tallest = 16 if rows <= 16 else max(64, triton.next_power_of_2(rows))
    fitting = [t for t in tiles if tallest >= t.BM] or [t for t in tiles if t.BM == tiles[-1].BM]
    counts = ((t, triton.cdiv(rows, t.BM) * triton.cdiv(outputs, t.BN)) for t in fitting)
    return next((t for t, count in counts if 10 * count >= 7 * processors), fitting[-1])


_GROUP = 8
"""Tiles below one another that programs take together."""


def run(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile) -> None:
    """Launch a kernel. All launches go through here, so that tests can compile for another GPU."""
    kernel[grid](*args, num_warps=tile.warps, num_stages=tile.stages)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, see above.

    Args:
        x: [M, K] of fp32, bf16 or fp16; weight: [N, K]; bias: [N] or None, of one dtype.
        out: [M, N] of that dtype, each row in one piece; None makes it.
    """
    (M, K), N = x.shape, len(weight)
    out = x.new_empty((M, N)) if out is None else out
    if not out.numel():
        return out
    if K % 16:  # none of a model's sizes
        x, weight = (F.pad(t, (0, -K % 16)) for t in (x, weight))
        K = x.shape[1]
    x, weight = (t if _aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in (x, weight))
    name, processors = _device(x)
    chosen = tile(x.element_size(), M, N, name, processors)
    operands: tuple[Any, Any] = (x, weight)
    if chosen.described:
        operands = (
            TensorDescriptor(x, [M, K], [x.stride(0), 1], [chosen.BM, chosen.BK]),
            TensorDescriptor(weight, [N, K], [weight.stride(0), 1], [chosen.BN, chosen.BK]),
        )
    tiles = triton.cdiv(M, chosen.BM) * triton.cdiv(N, chosen.BN)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        run(
            product_kernel, (min(tiles, processors) if chosen.described else tiles,), *operands,
            None if bias is None else bias.contiguous(), out, M, N, K, x.stride(0), weight.stride(0), out.stride(0),
            chosen.BM, chosen.BN, chosen.BK, _GROUP, chosen.described, bias is not None, _precision(), tile=chosen,
        )  # fmt: skip
    return out


def _aligned(x: Tensor) -> bool:
    """Whether rows of a matrix lie apart and begin at multiples of 16 bytes, as TMA reads them."""
    stride, one = x.stride()
    return one == 1 and stride >= x.shape[1] and (x.data_ptr() | stride * x.element_size()) % 16 == 0


def _precision() -> str:
    """How fp32 is multiplied: as in attention by three products of tf32, which comes to nearly fp32."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _device(x: Tensor) -> tuple[str, int]:
    """Family and number of processors."""
    return _device_of(x.device.index) if x.is_cuda else ("small", 4)


@functools.cache
def _device_of(index: int) -> tuple[str, int]:
    return (
        family(torch.cuda.get_device_capability(index), torch.version.hip is not None),
        torch.cuda.get_device_properties(index).multi_processor_count,
    )
