"""Device functions that all Triton kernels share: addresses and loads of queries, keys, values and their scales."""

from __future__ import annotations

import triton
import triton.language as tl

from keyspan.backends.triton.arguments import Scales


@triton.jit
def head_pointer(x, x_b, x_g, x_h, heads):
    """First row of a head; 64-bit offsets, since heads may be far apart."""
    return x + heads.b.to(tl.int64) * x_b + heads.g.to(tl.int64) * x_g + heads.h.to(tl.int64) * x_h


@triton.jit
def query_pointer(a, heads, i):
    """Query row i of a head; i and the head are scalars or [BM]."""
    return head_pointer(a.q, a.q_b, a.q_g, a.q_h, heads) + i.to(tl.int64) * a.q_m


@triton.jit
def gradient_pointer(grad, heads, i):
    """Row i of the output's gradient; i and the head are scalars or [BM]."""
    return head_pointer(grad.pointer, grad.b, grad.g, grad.h, heads) + i.to(tl.int64) * grad.m


@triton.jit
def key_pointer(a, b, g):
    """Key 0 of a batch entry and group."""
    return a.k + b.to(tl.int64) * a.k_b + g.to(tl.int64) * a.k_g


@triton.jit
def value_pointer(a, b, g):
    """Value 0 of a batch entry and group."""
    return a.v + b.to(tl.int64) * a.v_b + g.to(tl.int64) * a.v_g


@triton.jit
def load_tile(base, rows, stride, limit, MASKED: tl.constexpr, D: tl.constexpr, dim: tl.constexpr):
    """[rows, D] from rows of `dim` contiguous elements; 0 beyond `dim` and, where masked, from row `limit` on."""
    columns = tl.arange(0, D)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if MASKED and dim < D:
        x = tl.load(pointers, mask=(rows < limit)[:, None] & (columns < dim)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
    elif dim < D:
        x = tl.load(pointers, mask=(columns < dim)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def physical_slots(a, j, last, C: tl.constexpr):
    """Slots in memory of the logical keys j [BN], int64, read from the block table.

    A block of keys may begin or end outside every sequence, where the table holds anything: pages are clamped.
    """
    page = tl.load(a.block_table + j // C.page, mask=j < last, other=0)
    page = tl.minimum(tl.maximum(page, 0), a.pages - 1)
    return page.to(tl.int64) * C.page + j % C.page


@triton.jit
def load_keys(x, stride, slots, j0, last, MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, dim: tl.constexpr,
              page: tl.constexpr):  # fmt: skip
    """Keys or values j0 … j0 + BN − 1 as [BN, D]; x points at key 0 of the batch entry and group."""
    n = tl.arange(0, BN)
    if page > 0:
        columns = tl.arange(0, D)
        pointers = x + slots[:, None] * stride + columns[None, :]
        if dim < D:
            tile = tl.load(pointers, mask=(j0 + n < last)[:, None] & (columns < dim)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(j0 + n < last)[:, None], other=0.0)
    else:
        tile = load_tile(x + j0.to(tl.int64) * stride, n, stride, last - j0, MASKED, D, dim)
    return tile


@triton.jit
def query_factor(a, heads, i, C: tl.constexpr):
    """The factor of a row's products with stored keys [BM]: the query's scale times the keys' if they share one."""
    factor = tl.full([i.shape[0]], 1.0, tl.float32)
    if a.query_scale is not None:
        at = a.query_scale + heads.b * a.query_scale_b + heads.g * a.query_scale_g + heads.h * a.query_scale_h
        if C.query_run > 0:
            at += i // C.query_run * a.query_scale_c
        factor = tl.load(at).to(tl.float32)
    if a.key_scale is not None and C.key_run == 0:
        factor *= tl.load(a.key_scale + heads.b * a.key_scale_b + heads.g * a.key_scale_g).to(tl.float32)
    return factor


@triton.jit
def rescale_query(q, a, heads, i, C: tl.constexpr):
    """The query [BM, K] as the product with stored keys takes it, and the factor [BM] left to multiply products by.

    The factor is positive, since a row's maximum is taken before it is applied; its sign moves to the query.
    """
    factor = query_factor(a, heads, i, C)
    sign = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, factor))
    wide = q.to(tl.float32) * sign[:, None]
    factor = tl.where(factor == 0, 1.0, tl.abs(factor))
    if q.dtype == tl.bfloat16:
        # fp16 has the bits but not the range: rows are divided by the power of two below their largest element.
        size = (tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        size = tl.where(size == 0, 1.0, size)
        wide = (wide / size[:, None]).to(tl.float16)
        factor *= size
    elif q.dtype == tl.float8e4nv and C.BM < 64:
        # Not every GPU multiplies so few rows in 8 bits.
        wide = wide.to(tl.float16)
    else:
        wide = wide.to(q.dtype)
    return wide, factor


@triton.jit
def load_scales(x, b, g, slots, j, last, run: tl.constexpr, C: tl.constexpr):
    """Scales of keys or values j [BN], 0 from `last` on; `run` keys share one (0: all of them do)."""
    where = (slots if C.page > 0 else j).to(tl.uint64)
    at = x.pointer + b * x.b + g * x.g + (where // run * x.c if run > 0 else where * 0)
    return tl.load(at, mask=j < last, other=0.0).to(tl.float32)


@triton.jit
def key_scales(a, heads, slots, j, last, C: tl.constexpr):
    x = Scales(a.key_scale, a.key_scale_b, a.key_scale_c, a.key_scale_g)
    return load_scales(x, heads.b, heads.g, slots, j, last, C.key_run, C)


@triton.jit
def value_scales(a, heads, slots, j, last, C: tl.constexpr):
    x = Scales(a.value_scale, a.value_scale_b, a.value_scale_c, a.value_scale_g)
    return load_scales(x, heads.b, heads.g, slots, j, last, C.value_run, C)


@triton.jit
def convert_stored(x, q, C: tl.constexpr):
    """Keys or values as the product takes them: 8 bits become fp16, which is exact, or fp32 if the query is fp32.

    Assembly that is marked as having effects is not moved behind the change of layout that follows, where each byte
    would be loaded alone.
    """
    pure: tl.constexpr = C.assembly == "pure"
    if x.dtype.primitive_bitwidth > 8:
        wide = x
    elif q.dtype == tl.float32:
        wide = x.to(tl.float32)
    elif C.assembly == "none":
        wide = x.to(tl.float16)
    elif x.dtype == tl.int8:
        # The last byte of 1024 + 128 + x in fp16 is x with its top bit flipped.
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b32 x, c;
            xor.b32 x, $2, 0x80808080;
            mov.b32 c, 0xE480E480;
            prmt.b32 $0, x, 0x64646464, 0x4140;
            prmt.b32 $1, x, 0x64646464, 0x4342;
            add.rn.f16x2 $0, $0, c;
            add.rn.f16x2 $1, $1, c;
            }""", "=r,=r,r", [x], dtype=tl.float16, is_pure=pure, pack=4)  # fmt: skip
    else:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""", "=r,=r,r", [x], dtype=tl.float16, is_pure=pure, pack=4)  # fmt: skip
    return wide
