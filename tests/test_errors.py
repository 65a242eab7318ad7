"""Wrong calls of `keyspan.attention` and of masks: each error names the argument, what was got and what was wanted."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

import keyspan
from keyspan.backends import load
from keyspan.core.problem import make_problem
from test_attention import qkv

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
    (dict(mask=keyspan.Causal), "mask", "Causal,"),
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


def test_hints_stand_where_they_help():
    q, k, v = torch.zeros(1, 10, 8, 4), torch.zeros(1, 10, 2, 4), torch.zeros(1, 10, 2, 4)
    for lengths in ([0, 3, 10], torch.tensor([0, 3, 10])):
        with pytest.raises(ValueError, match=r"13 in all, .* cumulative\? Documents.from_cu_seqlens takes such"):
            keyspan.attention(q, k, v, mask=keyspan.Documents(lengths))
    with pytest.raises(ValueError, match=r"9 in all, want M = 10$"):
        keyspan.attention(q, k, v, mask=keyspan.Documents([3, 6]))
    with pytest.raises(ValueError, match=r"dropout_p: got 1.0, want a probability in \[0, 1\)$"):
        keyspan.attention(q, k, v, dropout_p=1.0)


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


def test_forward_mode_is_refused_not_zero():
    q, k, v = qkv()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward-mode|not implemented"):
        torch.func.jvp(lambda x: keyspan.attention(x, k, v), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev, torch.func.grad])
def test_function_transforms_are_refused_in_words(transform):
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"no rule for torch\.func.*torch\.autograd"):
        transform(lambda x: keyspan.attention(x, k, v).sum())(q[None] if transform is torch.func.vmap else q)
