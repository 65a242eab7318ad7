"""Every mask class of xFormers against its one-line definition, dense and through attention, forward and backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xformers_definitions import KINDS, dense_attention, instances, leaves, random

from keyspan import Alibi, Causal, Documents, Window, attention
from keyspan.backends.native import binding
from keyspan.dispatch.choose import choose
from keyspan.ops import fmha
from keyspan.ops.fmha import attn_bias as masks
from keyspan.ops.fmha.seq_info import _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo
from keyspan.testing import results, tolerances, worst

classes = pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
many = settings(max_examples=60, deadline=None, derandomize=True)
some = settings(max_examples=12, deadline=None, derandomize=True)


def test_all_classes_are_here():
    defined = {
        c
        for c in vars(masks).values()
        if isinstance(c, type) and issubclass(c, masks.AttentionBias) and c.__module__ == masks.__name__
    }
    assert defined - set(KINDS) == {masks.AttentionBias, masks.MaskWithBias, masks._Blocks, masks._PagedBlocks}
    assert len(KINDS) == 22


@classes
@many
@given(data=st.data())
def test_materialize_is_the_definition(cls, data):
    instance = data.draw(instances(cls))
    mask, M, N, visible = instance.mask, instance.M, instance.N, instance.visible
    dense = mask.materialize((2, 3, M, N))
    assert dense.shape == (2, 3, M, N)
    assert torch.equal(dense == 0, visible.expand(2, 3, M, N))
    assert torch.equal(dense == -torch.inf, ~visible.expand(2, 3, M, N))
    if cls is not masks.LowerTriangularMaskWithTensorBias:
        assert torch.equal(mask.materialize((M, N), dtype=torch.bool), visible)


@classes
@some
@given(data=st.data())
def test_attention_is_the_dense_formula(cls, data):
    instance = data.draw(instances(cls))
    mask, M, N, visible, unused = instance.mask, instance.M, instance.N, instance.visible, instance.unused
    torch.manual_seed(M * 100 + N)
    inputs = random(1, M, 4, 3), random(1, N, 2, 3), random(1, N, 2, 5)
    cotangent = random(1, M, 4, 5)
    want_in = leaves(*inputs)
    # A key seen n times has n times the weight: log n is added to its score.
    want, want_lse = dense_attention(*want_in, visible, instance.times.clamp(min=1).log())
    want_grads = torch.autograd.grad((want * cotangent).sum(), want_in)

    # Keys and values that no query may see hold NaN, which must not leak.
    q, k, v = (x.clone() for x in inputs)
    k[:, unused], v[:, unused] = torch.nan, torch.nan
    got_in = leaves(q, k, v)
    got = fmha.memory_efficient_attention(*got_in, mask)
    grads = torch.autograd.grad((got * cotangent).sum(), got_in)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)

    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    assert torch.equal(out, got.detach())
    again = torch.autograd.grad((fmha.memory_efficient_attention(*got_in, mask) * cotangent).sum(), got_in)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    low = fmha.memory_efficient_attention_backward(cotangent, out, lse, q, k, v, mask)
    assert all(torch.equal(a, b) for a, b in zip(low, grads, strict=True))


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@some
@given(data=st.data())
def test_attention_in_low_precision_dtypes(cls, dtype, data):
    """The fp64 tests above run on `chunked`; these dtypes run on `native`."""
    instance = data.draw(instances(cls))
    mask, M, N, unused = instance.mask, instance.M, instance.N, instance.unused
    torch.manual_seed(M * 100 + N)
    inputs = (random(1, M, 4, 3, dtype=dtype), random(1, N, 2, 3, dtype=dtype), random(1, N, 2, 5, dtype=dtype))
    problem, _ = fmha.Inputs(*inputs, mask).canonical()
    if binding.SUPPORTED:
        assert choose(problem, None) == "native"

    def by_definition(times):
        def dense(p):
            out, lse = dense_attention(p.query.flatten(2, 3), p.key, p.value, times > 0, times.clamp(min=1).log())
            return out.view(1, M, 2, 2, 5), lse.view(1, 2, 2, M)

        return dense

    def by_keyspan(p):
        k, v = p.key.clone(), p.value.clone()
        k[:, unused], v[:, unused] = torch.nan, torch.nan
        out, lse = fmha.memory_efficient_attention_partial(p.query.flatten(2, 3), k, v, mask)
        return out.view(1, M, 2, 2, 5), lse.view(1, 2, 2, M)

    want = results(by_definition(instance.times), problem, torch.float64)
    got, again = results(by_keyspan, problem, dtype), results(by_keyspan, problem, dtype)
    allowed = tolerances(problem, dtype, want)
    for name, x in want.items():
        assert worst(got[name], x) <= allowed[name], name
        assert torch.equal(got[name], again[name])
    for i, j in instance.visible.nonzero()[-1:].tolist():  # a mask wrong by one key would be noticed
        fewer = instance.times.clone()
        fewer[i, j] = 0
        wrong = results(by_definition(fewer), problem, torch.float64)
        assert any(worst(wrong[name], x) > allowed[name] for name, x in want.items())


@pytest.mark.parametrize("cls", [c for c in KINDS if not issubclass(c, masks._PagedBlocks)], ids=lambda c: c.__name__)
@some
@given(data=st.data())
def test_every_mask_takes_a_tensor_bias_with_gradient(cls, data):
    instance = data.draw(instances(cls))
    mask, M, N, visible = instance.mask, instance.M, instance.N, instance.visible
    q, k, v, bias = random(1, M, 2, 3), random(1, N, 2, 3), random(1, N, 2, 3), random(2, 1, N)
    want_in = leaves(q, k, v, bias)
    want, _ = dense_attention(*want_in[:3], visible, want_in[3])
    got_in = leaves(q, k, v, bias)
    got = fmha.memory_efficient_attention(*got_in[:3], mask.add_bias(got_in[3]))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    grads = zip(torch.autograd.grad(got, got_in, cotangent), torch.autograd.grad(want, want_in, cotangent), strict=True)
    for grad, expected in grads:
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cls", [c for c in KINDS if not issubclass(c, masks._PagedBlocks)], ids=lambda c: c.__name__)
@some
@given(data=st.data())
def test_every_mask_takes_a_bool_tensor(cls, data):
    instance = data.draw(instances(cls))
    mask, M, N, visible = instance.mask, instance.M, instance.N, instance.visible
    torch.manual_seed(M + 10 * N)
    q, k, v, bias = random(1, M, 2, 3), random(1, N, 2, 3), random(1, N, 2, 3), random(1, 2, M, N)
    keep = torch.rand(2, 1, N) < 0.7
    want, _ = dense_attention(q, k, v, visible & keep, bias)
    # In either order with a floating one, and 5-D.
    for both in (mask.add_bias(keep).add_bias(bias), mask.add_bias(bias).add_bias(keep[:, 0, :].unsqueeze(1))):
        torch.testing.assert_close(fmha.memory_efficient_attention(q, k, v, both), want, rtol=1e-12, atol=1e-12)
        dense = torch.zeros(1, 2, M, N).masked_fill(~(visible & keep), -torch.inf) + bias.float()
        assert torch.equal(both.materialize((1, 2, M, N)), dense)
    grouped = fmha.memory_efficient_attention(*(x.unsqueeze(2) for x in (q, k, v)), mask.add_bias(keep))
    torch.testing.assert_close(grouped[:, :, 0], dense_attention(q, k, v, visible & keep)[0], rtol=1e-12, atol=1e-12)


def test_a_tensor_bias_on_paged_keys_counts_logical_keys():
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    paged = masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([2, 1], [4, 3], table, 2)
    padded = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([2, 1], 4, [4, 3])
    q, k, v, bias = random(1, 3, 2, 3), random(1, 8, 2, 3), random(1, 8, 2, 3), random(2, 3, 4)
    order = (table.long().flatten()[:, None] * 2 + torch.arange(2)).flatten()
    got = fmha.memory_efficient_attention(q, k, v, paged.add_bias(bias))
    both = torch.cat([bias, bias], -1)
    want = fmha.memory_efficient_attention(q, k[:, order], v[:, order], padded.add_bias(both))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_window_conventions_differ_by_class():
    """The classes count windows differently; a definition off by one key would fail the tests above."""
    mask = masks.BlockDiagonalMask.from_seqlens([5])
    row = 4
    assert mask.make_local_attention(2).materialize((5, 5))[row].eq(0).sum() == 2
    assert masks.LocalAttentionFromBottomRightMask(2, 0).materialize((5, 5))[row].eq(0).sum() == 3
    padded = masks.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local([5], 5, [5], 1, 0)
    window = masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local([5], 5, [5], 2)
    assert torch.equal(padded.materialize((5, 5)), window.materialize((5, 5)))


# Constructors and methods.


@pytest.mark.parametrize(
    "lengths", [[2, 3], (2, 3), np.array([2, 3]), torch.tensor([2, 3])], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_from_seqlens_takes_any_sequence_and_device(lengths, device):
    mask = masks.BlockDiagonalMask.from_seqlens(lengths, device=device)
    assert mask.q_seqinfo.seqstart.tolist() == [0, 2, 5]
    assert mask.q_seqinfo.seqstart.dtype == torch.int32
    assert (mask.q_seqinfo.seqstart_py, mask.q_seqinfo.max_seqlen, mask.q_seqinfo.min_seqlen) == ([0, 2, 5], 3, 2)
    assert mask.k_seqinfo is mask.q_seqinfo
    assert masks.BlockDiagonalMask.from_seqlens([2, 3], [2, 3]).k_seqinfo.seqstart_py == [0, 2, 5]


def test_from_tensor_list_and_split():
    xs = [random(2, 3, 4), random(1, 5, 4)]
    mask, packed = masks.BlockDiagonalMask.from_tensor_list(xs)
    assert packed.shape == (1, 11, 4)
    assert list(mask.q_seqinfo.intervals()) == [(0, 3), (3, 6), (6, 11)]
    for part, x in zip(mask.split(packed), xs, strict=True):
        assert torch.equal(part, x)
    # `.to` keeps the batch sizes for `split`; DINOv2 assigns them itself.
    elsewhere = mask.to("meta")
    assert elsewhere.q_seqinfo is elsewhere.k_seqinfo
    assert elsewhere.q_seqinfo.seqstart.device.type == "meta"
    assert [part.shape[1] for part in elsewhere.split(packed)] == [3, 5]
    moved = mask.to("cpu")
    moved._batch_sizes = [1, 1, 1]
    assert [tuple(part.shape) for part in moved.split(packed)] == [(1, 3, 4), (1, 3, 4), (1, 5, 4)]


def test_from_tensor_lists_qkv_and_regrouping():
    q, k, v = ([random(2, m, 3), random(1, m + 1, 3)] for m in (2, 4, 4))
    mask, pq, pk, pv = masks.BlockDiagonalMask.from_tensor_lists_qkv(q, k, v)
    assert pq.shape == (1, 7, 3)
    assert pk.shape == (1, 13, 3)
    for parts, xs in ((mask.split_queries(pq), q), (mask.split_kv(pk), k), (mask.split_kv(pv), v)):
        assert all(torch.equal(part, x) for part, x in zip(parts, xs, strict=True))
    with pytest.raises(ValueError, match="queries and keys differ"):
        mask.split(pq)
    with pytest.raises(ValueError, match=r"want \[1, 7, "):
        mask.split_queries(pk)
    assert masks.BlockDiagonalMask.from_tensor_lists_qkv(q, k)[3] is None


def test_make_methods_keep_lengths_and_batch_sizes():
    mask = masks.BlockDiagonalMask.from_seqlens([2, 3], [4, 3])
    mask._batch_sizes = [2]
    for made in (
        mask.make_causal(),
        mask.make_causal_from_bottomright(),
        mask.make_local_attention(3),
        mask.make_local_attention_from_bottomright(3),
    ):
        assert made.q_seqinfo is mask.q_seqinfo
        assert made.k_seqinfo is mask.k_seqinfo
        assert made._batch_sizes == [2]
    assert isinstance(mask.make_causal().make_local_attention(3), masks.BlockDiagonalCausalLocalAttentionMask)
    local = masks.LowerTriangularFromBottomRightMask().make_local_attention(4)
    assert isinstance(local, masks.LowerTriangularFromBottomRightLocalAttentionMask)
    assert local._window_size == 4
    padded = masks.BlockDiagonalPaddedKeysMask.from_seqlens([1, 2], 4, [3, 4]).make_local_attention(1, 2)
    assert isinstance(padded, masks.BlockDiagonalLocalAttentionPaddedKeysMask)
    assert torch.equal(
        mask._create_block_mask((2, 4)), masks.BlockDiagonalMask.from_seqlens([2], [4]).materialize((2, 4))
    )


def test_a_bias_on_the_triangular_mask():
    bias = random(2, 1, 4, 4).float()
    mask = masks.LowerTriangularMask().add_bias(bias)
    assert isinstance(mask, masks.LowerTriangularMaskWithTensorBias)
    assert mask._bias is bias
    dense = mask.materialize((2, 3, 4, 4))
    assert torch.equal(dense, masks.LowerTriangularMask().materialize((2, 3, 4, 4)) + bias)
    twice = mask.add_bias(bias).materialize((2, 3, 4, 4))
    assert torch.equal(twice, masks.LowerTriangularMask().materialize((2, 3, 4, 4)) + 2 * bias)


def test_masks_take_alibi_and_relative_biases():
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    q, k, v = random(1, 7, 2, 4), random(1, 7, 2, 4), random(1, 7, 2, 4)
    mask = masks.BlockDiagonalMask.from_seqlens([3, 4]).make_causal()
    got = fmha.memory_efficient_attention(q, k, v, mask.add_bias(Alibi(slopes)))
    distance = (torch.arange(7)[None] - torch.arange(7)[:, None]).abs()
    want, _ = dense_attention(q, k, v, mask.materialize((7, 7), torch.bool), -slopes[:, None, None] * distance)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_masks_compare_by_value_and_are_hashable():
    assert masks.LowerTriangularMask() == masks.LowerTriangularMask(device="cpu")
    assert masks.LocalAttentionFromBottomRightMask(1, 2) != masks.LocalAttentionFromBottomRightMask(1, 3)
    a, b = (masks.BlockDiagonalMask.from_seqlens([2, 3]) for _ in range(2))
    assert a == b
    assert {a: 1}[b] == 1
    assert a != a.make_causal()
    assert a != masks.BlockDiagonalMask.from_seqlens([2, 4])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.LocalAttentionFromBottomRightMask(-1, 0), ValueError, "window_left"),
        (lambda: masks.LowerTriangularFromBottomRightLocalAttentionMask(0), ValueError, "window_size"),
        (lambda: masks.BlockDiagonalMask.from_seqlens([3], [2]).make_causal_from_bottomright(), ValueError, "2 keys"),
        (lambda: masks.BlockDiagonalMask.from_seqlens([3]).make_local_attention(0), ValueError, "window_size"),
        (lambda: masks.BlockDiagonalMask.from_seqlens([5], [2]).make_local_attention(3), RuntimeError, "sees nothing"),
        (lambda: masks.BlockDiagonalMask.from_seqlens([1, 2], [3]), ValueError, "kv_seqlen"),
        (lambda: masks.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]), ValueError, "padding"),
        (lambda: masks.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [3]), ValueError, "want 2"),
        (lambda: _SeqLenInfo.from_seqlens([1, -1]), ValueError, "seqlens"),
        (lambda: _PaddedSeqLenInfo.from_seqlens([1]), NotImplementedError, "from_seqlens_padded"),
        (lambda: _GappySeqInfo.from_seqlens([1]), NotImplementedError, "from_seqlens_gappy"),
        (lambda: masks.AttentionBias().materialize((1, 1)), NotImplementedError, "AttentionBias"),
    ],
)
def test_errors_name_the_argument(make: Any, error, message):
    with pytest.raises(error, match=message):
        make()


def test_errors_name_lengths_that_do_not_fit():
    x = random(1, 5, 1, 2)
    with pytest.raises(ValueError, match="query: got 5 packed tokens, want 4"):
        fmha.memory_efficient_attention(x, x, x, masks.BlockDiagonalMask.from_seqlens([2, 2], [2, 3]))
    with pytest.raises(ValueError, match="key: got 5 packed tokens, want 6"):
        fmha.memory_efficient_attention(x, x, x, masks.BlockDiagonalMask.from_seqlens([2, 3], [2, 4]))


# Sequence infos built by hand and updated in place.


def test_seq_info_built_by_hand_without_a_list():
    start = torch.tensor([0, 2, 5], dtype=torch.int32)
    info = _SeqLenInfo(seqstart=start, max_seqlen=3, min_seqlen=2, seqstart_py=None)
    mask = masks.BlockDiagonalCausalMask(q_seqinfo=info, k_seqinfo=info)
    want = masks.BlockDiagonalMask.from_seqlens([2, 3]).make_causal()
    assert torch.equal(mask.materialize((5, 5)), want.materialize((5, 5)))
    assert list(info.intervals()) == [(0, 2), (2, 5)]
    assert [x.shape[1] for x in info.split(random(1, 5, 1))] == [2, 3]


def test_seq_infos_updated_in_place():
    mask = masks.BlockDiagonalMask.from_seqlens([3, 2])
    tensor = mask.q_seqinfo.seqstart
    mask.q_seqinfo.from_seqlens_inplace([1, 3])
    assert mask.q_seqinfo.seqstart is tensor
    assert mask.q_seqinfo.seqstart_py == [0, 1, 4]
    # Buffers keep their size, as in a captured graph; rows behind the last sequence see no key.
    visible = mask.materialize((5, 5), torch.bool)
    want = masks.BlockDiagonalMask.from_seqlens([1, 3]).materialize((4, 4), torch.bool)
    assert torch.equal(visible[:4, :4], want)
    assert not visible[4].any()
    assert not visible[:, 4].any()
    with pytest.raises(ValueError, match="at most 3"):
        mask.q_seqinfo.from_seqlens_inplace([1, 4])

    padded = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1], 6, [2, 3])
    padded.k_seqinfo.from_seqlens_padded_inplace([5, 1])
    want = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1], 6, [5, 1])
    assert torch.equal(padded.materialize((2, 12)), want.materialize((2, 12)))
    assert list(padded.k_seqinfo.intervals()) == [(0, 5), (6, 7)]
    # By hand, without any method.
    padded.k_seqinfo.seqlen.copy_(torch.tensor([2, 3]))
    want = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1], 6, [2, 3])
    assert torch.equal(padded.materialize((2, 12)), want.materialize((2, 12)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_infos_written_to_by_hand_and_their_copies(mode):
    with mode():
        info = _SeqLenInfo.from_seqlens([2, 3], device="cpu")
        assert info.starts == [0, 2, 5]
        info.seqstart.copy_(torch.tensor([0, 1, 4]))
        assert info.starts == [0, 1, 4]
        for same in (copy.deepcopy(info), pickle.loads(pickle.dumps(info)), info.to("cpu")):
            assert same.starts == [0, 1, 4]
        # The lengths no longer fill the buffer: rows behind them see no key.
        mask = masks.BlockDiagonalMask.from_seqlens([3, 2], device="cpu")
        mask.q_seqinfo.from_seqlens_inplace([1, 3])
        x = random(1, 5, 1, 2)
        assert torch.equal(fmha.memory_efficient_attention(x, x, x, mask)[0, 4], torch.zeros(1, 2).double())


def test_an_info_reads_a_newly_assigned_tensor():
    info = _SeqLenInfo.from_seqlens([2, 3], device="cpu")
    info.seqstart = torch.tensor([0, 1, 4], dtype=torch.int32)
    for same in (info, copy.deepcopy(info), pickle.loads(pickle.dumps(info))):
        assert same.starts == [0, 1, 4]


def test_gappy_info_of_paged_keys_holds_ends():
    info = _GappySeqInfo.from_seqlens_gappy([1, 0], [2, 3], True)
    assert info.seqlen.tolist() == [3, 3]
    assert info.seqstart_py == info.seqstart.tolist() == [1, 0, -1]
    assert list(info.intervals()) == [(1, 3), (0, 3)]
    assert info == _GappySeqInfo.from_seqlens_gappy([1, 0, 8], [2, 3], True)  # as xFormers wants it
    with pytest.raises(ValueError, match="seqstarts: got 1 entries, want 2 or 3"):
        _GappySeqInfo.from_seqlens_gappy([1], [2, 3], True)


@pytest.mark.parametrize(
    "paged_type", [masks.PagedBlockDiagonalPaddedKeysMask, masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask]
)
def test_make_paged_from_padded(paged_type):
    q, k, page = [2, 1], [5, 3], 2
    table = torch.tensor([[3, 0, 4], [1, 5, 2]], dtype=torch.int32)
    unpaged = paged_type._UNPAGED_TYPE.from_seqlens(q, 6, k)
    paged = unpaged.make_paged(table, page, paged_type)
    assert type(paged) is paged_type
    assert paged == paged_type.from_seqlens(q, k, table, page)
    physical = [int(table[b, j // page]) * page + j % page for b in range(2) for j in range(6)]
    dense = torch.full((3, 12), -torch.inf)
    dense[:, physical] = unpaged.materialize((3, 12))
    assert torch.equal(paged.materialize((3, 12)), dense)


def test_make_paged_keeps_the_window():
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    window = masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local([1, 2], 4, [3, 4], 2)
    paged = window.make_paged(table, 2, masks.PagedBlockDiagonalCausalLocalPaddedKeysMask)
    assert paged == masks.PagedBlockDiagonalCausalLocalPaddedKeysMask.from_seqlens_local([1, 2], [3, 4], table, 2, 2)
    assert torch.equal(paged.materialize((3, 8)), window.materialize((3, 8)))


def test_make_paged_from_gappy():
    q, k, page = [2, 1], [4, 3], 2
    table = torch.tensor([[3, 0, 4], [1, 5, 2]], dtype=torch.int32)
    unpaged = masks.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(q, [1, 8, 12], k)
    paged = unpaged.make_paged(table, page, 6, masks.PagedBlockDiagonalCausalWithOffsetGappyKeysMask)
    assert paged == masks.PagedBlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(q, [1, 2], k, table, page)
    physical = [int(table[b, j // page]) * page + j % page for b in range(2) for j in range(6)]
    dense = torch.full((3, 12), -torch.inf)
    dense[:, physical] = unpaged.materialize((3, 12))
    assert torch.equal(paged.materialize((3, 12)), dense)
    with pytest.raises(ValueError, match="notional_padding"):
        unpaged.make_paged(table, page, 9, masks.PagedBlockDiagonalGappyKeysMask)


def test_a_mask_converts_to_a_keyspan_mask():
    mask = masks.BlockDiagonalMask.from_seqlens([2, 3]).make_causal()
    x = random(1, 5, 2, 4)
    assert torch.equal(attention(x, x, x, mask=mask.product()), fmha.memory_efficient_attention(x, x, x, mask))


def test_host_lengths_are_lowered_once_and_changes_are_noticed():
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    mask = masks.BlockDiagonalMask.from_seqlens([2, 7], device="cpu").make_causal()

    def want(lengths):
        return attention(q, k, v, mask=Documents(lengths) & Causal(), backend="reference")

    def check(lengths):
        for _ in range(3):
            torch.testing.assert_close(fmha.memory_efficient_attention(q, k, v, attn_bias=mask), want(lengths))

    check([2, 7])
    cpu = torch.device("cpu")
    assert mask.lowered(1, 9, 9, cpu) is mask.lowered(1, 9, 9, cpu)
    # The result of `lower` belongs to the caller.
    mask.lower(1, 9, 9).hi.zero_()
    check([2, 7])
    mask.q_seqinfo.from_seqlens_inplace([6, 3])
    check([6, 3])
    mask.q_seqinfo.seqstart.copy_(torch.tensor([0, 1, 9]))  # the list is out of date
    check([1, 8])
    mask.q_seqinfo.seqstart = torch.tensor([0, 5, 9], dtype=torch.int32)
    check([5, 4])
    other = masks.BlockDiagonalMask.from_seqlens([2, 7], device="cpu")
    with pytest.raises(ValueError, match="query"):
        fmha.memory_efficient_attention(q[:, 1:], k, v, attn_bias=other)


class Lowered(masks.BlockDiagonalMask):
    def lower(self, batch, M, N, device="cpu"):
        return Causal().lower(batch, M, N, device)


class Multiplied(masks.BlockDiagonalMask):
    def product(self):
        return super().product() & Window(1)


class LaidOut(masks.BlockDiagonalMask):
    def layout(self):
        return Documents([4, 5])


class Seen(masks.BlockDiagonalMask):
    def visibility(self):
        return Causal()


class WithBias(masks.MaskWithBias):
    def lower(self, batch, M, N, device="cpu"):
        return Causal().lower(batch, M, N, device)


def test_subclasses_of_users_override_product_layout_or_lower():
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    known = masks.BlockDiagonalMask.from_seqlens([2, 7], device="cpu")
    documents = Documents([2, 7])
    for mine, want in (
        (Lowered(**known._parts()), Causal()),
        (Multiplied(**known._parts()), documents & Window(1)),
        (LaidOut(**known._parts()), Documents([4, 5])),
        (Seen(**known._parts()), documents & Causal()),
        (WithBias(known, torch.zeros(1, 1, 1, 9)), Causal()),
        (masks.MaskWithBias(Lowered(**known._parts()), torch.zeros(1, 1, 1, 9)), Causal()),
    ):
        for _ in range(3):
            got = fmha.memory_efficient_attention(q, k, v, attn_bias=mine)
            torch.testing.assert_close(got, attention(q, k, v, mask=want, backend="reference"))
