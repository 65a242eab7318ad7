"""xFormers' attention functions: layouts, lse, biases, gradients, low-level forms, merging, operator classes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from xformers_definitions import dense_attention, leaves, random

from keyspan.ops import fmha
from keyspan.ops.fmha import attn_bias as masks
from keyspan.ops.fmha import merge_training

mea = fmha.memory_efficient_attention
exact = {"rtol": 1e-11, "atol": 1e-12}
TRIANGLE = masks.LowerTriangularMask()


def everything(M: int, N: int) -> torch.Tensor:
    return torch.ones(M, N, dtype=torch.bool)


# Layouts, and lse in each.


def test_one_head_without_a_head_dimension():
    q, k, v, bias = random(2, 3, 4), random(2, 5, 4), random(2, 5, 6), random(2, 3, 5)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    want, want_lse = dense_attention(q[:, :, None], k[:, :, None], v[:, :, None], everything(3, 5), bias[:, None])
    torch.testing.assert_close(out, want[:, :, 0], **exact)
    torch.testing.assert_close(lse, want_lse, **exact)
    assert lse.shape == (2, 1, 3)


def test_groups_forward_backward_and_lse():
    q, k, v = random(2, 3, 2, 4, 5), random(2, 6, 2, 1, 5), random(2, 6, 2, 1, 7)
    inputs = leaves(q, k, v)
    # Users of xFormers expand the keys; here that has gradients too.
    expanded = inputs[0], inputs[1].expand(-1, -1, -1, 4, -1), inputs[2].expand(-1, -1, -1, 4, -1)
    out = mea(*expanded, TRIANGLE)
    dense_in = leaves(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0])
    want, want_lse = dense_attention(*dense_in, everything(3, 6).tril())
    torch.testing.assert_close(out.flatten(2, 3), want, **exact)
    cotangent = random(2, 3, 8, 7)
    grads = torch.autograd.grad(out.flatten(2, 3), inputs, cotangent)
    for grad, expected in zip(grads, torch.autograd.grad(want, dense_in, cotangent), strict=True):
        torch.testing.assert_close(grad.reshape(expected.shape), expected, **exact)
    lse = fmha.memory_efficient_attention_forward_requires_grad(*expanded, TRIANGLE)[1]
    assert lse.shape == (2, 2, 4, 3)
    torch.testing.assert_close(lse.flatten(1, 2), want_lse, **exact)


def test_heads_are_shared_without_expand():
    q, k, v = random(1, 4, 6, 3), random(1, 4, 2, 3), random(1, 4, 2, 3)
    shared_in, expanded_in = leaves(q, k, v), leaves(q, k, v)
    got = mea(*shared_in)
    want = mea(expanded_in[0], *(x.repeat_interleave(3, 2) for x in expanded_in[1:]))
    torch.testing.assert_close(got, want, **exact)
    for a, b in zip(
        torch.autograd.grad(got.sum(), shared_in), torch.autograd.grad(want.sum(), expanded_in), strict=True
    ):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize(
    "shapes", [((6, 1), (6, 6)), ((6, 2), (6, 1)), ((2, 3), (1, 1), (1, 1)), ((2, 3), (1, 3), (2, 1))]
)
def test_one_key_head_is_broadcast(shapes):
    """Key and value may differ in their number of heads; for 5-D queries groups broadcast as well as heads."""
    query, *others = shapes if len(shapes) == 3 else ((6,), *((h,) for h in shapes[0]))
    key, value = others if len(shapes) == 3 else [(h,) for h in shapes[1]]
    q, k, v = random(1, 4, *query, 3), random(1, 5, *key, 3), random(1, 5, *value, 2)
    shared_in, expanded_in = leaves(q, k, v), leaves(q, k, v)
    got = mea(*shared_in)
    want = mea(expanded_in[0], *(x.expand(*x.shape[:2], *query, -1).clone() for x in expanded_in[1:]))
    torch.testing.assert_close(got, want, **exact)
    cotangent = torch.randn_like(got)
    grads = (torch.autograd.grad(out, ins, cotangent) for out, ins in ((got, shared_in), (want, expanded_in)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("op", [fmha.flash.FwOp, fmha.cutlass.FwOp])
def test_packed_masks_on_a_batch(op):
    mask = masks.BlockDiagonalMask.from_seqlens([2, 1, 2]).make_causal()
    (x,) = leaves(random(3, 5, 2, 4))  # as many entries as sequences: lse must not be taken for CUTLASS's form
    got = mea(x, x, x, mask)
    for b in range(3):
        torch.testing.assert_close(got[b : b + 1], mea(x[b : b + 1], x[b : b + 1], x[b : b + 1], mask), **exact)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(x, x, x, mask, op=op)
    grad = torch.randn_like(out)
    low = fmha.memory_efficient_attention_backward(grad, out, lse, x, x, x, mask)
    torch.testing.assert_close(sum(low), torch.autograd.grad(got, x, grad)[0], **exact)


def test_scale_and_positional_order():
    q, k, v = random(1, 3, 1, 4), random(1, 3, 1, 4), random(1, 3, 1, 4)
    want, _ = dense_attention(q, k, v, everything(3, 3).tril(), scale=0.3)
    torch.testing.assert_close(mea(q, k, v, TRIANGLE, 0.0, 0.3), want, **exact)
    for scale in (np.float64(0.3), torch.tensor(0.3, dtype=torch.float64)):
        assert torch.equal(mea(q, k, v, TRIANGLE, 0.0, scale), mea(q, k, v, TRIANGLE, 0.0, 0.3))


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 0, 5), (1, 3, 0)])
def test_empty(shape):
    B, M, N = shape
    q, k, v = leaves(random(B, M, 2, 4), random(B, N, 2, 4), random(B, N, 2, 4))
    out = mea(q, k, v)
    assert out.shape == (B, M, 2, 4)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))
    assert bool((fmha.memory_efficient_attention_forward_requires_grad(q, k, v)[1] == -torch.inf).all())


# Tensor biases.


def forms_of_a_bias() -> dict[str, torch.Tensor]:
    odd = random(2, 3, 4, 7)
    return {
        "full": odd,
        "heads shared": random(2, 1, 4, 7),
        "batch shared": random(1, 3, 4, 7),
        "matrix": random(4, 7),
        "keys": random(2, 1, 1, 7),
        "expanded": random(2, 1, 1, 7).expand(2, 3, 4, 7),
        "transposed": odd.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": random(2, 3, 5, 20)[:, :, 1:, 2:16:2],
    }


@pytest.mark.parametrize("form", forms_of_a_bias())
def test_any_bias_and_its_gradient(form):
    torch.manual_seed(3)
    bias = forms_of_a_bias()[form]
    q, k, v = random(2, 4, 3, 5), random(2, 7, 3, 5), random(2, 7, 3, 5)
    got_bias = nn.Parameter(bias) if form == "full" else bias.detach().requires_grad_()
    (want_bias,) = leaves(bias)
    got, want = mea(q, k, v, got_bias), dense_attention(q, k, v, everything(4, 7), want_bias)[0]
    torch.testing.assert_close(got, want, **exact)
    # Only the bias requires a gradient.
    cotangent = torch.randn_like(want)
    (grad,) = torch.autograd.grad(got, got_bias, cotangent)
    (expected,) = torch.autograd.grad(want, want_bias, cotangent)
    assert grad.shape == bias.shape
    torch.testing.assert_close(grad, expected, **exact)


def test_a_bias_of_minus_infinity_masks_keys_and_whole_rows():
    q, k, v, bias = random(1, 3, 1, 4), random(1, 5, 1, 4), random(1, 5, 1, 4), torch.zeros(3, 5).double()
    bias[0], bias[1, 2:] = -torch.inf, -torch.inf
    inputs = leaves(q, k, v)
    out = mea(*inputs, bias)
    torch.testing.assert_close(out, dense_attention(q, k, v, bias == 0)[0], **exact)
    assert torch.equal(out[0, 0], torch.zeros_like(out[0, 0]))
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_bool_masks_and_padded_keys():
    q, k, v = random(2, 3, 2, 4), random(2, 5, 2, 4), random(2, 5, 2, 4)
    keep = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)[:, None, None]
    want, _ = dense_attention(q, k, v, keep)
    torch.testing.assert_close(mea(q, k, v, keep), want, **exact)
    torch.testing.assert_close(mea(q, k, v, keep.expand(2, 2, 3, 5)), want, **exact)


def test_a_bias_in_another_dtype():
    q, k, v = (random(1, 4, 2, 8, dtype=torch.float32) for _ in range(3))
    bias = random(2, 4, 4)
    want, _ = dense_attention(q.double(), k.double(), v.double(), everything(4, 4), bias)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(mea(q, k, v, bias.to(dtype)).double(), want, rtol=1e-5, atol=1e-6)


def test_five_dimensional_queries_take_four_dimensional_biases():
    q, k, v = random(2, 3, 2, 3, 4), random(2, 3, 2, 1, 4), random(2, 3, 2, 1, 4)
    bias = random(2, 6, 3, 3)
    want = mea(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0], bias)
    torch.testing.assert_close(mea(q, k, v, bias).flatten(2, 3), want, **exact)
    torch.testing.assert_close(mea(q, k, v, bias.unflatten(1, (2, 3))).flatten(2, 3), want, **exact)
    shared = mea(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0], bias[:, :1])
    torch.testing.assert_close(mea(q, k, v, bias[:, :1]).flatten(2, 3), shared, **exact)


def test_a_users_subclass_is_its_materialized_tensor():
    """A subclass needs `materialize` only, as in xFormers; it may also derive from a mask."""
    (slope,) = leaves(random(1))

    class Distance(masks.AttentionBias):
        def materialize(self, shape, dtype=torch.float32, device="cpu"):
            i, j = (torch.arange(n, device=device, dtype=dtype) for n in shape[-2:])
            return (-slope.to(dtype) * (i[:, None] - j).abs()).expand(shape)

    class CausalDistance(masks.LowerTriangularMask):
        def materialize(self, shape, dtype=torch.float32, device="cpu"):
            return super().materialize(shape, dtype, device) + Distance().materialize(shape, dtype, device)

    distance = (torch.arange(4)[:, None] - torch.arange(6)).abs()
    for mask, visible in ((Distance(), everything(4, 6)), (CausalDistance(), everything(4, 6).tril())):
        for heads in ((), (2,), (2, 3)):
            q, k = random(2, 4, *heads, 5), random(2, 6, *heads, 5)
            got = mea(q, k, k, mask).reshape(2, 4, -1, 5)
            flat = [x.reshape(*x.shape[:2], -1, 5) for x in (q, k, k)]
            want, _ = dense_attention(*flat, visible, -slope * distance)
            torch.testing.assert_close(got, want, **exact)
            (grad,), (expected,) = (torch.autograd.grad(x.square().sum(), slope) for x in (got, want))
            torch.testing.assert_close(grad, expected, **exact)


# dtypes.


def test_autocast_casts_mixed_dtypes():
    q, k, v = (random(1, 5, 2, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = mea(q.bfloat16(), k.bfloat16(), v)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, mea(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    with pytest.raises(ValueError, match=r"value: got torch\.float32, want torch\.bfloat16"):
        mea(q.bfloat16(), k.bfloat16(), v)


def test_output_dtype_with_gradients():
    inputs = leaves(*(random(1, 5, 2, 8, dtype=torch.float16) for _ in range(3)))
    out = mea(*inputs, output_dtype=torch.float32)
    assert out.dtype == torch.float32
    want, _ = dense_attention(*(x.detach().double() for x in inputs), everything(5, 5))
    # Every backend multiplies fp16 as fp32; rounding the output to fp16 would cost 2^-11.
    assert float((out.detach().double() - want).abs().max()) < 1e-5
    out.sum().backward()
    assert all(x.grad.dtype == torch.float16 for x in inputs)


# Dropout.


def test_dropout_scales_the_kept_weights():
    torch.manual_seed(0)
    M, N, p = 64, 64, 0.25
    q, k = torch.zeros(1, M, 1, 4), torch.zeros(1, N, 1, 4)
    out = mea(q, k, torch.eye(N)[None, :, None], p=p)[0, :, 0]
    # With equal scores the output is the weight matrix itself: 0 or 1 / (N · (1 − p)).
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (N * (1 - p))))
    deviation = math.sqrt(p * (1 - p) / (M * N))
    assert abs(float((~kept).float().mean()) - p) < 5 * deviation
    torch.manual_seed(0)
    assert torch.equal(out, mea(q, k, torch.eye(N)[None, :, None], p=p)[0, :, 0])


def test_low_level_dropout_drops_the_same_backward():
    q, k, v, grad = random(1, 6, 2, 4), random(1, 6, 2, 4), random(1, 6, 2, 4), random(1, 6, 2, 4)
    inputs = leaves(q, k, v)
    torch.manual_seed(5)
    want = mea(*inputs, TRIANGLE, 0.4)
    torch.manual_seed(5)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, TRIANGLE, 0.4)
    assert torch.equal(out, want.detach())
    got = fmha.memory_efficient_attention_backward(grad, out, lse, q, k, v, TRIANGLE, 0.4)
    for a, b in zip(got, torch.autograd.grad(want, inputs, grad), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="dropout seed"):
        fmha.memory_efficient_attention_backward(grad, out, lse.clone(), q, k, v, TRIANGLE, 0.4)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_p_must_be_a_probability(p):
    x = random(1, 2, 1, 2)
    with pytest.raises(ValueError, match=r"p: got"):
        mea(x, x, x, p=p)
    with pytest.raises(ValueError, match=r"p: got"):
        fmha.memory_efficient_attention_backward(x, x, x[..., 0], x, x, x, p=p)


def test_p_of_one_gives_zeros():
    """p = 1: as in torch's dropout the output is 0, even for values of NaN or inf, and lse is unchanged."""
    q, k, v = leaves(random(1, 3, 2, 4), random(1, 3, 2, 4), random(1, 3, 2, 4).fill_(math.nan))
    out = mea(q, k, v, TRIANGLE, 1.0)
    assert torch.equal(out, torch.zeros_like(out))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in grads)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, TRIANGLE, 1.0)
    assert torch.equal(lse, fmha.memory_efficient_attention_forward_requires_grad(q, k, k, TRIANGLE)[1])
    low = fmha.memory_efficient_attention_backward(torch.ones_like(out), out, lse, q, k, v, TRIANGLE, 1.0)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in low)


def test_checks_and_backward_draw_no_random_numbers():
    x = random(1, 3, 2, 4)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(x, x, x, p=0.3)
    state = torch.get_rng_state()
    assert fmha.flash.FwOp.supports(fmha.Inputs(x, x, x, p=0.3))
    fmha.memory_efficient_attention_backward(x, out, lse, x, x, x, p=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    mea(x, x, x, p=0.3)
    assert not torch.equal(torch.get_rng_state(), state)


# The low-level forms.


@pytest.mark.parametrize("layout", ["BMK", "BMHK", "BMGHK"])
def test_backward_from_given_output_and_lse(layout):
    heads = {"BMK": (), "BMHK": (2,), "BMGHK": (2, 3)}[layout]
    q, k, v = random(2, 4, *heads, 5), random(2, 6, *heads, 5), random(2, 6, *heads, 7)
    inputs = leaves(q, k, v)
    want = mea(*inputs, masks.LowerTriangularFromBottomRightMask())
    grad = torch.randn_like(want)
    mask = masks.LowerTriangularFromBottomRightMask()
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask, op=fmha.flash.FwOp)
    assert not out.requires_grad
    assert not fmha.memory_efficient_attention_forward(*inputs, mask).requires_grad
    got = fmha.memory_efficient_attention_backward(grad, out, lse, q, k, v, mask, op=fmha.flash.BwOp)
    for a, b in zip(got, torch.autograd.grad(want, inputs, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_cutlass_pads_lse_and_accepts_it_in_backward(grouped, biased):
    heads = (2, 2) if grouped else (2,)
    mask = masks.BlockDiagonalMask.from_seqlens([2, 0, 40])
    if biased:
        mask = mask.add_bias(random(42)).add_bias(torch.rand(42, 42) < 0.9)
    q, k, v, grad = (random(1, 42, *heads, 4) for _ in range(4))
    out, packed = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    same, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask, op=fmha.cutlass.FwOp)
    assert packed.shape == (1, *heads, 42)
    assert lse.shape == (3, *heads, 64)
    assert torch.equal(out, same)
    assert torch.equal(lse[0, ..., :2], packed[0, ..., :2])
    assert torch.equal(lse[2, ..., :40], packed[0, ..., 2:])
    assert bool((lse[1] == torch.inf).all())
    assert bool((lse[2, ..., 40:] == torch.inf).all())
    for a, b in zip(
        fmha.memory_efficient_attention_backward(grad, out, lse, q, k, v, mask, op=fmha.cutlass.BwOp),
        fmha.memory_efficient_attention_backward(grad, out, packed, q, k, v, mask, op=fmha.flash.BwOp),
        strict=True,
    ):
        assert torch.equal(a, b)


# Partial attention and merging.


def parts_of(q, k, v, cuts, **more):
    edges = [0, *cuts, k.shape[1]]
    return [
        fmha.memory_efficient_attention_partial(q, k[:, a:b], v[:, a:b], **more) for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("heads", [(2,), (2, 3)])
@pytest.mark.parametrize("stacked", [False, True])
def test_merge_is_attention_over_all_keys_with_gradients(heads, stacked):
    q, k, v = random(2, 4, *heads, 5), random(2, 9, *heads, 5), random(2, 9, *heads, 3)
    got_in, want_in = leaves(q, k, v), leaves(q, k, v)
    attn, lse = zip(*parts_of(*got_in, [3, 4]), strict=True)
    got, got_lse = fmha.merge_attentions(
        *((torch.stack(attn), torch.stack(lse)) if stacked else (list(attn), list(lse)))
    )
    want = mea(*want_in)
    torch.testing.assert_close(got, want, **exact)
    torch.testing.assert_close(got_lse, fmha.memory_efficient_attention_forward_requires_grad(q, k, v)[1], **exact)
    cotangent = torch.randn_like(want)
    grads = torch.autograd.grad(got, got_in, cotangent)
    for a, b in zip(grads, torch.autograd.grad(want, want_in, cotangent), strict=True):
        torch.testing.assert_close(a, b, **exact)


def test_merge_ignores_empty_parts():
    q, k, v = random(1, 3, 2, 4), random(1, 3, 2, 4), random(1, 3, 2, 4)
    out, lse = fmha.memory_efficient_attention_partial(q, k, v)
    nothing, never = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    merged, merged_lse = fmha.merge_attentions([nothing, out], [never, lse])
    assert torch.equal(merged, out)
    torch.testing.assert_close(merged_lse, lse, **exact)
    merged, merged_lse = fmha.merge_attentions([nothing, nothing], [never, never])
    assert torch.equal(merged, torch.zeros_like(out))
    assert torch.equal(merged_lse, never)


def test_dtypes_of_partial_and_merge():
    q, k, v = (random(1, 4, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    partial = fmha.memory_efficient_attention_partial
    assert partial(q, k, v)[0].dtype == torch.bfloat16
    assert partial(q, k, v, op=(fmha.flash.FwOp, None))[0].dtype == torch.bfloat16
    assert partial(q, k, v, op=fmha.triton_splitk.FwOp)[0].dtype == torch.float32
    assert partial(q, k, v, output_dtype=torch.float32)[0].dtype == torch.float32
    assert partial(q, k, v)[1].dtype == torch.float32
    attn, lse = zip(*parts_of(q, k, v, [2]), strict=True)
    assert fmha.merge_attentions(attn, lse)[0].dtype == torch.bfloat16
    out, none = fmha.merge_attentions(attn, lse, write_lse=False, output_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert none is None
    with pytest.raises(ValueError, match="lse_split: got 1 parts, want 2"):
        fmha.merge_attentions(attn, lse[:1])
    with pytest.raises(ValueError, match="attn_split: No partials"):
        fmha.merge_attentions([], [])


def test_merge_without_a_head_dimension():
    q, k, v = random(2, 4, 5), random(2, 9, 5), random(2, 9, 3)
    attn, lse = zip(*parts_of(q, k, v, [3, 4]), strict=True)
    assert lse[0].shape == (2, 1, 4)
    out, merged = fmha.merge_attentions(attn, lse)
    torch.testing.assert_close(out, mea(q, k, v), **exact)
    torch.testing.assert_close(merged, fmha.memory_efficient_attention_forward_requires_grad(q, k, v)[1], **exact)
    partials = [merge_training.Partial(a, s) for a, s in zip(attn, lse, strict=True)]
    assert torch.equal(merge_training.merge_attentions_autograd(*partials), out)


def test_merge_training():
    q, k, v = random(1, 4, 2, 5), random(1, 6, 2, 5), random(1, 6, 2, 5)
    got_in, want_in = leaves(q, k, v), leaves(q, k, v)
    partial = merge_training.memory_efficient_attention_partial_autograd
    flip = torch.tensor([3, 2, 1, 0])
    first = partial(got_in[0], got_in[1][:, :2], got_in[2][:, :2])
    # Computed with the queries in another order, then permuted back.
    second = partial(got_in[0][:, flip], got_in[1][:, 2:], got_in[2][:, 2:]).apply(lambda x: x[:, flip])
    assert not first.is_bmghk()
    got, want = merge_training.merge_attentions_autograd(first, second), mea(*want_in)
    torch.testing.assert_close(got, want, **exact)
    cotangent = torch.randn_like(want)
    grads = torch.autograd.grad(got, got_in, cotangent)
    for a, b in zip(grads, torch.autograd.grad(want, want_in, cotangent), strict=True):
        torch.testing.assert_close(a, b, **exact)
    wide = partial(*(x.detach().bfloat16() for x in got_in), op=(fmha.triton_splitk.FwOp, None))
    assert wide._attn.dtype == torch.float32
    with pytest.raises(ValueError, match="No partials to merge"):
        merge_training.merge_attentions_autograd()


# Operator classes and the objects around them.


@pytest.mark.parametrize("op", [*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS], ids=lambda op: op.NAME)
def test_operators_are_hints(op):
    x = random(1, 3, 2, 4)
    good, bad = fmha.Inputs(x, x, x, TRIANGLE), fmha.Inputs(x, x[:, :2], x, TRIANGLE)
    assert op.is_available()
    assert op.supports(good)
    assert op.not_supported_reasons(good) == []
    assert not op.supports(bad)
    assert "value: got 3 keys, want 2" in op.not_supported_reasons(bad)[0]
    assert op.shape_not_supported_reasons(3, 3, 4, 4) == []
    assert fmha._OPS_LOOKUP[op.NAME] is op


def test_operators_compute_when_applied():
    x, grad = random(1, 3, 2, 4), random(1, 3, 2, 4)
    inputs = fmha.Inputs(x, x, x, TRIANGLE)
    out, context = fmha.flash.FwOp.apply(inputs, needs_gradient=True)
    assert torch.equal(out, mea(x, x, x, TRIANGLE))
    assert fmha.flash.FwOp.apply(inputs, needs_gradient=False)[1] is None
    grads = fmha.flash.BwOp.apply(context, inputs, grad)
    want = fmha.memory_efficient_attention_backward(grad, out, context.lse, x, x, x, TRIANGLE)
    assert all(torch.equal(a, b) for a, b in zip((grads.dq, grads.dk, grads.dv), want, strict=True))
    assert grads.db is None


def test_cutlass_pads_lse_when_applied_too():
    mask, x = masks.BlockDiagonalMask.from_seqlens([2, 3]), random(1, 5, 2, 4)
    inputs, grad = fmha.Inputs(x, x, x, mask), random(1, 5, 2, 4)
    context = fmha.cutlass.FwOp.apply(inputs, needs_gradient=True)[1]
    assert context.lse.shape == (2, 2, 32)
    packed = fmha.flash.FwOp.apply(inputs, needs_gradient=True)[1]
    assert torch.equal(
        fmha.cutlass.BwOp.apply(context, inputs, grad).dq, fmha.flash.BwOp.apply(packed, inputs, grad).dq
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_bias_gradient_through_the_backward_operator(wrapped):
    q, k, v, grad = random(2, 3, 2, 4), random(2, 5, 2, 4), random(2, 5, 2, 4), random(2, 3, 2, 4)
    (bias,) = leaves(random(2, 1, 5))
    attn_bias = masks.LowerTriangularMaskWithTensorBias(bias) if wrapped else bias
    inputs = fmha.Inputs(q, k, v, attn_bias)
    context = fmha.cutlass.FwOp.apply(inputs, needs_gradient=True)[1]
    (want,) = torch.autograd.grad(mea(q, k, v, attn_bias), bias, grad)
    torch.testing.assert_close(fmha.cutlass.BwOp.apply(context, inputs, grad).db, want, **exact)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: mea(x, x, x, op=fmha.flash.FwOp),
        lambda x: mea(x, x, x, op="flash"),
        lambda x: mea(x, x, x, op=(fmha.flash.BwOp, None)),
        lambda x: fmha.memory_efficient_attention_forward(x, x, x, op=fmha.flash.BwOp),
        lambda x: fmha.memory_efficient_attention_forward_requires_grad(x, x, x, op=(fmha.flash.FwOp, None)),
        lambda x: fmha.memory_efficient_attention_backward(x, x, x[..., 0], x, x, x, op=fmha.flash.FwOp),
        lambda x: fmha.memory_efficient_attention_partial(x, x, x, op="flash"),
        lambda x: fmha.memory_efficient_attention_partial(x, x, x, op=(None, fmha.flash.FwOp)),
        lambda x: merge_training.memory_efficient_attention_partial_autograd(x, x, x, op="flash"),
    ],
)
def test_wrong_operators_raise(call):
    with pytest.raises(ValueError, match=r"op: got .*, want None or"):
        call(random(1, 3, 2, 4))


def test_backward_names_the_wrong_argument():
    x = random(1, 4, 2, 3)
    mask = masks.BlockDiagonalMask.from_seqlens([1, 3])
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(x, x, x, mask)
    backward = fmha.memory_efficient_attention_backward
    with pytest.raises(ValueError, match=r"grad: got shape \[1, 3, 2, 3\]"):
        backward(x[:, :3], out, lse, x, x, x, mask)
    with pytest.raises(ValueError, match=r"lse: got shape \[1, 2, 3\]"):
        backward(x, out, lse[..., :3], x, x, x)
    with pytest.raises(ValueError, match="lse: got 3 rows, want 1"):
        backward(x, out, lse.expand(3, -1, -1), x, x, x, mask)


def test_dispatch_returns_an_operator_or_raises_the_reason():
    x = random(1, 3, 2, 4)
    assert fmha.dispatch._dispatch_fw(fmha.Inputs(x, x, x), needs_gradient=True).supports(fmha.Inputs(x, x, x))
    assert not fmha.dispatch._dispatch_bw(fmha.Inputs(x, x, x), varlen_lse_packed=False).VARLEN_LSE_PACKED
    with pytest.raises(NotImplementedError, match="value: got 2 keys, want 3"):
        fmha.dispatch._dispatch_fw(fmha.Inputs(x, x, x[:, :2]), needs_gradient=False)


def test_inputs():
    q, k, v = random(2, 3, 4), random(2, 5, 4), random(2, 5, 6)
    inputs = fmha.Inputs(q, k, v, random(2, 3, 5))
    assert inputs.scale_float == 0.5
    assert inputs.device == q.device
    assert inputs.nbytes == 8 * (24 + 40 + 60)
    assert [tuple(x.shape) for x in inputs.get_qkv_in_bmghk()] == [(2, 3, 1, 1, 4), (2, 5, 1, 1, 4), (2, 5, 1, 1, 6)]
    want = mea(q, k, v, inputs.attn_bias)
    assert inputs.normalize_bmhk() == (2, 3, 6)
    assert inputs.query.shape == (2, 3, 1, 4)
    assert torch.equal(mea(inputs.query, inputs.key, inputs.value, inputs.attn_bias).reshape(2, 3, 6), want)
    assert fmha.Inputs(q, k, v, is_partial=True).get_output_dtype() == torch.float64
    assert fmha.Inputs(q.half(), k.half(), v.half(), is_partial=True).get_output_dtype() == torch.float32
    assert fmha.Inputs(q.half(), k.half(), v.half()).get_output_dtype() == torch.float16


def test_context_pads_lse():
    lse, out = random(1, 2, 5), random(1, 4, 2, 3)
    context = fmha.Context(lse, out)
    padded = context.get_padded_lse(4)
    assert torch.equal(padded[..., :5], lse)
    assert bool((padded[..., 5:] == torch.inf).all())
    assert padded.shape == (1, 2, 8)
    assert torch.equal(context.get_padded_lse(4, force_pad_inf=True), lse[..., :4])
    forced = context.get_padded_lse(5, force_pad_inf=True)
    assert torch.equal(forced[..., :4], lse[..., :4])
    assert bool((forced[..., 4:] == torch.inf).all())


def test_fmha_autograd_function():
    x = random(1, 3, 2, 4)
    assert torch.equal(fmha._fMHA.apply(None, x, x, x, TRIANGLE, 0.0, None), mea(x, x, x, TRIANGLE))
    assert fmha._fMHA.apply(None, x, x, x, TRIANGLE, 0.0, None, torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attn_bias": "causal"}, "attn_bias: got str"),
        ({"attn_bias": torch.zeros(7, 7)}, "^attn_bias: got shape"),
        ({"attn_bias": torch.zeros(7, 7, dtype=torch.bool)}, "^attn_bias: got shape"),
        ({"attn_bias": torch.zeros(7, 7), "p": 0.5}, "^attn_bias: got shape"),
        ({"attn_bias": torch.zeros(3, 3, dtype=torch.int64)}, "^attn_bias: got torch.int64"),
        ({"scale": math.nan}, "^scale: got nan"),
        ({"scale": torch.nn.Parameter(torch.ones(()))}, "^scale: got a tensor that requires a gradient"),
        (
            {"attn_bias": masks.BlockDiagonalMask.from_seqlens([3]).to("meta")},
            "attn_bias: got a mask on meta, want cpu",
        ),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    x = random(1, 3, 2, 4)
    with pytest.raises(ValueError, match=message):
        mea(x, x, x, **kwargs)
    with pytest.raises(ValueError, match="key: got list, want a tensor"):
        mea(x, [1.0], x, TRIANGLE)
    with pytest.raises(
        ValueError, match=r"key: got torch\.int32, want .* keys packed as int4 or fp8 in int32 are left out"
    ):
        mea(x, x.int(), x.int())


def test_shapes_on_the_meta_device():
    q, k = (torch.empty(1, n, 2, 8, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (5, 7))
    packed = masks.BlockDiagonalMask.from_seqlens([2, 3], [3, 4], device="meta")
    for mask in (None, TRIANGLE, packed, packed.add_bias(torch.empty(2, 5, 7, device="meta"))):
        out = mea(q, k, k, mask, output_dtype=torch.float32)
        assert (out.shape, out.dtype, out.device.type) == ((1, 5, 2, 8), torch.float32, "meta")
        assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
    assert fmha.memory_efficient_attention_forward_requires_grad(q, k, k, packed)[1].shape == (1, 2, 5)
    with torch.inference_mode():
        assert mea(q, k, k, packed).shape == q.shape


def test_under_compile():
    mask = masks.BlockDiagonalMask.from_seqlens([3, 4]).make_causal()
    x = leaves(random(1, 7, 2, 8, dtype=torch.float32))[0]

    def step(x):
        return mea(x.sin(), x, x, mask) + mea(x, x, x, TRIANGLE)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    (got,), (want,) = (torch.autograd.grad(f(x).square().sum(), [x]) for f in (compiled, step))
    torch.testing.assert_close(got, want)


def test_merging_under_compile():
    q, k, v = leaves(*(random(1, n, 2, 8, dtype=torch.float32) for n in (3, 8, 8)))

    def step(q, k, v):
        parts = [fmha.memory_efficient_attention_partial(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 5), (5, 8))]
        return fmha.merge_attentions(*map(list, zip(*parts, strict=True)))[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), step(q, k, v))
    torch.testing.assert_close(step(q, k, v), mea(q, k, v))
    grads = [torch.autograd.grad(f(q, k, v).square().sum(), [q, k, v]) for f in (compiled, step)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("setting", "causal", "pairs"),
    [("0", False, 3 * 3 + 4 * 4), ("1", False, 7 * 7), ("0", True, 6 + 10), ("1", True, 7 * 8 // 2)],
)
def test_flops_of_the_worst_case(monkeypatch, setting, causal, pairs):
    """xFormers' switch: FLOPs that do not depend on the lengths, so that all ranks recompute the same."""
    monkeypatch.setenv("XFORMERS_FLOP_FORMULA_WORST_CASE", setting)
    x = random(1, 7, 2, 8)
    with FlopCounterMode(display=False) as counter:
        mask = masks.BlockDiagonalMask.from_seqlens([3, 4])
        mea(x, x, x, mask.make_causal() if causal else mask)
    assert counter.get_total_flops() == 2 * 2 * pairs * (8 + 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: masks.BlockDiagonalMask.from_seqlens(n).make_causal(),
        lambda n: masks.BlockDiagonalMask.from_seqlens(n).make_local_attention(2),
        lambda n: masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(n, 7, n),
        lambda n: masks.BlockDiagonalGappyKeysMask.from_seqlens(n, [0, 1, 14], n),
    ],
)
def test_masks_made_inside_a_compiled_function(make):
    """Without a device, and from lengths that change: compiled once more, for lengths that are symbols."""
    q, k = random(1, 7, 2, 8, dtype=torch.float32), random(1, 14, 2, 8, dtype=torch.float32)

    def step(q, k, lengths):
        mask = make(lengths)
        k = k[:, :7] if isinstance(mask, masks.BlockDiagonalMask) else k
        return mea(q, k, k, mask)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 4], [2, 5], [5, 2], [6, 1]):
        torch.testing.assert_close(compiled(q, k, lengths), step(q, k, lengths))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
