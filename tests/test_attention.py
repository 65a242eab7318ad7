"""`keyspan.attention` as users call it: layouts, autocast, the choice of a backend, merging, explain, info."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import keyspan
from keyspan.backends import load
from keyspan.core.problem import make_problem
from keyspan.testing import results, tolerances, worst


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


def test_a_softcap_above_all_scores_changes_nothing():
    for backend in ("native", "chunked", "reference"):
        q, k, v = qkv()
        if load(backend).reason_against(make_problem(q, k, v)[0]) is None:
            want = keyspan.attention(q, k, v, backend=backend)
            assert torch.equal(keyspan.attention(q, k, v, softcap=1e39, backend=backend), want)


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
