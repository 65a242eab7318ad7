"""Properties of the Triton backend beyond the shared cases, in Triton's interpreter: hidden keys, strides, dtypes."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

import keyspan
from invariance_cases import Random, gradients_in_a_batch
from keyspan.backends import Needs, reference
from keyspan.backends.triton import launch
from keyspan.core.problem import make_problem
from keyspan.testing.cases import malformed

EVERY = os.environ.get("KEYSPAN_GPU_TESTS") == "all"
"""`make test-gpu-offline`: more problems."""

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def gradients(inputs, **given):
    """Output, lse and the gradients of `inputs` through both."""
    x = [t.detach().requires_grad_() for t in inputs]
    out, lse = keyspan.attention(*x, return_lse=True, backend="triton", **given)
    loss = (out.float().cos() * 2).sum() + torch.where(lse.isfinite(), lse, 0).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, x)]


TERMS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "alibi": {"bias": keyspan.Alibi(torch.tensor([0.1, 0.7]))},
    "table": {"bias": keyspan.RelativeBias(torch.arange(10.0).reshape(2, 5) / 7)},
}


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("terms", TERMS)
def test_nan_in_hidden_keys_does_not_leak(terms, special):
    """A document of NaN or inf between two others, with which it shares tiles."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 27, 2, 16) for _ in range(3))
    bad = torch.zeros(27, dtype=torch.bool)
    bad[7:15] = True

    def run():
        found = gradients((q, k, v), mask=keyspan.Documents([7, 8, 12]) & keyspan.Causal(), **TERMS[terms])
        return [x[..., ~bad] if x.dim() == 3 else x[:, ~bad] for x in found]

    clean = run()
    for x in (q, k, v):
        x[:, bad] = special
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), run(), clean, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("seed", "dtype"), [(seed, dtype) for seed in range(4) for dtype in (torch.float32, torch.float16)]
    if EVERY else [(0, torch.float16), (1, torch.float32), (2, torch.float32)], ids=str,
)  # fmt: skip
def test_gradients_do_not_depend_on_the_batch(seed, dtype, monkeypatch):
    """Those of the plain kernels, given the output, which depends on it: few rows share tiles and are split by load."""
    monkeypatch.setattr(launch, "_rows_per_tile", lambda problem: 0)
    monkeypatch.setattr(launch, "_splits", lambda *_: 1)
    case = Random(200 + seed, dtype, small=True)
    want = gradients_in_a_batch(case, "triton", 1, 0)
    for batch, at in ((2, 1), (3, 0)):
        for name, x in gradients_in_a_batch(case, "triton", batch, at).items():
            assert torch.equal(x, want[name]), f"d{name} of entry {at} of {batch}"


@pytest.mark.parametrize("page", [-1, 2**30])
@pytest.mark.parametrize("queries", [[1, 1, 1], [40, 7, 1]], ids=["decoding", "prompts"])
@pytest.mark.parametrize("stored", [None, torch.int8])
def test_block_table_entries_behind_a_document_are_not_used(page, queries, stored):
    """Documents share a block of keys; the block table has invalid pages between them."""
    torch.manual_seed(0)
    k_lengths, table = [5, 19, 0], torch.tensor([[3, 0, 0], [1, 4, 2], [0, 0, 0]], dtype=torch.int32)
    q, k, v = torch.randn(1, sum(queries), 2, 16), torch.randn(1, 40, 2, 16), torch.randn(1, 40, 2, 16)
    scales = {}
    if stored is not None:
        (k, scales["key_scale"]), (v, scales["value_scale"]) = (keyspan.quantize(x, stored, 8) for x in (k, v))

    def run(table):
        mask = keyspan.PagedKeys(queries, k_lengths, table, 8) & keyspan.Causal("bottom_right")
        return keyspan.attention(q, k, v, mask=mask, backend="triton", **scales)

    want = run(table)
    for document, length in enumerate(k_lengths):
        table[document, -(-length // 8) :] = page
    assert torch.equal(run(table), want)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_with_another_output_dtype(inputs, output, descriptors):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 33, 2, 16).to(inputs) for _ in range(3))
    want = gradients((q, k, v), mask=keyspan.Causal())
    got = gradients((q, k, v), mask=keyspan.Causal(), output_dtype=output)
    assert got[0].dtype == output
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == y.dtype or name == "out"
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error < 4 * max(torch.finfo(inputs).eps, torch.finfo(output).eps), f"{name}: {error}"


@pytest.fixture
def sparse(tmp_path):
    """Makes a tensor of zeros whose pages take memory when they are written."""

    def of(elements, dtype):
        return torch.from_file(str(tmp_path / str(elements)), shared=True, size=elements, dtype=dtype)

    return of


@pytest.mark.parametrize("heads", [(3, 3), (3, 1)], ids=["groups", "heads of a group"])
def test_head_offsets_of_64_bits(heads, sparse):
    """The stride of heads fits 32 bits; the offset of the third head does not."""
    apart = 2**30 + 8
    M, D = 20, 16
    memory = sparse(2 * apart + M * D, torch.float16)
    q = memory.as_strided((1, M, 3, D), (0, D, apart, 1))
    torch.manual_seed(0)
    k, v = (torch.randn(1, M, heads[1], D).half() for _ in range(2))
    q.copy_(torch.randn(1, M, 3, D))
    inputs = [x.requires_grad_() for x in (q.detach(), k, v)]
    other = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
    assert inputs[0].stride(2) == apart
    go = torch.randn(1, M, 3, D).half()
    for x in (inputs, other):
        keyspan.attention(*x, mask=keyspan.Causal(), backend="triton").backward(go)
    for x, y in zip(inputs, other, strict=True):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_column_offsets_of_64_bits(kind, sparse):
    """A dense term stored key by key, of which some rows are used."""
    apart = 2**26 + 16
    M, N, D = 20, 40, 16
    dtype = torch.float16 if kind == "bias" else torch.bool
    term = sparse(N * apart, dtype).as_strided((M, N), (1, apart))
    torch.manual_seed(0)
    term.copy_(torch.randn(M, N) if kind == "bias" else torch.rand(M, N) < 0.5)
    q, k, v = (torch.randn(1, n, 2, D) for n in (M, N, N))
    got, want = (gradients((q, k, v), **{kind: x}) for x in (term, term.contiguous()))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_value_read_by_tma_with_unaligned_output_gradient(descriptors):
    """The value is a slice of aligned memory; the rows of the output and of its gradient are not aligned."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 32, dtype=torch.float16) for _ in range(3))
    cut = gradients((q, k, v[..., :20]), mask=keyspan.Causal())
    alone = gradients((q, k, v[..., :20].contiguous()), mask=keyspan.Causal())
    for x, y in zip(cut, alone, strict=True):
        torch.testing.assert_close(x, y)


def test_batches_of_more_than_65535_heads(monkeypatch):
    """Only the first dimension of a grid may exceed 65,535."""
    grids = {}

    def run(kernel, grid, *_, **__):
        grids[kernel.fn.__name__] = grid

    monkeypatch.setattr(launch, "run", run)
    B = 70_000
    q = torch.zeros(B, 2, 1, 4)
    mask = keyspan.KeyLengths(torch.ones(B, dtype=torch.int32))
    bias = torch.zeros(B, 1, 2, 2) + keyspan.RelativeBias(torch.zeros(1, 3))
    problem = make_problem(q, q, q, mask=mask, bias=bias)[0]
    out, lse = launch.forward(problem)
    launch.backward(problem, out, None, out, lse, Needs(True, True, True, False, True, False, [True]))
    # Without a dense bias or a table, and where no query's gradient is needed, the statistics have a kernel of their own.
    launch.backward(
        problem._replace(biases=[], table=None), out, None, out, lse, Needs(False, True, True, False, False, False, [])
    )
    assert set(grids) == {"forward_kernel", "stats_kernel", "queries_kernel", "bounds_kernel", "keys_kernel",
                          "bias_kernel", "table_kernel"}  # fmt: skip
    assert all(n < 65536 for grid in grids.values() for n in grid[1:])


@pytest.mark.parametrize("scale", [1e-50, -1e-50, 1e-40, 0.0])
def test_scales_below_the_range_of_fp32(scale):
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    got = gradients((q, k, v), mask=keyspan.Causal(), scale=scale)
    for x, y in zip(got, gradients((q, k, v), mask=keyspan.Causal(), scale=0.0), strict=True):
        torch.testing.assert_close(x, y)


def test_bias_gradients_have_their_own_shape_and_memory(monkeypatch):
    """Also for terms of equal shape; no tensor of the shape that all terms broadcast to is allocated."""
    torch.manual_seed(0)
    B, M, N, H = 3, 33, 47, 2
    q, k, v = (torch.randn(B, n, H, 16) for n in (M, N, N))
    shapes = [(H, M, N), (B, 1, 1, N), (H, M, N), (M, 1), (1, N)]
    terms = [torch.randn(shape, requires_grad=True) for shape in shapes]
    sizes = []
    backward = launch._backward

    def seen(*given):
        made, calls = backward(*given)
        sizes.extend(made[f"bias {n}"].numel() for n in range(len(terms)))
        return made, calls

    monkeypatch.setattr(launch, "_backward", seen)
    total = sum(terms[1:], terms[0] + keyspan.Alibi(torch.rand(H)))
    out = keyspan.attention(q, k, v, bias=total, backend="triton")
    grads = torch.autograd.grad(out.cos().sum(), terms)
    assert sizes == [x.numel() for x in terms]
    assert len({x.data_ptr() for x in grads}) == len(terms)
    assert torch.equal(grads[0], grads[2])


def test_the_interpreter_is_refused_for_types_it_gets_wrong(monkeypatch):
    q = torch.randn(1, 4, 1, 16, dtype=torch.bfloat16)
    keyspan.attention(q, q, q, backend="triton")
    monkeypatch.delattr("triton.runtime.interpreter.InterpreterBuilder.has_fixed_casts")
    with pytest.raises(NotImplementedError, match="interpreter"):
        keyspan.attention(q, q, q, backend="triton")
    keyspan.attention(q.float(), q.float(), q.float(), backend="triton")


@pytest.mark.parametrize("dense", [False, True], ids=["", "dense bias"])
@pytest.mark.parametrize("value", [-(2**31), -1, 29, 1000, 2**31 - 1])
@pytest.mark.parametrize("field", ["lo", "hi", "diagonal", "sequence", "block_table"])
def test_malformed_ranges_read_nothing_outside_of_the_tensors(field, value, dense):
    problem = malformed(field, value, dense)
    out, lse = launch.forward(problem)
    biases = [True] * len(problem.biases)
    gradients = launch.backward(
        problem, torch.randn_like(out), None, out, lse, Needs(True, True, True, *[False] * 3, biases)
    )
    for x in (out, torch.where(lse == -torch.inf, 0, lse), *gradients[:3], *gradients.biases):
        assert torch.isfinite(x).all()
    if field != "block_table":  # pages that do not exist count as zeros
        torch.testing.assert_close(out, reference.forward(problem)[0])


@pytest.mark.parametrize("bias", [-1e4, -1e9, -1e9 * (1 + 3 / 7), -1e30])
def test_rows_that_a_bias_hides_do_not_disturb_others(bias):
    """The output of such a row is not used: all gradients are as the reference's, however its lse is rounded."""
    for seed in (0, 3):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 20, 1, 16) for _ in range(3))
        term = torch.zeros(20, 20)
        term[3] = bias
        go = torch.randn(1, 20, 1, 16)
        go[:, 3] = 0

        def run(backend, q=q, k=k, v=v, term=term, go=go):
            inputs = [x.clone().requires_grad_() for x in (10 * q, k, v, term)]
            out = keyspan.attention(*inputs[:3], bias=inputs[3], scale=1.0, backend=backend)
            return [out * (go != 0), *torch.autograd.grad(out, inputs, go)]

        for got, want in zip(run("triton"), run("reference"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [-1e4, -1e6, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("needed", ["all", "value"])
def test_weights_of_a_row_that_a_bias_hides_sum_to_one(value, needed):
    """Seen by the gradient of the values, which each weight multiplies; also where it alone is needed."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16) for n in (5, 600, 600))  # as many keys as are split
    bias = torch.randn(5, 600)
    bias[3] = value
    inputs = [x.requires_grad_(needed == "all") for x in (q, k, bias)]
    v.requires_grad_()
    out = keyspan.attention(q, k, v, bias=inputs[2], backend="triton")
    if value < -1e8:  # beside such a number nothing of a score is left in fp32
        torch.testing.assert_close(out[0, 3, 0], v.detach()[0, :, 0].mean(0))
    (dv,) = torch.autograd.grad(out[0, 3].sum(), v)
    torch.testing.assert_close(dv.sum((0, 1, 2)), torch.ones(16))


def _copy(source, target, n: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(target + at, tl.load(source + at, mask=at < n, other=0.0))


def test_the_interpreter_refuses_addresses_outside_of_arguments():
    x, room = torch.ones(16), torch.empty(40)
    copy = triton.jit(_copy)[(1,)]  # decorated where the interpreter is asked for
    copy(x, room[:16], 16)
    with pytest.raises(InterpreterError, match="a load of 4 bytes"):
        copy(x[:15], room[:16], 16)
    copy(x[:15], torch.empty(16), 15)
    with pytest.raises(InterpreterError, match="a store of 4 bytes"):
        copy(x, room[20:35], 16)
