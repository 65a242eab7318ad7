"""Tests of the layers' fused kernels against the plain formulas, forward and backward.

A module that imports them all has a fixture `kernels`: the module of kernels to test.
"""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from keyspan.layers import (
    Linear,
    RMSNorm,
    add_rms_norm,
    gated,
    geglu,
    linear_cross_entropy,
    norm_linear,
    rms_norm,
    rotary_table,
    swiglu,
)
from keyspan.layers.rope import rotate, rotate_qkv
from keyspan.models.gpt import GPT, GPTConfig

LOW = [torch.bfloat16, torch.float16]


def within_a_rounding(got, exact, dtype):
    """Half a unit in the last place of the exact value, and fp32's own error on the way."""
    bound = exact.abs() * (torch.finfo(dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps) + 1e-6
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= bound).all()


def wide(*tensors):
    return [x.double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (33, 300), (70, 1100)])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(kernels, shape, add):
    torch.manual_seed(0)
    x, residual, grad, grad_total = (torch.randn(shape) for _ in range(4))
    weight = torch.randn(shape[1])
    x64, r64, w64 = (t.double().requires_grad_() for t in (x, residual, weight))
    total = x64 + r64 if add else x64
    want = F.rms_norm(total, weight.shape, w64, 1e-3)
    (want * grad).sum().add((total * grad_total).sum() if add else 0).backward()

    out, got_total, inverse = kernels.rms_norm(x, residual if add else None, weight, 1e-3, torch.float32)
    torch.testing.assert_close(out.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_total.double(), total.detach(), rtol=1e-6, atol=1e-6)
    more = grad_total if add else None
    dx, none, dweight, nothing = kernels.rms_norm_backward(grad, more, got_total, None, weight, inverse)
    assert none is nothing is None
    torch.testing.assert_close(dx.double(), x64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dweight.double(), w64.grad, rtol=1e-4, atol=1e-5)
    assert kernels.rms_norm_backward(grad, None, got_total, None, weight, inverse, weight_too=False)[2] is None
    again, rounded, *_ = kernels.rms_norm_backward(
        grad, more, got_total, None, weight, inverse, weight_too=False, residual_dtype=torch.bfloat16
    )
    assert torch.equal(again, dx)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, dx.bfloat16())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (33, 300)])
def test_backward_adds_and_norms_again_with_the_same_bits(kernels, shape, dtypes):
    torch.manual_seed(0)
    x, residual, grad, grad_total = (torch.randn(shape) for _ in range(4))
    x, grad_total = x.to(dtypes[0]), grad_total.to(dtypes[0])
    residual, grad, weight = residual.to(dtypes[1]), grad.bfloat16(), torch.randn(shape[1])
    out, total, inverse = kernels.rms_norm(x, residual, weight, 1e-3, torch.bfloat16)
    of_sum, of_terms = (
        kernels.rms_norm_backward(grad, grad_total, *what, weight, inverse, residual_dtype=torch.bfloat16, normed=True)
        for what in ((total, None), (x, residual))
    )
    assert torch.equal(of_sum[3], out)
    for a, b in zip(of_sum, of_terms, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("K", [2, 24, 64])
@pytest.mark.parametrize("heads", [(2, 1, 2), (3, 3, 3)])
def test_rotary_in_place_and_back(kernels, interleaved, K, heads):
    torch.manual_seed(0)
    T, turned = 37, sum(heads[:2])
    x = torch.randn(T, sum(heads), K)
    table = rotary_table(torch.arange(T), K)
    y = x.clone()
    kernels.rotate_qkv(y, *table, heads, interleaved=interleaved)
    torch.testing.assert_close(y[:, :turned], rotate(x[None, :, :turned], table, interleaved)[0])
    assert torch.equal(y[:, turned:], x[:, turned:])
    apart = kernels.rotated_qkv(x, *table, heads, interleaved=interleaved)
    assert all(part.is_contiguous() for part in apart)
    assert torch.equal(torch.cat(apart, 1), y)
    parts = tuple(part.contiguous() for part in y.split(heads, 1))
    back = kernels.rotate_qkv_backward(parts, *table, interleaved=interleaved)
    torch.testing.assert_close(back, x)


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@pytest.mark.parametrize("shape", [(1, 1), (9, 70), (40, 600)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate(kernels, shape, activation):
    torch.manual_seed(0)
    T, D = shape
    x12, grad = torch.randn(T, 2 * D) * 3, torch.randn(T, D)
    wide = x12.double().requires_grad_()
    a, b = wide.chunk(2, -1)
    want = ACTIVATIONS[activation](a) * b
    want.backward(grad.double())
    torch.testing.assert_close(kernels.gate(x12, activation).double(), want.detach(), rtol=1e-5, atol=1e-6)
    dx12, again = kernels.gate_backward(grad, x12, activation)
    torch.testing.assert_close(dx12.double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.double(), want.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("C", [3, 5000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cross_entropy(kernels, C, softcap, with_bias, z_loss, dtype):
    torch.manual_seed(0)
    T = 5
    z = (torch.randn(T, C) * 4).to(dtype)
    z[1, 0] = -float("inf") if softcap is None else -1e4
    bias = torch.randn(C) if with_bias else None
    targets = torch.randint(1, C, (T,))
    targets[2] = -7
    grads = torch.rand(T)
    wide = z.double().requires_grad_()
    logits = wide if bias is None else wide + bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    want = F.cross_entropy(logits, targets, ignore_index=-7, reduction="none")
    want = want + z_loss * lse.square() * (targets != -7)
    want.backward(grads.double())

    options = {"ignore_index": -7, "softcap": softcap, "z_loss": z_loss}
    got_lse, losses = torch.empty(T), torch.full((T,), torch.nan)
    kernels.cross_entropy_(z.clone(), bias, targets, got_lse, losses, **options)
    torch.testing.assert_close(got_lse.double(), lse.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-5, atol=1e-5)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-5 if dtype == torch.float32 else 1e-3}
    fresh = torch.full((T,), torch.nan)
    for losses in (None, fresh):  # with the lse of before, and all in one pass
        known = got_lse.clone() if losses is None else torch.empty(T)
        dz = kernels.cross_entropy_(z.clone(), bias, targets, known, losses, grads=grads, gradient=True, **options)
        assert dz.dtype == dtype
        torch.testing.assert_close(dz.double(), wide.grad, **tolerance)
    assert torch.equal(fresh.isnan(), torch.zeros(T, dtype=torch.bool))
    unit = kernels.cross_entropy_(z.clone(), bias, targets, got_lse, None, gradient=True, **options)
    torch.testing.assert_close(unit.double() * grads[:, None], wide.grad, **tolerance)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("C", [5, 64, 999, 17000])
def test_cross_entropy_of_16_bits(kernels, dtype, C):
    z = (3 * torch.randn(6, C)).to(dtype)
    targets = torch.randint(C, (6,))
    (z64,) = wide(z)
    want = F.cross_entropy(z64, targets, reduction="none")
    want.sum().backward()
    lse, losses = torch.empty(6), torch.empty(6)
    options = {"ignore_index": -100, "softcap": None, "z_loss": 0.0}
    dz = kernels.cross_entropy_(z, None, targets, lse, losses, gradient=True, **options)
    assert dz.data_ptr() == z.data_ptr()
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=1e-6)
    within_a_rounding(dz, z64.grad, dtype)


def test_a_target_out_of_range_gives_nan(kernels):
    losses = torch.zeros(3)
    kernels.cross_entropy_(
        torch.zeros(3, 7), None, torch.tensor([-1, 7, 6]), torch.empty(3), losses, ignore_index=-100, softcap=None,
        z_loss=0.0,
    )  # fmt: skip
    assert losses.isnan().tolist() == [True, True, False]


def run_layers_on(kernels, monkeypatch):
    """Makes the layers run these kernels, or torch's functions for None."""
    for name in ("rmsnorm", "rope", "gated", "cross_entropy", "normed"):
        monkeypatch.setattr(
            sys.modules[f"keyspan.layers.{name}"], "kernels_for", lambda *tensors, compiled=False: kernels
        )


def gradients(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = function(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    total = sum((r * torch.arange(r.numel()).reshape(r.shape).cos()).sum() for r in results)
    return [*results, *torch.autograd.grad(total, inputs, allow_unused=True)]


def _of_norm(x, y, w, residual=None, terms=False):
    """`norm_linear` of x and the residual, with weights w of the norm and y of the linear layer."""
    norm, layer = RMSNorm(12, 1e-3), Linear(12, 8, bias=False)
    del norm.weight, layer.weight
    norm.weight, layer.weight = w, y
    return norm_linear(x, residual, norm, layer, terms)


FUNCTIONS = {
    "rms_norm": (lambda x, y, w: rms_norm(x, w), 3),
    "add_rms_norm": (lambda x, y, w: add_rms_norm(x, y, w), 3),
    "only the norm": (lambda x, y, w: add_rms_norm(x, y, w)[0], 3),
    "only the sum": (lambda x, y, w: add_rms_norm(x, y, w)[1], 3),
    "norm_linear": (lambda x, y, w: _of_norm(x, y, w)[0], 3),
    "norm_linear of a sum": (lambda x, y, w: _of_norm(x, y, w, residual=y * 2), 3),
    "norm_linear of terms": (lambda x, y, w: _of_norm(x, y, w, residual=y.bfloat16(), terms=True), 3),
    "swiglu": (lambda x, y, w: swiglu(x, y.repeat(2, 1), w[:1].repeat(16), y.t(), None), 3),
    "geglu": (lambda x, y, w: geglu(x, y.repeat(2, 1), w[:1].repeat(16), y.t(), None), 3),
    "rotary": (lambda x, y, w: rotate_qkv(x * 1, rotary_table(torch.arange(8), 2), (3, 2, 1)), 1),
    "mean": (lambda x, y, w: linear_cross_entropy(x, y, TARGETS, softcap=5.0, z_loss=0.1, chunk=3), 2),
    "weighted": (lambda x, y, w: linear_cross_entropy(x, y, TARGETS, bias=y[:, 0] * 2, reduction="none", chunk=3), 2),
}
TARGETS = torch.tensor([0, 1, -100, 3, 7, 2, 2, 5])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layers_on_kernels_are_the_plain_layers(name, kernels, monkeypatch):
    torch.manual_seed(0)
    function, count = FUNCTIONS[name]
    inputs = [torch.randn(8, 12), torch.randn(8, 12), torch.randn(12)]
    run_layers_on(None, monkeypatch)
    want = gradients(function, inputs)
    run_layers_on(kernels, monkeypatch)
    got = gradients(function, inputs)
    assert sum(x is not None for x in got) >= count
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rotation_in_place_is_seen_by_autograd(kernels, monkeypatch):
    """What another function saved of the projection is not silently overwritten; a parameter is not at all."""
    run_layers_on(kernels, monkeypatch)
    leaf, table = torch.randn(8, 12, requires_grad=True), rotary_table(torch.arange(8), 2)
    q, *_ = rotate_qkv(torch.tanh(leaf), table, (3, 2, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()
    before = leaf.detach().clone()
    q, *_ = rotate_qkv(leaf, table, (3, 2, 1))
    q.sum().backward()
    assert torch.equal(leaf, before)
    with torch.inference_mode():
        torch.testing.assert_close(rotate_qkv(leaf * 1, table, (3, 2, 1))[0], q.detach())


def test_a_layer_of_a_norm_has_the_bits_of_both(kernels, monkeypatch):
    torch.manual_seed(0)
    run_layers_on(kernels, monkeypatch)
    norm, layer = RMSNorm(12), Linear(12, 5)
    x, y, g, s = torch.randn(9, 12), torch.randn(9, 12).bfloat16(), torch.randn(9, 5).bfloat16(), torch.randn(9, 12)
    inputs = [x.requires_grad_(), y.requires_grad_(), *norm.parameters(), *layer.parameters()]

    def run(call):
        with torch.autocast("cpu", torch.bfloat16):
            z, total = call()
        return z, total, *torch.autograd.grad((z, total), inputs, (g, s))

    def apart():
        h, total = norm.add(x, y, torch.bfloat16)
        return layer(h), total

    want = run(apart)
    for terms in (False, True):
        for a, b in zip(run(lambda terms=terms: norm_linear(x, y, norm, layer, terms)), want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        dx, dy = torch.autograd.grad(norm_linear(x, y, norm, layer, terms)[1], (x, y), s)  # of the sum alone
        assert torch.equal(dx, s)
        assert torch.equal(dy, s.bfloat16())


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("products", ["the library's", "torch's"])
def test_a_gpt_on_kernels_is_the_plain_gpt(precision, activation, products, kernels, monkeypatch):
    if products == "torch's":  # the layers then differ too
        monkeypatch.setattr(gated, "native", lambda *x: False)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, dim=24, layers=2, heads=4, kv_heads=2, hidden=40, activation=activation)
    model = GPT(config, backend="chunked")
    tokens, lengths = torch.randint(11, (18,)), [5, 1, 9, 3]

    def run():
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model.loss(tokens, tokens.roll(1), lengths)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    run_layers_on(None, monkeypatch)
    want = run()
    run_layers_on(kernels, monkeypatch)
    got = run()
    scale = 1e-5 if precision == torch.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= scale * b.norm() + 1e-7
