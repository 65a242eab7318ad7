"""`keyspan.attention` as users call it: layouts, errors, autocast, compile, checkpointing, FLOPs, merging, explain."""

import contextlib
import itertools
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import keyspan
from keyspan.backends import load
from keyspan.core.problem import make_problem
from keyspan.dispatch.op import attend
from keyspan.testing import differentiable, results, tolerances, with_inputs, worst
from keyspan.testing.cases import CASES


def qkv(M=5, N=7, H=4, G=2, K=8, V=6, B=2, **kw):
    torch.manual_seed(0)
    return torch.randn(B, M, H, K, **kw), torch.randn(B, N, G, K, **kw), torch.randn(B, N, G, V, **kw)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal):
    q, k, v = qkv(M=6, N=6)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(keyspan.attention(q, k, v, mask=keyspan.Causal() if causal else None), want)


def test_layouts_agree():
    """4-D with grouped heads, 5-D with shared, expanded or separate keys, and 3-D one head at a time: one result."""
    q, k, v = qkv()
    out, lse = keyspan.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 5, 4, 6)
    assert lse.shape == (2, 4, 5)
    five = q.unflatten(2, (2, 2))
    for keys, values in (
        (k[:, :, :, None], v[:, :, :, None]),
        (k[:, :, :, None].expand(-1, -1, -1, 2, -1), v[:, :, :, None].expand(-1, -1, -1, 2, -1)),
        (k[:, :, :, None].repeat(1, 1, 1, 2, 1), v[:, :, :, None]),
    ):
        out5, lse5 = keyspan.attention(five, keys, values, return_lse=True)
        torch.testing.assert_close(out5, out.unflatten(2, (2, 2)))
        torch.testing.assert_close(lse5, lse.unflatten(1, (2, 2)))
    for h in range(4):
        out3, lse3 = keyspan.attention(q[:, :, h], k[:, :, h // 2], v[:, :, h // 2], return_lse=True)
        torch.testing.assert_close(out3, out[:, :, h])
        torch.testing.assert_close(lse3, lse[:, h])


def test_gradient_of_expanded_keys_has_an_entry_for_every_head():
    q = torch.randn(1, 5, 2, 3, 4, dtype=torch.float64)
    k = torch.randn(1, 5, 2, 1, 4, dtype=torch.float64).expand(-1, -1, -1, 3, -1).detach().requires_grad_()
    v = torch.randn(1, 5, 2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda k: keyspan.attention(q, k, v), k.clone().requires_grad_())
    (got,) = torch.autograd.grad(keyspan.attention(q, k, v).sin().sum(), k)
    copied = k.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(keyspan.attention(q, copied, v).sin().sum(), copied)
    torch.testing.assert_close(got, want)


def test_bias_in_five_dims():
    q, k, v = qkv()
    five, k5, v5 = q.unflatten(2, (2, 2)), k[:, :, :, None], v[:, :, :, None]
    bias = torch.randn(2, 4, 5, 7)
    want = keyspan.attention(q, k, v, bias=bias)
    got = keyspan.attention(five, k5, v5, bias=bias.unflatten(1, (2, 2)))
    torch.testing.assert_close(got.flatten(2, 3), want)
    by_group = torch.randn(2, 1, 1, 7)  # one bias per group, where every head has its own keys
    separate = k5.repeat(1, 1, 1, 2, 1), v5.repeat(1, 1, 1, 2, 1)
    got = keyspan.attention(five, *separate, bias=by_group, sinks=torch.zeros(2, 2))
    want = keyspan.attention(q, k, v, bias=by_group.expand(2, 2, 1, 7).flatten(0, 1), sinks=torch.zeros(4))
    torch.testing.assert_close(got.flatten(2, 3), want)


def test_sum_of_biases_is_the_sum():
    q, k, _ = qkv(M=7)
    a, b = (keyspan.RelativeBias(torch.randn(4, 2 * r + 1)) for r in (2, 4))
    s, t = (keyspan.Alibi(torch.rand(4)) for _ in range(2))
    dense = torch.randn(7, 7)

    def picture(*terms):
        out = []
        for term in terms:
            # With V = one-hot keys and no content, the softmax of the bias alone is what comes out.
            eye = torch.eye(7)[None, :, None].expand(1, 7, 2, 7)
            out.append(keyspan.attention(q[:1] * 0, k[:1] * 0, eye, bias=term).log())
        return sum(x - x[..., :1] for x in out)

    total = picture(a + b + s + dense + t)
    torch.testing.assert_close(total, picture(a, b, s, t, dense), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(picture(dense + a), picture(a + dense))


ERRORS = [
    (dict(query=torch.zeros(2, 2)), "query", r"shape \[2, 2\]"),
    (dict(query=torch.zeros(1, 5, 4, 8, dtype=torch.int32)), "query", "int32"),
    (dict(query="q"), "query", "str"),
    (dict(key=torch.zeros(1, 7, 2, 8, dtype=torch.float16)), "key", "float16"),
    (dict(key=torch.zeros(1, 7, 2, 8, device="meta")), "key", "meta"),
    (dict(key=torch.zeros(1, 7, 3, 8), value=torch.zeros(1, 7, 3, 6)), "key", "3 heads"),
    (dict(key=torch.zeros(1, 7, 2, 9)), "key", r"\[1, 7, 2, 9\]"),
    (dict(key=torch.zeros(2, 7, 2, 8)), "value", "batch 1"),
    (dict(value=torch.zeros(1, 6, 2, 6)), "value", "6 keys"),
    (dict(value=torch.zeros(1, 7, 4, 6)), "value", "4 heads"),
    (dict(query=torch.zeros(1, 5, 2, 2, 8), key=torch.zeros(1, 7, 2, 3, 8), value=torch.zeros(1, 7, 2, 1, 6)),
     "key", "3"),
    (dict(query=torch.zeros(3, 5, 4, 8)), "key", "batch 1"),
    (dict(mask="causal"), "mask", "str"),
    (dict(mask=torch.zeros(5, 7)), "mask", "float32"),
    (dict(mask=torch.zeros(5, 8, dtype=torch.bool)), "mask", r"\[5, 8\]"),
    (dict(mask=keyspan.Documents([2, 2])), "q_lengths", "4 in all"),
    (dict(mask=keyspan.Documents([5], [6])), "k_lengths", "6 in all"),
    (dict(mask=keyspan.Documents(torch.tensor([9]), torch.tensor([7]))), "q_lengths", "9 in all"),
    (dict(mask=keyspan.PaddedKeys([5], [3], 8)), "padding", "1 documents of 8"),
    (dict(mask=keyspan.GappyKeys([5], [3], [5])), "k_starts", "up to 8"),
    (dict(mask=keyspan.PagedKeys([5], [3], [[1, 2]], 2)), "key", "N = 7"),
    (dict(mask=keyspan.PagedKeys([5], [3], [[1, 9]], 7)), "block_table", "page 1"),
    (dict(mask=keyspan.PagedKeys([5], [3], [[-1, 0]], 7)), "block_table", "page -1"),
    (dict(mask=keyspan.KeyLengths([3, 4])), "lengths", "2 entries"),
    (dict(mask=keyspan.KeyLengths([8])), "lengths", "up to 8"),
    (dict(mask=keyspan.SharedPrompt([3], [[2]])), "prompt_lengths", "M = 5, N = 7"),
    (dict(mask=keyspan.Causal().lower(1, 6, 7)), "mask", r"\[1, 1, 6\]"),
    (dict(mask=keyspan.Causal().lower(1, 5, 9)), "mask", "N = 9"),
    (dict(value=torch.zeros(1, 7, 2, 0)), "value", r"\[1, 7, 2, 0\]"),
    (dict(query=torch.zeros(1, 1, 4, 8).expand(1, 2**31, 4, 8)), "query", "2147483648"),
    (dict(mask=torch.ones(5, 7, dtype=torch.bool).to_sparse()), "mask", "sparse"),
    (dict(bias=torch.zeros(5, 7).to_sparse()), "bias", "sparse"),
    (dict(bias=keyspan.Alibi(torch.ones(4).to_sparse())), "slopes", "sparse"),
    (dict(scale=1e308), "scale", "1e"),
    (dict(layout="bnhk"), "layout", "'bnhk'"),
    (dict(query=torch.zeros(1, 5, 4, 8).to_sparse()), "query", "sparse"),
    (dict(scale=10**400), "scale", "1000"),
    (dict(bias=torch.zeros(5, 8)), "bias", r"\[5, 8\]"),
    (dict(bias=torch.zeros(5, 7, dtype=torch.bool)), "bias", "bool"),
    (dict(bias="alibi"), "bias", "str"),
    (dict(bias=keyspan.Alibi(torch.ones(3))), "slopes", r"\[3\]"),
    (dict(bias=keyspan.RelativeBias(torch.ones(2, 5))), "table", r"\[2\]"),
    (dict(sinks=torch.zeros(2)), "sinks", r"\[2\]"),
    (dict(sinks=torch.zeros(4, dtype=torch.int64)), "sinks", "int64"),
    (dict(scale=math.nan), "scale", "nan"),
    (dict(scale="1"), "scale", "'1'"),
    (dict(softcap=0.0), "softcap", "0.0"),
    (dict(softcap=-1.0), "softcap", "-1.0"),
    (dict(dropout_p=1.0), "dropout_p", "1.0"),
    (dict(dropout_p=-0.1), "dropout_p", "-0.1"),
    (dict(output_dtype=torch.int8), "output_dtype", "int8"),
    (dict(backend="magic"), "backend", "'magic'"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "name", "got"), ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors_name_the_argument_what_was_got_and_what_was_wanted(changed, name, got):
    given = dict(query=torch.zeros(1, 5, 4, 8), key=torch.zeros(1, 7, 2, 8), value=torch.zeros(1, 7, 2, 6)) | changed
    tensors = [given.pop(n) for n in ("query", "key", "value")]
    with pytest.raises(ValueError, match=rf"^{name}.*got .*{got}.*want"):
        keyspan.attention(*tensors, **given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_in_words(layout):
    q, k, v = qkv()
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 2)], layout=layout)
    for name, call in (
        ("query", lambda: keyspan.attention(nested, nested, nested)),
        ("key", lambda: keyspan.attention(q, nested, nested)),
        ("bias", lambda: keyspan.attention(q, k, v, bias=nested)),
        ("slopes", lambda: keyspan.attention(q, k, v, bias=keyspan.Alibi(nested))),
        ("mask", lambda: keyspan.attention(q, k, v, mask=torch.ones_like(nested, dtype=torch.bool))),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got a nested tensor, want"):
            call()


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_freed_storage_is_refused_in_words(backend):
    if backend == "native" and load("native").reason_against(make_problem(*qkv())[0]) is not None:
        pytest.skip("the native library is not built here")
    for n, name in enumerate(("query", "key", "value")):
        for needed in (False, True):
            given = [x.requires_grad_(needed) for x in qkv()]
            for _ in range(3):
                keyspan.attention(*given, backend=backend)
            given[n].untyped_storage().resize_(0)
            with pytest.raises(ValueError, match=f"^{name}: got a tensor whose storage was freed, want"):
                keyspan.attention(*given, backend=backend)


def test_heads_before_tokens():
    """`layout="bhmk"` is the same call on transposed views, in value, gradient, lse and layout of the output."""
    q, k, v = qkv()
    turned = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    plain = [x.requires_grad_() for x in (q, k, v)]
    kw = dict(mask=keyspan.Causal("bottom_right"), bias=torch.randn(2, 4, 5, 7), sinks=torch.randn(4), return_lse=True)
    for _ in range(4):
        out, lse = keyspan.attention(*turned, **kw, layout="bhmk")
        want, want_lse = keyspan.attention(*plain, **kw)
        assert out.shape == (2, 4, 5, 6)
        assert torch.equal(out, want.transpose(1, 2))
        assert torch.equal(lse, want_lse)
        got = torch.autograd.grad(out.sin().sum(), turned)
        for a, b in zip(got, torch.autograd.grad(want.sin().sum(), plain), strict=True):
            torch.testing.assert_close(a, b.transpose(1, 2))
    with pytest.raises(ValueError, match=r"^query: got shape \[5, 4, 8\], want \[B, H, M, K\] with layout='bhmk'"):
        keyspan.attention(q[0], k[0], v[0], layout="bhmk")


def test_errors_of_another_layout_say_so():
    q, k, v = qkv(B=1)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    hint = r"heads before tokens\? pass layout='bhmk'"
    for kw in ({}, {"mask": keyspan.Documents([5], [7])}, {"sinks": torch.zeros(4)}):
        with pytest.raises(ValueError, match=hint):
            keyspan.attention(*turned, **kw)
    square = [x.transpose(1, 2) for x in qkv(M=8, N=8, B=1, G=4)]  # whose shapes fit, but for the mask's
    with pytest.raises(ValueError, match=hint):
        keyspan.attention(*square, mask=keyspan.Documents([3, 5]))
    with pytest.raises(ValueError, match="tokens first"):
        keyspan.attention(q, k, v, mask=keyspan.Documents([5], [7]), layout="bhmk")
    with pytest.raises(ValueError, match="without a batch"):
        keyspan.attention(q[0], k[0], v[0], mask=keyspan.Documents([5], [7]))
    with pytest.raises(ValueError, match=r"want K|want a last dimension of 8 as in query$"):
        keyspan.attention(q, k[..., :7], v)


def test_a_call_that_looks_like_heads_before_tokens_warns():
    for tokens in (129, 512):
        x = torch.zeros(1, 8, tokens, 16)
        with pytest.warns(UserWarning, match=f"got 8 tokens of {tokens} heads; if heads come before tokens"):
            keyspan.attention(x, x, x, backend="chunked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keyspan.attention(x, x, x, layout="bhmk")
        for tokens in (1, 8):
            decoding = torch.zeros(2, tokens, 128, 16)
            keyspan.attention(decoding, decoding, decoding)


def test_a_softcap_above_all_scores_changes_nothing():
    for backend in ("native", "chunked", "reference"):
        q, k, v = qkv()
        if load(backend).reason_against(make_problem(q, k, v)[0]) is None:
            want = keyspan.attention(q, k, v, backend=backend)
            assert torch.equal(keyspan.attention(q, k, v, softcap=1e39, backend=backend), want)


def test_batched_gradients_are_refused_in_words():
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(4):
        out = keyspan.attention(q, k, v)
        with pytest.raises(RuntimeError, match=r"no rule for torch\.func.*one gradient at a time"):
            torch.autograd.grad(out, (q, k, v), torch.randn(3, *out.shape), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.functional.jacobian(lambda q: keyspan.attention(q, k, v), q, vectorize=True)


CONSTRUCTORS = [
    (
        lambda: replace(keyspan.Causal().lower(1, 5, 7), hi=torch.zeros(2, 1, 5, dtype=torch.int32)),
        "hi",
        r"\[2, 1, 5\]",
    ),
    (lambda: replace(keyspan.Causal().lower(1, 5, 7), lo=torch.zeros(1, 1, 5)), "lo", "float32"),
    (lambda: replace(keyspan.Causal().lower(1, 5, 7), page_size=4), "page_size", "some of"),
    (lambda: keyspan.Documents([1, -2]), "q_lengths", "-2"),
    (lambda: keyspan.Documents([1.5]), "q_lengths", "1.5"),
    (lambda: keyspan.Documents(3), "q_lengths", "3"),
    (lambda: keyspan.Documents([True]), "q_lengths", "True"),
    (lambda: keyspan.Documents(torch.tensor([1.0])), "q_lengths", "float32"),
    (lambda: keyspan.Documents(torch.tensor([-1])), "q_lengths", "-1"),
    (lambda: keyspan.Documents([1], [1, 2]), "k_lengths", "2 documents"),
    (lambda: keyspan.PaddedKeys([1], [5], 4), "k_lengths", "5 keys"),
    (lambda: keyspan.PaddedKeys([1], [1], 0), "padding", "0"),
    (lambda: keyspan.PagedKeys([1], [5], [[0, 1]], 2), "k_lengths", "5 keys"),
    (lambda: keyspan.PagedKeys([1], [1], [0], 2), "block_table", r"\[1\]"),
    (lambda: keyspan.PagedKeys([1], [1], [[0]], -2), "page_size", "-2"),
    (lambda: keyspan.SharedPrompt([1, 2], [[1]]), "answer_lengths", "1 rows"),
    (lambda: keyspan.SharedPrompt([1], torch.tensor([[-1]])), "answer_lengths", "-1"),
    (lambda: keyspan.Window(-1), "left", "-1"),
    (lambda: keyspan.Window(0, 1.5), "right", "1.5"),
    (lambda: keyspan.Causal("middle"), "align", "'middle'"),
    (
        lambda: keyspan.Causal("bottom_right") & keyspan.Window(1, align="top_left"),
        "align",
        "bottom_right and top_left",
    ),
    (lambda: keyspan.SharedPrompt([1], [[1]]) & keyspan.Causal("bottom_right"), "align", "bottom_right"),
    (lambda: keyspan.Documents([math.inf]), "q_lengths", "inf"),
    (lambda: keyspan.SharedPrompt([2], 5), "answer_lengths", "5"),
    (lambda: keyspan.SharedPrompt([2], [[6]]) & keyspan.Sinks(4), "count", "4"),
    (lambda: keyspan.PagedKeys([1], [1], None, 2), "block_table", "None"),
    (lambda: keyspan.PagedKeys([1], [1], torch.ones(1, 1, dtype=torch.bool), 2), "block_table", "bool"),
    (lambda: keyspan.Prefix(-1), "length", "-1"),
    (lambda: keyspan.Sinks(2.0), "count", "2.0"),
    (lambda: keyspan.Documents([1]) & keyspan.KeyLengths([1]), "mask", "Documents & KeyLengths"),
    (lambda: keyspan.Sinks(1) & keyspan.Sinks(2), "mask", "Sinks & Sinks"),
    (lambda: keyspan.Causal().draw(), "M", "None"),
    (lambda: keyspan.Causal().draw(-1, 3), "M", "-1"),
    (lambda: keyspan.Alibi([0.5]), "slopes", "list"),
    (lambda: keyspan.RelativeBias(torch.ones(2, 4)), "table", r"\[2, 4\]"),
]


@pytest.mark.parametrize(("make", "name", "got"), CONSTRUCTORS, ids=lambda x: x if isinstance(x, str) else "")
def test_constructor_errors(make, name, got):
    with pytest.raises(ValueError, match=rf"^{name}.*got .*{got}.*want"):
        make()


def test_the_choice_of_backend_does_not_depend_on_requires_grad(monkeypatch):
    from keyspan.dispatch import api

    seen = []
    choose = api.choose
    monkeypatch.setattr(api, "choose", lambda *given: seen.append(choose(*given)) or seen[-1])
    for needed in (False, True):
        q, k, v = (x.requires_grad_(needed) for x in qkv())
        keyspan.attention(q, k, v)
    assert seen[0] == seen[1]


def test_an_explicit_backend_never_falls_back(monkeypatch):
    from keyspan.backends import reference

    monkeypatch.setattr(reference, "reason_against", lambda problem: "it is Monday")
    with pytest.raises(NotImplementedError, match=r"'reference'.*it is Monday"):
        keyspan.attention(*qkv(), backend="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Inputs are cast to the autocast dtype, lse stays fp32, gradients come back in the inputs' dtype."""
    q, k, v = (x.requires_grad_() for x in qkv())
    bias = torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = keyspan.attention(q, k, v.to(dtype), bias=bias, return_lse=True)
    with torch.autocast("cpu", enabled=False):  # inputs cast by hand
        want, want_lse = keyspan.attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    with torch.autocast("cpu", dtype=dtype):
        out.float().sum().backward()
    assert q.grad.dtype == bias.grad.dtype == torch.float32


def test_output_dtype():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.bfloat16))
    out = keyspan.attention(q, k, v, output_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), keyspan.attention(q, k, v))
    out.sum().backward()
    assert q.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("setting", [{"activation_memory_budget": 0.0}, {"aggressive_recomputation": True}])
def test_dropout_that_would_be_drawn_again_in_backward_is_refused(setting):
    import torch._functorch.config

    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in qkv(M=7))

    def f(q, dropout_p):
        return keyspan.attention(q, k, v, dropout_p=dropout_p).sin().sum()

    with torch._functorch.config.patch(setting):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")
        (got,) = torch.autograd.grad(compiled(q, 0.0), q)
        torch.testing.assert_close(got, torch.autograd.grad(f(q, 0.0), q)[0])
        with pytest.raises(Exception, match="draw another dropout pattern in backward"):
            compiled(q, 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")
    grads = []
    for run in (f, compiled):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(q, 0.3), q)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="torch has no regions")
def test_dropout_in_a_region_with_a_memory_budget_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(M=7))

    def within(budget, dropout_p):
        torch._dynamo.reset()  # otherwise the budget becomes a symbol, which torch does not take

        def f(q):
            with torch.autograd.graph.region_activation_memory_budget(budget):
                return keyspan.attention(q, k, v, dropout_p=dropout_p).sin().sum()

        return torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")(q)

    (got,) = torch.autograd.grad(within(0.0, 0.0), q)
    torch.testing.assert_close(got, torch.autograd.grad(keyspan.attention(q, k, v).sin().sum(), q)[0])
    within(1.0, 0.3)
    with pytest.raises(Exception, match="draw another dropout pattern in backward"):
        within(0.0, 0.3)
    torch._dynamo.reset()


def test_activation_checkpointing_with_dropout():
    q, k, v = (x.requires_grad_() for x in qkv(M=7, dtype=torch.float64))

    def f(q, k, v):
        return keyspan.attention(q, k, v, mask=keyspan.Causal(), dropout_p=0.3)

    grads = []
    for run in (f, lambda *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(q, k, v).sin().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_of_calls_that_are_replayed():
    """Checkpointing runs a call twice and compares what the two save: both must take the same path."""
    q, k, v = (x.requires_grad_() for x in qkv(M=29))  # of a signature that no call had before

    def f(q, k, v):
        return keyspan.attention(q, k, v, mask=keyspan.Causal()).sin().sum()

    found = [torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False), (q, k, v)) for _ in range(3)]
    for _ in range(3):
        want = torch.autograd.grad(f(q, k, v), (q, k, v))
    found.append(torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False), (q, k, v)))
    for got in found:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("terms", ["plain", "all", "paged"])
@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
def test_opcheck(backend, terms):
    q, k, v = qkv(M=6, N=8, B=1)
    if terms == "plain":  # of another order in memory, which that of the results does not follow
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kw = dict(mask=keyspan.Causal("bottom_right"))
    if terms == "all":
        tensors = [torch.randn(s, requires_grad=True) for s in ((4,), (4, 5), (4, 1, 8), (6, 1), (4,))]
        bias = keyspan.Alibi(tensors[0]) + keyspan.RelativeBias(tensors[1]) + tensors[2] + tensors[3]
        kw |= dict(bias=bias, sinks=tensors[4], softcap=2.0, dropout_p=0.2)
    elif terms == "paged":
        kw = dict(mask=keyspan.PagedKeys([2, 4], [3, 4], [[1, 0], [3, 2]], 2) & keyspan.Causal("bottom_right"))
    else:
        kw = {}
    problem, _ = make_problem(q, k, v, **kw)
    if (reason := load(backend).reason_against(problem)) is not None:
        pytest.skip(reason)
    # Leaves: opcheck reads `.grad` of what it is given.
    leaves = {name: x.detach().requires_grad_() for name, x in differentiable(problem).items()}
    problem = with_inputs(problem, leaves)
    torch.library.opcheck(torch.ops.keyspan.attention_forward.default, (*problem, backend))
    out, lse = torch.ops.keyspan.attention_forward(*problem, backend)
    needs = [
        True,
        True,
        True,
        terms == "all",
        terms == "all",
        terms == "all",
        *(terms == "all" for _ in problem.biases),
    ]
    plain = problem._make(x.detach() if isinstance(x, torch.Tensor) else x for x in problem)
    plain = plain._replace(biases=[x.detach() for x in problem.biases])
    args = (torch.randn_like(out), torch.randn_like(lse), out.detach(), lse.detach(), *plain, needs, backend)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.keyspan.attention_backward.default, args, test_utils=utils)


def test_compile_fullgraph_without_recompiling_for_new_lengths():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(q, k, v, lengths, slopes):
        mask = keyspan.Documents(lengths) & keyspan.Causal() & keyspan.Window(5) & keyspan.Sinks(1)
        return keyspan.attention(q, k, v, mask=mask, bias=keyspan.Alibi(slopes), return_lse=True)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    slopes = torch.rand(4, requires_grad=True)
    for lengths in ([5, 4], [1, 8], [9, 0]):
        q, k, v = (x.requires_grad_() for x in qkv(M=9, N=9, B=1))
        got, want = (g(q, k, v, torch.tensor(lengths), slopes) for g in (compiled, f))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(o.sin().sum() + s.sum(), (q, k, v, slopes)) for o, s in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_masks_made_inside_a_compiled_function_take_lengths_as_numbers():
    """Once torch's compiler has symbols for the lengths, other lengths compile nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    q, k, v = qkv(M=9, N=9, B=1)

    def f(a, b):
        return keyspan.attention(q, k, v, mask=keyspan.Documents([a, b]) & keyspan.Causal())

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for lengths in ((4, 5), (3, 6), (2, 7), (7, 2)):
        assert torch.equal(compiled(*lengths), f(*lengths))
    assert counter.frame_count == 2


def test_compiled_with_symbols_for_all_sizes_and_a_bias_made_inside():
    """The heads are a symbol in the query and a number in the slopes."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    q, k, v = qkv(M=9, N=9, B=1)

    def f(q, k, v):
        return keyspan.attention(q, k, v, bias=keyspan.Alibi(torch.full((4,), 0.5)))

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))


def test_masks_and_biases_meet_tensors_inside_a_compiled_function():
    """`&` and `+` with a tensor on either side; no recompile for other values."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    q, k, v = qkv(M=9, N=9, B=1)

    def f(lengths, holes, slopes, dense):
        masks = (keyspan.Documents(lengths) & keyspan.Causal() & holes, holes & keyspan.Window(3))
        biases = (keyspan.Alibi(slopes) + dense, dense + keyspan.Alibi(slopes), sum([keyspan.Alibi(slopes), dense]))
        return [keyspan.attention(q, k, v, mask=mask, bias=bias) for mask in masks for bias in biases]

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for lengths in ([5, 4], [1, 8]):
        given = torch.tensor(lengths), torch.rand(9, 9) < 0.7, torch.rand(4), torch.randn(4, 9, 9)
        for got, want in zip(compiled(*given), f(*given), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1
    exported = torch.export.export(Calls(f), given, strict=True).module()
    for got, want in zip(exported(*given), f(*given), strict=True):
        assert torch.equal(got, want)


def test_the_choice_of_a_backend_is_not_traced(monkeypatch):
    """On CUDA it asks whether Triton is installed and what the device can do, which torch's compiler cannot trace."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from keyspan.backends import triton

    def untraceable(*given):
        with Path(__file__).open():
            return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", untraceable)
    monkeypatch.setattr(triton, "find_spec", untraceable)
    graphs = []

    def log(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    caches = triton._cached_device_reason, triton._cached_float8_reason
    try:
        with FakeTensorMode():
            q = torch.empty(1, 16, 2, 32, device="cuda:0")
            stored = q.to(torch.float8_e4m3fn)
            for k in (q, stored):
                for cached in caches:
                    cached.cache_clear()
                compiled = torch.compile(lambda q, k: keyspan.attention(q, k, k), fullgraph=True, backend=log)
                out = compiled(q, k)
                assert (out.device, out.shape) == (q.device, q.shape)
    finally:
        for cached in caches:
            cached.cache_clear()
    called = [node for graph in graphs for node in graph.graph.nodes if "attention_forward" in str(node.target)]
    assert [node.args[-1] for node in called] == ["triton", "triton"]


class Calls(torch.nn.Module):
    """A function as the module that `torch.export` asks for."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_flop_counter_counts_the_visible_area():
    q, k, v = (x.requires_grad_() for x in qkv(M=64, N=64, B=1))
    for mask, area in ((None, 64 * 64), (keyspan.Causal(), 64 * 65 // 2), (keyspan.Documents([32, 32]), 2 * 32 * 32)):
        with FlopCounterMode(display=False) as counter:
            out = keyspan.attention(q, k, v, mask=mask)
        assert counter.get_total_flops() == 2 * 4 * area * (8 + 6)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 4 * area * (3 * 8 + 2 * 6)


@pytest.mark.parametrize("order", [("keyspan", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "keyspan")])
def test_flops_are_counted_whichever_is_imported_first(order):
    """In a fresh process, with the counter made before the first call."""
    code = f"""
import sys, torch, {order[0]}
assert ("torch.utils.flop_counter" in sys.modules) == (sys.argv[1] == "torch.utils.flop_counter")
import {order[1]}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    keyspan.attention(*(torch.zeros(1, 3, 1, 4) for _ in "qkv"))
assert counter.get_total_flops() == 2 * 3 * 3 * (4 + 4)
loader = torch.utils.flop_counter.__spec__.loader
assert loader.get_source("torch.utils.flop_counter").startswith("# mypy")  # torch's own, as if nobody had looked
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, order[0]], check=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_merge_of_parts_is_the_whole(cuts, seed):
    """Keys split anyhow, parts merged: equal to attention over all keys, in value and in gradient."""
    torch.manual_seed(seed)
    cuts = [0, *sorted(min(c, 9) for c in cuts), 9]
    q, k, v = (torch.randn(2, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9))

    def parts():
        mask = keyspan.Causal("bottom_right").materialize(5, 9)[0]
        spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        return [keyspan.attention(q, k[:, s], v[:, s], mask=mask[:, s], return_lse=True) for s in spans]

    got = keyspan.merge(parts())
    want = keyspan.attention(q, k, v, mask=keyspan.Causal("bottom_right"), return_lse=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(o.sin().sum() + s.cos().sum(), (q, k, v)) for o, s in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_merge_edges():
    out, lse = torch.full((1, 2, 1, 3), torch.nan), torch.full((1, 1, 2), -torch.inf)
    other = torch.ones(1, 2, 1, 3), torch.tensor([[[0.5, -torch.inf]]])
    live = [x.clone().requires_grad_() for x in other]
    keyspan.merge([(out, lse), tuple(live)])[0].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in live)
    merged, total = keyspan.merge([(out, lse), other])
    assert torch.equal(merged[0, 0, 0], torch.ones(3))
    assert torch.equal(merged[0, 1, 0], torch.zeros(3))
    assert torch.equal(total, other[1])
    three, three_lse = keyspan.attention(*(torch.randn(2, 4, 3) for _ in range(3)), return_lse=True)
    torch.testing.assert_close(keyspan.merge([(three, three_lse)])[0], three)
    five = keyspan.attention(torch.randn(1, 3, 2, 2, 4), *(torch.randn(1, 3, 2, 1, 4) for _ in "kv"), return_lse=True)
    torch.testing.assert_close(keyspan.merge([five, five])[0], five[0])
    with pytest.raises(ValueError, match="parts: got none"):
        keyspan.merge([])
    with pytest.raises(ValueError, match=r"parts\[0\]: got Tensor, want a pair"):
        keyspan.merge([three])
    with pytest.raises(ValueError, match=r"parts\[1\]: got out"):
        keyspan.merge([other, (torch.ones(1, 3, 1, 3), torch.ones(1, 1, 3))])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_problems(data):
    """Layout × visibility × bias × dtype × strides × storage, drawn at random, against the fp64 reference."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    G, H = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    K, V = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(["batch", "documents", "padded", "paged", "lengths"]))
    B = draw(st.integers(1, 3)) if kind in ("batch", "lengths") else 1
    q_lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    k_lengths = draw(st.lists(st.integers(0, 12), min_size=len(q_lengths), max_size=len(q_lengths)))
    M = sum(q_lengths)
    pages = torch.randint(0, 5, (len(q_lengths), 4), generator=torch.Generator().manual_seed(B))
    layout, N = {
        "batch": lambda: (None, draw(st.integers(0, 30))),
        "documents": lambda: (keyspan.Documents(q_lengths, k_lengths), sum(k_lengths)),
        "padded": lambda: (keyspan.PaddedKeys(q_lengths, k_lengths, 12), 12 * len(q_lengths)),
        "paged": lambda: (keyspan.PagedKeys(q_lengths, k_lengths, pages, 3), 15),
        "lengths": lambda: (keyspan.KeyLengths([min(n, 20) for n in (*k_lengths, 3, 9)][:B]), 20),
    }[kind]()  # fmt: skip
    align = draw(st.sampled_from(["top_left", "bottom_right"]))
    mask = layout
    for part in (
        keyspan.Causal(align),
        keyspan.Window(draw(st.integers(0, 6)), 2, align),
        keyspan.Sinks(2),
        keyspan.Prefix(1),
    ):
        if draw(st.booleans()):
            mask = part if mask is None else mask & part
    torch.manual_seed(draw(st.integers(0, 99)))
    bias = None
    logical = 12 if kind == "paged" else N
    for term in (keyspan.Alibi(torch.rand(G * H)), keyspan.RelativeBias(torch.randn(G * H, 2 * 3 + 1)),
                 torch.randn(G * H, M, logical), torch.randn(M, 1)):  # fmt: skip
        if draw(st.booleans()):
            bias = term if bias is None else bias + term

    def values(length, heads, dim):
        if draw(st.booleans()):
            return torch.randn(B, heads, dim, length).permute(0, 3, 1, 2)
        return torch.randn(B, length, heads, dim)

    q, k, v = (x.to(dtype).double() for x in (values(M, G * H, K), values(N, G, K), values(N, G, V)))
    scales = {}
    stored = draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn]))
    if stored is not None:
        run = draw(st.sampled_from([n for n in range(1, N + 1) if N % n == 0] or [None]))
        k, scales["key_scale"] = keyspan.quantize(k, stored, run)
        v, scales["value_scale"] = keyspan.quantize(v, stored, draw(st.sampled_from([run, None])))
    problem, _ = make_problem(
        q, k, v, mask=mask, bias=bias, softcap=draw(st.none() | st.just(3.0)),
        sinks=torch.randn(G * H) if draw(st.booleans()) else None, dropout_p=draw(st.sampled_from([0.0, 0.3])),
        **scales,
    )  # fmt: skip
    problem = problem._replace(
        biases=[x.to(dtype).double() for x in problem.biases],
        **{n: x.to(dtype).double() for n in ("slopes", "table", "sinks") if (x := getattr(problem, n)) is not None},
    )
    want = results(lambda p: torch.ops.keyspan.attention_forward(*p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, dtype, want)
    got = results(lambda p: torch.ops.keyspan.attention_forward(*p, "chunked"), problem, dtype)
    for name, x in want.items():
        assert worst(got[name], x) <= allowed[name], name


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradients_past_the_op_are_its_own(backend):
    problem = next(case for case in CASES if case.name == "everything").problem(torch.float32)

    def grads(call, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(lambda p: call(p), problem, torch.float32)

    def by_op(p):
        return torch.ops.keyspan.attention_forward(*p, backend)

    def direct(p):
        out, lse = attend(p, backend)
        assert "Direct" in type(out.grad_fn).__name__
        return out, lse

    for autocast in (False, True):
        want, got = grads(by_op, autocast), grads(direct, autocast)
        assert all(torch.equal(got[name], x) for name, x in want.items())


def test_differentiable_once_whichever_way():
    q, k, v = (x.requires_grad_() for x in qkv())
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with mode:
            out = keyspan.attention(q, k, v)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


def test_saved_tensors_are_asked_for_once():
    seen = []
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: seen.append(x) or x):
        out = keyspan.attention(q, k, v, bias=torch.zeros(1, k.shape[1]).requires_grad_())
    out.sum().backward()
    assert seen
    assert len({id(x) for x in seen}) == len(seen)


def test_explain():
    q, k, v = qkv(M=1024, N=1024, B=1)
    told = keyspan.explain(q, k, v, mask=keyspan.Causal())
    assert told.backend == next(name for name in ("native", "chunked") if told.reasons[name] is None)
    assert told.reasons["reference"] is None
    assert told.visible == 4 * 1024 * 1025 // 2
    assert (told.tiles, told.tiles_skipped) == (10, 6)
    assert told.forward_flops == 2 * told.visible * (8 + 6)
    assert "50.0%" in str(told)
    assert keyspan.explain(q, k, v, mask=keyspan.Documents([256] * 4)).tiles == 4


@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (1, 4, 1, 9), (7, 1), (7, 9)])
def test_what_a_dense_mask_hides_is_not_counted(shape):
    q, k, v = (torch.randn(2, n, h, 4) for n, h in ((7, 4), (9, 2), (9, 2)))
    holes = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    causal = torch.ones(7, 9, dtype=torch.bool).tril()
    visible = int((causal & holes).expand(2, 4, 7, 9).sum())
    assert keyspan.explain(q, k, v, mask=keyspan.Causal() & holes).visible == visible
    with FlopCounterMode(display=False) as counter:
        keyspan.attention(q, k, v, mask=keyspan.Causal() & holes)
    assert counter.get_total_flops() == 2 * visible * (4 + 4)


def test_info_runs_with_torch_alone():
    """No module outside torch's own needs is imported by `import keyspan` or `python -m keyspan.info`."""
    code = (
        "import sys, torch; torchs = set(sys.modules); import keyspan, keyspan.info; "
        "optional = {'tyro', 'rich', 'matplotlib', 'safetensors', 'triton', 'xformers', 'transformers', 'diffusers'}; "
        "bad = optional & (set(sys.modules) - torchs); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    told = subprocess.run(
        [sys.executable, "-m", "keyspan.info", "--json"], check=True, capture_output=True, text=True
    ).stdout
    info = json.loads(told)
    assert info["keyspan"] == keyspan.__version__
    assert info["backends"]["chunked"] is None
    text = subprocess.run([sys.executable, "-m", "keyspan.info"], check=True, capture_output=True, text=True).stdout
    assert "attention.chunked" in text
    assert "available" in text


def test_info_asks_each_backend_about_every_device(monkeypatch):
    """A backend for the accelerator alone is available on a machine that has one."""
    from keyspan import info
    from keyspan.backends import chunked

    assert info.collect()["devices"][0] == "cpu"
    monkeypatch.setattr(info, "find_device", lambda name: torch.device("meta" if name == "auto" else name))
    monkeypatch.setattr(chunked, "reason_against", lambda problem: None if problem.query.is_meta else "not here")
    found = info.collect()
    assert found["devices"] == ["cpu", "meta"]
    assert found["backends"]["chunked"] is None
    assert found["backends"]["native"] is None or "meta" in found["backends"]["native"]


def test_ranges_made_by_hand_are_cut_off_at_the_keys():
    q, k, v = qkv(M=5, N=7)
    wide = torch.full((1, 1, 5), 10**6, dtype=torch.int32)
    got = keyspan.attention(q, k, v, mask=keyspan.KeyRanges(-wide, wide, wide * 0))
    torch.testing.assert_close(got, keyspan.attention(q, k, v))


def test_sums_begin_at_zero_and_foreign_operands_are_refused():
    q, k, v = qkv(M=5, N=7)
    terms = [keyspan.Alibi(torch.rand(4)), keyspan.RelativeBias(torch.randn(4, 5)), torch.randn(5, 7)]
    torch.testing.assert_close(
        keyspan.attention(q, k, v, bias=sum(terms)),
        keyspan.attention(q, k, v, bias=terms[0] + terms[1] + terms[2]),
    )
    tensor = torch.ones(5, 7, dtype=torch.bool)
    for wrong in (
        lambda: 1.0 + terms[0],
        lambda: None & keyspan.Causal(),
        lambda: keyspan.Causal() & 1,
        lambda: tensor | keyspan.Causal(),
        lambda: terms[2] - terms[0],
        lambda: torch.relu(keyspan.Causal()),
    ):
        with pytest.raises((TypeError, ValueError)):
            wrong()


def test_forward_mode_is_refused_not_zero():
    q, k, v = qkv()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward-mode|not implemented"):
        torch.func.jvp(lambda x: keyspan.attention(x, k, v), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev, torch.func.grad])
def test_function_transforms_are_refused_in_words(transform):
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"no rule for torch\.func.*torch\.autograd"):
        transform(lambda x: keyspan.attention(x, k, v).sum())(q[None] if transform is torch.func.vmap else q)


def test_shapes_without_values():
    """On the meta device, which has neither values nor autocast, a call gives the shapes and dtypes of its results."""
    shapes = []
    for device in ("cpu", "meta"):
        q, k, v = (x.to(device).requires_grad_() for x in qkv())
        mask = keyspan.KeyLengths(torch.tensor([5, 7], device=device)) & keyspan.Window(3)
        out, lse = keyspan.attention(q, k, v, mask=mask, return_lse=True)
        (out.sum() + lse.sum()).backward()
        shapes.append([(x.shape, x.dtype) for x in (out, lse, q.grad, k.grad, v.grad)])
        with torch.no_grad():
            assert keyspan.attention(q, k, v, mask=mask).device.type == device
    assert shapes[0] == shapes[1]


def test_wide_block_tables_do_not_overflow():
    """Sequences × pages × page size past 2³¹, with a cache of three pages."""
    table = torch.zeros(3, 2**20, dtype=torch.int32)
    table[:, 0] = torch.arange(3)
    q, k, v = torch.randn(1, 3, 1, 4), torch.randn(1, 3072, 1, 4), torch.randn(1, 3072, 1, 4)
    out = keyspan.attention(q, k, v, mask=keyspan.PagedKeys([1, 1, 1], [5, 5, 5], table, 1024), backend="chunked")
    for n in range(3):
        keys = slice(n * 1024, n * 1024 + 5)
        torch.testing.assert_close(out[:, n], keyspan.attention(q[:, n : n + 1], k[:, keys], v[:, keys])[:, 0])


def test_explain_draws_nothing():
    tensors = qkv()
    state = torch.get_rng_state()
    keyspan.explain(*tensors, dropout_p=0.5, return_lse=True)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"dropout_p: got 1\.5, want"):
        keyspan.explain(*tensors, dropout_p=1.5)
