"""Calls made again without being looked at anew: when they are, and that nothing that matters goes unseen."""

import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import keyspan
from keyspan.backends import native
from keyspan.core import biases, lowering, masks
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch import replay

needs_library = pytest.mark.skipif(
    native.reason_against(keyspan.core.problem.make_problem(*[torch.zeros(1, 1, 1, 1)] * 3)[0]) is not None,
    reason="the native library is not built here",
)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(lowering, "_kept", {})


@pytest.fixture
def repeated(monkeypatch):
    """Tells of each call of `attention` whether it was made again."""
    told = []
    again = replay.again

    def spy(call):
        results = again(call)
        told.append(results is not None)
        return results

    monkeypatch.setattr(replay, "again", spy)
    return told


def tensors(B=1, M=5, N=7, Hq=4, Hkv=2, K=8, V=8, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(B, n, h, d).to(dtype) for n, h, d in ((M, Hq, K), (N, Hkv, K), (N, Hkv, V))]


def the_long_way(*args, **kw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "look", lambda *_: None)
        return keyspan.attention(*args, **kw)


CALLS = {
    "plain": {},
    "causal": {"mask": keyspan.Causal("bottom_right")},
    "packed": {"mask": keyspan.Documents([2, 3], [4, 3]) & keyspan.Causal() & keyspan.Window(1, 0)},
    "two ranges": {"mask": keyspan.Causal("bottom_right") & keyspan.Window(1, 0) & keyspan.Sinks(1)},
    "ranges": {"mask": keyspan.Causal().lower(1, 5, 7)},
    "alibi": {"bias": keyspan.Alibi(torch.rand(4))},
    "table": {"mask": keyspan.Causal(), "bias": keyspan.RelativeBias(torch.randn(4, 5))},
    "softcap, sinks, scale": {"softcap": 3.0, "sinks": torch.randn(4), "scale": -0.3},
    "lse": {"return_lse": True},
    "output": {"output_dtype": torch.bfloat16},
}


@needs_library
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in CALLS for layout in ("BMHK", "BMGHK")]
    + [(name, "BMK") for name, kw in CALLS.items() if not {"sinks", "bias"} & set(kw)],  # whose terms have four heads
)
def test_again_on_other_memory(name, layout, repeated):
    kw = CALLS[name]
    heads = 1 if layout == "BMK" else 4

    def given():
        q, k, v = tensors(Hq=heads, Hkv=heads // 2 or 1)
        if layout == "BMK":
            return [x[:, :, 0] for x in (q, k, v)]
        return [q, k, v] if layout == "BMHK" else [q.unflatten(2, (2, 2)), k[:, :, :, None], v[:, :, :, None]]

    calls = [given() for _ in range(5)]
    for q, k, v in calls:
        got = keyspan.attention(q, k, v, **kw)
        want = the_long_way(q, k, v, **kw)
        if not kw.get("return_lse"):
            got, want = (got,), (want,)
        for x, y in zip(got, want, strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            assert x.stride() == y.stride()
            assert torch.equal(x, y)
    # A mask is lowered by the first call, known by the second, and there in the third.
    assert repeated[0] is False
    assert repeated[-2:] == [True, True]


@needs_library
def test_results_are_new_each_time():
    q, k, v = tensors()
    outs = [keyspan.attention(q, k, v) for _ in range(4)]
    assert len({x.data_ptr() for x in outs}) == 4


@needs_library
@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, v: (q[:, :, :, :4], k[:, :, :, :4], v),
        lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
        lambda q, k, v: (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        lambda q, k, v: (q, k[:, :6], v[:, :6]),
        lambda q, k, v: (q, k, k),
        lambda q, k, v: (torch.randn(161)[1:].view(1, 5, 4, 8), k, v),
    ],
    ids=["head dim", "strides", "dtype", "length", "shared", "alignment"],
)
def test_other_forms_are_other_calls(other, repeated):
    given = tensors()
    for _ in range(2):
        keyspan.attention(*given)
    assert repeated == [False, True]
    q, k, v = other(*given)
    assert torch.equal(keyspan.attention(q, k, v), the_long_way(q, k, v))
    assert repeated[2] is False


@needs_library
def test_other_numbers_are_other_calls(repeated):
    q, k, v = tensors(N=5)
    outs = [
        keyspan.attention(q, k, v, **kw)
        for kw in (
            {},
            {"scale": 0.5},
            {"softcap": 1.0},
            {"mask": keyspan.Causal()},
            {"mask": keyspan.Causal()},
            {"mask": keyspan.Causal() & keyspan.Window(1)},
            {"mask": keyspan.Causal() & keyspan.Window(2)},
        )
    ]
    assert len(repeated) == 4, "a mask that was never lowered is not looked up"
    assert not any(repeated)
    assert torch.equal(outs[3], outs[4])
    for n in range(7):
        assert all(n == m or {n, m} == {3, 4} or not torch.equal(outs[n], outs[m]) for m in range(7))


@needs_library
def test_bad_input_is_seen_behind_a_good_call():
    q, k, v = tensors()
    for scale, bad in ((1, True), (1.0, True), (1, [1])):
        for _ in range(2):
            keyspan.attention(q, k, v, scale=scale)
        with pytest.raises(ValueError, match="scale"):
            keyspan.attention(q, k, v, scale=bad)
    for bad in (False, torch.zeros(2), torch.zeros(1, device="meta")):
        with pytest.raises(ValueError, match="dropout_p"):
            keyspan.attention(q, k, v, scale=1, dropout_p=bad)
    with pytest.raises(ValueError, match="query"):
        keyspan.attention(q.to_sparse(), k, v, scale=1)
    with pytest.raises(ValueError, match="query"):
        keyspan.attention(7, k, v, scale=1)
    for bad in (None, 7, Tensor):
        with pytest.raises(ValueError, match="query"):
            keyspan.attention(bad, k, v, mask=keyspan.Causal())
        with pytest.raises(ValueError, match="key"):
            keyspan.attention(q, bad, v, mask=keyspan.Causal())
    assert len(keyspan.attention(q, k, v, return_lse=[1])) == 2, "what is no bool has a truth all the same"
    with pytest.raises(ValueError, match="bias"):
        keyspan.attention(q, k, v, scale=1, bias=7)
    with pytest.raises(ValueError, match="mask"):
        keyspan.attention(q, k, v, scale=1, mask=7)
    with pytest.raises(ValueError, match="key"):
        keyspan.attention(q, k[0], v, bias=torch.ones(5, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="key"):
        keyspan.attention(q, k[0], v, scale=1, mask=keyspan.Causal())


@needs_library
def test_what_is_written_into_tensors_is_seen(repeated):
    q, k, v = tensors(N=5)
    lengths = torch.tensor([2, 3])
    ranges = keyspan.Causal().lower(1, 5, 5)
    slopes = torch.rand(4)

    def results():
        return [
            keyspan.attention(q, k, v, mask=keyspan.Documents(lengths)),
            keyspan.attention(q, k, v, mask=ranges),
            keyspan.attention(q, k, v, mask=ranges, bias=keyspan.Alibi(slopes)),
        ]

    for _ in range(3):
        before = results()
    assert repeated[-2:] == [True, True]
    lengths.copy_(torch.tensor([4, 1]))
    ranges.hi[..., -1] = 1
    slopes.mul_(2)
    for old, new, mask, bias in zip(
        before, results(), (keyspan.Documents([4, 1]), ranges, ranges), (None, None, keyspan.Alibi(slopes)), strict=True
    ):
        assert not torch.equal(old, new)
        assert torch.equal(new, keyspan.attention(q, k, v, mask=mask, bias=bias, backend="native"))


@needs_library
def test_ranges_for_any_number_of_keys_are_cut_off_each_time(repeated):
    q, k, v = tensors(N=5)
    made = keyspan.Causal().lower(1, 5, 5)
    ranges = KeyRanges(made.lo, made.hi.clone(), made.diagonal)
    want = keyspan.attention(q, k, v, mask=keyspan.Causal())
    for _ in range(3):
        assert torch.equal(keyspan.attention(q, k, v, mask=ranges), want)
    ranges.hi.fill_(99)
    assert torch.equal(keyspan.attention(q, k, v, mask=ranges), keyspan.attention(q, k, v))
    assert not any(repeated)


@needs_library
def test_ranges_that_are_given_another_form_in_place_are_checked_again():
    q, k, v = tensors(N=5)
    changes = (
        lambda x: x.resize_(1, 1, 2),
        lambda x: x.squeeze_(),
        lambda x: setattr(x, "data", x.long()),
    )
    for change in changes:
        ranges = keyspan.Causal().lower(1, 5, 5)
        for _ in range(3):
            keyspan.attention(q, k, v, mask=ranges)
        change(ranges.hi)
        with pytest.raises(ValueError, match="ranges"):
            keyspan.attention(q, k, v, mask=ranges)


@needs_library
def test_a_lowered_mask_outlives_its_being_forgotten():
    """Another thread may forget it between the look at a call and its computation."""
    q, k, v = tensors(N=5)
    for _ in range(2):
        want = keyspan.attention(q, k, v, mask=keyspan.Causal())
    held = weakref.ref(next(iter(lowering._kept.values())).ranges.lo)
    call = replay.look(q, k, v, keyspan.Causal(), None, None, (1,))
    lowering._kept.clear()
    assert held() is not None
    del call
    assert held() is None
    assert torch.equal(keyspan.attention(q, k, v, mask=keyspan.Causal()), want)


class Learned(biases.Bias):
    """A user's bias, which makes its term whenever it is asked."""

    def __init__(self, log):
        self.log = log

    @property
    def terms(self):
        return (keyspan.Alibi(self.log.exp()),)


class Hidden(keyspan.Alibi):
    """A user's bias whose slopes no field tells of."""

    log = torch.zeros(4, requires_grad=True)

    def __init__(self):
        pass

    @property
    def slopes(self):
        return self.log.exp()


@needs_library
def test_biases_that_a_user_makes():
    # As much memory for the output as for the slopes: what nobody held would be given to it.
    q, k, v = tensors(M=1, Hq=4, Hkv=4, K=1, V=1)
    want = keyspan.attention(q, k, v, bias=keyspan.Alibi(torch.ones(4)), backend="reference")
    learned = Learned(torch.zeros(4))
    for _ in range(5):
        torch.testing.assert_close(keyspan.attention(q, k, v, bias=learned), want)
    for _ in range(3):
        assert keyspan.attention(q, k, v, bias=Hidden()).requires_grad


@needs_library
def test_gradients_go_the_long_way(repeated):
    q, k, v = tensors()
    for _ in range(2):
        keyspan.attention(q, k, v)
    q.requires_grad_()
    assert keyspan.attention(q, k, v).requires_grad
    slopes = torch.rand(4)
    for _ in range(3):
        keyspan.attention(q.detach(), k, v, bias=keyspan.Alibi(slopes))
    assert keyspan.attention(q.detach(), k, v, bias=keyspan.Alibi(slopes.requires_grad_())).requires_grad
    with torch.no_grad():
        assert not keyspan.attention(q, k, v).requires_grad
    assert repeated == [False, True, False, True, True]


@needs_library
def test_settings_are_read_each_time(repeated):
    q, k, v = tensors(M=40, N=40)
    for _ in range(2):
        want = keyspan.attention(q, k, v)
    with torch.autocast("cpu"):
        assert keyspan.attention(q, k, v).dtype == torch.bfloat16
    threads = torch.get_num_threads()
    for isa in native.binding.SUPPORTED:
        with native.use_isa(isa):
            torch.testing.assert_close(keyspan.attention(q, k, v), want)
            assert torch.equal(keyspan.attention(q, k, v), the_long_way(q, k, v))
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(keyspan.attention(q, k, v), want)
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        assert keyspan.attention(q, k, v).is_inference()
    assert repeated[1]
    assert repeated[-1]


@needs_library
def test_who_watches_sees_the_op():
    q, k, v = tensors()
    for _ in range(2):
        want = keyspan.attention(q, k, v)
    with torch.profiler.profile() as profile:
        keyspan.attention(q, k, v)
    assert "keyspan::attention_forward" in {x.key for x in profile.key_averages()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and tells that shapes become constants
        traced = torch.jit.trace(lambda q: keyspan.attention(q, k, v), q)
    assert torch.equal(traced(q), want)
    assert torch.equal(traced(q + 1), keyspan.attention(q + 1, k, v)), "a trace must not hold the result"
    compiled = torch.compile(lambda q: keyspan.attention(q, k, v), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q), want)


@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
def test_tensors_to_be_negated_when_read(backend):
    """`conj().imag` holds numbers of the other sign and a mark; what reads memory knows of no marks."""
    if backend == "native" and needs_library.args[0]:
        pytest.skip("the native library is not built here")
    z = torch.randn(1, 6, 2, 8, dtype=torch.complex64)
    marked = z.conj().imag
    assert marked.is_neg()
    plain = marked.clone().requires_grad_()
    others = [z.real.contiguous(), z.real.contiguous()]
    want = keyspan.attention(plain, *others, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(keyspan.attention(marked, *others, backend=backend), want)
    grad = torch.randn(1, 6, 2, 8, dtype=torch.complex64).conj().imag
    (got,) = torch.autograd.grad(want, plain, grad, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(want, plain, grad.clone())[0])


@needs_library
def test_zeros_that_have_no_memory():
    """As torch has them for gradients; what reads memory would read at address 0."""
    q, k, v = (x.requires_grad_() for x in tensors())
    zeros = torch._efficientzerotensor(q.shape)
    for _ in range(3):
        out = keyspan.attention(q.detach(), k.detach(), torch._efficientzerotensor(v.shape))
        assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(keyspan.attention(q, k, v), (q, k, v), zeros):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_masks_of_numbers_are_lowered_once():
    cpu = torch.device("cpu")
    mask = keyspan.Documents([2, 3]) & keyspan.Causal()
    first = lowering.lower(mask, 1, 5, 5, cpu)
    same = keyspan.Documents([2, 3]) & keyspan.Causal()
    assert lowering.lower(same, 1, 5, 5, cpu) is first
    others = [
        lowering.lower(keyspan.Documents([3, 2]) & keyspan.Causal(), 1, 5, 5, cpu),
        lowering.lower(keyspan.Documents([2, 3]) & keyspan.Causal("bottom_right"), 1, 5, 5, cpu),
        lowering.lower(keyspan.Documents(torch.tensor([2, 3])) & keyspan.Causal(), 1, 5, 5, cpu),
        lowering.lower(mask & torch.ones(5, 5, dtype=torch.bool), 1, 5, 5, cpu),
    ]
    assert all(x is not first for x in others)
    with torch.inference_mode():
        made = lowering.lower(keyspan.Causal(), 1, 5, 5, cpu)
    assert not made.lo.is_inference(), "it will be saved for backward"
    for n in range(2 * lowering._MOST):
        lowering.lower(keyspan.Window(n), 1, 5, 5, cpu)
    assert len(lowering._kept) <= lowering._MOST
    lowering.lower(keyspan.Causal(), 1, lowering._LARGEST + 1, 5, cpu)
    assert not any(x.ranges.lo.numel() > lowering._LARGEST for x in lowering._kept.values())


class Halved(masks.Combined):
    """A user's mask that is lowered in its own way."""

    def lower(self, batch, M, N, device="cpu"):
        made = super().lower(batch, M, N, device)
        return replace(made, hi=torch.minimum(made.hi, torch.tensor(2)).int())


class Upto(masks.Layout):
    """A user's layout that depends on more than its fields."""

    stop = 2

    def frame(self, batch, M, N, device):
        row = torch.arange(M, dtype=torch.int32, device=device).reshape(1, 1, M)
        return masks.Frame(row * 0, row * 0 + self.stop, row, row)


def test_masks_that_a_user_makes_are_lowered_each_time(monkeypatch):
    q, k, v = tensors(N=5)
    causal = keyspan.Causal() & keyspan.Window(3)
    halved = Halved(causal.parts)
    for mask in (causal, halved, causal, halved):
        want = keyspan.attention(q, k, v, mask=mask.materialize(5, 5), backend="reference")
        torch.testing.assert_close(keyspan.attention(q, k, v, mask=mask), want)
    before = keyspan.attention(q, k, v, mask=Upto())
    monkeypatch.setattr(Upto, "stop", 4)
    assert not torch.equal(keyspan.attention(q, k, v, mask=Upto()), before)


def test_what_is_lowered_where_torch_makes_something_else_is_not_kept():
    q, k, v = tensors(N=5)
    want = keyspan.attention(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool).tril())

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda q: keyspan.attention(q, k, v, mask=keyspan.Causal()).sum())(q)
    with Watching():
        keyspan.attention(q, k, v, mask=keyspan.Causal())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda q: keyspan.attention(q, k, v, mask=keyspan.Causal()), q, check_trace=False)
    assert not lowering._kept
    torch.testing.assert_close(keyspan.attention(q, k, v, mask=keyspan.Causal()), want)


def test_no_more_calls_are_known_than_shall_be(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 4)
    for n in range(1, 12):
        q = torch.zeros(1, n, 1, 4)
        keyspan.attention(q, q, q)
        assert len(replay._known) <= 4
