"""The product whose rows do not depend on one another, and the layers that use it, in Triton's interpreter."""

import pytest
import torch

from keyspan.layers import cross_entropy, gemm, linear, linear_cross_entropy, log_softmax, swiglu
from keyspan.layers.gemm import product as plain_product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile of all products."""
    from keyspan.layers import triton_product

    def use(*tile):
        monkeypatch.setattr(triton_product, "tile", lambda *form: triton_product.Tile(*tile))
        return triton_product.product

    return use


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (7, 40, 24), (300, 33, 40), (5, 17, 19)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_product(tiles, dtype, described, M, N, K, bias, given):
    """Tiles of several shapes, more of them than programs, in several groups."""
    torch.manual_seed(0)
    x, weight = torch.randn(M, 2 * K).to(dtype)[:, :K], torch.randn(K, N).to(dtype).t()  # neither is contiguous
    b = torch.randn(2 * N).to(dtype)[::2] if bias else None
    want = x.double() @ weight.double().t() + (0 if b is None else b.double())
    error = torch.finfo(dtype).eps * want.abs() + K * torch.finfo(torch.float32).eps * want.abs().max()
    for tile in ((16, 16, 16, 1, 1, described), (32, 16, 32, 1, 1, described)):
        out = torch.full((M, N + 3), torch.nan, dtype=dtype) if given else None
        y = tiles(*tile)(x, weight, b, None if out is None else out[:, :N])
        assert y.dtype == dtype
        assert ((y.double() - want).abs() <= error).all()
        assert out is None or out[:, N:].isnan().all()


@pytest.fixture
def in_order(monkeypatch):
    """Tiles are multiplied as matrix instructions do it: one number of K after the other, each row for itself."""
    from interpreter import _floats
    from triton.runtime import interpreter

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total, left, right = d.data.copy(), _floats(a), _floats(b)
        for k in range(left.shape[1]):
            total += left[:, k : k + 1] * right[k : k + 1]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [24, 64])
def test_rows_do_not_depend_on_the_others(tiles, in_order, dtype, K):
    """Nor on the tile: sums are not split over K."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(40, K).to(dtype), torch.randn(50, K).to(dtype), torch.randn(50).to(dtype)
    want = tiles(16, 16, 16, 1, 1, True)(x, weight, bias)
    for tile in ((32, 16, 16, 1, 1, True), (16, 64, 32, 1, 1, False), (64, 32, 64, 1, 1, True)):
        product = tiles(*tile)
        for first, last in ((0, 40), (0, 1), (7, 8), (3, 20), (39, 40)):
            assert torch.equal(product(x[first:last], weight, bias), want[first:last])


def test_rows_that_share_memory(tiles):
    x, weight = torch.arange(16.0).expand(5, 16), torch.ones(3, 16)
    assert torch.equal(tiles(16, 16, 16, 1, 1, True)(x, weight, None), torch.full((5, 3), 120.0))


def test_nothing_to_multiply(tiles):
    product = tiles(16, 16, 16, 1, 1, True)
    assert product(torch.zeros(0, 8), torch.zeros(5, 8), None).shape == (0, 5)
    assert product(torch.zeros(3, 8), torch.zeros(0, 8), None).shape == (3, 0)


@pytest.fixture
def on_kernels(tiles, monkeypatch):
    """Layers on the CPU run the kernels of a GPU."""
    tiles(16, 16, 16, 1, 1, True)
    from keyspan.layers import triton_kernels, triton_product

    for module in (gemm, cross_entropy):
        monkeypatch.setattr(module, "native", lambda *x: False)
        monkeypatch.setattr(module, "invariant_kernels", lambda *x: triton_product)
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: True)
    monkeypatch.setattr(cross_entropy, "kernels_for", lambda *x: triton_kernels)


FUNCTIONS = {
    "linear": lambda x, w, b, on: linear(x, w, b, invariant=on),
    "swiglu": lambda x, w, b, on: swiglu(x, w, b, w[:3, :6], b[:3], invariant=on),
    "losses": lambda x, w, b, on: linear_cross_entropy(
        x[0], w, torch.tensor([3, 0, -100, 11, 5]), reduction="none", chunk=2, invariant=on
    ),
    "loss": lambda x, w, b, on: linear_cross_entropy(
        x[0], w, torch.tensor([3, 0, -100, 11, 5]), bias=b, softcap=5.0, chunk=2, invariant=on
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layers_with_invariant_are_the_layers(name, on_kernels):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 20), (12, 20), (12,))]
    results = []
    for invariant in (False, True):
        y = FUNCTIONS[name](*inputs, invariant)
        total = (y * torch.arange(y.numel()).view(y.shape).cos()).sum()
        results.append([y, *torch.autograd.grad(total, inputs, allow_unused=True)])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_are_log_probabilities(dtype, on_kernels):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(40, 24).to(dtype), torch.randn(70, 24).to(dtype), torch.randint(70, (40,))
    logits = plain_product(x, weight, None, dtype, True)
    want = log_softmax(logits).gather(1, targets[:, None])[:, 0]
    losses = linear_cross_entropy(x, weight, targets, reduction="none", chunk=16, invariant=True)
    assert torch.equal(-losses, want)
    assert torch.equal(log_softmax(logits[3]), log_softmax(logits)[3])
