"""Cross-entropy of a linear head and log-softmax against torch's: values, gradients, memory, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from keyspan.layers import gemm, linear_cross_entropy, log_softmax
from keyspan.testing import peak_memory
from test_layers import LOW, leaves


def eager_cross_entropy(hidden, weight, targets, bias=None, softcap=None, **options):
    z = F.linear(hidden, weight, bias)
    return F.cross_entropy(z if softcap is None else softcap * torch.tanh(z / softcap), targets, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_cross_entropy_and_gradients_equal_torch(reduction, softcap, with_bias, chunk):
    torch.manual_seed(0)
    hidden, weight, bias = leaves((11, 6), (9, 6), (9,), dtype=torch.float64)
    targets = torch.randint(0, 9, (11,))
    targets[[0, 4, 10]] = -1
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    options = {"ignore_index": -1, "softcap": softcap, "reduction": reduction}
    upstream = torch.randn(11 if reduction == "none" else (), dtype=torch.float64)

    got = linear_cross_entropy(hidden, weight, targets, bias=bias if with_bias else None, chunk=chunk, **options)
    want = eager_cross_entropy(hidden, weight, targets, bias if with_bias else None, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream))


def test_cross_entropy_gradcheck():
    torch.manual_seed(0)
    inputs = leaves((5, 4), (7, 4), (7,), dtype=torch.float64)
    targets = torch.tensor([0, 6, -100, 3, 3])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h, w, targets, bias=b, softcap=2.0, reduction=reduction, chunk=2
            ),
            inputs,
        )


@pytest.mark.parametrize("dtype", LOW)
def test_cross_entropy_under_autocast_has_fp32_logits(monkeypatch, dtype):
    """Operands are rounded; the logits are not: the loss is the exact one of the rounded operands."""
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: False)
    torch.manual_seed(0)
    hidden, weight = leaves((13, 32), (50, 32))
    targets = torch.randint(0, 50, (13,))
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, targets, reduction="none", chunk=4)
    assert loss.dtype == torch.float32
    low_h, low_w = (t.detach().to(dtype).double().requires_grad_() for t in (hidden, weight))
    want = F.cross_entropy(low_h @ low_w.t(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-5)
    unrounded = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="none")
    assert (loss - unrounded).abs().max() > 1e-4

    g = torch.randn(13)
    got = torch.autograd.grad(loss, (hidden, weight), g)
    wanted = torch.autograd.grad(want, (low_h, low_w), g.double())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_cross_entropy_native_low_precision(monkeypatch):
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: True)
    torch.manual_seed(0)
    hidden, weight = leaves((13, 16), (20, 16))
    targets = torch.randint(0, 20, (13,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        want = F.cross_entropy(F.linear(hidden, weight), targets)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(2**-7 * b.abs().max()))


def test_cross_entropy_with_all_or_no_targets_ignored():
    hidden, weight = leaves((4, 3), (5, 3))
    ignored = torch.full((4,), -100)
    for rows in (4, 0):
        loss = linear_cross_entropy(hidden[:rows], weight, ignored[:rows])
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert not gradient.any(), "as F.cross_entropy: it counts for nothing where gradients are accumulated"
    linear_cross_entropy(hidden, weight, ignored, reduction="sum").backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()
    empty = linear_cross_entropy(hidden[:0], weight, ignored[:0], reduction="none")
    assert empty.shape == (0,)
    (gradient,) = torch.autograd.grad(empty.sum(), weight)
    assert not gradient.any()


@pytest.mark.parametrize("target", [-1, 5])
def test_cross_entropy_refuses_targets_out_of_range(target):
    hidden, weight = leaves((4, 3), (5, 3))
    with pytest.raises(ValueError, match=r"targets: got classes .* want 0 … 4, or ignore_index = -100"):
        linear_cross_entropy(hidden, weight, torch.tensor([1, 2, target, -100]))


def peak_of_cross_entropy(T: int, C: int, f=linear_cross_entropy, **options) -> int:
    hidden, weight = leaves((T, 4), (C, 4))
    targets = torch.zeros(T, dtype=torch.int64)
    return peak_memory(lambda: f(hidden, weight, targets, **options).backward())


@pytest.mark.skipif(torch.cuda.is_available(), reason="peak_memory then counts the GPU, with cuBLAS's workspace")
def test_cross_entropy_memory_does_not_grow_with_the_logits():
    chunk = 64

    def linear_part(T: int, C: int) -> int:
        """What is due whatever the chunk: gradients of hidden and weight (with a product beside the sum), and
        a few numbers per token."""
        return 4 * (4 * T + 2 * 4 * C + 16 * T)

    for T, C in ((256, 256), (1024, 256), (1024, 1024)):
        peak = peak_of_cross_entropy(T, C, chunk=chunk)
        assert peak <= linear_part(T, C) + 2.5 * 4 * chunk * C, (T, C)
    assert peak < 4 * T * C / 2  # half of the logits, of which eager holds several copies
    assert peak_of_cross_entropy(T, C, eager_cross_entropy) > 4 * T * C * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 2, 3)}, r"hidden: got shape \[2, 2, 3\], want \[T, D\]"),
        ({"weight": torch.zeros(5, 4)}, r"weight: got shape \[5, 4\], want \[C, 3\]"),
        (
            {"weight": torch.zeros(5, 3, dtype=torch.float64)},
            r"weight: got torch.float64, want torch.float32",
        ),
        (
            {"targets": torch.zeros(3, dtype=torch.int64)},
            r"targets: got torch.int64 of shape \[3\], want .* \[2\]",
        ),
        ({"targets": torch.zeros(2)}, r"targets: got torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \[4\], want \[5\]"),
        ({"softcap": 0.0}, r"softcap: got 0.0, want a positive number"),
        ({"reduction": "average"}, r"reduction: got 'average'"),
        ({"chunk": 0}, r"chunk: got 0, want an int ≥ 1"),
    ],
)
def test_cross_entropy_errors(change, message):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 1]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_counts_its_products(reduction):
    T, D, C = 300, 8, 50
    hidden, weight = leaves((T, D), (C, D))
    targets = torch.randint(0, C, (T,))
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        forward = counter.get_total_flops()
        loss.sum().backward()
    product = 2 * T * D * C
    # Losses of "none" compute the logits a second time in backward; a mean computes its gradients beside the loss.
    want = (3 * product, 3 * product) if reduction == "mean" else (product, 4 * product)
    assert (forward, counter.get_total_flops()) == want


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_with_z_loss(reduction, softcap):
    hidden, weight, bias = leaves((11, 6), (9, 6), (9,), dtype=torch.float64)
    targets = torch.randint(0, 9, (11,))
    targets[[0, 4]] = -1
    upstream = torch.randn(11 if reduction == "none" else (), dtype=torch.float64)
    options = {"ignore_index": -1, "softcap": softcap, "reduction": reduction}
    got = linear_cross_entropy(hidden, weight, targets, bias=bias, z_loss=0.3, chunk=4, **options)
    z = F.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    square = z.logsumexp(1).square().where(targets != -1, 0.0)
    square = {"mean": square.sum() / (targets != -1).sum(), "sum": square.sum(), "none": square}[reduction]
    want = eager_cross_entropy(hidden, weight, targets, bias, **options) + 0.3 * square
    torch.testing.assert_close(got, want)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream))
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="z_loss: got "):
            linear_cross_entropy(hidden, weight, targets, z_loss=wrong)


def test_cross_entropy_of_one_sided_logits_is_exact():
    """A target that is all but certain, and one that is all but impossible."""
    hidden = torch.tensor([[30.0], [-40.0], [80.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 2])
    got = linear_cross_entropy(hidden, weight, targets, reduction="none")
    want = eager_cross_entropy(hidden.double(), weight.double(), targets, reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-7)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (hidden, weight)), torch.autograd.grad(want.sum(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_backward"])
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]])
def test_cross_entropy_ops_pass_opcheck(name, needs):
    hidden, weight, bias = (x.detach() for x in leaves((11, 6), (9, 6), (9,)))
    targets = torch.randint(0, 9, (11,))
    rest = (hidden, weight, bias, targets, -100, None, 0.1, 4, False, torch.float32, needs)
    before = (torch.rand(11), torch.rand(11)) if name.endswith("backward") else ()
    torch.library.opcheck(
        getattr(torch.ops.keyspan, name), (*before, *rest), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("shape", [(7,), (3, 5000), (2, 3, 41), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_softmax(shape, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 5).to(dtype).requires_grad_()
    wide, weight = x.detach().double().requires_grad_(), torch.randn(shape)
    to = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for z, y in ((x, log_softmax(x)), (x, x.log_softmax(-1, dtype=to)), (wide, wide.log_softmax(-1))):
        assert y.dtype == (torch.float64 if z is wide else to)
        found.append([y, *torch.autograd.grad((y * weight).sum(), z)])
    for got, torchs, want in zip(*found, strict=True):
        assert got.dtype == torchs.dtype
        if want.numel():
            assert (got - want).abs().max() <= 4 * (torchs - want).abs().max() + 1e-7
