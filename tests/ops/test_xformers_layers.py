"""xFormers' small ops: SwiGLU, RMSNorm, rotary embedding into a cache, indexing, stacking, block products, trees."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from xformers_definitions import dense_attention, leaves, random

import keyspan.ops as xops
from keyspan.ops import fmha
from keyspan.ops.fmha import attn_bias as masks
from keyspan.ops.tree_attention import (
    SplitKAutotune,
    TreeAttnMetadata,
    _get_depth_counts,
    _prepare_tree_attn_bias,
    construct_full_tree_choices,
    construct_tree_choices,
    get_full_tree_size,
    select_prefix_op,
    tree_attention,
    use_triton_splitk_for_prefix,
)

exact = {"rtol": 1e-11, "atol": 1e-12}


# SwiGLU.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_swiglu_layer(bias, pack):
    layer = xops.SwiGLU(5, 7, 3, bias, _pack_weights=pack).double()
    names = (["w12", "w3"] if pack else ["w1", "w2", "w3"]) if bias else []
    weights = ["w12.weight", "w3.weight"] if pack else ["w1.weight", "w2.weight", "w3.weight"]
    assert set(layer.state_dict()) == {*weights, *(f"{name}.bias" for name in names)}
    assert (layer.in_features, layer.hidden_features, layer.out_features, layer.op) == (5, 7, 3, None)
    x = random(2, 4, 5).requires_grad_()
    w1, b1, w2, b2, w3, b3 = layer._ordered_params()
    want = F.linear(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2), w3, b3)
    got = layer(x)
    torch.testing.assert_close(got, want, **exact)
    cotangent = torch.randn_like(want)
    wrt = [x, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(got, wrt, cotangent), torch.autograd.grad(want, wrt, cotangent), strict=True):
        torch.testing.assert_close(a, b, **exact)


def test_swiglu_functions_agree():
    layer = xops.SwiGLU(5, 7).double()
    x = random(3, 5)
    assert torch.equal(xops.swiglu(x, *layer._ordered_params()), layer(x))
    assert torch.equal(xops.swiglu_packed(x, *layer._packed_ordered_params()), layer(x))
    w1, _, w2, b2, w3, b3 = layer._ordered_params()
    one_bias = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w2, b2), w3, b3)
    torch.testing.assert_close(xops.swiglu(x, w1, None, w2, b2, w3, b3, op=None), one_bias, **exact)
    with pytest.raises(ValueError, match="w12"):
        xops.SwiGLU(5, 7, _pack_weights=False)._packed_ordered_params()
    with pytest.raises(ValueError, match="w2: got shape"):
        xops.swiglu(x, w1, None, w2[:3], None, w3, None)
    with pytest.raises(ValueError, match="w1w2: got shape"):
        xops.swiglu_packed(x, w1, None, w3, None)


def test_swiglu_op_object():
    layer, x = xops.SwiGLU(5, 7).double(), random(3, 5)
    params = layer._ordered_params()
    chosen = xops.SwiGLUOpDispatch.from_arguments(x, *params)
    assert chosen == xops.SwiGLUOpDispatch(x.device, torch.float64, torch.float64, True, True)
    assert chosen.op.supports(chosen)
    assert torch.equal(chosen.op(x, *params), layer(x))
    assert torch.equal(xops.swiglu(x, *params, op=xops.SwiGLUEagerOp), layer(x))
    assert isinstance(xops.SwiGLUEagerOp, xops.SwiGLUOp)
    apart = xops.SwiGLUOpDispatch.from_arguments(x, params[0].clone(), None, *params[2:])
    assert not apart.packed_weights
    assert not apart.bias_enabled
    with torch.autocast("cpu", torch.bfloat16):
        assert xops.SwiGLUOpDispatch.from_arguments(x, *params).dtype_autocast_gpu == torch.bfloat16


# RMSNorm.


def test_rms_norm_with_gradients():
    norm = xops.RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = random(2, 3, 6).requires_grad_()
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    got = norm(x)
    torch.testing.assert_close(got, want, **exact)
    cotangent = torch.randn_like(want)
    wrt = [x, norm.weight]
    for a, b in zip(torch.autograd.grad(got, wrt, cotangent), torch.autograd.grad(want, wrt, cotangent), strict=True):
        torch.testing.assert_close(a, b, **exact)
    assert list(norm.state_dict()) == ["weight"]


def test_rms_norm_without_weight_and_in_place():
    norm = xops.RMSNorm(6, include_weight=False)
    assert list(norm.parameters()) == []
    x, y = random(2, 6, dtype=torch.float32), random(2, 6, dtype=torch.float32)
    total = x + y
    assert torch.equal(norm.increment_and_forward_(x, y), norm(total))
    assert torch.equal(x, total)


# Rotary embedding into a padded cache.


@pytest.mark.parametrize("adjacents", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_rope_padded(adjacents, grouped):
    """Compared with rotating and storing one token at a time."""
    q_lengths, padding, k_lengths, dim, theta, linear = [2, 1, 0, 3], 6, [5, 1, 2, 6], 4, 100.0, 2.0
    bias = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(q_lengths, padding, k_lengths)
    heads = (2, 3) if grouped else (3,)
    xq, xk, xv = random(1, 6, *heads, dim), random(1, 6, *heads, dim), random(1, 6, *heads, dim)
    # The heads of a group share one head in memory, as in a cache for grouped queries.
    cache = [random(1, 24, *heads[:-1], 1, dim) if grouped else random(1, 24, *heads, dim) for _ in range(2)]
    if grouped:
        xk, xv = (x[..., :1, :].expand(-1, -1, -1, 3, -1) for x in (xk, xv))
    want_k, want_v = (x.clone() for x in cache)
    first = torch.tensor([10, 0, 7, 3])
    want_q = torch.empty_like(xq)
    row = 0

    def turn(x, position):
        half = [(2 * i, 2 * i + 1) if adjacents else (i, i + dim // 2) for i in range(dim // 2)]
        out = torch.empty_like(x)
        for i, (a, b) in enumerate(half):
            angle = position * theta ** (-2 * i / dim) / linear
            out[..., a] = x[..., a] * math.cos(angle) - x[..., b] * math.sin(angle)
            out[..., b] = x[..., a] * math.sin(angle) + x[..., b] * math.cos(angle)
        return out

    for b, (nq, nk) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        for i in range(nq):
            slot = nk - nq + i
            position = slot + int(first[b])
            want_q[0, row] = turn(xq[0, row], position)
            size = want_k.shape[-2]
            want_k[0, b * padding + slot] = turn(xk[0, row], position)[..., :size, :]
            want_v[0, b * padding + slot] = xv[0, row][..., :size, :]
            row += 1
    views = [x.expand(-1, -1, -1, 3, -1) for x in cache] if grouped else cache
    got = xops.rope_padded(
        xq, xk, xv, *views, bias, theta=theta, linear_scale=linear, first_seqpos=first, adjacents=adjacents
    )
    # Cosines are fp32.
    torch.testing.assert_close(got, want_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[0], want_k, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache[1], want_v)

    out_q = torch.empty_like(xq)
    positions = torch.tensor([13, 14, 0, 6, 7, 8])
    same = xops.rope_padded(
        xq, xk, xv, *views, bias, theta=theta, linear_scale=linear, seqpos=positions, adjacents=adjacents, out_q=out_q
    )
    assert same is out_q
    assert torch.equal(out_q, got)


def test_rope_padded_rescales_low_frequencies_as_llama():
    bias = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1], 1, [1])
    dim, theta, context, factor, low, high = 16, 10000.0, 64.0, 8.0, 1.0, 4.0
    x = torch.zeros(1, 1, 1, dim)
    x[..., 0::2] = 1
    got = xops.rope_padded(
        x, x.clone(), x.clone(), x.clone(), x.clone(), bias, theta=theta, use_dynamic_scaling=True,
        dynamic_old_context_len=context, dynamic_scale_factor=factor, dynamic_low_freq_factor=low,
        dynamic_high_freq_factor=high, seqpos=torch.tensor([3]),
    )  # fmt: skip
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > context / low:
            frequency /= factor
        elif wavelength > context / high:
            smooth = (context / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        angle = torch.atan2(got[0, 0, 0, 2 * i + 1], got[0, 0, 0, 2 * i])
        assert float(angle) == pytest.approx(math.remainder(3 * frequency, 2 * math.pi), abs=1e-6)


def test_rope_padded_of_fp64_is_fp64():
    bias = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1], 8, [8])
    x, cache = random(1, 1, 2, 4), random(1, 8, 2, 4)
    got = xops.rope_padded(x, x, x, cache, cache.clone(), bias, adjacents=False)
    angle = 7 * torch.tensor([1.0, 0.01], dtype=torch.float64)
    a, b = x.chunk(2, -1)
    want = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    torch.testing.assert_close(got, want, **exact)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"first_seqpos": torch.zeros(1), "seqpos": torch.zeros(1)}, "seqpos"),
        ({"internal_dtype": "f16"}, "internal_dtype"),
    ],
)
def test_rope_padded_errors_name_the_argument(more, message):
    bias = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1], 1, [1])
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match=message):
        xops.rope_padded(x, x, x, x, x, bias, **more)
    with pytest.raises(ValueError, match="xq: got shape"):
        xops.rope_padded(x[0], x, x, x, x, bias)
    with pytest.raises(ValueError, match="attn_bias: got LowerTriangularMask"):
        xops.rope_padded(x, x, x, x, x, masks.LowerTriangularMask())


# Indexing and stacking.


def test_index_select_cat():
    sources = leaves(random(4, 3), random(5, 2))
    indices = [torch.tensor([2, 0]), torch.tensor([4])]
    got = xops.index_select_cat(sources, indices)
    assert torch.equal(got, torch.cat([sources[0][[2, 0]].flatten(), sources[1][4]]))
    got.sum().backward()
    assert sources[0].grad.sum(1).tolist() == [3, 0, 3, 0]
    assert sources[1].grad.sum(1).tolist() == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("scaled", [True, False])
def test_scaled_index_add(scaled):
    x, source, scaling = leaves(random(4, 2, 3), random(2, 2, 3), random(3))
    index, alpha = torch.tensor([3, 1]), 0.5
    base = x * 1
    got = xops.scaled_index_add(base, index, source, scaling if scaled else None, alpha)
    assert got is base
    want = x.clone()
    for row, i in enumerate(index.tolist()):
        want = want + alpha * F.one_hot(torch.tensor(i), 4)[:, None, None] * source[row] * (scaling if scaled else 1)
    torch.testing.assert_close(got, want, **exact)
    wrt = [x, source, scaling] if scaled else [x, source]
    cotangent = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, wrt, cotangent), torch.autograd.grad(want, wrt, cotangent), strict=True):
        torch.testing.assert_close(a, b, **exact)
    with pytest.raises(ValueError, match="source: got shape"):
        xops.scaled_index_add(x.detach(), index, source[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_index_add_rounds_once(dtype):
    x, source, scaling = (random(*shape).to(dtype) for shape in ((4, 2, 64), (2, 2, 64), (64,)))
    index, alpha = torch.tensor([3, 1]), 0.3
    want = x.double().index_add(0, index, source.double() * scaling.double(), alpha=alpha)
    got = xops.scaled_index_add(x.clone(), index, source, scaling, alpha).double()
    # The sum is in fp32, so only the result is rounded: to within half a unit in the last place and fp32's error.
    half = torch.finfo(dtype).eps / 2 * (1 + 1e-3)
    assert ((got - want).abs() <= half * want.abs() + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_stacking_unbound_parts_is_a_view(dim):
    x = random(3, 4, 5)
    parts = xops.unbind(x, dim)
    stacked = xops.stack_or_none(parts, dim)
    assert torch.equal(stacked, x)
    assert stacked.data_ptr() == x.data_ptr()
    assert xops.get_stack_strides(parts, dim) == x.stride()
    # Stacked along another dimension it still is a view of the same memory.
    assert torch.equal(xops.stack_or_none(parts, 0), torch.stack(parts, 0))
    assert torch.equal(xops.stack_or_none(parts, -1), torch.stack(parts, -1))
    assert xops.stack_or_none([part.clone() for part in parts], dim) is None
    assert xops.get_stack_strides([parts[0], parts[2], parts[1]], dim) is None


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_a_stacked_view_has_gradients_for_all_parts(dim):
    (x,) = leaves(random(3, 4, 5))
    cotangent = random(3, 4, 5).movedim(1, dim)
    stacked = xops.stack_or_none(xops.unbind(x * 2, 1), dim)
    assert stacked.shape == cotangent.shape
    (grad,) = torch.autograd.grad(stacked, x, cotangent)
    torch.testing.assert_close(grad, 2 * cotangent.movedim(dim, 1), **exact)


def test_tiled_and_masked_matmul():
    a = [[random(2, 3), random(2, 4)], [random(5, 3), random(5, 4)]]
    b = [[random(3, 6)], [random(4, 6)]]
    got = xops.tiled_matmul(a, b)
    want = torch.cat([torch.cat(row, 1) for row in a]) @ torch.cat([row[0] for row in b])
    torch.testing.assert_close(torch.cat([row[0] for row in got]), want, **exact)
    with pytest.raises(ValueError, match="a: got rows"):
        xops.tiled_matmul(a, b[:1])
    x, y = random(2, 3), random(3, 2)
    keep = torch.tensor([[True, False], [True, True]])
    assert torch.equal(xops.masked_matmul(x, y), x @ y)
    assert torch.equal(xops.masked_matmul(x, y, keep), (x @ y).masked_fill(~keep, -torch.inf))
    assert torch.equal(xops.masked_matmul(x, y, torch.ones(2, 2)), x @ y + 1)


# Trees.


def test_tree_metadata_of_the_documented_example():
    choices = construct_full_tree_choices(2, 3)
    assert sorted(choices) == sorted(
        (*range_,) for range_ in [(i,) for i in range(3)] + [(i, j) for i in range(3) for j in range(3)]
    )
    tree = TreeAttnMetadata.from_tree_choices(choices)
    assert tree.tree_indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5, 6]
    paths = {tuple(row) for row in tree.retrieval_indices.tolist()}
    assert paths == {
        (0, 1, 4),
        (0, 1, 5),
        (0, 1, 6),
        (0, 2, 7),
        (0, 2, 8),
        (0, 2, 9),
        (0, 3, 10),
        (0, 3, 11),
        (0, 3, 12),
    }
    assert tree.path_lengths == [3] * 9
    assert tree.tree_seq_position_ids.tolist() == [0, *[1] * 3, *[2] * 9]
    assert tree.parent_node_indices.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert tree.child_node_indices[:2].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tree.child_node_indices[4:].tolist() == [[0, 0, 0]] * 9
    assert tree.num_children_per_node.tolist() == [3, 3, 3, 3, *[0] * 9]
    assert tree.candidate_idx.tolist() == [0, 1, 2] * 4
    assert tree.num_nodes_per_level.tolist() == [1, 3, 9]
    assert [row.tolist() for row in tree.num_children_per_node_at_level] == [[3], [3, 3, 3], [0] * 9]
    assert tree.subtree_sizes == [1, 4, 13]
    counts = _get_depth_counts(tree.tree_choices)
    assert counts == [3, 9]
    bias = _prepare_tree_attn_bias(tree.tree_choices, counts, torch.float32, None)
    assert torch.equal(bias, tree.attention_bias)
    visible = {(i, j) for i, j in (tree.attention_bias == 0).nonzero().tolist()}
    assert visible == {(path[n], path[m]) for path in paths for n in range(3) for m in range(n + 1)}


def test_tree_metadata_of_an_uneven_tree():
    tree = TreeAttnMetadata.from_tree_choices_cached(((1,), (0,), (0, 2), (0, 0)), torch.float64)
    assert tree.tree_choices == [(0,), (1,), (0, 0), (0, 2)]
    assert tree.tree_indices.tolist() == [0, 1, 2, 3, 5]
    assert sorted(tree.retrieval_indices.tolist()) == [[0, 1, 3], [0, 1, 4], [0, 2, -1]]
    assert sorted(tree.path_lengths) == [2, 3, 3]
    assert tree.child_node_indices.tolist() == [[0, 1], [2, 3], [0, 0], [0, 0], [0, 0]]
    assert tree.attention_bias.dtype == torch.float64
    with pytest.raises(ValueError, match="without its parent"):
        TreeAttnMetadata.from_tree_choices([(0, 1)])
    root = TreeAttnMetadata.from_tree_choices([])
    assert root.attention_bias.tolist() == [[0]]
    assert root.retrieval_indices.tolist() == [[0]]
    assert construct_tree_choices([2, 1]) == [(0,), (1,), (0, 0), (1, 0)]
    assert get_full_tree_size(3, 2) == 7
    assert SplitKAutotune.AUTOTUNE
    assert select_prefix_op(1, 1, 8, True, masks.LowerTriangularMask(), torch.float32) is None
    assert not use_triton_splitk_for_prefix(1, 1, 8)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("paged", [True, False])
def test_tree_attention(grouped, paged):
    """Every node attends to the prefix and its ancestors: compared with the dense formula, one sequence at a time."""
    tree = TreeAttnMetadata.from_tree_choices([(0,), (1,), (0, 0)], torch.float64)
    B, T, N, lengths = 2, 4, 6, [5, 3]
    heads, kv = ((2, 3), (2, 1)) if grouped else ((3,), (3,))
    q, spec_k, spec_v = random(B, T, *heads, 4), random(B, T, *kv, 4), random(B, T, *kv, 4)
    cache_k, cache_v = random(B, N, *kv, 4), random(B, N, *kv, 4)
    prefix = masks.BlockDiagonalPaddedKeysMask.from_seqlens([T] * B, N, lengths)
    caches = cache_k, cache_v
    if paged:
        table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
        prefix = masks.PagedBlockDiagonalPaddedKeysMask.from_seqlens([T] * B, lengths, table, 3)
        caches = tuple(x.reshape(4, 3, *kv, 4)[[1, 2, 0, 3]].reshape(1, 12, *kv, 4) for x in caches)
    expanded = [x.expand(*x.shape[:2], *heads, 4) for x in (spec_k, spec_v, *caches)]
    got = tree_attention(q, *expanded, tree.attention_bias, prefix)
    for b in range(B):
        k, v = (
            torch.cat([c[b : b + 1, : lengths[b]], s[b : b + 1]], 1).flatten(2, -2)
            for c, s in ((cache_k, spec_k), (cache_v, spec_v))
        )
        visible = torch.cat([torch.ones(T, lengths[b], dtype=torch.bool), tree.attention_bias == 0], 1)
        want, _ = dense_attention(q[b : b + 1].flatten(2, -2), k, v, visible)
        torch.testing.assert_close(got[b : b + 1].flatten(2, -2), want, **exact)
    with pytest.raises(NotImplementedError, match="quantized_kv_scales"):
        tree_attention(q, *expanded, tree.attention_bias, prefix, quantized_kv_scales=(q, q))


def test_modules_copy_and_pickle():
    layer = copy.deepcopy(xops.SwiGLU(3, 4))
    assert torch.equal(layer(torch.ones(1, 3)), copy.deepcopy(layer)(torch.ones(1, 3)))
    mask = fmha.BlockDiagonalMask.from_seqlens([1, 2])
    assert copy.deepcopy(mask) == mask
