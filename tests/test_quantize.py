"""Keys, values and queries in 8 bits: `quantize`, and `attention` with scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import keyspan
from keyspan.backends import AUTOMATIC, load
from keyspan.backends.native import binding
from keyspan.core.problem import make_problem

INT8, FP8 = torch.int8, torch.float8_e4m3fn
NATIVE = pytest.mark.skipif(binding.LIBRARY is None, reason="the native library is not built")
STORED = pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)


def qkv(M=5, N=8, H=4, G=2, K=16, V=8, B=2, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(B, n, h, d, dtype=dtype) for n, h, d in ((M, H, K), (N, G, K), (N, G, V)))


def stored(dtype, run=None, **sizes):
    """(query, key, value, scales) with keys and values stored as `dtype`."""
    q, k, v = qkv(**sizes)
    k, key_scale = keyspan.quantize(k, dtype, run)
    v, value_scale = keyspan.quantize(v, dtype, run)
    return q, k, v, {"key_scale": key_scale, "value_scale": value_scale}


def restored(x, scale):
    """The numbers that `x` and its scale represent, in fp64."""
    return x.double() * scale.double().repeat_interleave(x.shape[1] // scale.shape[1], 1)[..., None]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_quantize_rounds_to_the_nearest(data):
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    runs, run = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = torch.randn(shape[0], runs * run, *shape[1:]).mul(10.0 ** draw(st.integers(-6, 6))).to(dtype)
    x[:, :run] *= draw(st.sampled_from([0, 1]))
    for kind in (INT8, FP8):
        got, scale = keyspan.quantize(x, kind, run)
        assert got.dtype == kind
        assert got.shape == x.shape
        assert scale.shape == (shape[0], runs, *shape[1:-1])
        assert scale.dtype == torch.promote_types(dtype, torch.float32)
        largest = scale.double().repeat_interleave(run, 1)[..., None]
        # Half the distance of two neighbours: 1 for int8; for e4m3 an eighth of the number, at least 2⁻⁹.
        apart = largest if kind == INT8 else torch.maximum(x.double().abs() / 8, largest * 2**-9)
        assert ((restored(got, scale) - x.double()).abs() <= apart * 0.5001).all()
        again = keyspan.quantize(x, kind, run)
        assert torch.equal(again[0].view(torch.uint8), got.view(torch.uint8))
        assert torch.equal(again[1], scale)


@STORED
def test_zeros_nan_and_inf(dtype):
    x = torch.ones(1, 8, 2, 4)
    x[0, 0:2] = 0
    x[0, 2, 0, 1] = torch.nan
    x[0, 5, 1, 3] = torch.inf
    x[0, 6:] = 1e-42
    got, scale = keyspan.quantize(x, dtype, 2)
    back = restored(got, scale)
    assert torch.equal(back[0, 0:2], torch.zeros_like(back[0, 0:2]))
    assert torch.equal(scale[0, 0], torch.ones(2))
    assert torch.isnan(back[0, 2:4, 0]).all()
    assert torch.isnan(back[0, 4:6, 1]).all()
    assert torch.isfinite(back[0, 2:4, 1]).all()
    assert torch.isfinite(back[0, 4:, 0]).all()
    for shape in ((1, 0, 2, 4), (0, 8, 2, 4)):
        got, scale = keyspan.quantize(torch.ones(shape), dtype)
        assert got.shape == shape
        assert scale.shape == (shape[0], 1, 2)


QUANTIZE_ERRORS = [
    (dict(x=[1.0]), "x", "list"),
    (dict(x=torch.zeros(1, 8, 2, 4, dtype=torch.int32)), "x", "int32"),
    (dict(x=torch.zeros(8, 4)), "x", r"\[8, 4\]"),
    (dict(x=torch.zeros(1, 8, 2, 4, requires_grad=True)), "x", "requires a gradient"),
    (dict(dtype=torch.float16), "dtype", "float16"),
    (dict(run=3), "run", "3"),
    (dict(run=0), "run", "0"),
    (dict(run=2.0), "run", "2.0"),
]


@pytest.mark.parametrize(("changed", "name", "got"), QUANTIZE_ERRORS)
def test_quantize_errors_name_the_argument(changed, name, got):
    with pytest.raises(ValueError, match=rf"^{name}.*got .*{got}.*want"):
        keyspan.quantize(**(dict(x=torch.zeros(1, 8, 2, 4), dtype=INT8) | changed))


ONE = torch.ones(())
ERRORS = [
    (dict(key=INT8, value=INT8), "key_scale", "None"),
    (dict(key=INT8, value=INT8, key_scale=ONE), "value_scale", "None"),
    (dict(key=FP8, value=INT8), "value", "int8"),
    (dict(value=FP8), "value", "float8_e4m3fn"),
    (dict(key=torch.float8_e5m2, value=torch.float8_e5m2), "key", "float8_e5m2"),
    (dict(query=INT8, key=INT8, value=INT8), "query", "int8"),
    (dict(query=FP8), "key", "float32"),
    (dict(query=FP8, key=INT8, value=INT8), "key", "int8"),
    (dict(key_scale=ONE), "key_scale", "a tensor"),
    (dict(query_scale=ONE, key=FP8, value=FP8), "query_scale", "a tensor"),
    (dict(key=FP8, value=FP8, key_scale=0.5), "key_scale", "float"),
    (dict(key=FP8, value=FP8, key_scale=torch.ones(1, dtype=torch.int64)), "key_scale", "int64"),
    (dict(key=FP8, value=FP8, value_scale=torch.ones(2, 3, 2)), "value_scale", r"\[2, 3, 2\]"),
    (dict(key=FP8, value=FP8, value_scale=torch.ones(2, 4, 4)), "value_scale", r"\[2, 4, 4\]"),
    (dict(key=FP8, value=FP8, value_scale=torch.ones(3, 4, 2)), "value_scale", r"\[3, 4, 2\]"),
    (dict(key=FP8, value=FP8, value_scale=torch.ones(4, 2)), "value_scale", r"\[4, 2\]"),
    (dict(key=FP8, value=FP8, value_scale=torch.ones(1, device="meta")), "value_scale", "meta"),
    (dict(query=FP8, key=FP8, value=FP8, query_scale=torch.ones(2, 2, 4)), "query_scale", r"\[2, 2, 4\]"),
    (dict(key=FP8, value=FP8, output_dtype=FP8), "output_dtype", "float8_e4m3fn"),
]


@pytest.mark.parametrize(("changed", "name", "got"), ERRORS)
def test_attention_errors_name_the_argument(changed, name, got):
    given = dict(zip(("query", "key", "value"), qkv(), strict=True))
    for n, x in changed.items():
        given[n] = given[n].to(x) if n in ("query", "key", "value") else x
    tensors = [given.pop(n) for n in ("query", "key", "value")]
    with pytest.raises(ValueError, match=rf"^{name}.*got .*{got}.*want"):
        keyspan.attention(*tensors, **given)


@pytest.mark.parametrize(
    "name", ["query", "bias", "slopes", "table", "sinks", "key_scale", "value_scale", "key", "query_scale"]
)
def test_gradients_are_refused(name):
    given = dict(zip(("query", "key", "value"), (x.to(FP8) for x in qkv()), strict=True))
    given |= {"key_scale": torch.ones(2, 1, 2), "value_scale": ONE.clone(), "query_scale": ONE.clone()}
    terms = {"bias": torch.zeros(5, 8), "slopes": torch.ones(4), "table": torch.ones(4, 3), "sinks": torch.ones(4)}

    def call(needed):
        tensors = {n: x.detach().clone().requires_grad_(needed and n == name) for n, x in (given | terms).items()}
        bias = tensors.pop("bias") + keyspan.Alibi(tensors.pop("slopes")) + keyspan.RelativeBias(tensors.pop("table"))
        qkv = [tensors.pop(n) for n in ("query", "key", "value")]
        return keyspan.attention(*qkv, bias=bias, **tensors)

    with pytest.raises(ValueError, match=rf"^{name}: got a tensor that requires a gradient, want none"):
        call(True)
    with torch.no_grad():
        want = call(True)
    assert torch.equal(call(False), want)


def test_gradients_are_refused_by_transforms_and_by_the_op():
    q, k, v, scales = stored(INT8)
    with pytest.raises(ValueError, match=r"^query: got a tensor that requires a gradient"):
        torch.func.grad(lambda x: keyspan.attention(x, k, v, **scales).sum())(q)
    problem = make_problem(q, k, v, **scales)[0]
    problem = problem._replace(query=problem.query.requires_grad_())
    out, _ = torch.ops.keyspan.attention_forward(*problem, "chunked")
    with pytest.raises(RuntimeError, match=r"no gradient where keys are torch\.int8"):
        out.sum().backward()


@pytest.mark.parametrize("run", [None, 1, 4], ids=str)
@STORED
def test_equals_attention_over_the_dequantized_numbers(dtype, run):
    q, k, v, scales = stored(dtype, run)
    got = keyspan.attention(q, k, v, mask=keyspan.Causal(), **scales)
    full = (restored(x, scales[name]).float() for x, name in ((k, "key_scale"), (v, "value_scale")))
    torch.testing.assert_close(got, keyspan.attention(q, *full, mask=keyspan.Causal()))
    assert got.dtype == q.dtype


def test_fp8_without_a_scale():
    q, k, v = (x.to(FP8) for x in qkv())
    want = keyspan.attention(*(x.float() for x in (q, k, v)))
    torch.testing.assert_close(keyspan.attention(q, k, v, output_dtype=torch.float32), want)
    torch.testing.assert_close(keyspan.attention(q.float(), k, v), want)
    out, lse = keyspan.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("run", [None, 4], ids=str)
def test_layouts_agree(run):
    q, k, v, scales = stored(INT8, run)
    want = keyspan.attention(q, k, v, **scales)
    five, k5, v5 = q.unflatten(2, (2, 2)), k[:, :, :, None], v[:, :, :, None]
    by_five = {name: x[..., None] for name, x in scales.items()}
    torch.testing.assert_close(keyspan.attention(five, k5, v5, **by_five).flatten(2, 3), want)
    # A scale per head of a group distinguishes their keys.
    expanded = [x.expand(-1, -1, -1, 2, -1) for x in (k5, v5)]
    by_head = {name: x.expand(-1, -1, -1, 2) * torch.tensor([1.0, 2.0]) for name, x in by_five.items()}
    got = keyspan.attention(five, *expanded, **by_head)
    torch.testing.assert_close(got[:, :, :, 0], keyspan.attention(five, k5, v5, **by_five)[:, :, :, 0])
    doubled = keyspan.attention(five, k5, v5, **{name: x * 2 for name, x in by_five.items()})
    torch.testing.assert_close(got[:, :, :, 1], doubled[:, :, :, 1])
    for h in range(4):
        by_three = {name: x[..., h // 2] for name, x in scales.items()}
        got = keyspan.attention(q[:, :, h], k[:, :, h // 2], v[:, :, h // 2], **by_three)
        torch.testing.assert_close(got, want[:, :, h])


def test_scales_broadcast():
    q, k, v, _ = stored(INT8)
    want = keyspan.attention(q, k, v, key_scale=torch.full((2, 8, 2), 0.01), value_scale=torch.full((2, 1, 2), 0.5))
    for a in (torch.tensor(0.01), torch.full((1,), 0.01), torch.full((1, 4, 1), 0.01), torch.full((2, 1, 1), 0.01)):
        got = keyspan.attention(q, k, v, key_scale=a.double(), value_scale=torch.full((1, 2, 2), 0.5).half())
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_scales_of_any_sign(sign):
    q, k, v, scales = stored(FP8)
    full = restored(k, scales["key_scale"]).float() * sign, restored(v, scales["value_scale"]).float() * sign
    got = keyspan.attention(q, k, v, **{name: x * sign for name, x in scales.items()})
    torch.testing.assert_close(got, keyspan.attention(q, *full))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_scales_of_invisible_keys_do_not_leak(backend, special):
    q, k, v, scales = stored(FP8, 2, B=1, M=3)
    mask = keyspan.GappyKeys([3], [2], [4])
    want = keyspan.attention(q, k, v, mask=mask, backend=backend, **scales)
    for x in scales.values():
        x[:, :1] = x[:, 3:] = special
    got = keyspan.attention(q, k, v, mask=mask, backend=backend, **scales)
    assert torch.equal(got, want)


@STORED
def test_explain_counts_stored_bytes(dtype):
    q, k, v, scales = stored(dtype, 4)
    told = keyspan.explain(q, k, v, **scales)
    assert told.backend in ("native", "chunked")
    moved = 2 * 5 * 4 * 16 * 4 + 2 * 8 * 2 * (16 + 8) * 1 + 2 * (2 * 2 * 2) * 4 + 2 * 5 * 4 * (8 + 1) * 4
    assert told.bytes == moved
    assert str(dtype)[6:] in told.shape


@NATIVE
def test_native_refuses_with_a_reason():
    q, k, v, scales = stored(INT8)
    spread = torch.empty(2, 8, 16, 2, dtype=INT8).transpose(2, 3).copy_(k)
    with pytest.raises(NotImplementedError, match=r"'native'.*side by side in each head, and key has strides"):
        keyspan.attention(q, spread, v, backend="native", **scales)
    problem = make_problem(q, spread, v, **scales)[0]
    assert [name for name in AUTOMATIC if load(name).reason_against(problem) is None] == ["chunked"]
    problem = make_problem(q, k, v, **scales)[0]
    assert next(name for name in AUTOMATIC if load(name).reason_against(problem) is None) == "native"


@NATIVE
@pytest.mark.parametrize(
    ("H", "G", "K", "V"), [(6, 2, 40, 24), (4, 4, 64, 64), (12, 1, 128, 72), (3, 3, 3, 5), (10, 2, 80, 129)]
)
@pytest.mark.parametrize("isa", binding.SUPPORTED)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@STORED
def test_bits_of_a_row_do_not_depend_on_what_is_computed_with_it(dtype, of, isa, H, G, K, V):
    """Tiles of many rows and decoding of one, from pages and from consecutive keys."""
    with binding.use_isa(isa):
        _check_bits(dtype, of, dict(H=H, G=G, K=K, V=V))


def _check_bits(dtype, of, sizes):
    q, k, v, scales = stored(dtype, 1, M=600, N=600, B=1, **sizes)
    q = q.to(of)
    want = keyspan.attention(q, k, v, mask=keyspan.Causal(), backend="native", **scales)
    for row in (0, 1, 255, 256, 400, 599):
        seen = {name: x[:, : row + 1] for name, x in scales.items()}
        alone = keyspan.attention(q[:, row : row + 1], k[:, : row + 1], v[:, : row + 1], backend="native", **seen)
        assert torch.equal(alone[0, 0], want[0, row])
    order = torch.randperm(150)
    slots = (order[:, None] * 4 + torch.arange(4)).flatten()
    paged = [x[:, slots.argsort()] for x in (k, v)]
    moved = {name: x[:, slots.argsort()] for name, x in scales.items()}
    mask = keyspan.PagedKeys([600], [600], order[None].int(), 4) & keyspan.Causal("bottom_right")
    assert torch.equal(keyspan.attention(q, *paged, mask=mask, backend="native", **moved), want)


@NATIVE
@pytest.mark.parametrize("isa", binding.SUPPORTED)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@STORED
def test_native_multiplies_all_numbers_of_8_bits_exactly(dtype, of, isa):
    """One key, so that the output is its value, and the score a sum of stored numbers with a query of ones."""
    every = torch.arange(-128, 128, dtype=torch.int8).view(dtype)
    every = every[~every.float().isnan()]
    one = torch.ones((), dtype=torch.float32)
    with binding.use_isa(isa):
        for row in every.split(8):
            key = value = row.view(1, 1, 1, -1)
            query = torch.ones(1, 1, 1, len(row), dtype=of)
            out, lse = keyspan.attention(
                query, key, value, scale=1.0, key_scale=one, value_scale=one, return_lse=True, backend="native"
            )
            assert torch.equal(out.flatten().float(), row.float())
            assert lse.item() == row.float().sum().item()


@NATIVE
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40], ids="{} rows".format)
@STORED
def test_scales_that_are_not_finite_on_native(dtype, rows, of, special):
    """They reach the rows that see their keys, and no others, in decoding and in tiles; so do numbers that are NaN."""
    q, k, v, scales = stored(dtype, 1, B=1, M=rows, N=300, K=24, V=40)
    q = q.to(of)
    seen = torch.rand(rows, 300) < 0.7
    seen[:, 7] = torch.arange(rows) % 2 == 1
    want = keyspan.attention(q, k, v, mask=seen, backend="native", **scales)
    for name in ("key_scale", "value_scale"):
        spoiled = scales | {name: scales[name].clone()}
        spoiled[name][:, 7] = special
        got = keyspan.attention(q, k, v, mask=seen, backend="native", **spoiled)
        assert torch.equal(got[:, ~seen[:, 7]], want[:, ~seen[:, 7]])
        assert not got[:, seen[:, 7]].isfinite().any()
    if dtype == FP8:
        spoiled = v.clone()
        spoiled.view(torch.int8)[:, 7] = 127
        got = keyspan.attention(q, k, spoiled, mask=seen, backend="native", **scales)
        assert torch.equal(got[:, ~seen[:, 7]], want[:, ~seen[:, 7]])
        assert got[:, seen[:, 7]].isnan().all()


@NATIVE
@STORED
def test_native_reads_heads_before_keys(dtype):
    q, k, v, scales = stored(dtype, 1, M=2, N=300)
    want = keyspan.attention(q, k, v, backend="native", **scales)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(keyspan.attention(q, *apart, backend="native", **scales), want)


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_triton_refuses_fp8_where_nothing_converts_it(monkeypatch, capability, can):
    from keyspan.backends import triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "this GPU")
    reason = triton._cached_float8_reason.__wrapped__(0)
    assert (reason is None) == can
    assert can or "this GPU" in reason


def test_autocast_does_not_cast_stored_numbers():
    q, k, v, scales = stored(FP8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = keyspan.attention(q, k, v, **scales)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, keyspan.attention(q.bfloat16(), k, v, **scales))


@STORED
def test_the_registered_op(dtype):
    q, k, v, scales = stored(dtype, 4)
    if dtype == FP8:
        q, scales["query_scale"] = keyspan.quantize(q, FP8)
    problem = make_problem(q, k, v, mask=keyspan.Causal(), **scales)[0]
    torch.library.opcheck(
        torch.ops.keyspan.attention_forward.default,
        (*problem, "chunked"),
        # opcheck's schema test sums its inputs, which torch cannot do in fp8.
        test_utils=("test_faketensor", *(("test_schema", "test_autograd_registration") if dtype == INT8 else ())),
    )
    with FlopCounterMode(display=False) as counter:
        keyspan.attention(q, k, v, mask=keyspan.Causal(), **scales)
    assert counter.get_total_flops() == 2 * 2 * 4 * 15 * (16 + 8)


@STORED
def test_compiles_as_one_graph(dtype):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    q, k, v, scales = stored(dtype, 4)

    def f(q, k, v, scales):
        return keyspan.attention(q, k, v, mask=keyspan.Causal(), **scales)

    got = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v, scales)
    assert torch.equal(got, f(q, k, v, scales))


def test_memory_holds_no_copy_of_the_cache_in_another_dtype():
    from keyspan.testing import peak_memory

    N = 2**16
    q, k = torch.randn(1, 1, 1, 64), torch.zeros(1, N, 1, 64, dtype=INT8)
    torch.use_deterministic_algorithms(False)
    peak = peak_memory(lambda: keyspan.attention(q, k, k, key_scale=ONE, value_scale=ONE, backend="chunked"))
    assert peak < k.numel() * 4 / 2
