"""Every backend on every case against the fp64 reference: output, lse, and the gradient of every input."""

import pytest
import torch

import keyspan
from keyspan import Causal
from keyspan.backends import Needs, load
from keyspan.bench.works import SHAPES
from keyspan.dispatch.op import attend
from keyspan.testing import flash_emulation, results, rms_error, textbook, tolerances, worst
from keyspan.testing.cases import (
    CASES,
    LONG,
    SHORT,
    Case,
    errors_of_gradients_in_parts,
    malformed,
    position_gradient_errors,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def accepts(backend, dtype):
    """Whether a backend runs here for this dtype; triton is tested in tests/gpu."""
    return load(backend).reason_against(probe(torch.zeros(1, 1, 1, 1, 1, dtype=dtype))) is None


def probe(q):
    return CASES[0].problem(q.dtype)._replace(query=q, key=q[..., 0], value=q[..., 0], output_dtype=q.dtype)


RUNNABLE = [name for name in keyspan.BACKENDS if accepts(name, torch.float32)]
TESTED = [name for name in RUNNABLE if name != "reference"]
TYPED = [(name, dtype) for name in TESTED for dtype in DTYPES if accepts(name, dtype)]


def solved_by(*choices):
    """Every choice (a tuple that begins with a backend) with every case of it: `native` takes no 8-bit queries."""
    of_native = [case for case in CASES if case.query_run is None]
    pairs = [(*choice, case) for choice in choices for case in (of_native if choice[0] == "native" else CASES)]
    names = (*("backend", "dtype")[: len(choices[0])], "case")
    return pytest.mark.parametrize(names, pairs, ids=lambda x: getattr(x, "name", None) or str(x))


by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(got, want, allowed):
    for name, x in want.items():
        error = worst(got[name], x)
        assert error <= allowed[name], f"{name}: error {error:.3g}, allowed {allowed[name]:.3g}"


@by_name
def test_reference_agrees_with_the_textbook_form(case):
    problem = case.problem()
    want = results(lambda p: textbook(p, torch.float64), problem, torch.float64)
    got = results(lambda p: attend(p, "reference"), problem, torch.float64)
    check(got, want, tolerances(problem, torch.float64, want))


@solved_by(*TYPED)
def test_backend_agrees_with_reference(case, backend, dtype):
    problem = case.problem(dtype)
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got = results(lambda p: attend(p, backend), problem, dtype)
    check(got, want, tolerances(problem, dtype, want))


@pytest.mark.parametrize(("backend", "dtype"), [x for x in TYPED if x[1] != torch.float64], ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_error_is_at_most_that_of_flash_attention(case, backend, dtype):
    """Before the output is rounded: a tolerance that comes from a cruder formula would hide a lossy shortcut."""
    problem = case.problem(dtype)

    def error(f):
        got = results(lambda p: f(p._replace(output_dtype=torch.float32)), problem, dtype)
        return rms_error(got, want)

    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got, allowed = error(lambda p: attend(p, backend)), error(lambda p: flash_emulation(p, dtype))
    many = [name for name, x in want.items() if x.numel() > 100]  # the mean of fewer errors is chance
    assert {name: got[name] / allowed[name] for name in many if got[name] > 1.1 * allowed[name]} == {}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_by_position_do_not_gather_the_rounding_of_the_output(backend, dtype, sinks):
    errors = position_gradient_errors(backend, dtype, 300, 1000, sinks)
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_of_a_part_of_the_keys_with_the_lse_of_all(backend, parts):
    errors = errors_of_gradients_in_parts(backend, parts)
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_real_models(name, backend):
    """The heads and head dims that the benchmarks measure."""
    heads, kv_heads, dim = SHAPES[name]
    case = Case(name, M=20, N=29, heads=heads, kv_heads=kv_heads, K=dim, V=dim, mask=lambda: Causal("bottom_right"))
    problem = case.problem(torch.float32)
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got = results(lambda p: attend(p, backend), problem, torch.float32)
    check(got, want, tolerances(problem, torch.float32, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", ["one key more", "one key less", "diagonal off by one"])
@pytest.mark.parametrize(
    "name",
    [
        "prefix lm",
        "documents, cross, causal",
        "window and sinks",
        "int8, a scale per key, window and sinks",
        "fp8 query, window",
    ],
)
def test_one_key_wrong_fails_the_tolerance(name, wrong, dtype):
    case = next(c for c in CASES if c.name == name)
    problem = case.problem(dtype)
    row = problem.hi.shape[-1] // 2
    hi, lo, diagonal = problem.hi.clone(), problem.lo.clone(), problem.diagonal.clone()
    if wrong == "one key more":
        hi[-1, :, row] += 1
    elif wrong == "one key less":
        lo[-1, :, row] += 1
    elif problem.slopes is None:
        pytest.skip("a case without positions has no diagonal to get wrong")
    else:
        diagonal[-1, :, row] += 1
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, dtype, want)
    got = results(lambda p: attend(p, "chunked"), problem._replace(hi=hi, lo=lo, diagonal=diagonal), dtype)
    assert any(worst(got[name], want[name]) > allowed[name] for name in ("out", "lse", "dquery") if name in want)


@pytest.mark.parametrize("name", ["query_scale", "key_scale", "value_scale"])
@pytest.mark.parametrize("case", [case for case in CASES if case.stored and case.N], ids=lambda case: case.name)
def test_neighbouring_scale_fails_the_tolerance(case, name):
    problem = case.problem(torch.bfloat16)
    scale = getattr(problem, name)
    if scale is None or scale[0].unique().numel() == 1:
        pytest.skip("all scales are equal")
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, torch.bfloat16, want)
    moved = scale.roll(1, 1 if scale.shape[1] > 1 else 2)
    got = results(lambda p: attend(p, "chunked"), problem._replace(**{name: moved}), torch.bfloat16)
    assert any(worst(got[name], want[name]) > allowed[name] for name in want)


@solved_by(*((backend,) for backend in TESTED))
def test_runs_are_bitwise_equal(case, backend):
    problem = case.problem(torch.float32)
    first, second = (results(lambda p: attend(p, backend), problem, torch.float32) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_nan_in_hidden_keys_does_not_leak(backend, special, softcap):
    """A document full of NaN or inf does not reach another document."""
    torch.manual_seed(0)
    lengths = SHORT
    bad = slice(5, 14)  # the document of 9 tokens
    q, k, v = (torch.randn(1, 63, 2, 8) for _ in range(3))
    mask = keyspan.Documents(lengths) & keyspan.Causal()

    def run(q, k, v):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = keyspan.attention(*inputs, mask=mask, softcap=softcap, return_lse=True, backend=backend)
        keep = torch.ones(63, dtype=torch.bool)
        keep[bad] = False
        grads = torch.autograd.grad((out.cos() * 2).sum() + lse.sum(), inputs)
        return [x[:, keep] for x in (out, *grads)] + [lse[..., keep]]

    clean = run(q, k, v)
    for tensor in (q, k, v):
        tensor[:, bad] = special
    for name, x, y in zip(("out", "dq", "dk", "dv", "lse"), run(q, k, v), clean, strict=True):
        assert torch.isfinite(x).all(), name
        torch.testing.assert_close(x, y, msg=name)


@pytest.mark.parametrize("backend", TESTED)
def test_visible_nan_reaches_the_output(backend):
    q, k, v = (torch.randn(1, 9, 1, 8) for _ in range(3))
    v[0, 4, 0, 2] = torch.nan
    v[0, 6, 0, 3] = torch.inf
    out = keyspan.attention(q, k, v, mask=keyspan.Causal(), backend=backend)[0, :, 0]
    assert torch.isnan(out[4:, 2]).all()
    assert torch.isinf(out[6:, 3]).all()
    assert torch.isfinite(out[:4]).all()


@pytest.mark.parametrize("special", ["query", "key", "scale of the key"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_visible_nan_reaches_output_lse_and_their_merge(backend, special):
    q, k, v = (torch.randn(1, 9, 1, 8) for _ in range(3))
    scales = {}
    if special == "scale of the key":
        (k, scales["key_scale"]), (v, scales["value_scale"]) = (keyspan.quantize(x, torch.int8, 1) for x in (k, v))
        scales["key_scale"][0, 4] = torch.nan
    else:
        (q if special == "query" else k)[0, 4, 0, 2] = torch.nan
    part = keyspan.attention(q, k, v, mask=keyspan.Causal(), return_lse=True, backend=backend, **scales)
    hit = torch.arange(9) == 4 if special == "query" else torch.arange(9) >= 4
    other = torch.randn(1, 9, 1, 8), torch.randn(1, 1, 9)
    for out, lse in (part, keyspan.merge([part, other]), keyspan.merge([other, part])):
        assert torch.equal(torch.isnan(out).all(-1)[0, :, 0], hit)
        assert torch.equal(torch.isnan(lse)[0, 0], hit)


@pytest.mark.parametrize("sink", [None, "small", "as hidden"])
@pytest.mark.parametrize("value", [-1e4, -1e6, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_weights_of_a_row_that_a_bias_hides_sum_to_one(backend, value, sink):
    """Whatever the bias: seen by the gradient of the values, which each weight multiplies."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 9, 1, 8), torch.randn(1, 300, 1, 8)
    v = torch.ones(1, 300, 1, 8, requires_grad=True)
    bias = torch.randn(9, 300)
    bias[3] = value
    sinks = None if sink is None else torch.tensor([value if sink == "as hidden" else 0.0], requires_grad=True)
    out, lse = keyspan.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, backend=backend)
    share = out.detach()[0, 3].mean()
    inputs = [v] if sinks is None else [v, sinks]
    dv, *dsinks = torch.autograd.grad(out[0, 3].sum() + lse[0, 0, 3], inputs)
    torch.testing.assert_close(dv.sum((0, 1, 2)), share.expand(8))
    if sink != "small":
        assert 0.9 < share < 1.00001
        assert torch.isfinite(lse).all()
    for grad in dsinks:
        # Of Σ out · 8 the sink takes share (1 − share) away for each entry; to lse it gives what the keys do not have.
        torch.testing.assert_close(grad[0], (1 - share) * (1 - 8 * share), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_large_lse_of_other_keys_is_kept(backend):
    """Backward of a part of the keys from the lse of all of them: weights that do not sum to 1 are right there."""
    torch.manual_seed(0)
    case = Case("a part", M=9, N=40, heads=1, kv_heads=1, bias=((9, 40),))
    problem = case.problem(torch.float32)
    problem = problem._replace(output_dtype=torch.float32, **{
        name: getattr(problem, name).float() for name in ("query", "key", "value")}, biases=[
            problem.biases[0].float() - 500])  # fmt: skip
    part = problem._replace(key=problem.key[:, :20], value=problem.value[:, :20], hi=problem.hi.clamp(max=20),
                            biases=[problem.biases[0][..., :20]])  # fmt: skip
    needs = Needs(True, True, True, False, False, False, [True])
    module = load(backend)
    out, lse = module.forward(problem)
    grad = torch.randn_like(out)
    whole = module.backward(problem, grad, None, out, lse, needs)
    some = module.backward(part, grad, None, out, lse, needs)
    if backend != "reference":  # which has no use for lse
        torch.testing.assert_close(some.key, whole.key[:, :20], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(some.value, whole.value[:, :20], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True], ids=["", "dense bias"])
@pytest.mark.parametrize("value", [-(2**31), -1, 29, 1000, 2**31 - 1])
@pytest.mark.parametrize("field", ["lo", "hi", "diagonal", "sequence", "block_table"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_malformed_ranges_read_nothing_outside_of_the_tensors(backend, field, value, dense):
    problem = malformed(field, value, dense)
    out, lse = load(backend).forward(problem)
    biases = [True] * len(problem.biases)
    gradients = load(backend).backward(
        problem, torch.randn_like(out), None, out, lse, Needs(True, True, True, *[False] * 3, biases)
    )
    for x in (out, torch.where(lse == -torch.inf, 0, lse), *gradients[:3], *gradients.biases):
        assert torch.isfinite(x).all()
    torch.testing.assert_close(out, load("reference").forward(problem)[0])


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if accepts(name, torch.float64)])
def test_gradcheck(backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, h, d, dtype=torch.float64, requires_grad=True)
               for n, h, d in ((5, 4, 3), (7, 2, 3), (7, 2, 2)))  # fmt: skip
    slopes, sinks = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(4, 1, 7, dtype=torch.float64, requires_grad=True)

    def f(q, k, v, slopes, table, dense, sinks):
        return keyspan.attention(
            q, k, v, mask=keyspan.Causal("bottom_right") & keyspan.Window(3), softcap=3.0, sinks=sinks,
            bias=keyspan.Alibi(slopes) + keyspan.RelativeBias(table) + dense, return_lse=True, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (q, k, v, slopes, table, dense, sinks))


@pytest.mark.parametrize("name", ["query", "key", "value", "slopes", "table", "sinks", "dense"])
@pytest.mark.parametrize("backend", TESTED)
def test_each_gradient_alone(backend, name):
    """An input's gradient is the same whether or not others are needed."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(1, 5, 2, 4) for name in ("query", "key", "value")}
    inputs |= {"slopes": torch.rand(2), "table": torch.randn(2, 5), "sinks": torch.randn(2), "dense": torch.randn(5, 5)}

    def grads(needed):
        x = {n: t.clone().requires_grad_(n in needed) for n, t in inputs.items()}
        bias = keyspan.Alibi(x["slopes"]) + keyspan.RelativeBias(x["table"]) + x["dense"]
        out = keyspan.attention(x["query"], x["key"], x["value"], mask=keyspan.Causal(), bias=bias,
                                sinks=x["sinks"], backend=backend)  # fmt: skip
        out.cos().sum().backward()
        return {n: t.grad for n, t in x.items()}

    alone, together = grads({name}), grads(set(inputs))
    assert torch.equal(alone[name], together[name])
    assert together[name].abs().sum() > 0
    assert [n for n, g in alone.items() if g is not None] == [name]


def test_double_backward_is_refused():
    q = torch.randn(1, 4, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(keyspan.attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_memory_is_linear_in_length():
    """Peak memory, of forward and with backward, grows with an exponent of at most 1.05 from 1k to 32k."""
    import math

    from keyspan.testing import peak_memory

    def peak(n, backward):
        q, k, v = (torch.randn(1, n, 1, 8, requires_grad=backward) for _ in range(3))

        def run():
            # The window keeps the test short; memory does not depend on the mask.
            out = keyspan.attention(q, k, v, mask=keyspan.Causal() & keyspan.Window(64), backend="chunked")
            if backward:
                out.sum().backward()

        return peak_memory(run)

    torch.use_deterministic_algorithms(False)
    for backward in (False, True):
        sizes = [1024, 32768]
        peaks = [peak(n, backward) for n in sizes]
        exponent = math.log(peaks[-1] / peaks[0]) / math.log(sizes[-1] / sizes[0])
        assert exponent <= 1.05, peaks
        # All scores at 32k would take 4 GiB; held are some vectors of that length and one tile.
        assert peaks[-1] < 64 * 2**20, peaks
    full = peak_memory(lambda: keyspan.attention(*(torch.randn(1, 8192, 1, 8) for _ in range(3)), backend="chunked"))
    assert full < 8192 * 8192  # a quarter of the fp32 score matrix, without any mask


def test_dropout_keeps_the_stated_share_and_every_backend_drops_the_same():
    torch.manual_seed(0)
    q, k = torch.zeros(2, 2, 256, 3, 4)
    v = torch.ones(2, 256, 3, 4)
    torch.manual_seed(5)
    out = keyspan.attention(q, k, v, dropout_p=0.25, backend="chunked")
    torch.manual_seed(5)
    same = keyspan.attention(q, k, v, dropout_p=0.25, backend="reference")
    torch.testing.assert_close(out, same)
    # Each output is a mean of 256 independent drops, scaled by 1/(1 − p): its mean is 1, its variance p/(1 − p)/256.
    assert abs(out[..., 0].mean() - 1) < 5 * (1 / 3 / 256 / out[..., 0].numel()) ** 0.5
    assert 0.8 < out[..., 0].var() / (1 / 3 / 256) < 1.2
    torch.manual_seed(6)
    assert not torch.equal(out, keyspan.attention(q, k, v, dropout_p=0.25, backend="chunked"))
