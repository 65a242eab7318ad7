"""The native backend beyond the common cases: each instruction set, decoding, threads, forks, memory, its absence."""

import contextlib
import ctypes
import itertools
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keyspan
from keyspan import info
from keyspan.backends import native
from keyspan.backends.native import binding, use_isa
from keyspan.core.masks import Mask
from keyspan.core.problem import make_problem
from keyspan.dispatch.choose import choose
from keyspan.dispatch.op import attend
from keyspan.testing import peak_memory, results, tolerances, worst
from keyspan.testing.cases import CASES, Case, _holes, position_gradient_errors

pytestmark = pytest.mark.skipif(binding.LIBRARY is None, reason=f"no native library: {binding.WHY_ABSENT}")

S = keyspan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BEST = binding.SUPPORTED[-1:]
OTHERS = binding.SUPPORTED[:-1]
"""The best one runs in test_backends.py."""


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def solve(problem, dtype=torch.float32, isa=None):
    """All results of the native backend."""
    with use_isa(isa or binding.SUPPORTED[-1]):
        return results(lambda p: attend(p, "native"), problem, dtype)


def check(problem, dtype, isas, context=""):
    """Against the fp64 reference, by each of these instruction sets."""
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, dtype, want)
    for isa in isas:
        got = solve(problem, dtype, isa)
        for name, x in want.items():
            error = worst(got[name], x)
            assert error <= allowed[name], f"{isa} {context} {name}: error {error:.3g}, allowed {allowed[name]:.3g}"


def assert_same(got, want):
    for name, x in want.items():
        assert torch.equal(got[name], x), name


# ---- instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.query_run is None], ids=lambda case: case.name)
def test_every_instruction_set_agrees_with_reference(case, dtype):
    check(case.problem(dtype), dtype, OTHERS)


@pytest.mark.parametrize("isa", ["sse9", "", None, 3])
def test_an_unknown_instruction_set_is_refused(isa):
    with pytest.raises(ValueError, match=r"isa: got .*, want one that this machine runs: .*portable"), use_isa(isa):
        pass


def test_an_instruction_set_of_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(binding, "SUPPORTED", ("portable",))
    with pytest.raises(ValueError, match="isa: got 'avx2', want one that this machine runs: portable"), use_isa("avx2"):
        pass


def test_the_instruction_set_is_put_back():
    before = binding.isa_number()
    with contextlib.suppress(KeyError), use_isa("portable"):
        assert binding.isa_number() == 0
        raise KeyError
    assert binding.isa_number() == before


def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    """In a checkout whose native/ it was not compiled from; where there is no native/ nothing can be said."""
    monkeypatch.setattr(binding, "_CHECKOUT", tmp_path)
    assert binding._load()[1] is None
    (tmp_path / "native").mkdir()
    stamp = binding.LIBRARY.keyspan_stamp
    stamp.restype = ctypes.c_char_p
    (tmp_path / "native" / "build.py").write_text(f"def stamp(): return {stamp().decode()!r}")
    assert binding._load()[1] is None
    (tmp_path / "native" / "build.py").write_text("def stamp(): return 'another'")
    with pytest.warns(UserWarning, match=r"compiled from other sources .* run `python native/build.py src/keyspan/"):
        library, reason = binding._load()
    assert library is None
    assert "compiled from other sources" in reason


# ---- decoding -------------------------------------------------------------------------------------------------------

# Few query rows for each key, head dims of whole vectors, and keys for several splits of 1024.
LONG = 2500
PAGES = torch.randperm(160, generator=torch.Generator().manual_seed(1)).reshape(2, 80).int()
END = S.Causal("bottom_right")
DECODE = [
    *(Case(f"decode, {H} heads a group, M {M}", M=M, N=LONG, heads=2 * H, kv_heads=2, K=32, V=32, mask=lambda: END)
      for H, M in [*((H, 1) for H in range(1, 9)), (1, 2), (2, 2), (3, 2), (2, 3), (1, 4), (13, 1), (48, 1), (4, 8),
                   (1, 17)]),
    *(Case(f"decode, K {K}", M=1, N=1100, K=K, V=V, heads=4)
      for K, V in [(16, 16), (48, 80), (80, 48), (64, 128), (128, 64), (256, 256), (96, 16), (40, 72), (100, 36),
                   (19, 33), (1, 3)]),
    Case("decode, heads first", M=1, N=LONG, B=2, heads=4, K=64, V=64, strides="heads first"),
    Case("decode, expanded", M=1, N=1500, B=2, heads=4, K=32, V=32, strides="expanded"),
    Case("decode, lengths", M=1, N=LONG, B=4, heads=8, K=64, V=64, mask=lambda: S.KeyLengths([LONG, 0, 1025, 1]) & END),
    Case("decode, lengths and starts", M=2, N=LONG, B=3, heads=2, K=32, V=32,
         mask=lambda: S.KeyLengths([1400, 64, 1], [1100, 1023, 2499]) & END),
    Case("decode, padded keys", M=4, N=4 * 1300, heads=4, K=32, V=32,
         mask=lambda: S.PaddedKeys([1, 0, 2, 1], [1300, 7, 1200, 64], 1300) & END),
    Case("decode, paged", M=2, N=160 * 16, heads=4, K=48, V=64, alibi=True,
         mask=lambda: S.PagedKeys([1, 1], [1280, 1077], PAGES, 16) & END),
    Case("decode, paged, window and sinks", M=3, N=160 * 16, K=32, V=32, reach=9,
         mask=lambda: S.PagedKeys([2, 1], [1279, 1077], PAGES, 16) & S.Window(1100, 0, "bottom_right") & S.Sinks(3)),
    Case("decode, paged, as many queries of each sequence", M=8, N=160 * 16, heads=4, kv_heads=2, K=40, V=24,
         mask=lambda: S.PagedKeys([4, 4], [1280, 1077], PAGES, 16) & END),
    Case("decode, dense mask", M=2, N=LONG, B=2, heads=8, kv_heads=2, K=32, V=32,
         mask=lambda: _holes(2, LONG) & END),
    Case("decode, dense mask by head", M=3, N=1300, heads=8, kv_heads=2, K=40, V=24, mask=lambda: _holes(8, 1, 1300)),
    Case("decode, window and sinks", M=1, N=LONG, heads=4, K=32, V=32, sinks=True,
         mask=lambda: END & S.Window(1200, 0, "bottom_right") & S.Sinks(70)),
    Case("decode, alibi", M=2, N=LONG, K=32, V=32, alibi=True, mask=lambda: END),
    Case("decode, relative table", M=2, N=1300, K=32, V=32, reach=40, mask=lambda: END),
    Case("decode, softcap", M=1, N=LONG, K=32, V=32, softcap=2.0),
    Case("decode, learned sinks", M=1, N=LONG, heads=4, K=32, V=32, sinks=True),
    Case("decode, dense bias", M=1, N=LONG, heads=4, K=32, V=32, bias=((4, 1, LONG), (4, 1, 1))),
    Case("decode, dropout", M=2, N=1300, K=32, V=32, dropout=0.3),
    Case("decode, scale 0", M=1, N=1300, K=32, V=32, scale=0.0),
    Case("decode, negative scale", M=1, N=1300, K=32, V=32, scale=-0.2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
def test_decode(case, dtype):
    check(case.problem(dtype), dtype, binding.SUPPORTED)


@pytest.mark.parametrize("case", DECODE[3:4] + DECODE[-10:-6], ids=lambda case: case.name)
def test_decode_with_two_threads_is_bitwise_the_same(case):
    problem = case.problem(torch.float32)
    alone = attend(problem_in(problem, torch.float32), "native")
    with threads(2):
        both = attend(problem_in(problem, torch.float32), "native")
    assert all(map(torch.equal, alone, both))


def problem_in(problem, dtype):
    """The problem with its tensors in `dtype`."""
    moved = {name: getattr(problem, name).to(dtype) for name in ("query", "key", "value")}
    return problem._replace(**moved, biases=[x.to(dtype) for x in problem.biases], output_dtype=dtype)


# ---- edges of numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-50, -1e-50])
def test_scales(scale, dtype):
    """0, less than 0, and what is 0 in fp32 though not in fp64."""
    case = Case("scales", M=70, N=90, scale=scale, mask=lambda: S.Causal() & S.Window(20))
    check(case.problem(dtype), dtype, binding.SUPPORTED)


def test_dropout_of_all_but_nothing():
    """A probability that rounds to 1 in 32 bits drops every weight, as in the reference."""
    problem = Case("dropout", dropout=1 - 1e-12, M=20, N=30).problem(torch.float32)
    for isa in binding.SUPPORTED:
        assert not solve(problem, isa=isa)["out"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("value", ["min", -1e9, -1e4, 1e4, "max"])
def test_rows_that_a_finite_bias_hides(value, sinks, dtype):
    """A bias as large as its dtype holds: on all keys of a row, on half of them, on one. As the dense formula does."""
    case = Case("hidden rows", M=70, N=300, heads=4, kv_heads=2, K=32, V=32, sinks=sinks, bias=((70, 300),))
    problem = case.problem(dtype)
    info = torch.finfo(dtype)
    value = {"min": info.min, "max": info.max / 2}.get(value, value)
    bias = problem.biases[0].clone()
    bias[..., :20, :] = value
    bias[..., 20:40, ::2] = value
    bias[..., 40:60, 17] = value
    check(problem._replace(biases=[bias.clamp(info.min, info.max)]), dtype, binding.SUPPORTED, str(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_by_position_do_not_gather_the_rounding_of_the_output(dtype):
    for isa in binding.SUPPORTED:
        with use_isa(isa):
            errors = position_gradient_errors("native", dtype, 640, 640)
        assert max(errors.values()) <= 1, (isa, errors)


def case_of(M, N, mask, dtype, B=1):
    problem = Case("what is hidden", B=B, M=M, N=N, heads=4, kv_heads=2, K=32, V=32, softcap=None).problem(dtype)
    problem = make_problem(problem.query.flatten(2, 3), problem.key, problem.value, mask=mask)[0]
    return problem_in(problem, dtype)._replace(biases=[torch.zeros(1, 1, 1, M, N, dtype=dtype)])


HALF_SEEN = torch.rand(3, 1500, generator=torch.Generator().manual_seed(0)) < 0.4
HALF_SEEN[:, [5, 298]] = torch.tensor([[True, False], [False, False], [False, False]])
LEAKS = {
    "documents": (63, 63, S.Documents([5, 0, 9, 1, 17, 1, 7, 23]) & S.Causal(), [7, 16, 50], [11, 30]),
    "window and sinks": (300, 300, S.Causal() & S.Window(20, 0) & S.Sinks(2), [40, 150], [90, 290]),
    "dense mask": (70, 90, torch.rand(70, 90, generator=torch.Generator().manual_seed(0)) < 0.05, [3, 44], [20]),
    "decode, padded": (3, 3 * 1100, S.PaddedKeys([1, 1, 1], [1090, 900, 40], 1100), [1095, 2150, 2201], []),
    "decode, dense mask": (3, 1500, HALF_SEEN, [5, 298], []),
    "decode, windows that differ": (3, 1500, END & S.Window(1200, 0, "bottom_right"), [5, 298], []),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_hidden_does_not_leak(name, special, dtype):
    """NaN and inf in some keys, values, queries and output gradients reach only what can see them."""
    M, N, mask, bad_keys, bad_rows = LEAKS[name]
    problem = case_of(M, N, mask, dtype)
    visible = problem.dense[0, 0, 0] if problem.dense is not None else torch.zeros(M, N, dtype=torch.bool)
    lo, hi, _ = problem.ranges
    j = torch.arange(N)
    if problem.dense is None:
        visible = ((j >= lo[:, 0, :, None]) & (j < hi[:, 0, :, None])).any(0)
    rows = visible[:, bad_keys].any(1)
    rows[bad_rows] = True
    keys = visible[rows].any(0)
    keys[bad_keys] = True
    assert rows.any()
    assert not rows.all()
    assert not keys.all()

    def run(spoil):
        tensors = {x: getattr(problem, x).clone() for x in ("query", "key", "value")} | {"bias0": problem.biases[0]}
        grad = torch.randn(1, M, 2, 2, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        if spoil:
            tensors["key"][:, bad_keys] = tensors["value"][:, bad_keys] = special
            tensors["query"][:, bad_rows] = grad[:, bad_rows] = special
        for x in tensors.values():
            x.requires_grad_()
        used = problem._replace(**{x: tensors[x] for x in ("query", "key", "value")}, biases=[tensors["bias0"]])
        out, lse = attend(used, "native")
        dq, dk, dv, dbias = torch.autograd.grad(out, list(tensors.values()), grad)
        return {
            "out": out[:, ~rows], "lse": lse[..., ~rows], "dq": dq[:, ~rows], "dbias": dbias[..., ~rows, :],
            "dk": dk[:, ~keys], "dv": dv[:, ~keys],
        }  # fmt: skip

    for isa in binding.SUPPORTED:
        with use_isa(isa):
            clean, spoilt = run(False), run(True)
        for x in clean:
            assert torch.isfinite(spoilt[x]).all(), f"{isa} {x}"
            # The NaN repair adds in another order: what `tolerances` allows for rounding.
            largest = float(clean[x].detach().abs().max())
            allowed = torch.finfo(dtype).eps * largest + 32 * torch.finfo(torch.float32).eps * (1 + largest)
            assert worst(spoilt[x].detach(), clean[x].detach()) <= allowed, f"{isa} {x}"


# ---- backward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "G"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_gradients_of_dense_biases_of_every_shape(B, G):
    """Broadcast over batch, groups, heads, rows and keys, in each combination; rows in chunks for two threads."""
    M, N = 900, 7  # several chunks, and worth two threads
    base = Case("biases", B=B, M=M, N=N, heads=2 * G, kv_heads=G, K=32, V=32, mask=lambda: END).problem(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for shape in sorted(set(itertools.product(*((1, size) for size in (B, G, 2, M, N))))):
        bias = torch.randn(shape, generator=generator).double()
        with threads(2):
            check(base._replace(biases=[bias]), torch.float32, BEST, str(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "kv_heads"), [(1, 1), (1, 3), (3, 1)])
def test_backward_in_chunks(B, kv_heads, dtype):
    """Fewer units of work than threads, or an odd number: rows are cut into chunks, whose sums are put together."""
    case = Case("everything in chunks", B=B, M=230, N=150, heads=2 * kv_heads, kv_heads=kv_heads, alibi=True, reach=5,
                bias=((230, 150), (2 * kv_heads, 1, 150)), sinks=True, dropout=0.2,
                mask=lambda: END & S.Window(40, 0, "bottom_right") & S.Sinks(3))  # fmt: skip
    problem = case.problem(dtype)
    with threads(2):
        check(problem, dtype, binding.SUPPORTED)


# ---- threads and processes ------------------------------------------------------------------------------------------

SHARED = [
    Case("shared, causal", B=2, M=200, N=200, heads=4, kv_heads=2, alibi=True, mask=lambda: S.Causal()),
    Case("shared, documents", M=400, N=400, heads=4, kv_heads=4, bias=((4, 1, 400),),
         mask=lambda: S.Documents([100, 0, 50, 3, 247]) & S.Causal()),
    Case("shared, full", B=3, M=150, N=300, heads=4, kv_heads=2, sinks=True),
]  # fmt: skip
ODD = Case("shared, one unit", M=300, N=200, heads=1, kv_heads=1, alibi=True, bias=((300, 200),), mask=lambda: END)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_two_threads_give_bitwise_the_results_of_one(case, dtype):
    """Where backward cuts no chunks, and every tile is the same: a thread has units of work to itself."""
    problem = case.problem(dtype)
    alone = solve(problem, dtype)
    with threads(2):
        assert_same(solve(problem, dtype), alone)


@pytest.mark.parametrize("case", [*SHARED, ODD], ids=lambda case: case.name)
def test_bitwise_equal_from_run_to_run_with_two_threads(case):
    problem = case.problem(torch.float32)
    with threads(2):
        first = solve(problem)
        for _ in range(5):
            assert_same(solve(problem), first)


def test_bitwise_equal_from_run_to_run_with_nan_in_one_batch_entry():
    """One entry's NaN takes a slower path, on which sums round differently: no other entry may follow by chance."""
    problem = Case("nan in one entry", B=8, M=64, N=64, mask=lambda: S.Causal()).problem(torch.float32)
    key, value = problem.key.clone(), problem.value.clone()
    key[3, 20] = value[3, 20] = torch.nan
    problem = problem._replace(key=key, value=value)
    with threads(2):
        runs = [solve(problem) for _ in range(20)]
    for run in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(run[name].nan_to_num(9), x.nan_to_num(9)), name


def test_several_python_threads_at_once():
    problems = [case.problem(torch.float32) for case in [*SHARED, ODD, DECODE[3]]] * 3
    with threads(2):
        alone = [solve(problem) for problem in problems]
        with ThreadPoolExecutor(4) as pool:  # the instruction set is the process's: not changed here
            at_once = list(pool.map(lambda p: results(lambda x: attend(x, "native"), p, torch.float32), problems))
    for got, want in zip(at_once, alone, strict=True):
        assert_same(got, want)


FORK = """
import os, sys, torch, keyspan
torch.set_num_threads(2)
q, k, v = (torch.randn(2, 300, 2, 16, requires_grad=True) for _ in range(3))

def run():
    out = keyspan.attention(q, k, v, mask=keyspan.Causal(), backend="native")
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

before = run()
child = os.fork()
if child == 0:
    same = all(torch.equal(a, b) for a, b in zip(run(), before))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
after = all(torch.equal(a, b) for a, b in zip(run(), before))
sys.exit(os.waitstatus_to_exitcode(status) or (0 if after else 4))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_forked_child_neither_hangs_nor_errs():
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_packed_keys_and_some_tiles(backward, dtype):
    width, sizes = 16, (1024, 32768)

    def peak(n):
        q, k, v = (torch.randn(1, n, 1, width, dtype=dtype, requires_grad=backward) for _ in range(3))

        def run():
            # A window keeps the time linear too; memory does not depend on what is visible.
            out = keyspan.attention(q, k, v, mask=keyspan.Causal() & keyspan.Window(64), backend="native")
            if backward:
                out.sum().backward()

        return peak_memory(run)

    torch.use_deterministic_algorithms(False)
    with threads(2):
        peaks = [peak(n) for n in sizes]
    # Vectors of fp32: output, keys and values packed; with gradients three of those, both forms of keys and values,
    # and fp32 sums of their gradients for each of the chunks of rows. Besides: ranges and lse, 2 MiB of tiles a thread.
    vectors = 3 if not backward else 4 + 4 + 2 * 4
    bound = sizes[1] * (vectors * width * 4 + 20 * 4) + 2 * 2**21
    assert peaks[1] <= bound, (peaks, bound)
    exponent = math.log(peaks[1] / peaks[0]) / math.log(sizes[1] / sizes[0])
    assert exponent <= 1.05, peaks


# ---- malformed key ranges --------------------------------------------------------------------------------------------

EXTREMES = [-(2**31), -(2**31) + 1, -1000, -1, 2**31 - 2, 2**31 - 1, 5000]


def spoilt(x):
    """Some elements replaced by numbers that no correct mask holds."""
    generator = torch.Generator().manual_seed(5)
    extremes = torch.tensor(EXTREMES, dtype=torch.int32)[torch.randint(len(EXTREMES), x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < 0.2, extremes, x)


@pytest.mark.parametrize("K", [16, 19])
@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("name", ["lo", "hi", "diagonal", "sequence", "block_table"])
def test_numbers_that_no_mask_holds_are_clamped(name, M, K):
    """As though the tensors held the nearest numbers that they may: no read or write leaves a tensor."""
    table = torch.tensor([[3, 0, 5], [6, 1, 2]], dtype=torch.int32)
    mask = S.PagedKeys([M, 0], [11, 3], table, 4) & S.Causal("bottom_right")
    base = Case("malformed", M=M, N=28, K=K, V=K, alibi=name == "diagonal", reach=3, mask=lambda: mask).problem()
    x = spoilt(getattr(base, name))
    limits = {"lo": (0, 12), "hi": (0, 12), "sequence": (0, 1), "block_table": (0, 6)}
    # A diagonal may be any number: it only enters distances, which must not wrap.
    clamped = x if name == "diagonal" else x.clamp(*limits[name])
    if name == "block_table":  # slots are clamped, not pages: a page beyond the last is the last slot, again and again
        slot = (x.long().repeat_interleave(4, 1) * 4 + torch.arange(12) % 4).clamp(0, 27)
        base, clamped = base._replace(page_size=1), slot.int()
    want = results(lambda p: attend(p, "reference"), base._replace(**{name: clamped}), torch.float64)
    problem = problem_in(base._replace(page_size=4, **{name: x}), torch.float32)
    allowed = tolerances(base._replace(**{name: clamped}), torch.float32, want)
    for isa in binding.SUPPORTED:
        got = solve(problem, torch.float32, isa)
        for result, y in want.items():
            assert worst(got[result], y) <= allowed[result], f"{isa} {result}"


@pytest.mark.parametrize("K", [16, 19])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_paged_keys_without_documents_or_pages(shape, K):
    """Queries that see no key."""
    lengths = torch.zeros(shape[0], dtype=torch.int32)
    q, k, v = (torch.randn(1, n, 2, K, requires_grad=True) for n in (3, 28, 28))
    mask = S.PagedKeys(lengths, lengths, torch.zeros(shape, dtype=torch.int32), 4)
    out, lse = keyspan.attention(q, k, v, mask=mask, backend="native", return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_ranges_whose_tensors_were_exchanged_are_refused():
    """Forms are checked at construction, and once more at a call."""
    q, k, v = (torch.zeros(1, n, 2, 16) for n in (3, 28, 28))

    def ranges():
        return (S.PagedKeys([2, 1], [11, 3], PAGES[:, :3] % 7, 4) & S.Causal()).lower(1, 3, 28, q.device)

    for name, x, said in [
        ("sequence", torch.zeros(3, dtype=torch.int64), "got torch.int64, want torch.int32"),
        ("sequence", torch.zeros(1, dtype=torch.int32), r"got shape \[1\], want \[3\]"),
        ("block_table", torch.zeros(3, dtype=torch.int32), r"got shape \[3\]"),
    ]:
        spoilt = ranges()
        getattr(spoilt, name).data = x
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            keyspan.attention(q, k, v, mask=spoilt)


@pytest.mark.parametrize("softcap", [1e39, 1e38, 3e37, 1e-39])
def test_softcaps_at_the_ends_of_fp32(softcap):
    check(Case("softcap", M=70, N=90, softcap=softcap).problem(torch.float32), torch.float32, binding.SUPPORTED)


# ---- what it refuses, and its absence -------------------------------------------------------------------------------

PLAIN = CASES[0].problem(torch.float32)


def plain(dtype=torch.float32, **fields):
    return problem_in(PLAIN, dtype)._replace(**fields)


def wide(dim):
    return torch.zeros(1, 47, 2, dim)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (plain(torch.float64), "its dtypes are float32, bfloat16 and float16, and query is float64"),
        (plain(output_dtype=torch.float64), "its dtypes are float32, bfloat16 and float16, and output is float64"),
        (plain(biases=[torch.zeros(1, 1, 1, 33, 47).double()]),
         "its dtypes are float32, bfloat16 and float16, and a bias is float64"),
        (plain(value=wide(257)), "head dims go up to 256, and this one is 257"),
        (plain(query=torch.zeros(1, 33, 2, 1, 300), key=wide(300)), "head dims go up to 256, and this one is 300"),
        (plain(**dict.fromkeys(("lo", "hi", "diagonal"), torch.zeros(5, 1, 33, dtype=torch.int32))),
         "a query row may see up to 4 ranges of keys, and this mask has 5"),
        (plain(query=torch.zeros(1, 33, 2, 1, 16, device="meta")), "it computes on CPUs, and query is on meta"),
    ],
)  # fmt: skip
def test_what_it_refuses(problem, reason):
    assert native.reason_against(problem) == reason
    with pytest.raises(NotImplementedError, match="backend 'native' cannot compute this: "):
        choose(problem, "native")


def test_four_ranges_are_taken():
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 301, (8, 1, 40), generator=generator, dtype=torch.int32).sort(0).values
    diagonal = torch.randint(0, 300, (4, 1, 40), generator=generator, dtype=torch.int32)
    base = Case("four ranges", M=40, N=300, alibi=True, reach=7).problem(torch.float32)
    check(base._replace(lo=edges[::2].contiguous(), hi=edges[1::2].contiguous(), diagonal=diagonal), torch.float32,
          binding.SUPPORTED)  # fmt: skip


def test_without_the_library_chunked_runs_and_info_says_why(monkeypatch, capsys):
    monkeypatch.setattr(binding, "WHY_ABSENT", "no C++ compiler was found")
    problem = plain()
    assert choose(problem, None) == "chunked"
    with pytest.raises(
        NotImplementedError, match="backend 'native' cannot compute this: no C\\+\\+ compiler was found"
    ):
        choose(problem, "native")
    assert info.collect()["backends"]["native"] == "no C++ compiler was found"
    info.main()
    assert "attention.native              unavailable: no C++ compiler was found" in capsys.readouterr().out
    explained = info.explain(*(torch.zeros(1, 8, 1, 16) for _ in range(3)))
    assert explained.backend == "chunked"
    assert "native      cannot: no C++ compiler was found" in str(explained)


def test_why_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(binding, "_HERE", tmp_path)
    monkeypatch.setattr(binding, "_WHY_NOT_BUILT", tmp_path / "not_built.txt")
    assert binding._load() == (None, f"the native library was not built: {binding._BUILD}")
    (tmp_path / "not_built.txt").write_text("the compiler failed\n")
    assert binding._load() == (None, "the compiler failed")
    (tmp_path / "libkeyspan.so").write_text("no library")
    found, why = binding._load()
    assert found is None
    assert why.startswith("the native library cannot be loaded: ")


@pytest.mark.parametrize("change", ["renamed", "of another type", "missing", "swapped"])
@pytest.mark.parametrize("struct", ["PARAMS_FIELDS", "DENSE_FIELDS"])
def test_a_library_with_other_fields_is_refused(struct, change, monkeypatch):
    """The structs are compared by the names, types and order of their fields: all of these but one keep the size."""
    *head, (name, kind), last = fields = getattr(binding, struct)
    changed, want = {
        "renamed": ((*head, (f"{name}_2", kind), last), f"{name}:{kind} there and {name}_2:{kind} here"),
        "of another type": ((*head, (name, "text"), last), f"{name}:{kind} there and {name}:text here"),
        "missing": (fields[:-1], f"{':'.join(last)} there and nothing here"),
        "swapped": ((*head, last, (name, kind)), f"{name}:{kind} there and {':'.join(last)} here"),
    }[change]
    monkeypatch.setattr(binding, struct, changed)
    field = len(head) + (change == "missing")
    assert binding._load() == (
        None,
        f"the native library is of another version of keyspan ({struct[:-7].lower()}: field {field} is "
        f"{want}): {binding._BUILD}",
    )


# ---- any problem ----------------------------------------------------------------------------------------------------

PRIMES = [1, 2, 3, 7, 17, 31, 61, 67, 97, 131]
lengths = st.lists(st.sampled_from([0, 0, 1, 2, 5, 13, 31, 67]), min_size=1, max_size=6).filter(sum)
aligns = st.sampled_from(["top_left", "bottom_right"])


@st.composite
def masks(draw):
    """(mask, B, M, N)"""
    kind = draw(st.sampled_from(
        ["none", "frame", "documents", "cross", "padded", "gappy", "paged", "lengths", "dense"]))  # fmt: skip
    B, M, N = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(PRIMES)), draw(st.sampled_from([*PRIMES, 1061]))
    q = draw(lengths)
    k = [draw(st.sampled_from([0, 1, 6, 40, 83])) for _ in q]
    align = draw(aligns)
    if kind == "none":
        return None, B, M, N
    if kind == "dense":
        p = draw(st.sampled_from([0.0, 0.1, 0.5]))
        shape = (*draw(st.sampled_from([(), (1,), (2,)])), draw(st.sampled_from([1, M])), N)
        return torch.rand(shape, generator=torch.Generator().manual_seed(M)) < p, B, M, N
    if kind == "frame":
        mask = S.Causal(align)
    elif kind == "documents":
        mask, M, N, align = S.Documents(q), sum(q), sum(q), "top_left"
    elif kind == "cross":
        mask, M, N = S.Documents(q, k), sum(q), sum(k)
    elif kind == "padded":
        mask, B, M, N = S.PaddedKeys(q, k, 83), 1, sum(q), 83 * len(q)
    elif kind == "gappy":
        starts = [draw(st.integers(0, 50)) for _ in q]
        mask, B, M, N = S.GappyKeys(q, starts, k), 1, sum(q), 133
    elif kind == "paged":
        size, pages = draw(st.sampled_from([(1, 83), (7, 12), (64, 2)]))
        table = torch.randint(0, 50, (len(q), pages), generator=torch.Generator().manual_seed(M), dtype=torch.int32)
        mask, B, M, N = S.PagedKeys(q, k, table, size), 1, sum(q), 50 * size
    else:
        mask = S.KeyLengths([draw(st.integers(0, N)) for _ in range(B)])
    for part in draw(
        st.sampled_from([(), ("causal",), ("window",), ("causal", "window", "sinks"), ("window", "sinks")])
    ):
        if part == "causal":
            mask = mask & S.Causal(align)
        elif part == "window":
            mask = mask & S.Window(draw(st.sampled_from([0, 1, 9, 40])), draw(st.sampled_from([0, 3, None])), align)
        else:
            mask = mask & S.Sinks(draw(st.sampled_from([1, 5])))
    return mask, B, M, N


@st.composite
def problems(draw):
    mask, B, M, N = draw(masks())
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (3, 2)]))
    if isinstance(mask, torch.Tensor) and mask.dim() == 3:
        kv_heads, group = 2, 1
    Hq, dim = kv_heads * group, st.sampled_from([1, 8, 16, 19, 32, 48, 64])
    paged = isinstance(mask, Mask) and any(isinstance(x, S.PagedKeys) for x in (mask, *mask.parts))
    term = st.sampled_from([(), ((M, N),), ((Hq, 1, N), (M, 1)), ((B, Hq, M, N),), ((B, 1, 1, N),)])
    return Case(
        "fuzz", B=B, M=M, N=N, heads=Hq, kv_heads=kv_heads, K=draw(dim), V=draw(dim), mask=lambda: mask,
        alibi=draw(st.booleans()), reach=draw(st.sampled_from([None, 0, 5, 60])), bias=() if paged else draw(term),
        softcap=draw(st.sampled_from([None, None, 3.0])), sinks=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])), scale=draw(st.sampled_from([None, None, 0.5, -0.3])),
        strides=draw(st.sampled_from(["contiguous", "heads first", "last", "sliced", "expanded"])),
    )  # fmt: skip


def test_the_fuzz_driver_that_sanitizers_run(tmp_path):
    root = Path(__file__).parent.parent
    libraries = sorted(Path(binding.__file__).parent.glob("libkeyspan.*"))
    compiler = next((x for x in ("c++", "g++", "clang++") if shutil.which(x)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "fuzz"
    command = [compiler, "-std=c++17", "-O1", root / "native/tests/fuzz.cpp", libraries[0], "-o", driver]
    subprocess.run([*command, f"-Wl,-rpath,{libraries[0].parent}"], check=True, timeout=120)
    done = subprocess.run([driver, "40"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "all right" in done.stderr


@given(case=problems(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(binding.SUPPORTED or [""]),
       count=st.sampled_from([1, 2]))  # fmt: skip
@settings(max_examples=100, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_problem(case, dtype, isa, count):
    problem = case.problem(dtype)
    with threads(count):
        check(problem, dtype, [isa], str(case))
