"""The layers' kernels in the native library, on every instruction set of this machine."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from keyspan.backends.native import binding, use_isa
from keyspan.layers import SwiGLU, gemm, native_kernels, rms_norm, rotary_table
from keyspan.layers.kernels import kernels_for
from keyspan.layers.rope import rotate, rotate_qkv
from layer_cases import *  # noqa: F403
from layer_cases import LOW, wide, within_a_rounding

if binding.WHY_ABSENT is not None:
    pytest.skip(binding.WHY_ABSENT, allow_module_level=True)


@pytest.fixture(params=binding.SUPPORTED)
def kernels(request):
    with use_isa(request.param):
        yield native_kernels


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("D", [7, 64, 131])
def test_rms_norm_rounds_once(kernels, dtype, D):
    x, grad = (torch.randn(9, D).to(dtype) for _ in range(2))
    residual, weight = torch.randn(9, D), torch.randn(D)
    out, total, inverse = kernels.rms_norm(x, residual, weight, 1e-6, dtype)
    within_a_rounding(total, x.double() + residual, dtype)
    total64, weight64 = wide(total, weight)
    want = F.rms_norm(total64, (D,), weight64, 1e-6)
    within_a_rounding(out, want.detach(), dtype)
    want.backward(grad.double())
    dx, _, dweight, _ = kernels.rms_norm_backward(grad, None, total, None, weight, inverse)
    torch.testing.assert_close(dx.double(), total64.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(dweight.double(), weight64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("D", [7, 64, 131])
@pytest.mark.parametrize("activation", ACTIVATIONS)  # noqa: F405
def test_gate_rounds_as_the_formula(kernels, dtype, D, activation):
    formula = ACTIVATIONS[activation]  # noqa: F405
    x12, grad = (3 * torch.randn(9, 2 * D)).to(dtype), torch.randn(9, D).to(dtype)
    x1, x2 = x12.chunk(2, -1)
    want = formula(x1.double()).to(dtype) * x2  # torch's own gelu loses digits of numbers far below 0
    eps = torch.finfo(dtype).eps
    out = kernels.gate(x12, activation)
    least = 1e-14 + torch.finfo(dtype).tiny * eps  # of fp64's formula, and of a subnormal number
    torch.testing.assert_close(out, want, rtol=2 * eps, atol=least)  # the last place of the activation may differ
    assert (out == want).float().mean() > 0.95
    dx12, again = kernels.gate_backward(grad, x12, activation)
    assert torch.equal(again, out)
    (x64,) = wide(x12)
    a, b = x64.chunk(2, -1)
    (formula(a) * b).backward(grad.double())
    torch.testing.assert_close(dx12.double(), x64.grad, rtol=2 * eps, atol=1e-4)


@pytest.mark.parametrize("value", [-200.0, -89.0, -12.0, 0.0, 12.0, 3e38, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("activation", ACTIVATIONS)  # noqa: F405
def test_gate_at_the_ends_of_the_range(kernels, value, activation):
    x12 = torch.tensor([[value, 1.0]])
    wide = x12[:, :1].double().requires_grad_()
    want = ACTIVATIONS[activation](wide)  # noqa: F405
    want.backward()
    torch.testing.assert_close(
        kernels.gate(x12, activation), want.detach().float(), rtol=1e-6, atol=1e-30, equal_nan=True
    )  # NaN for -inf, as torch
    if math.isfinite(value):
        dx12, _ = kernels.gate_backward(torch.ones(1, 1), x12, activation)
        torch.testing.assert_close(dx12[:, :1].double(), wide.grad, rtol=1e-5, atol=1e-30)


def test_infinite_and_nan_logits_are_those_of_torch(kernels):
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([[-inf, 1.0, 2.0], [inf, 1.0, 2.0], [nan, 1.0, 2.0], [-inf, -inf, -inf], [1.0, nan, 2.0]])
    targets = torch.tensor([1, 1, 1, 1, 0])
    lse, losses = torch.empty(5), torch.empty(5)
    options = {"ignore_index": -100, "softcap": None, "z_loss": 0.0}
    leaf = z.clone().requires_grad_()
    want = F.cross_entropy(leaf, targets, reduction="none")
    want.sum().backward()
    dz = kernels.cross_entropy_(z, None, targets, lse, losses, gradient=True, **options)
    torch.testing.assert_close(losses, want.detach(), equal_nan=True)
    assert torch.equal(dz.isnan(), leaf.grad.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_rows_and_threads_change_no_bit(kernels, dtype):
    """A row's result is the same alone, among others, and on any number of threads."""
    T, D = 700, 96
    x, grad, residual = (torch.randn(T, D).to(dtype) for _ in range(3))
    weight, targets = torch.randn(D), torch.randint(D, (T,))
    table = rotary_table(torch.arange(T), 16)

    def run(rows):
        out, total, inverse = kernels.rms_norm(x[rows], residual[rows], weight, 1e-6, dtype)
        dx, _, dweight, _ = kernels.rms_norm_backward(grad[rows], grad[rows], total, None, weight, inverse)
        turned = x[rows].clone().view(-1, 6, 16)
        angles = [t[rows].contiguous() for t in table]
        kernels.rotate_qkv(turned, *angles, (2, 2, 2), interleaved=False)
        back = kernels.rotate_qkv_backward(tuple(t.contiguous() for t in turned.split(2, 1)), *angles, interleaved=True)
        lse, losses = torch.empty(len(total)), torch.empty(len(total))
        options = {"ignore_index": -100, "softcap": 4.0, "z_loss": 0.1}
        dz = kernels.cross_entropy_(x[rows].clone(), None, targets[rows], lse, losses, gradient=True, **options)
        gates = (
            kernels.gate(x[rows], "gelu_tanh"),
            *kernels.gate_backward(grad[rows, : D // 2].contiguous(), x[rows], "silu"),
        )
        return [out, total, inverse, dx, turned, back, lse, losses, dz, *gates], dweight

    together, dweight = run(slice(None))
    alone, _ = run(slice(333, 334))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[333:334], b)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded, dweight_threaded = run(slice(None))
    finally:
        torch.set_num_threads(before)
    for a, b in zip([*together, dweight], [*threaded, dweight_threaded], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (7, 129, 65), (201, 515, 530), (64, 64, 48), (3, 0, 5)])
def test_products_of_matrices(kernels, dtype, transposed, M, K, N):
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N + 3).to(dtype)[:, :N]
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    given = a.t().contiguous() if transposed else a

    def check(got, want):
        bound = want.abs() * torch.finfo(got.dtype).eps / 2 + size * max(K, 1) ** 0.5 * torch.finfo(torch.float32).eps
        assert ((got.double() - want).abs() <= bound).all()

    out = gemm.native_matmul(given, b, torch.full((M, N), torch.nan), transposed=transposed)
    check(out, exact)
    low = gemm.native_matmul(given, b, torch.full((M, N), torch.nan, dtype=dtype), transposed=transposed)
    assert torch.equal(low, out.to(dtype))
    total = out.clone()
    gemm.native_matmul(given, b, total, transposed=transposed, accumulate=True)
    check(total, 2 * exact)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = gemm.native_matmul(given, b, torch.empty(M, N), transposed=transposed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threaded, out)
    # A matrix in fp32 is rounded as it is packed; how it lies changes no bit.
    wide, bias = torch.randn(K, N), torch.randn(N).to(dtype)
    added = gemm.native_matmul(given, wide.to(dtype), torch.empty(M, N), transposed=transposed, bias=bias)
    check(added, a.double() @ wide.to(dtype).double() + bias.double())
    for matrix in (wide, wide.t().contiguous(), wide.to(dtype).t().contiguous()):
        lies = {"transposed": transposed, "b_transposed": matrix.shape == (N, K) and matrix is not wide}
        assert torch.equal(gemm.native_matmul(given, matrix, torch.empty(M, N), bias=bias, **lies), added)
    if K and not transposed:  # many rows and few are multiplied in different ways
        weight = b.t().contiguous()
        assert torch.equal(gemm.linear(a, weight), low)
        assert torch.equal(torch.cat([gemm.linear(row, weight) for row in a.split(1)]), low)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize(("D", "C"), [(4, 1), (4120, 70), (4120, 520)])
def test_packed_weights_have_the_bits_of_plain_ones(kernels, dtype, D, C):
    """Panels longer than are multiplied in one go, and weights larger than are kept in the last cache, too."""
    x, weight, bias = torch.randn(205, D).to(dtype), torch.randn(C, D).to(dtype), torch.randn(C).to(dtype)
    packed = gemm.PackedWeight(weight)
    for rows in (1, 7, 25, 97, 205):
        assert torch.equal(packed.multiply(x[:rows], bias), gemm.linear(x[:rows], weight, bias))
    rounded = gemm.PackedWeight(weight, int8=True)
    many = rounded.multiply(x, bias)
    for first in (0, 94, 191):
        assert torch.equal(rounded.multiply(x[first : first + 2], bias), many[first : first + 2])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(packed.multiply(x, bias), gemm.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("activation", ACTIVATIONS)  # noqa: F405
def test_the_gradients_of_a_model_do_not_depend_on_threads(dtype, activation):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, dim=80, layers=2, heads=4, kv_heads=2, activation=activation, qkv_bias=True)  # noqa: F405
    model, lengths = GPT(config), [301, 5, 1, 400]  # noqa: F405
    tokens = torch.randint(97, (sum(lengths),))

    def run(threads):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.loss(tokens, tokens.roll(1), lengths)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    before = torch.get_num_threads()
    try:
        want = run(1)
        for threads in (2, 3):
            assert all(map(torch.equal, run(threads), want))
    finally:
        torch.set_num_threads(before)


def test_no_rows_are_no_work(kernels):
    x, weight = torch.empty(0, 8), torch.ones(8)
    out, total, inverse = kernels.rms_norm(x, x, weight, 1e-6, torch.float32)
    assert out.shape == total.shape == (0, 8)
    dx, _, dweight, _ = kernels.rms_norm_backward(x, None, total, None, weight, inverse)
    assert dx.shape == (0, 8)
    assert not dweight.any()
    assert kernels.gate(x, "silu").shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_no_rows_are_zero(dtype):
    module, x = SwiGLU(8, 12, 5), torch.empty(0, 8, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = module(gemm.linear(x, torch.ones(8, 8, requires_grad=True)))
    assert y.shape == (0, 5)
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), list(module.parameters())))


@pytest.mark.parametrize("rows", [1, 40, 60, 300])
@pytest.mark.parametrize("dtype", LOW)
def test_weights_in_fp32_are_multiplied_as_if_rounded_before(kernels, dtype, rows):
    x, weight, bias = torch.randn(2, rows, 33), torch.randn(70, 33), torch.randn(70)
    with torch.autocast("cpu", dtype):
        got = gemm.linear(x, weight, bias)
    assert torch.equal(got, gemm.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))


def test_where_they_run():
    x = torch.randn(4, 4)
    assert kernels_for(x) is native_kernels
    assert kernels_for(x.bfloat16()) is native_kernels
    for other in (x.double(), x.to("meta"), torch.view_as_complex(x.view(8, 2)).conj().imag):
        assert kernels_for(other) is None, "the kernels read memory as it lies"
    with FlopCounterMode(display=False):
        assert kernels_for(x) is None, "a mode sees every call"


def test_what_the_kernels_cannot_read_is_left_to_torch():
    x, weight, table = torch.randn(4, 12), torch.randn(12), rotary_table(torch.arange(4), 2)
    for other in (weight.to("meta"), weight.double(), weight.as_subclass(Subclass)):
        assert kernels_for(x, other) is None
    assert rms_norm(x, weight, dtype=torch.float64).dtype == torch.float64
    for short in ([t[:1] for t in table], [t.double() for t in table]):  # torch broadcasts the one, widens by the other
        wanted = [rotate(part, tuple(short))[0] for part in x.view(1, 4, 6, 2).split((3, 2, 1), 2)[:2]]
        for got, want in zip(rotate_qkv(x * 1, tuple(short), (3, 2, 1)), wanted, strict=False):
            torch.testing.assert_close(got[0], want)
    with pytest.raises(ValueError, match="table: got shape"):
        rotate_qkv(x * 1, tuple(t[:3] for t in table), (3, 2, 1))
    assert rotate_qkv(x[:0] * 1, tuple(t[:0] for t in table), (3, 2, 1))[0].shape == (1, 0, 3, 2)


class Subclass(torch.Tensor):
    pass
