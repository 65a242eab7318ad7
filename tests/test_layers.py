"""The layers against the eager formulas they stand for: values, gradients, memory, autocast, compilation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keyspan.backends.native import binding, use_isa
from keyspan.layers import (
    Linear,
    RMSNorm,
    SwiGLU,
    add_rms_norm,
    geglu,
    gemm,
    linear,
    linear_cross_entropy,
    norm_linear,
    rms_norm,
    rotary,
    rotary_table,
    swiglu,
)
from keyspan.layers.gemm import PackedWeight
from keyspan.layers.rope import rotate_qkv

LOW = [torch.bfloat16, torch.float16]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.fixture(params=[False, True], ids=["fp32_gemm", "native_gemm"])
def native(request, monkeypatch) -> bool:
    """Both ways in which a CPU may multiply bf16 and fp16, whatever this one can do."""
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: request.param)
    return request.param


def leaves(*shapes, dtype=torch.float32, scale=1.0) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype).mul_(scale).requires_grad_() for s in shapes]


def saved_bytes(run, *parameters: Tensor) -> tuple[int, Tensor]:
    """Bytes that `run()` keeps for backward, each storage once, parameters not counted; and its result."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    for p in parameters:
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values()), result


# linear


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_the_low_precision_product_rounded_once(native, dtype, with_bias):
    torch.manual_seed(0)
    x, w, b = leaves((3, 7, 33), (5, 33), (5,))
    bias = b if with_bias else None
    with torch.autocast("cpu", dtype):
        y = linear(x, w, bias)
        true = F.linear(x, w, bias)
    assert y.dtype == true.dtype == dtype

    x64, w64, b64 = (t.detach().to(dtype).double() for t in (x, w, b))
    exact = F.linear(x64, w64, b64 if with_bias else None)
    size = F.linear(x64.abs(), w64.abs(), b64.abs() if with_bias else None)
    half_ulp = torch.finfo(dtype).eps / 2
    accumulated = 40 * torch.finfo(torch.float32).eps * size  # 33 products and a bias, added in fp32
    rounding = half_ulp * exact.abs() * (1 + half_ulp) + accumulated
    assert ((y.double() - exact).abs() <= rounding).all()
    assert ((y.double() - true.double()).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("dtype", LOW)
def test_linear_gradients_are_those_of_the_rounded_operands(native, dtype):
    torch.manual_seed(0)
    x, w, b = leaves((4, 6, 16), (9, 16), (9,))
    with torch.autocast("cpu", dtype):
        y = linear(x, w, b)
    grad = torch.randn(4, 6, 9).to(dtype)
    y.backward(grad)

    g = grad.double().reshape(-1, 9)
    low_x, low_w = x.detach().to(dtype).double().reshape(-1, 16), w.detach().to(dtype).double()
    for got, exact in ((x.grad.reshape(-1, 16), g @ low_w), (w.grad, g.t() @ low_x), (b.grad, g.sum(0))):
        assert got.dtype == torch.float32
        assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_linear_rounds_its_operands(native):
    """1 + 2^-10 is 1 in bf16: a product of unrounded values would not be zero."""
    x, w = torch.tensor([[1 + 2**-10, -1.0]]), torch.ones(1, 2)
    assert linear(x, w).item() == 2**-10
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).item() == 0


def test_linear_in_fp64_is_torchs_and_in_fp32_as_exact():
    x, w, b = leaves((2, 3), (4, 3), (4,), dtype=torch.float64)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))
    x, w, b = leaves((9, 333), (70, 333), (70,))
    true = F.linear(x.double(), w.double(), b.double())
    size = F.linear(x.double().abs(), w.double().abs(), b.double().abs())
    assert ((linear(x, w, b) - true).abs() <= 333 * torch.finfo(torch.float32).eps * size).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*leaves((2, 3), (4, 3), (4,), dtype=torch.float64)).dtype == torch.float64


def test_invariant_products_are_refused_where_no_kernel_keeps_them(monkeypatch):
    x, w, _ = leaves((3, 5), (4, 5), (4,))
    wide = x.double(), w.double()
    with pytest.raises(ValueError, match=r"invariant: got True, want False: torch.float64 has no product"):
        linear(*wide, invariant=True)
    with pytest.raises(ValueError, match="invariant: got True, want False: a compiler, mode or transform"):
        torch.func.vmap(lambda x: linear(x[None], w.detach(), invariant=True))(x.detach())
    with pytest.raises(ValueError, match=r"invariant: .* no such products on meta, want tensors on a CPU or a GPU"):
        gemm.invariant_kernels(torch.float32, x.to("meta"), w.to("meta"))
    with pytest.raises(ValueError, match=r"invariant: .* tensors are of several devices or of a subclass"):
        gemm.invariant_kernels(torch.float32, x, w.to("meta"))
    monkeypatch.setattr(gemm, "_library", lambda: None)
    for call in (
        lambda: linear(x, w, invariant=True),
        lambda: swiglu(x, w, None, w[:, :2], None, invariant=True),
        lambda: linear_cross_entropy(x, w, torch.tensor([1, 2, 3]), invariant=True),
    ):
        with pytest.raises(ValueError, match=r"invariant: .* the native library is not built"):
            call()


def test_linear_can_be_differentiated_twice():
    x, w, b = leaves((3, 5), (4, 5), (4,))
    (dx,) = torch.autograd.grad(linear(x, w, b).square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(F.linear(x, w, b).square().sum(), x, create_graph=True)
    for got, true in zip(*(torch.autograd.grad(g.square().sum(), (x, w, b)) for g in (dx, want)), strict=True):
        torch.testing.assert_close(got, true)


needs_library = pytest.mark.skipif(binding.LIBRARY is None, reason="the native library is not built")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(576, 960), (384, 1024), (1536, 576), (33, 7)], ids=str)
@pytest.mark.parametrize("isa", binding.SUPPORTED)
def test_a_row_of_linear_does_not_depend_on_the_others(dtype, shape, isa):
    inputs, outputs = shape
    x, w, b = (t.detach().to(dtype) for t in leaves((260, inputs), (outputs, inputs), (outputs,)))
    padded = torch.cat([w.new_zeros(3, inputs), w])[3:]  # starts elsewhere in memory
    threads = torch.get_num_threads()
    try:
        with use_isa(isa):
            torch.set_num_threads(1)
            want = linear(x, w, b)
            for torch_threads in (1, 2, 3):
                torch.set_num_threads(torch_threads)
                for rows in (1, 2, 3, 5, 6, 7, 13, 25, 70, 200, 260):
                    assert torch.equal(linear(x[:rows], w, b), want[:rows]), (torch_threads, rows)
                    assert torch.equal(linear(x[-rows:], padded, b), want[-rows:]), (torch_threads, rows)
                    assert torch.equal(linear(x.t().contiguous().t()[:rows], w, b), want[:rows])
            if PackedWeight.reason_against(w) is None:
                packed = PackedWeight(w)
                for rows in (1, 4, 31, 260):
                    assert torch.equal(packed.multiply(x[:rows], b), want[:rows])
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", binding.SUPPORTED)
def test_packed_int8_is_the_product_of_the_rounded_weight(dtype, isa):
    x, w, b = (t.detach().to(dtype) for t in leaves((9, 132), (77, 132), (77,)))
    w[5] = 0
    packed = PackedWeight(w, int8=True)
    stored = (w.float() / packed.scale[:, None]).round()
    assert stored.abs().max() == 127
    assert ((stored * packed.scale[:, None] - w).abs() <= packed.scale[:, None] * (0.5 + 1e-4)).all()
    true = x.double() @ stored.double().t() * packed.scale.double() + b.double()
    size = x.double().abs() @ stored.double().abs().t() * packed.scale.double() + b.double().abs()
    with use_isa(isa):
        got = packed.multiply(x, b)
        assert torch.equal(packed.multiply(x[3:4], b), got[3:4])
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    assert ((got - true).abs() <= true.abs() * rounding * 1.01 + 140 * torch.finfo(torch.float32).eps * size).all()


@needs_library
def test_pack_gives_the_plain_weight_up():
    layer = Linear(8, 5).requires_grad_(False)
    x = torch.randn(3, 8)
    want = layer(x)
    layer.pack()
    assert torch.equal(layer(x), want)
    assert layer.weight.numel() == 0
    with pytest.raises(ValueError, match=r"weight: .*multiples of 4, and this one's have 6"):
        Linear(6, 5).pack(int8=True)


def test_linear_saves_the_low_dtype(monkeypatch):
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: False)
    x, w = leaves((64, 32), (16, 32))
    with torch.autocast("cpu", torch.bfloat16):
        saved, _ = saved_bytes(lambda: linear(x, w), w)
    assert saved == 64 * 32 * 2


def test_linear_keeps_the_parameters_of_nn_linear():
    torch.manual_seed(0)
    ours = Linear(3, 4)
    torch.manual_seed(0)
    theirs = nn.Linear(3, 4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_mixed_dtypes_without_autocast_are_an_error():
    x, w = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"weight: got torch.float32, want torch.bfloat16"):
        linear(x, w)


# SwiGLU


def eager_swiglu(x, w12, b12, w3, b3):
    x1, x2 = linear(x, w12, b12).chunk(2, -1)
    return linear(F.silu(x1) * x2, w3, b3)


def test_swiglu_gradcheck():
    torch.manual_seed(0)
    inputs = leaves((2, 3, 4), (10, 4), (10,), (6, 5), (6,), dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu, inputs)
    x, w12, _, w3, _ = inputs
    assert torch.autograd.gradcheck(lambda x, w12, w3: swiglu(x, w12, None, w3, None), (x, w12, w3))


@pytest.mark.parametrize("only", range(5))
def test_swiglu_gradient_of_each_input_alone(only):
    torch.manual_seed(0)
    inputs = leaves((3, 4), (10, 4), (10,), (6, 5), (6,), dtype=torch.float64)
    for i, t in enumerate(inputs):
        t.requires_grad_(i == only)
    (got,) = torch.autograd.grad(swiglu(*inputs).square().sum(), inputs[only])
    (want,) = torch.autograd.grad(eager_swiglu(*inputs).square().sum(), inputs[only])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_swiglu_equals_the_eager_formula_and_does_not_change_its_inputs(native, dtype):
    torch.manual_seed(0)
    inputs = leaves((3, 7, 12), (40, 12), (40,), (12, 20), (12,), scale=0.5)
    before = [t.detach().clone() for t in inputs]

    def run(f):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = f(*inputs)
        return y, torch.autograd.grad(y.float().square().sum(), inputs)

    y, grads = run(swiglu)
    want, want_grads = run(eager_swiglu)  # the same operations: only sums inside a GEMM may differ in order
    assert y.dtype == dtype
    for got, wanted in zip((y, *grads), (want, *want_grads), strict=True):
        atol = 2 * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol)
    for t, old in zip(inputs, before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_saves_x_and_the_pre_activation_only(dtype):
    T, D, hidden = 64, 16, 24
    base, w12, w3 = leaves((T, D), (2 * hidden, D), (D, hidden))
    x = base * 1  # an activation, not a leaf
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours, _ = saved_bytes(lambda: swiglu(x, w12, None, w3, None), w12, w3)
        eager, _ = saved_bytes(lambda: eager_swiglu(x, w12, None, w3, None), w12, w3)
    assert ours == dtype.itemsize * T * (D + 2 * hidden)
    assert eager >= dtype.itemsize * T * (D + 4 * hidden)  # and silu(x1), and silu(x1) * x2


def test_swiglu_module_under_checkpoint_gives_the_same_gradients():
    torch.manual_seed(0)
    module, x = SwiGLU(8, 12, 5), torch.randn(6, 8, requires_grad=True)
    assert [(n, list(p.shape)) for n, p in module.named_parameters()] == [
        ("w12.weight", [24, 8]),
        ("w12.bias", [24]),
        ("w3.weight", [5, 12]),
        ("w3.bias", [5]),
    ]
    wrt = [x, *module.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = module(x)
        checkpointed = checkpoint(module, x, use_reentrant=False)
    want = torch.autograd.grad(plain.float().square().sum(), wrt)
    got = torch.autograd.grad(checkpointed.float().square().sum(), wrt)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(g.abs().sum() > 0 for g in got)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (8, 4), None, (3, 4), None), r"w12: got shape \[8, 4\], want \[2 \* hidden, 3\]"),
        (((2, 3), (7, 3), None, (3, 4), None), r"w12: got shape \[7, 3\]"),
        (((2, 3), (8, 3), None, (3, 5), None), r"w3: got shape \[3, 5\], want \[out, 4\]"),
        (((2, 3), (8, 3), (4,), (3, 4), None), r"b12: got shape \[4\], want \[8\]"),
        (((2, 3), (8, 3), None, (3, 4), (4,)), r"b3: got shape \[4\], want \[3\]"),
    ],
)
def test_swiglu_errors(shapes, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*(None if s is None else torch.zeros(s) for s in shapes))


# RMSNorm


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_gradcheck_and_formula(device):
    torch.manual_seed(0)
    x, w = (t.detach().to(device).requires_grad_() for t in leaves((2, 3, 5), (5,), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, w))
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w
    torch.testing.assert_close(rms_norm(x, w, 1e-3), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_rms_norm_computes_in_fp32(dtype, device):
    """Rounded once: within half a unit in the last place of the exact value, also where x² overflows fp16."""
    torch.manual_seed(0)
    x = (300 * torch.randn(64, 48, device=device)).to(dtype)
    module = RMSNorm(48).to(device)
    nn.init.normal_(module.weight)
    y = module(x)
    exact = F.rms_norm(x.double(), (48,), module.weight.double(), 1e-6)
    error = (y.double() - exact).abs()
    assert y.dtype == dtype
    assert (error <= exact.abs() * (torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps) + 1e-7).all()


def test_rms_norm_saves_its_input_and_one_number_per_row():
    base, w = leaves((64, 16), (16,))
    x = base * 1
    saved, y = saved_bytes(lambda: rms_norm(x, w), w)
    assert saved == 4 * (64 * 16 + 64)
    torch.testing.assert_close(y, F.rms_norm(x, (16,), w, 1e-6))


def test_rms_norm_error():
    with pytest.raises(ValueError, match=r"weight: got shape \[4\], want \[5\]"):
        rms_norm(torch.zeros(2, 5), torch.zeros(4))


# rotary


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(3,), (2, 3)])
@pytest.mark.parametrize("per_batch", [False, True])
def test_rotary_equals_a_complex_product(interleaved, heads, per_batch):
    torch.manual_seed(0)
    B, M, K = 2, 5, 8
    x = torch.randn(B, M, *heads, K)
    positions = torch.randint(0, 1000, (B, M) if per_batch else (M,))
    pairs = x.reshape(*x.shape[:-1], 4, 2) if interleaved else x.reshape(*x.shape[:-1], 2, 4).transpose(-1, -2)
    frequency = 500.0 ** (-2 * torch.arange(4, dtype=torch.float64) / K)
    angle = positions.expand(B, M)[..., None] * frequency
    turned = torch.view_as_complex(pairs.double().contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle).view(B, M, *[1] * len(heads), 4)
    want = torch.view_as_real(turned)
    want = (want if interleaved else want.transpose(-1, -2)).reshape(x.shape)
    # the angle, up to 1000 radians, is rounded to fp32: 2^-24 * 1000 radians, in it and in its frequency
    atol = 3 * 1000 * 2**-24 * float(x.abs().max())
    torch.testing.assert_close(rotary(x, positions, 500.0, interleaved).double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_depends_on_distance_and_keeps_norms(interleaved):
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)

    def score(i: int, j: int) -> Tensor:
        at = [torch.tensor([n]) for n in (i, j)]
        return (rotary(q, at[0], interleaved=interleaved) * rotary(k, at[1], interleaved=interleaved)).sum(-1)

    torch.testing.assert_close(score(3, 10), score(103, 110), rtol=0, atol=1e-4)
    assert (score(3, 10) - score(3, 11)).abs().max() > 1e-2
    turned = rotary(q, torch.tensor([77]), interleaved=interleaved)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(rotary(q, torch.tensor([0]), interleaved=interleaved), q)


def test_rotary_dtype_and_gradient():
    torch.manual_seed(0)
    positions = torch.arange(4) * 1000
    x = torch.randn(1, 4, 2, 6, dtype=torch.bfloat16)
    y = rotary(x, positions)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, rotary(x.float(), positions).bfloat16(), rtol=0, atol=0)
    # The map is linear and a rotation: its gradient turns back.
    z = torch.randn(1, 4, 2, 6, requires_grad=True)
    g = torch.randn(1, 4, 2, 6)
    rotary(z, positions).backward(g)
    torch.testing.assert_close(z.grad, rotary(g, -positions))


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((1, 4, 2, 5), (4,), "dim: got 5, want an even number"),
        ((1, 4, 6), (4,), r"x: got shape \[1, 4, 6\]"),
        ((2, 4, 1, 6), (3,), r"positions: got shape \[3\], want \[4\] or \[2, 4\]"),
    ],
)
def test_rotary_errors(shape, positions, message):
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(shape), torch.zeros(positions))


# the residual and the fused projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_is_the_sum_and_its_norm(dtype):
    x, residual, weight = leaves((3, 5, 16), (3, 5, 16), (16,))
    normed, total = add_rms_norm(x, residual, weight, 1e-5, dtype)
    want_total = x + residual
    want = rms_norm(want_total, weight, 1e-5).to(dtype)
    assert (normed.dtype, total.dtype) == (dtype, torch.float32)
    assert torch.equal(total, want_total)
    assert torch.equal(normed, want)
    a, b = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    inputs = (x, residual, weight)
    got = torch.autograd.grad((normed.float() * a).sum() + (total * b).sum(), inputs)
    wanted = torch.autograd.grad((want.float() * a).sum() + (want_total * b).sum(), inputs)
    torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match=r"residual: got shape \[5, 16\], want \[3, 5, 16\]"):
        add_rms_norm(x, residual[0], weight)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_qkv_rotates_queries_and_keys(interleaved):
    T, heads, K = 6, (4, 2, 2), 8
    qkv = torch.randn(T, sum(heads) * K, requires_grad=True)
    positions = torch.arange(T) * 7
    table = rotary_table(positions, K)
    q, k, v = rotate_qkv(qkv * 1, table, heads, interleaved)
    want_q, want_k, want_v = qkv.view(1, T, sum(heads), K).split(heads, 2)
    want = (
        rotary(want_q, positions, interleaved=interleaved),
        rotary(want_k, positions, interleaved=interleaved),
        want_v,
    )
    upstream = [torch.randn_like(x) for x in want]
    for x, y in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(torch.autograd.grad((q, k, v), qkv, upstream), torch.autograd.grad(want, qkv, upstream))


# compilation


def trace_as_torch_2_11(monkeypatch):
    """Makes torch's tracer return all that a Function's forward computes, its result under other names too."""
    hops = pytest.importorskip("torch._dynamo.variables.higher_order_ops")
    speculate = "speculate_subgraph_with_auto_output_flattening"
    trace = "trace_hop_function_with_auto_output_flattening"
    if not hasattr(hops, speculate) or not hasattr(hops, trace):
        pytest.skip("this torch traces otherwise")
    before, inner = getattr(hops, speculate), getattr(hops, trace)

    def unfiltered(*args, filter_aliased_intermediates=False, **options):
        return before(*args, **options)

    def with_side_effects(f, tx, subtracer, enable_grad, allow_side_effects, *rest):
        found = inner(f, tx, subtracer, enable_grad, allow_side_effects, *rest)
        if allow_side_effects:
            tx.output.current_tracer.traced_with_externally_visible_side_effects = True
        return found

    monkeypatch.setattr(hops, speculate, unfiltered)
    monkeypatch.setattr(hops, trace, with_side_effects)
    torch._dynamo.reset()


# torch's tracer makes an instance of torch.autograd.Function, against torch's own advice
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("as_torch_2_11", [False, True])
def test_layers_compile_without_a_graph_break(monkeypatch, dtype, instructions, as_torch_2_11):
    if as_torch_2_11:
        trace_as_torch_2_11(monkeypatch)
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: instructions)
    torch._dynamo.reset()  # a graph holds what was true when it was traced
    torch.manual_seed(0)
    x, w, w12, w3 = leaves((1, 6, 2, 8), (8,), (24, 8), (8, 12))
    targets = torch.randint(0, 8, (12,))
    norm, first, mlp = RMSNorm(8), Linear(8, 8), SwiGLU(8, 12)

    def layers(x: Tensor) -> Tensor:
        h = rotary(rms_norm(x, w), torch.arange(6)).flatten(0, 2)
        h = h + swiglu(linear(h, w12[:8]), w12, None, w3, None)
        h = h + geglu(add_rms_norm(h, h, w)[0], w12, None, w3, None)
        y, h = norm_linear(h, None, norm, first)
        turned = rotate_qkv(y, rotary_table(torch.arange(12), 2), (2, 1, 1))
        y, h = norm_linear(h, torch.cat(turned, 2).view(12, 8), norm, first)
        y, h = mlp.of_norm(h, y, norm)
        h = h + y
        z = [
            linear_cross_entropy(h, w3.t(), targets.clamp(max=11), chunk=5, reduction=reduction)
            for reduction in ("mean", "none")
        ]
        return z[0] + z[1].mean()

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        want, got = layers(x), compiled(x)
    torch.testing.assert_close(got, want)
    inputs = (x, w, w12, w3, *norm.parameters(), *first.parameters(), *mlp.parameters())
    # Compiled products are torch's, which sum in another order.
    for g, true in zip(*(torch.autograd.grad(loss, inputs) for loss in (got, want)), strict=True):
        error = 1e-5 if dtype == torch.float32 else 1.6e-2
        torch.testing.assert_close(g, true, rtol=error, atol=error * true.abs().max().item())
