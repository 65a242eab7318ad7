"""The Hopper kernels without a GPU: on the shared cases by an emulator of Gluon, and what they compile to."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import gluon_emulator
import pytest
import torch
from gluon_emulator import load
from triton.runtime.errors import InterpreterError

import keyspan
from keyspan.backends import Needs
from keyspan.backends.triton import config, hopper, hopper_ends_kernels, launch
from keyspan.backends.triton import kernels as kernels_of
from keyspan.core.problem import make_problem
from keyspan.dispatch.op import attend
from keyspan.testing import results, tolerances, worst
from keyspan.testing.cases import CASES, Case

# NumPy warns of inf − inf in NaN tests, which is intended.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
FOLDER = Path(hopper.__file__).parent
MODULES = {
    f"keyspan.backends.triton.{name}": FOLDER / f"{name}.py"
    for name in (
        "arguments", "hopper_kernels", "hopper_backward_kernels", "hopper_keys_kernels", "hopper_queries_kernels"
    )
}  # fmt: skip


FORWARD_MODULES, BACKWARD_MODULES, KEYS_MODULES = (dict(list(MODULES.items())[:count]) for count in (2, 3, 4))


@functools.cache
def kernels():
    return {
        "hopper_forward_kernel": load(FORWARD_MODULES).hopper_forward_kernel,
        "hopper_backward_kernel": load(BACKWARD_MODULES).hopper_backward_kernel,
        "hopper_keys_kernel": load(KEYS_MODULES).hopper_keys_kernel,
        "hopper_queries_kernel": load(MODULES).hopper_queries_kernel,
    }


FORM = -1
WRITTEN = {
    "hopper_forward_kernel": slice(5, 8),
    "hopper_backward_kernel": slice(11, 16),
    "hopper_keys_kernel": slice(10, 14),
    "hopper_queries_kernel": slice(7, 10),
}
"""Which arguments are what the kernels are compiled for, and what they write to, apart from what descriptors describe."""


BETWEEN = (
    "bounds_kernel",
    "hopper_stats_kernel",
    "hopper_finish_kernel",
    "hopper_repair_kernel",
    "hopper_repair_queries_kernel",
    "queries_kernel",
    "stats_kernel",
)
"""Kernels that run in the interpreter beside the Hopper kernels."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Problems go to the Hopper kernels wherever these have all terms, and run on the emulator, in small tiles; what
    comes before and after them runs in Triton's interpreter."""
    ran, interpreted = [], launch.run

    def run(kernel, grid, *arguments, tile):
        name = kernel.fn.__name__
        if name not in WRITTEN:
            assert name in BETWEEN
            return interpreted(kernel, grid, *arguments, tile=tile)
        written = [getattr(x, "tensor", x) for x in arguments[WRITTEN[name]] if not hasattr(x, "block_shape")]
        ran.append((name, arguments[FORM]))
        gluon_emulator.run(kernels()[name], grid, list(arguments), written)
        if name != "hopper_backward_kernel":
            assert not written[-1].any(), "counters are not set back"
        return None

    monkeypatch.setattr(hopper, "reason_against", hopper.missing)
    monkeypatch.setattr(hopper, "backward_reason_against", hopper.backward_missing)
    monkeypatch.setattr(hopper, "keys_reason_against", hopper.keys_missing)
    monkeypatch.setattr(hopper, "queries_reason_against", hopper.queries_missing)
    monkeypatch.setattr(hopper, "tile", lambda problem: config.TileConfig(128, 32, 4, 2, 168))
    monkeypatch.setattr(launch, "run", run)
    return ran


def problem_of(case):
    return in_bfloat16(case.problem(torch.bfloat16))


def in_bfloat16(problem):
    return problem._replace(
        **{
            n: x.bfloat16()
            for n, x in problem._asdict().items()
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64
        },
        output_dtype=torch.bfloat16,
    )


def agree(case):
    problem = case.problem(torch.bfloat16)
    want = dict(zip(("out", "lse"), (x.double() for x in attend(problem, "reference")), strict=True))
    with torch.no_grad():
        out, lse = attend(problem_of(case), "triton")
    for name, got in (("out", out.double()), ("lse", lse.double())):
        error, allowed = worst(got, want[name]), tolerances(problem, torch.bfloat16, want)[name]
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def agree_backward(case, learned=False):
    """`learned`: ALiBi's slopes get a gradient."""

    def fixed(problem):
        slopes = problem.slopes
        return problem if slopes is None or learned else problem._replace(slopes=slopes.detach())

    problem = case.problem(torch.bfloat16)
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got = results(lambda p: attend(fixed(p), "triton"), problem, torch.bfloat16)
    for name, allowed in tolerances(problem, torch.bfloat16, want).items():
        if name != "dslopes" or learned:
            error = worst(got[name], want[name])
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


FITTING = [case for case in CASES if case.B * case.M > 0 and hopper.missing(problem_of(case)) is None]


def test_most_kinds_of_cases_fit():
    names = {case.name for case in FITTING}
    assert {"gqa", "window and sinks", "shared prompt", "documents, cross", "relative table, two ranges", "softcap",
            "learned sinks", "alibi by batch", "negative scale", "right padded batch"} <= names  # fmt: skip


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.name)
def test_agrees_with_reference(case, emulated):
    agree(case)
    assert [name for name, _ in emulated] == ["hopper_forward_kernel"]


EVERY = Needs(True, True, True, False, False, True, [])
BACKWARD = [case for case in FITTING if hopper.backward_missing(problem_of(case), EVERY) is None]


def test_most_kinds_of_cases_fit_backward():
    names = {case.name for case in BACKWARD}
    assert {"gqa", "mqa", "window and sinks", "window and prefix", "documents, cross", "learned sinks", "sliced",
            "documents, batch of two", "left padded batch", "several tiles", "alibi by batch", "union of windows",
            "negative scale"} <= names  # fmt: skip


@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.name)
def test_gradients_agree_with_reference(case, emulated):
    agree_backward(case)
    assert "hopper_backward_kernel" in {name for name, _ in emulated}


LARGE = [
    Case("full", M=200, N=333),
    Case("causal, grouped", M=300, N=300, heads=4, mask=keyspan.Causal),
    Case("documents", M=300, N=300, mask=lambda: keyspan.Documents([33, 137, 130]) & keyspan.Causal()),
    Case("window and sinks", M=290, N=290, mask=lambda: keyspan.Causal() & keyspan.Window(70, 0) & keyspan.Sinks(4)),
    Case("causal, grouped, alibi", M=150, N=150, heads=4, alibi=True, mask=keyspan.Causal),
    Case("alibi", M=100, N=140, alibi=True, scale=-0.1),
    Case("blocks that nobody sees", M=100, N=300, B=2, mask=lambda: keyspan.KeyLengths([140, 0])),
    Case("empty rows", M=300, N=200, B=2, mask=lambda: _some_ranges()),
]
WIDE = [*LARGE, Case("causal, softcap, sinks", M=150, N=150, softcap=3.0, sinks=True, mask=keyspan.Causal)]


def _some_ranges():
    """Ranges of 300 rows in 200 keys, in no order, a third of them empty."""
    generator = torch.Generator().manual_seed(0)
    lo = torch.randint(0, 200, (300,), generator=generator)
    length = torch.randint(0, 60, (300,), generator=generator) * (torch.arange(300) // 20 % 3 > 0)
    lo, hi = (x.int()[None, None] for x in (lo, torch.minimum(lo + length, torch.tensor(200))))
    return keyspan.KeyRanges(lo, hi, lo)


@pytest.fixture
def memory_is_nan():
    """New tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def unrepaired(monkeypatch):
    """NaN repair, which would hide errors, does not run."""

    def repair(*_):
        raise AssertionError("a gradient has a NaN")

    for name in ("repair_keys", "repair_queries"):
        monkeypatch.setattr(hopper_ends_kernels, name, repair)


@pytest.mark.parametrize("upward", [0, 1])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_gradients_of_several_tiles(case, dim, upward, emulated, memory_is_nan, monkeypatch):
    """More items than programs, so that each goes through the ring several times; tiles of 128 queries, or of 64; runs of
    groups that go down alone, and the first of two up."""
    monkeypatch.setattr(launch, "_processors", lambda device: 2)
    monkeypatch.setattr(hopper, "backward_order", lambda problem, tile: (1, upward))
    unrepaired(monkeypatch)
    agree_backward(dataclasses.replace(case, K=dim, V=dim))
    assert [form.BM for name, form in emulated if name == "hopper_backward_kernel"] == [8192 // dim]


@pytest.mark.parametrize(("k_dim", "v_dim"), [(256, 256), (192, 128)])
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_gradients_of_wide_heads(case, k_dim, v_dim, emulated, memory_is_nan, monkeypatch):
    monkeypatch.setattr(launch, "_processors", lambda device: 2)
    unrepaired(monkeypatch)
    agree_backward(dataclasses.replace(case, K=k_dim, V=v_dim))
    assert {"hopper_keys_kernel", "hopper_queries_kernel"} <= {name for name, _ in emulated}


@pytest.mark.parametrize("name", ["several tiles", "shared prompt", "relative table, two ranges", "softcap"])
def test_three_consumers(name, emulated, monkeypatch):
    monkeypatch.setattr(hopper, "tile", lambda problem: config.TileConfig(192, 32, 4, 3, 128))
    agree(next(case for case in CASES if case.name == name))
    assert emulated[0][1].consumers == 3


def test_programs_take_many_items(emulated, monkeypatch):
    # More tiles than programs: every program goes through the ring several times.
    monkeypatch.setattr(launch, "_processors", lambda device: 3)
    agree(next(case for case in CASES if case.name == "several tiles"))
    agree(next(case for case in CASES if case.name == "alibi by batch"))


@pytest.mark.parametrize(
    "visibility",
    [keyspan.Causal("bottom_right"), keyspan.Causal("bottom_right") & keyspan.Window(40, 0) & keyspan.Sinks(3)],
    ids=["causal", "window and sinks"],
)
@pytest.mark.parametrize("terms", [{}, {"softcap": 5.0, "sinks": torch.tensor([0.3, 1.0])}], ids=["plain", "terms"])
@pytest.mark.parametrize("rise", [0, 40], ids=["", "scores that rise"])
def test_bits_of_a_row_depend_on_its_document_alone(visibility, terms, rise):
    torch.manual_seed(0)
    lengths = [33, 5, 150, 67]
    q, k, v = (torch.randn(1, sum(lengths), 2, 16).bfloat16() for _ in "qkv")
    if rise:
        # Some rows are computed again, their neighbours are not.
        q[..., 0], k[0, :, :, 0] = 1, 4 * rise * (torch.arange(sum(lengths)) // 25 % 4)[:, None]

    def attend(q, k, v, mask):
        with torch.no_grad():
            return keyspan.attention(q, k, v, mask=mask, backend="triton", return_lse=True, **terms)

    packed, packed_lse = attend(q, k, v, keyspan.Documents(lengths) & visibility)
    document = slice(38, 188)
    q, k, v = (x[:, document] for x in (q, k, v))
    alone, lse = attend(q, k, v, visibility)
    assert torch.equal(packed[:, document], alone)
    assert torch.equal(packed_lse[:, :, document], lse)
    for begin, end in ((0, 20), (20, 147), (147, 150)):
        part, part_lse = attend(q[:, begin:end], k[:, :end], v[:, :end], visibility)
        assert torch.equal(part, alone[:, begin:end])
        assert torch.equal(part_lse, lse[:, :, begin:end])
    twice, _ = attend(*(torch.cat([torch.randn_like(x), x]) for x in (q, k, v)), visibility)
    assert torch.equal(twice[1:], alone)


def test_hidden_nan_and_infinity_do_not_reach_a_row():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16).bfloat16() for _ in "qkv")
    mask = keyspan.Documents([33, 37]) & keyspan.Causal()
    v[:, 20], k[:, 30, 0], v[:, 50, 1, 3] = torch.nan, torch.inf, torch.inf
    with torch.no_grad():
        got = keyspan.attention(q, k, v, mask=mask, backend="triton")
    want = keyspan.attention(q.double(), k.double(), v.double(), mask=mask, backend="reference")
    assert worst(got.double(), want) < 0.05
    assert torch.isfinite(got[:, :20]).all()
    assert torch.isnan(got[:, 20:30]).all()


RISES = {
    "full": None,
    "causal": keyspan.Causal(),
    "window": keyspan.Causal() & keyspan.Window(60, 0),
    "window and sinks": keyspan.Causal() & keyspan.Window(45, 0) & keyspan.Sinks(3),
    "documents": keyspan.Documents([7, 93, 100]) & keyspan.Causal(),
}


def rising(jump, mask, steps=(1, 50, 66, 130, 190)):
    """A problem in 200 keys whose scores rise by `jump` at some keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 16).bfloat16().double() for _ in "qkv")
    q[..., 0], k[..., 0] = 1, 0
    for step in steps:
        k[:, step:, :, 0] += 4 * jump
    return make_problem(q, k.bfloat16().double(), v, mask=mask)[0]


def agree_on_rising_scores(jump, mask, bias=None, **steps):
    """Allowed is the error of the textbook in fp32, and in bf16 where scores do not rise."""
    problem, flat = rising(jump, mask, **steps), rising(0, mask)
    if bias is not None:
        problem = make_problem(problem.query.flatten(2, 3), problem.key, problem.value, mask=mask, bias=bias)[0]
    want, level = (dict(zip(("out", "lse"), attend(x, "reference"), strict=True)) for x in (problem, flat))
    with torch.no_grad():
        got = dict(zip(("out", "lse"), attend(in_bfloat16(problem), "triton"), strict=True))
    allowed = [tolerances(problem, torch.float32, want), tolerances(flat, torch.bfloat16, level)]
    for name in want:
        error = worst(got[name].double(), want[name].double())
        assert error <= sum(x[name] for x in allowed), f"{name}: error {error:.3g}"


@pytest.mark.parametrize("period", [4096, 64])
@pytest.mark.parametrize("jump", [-50, 50, 200, 1000])
@pytest.mark.parametrize("name", RISES)
def test_scores_that_rise_within_a_row(name, jump, period, monkeypatch):
    """More than weights relative to an early block can hold; a pivot is raised after each second block, or never."""
    changes("hopper_kernels", "PERIOD = gl.constexpr(4096)", f"PERIOD = gl.constexpr({period})", monkeypatch)
    agree_on_rising_scores(jump, RISES[name])


@pytest.mark.parametrize("first", [-300.0, -50.0, 0.0, 300.0])
def test_windows_that_begin_with_one_key_of_their_first_block(first):
    """Its score alone is the first pivot of some rows."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 16).bfloat16().double() for _ in "qkv")
    q[..., 0], k[..., 0], k[:, 31::32, :, 0] = 1, 0, 4 * first
    problem = make_problem(q, k, v, mask=keyspan.Causal() & keyspan.Window(70, 0))[0]
    want = attend(problem, "reference")
    with torch.no_grad():
        got = attend(in_bfloat16(problem), "triton")
    allowed = tolerances(problem, torch.float32, dict(zip(("out", "lse"), want, strict=True)))
    flat = tolerances(rising(0, None), torch.bfloat16, {"out": attend(rising(0, None), "reference")[0]})["out"]
    assert worst(got[0].double(), want[0].double()) <= allowed["out"] + flat
    assert worst(got[1].double(), want[1].double()) <= allowed["lse"]


ALIBI = {
    "full": None,
    "causal": keyspan.Causal(),
    "keys far behind": keyspan.KeyRanges(
        *(x.int()[None, None] for x in (torch.zeros(200), (torch.arange(200) - 100).clamp(min=0), torch.arange(200)))
    ),
    "documents": keyspan.Documents([7, 93, 100]) & keyspan.Causal(),
}


@pytest.mark.parametrize("jump", [-40, 0, 40])
@pytest.mark.parametrize("slopes", [(0.0, 0.01), (0.5, 8.0), (-0.5, -8.0), (30.0, -30.0), (1e30, -3e38)])
@pytest.mark.parametrize("name", ALIBI)
def test_alibi_that_grows_within_a_row(name, slopes, jump):
    """By more than weights relative to an early block can hold, unless a pivot foresees it."""
    agree_on_rising_scores(jump, ALIBI[name], keyspan.Alibi(torch.tensor(slopes, dtype=torch.float64)))


def test_ordinary_rows_with_alibi_are_not_computed_again(monkeypatch):
    changes("hopper_kernels", *REPAIR, monkeypatch)
    unrepaired_cases_with_alibi()


def unrepaired_cases_with_alibi():
    for case in (LARGE[4], Case("steep", M=200, N=200, heads=4, alibi=True, mask=keyspan.Causal)):
        agree(case)
    for slope in (8.0, -8.0):
        problem = rising(0, keyspan.Causal())
        bias = keyspan.Alibi(torch.full((2,), slope, dtype=torch.float64))
        query = problem.query.flatten(2, 3)
        problem = make_problem(query, problem.key, problem.value, mask=keyspan.Causal(), bias=bias)[0]
        with torch.no_grad():
            attend(in_bfloat16(problem), "triton")


def test_large_values():
    """Sums of weights times values overflow where the mean of the values does not; also where no pivot stays."""
    problem = rising(20, keyspan.Causal())
    signs = problem.value.sign()
    signs[:, :, 1] = 1
    problem = problem._replace(value=(signs * 3e38).bfloat16().double())
    for sinks in (None, torch.zeros(2, 1, dtype=torch.float64)):
        this = problem._replace(sinks=sinks)
        want = attend(this, "reference")[0].double()
        with torch.no_grad():
            got = attend(in_bfloat16(this), "triton")[0].double()
        level = dict(zip(("out", "lse"), attend(rising(20, keyspan.Causal()), "reference"), strict=True))
        allowed = 3e38 * tolerances(rising(0, keyspan.Causal()), torch.bfloat16, level)["out"]
        assert worst(got, want) <= allowed


def test_infinite_scores_and_nan():
    """Visible ones as in the reference, in the first block of a row and after it; hidden ones reach nobody."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 6, 16).bfloat16() for _ in "qkv")
    q[..., 0], k[..., 0] = 1, 0
    k[:, :32, 0, 0], k[:, 40:, 1, 0], k[:, 90, 2, 0] = -torch.inf, -torch.inf, torch.inf
    k[:, 70, 3, 0], v[:, 100, 4, 3], v[:, 33, 5, 0] = torch.nan, torch.nan, torch.inf
    for mask in (keyspan.Causal(), keyspan.Causal() & keyspan.Window(50, 0), keyspan.Documents([45, 155])):
        with torch.no_grad():
            out, lse = keyspan.attention(q, k, v, mask=mask, backend="triton", return_lse=True)
        want, want_lse = keyspan.attention(
            *(x.double() for x in (q, k, v)), mask=mask, backend="reference", return_lse=True
        )
        flat = dict(zip(("out", "lse"), attend(rising(0, None), "reference"), strict=True))
        allowed = tolerances(rising(0, None), torch.bfloat16, flat)
        assert worst(out.double(), want) <= 2 * allowed["out"]
        assert worst(lse.double(), want_lse) <= allowed["lse"]


@pytest.mark.parametrize(
    ("right", "wrong", "fails"),
    [
        ("trusted = l <= TRUSTED", "trusted = l >= 0", "rising"),
        ("gl.sum(acc * 0.0, 1) == 0", "gl.sum(gl.where(acc == acc, 0.0, 1.0), 1) == 0", "large values"),
        ("gl.where(sees & (highest == -INFINITY), float(\"nan\"), shrink)", "shrink", "infinite"),
        ("mask=stored != stored", "mask=stored < stored", "rising"),
        ("gl.where(due | (j0 - lo < C.BN), highest, m)", "gl.where(due, highest, m)", "unrepaired"),
        ("if due | (j0 - full_first < C.BN):", "if due:", "unrepaired"),
        ("gl.where(due | (j0 - lo < C.BN), highest, m)", "gl.where(number == 0, highest, m)", "unrepaired"),
        ("above += _growth(terms[0], lo, width, diagonal, j0, C)", "pass", "unrepaired alibi"),
        ("trusted & ((l >= LEAST) | (m == -INFINITY))", "trusted", "alibi"),
    ],
    ids=["sums that overflow", "values that overflow", "nothing but -inf", "lse not stored", "no first pivot",
         "first pivot of some rows", "pivot of the first block alone",
         "growth not foreseen", "small sums"],
)  # fmt: skip
def test_the_tests_of_pivots_see_mistakes(right, wrong, fails, monkeypatch):
    tests = {
        "rising": lambda: agree_on_rising_scores(200, None),
        "large values": test_large_values,
        "infinite": test_infinite_scores_and_nan,
        "unrepaired": unrepaired_cases,
        "alibi": lambda: test_alibi_that_grows_within_a_row("causal", (0.5, 8.0), -200),
        "unrepaired alibi": unrepaired_cases_with_alibi,
    }
    if fails.startswith("unrepaired"):
        right, wrong = [right, REPAIR[0]], [wrong, REPAIR[1]]
    changes("hopper_kernels", right, wrong, monkeypatch)
    with pytest.raises((AssertionError, NameError)):
        tests[fails]()


REPAIR = ("        _repair(a, scales,", "        _is_repaired(a, scales,")


def unrepaired_cases():
    for case in (Case("two tiles", M=200, N=200, mask=keyspan.Causal), LARGE[2], LARGE[3], LARGE[6], LARGE[7]):
        agree(case)


def test_ordinary_rows_are_not_computed_again(monkeypatch):
    changes("hopper_kernels", *REPAIR, monkeypatch)
    unrepaired_cases()
    agree_on_rising_scores(40, keyspan.Causal(), steps=(1, 66))


def test_hidden_nan_does_not_reach_a_row_with_a_table_and_a_sink():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16).bfloat16() for _ in "qkv")
    mask = keyspan.Documents([10, 23, 37], [0, 33, 37]) & keyspan.Causal()  # the first has no keys
    terms = {"bias": keyspan.RelativeBias(torch.randn(2, 9)), "sinks": torch.tensor([0.3, -torch.inf])}
    v[:, 50] = torch.nan
    with torch.no_grad():
        got = keyspan.attention(q, k, v, mask=mask, backend="triton", **terms)
    want = keyspan.attention(q.double(), k.double(), v.double(), mask=mask, backend="reference", **terms)
    assert worst(got.double(), want) < 0.05
    assert torch.isnan(got).any()


def test_hidden_nan_and_infinity_do_not_reach_a_gradient():
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, 150, 2, 64).bfloat16() for _ in "qkvg")
    mask = keyspan.Documents([33, 67, 50]) & keyspan.Causal()
    q[:, 20], k[:, 40, 0], v[:, 90, 1, 3], g[:, 95] = torch.nan, torch.inf, torch.inf, torch.nan

    def gradients(dtype, backend):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(keyspan.attention(*inputs, mask=mask, backend=backend), inputs, g.to(dtype))

    for got, want in zip(gradients(torch.bfloat16, "triton"), gradients(torch.float64, "reference"), strict=True):
        assert worst(got.double(), want) < 0.1
        assert torch.isfinite(got[:, 100:]).all()
        assert not torch.isfinite(got).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("freed // C.stages & 1 ^ 1)", "freed // C.stages & 1)"),
        ("(t > C.stages).to(gl.int32)", "1"),
        ("key_tiles.block_type.nbytes", "2 * key_tiles.block_type.nbytes"),
        ("acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))", "pass"),
        ("mbarrier.arrive(query_empty.index(ME), count=1)", "pass"),
        ("j0 = begin + t * C.BN", "j0 = begin + t"),
        ("bounds.index((slot * C.consumers + ME) * 2)", "bounds.index(ME * 2)"),
        ("(n - gl.expand_dims(lo, 1))", "(n + 1 - gl.expand_dims(lo, 1))"),
        (
            "            m = gl.full([ROWS], -INFINITY, gl.float32, by_row)\n"
            "            l = _by_thread(zero, gl.sum, C)\n",
            "",
        ),
        ("ends = ends & LAST", "ends = row * 0 + LAST"),
        ("gl.store(counters, 0)", "pass"),
        ("(t + 2 == count)", "(t < 0)"),
        ("if (count == 1) & (ends >= LAST):", "if False:"),
        ("            s = warpgroup_mma_wait(0, deps=(s,))\n        else", "            pass\n        else"),
        ("filled, loaded, count, zero, C)", "filled + 1, loaded, count, zero, C)"),
    ],
    ids=[
        "wrong phase",
        "keys not released",
        "wrong bytes",
        "no wait",
        "query not released",
        "wrong block",
        "wrong range",
        "off by one key",
        "sums of the item before",
        "ends early",
        "no reset",
        "query of several blocks not released",
        "query of one block not released",
        "no wait for the next item",
        "other keys for the next item",
    ],
)
def test_the_emulator_sees_mistakes(right, wrong, monkeypatch):
    breaks("hopper_kernels", right, wrong, monkeypatch)
    with pytest.raises((AssertionError, TimeoutError, TypeError, AttributeError)):
        agree_on_items()


def agree_on_items():
    for case in (*LARGE[2:4], Case("one block", M=20, N=20, B=2, mask=keyspan.Causal)):
        agree(case)
    agree(next(case for case in CASES if case.name == "relative table, two ranges"))


def breaks(module, right, wrong, monkeypatch):
    """Replace a piece of a module's source, by a mistake that may end in a wait."""
    changes(module, right, wrong, monkeypatch)
    monkeypatch.setattr(gluon_emulator, "TIMEOUT", 0.5)
    monkeypatch.setattr(launch, "_processors", lambda device: 1)


def changes(module, right, wrong, monkeypatch):
    """Replace a piece of a module's source, or several."""
    pairs = [(right, wrong)] if isinstance(right, str) else list(zip(right, wrong, strict=True))
    source = MODULES[f"keyspan.backends.triton.{module}"].read_text()
    assert all(piece in source for piece, _ in pairs)

    def change(text):
        return functools.reduce(lambda text, pair: text.replace(*pair), pairs, text)

    if module == "hopper_kernels":
        broken = {"hopper_forward_kernel": load(FORWARD_MODULES, change).hopper_forward_kernel}
    elif module == "hopper_backward_kernels":
        broken = {"hopper_backward_kernel": load(BACKWARD_MODULES, change).hopper_backward_kernel}
    elif module == "hopper_keys_kernels":
        broken = {"hopper_keys_kernel": load(KEYS_MODULES, change).hopper_keys_kernel}
    else:
        broken = {"hopper_queries_kernel": load(MODULES, change).hopper_queries_kernel}
    every = kernels() | broken
    monkeypatch.setattr(sys.modules[__name__], "kernels", lambda: every)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("t // C.stages & 1 ^ 1)\n                        _put(at, TILE", "t // C.stages & 1)\n                        _put(at, TILE"),
        ("query_tiles.block_type.nbytes + 8 * C.BM", "query_tiles.block_type.nbytes"),
        ("dp = warpgroup_mma_wait(1, deps=(dp,))", "dp = warpgroup_mma_wait(2, deps=(dp,))"),
        ("mbarrier.arrive(empty.index(KEY_EMPTY), count=1)", "pass"),
        ("mbarrier.wait(score_full.index(t % 2), t // 2 & 1)", "pass"),
        ("mbarrier.wait(score_full.index((t + 1) % 2), (t + 1) // 2 & 1 ^ 1)", "pass"),
        ("mbarrier.wait(score_empty.index(t % 2), t // 2 & 1 ^ 1)", "pass"),
        ("mbarrier.wait(full.index(SUM_READY), t & 1)", "pass"),
        ("if rank == 0:", "if rank < 0:"),
        ("while gl.max(added, 0) < rank:", "while gl.max(added, 0) <= rank:"),
        ("cp.async.bulk.wait_group.read 0; ", ""),
        ("LAST * final.to(gl.int32) + 1 - whole.to(gl.int32))", "LAST * final.to(gl.int32))"),
        ("gl.minimum(hi, C.BN) - lo, 0)", "gl.minimum(hi, C.BN) - lo + 1, 0)"),
        ("rank += here.to(gl.int32)", "pass"),
        ("[3, 0, 2, 4, 1, 5]", "[3, 0, 2, 4, 5, 1]"),
        ("mbarrier.wait(empty.index(QUERY_EMPTY + last % C.stages), last // C.stages & 1 ^ 1)", "pass"),
        ("gl.minimum(count, EARLY // C.BM)", "EARLY // C.BM"),
        ("behind - gl.maximum(block + 1, first)", "behind - gl.maximum(block, first)"),
        ("gl.where(up, x, -x)", "x"),
        ("block = gl.where(up, blocks - 1 - block, block)", "pass"),
        ("slope * gl.abs(", "slope * ("),
        ("_leave(dv_tiles, [b, g, first, 0]", "_leave(dv_tiles, [b, g, first + 1, 0]"),
        ("rank + 1 == count", "rank == count"),
        ("count += gl.maximum(behind - first, 0)", "count = gl.maximum(behind - first, 0)"),
        ("gl.where(order > LAST + 1, ", "gl.where(order > LAST + 5, "),
        ("[1, 4, 2, 0, 3, 5]", "[1, 4, 2, 0, 5, 3]"),
        ("head += h", "pass"),
        ("_wait_read()\n        tiles =", "tiles ="),
    ],
    ids=["wrong phase", "wrong bytes", "no wait", "keys not released", "half the last scores", "half the scores", "scores not released",
         "sums not released",
         "adds to nothing", "wrong turn", "copy not read", "no mask", "off by one key", "wrong rank", "wrong order",
         "values not released", "short block", "wrong turn upward", "upward alone", "waits for a block not taken", "signed distance", "gradients of other keys",
         "nobody is last", "wrong number of blocks", "sum of others left out", "others in another order", "another head",
         "gradient overwritten"],
)  # fmt: skip
def test_the_emulator_sees_mistakes_in_backward(right, wrong, memory_is_nan, monkeypatch):
    unrepaired(monkeypatch)
    monkeypatch.setattr(hopper, "backward_order", lambda problem, tile: (1, 1))  # one group up, the others down
    breaks("hopper_backward_kernels", right, wrong, monkeypatch)
    with pytest.raises((AssertionError, TimeoutError, TypeError, InterpreterError)):
        agree_on_large_cases()


def agree_on_large_cases():
    for dim in (128, 64):
        for case in LARGE:
            agree_backward(dataclasses.replace(case, K=dim, V=dim))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mbarrier.wait(score_full.index(t % 2), t // 2 & 1)", "pass"),
        ("mbarrier.arrive(score_empty.index(t % 2), count=1)", "pass"),
        ("mbarrier.arrive(empty.index(QUERY_EMPTY + stage), count=1)", "pass"),
        ("dp = warpgroup_mma_wait(0, deps=(dp,))", "pass"),
        ("mbarrier.wait(full.index(GRAD_FULL + stage), t // C.stages & 1)", "pass"),
        ("whole = whole & ((tile + 1) * C.BM <= a.M)", "pass"),
        ("gl.where(i < a.M, mask, 0)", "mask"),
        ("gl.where(p == 0, 0.0, ds).to(dtype)", "ds.to(dtype)"),
        ("ds *= 1.0 - tanh * tanh", "pass"),
        ("gl.store(counters, 0)", "pass"),
        ("gl.num_programs(0) + gl.atomic_add(counters, 1)", "gl.num_programs(0) + 1 + gl.atomic_add(counters, 1)"),
    ],
    ids=["weights not ready", "weights not released", "query not released", "no wait", "gradients not ready",
         "statistics behind the last row", "rows behind the last", "0 times NaN", "no slope of the cap", "no reset",
         "a block left out"],
)  # fmt: skip
def test_the_emulator_sees_mistakes_with_wide_heads(right, wrong, memory_is_nan, monkeypatch):
    unrepaired(monkeypatch)
    breaks("hopper_keys_kernels", right, wrong, monkeypatch)
    with pytest.raises((AssertionError, TimeoutError, TypeError, InterpreterError)):
        agree_on_wide_cases()


def agree_on_wide_cases():
    for case in (WIDE[-1], *LARGE):
        agree_backward(dataclasses.replace(case, K=136, V=136))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mbarrier.wait(value_full.index(0), filled + t & 1)", "pass"),
        ("mbarrier.arrive(value_empty.index(0), count=1)", "pass"),
        ("mbarrier.wait(key_empty.index(stage), n // C.stages & 1 ^ 1)", "pass"),
        ("mbarrier.wait(query_empty.index(m), loaded & 1 ^ 1)", "pass"),
        ("s = warpgroup_mma_wait(1, deps=(s,))", "s = warpgroup_mma_wait(2, deps=(s,))"),
        ("if (j0 < full_first) | (j0 + C.BN > full_last):", "if False:"),
        ("slope * gl.abs(", "slope * ("),
        ("ds * (1.0 - tanh * tanh)", "ds"),
        ("if ends % LAST > 0:\n            acc", "if True:\n            acc"),
    ],
    ids=["values not ready", "values not released", "keys not released", "query not released", "no wait", "no mask",
         "signed distance", "no slope of the cap", "sums begin anew in each run"],
)  # fmt: skip
def test_the_emulator_sees_mistakes_in_the_query_of_wide_heads(right, wrong, memory_is_nan, monkeypatch):
    unrepaired(monkeypatch)
    breaks("hopper_queries_kernels", right, wrong, monkeypatch)
    with pytest.raises((AssertionError, TimeoutError, TypeError, InterpreterError)):
        agree_on_wide_cases()


def test_a_reason_is_given_against_each_problem_that_is_not_for_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)

    def reason(M, N, heads, dim, dtype=torch.bfloat16, **given):
        q, k, v = (torch.empty(1, n, heads, dim, dtype=dtype) for n in (M, N, N))
        return hopper.reason_against(make_problem(q, k, v, **given)[0])

    causal = keyspan.Causal()
    assert reason(4096, 4096, 16, 128, mask=causal) is None
    assert reason(4096, 4096, 16, 96) is None
    assert reason(8192, 8192, 64, 64) is None
    assert "float32" in reason(4096, 4096, 16, 128, torch.float32)
    assert reason(512, 512, 64, 128) is None
    assert "queries" in reason(256, 4096, 64, 128)
    assert "keys" in reason(4096, 77, 32, 128)
    assert "tiles" in reason(1024, 1024, 4, 128)
    assert reason(8192, 8192, 64, 64, mask=causal) is None
    documents = [keyspan.Documents([n] * (8192 // n)) & causal for n in (512, 256)]
    assert reason(8192, 8192, 64, 64, mask=documents[0]) is None
    assert "rows see 128 keys" in reason(8192, 8192, 64, 64, mask=documents[1])
    assert reason(2048, 2048, 16, 64, mask=causal) is None
    assert "tiles" in reason(1024, 1024, 16, 64, mask=causal)
    unknown = dataclasses.replace(causal.lower(1, 8192, 8192), row_keys=0)
    assert "does not know" in reason(8192, 8192, 64, 64, mask=unknown)
    q = torch.empty(1, 8192, 64, 64, dtype=torch.bfloat16)
    rows = {
        mask: hopper.tile(make_problem(q, q, q, mask=mask)[0]).BM
        for mask in (None, causal, causal & keyspan.Window(1023, 0))
    }
    assert list(rows.values()) == [192, 192, 128]
    assert "at least 40" in reason(4096, 4096, 16, 32)
    assert "dense bias" in reason(1024, 1024, 32, 128, bias=torch.zeros(1024, 1024))
    assert "dropout" in reason(4096, 4096, 16, 128, dropout_p=0.1)


def test_a_reason_is_given_against_each_backward_that_is_not_for_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)

    def reason(B, N, heads, dim, dtype=torch.bfloat16, needs=EVERY, kv_heads=None, **given):
        q, k, v = (torch.empty(B, N, n or heads, dim, dtype=dtype) for n in (None, kv_heads, kv_heads))
        return hopper.backward_reason_against(make_problem(q, k, v, **given)[0], needs)

    causal = keyspan.Causal()
    assert reason(2, 8192, 16, 128, mask=causal) is None
    assert reason(1, 8192, 16, 128) is None
    assert reason(2, 8192, 16, 64, torch.float16, mask=causal) is None
    assert reason(1, 8192, 16, 128, mask=causal) is None
    documents = [keyspan.Documents([n] * (8192 // n)) & causal for n in (2048, 512)]
    assert reason(1, 8192, 16, 128, mask=documents[0]) is None
    assert reason(1, 8192, 16, 128, mask=documents[1]) is None
    short = keyspan.Documents([128] * 64) & causal
    assert "rows see 64 keys" in reason(1, 8192, 16, 128, mask=short)
    # Two ranges do not go up.
    assert "rows see 512 keys" in reason(1, 8192, 16, 128, mask=causal & keyspan.Window(511, 0) & keyspan.Sinks(4))
    unknown = dataclasses.replace(documents[0].lower(1, 8192, 8192), row_keys=0)
    assert "does not know" in reason(1, 8192, 16, 128, mask=unknown)
    # What a compiled function tells: lengths in the host's memory are data of its graph.
    told = [dataclasses.replace(unknown, row_keys=torch.ops.keyspan.row_keys(
        torch.tensor([n] * (8192 // n)), None, 8192, 8192, True, False, [], 0)) for n in (2048, 128)]  # fmt: skip
    assert reason(1, 8192, 16, 128, mask=told[0]) is None
    assert "rows see 64 keys" in reason(1, 8192, 16, 128, mask=told[1])
    assert "blocks of keys" in reason(1, 4096, 8, 128)
    assert reason(1, 4096, 8, 128, mask=causal) is None
    assert "blocks of keys" in reason(1, 4096, 8, 64, mask=causal)
    # One causal sequence in each batch entry: in four runs or more its blocks go up. And documents in it.
    assert reason(16, 1024, 16, 128, mask=causal) is None
    assert reason(16, 1024, 32, 64, mask=causal) is None
    assert reason(32, 512, 16, 128, mask=causal) is None
    assert reason(32, 512, 32, 64, mask=causal) is None
    assert "rows see 256 keys" in reason(6, 512, 16, 128, mask=causal)
    assert "queries" in reason(64, 256, 16, 128, mask=causal)
    assert reason(16, 1024, 16, 128, mask=keyspan.Documents([512, 512]) & causal) is None
    # Query heads that share key heads do not go up: half of the keys a row are enough, fewer blocks are not.
    packed = keyspan.Documents([1000] * 16 + [384]) & causal
    assert reason(1, 16384, 8, 128, mask=packed) is None
    assert "rows see 256 keys" in reason(1, 16384, 16, 128, mask=keyspan.Documents([512] * 32) & causal, kv_heads=4)
    assert reason(1, 16384, 16, 128, mask=packed, kv_heads=4) is None
    assert reason(1, 16384, 8, 128, mask=packed, kv_heads=2) is None
    assert "blocks of keys" in reason(1, 16384, 8, 128, mask=packed, kv_heads=1)
    assert reason(64, 512, 16, 128) is None
    assert "queries" in reason(128, 256, 16, 128)
    assert "queries" in reason(64, 512, 32, 64)
    assert "at most 128" in reason(2, 8192, 16, 256)
    alibi = keyspan.Alibi(torch.ones(16))
    assert reason(2, 8192, 16, 128, bias=alibi) is None
    assert "slopes" in reason(2, 8192, 16, 128, bias=alibi, needs=EVERY._replace(slopes=True))
    assert "softcap" in reason(2, 8192, 16, 128, bias=alibi, softcap=20.0)
    assert "table" in reason(2, 8192, 16, 128, bias=keyspan.RelativeBias(torch.ones(16, 5)))
    assert "softcap" in reason(2, 8192, 16, 128, softcap=20.0)
    assert "need gradients" in reason(2, 8192, 16, 128, needs=EVERY._replace(query=False))


def test_runs_of_groups_go_up_where_that_was_faster():
    def order(B, N, heads, dim, mask, kv_heads=None):
        q, k, v = (torch.empty(B, N, n or heads, dim, dtype=torch.bfloat16) for n in (None, kv_heads, kv_heads))
        problem = make_problem(q, k, v, mask=mask)[0]
        return hopper.backward_order(problem, hopper.backward_tile(problem))

    causal = keyspan.Causal()
    # 16 MiB for the groups at work, and all runs but the last.
    assert order(2, 8192, 16, 128, causal) == (2, 15)
    assert order(4, 4096, 16, 128, causal) == (4, 15)
    assert order(1, 16384, 32, 64, causal) == (2, 15)
    assert order(4, 4096, 32, 64, causal) == (8, 15)
    assert order(16, 1024, 16, 128, causal) == (16, 15)
    assert order(32, 512, 32, 64, causal) == (64, 15)
    assert order(1, 8192, 4, 128, causal) == (4, 0)
    # Of documents, and of windows, all runs.
    assert order(1, 16384, 16, 128, causal & keyspan.Window(1023, 0)) == (2, 8)
    assert order(1, 16384, 32, 64, keyspan.Documents([512] * 32) & causal) == (8, 4)
    assert order(1, 16384, 16, 128, keyspan.Documents([128] * 128) & causal)[1] == 0
    assert order(2, 8192, 32, 128, causal, kv_heads=8) == (4, 0)
    assert order(2, 8192, 16, 128, None) == (2, 0)


def test_a_reason_is_given_against_the_kernel_of_wide_heads(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)

    def reason(N, dim, needs=EVERY, **given):
        q, k, v = (torch.empty(1, N, 8, dim, dtype=torch.bfloat16) for _ in "qkv")
        return hopper.keys_reason_against(make_problem(q, k, v, **given)[0], needs)

    alibi = keyspan.Alibi(torch.ones(8))
    assert reason(8192, 256) is None
    assert reason(8192, 192, mask=keyspan.Causal(), softcap=20.0) is None
    assert reason(8192, 256, bias=alibi, needs=EVERY._replace(slopes=True, query=False)) is None
    assert "more than 128" in reason(8192, 128)
    assert "blocks of 64" in reason(1024, 256)
    assert "table" in reason(8192, 256, bias=keyspan.RelativeBias(torch.ones(8, 5)))
    assert "key and value" in reason(8192, 256, needs=EVERY._replace(key=False))


def test_explain_says_which_kernels_run(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_runs_on", lambda device: True)
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    q, k = (torch.empty(2, 8192, 16, dim, dtype=torch.bfloat16) for dim in (128, 32))
    assert kernels_of(make_problem(q, q, q)[0]) == "forward Hopper's, in Gluon; backward Hopper's, in Gluon"
    table = keyspan.RelativeBias(torch.ones(16, 5))
    forward, backward = kernels_of(make_problem(q, q, q, bias=table)[0]).split("; ")
    assert forward == "forward Hopper's, in Gluon"
    assert "there is a relative table" in backward
    wide = torch.empty(2, 8192, 8, 256, dtype=torch.bfloat16)
    found = kernels_of(make_problem(wide, wide, wide)[0])
    assert "backward of queries Hopper's, in Gluon, of keys and values Hopper's, in Gluon" in found
    wide = wide[..., :252].contiguous()
    assert kernels_of(make_problem(wide, wide, wide)[0]).startswith("plain Triton, not Hopper's: TMA cannot read")
    assert kernels_of(make_problem(k, k, k)[0]).startswith("plain Triton, not Hopper's: head dimensions")


def test_compiles_for_sm_90():
    """Forward: nearly no spills in the loop over keys without ALiBi and a table. Backward: nearly none. Nothing serialised; it
    fits."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    every = ["--all"] if os.environ.get("KEYSPAN_GPU_TESTS") == "all" else []
    run = subprocess.run(
        [sys.executable, str(here / "offline.py"), "hopper", *every],
        env=environment | {"PYTHONPATH": str(here.parent.parent / "src")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    forward, backward, keys, queries = (
        [x for x in found if x["kernel"] == f"hopper_{name}_kernel"]
        for name in ("forward", "backward", "keys", "queries")
    )
    assert len(forward) >= 4
    assert len(backward) >= 2
    assert keys
    assert queries
    for kernel in forward + backward + keys + queries:
        name = f"{kernel['kernel']} {kernel['head_dim']} {kernel['kind']}"
        assert min(kernel["wgmma"], kernel["tma"]) > 0, name
        assert kernel["serialised"] == [], name
        assert kernel["overlaid"] == 0, name
        assert kernel["shared"] <= 227 * 1024, name
        # In forward numbers of the loop where three consumers have 160 registers each, and what a branch needs that few
        # tiles take: scores near the diagonal.
        limit = 16 if kernel not in forward else 32 if kernel["kind"] in ("alibi", "table") else 4
        assert kernel["loop_spills"] <= limit, (name, kernel)
    # What comes before and after has no loop.
    ends = {x["kernel"]: x for x in found if x["kernel"] in ("hopper_stats_kernel", "hopper_finish_kernel")}
    assert len(ends) == 2
    assert ends["hopper_stats_kernel"]["spills"] == 0
