"""The Triton backend on every shared case against the fp64 reference, in Triton's interpreter."""

import os
from dataclasses import replace

import pytest
import torch

import keyspan
from keyspan.backends import Needs
from keyspan.backends.triton import backward_kernels, config, launch
from keyspan.backends.triton.arguments import STATS_PADDING, Arguments
from keyspan.core import shims
from keyspan.core.problem import make_problem
from keyspan.dispatch.cache import CACHE
from keyspan.dispatch.op import attend, flat, gradients
from keyspan.testing import flash_emulation, results, rms_error, tolerances, worst
from keyspan.testing.cases import CASES, LONG, Case, errors_of_gradients_in_parts, position_gradient_errors

# NumPy warns of log2(0) for empty rows and of inf − inf in NaN tests, both of which are intended.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def agree(case, dtype):
    problem = case.problem(dtype)
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got = results(lambda p: attend(p, "triton"), problem, dtype)
    for name, allowed in tolerances(problem, dtype, want).items():
        error = worst(got[name], want[name])
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_the_kernels_run(monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_, **__: launched.append((kernel.fn.__name__, grid)))
    q = torch.zeros(1, 100, 3, 16)
    keyspan.attention(q, q, q, backend="triton")
    assert launched == [("forward_kernel", (3 * 7, 1))]


@pytest.fixture(autouse=True)
def larger_tiles_for_larger_cases(request, monkeypatch, small_tiles):
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.M * case.N > 10_000:
        monkeypatch.setattr(config, "tile", lambda *_: config.TileConfig(64, 64, 1, 1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_reference(case):
    agree(case, torch.float32)


NAMED = {case.name: case for case in CASES}
NAMED["everything, small"] = replace(
    NAMED["everything"],
    name="everything, small", B=1, M=20, N=40, heads=2, kv_heads=1, bias=((2, 20, 1),),
    mask=lambda: keyspan.Causal("bottom_right") & keyspan.Window(12, 0) & keyspan.Sinks(3),
)  # fmt: skip


@pytest.mark.parametrize("name", ["gqa", "relative table, documents, gqa", "everything, small"])
def test_key_and_value_gradients_by_separate_launches(name, monkeypatch):
    monkeypatch.setattr(launch, "_split_key_value", lambda problem: True)
    agree(NAMED[name], torch.float32)


@pytest.mark.parametrize("name", ["gqa", "everything, small"])
def test_statistics_padding_is_not_read(name, monkeypatch):
    # NaN repair would hide the error.
    monkeypatch.setattr(backward_kernels, "has_nan", lambda x: False)
    case = NAMED[name]
    assert case.M % STATS_PADDING.value
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        agree(case, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["everything, small", "no keys, learned sinks"])
def test_each_gradient_alone(name):
    problem = NAMED[name].problem(torch.float32)
    problem = problem._replace(
        **{n: x.float() for n, x in problem._asdict().items() if isinstance(x, torch.Tensor) and x.is_floating_point()},
        biases=[x.float() for x in problem.biases],
        output_dtype=torch.float32,
    )
    out, lse = launch.forward(problem)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)

    def gradients(*needed):
        biases = [needed[-1]] * len(problem.biases)
        found = launch.backward(problem, grad_out, grad_lse, out, lse, Needs(*needed[:-1], biases))
        return [*found[:-1], *found.biases]

    every = gradients(*[True] * 7)
    for n in range(7):
        alone = gradients(*[m == n for m in range(7)])
        for m, (got, want) in enumerate(zip(alone, every, strict=True)):
            if min(m, 6) == n and want is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            else:
                assert got is None


@pytest.mark.parametrize("case", LONG[::2], ids=lambda case: case.name)
def test_error_is_at_most_that_of_flash_attention(case, monkeypatch):
    monkeypatch.setattr(config, "tile", lambda *_: config.TileConfig(64, 64, 1, 1))
    problem, dtype = case.problem(torch.bfloat16), torch.bfloat16

    def error(f):
        got = results(lambda p: f(p._replace(output_dtype=torch.float32)), problem, dtype)
        return rms_error(got, want)

    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got, allowed = error(lambda p: attend(p, "triton")), error(lambda p: flash_emulation(p, dtype))
    many = [name for name, x in want.items() if x.numel() > 100]  # the mean of fewer errors is chance
    assert {name: got[name] / allowed[name] for name in many if got[name] > 1.1 * allowed[name]} == {}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_by_position_do_not_gather_the_rounding_of_the_output(dtype, sinks, monkeypatch):
    monkeypatch.setattr(config, "tile", lambda *_: config.TileConfig(64, 64, 1, 1))
    errors = position_gradient_errors("triton", dtype, 150, 500, sinks)
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_a_part_of_the_keys_with_the_lse_of_all(parts):
    errors = errors_of_gradients_in_parts("triton", parts)
    assert max(errors.values()) <= 1, errors


EVERY = os.environ.get("KEYSPAN_GPU_TESTS") == "all"
"""`make test-gpu-offline`: with plain loads and with TMA; else in turn."""
IN_TURN = [(case, tma) for n, case in enumerate(CASES[::3]) for tma in (False, True) if EVERY or tma == n % 2]


@pytest.mark.parametrize(
    ("case", "descriptors"), IN_TURN, indirect=["descriptors"], ids=lambda x: x.name if isinstance(x, Case) else str(x)
)
def test_bfloat16(case, descriptors):
    agree(case, torch.bfloat16)


@pytest.mark.parametrize("sinks", [False, True])
def test_parts_of_the_keys_with_the_output_and_lse_of_all(sinks):
    """Ring attention: the gradients of parts sum to the whole, those of slopes too, whose correction needs all keys."""
    case = Case("alibi in parts", M=40, N=40, alibi=True, sinks=sinks, mask=lambda: keyspan.Causal())
    problem = case.problem(torch.float32)
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)

    def in_parts(p):
        out, lse = attend(problem._replace(output_dtype=torch.float32), "reference")
        return InParts.apply(p, out.float(), lse.float(), *flat(p))

    got = results(in_parts, problem, torch.float32)
    for name, allowed in tolerances(problem, torch.float32, want).items():
        assert worst(got[name], want[name]) <= allowed, name


class InParts(torch.autograd.Function):
    """Gradients of two halves of the keys, given the results for all of them."""

    @staticmethod
    def forward(ctx, problem, out, lse, *inputs):
        ctx.problem, ctx.results = problem, (out, lse)
        return out.clone(), lse.clone()

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        p, total = ctx.problem, None
        for lo, hi in ((0, 20), (20, 40)):
            part = p._replace(lo=p.lo.clamp(lo, hi), hi=p.hi.clamp(lo, hi), sinks=p.sinks if lo else None)
            needs = [x is not None for x in flat(part)]
            found = gradients(part, grad_out, grad_lse, *ctx.results, needs, "triton")
            total = found if total is None else [
                y if x is None else x if y is None else x + y for x, y in zip(total, found, strict=True)
            ]  # fmt: skip
        return (None, None, None, *total)


@pytest.mark.parametrize("special", [torch.nan, 1e30])
@pytest.mark.parametrize("layout", ["padded", "paged"])
def test_scales_of_hidden_keys_do_not_leak(layout, special):
    """Sequences of 17 and 5 keys in 32 slots each: the scales of unused slots hold garbage."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (9, 64, 64))
    k, key_scale = keyspan.quantize(k, torch.float8_e4m3fn, 1)
    v, value_scale = keyspan.quantize(v, torch.float8_e4m3fn, 1)
    mask = keyspan.PaddedKeys([4, 5], [17, 5], 32)
    if layout == "paged":
        mask = keyspan.PagedKeys([4, 5], [17, 5], [[0, 1], [2, 3]], 16)

    def run():
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        return keyspan.attention(q, k, v, mask=mask & keyspan.Causal("bottom_right"), backend="triton", **scales)

    want = run()
    assert want.abs().min() > 0
    for scale in (key_scale, value_scale):
        scale[:, 17:32] = scale[:, 37:] = special
    torch.testing.assert_close(run(), want)


def test_visible_nan_in_scales_and_values_reaches_the_output():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (5, 40, 40))
    k, key_scale = keyspan.quantize(k, torch.float8_e4m3fn, 8)
    v, value_scale = keyspan.quantize(v, torch.float8_e4m3fn, 8)
    value_scale[:, 1, 0] = torch.nan
    v[:, 30, 1, 3] = torch.nan

    def run(**mask):
        return keyspan.attention(q, k, v, key_scale=key_scale, value_scale=value_scale, backend="triton", **mask)[0]

    out = run()
    assert torch.isnan(out[:, 0]).all()
    assert torch.isnan(out[:, 1, 3]).all()
    assert torch.isfinite(out[:, 1, :3]).all()
    hidden = torch.ones(5, 40, dtype=torch.bool)
    hidden[2, 8:16] = hidden[2, 30] = False
    partly = run(mask=hidden)
    assert torch.isfinite(partly[2]).all()
    want = keyspan.attention(q, k, v, key_scale=key_scale, value_scale=value_scale, mask=hidden, backend="reference")[0]
    torch.testing.assert_close(partly[2], want[2])


def test_a_replay_reads_the_scales_of_its_call(monkeypatch):
    launched = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *values, stream: launched.append(values)

    monkeypatch.setattr(launch, "run", lambda *_, **__: Compiled())
    monkeypatch.setattr(shims, "triton_launcher", lambda kernel: None)
    monkeypatch.setattr(shims, "cuda_stream", lambda index: 0)
    monkeypatch.setattr(shims, "cuda_device", lambda: None)

    def problem(run):
        q, k, v = (torch.randn(1, n, 2, 16) for n in (1, 64, 64))
        stored = [keyspan.quantize(x, torch.float8_e4m3fn, run) for x in (q, k, v)] if run else []
        if not run:
            stored = [(q, None), *((x.to(torch.float8_e4m3fn), None) for x in (k, v))]
        names = ("query_scale", "key_scale", "value_scale")
        return make_problem(*(x for x, _ in stored), **dict(zip(names, (y for _, y in stored), strict=True)))[0]

    for kind in ("scales", "none"):
        CACHE.clear()
        for _ in range(2):
            attend(problem(1 if kind == "scales" else None), "triton")
        assert not launched, "the first launches are compiled"
        last = problem(1 if kind == "scales" else None)
        attend(last, "triton")
        (arguments, *_), *_ = launched
        given = dict(zip(Arguments._fields, arguments, strict=True))
        for name in ("query_scale", "key_scale", "value_scale"):
            scale = getattr(last, name)
            assert given[name] == (None if scale is None else scale.data_ptr())
        launched.clear()
