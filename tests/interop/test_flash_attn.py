"""flash-attn's functions against its documented formulas, dense and in fp64, written down here once more."""

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from keyspan.interop import flash_attn as fa
from keyspan.interop.flash_attn import bert_padding, cute, flash_attn_interface

ROOT = Path(__file__).parents[2]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def dense(q, k, v, causal=False, window=(-1, -1), scale=None, softcap=0.0, slopes=None, sink=None):
    """(out, lse) of one sequence: q [M, Hq, K], k and v [N, H, .]; bottom-right, as flash-attn documents it."""
    M, N, heads = len(q), len(k), q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("mhk,nhk->hmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        score = softcap * (score / softcap).tanh()
    i, j = torch.arange(M)[:, None] + N - M, torch.arange(N)
    if slopes is not None:
        score = score - slopes[:, None, None] * (i - j).abs()
    left, right = window
    seen = torch.ones(M, N, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if left is not None and left >= 0:
        seen &= j >= i - left
    if right is not None and right >= 0 and not causal:
        seen &= j <= i + right
    score = score.masked_fill(~seen, -torch.inf)
    if sink is not None:
        score = torch.cat([score, sink[:, None, None].expand(-1, M, 1)], -1)
    lse = score.logsumexp(-1)
    weight = (score - lse[..., None].masked_fill(lse[..., None] == -torch.inf, 0)).exp()[..., :N]
    return torch.einsum("hmn,nhv->mhv", weight, v), lse


def same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(theirs)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, cotangent, retain_graph=True),
        torch.autograd.grad(theirs, inputs, cotangent, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


FORMS = {
    "plain": {},
    "scale": {"softmax_scale": 0.2},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "one side": {"window_size": (-1, 1)},
    "window of version 4": {"window_size": (2, None)},
    "causal window": {"causal": True, "window_size": (3, -1)},
    "causal window, right given": {"causal": True, "window_size": (3, 5)},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": torch.rand(4, dtype=torch.float64)},
    "causal alibi": {"alibi_slopes": torch.rand(4, dtype=torch.float64), "causal": True},
    "sink": {"learnable_sink": torch.randn(4, dtype=torch.float64), "window_size": (1, 0)},
}
IN_OURS = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "slopes", "learnable_sink": "sink"}


def reference(q, k, v, **form):
    return dense(q, k, v, **{IN_OURS.get(name, name): x for name, x in form.items()})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", [(5, 5), (3, 7), (7, 3)])
def test_batch(form, sizes):
    M, N = sizes
    q, k, v = draw(2, M, 4, 8), draw(2, N, 2, 8), draw(2, N, 2, 6)
    want = [reference(*parts, **form) for parts in zip(q, k, v, strict=True)]
    out = fa.flash_attn_func(q, k, v, **form)
    same(out, torch.stack([x for x, _ in want]), (q, k, v))
    got, lse = fa.flash_attn_func(q, k, v, return_lse=True, **form)
    assert torch.equal(got, out)
    torch.testing.assert_close(lse, torch.stack([x for _, x in want]))
    again = fa.flash_attn_func(q, k, v, return_attn_probs=True, **form)
    assert len(again) == 3
    assert torch.equal(again[1], lse)
    assert again[2] is None


LENGTHS = ([3, 0, 5, 4], [3, 2, 7, 1])


def packed(key_heads=2):
    q_lengths, k_lengths = LENGTHS
    q = draw(sum(q_lengths), 4, 8)
    k, v = draw(sum(k_lengths), key_heads, 8), draw(sum(k_lengths), key_heads, 6)
    starts = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in LENGTHS]
    return q, k, v, *starts


def each(q, k, v, **form):
    q_lengths, k_lengths = LENGTHS
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    slopes = form.pop("alibi_slopes", None)
    found = [
        reference(*part, **form, alibi_slopes=None if slopes is None else slopes[n] if slopes.dim() == 2 else slopes)
        for n, part in enumerate(parts)
    ]
    return torch.cat([x for x, _ in found]), torch.cat([x for _, x in found], -1)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_varlen(form):
    q, k, v, starts_q, starts_k = packed()
    out, lse = each(q, k, v, **form)
    got, got_lse = fa.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 5, 7, return_lse=True, **form)
    same(got, out, (q, k, v))
    torch.testing.assert_close(got_lse, lse)


def test_varlen_slopes_of_each_sequence():
    q, k, v, starts_q, starts_k = packed()
    slopes = torch.rand(4, 4, dtype=torch.float64)
    for causal in (False, True):
        out, lse = each(q, k, v, causal=causal, alibi_slopes=slopes)
        arguments = (q, k, v, starts_q, starts_k, 5, 7)
        got, got_lse = fa.flash_attn_varlen_func(*arguments, causal=causal, alibi_slopes=slopes, return_lse=True)
        same(got, out, (q, k, v))
        torch.testing.assert_close(got_lse, lse)


def in_pages(x, lengths, page_size, pages):
    """Pages in a shuffled order, and the table that finds them."""
    per = -(-max(lengths) // page_size)
    table = torch.randperm(pages)[: per * len(lengths)].reshape(len(lengths), per).int()
    store = torch.full((pages, page_size, *x[0].shape[1:]), torch.nan, dtype=x[0].dtype)
    for row, part in zip(table, x, strict=True):
        for n in range(len(part)):
            store[row[n // page_size], n % page_size] = part[n]
    return store, table


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_pages(causal):
    q, k, v, starts_q, starts_k = packed()
    torch.manual_seed(3)
    keys, table = in_pages(k.detach().split(LENGTHS[1]), LENGTHS[1], 4, 11)
    torch.manual_seed(3)
    values, _ = in_pages(v.detach().split(LENGTHS[1]), LENGTHS[1], 4, 11)
    want, _ = each(q, k, v, causal=causal)
    got = fa.flash_attn_varlen_func(q, keys, values, starts_q, starts_k, 5, 7, causal=causal, block_table=table)
    torch.testing.assert_close(got, want)
    used = torch.tensor(LENGTHS[1], dtype=torch.int32)
    got = fa.flash_attn_varlen_func(q, keys, values, starts_q, causal=causal, page_table=table, seqused_k=used)
    torch.testing.assert_close(got, want)


def test_varlen_keys_in_use():
    q, k, v, starts_q, starts_k = packed()
    used = torch.tensor([2, 0, 6, 1], dtype=torch.int32)
    got = fa.flash_attn_varlen_func(q, k, v, starts_q, starts_k, causal=True, seqused_k=used)
    q_parts, k_parts, v_parts = q.split(LENGTHS[0]), k.split(LENGTHS[1]), v.split(LENGTHS[1])
    want = [dense(a, b[:n], c[:n], causal=True)[0] for a, b, c, n in zip(q_parts, k_parts, v_parts, used, strict=True)]
    torch.testing.assert_close(got, torch.cat(want))


def test_packed_forms():
    q, k, v = (draw(2, 5, 4, 8) for _ in range(3))
    want = fa.flash_attn_func(q, k, v, causal=True, softmax_scale=0.3)
    qkv, kv = torch.stack([q, k, v], 2), torch.stack([k, v], 2)
    assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True), want)
    assert torch.equal(fa.flash_attn_kvpacked_func(q, kv, causal=True, softmax_scale=0.3), want)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    tokens = [x.flatten(0, 1) for x in (q, qkv, kv)]
    same(fa.flash_attn_varlen_qkvpacked_func(tokens[1], starts, 5, 0.0, 0.3, True), want.flatten(0, 1), (q, k, v))
    got = fa.flash_attn_varlen_kvpacked_func(tokens[0], tokens[2], starts, starts, 5, 5, 0.0, 0.3, causal=True)
    same(got, want.flatten(0, 1), (q, k, v))


def test_dropout_is_applied():
    q, k = torch.zeros(1, 500, 1, 8), torch.zeros(1, 40, 1, 8)
    out = fa.flash_attn_func(q, k, torch.ones(1, 40, 1, 4), 0.5)
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.05


class TestCache:
    """A cache of 3 rows, sequences with 4, 0 and 7 tokens, 2 new ones each."""

    BEFORE = torch.tensor([4, 0, 7], dtype=torch.int32)

    def given(self, new=2):
        torch.manual_seed(0)
        q = torch.randn(3, new, 4, 8, dtype=torch.float64)
        k, v = (torch.randn(3, new, 2, 8, dtype=torch.float64) for _ in range(2))
        caches = [torch.randn(3, 10, 2, 8, dtype=torch.float64) for _ in range(2)]
        return q, k, v, *caches

    def want(self, q, k, v, keys, values, first=(0, 0, 0), **form):
        found = []
        for b, n in enumerate(self.BEFORE.tolist()):
            k_all, v_all = (torch.cat([c[b, first[b] : n], x[b]]) for c, x in ((keys, k), (values, v)))
            found.append(reference(q[b], k_all, v_all, **form))
        return torch.stack([x for x, _ in found]), torch.stack([x for _, x in found])

    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    @pytest.mark.parametrize("new", [1, 2])
    def test_appended_in_place(self, form, new):
        q, k, v, keys, values = self.given(new)
        before = keys.clone()
        want = self.want(q, k, v, keys, values, **form)
        got = fa.flash_attn_with_kvcache(
            q, keys, values, k, v, cache_seqlens=self.BEFORE, return_softmax_lse=True, **form
        )
        torch.testing.assert_close(got, want)
        for b, n in enumerate(self.BEFORE.tolist()):
            assert torch.equal(keys[b, n : n + new], k[b])
            keys[b, n : n + new] = before[b, n : n + new]
        assert torch.equal(keys, before)

    def test_pages(self):
        q, k, v, keys, values = self.given()
        want = self.want(q, k, v, keys, values, causal=True)[0]
        table = torch.randperm(12).reshape(3, 4).int()
        stores = []
        for cache in (keys, values):
            store = torch.full((12, 3, 2, 8), torch.nan, dtype=torch.float64)
            for b, n in enumerate(self.BEFORE.tolist()):
                for j in range(n):
                    store[table[b, j // 3], j % 3] = cache[b, j]
            stores.append(store)
        arguments = dict(cache_seqlens=self.BEFORE, block_table=table, causal=True)
        torch.testing.assert_close(fa.flash_attn_with_kvcache(q, *stores, k, v, **arguments), want)
        assert torch.equal(stores[0][table[2, 7 // 3], 7 % 3], k[2, 0])

    def test_rows_of_the_cache(self):
        q, k, v, keys, values = self.given()
        rows = torch.tensor([4, 0, 2])
        stores = [torch.randn(6, 10, 2, 8, dtype=torch.float64) for _ in range(2)]
        for store, cache in zip(stores, (keys, values), strict=True):
            store[rows] = cache
        want = self.want(q, k, v, keys, values, causal=True)
        got = fa.flash_attn_with_kvcache(
            *(q, *stores, k, v),
            cache_seqlens=self.BEFORE,
            cache_batch_idx=rows,
            causal=True,
            return_softmax_lse=True,
        )
        torch.testing.assert_close(got, want)
        assert torch.equal(stores[0][4, 4:6], k[0])

    def test_left_padding(self):
        q, k, v, keys, values = self.given()
        first = torch.tensor([1, 0, 3], dtype=torch.int32)
        want = self.want(q, k, v, keys, values, first.tolist(), causal=True)[0]
        arguments = dict(cache_seqlens=self.BEFORE, cache_leftpad=first, causal=True)
        torch.testing.assert_close(fa.flash_attn_with_kvcache(q, keys, values, k, v, **arguments), want)

    def test_nothing_new(self):
        q, _, _, keys, values = self.given()
        got = fa.flash_attn_with_kvcache(q, keys, values, cache_seqlens=6)
        want = torch.stack([dense(*part)[0] for part in zip(q, keys[:, :6], values[:, :6], strict=True)])
        torch.testing.assert_close(got, want)
        got = fa.flash_attn_with_kvcache(q, keys, values)
        torch.testing.assert_close(got, fa.flash_attn_func(q, keys, values))

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_rotary(self, interleaved, causal):
        q, k, v, keys, values = self.given()
        angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
        cos, sin = angles.cos(), angles.sin()

        def turned(x, positions):
            """Six of eight components, as complex numbers."""
            part = x[..., :6]
            a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
            z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[positions][:, None]
            pairs = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
            return torch.cat([pairs, x[..., 6:]], -1)

        step = torch.arange(2)
        q_turned = torch.stack(
            [turned(x, n + (step if causal else 0 * step)) for x, n in zip(q, self.BEFORE, strict=True)]
        )
        k_turned = torch.stack([turned(x, n + step) for x, n in zip(k, self.BEFORE, strict=True)])
        want = self.want(q_turned, k_turned, v, keys, values, causal=causal)[0]
        arguments = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, causal=causal)
        got = fa.flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=self.BEFORE, **arguments)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(keys[0, 4:6], k_turned[0])

    def test_what_is_refused(self):
        q, k, v, keys, values = self.given()
        table = torch.zeros(3, 1, dtype=torch.int32)
        for arguments, message in [
            (dict(k=k), "k, v: got one of them"),
            (dict(k=k, v=v), "cache_seqlens: got room for 10 tokens, want 12"),
            (dict(block_table=table, cache_leftpad=self.BEFORE), "block_table: got a tensor beside cache_leftpad"),
            (dict(rotary_cos=torch.ones(12, 2)), "rotary_sin: got None"),
            (
                dict(rotary_cos=torch.ones(12, 6), rotary_sin=torch.ones(12, 6)),
                "rotary_cos: got 6 angles, want at most 4",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                fa.flash_attn_with_kvcache(q, keys, values, **arguments)


class TestBertPadding:
    MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])

    def test_there_and_back(self):
        x = draw(3, 4, 2, 5)
        tokens, indices, starts, longest, used = bert_padding.unpad_input(x, self.MASK)
        assert torch.equal(tokens, x[self.MASK.bool()])
        assert starts.tolist() == [0, 2, 2, 5]
        assert starts.dtype == used.dtype == torch.int32
        assert (longest, used.tolist()) == (3, [2, 0, 3])
        back = bert_padding.pad_input(tokens, indices, 3, 4)
        same(back, x * self.MASK[..., None, None], (x,))

    def test_places_kept_without_a_token(self):
        unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
        tokens, _, starts, longest, used = bert_padding.unpad_input(torch.randn(3, 4, 2), self.MASK, unused)
        assert (len(tokens), starts.tolist(), longest, used.tolist()) == (7, [0, 3, 3, 7], 4, [2, 0, 3])

    def test_several_sequences_in_a_row(self):
        x = torch.randn(2, 6, 3)
        lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
        tokens, indices, starts, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
        assert torch.equal(tokens, torch.cat([x[0, :5], x[1]]))
        assert starts.tolist() == [0, 2, 5, 11]
        assert (longest, len(indices)) == (6, 11)


class TestHalves:
    """What ring attention calls: a block's forward, and its backward by the output and lse of all blocks."""

    def test_gradients_of_blocks_add_up(self):
        q, k, v = draw(2, 5, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)
        out, lse = fa.flash_attn_func(q, k, v, return_lse=True)
        dout = torch.randn_like(out)
        want = torch.autograd.grad(out, (q, k, v), dout)
        dq, found = torch.zeros_like(q), []
        for part in (slice(0, 4), slice(4, 9)):
            grads = [torch.empty_like(x) for x in (q, k[:, part], v[:, part])]
            delta = flash_attn_interface._flash_attn_backward(
                dout, q, k[:, part], v[:, part], out, lse, *grads, 0.0, None, False
            )
            torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2).float(), check_dtype=False)
            dq += grads[0]
            found.append(grads[1:])
        torch.testing.assert_close(dq, want[0])
        for n in (0, 1):
            torch.testing.assert_close(torch.cat([grads[n] for grads in found], 1), want[n + 1])

    def test_varlen(self):
        q, k, v, starts_q, starts_k = packed()
        v = draw(*k.shape)
        arguments = (starts_q, starts_k, 5, 7)
        out, lse = fa.flash_attn_varlen_func(q, k, v, *arguments, causal=True, return_lse=True)
        half = flash_attn_interface._flash_attn_varlen_forward(q, k, v, *arguments, 0.0, None, True)
        assert torch.equal(half[0], out)
        assert torch.equal(half[1], lse)
        dout = torch.randn_like(out)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        flash_attn_interface._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *grads, *arguments, 0.0, None, True, -1, -1
        )
        for got, want in zip(grads, torch.autograd.grad(out, (q, k, v), dout), strict=True):
            torch.testing.assert_close(got, want)

    def test_forward_has_no_graph_and_no_dropout(self):
        q = draw(1, 5, 2, 8)
        half = flash_attn_interface._flash_attn_forward(q, q, q, 0.0, None, True)
        assert not half[0].requires_grad
        torch.testing.assert_close(half[0], fa.flash_attn_func(q, q, q, causal=True).detach())
        with pytest.raises(ValueError, match=r"dropout_p: got 0\.1, want 0"):
            flash_attn_interface._flash_attn_forward(q, q, q, 0.1, None, True)


def test_varlen_says_what_is_missing():
    x = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens_q: got None"):
        fa.flash_attn_varlen_func(x, x, x)
    with pytest.raises(ValueError, match="cu_seqlens_k: got None"):
        fa.flash_attn_varlen_func(x, x, x, torch.tensor([0, 5]))


class TestVersion4:
    """`flash_attn.cute`: another order of the arguments, and (out, lse) always."""

    @pytest.mark.parametrize("window", [(None, None), (2, 0), (None, 1)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_a_batch(self, causal, window):
        q, k, v, sink = draw(2, 5, 4, 8), draw(2, 7, 2, 8), draw(2, 7, 2, 6), draw(4)
        out, lse = cute.flash_attn_func(q, k, v, 0.3, causal, window, sink, 5.0)
        options = dict(causal=causal, window=window, scale=0.3, softcap=5.0, sink=sink)
        each = [dense(*(x[b] for x in (q, k, v)), **options) for b in range(2)]
        same(out, torch.stack([o for o, _ in each]), [q, k, v, sink])
        same(lse, torch.stack([x for _, x in each]), [q, k, sink])

    @pytest.mark.parametrize("given", ["packed", "keys in use", "pages", "a batch"])
    def test_varlen(self, given):
        lengths, used = (2, 4, 4), (3, 6, 4)
        q, k, v = draw(3, 4, 4, 8), draw(3, 6, 2, 8), draw(3, 6, 2, 8)
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        seqused_k = torch.tensor(used, dtype=torch.int32)
        packed = torch.cat([q[b, : lengths[b]] for b in range(3)])
        if given == "a batch":  # no cu_seqlens at all
            out, lse = cute.flash_attn_varlen_func(q, k, v, causal=True)
            each = [dense(q[b], k[b], v[b], causal=True) for b in range(3)]
            same(out, torch.stack([o for o, _ in each]), [q, k, v])
            same(lse, torch.stack([x for _, x in each]), [q, k])
            return
        if given == "packed":
            keys = [torch.cat([x[b, : used[b]] for b in range(3)]) for x in (k, v)]
            options = {"cu_seqlens_k": torch.tensor([0, *accumulate(used)], dtype=torch.int32)}
        elif given == "keys in use":
            keys, options = [k, v], {"seqused_k": seqused_k}
        else:
            keys = [x.reshape(9, 2, 2, 8) for x in (k, v)]
            options = {"seqused_k": seqused_k, "page_table": torch.arange(9, dtype=torch.int32).view(3, 3)}
        out, lse = cute.flash_attn_varlen_func(packed, *keys, starts, causal=True, max_seqlen_q=4, **options)
        each = [dense(q[b, : lengths[b]], k[b, : used[b]], v[b, : used[b]], causal=True) for b in range(3)]
        same(out, torch.cat([o for o, _ in each]), [q, k, v])
        same(lse, torch.cat([x for _, x in each], -1), [q, k])

    def test_errors(self):
        x = torch.zeros(1, 4, 1, 8)
        with pytest.raises(ValueError, match="mask_mod: got function, want None"):
            cute.flash_attn_func(x, x, x, mask_mod=lambda *_: True)
        with pytest.raises(ValueError, match="seqused_q: got Tensor, want None"):
            cute.flash_attn_varlen_func(x, x, x, seqused_q=torch.tensor([2]))
        with pytest.raises(ValueError, match="cu_seqlens: got None with 3-D inputs"):
            cute.flash_attn_varlen_func(x[0], x[0], x[0])


UNCHANGED = """
import importlib.metadata

import torch
import flash_attn
from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_varlen_qkvpacked_func
import flash_attn.bert_padding, flash_attn.cute.interface, flash_attn.flash_attn_interface
from flash_attn.cute import flash_attn_func as version_4
from flash_attn.cute.interface import flash_attn_varlen_func as varlen_version_4

assert flash_attn.__version__ == importlib.metadata.version("flash_attn") == "2.8.3+keyspan"
assert flash_attn.flash_attn_interface.flash_attn_func is flash_attn_func

# The way most models call it: a padded batch, unpadded, and padded again.
x, mask = torch.randn(2, 6, 4, 8), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
tokens, indices, cu_seqlens, longest, *_ = unpad_input(x, mask)
out = flash_attn_varlen_func(tokens, tokens, tokens, cu_seqlens, cu_seqlens, longest, longest, causal=True)
padded = pad_input(out, indices, 2, 6)
torch.testing.assert_close(padded[1:, :4], flash_attn_func(x[1:, :4], x[1:, :4], x[1:, :4], causal=True))
torch.testing.assert_close(version_4(x, x, x, None, True)[0], flash_attn_func(x, x, x, causal=True))
print("done")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(ROOT / "compat" / "flash_attn")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


class TestStandIn:
    @staticmethod
    def run(code, *path):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT / "src")))}
        command = [sys.executable, "-W", "error", *code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def test_code_written_for_flash_attn_runs_unchanged(self, installed):
        done = self.run(["-c", UNCHANGED], installed)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr

    def test_it_does_not_shadow_a_real_one(self, installed, tmp_path):
        real = tmp_path / "flash_attn"
        real.mkdir()
        (real / "__init__.py").write_text("__version__ = '2.8.3'\n")
        done = self.run(["-c", "import flash_attn"], installed, tmp_path)
        assert done.returncode == 1
        assert f"there is a real one in {real}" in done.stderr
        done = self.run(["-c", "import flash_attn; print(flash_attn.__file__)"], tmp_path, installed)
        assert done.stdout.strip() == str(real / "__init__.py")
        done = self.run(["-c", "import flash_attn"], installed, ROOT / "compat" / "flash_attn")
        assert done.returncode == 0, done.stderr
