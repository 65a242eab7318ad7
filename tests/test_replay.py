"""Replayed calls: which calls are replayed, and that a replay sees every change that matters."""

import contextlib
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import keyspan
from keyspan.backends import native
from keyspan.core import biases, masks
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch import cache, replay
from keyspan.dispatch.cache import CACHE

needs_library = pytest.mark.skipif(
    native.reason_against(keyspan.core.problem.make_problem(*[torch.zeros(1, 1, 1, 1)] * 3)[0]) is not None,
    reason="the native library is not built here",
)


@pytest.fixture
def replayed(monkeypatch):
    """For each call of `attention` with a signature, whether it was replayed."""
    log = []
    original = replay.replay

    def spy(call):
        results = original(call)
        log.append(results is not None)
        return results

    monkeypatch.setattr(replay, "replay", spy)
    return log


def tensors(B=1, M=5, N=7, Hq=4, Hkv=2, K=8, V=8, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(B, n, h, d).to(dtype) for n, h, d in ((M, Hq, K), (N, Hkv, K), (N, Hkv, V))]


def without_replay(*args, **kw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "lookup", lambda *_: None)
        patch.setattr(CACHE, "get", lambda key: None)
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
def test_replay_on_other_tensors(name, layout, replayed):
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
        want = without_replay(q, k, v, **kw)
        if not kw.get("return_lse"):
            got, want = (got,), (want,)
        for x, y in zip(got, want, strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            assert x.stride() == y.stride()
            assert torch.equal(x, y)
    assert replayed == [False, False, True, True, True], "recorded on second sight"


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
def test_other_forms_are_other_calls(other, replayed):
    given = tensors()
    for _ in range(3):
        keyspan.attention(*given)
    assert replayed == [False, False, True]
    q, k, v = other(*given)
    assert torch.equal(keyspan.attention(q, k, v), without_replay(q, k, v))
    assert replayed[3] is False


@needs_library
def test_other_numbers_are_other_calls(replayed):
    q, k, v = tensors(N=5)
    calls = (
        {},
        {"scale": 0.5},
        {"softcap": 1.0},
        {"mask": keyspan.Causal()},
        {"mask": keyspan.Causal() & keyspan.Window(1)},
        {"mask": keyspan.Causal() & keyspan.Window(2)},
    )
    for turn in range(3):
        outs = [keyspan.attention(q, k, v, **kw) for kw in calls]
        for n, out in enumerate(outs):
            assert all(n == m or not torch.equal(out, other) for m, other in enumerate(outs))
        assert replayed[-len(calls) :] == [turn == 2] * len(calls)


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
def test_what_is_written_into_tensors_is_seen(replayed):
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

    for _ in range(4):
        before = results()
    assert replayed[-2:] == [True, True]
    lengths.copy_(torch.tensor([4, 1]))
    ranges.hi[..., -1] = 1
    slopes.mul_(2)
    for old, new, mask, bias in zip(
        before, results(), (keyspan.Documents([4, 1]), ranges, ranges), (None, None, keyspan.Alibi(slopes)), strict=True
    ):
        assert not torch.equal(old, new)
        assert torch.equal(new, keyspan.attention(q, k, v, mask=mask, bias=bias, backend="native"))


@needs_library
def test_ranges_for_any_number_of_keys_are_cut_off_each_time(replayed):
    q, k, v = tensors(N=5)
    made = keyspan.Causal().lower(1, 5, 5)
    ranges = KeyRanges(made.lo, made.hi.clone(), made.diagonal)
    want = keyspan.attention(q, k, v, mask=keyspan.Causal())
    for _ in range(3):
        assert torch.equal(keyspan.attention(q, k, v, mask=ranges), want)
    ranges.hi.fill_(99)
    assert torch.equal(keyspan.attention(q, k, v, mask=ranges), keyspan.attention(q, k, v))
    assert not any(replayed)


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
        for _ in range(4):
            keyspan.attention(q, k, v, mask=ranges)
        change(ranges.hi)
        with pytest.raises(ValueError, match="ranges"):
            keyspan.attention(q, k, v, mask=ranges)


@needs_library
def test_a_replay_keeps_its_ranges_alive():
    """Another thread may evict it while it runs."""
    q, k, v = tensors(N=5)
    for _ in range(3):
        keyspan.attention(q, k, v, mask=keyspan.Causal())
    (recorded,) = (x for x in CACHE.entries.values() if isinstance(x, replay._Recorded))
    held = weakref.ref(recorded.held[0])
    CACHE.clear()
    assert held() is not None
    del recorded
    assert held() is None


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
@pytest.mark.parametrize("kind", ["dense gradient", "expanded gradient", "through lse", "of the query alone"])
@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in (*CALLS, "dense", "two slopes") for layout in ("BMHK", "BMGHK")]
)
def test_gradients_are_replayed(name, layout, kind):
    """Bitwise those of the call without replay, on other tensors each time."""

    def run(attention, turn):
        torch.manual_seed(turn)
        q, k, v = tensors()
        if layout == "BMGHK":
            q, k, v = q.unflatten(2, (2, 2)), k[:, :, :, None], v[:, :, :, None]
        leaves = [x.requires_grad_(kind != "of the query alone" or n == 0) for n, x in enumerate((q, k, v))]
        kw = dict(CALLS.get(name, {}))
        if "sinks" in kw:
            kw["sinks"] = torch.randn(4).requires_grad_()
            leaves.append(kw["sinks"])
        terms = {"alibi": [(4,)], "two slopes": [(4,), (4,)], "table": [(4, 5)], "dense": [(5, 7)]}.get(name, [])
        values = [torch.randn(shape).requires_grad_() for shape in terms]
        kinds = {"alibi": keyspan.Alibi, "two slopes": keyspan.Alibi, "table": keyspan.RelativeBias}
        if values:
            kw["bias"] = sum(kinds.get(name, biases.DenseBias)(x) for x in values)
        leaves += values
        out, lse = attention(q, k, v, **{**kw, "return_lse": True})
        if kind == "expanded gradient":
            total = out.sum()
        else:
            total = (out * torch.randn_like(out)).sum()
        if kind == "through lse":
            total = total + lse.sin().sum()
        needed = [x for x in leaves if x.requires_grad]
        return [out, lse, *torch.autograd.grad(total, needed)]

    for turn in range(6):
        hits = CACHE.hits
        got = run(keyspan.attention, turn)
        after = CACHE.hits
        want = run(without_replay, turn)
        assert all(map(torch.equal, got, want))
    assert (after - hits == 2) == (name not in ("dense", "two slopes")), "forward and backward are replayed"


@needs_library
def test_replayed_gradients_keep_autograds_promises():
    def call():
        q, k, v = (x.requires_grad_() for x in tensors())
        return (q, k, v), keyspan.attention(q, k, v)

    for _ in range(4):
        leaves, out = call()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert CACHE.hits == 3
    # A graph that is retained, and one of the gradients.
    leaves, out = call()
    grads = [torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *grads))
    (grad, *_) = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    # A saved tensor that was written to.
    leaves, out = call()
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    # Hooks that return saved tensors in other memory, with other strides.
    leaves, out = call()
    want = torch.autograd.grad(out, leaves, torch.ones_like(out))

    def unpack(x):
        return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), unpack):
        q, k, v = leaves
        out = keyspan.attention(q, k, v)
    for a, b in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), want, strict=True):
        torch.testing.assert_close(a, b)
    # A profiler sees the op.
    leaves, out = call()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert "keyspan::attention_backward" in {x.key for x in profile.key_averages()}


@needs_library
@pytest.mark.parametrize("kind", ["expanded", "one address, two sizes"])
def test_hooks_of_a_graph_that_move_saved_tensors(kind):
    """Hooks may be set after the call, on the graph itself, and return tensors elsewhere with other strides."""

    def call():
        q, k, v = (x.requires_grad_() for x in tensors(Hq=2))
        given = (q[:, :1].expand(q.shape), k, v) if kind == "expanded" else (k[:, :3], k[:], v)
        return given, keyspan.attention(*given)

    for _ in range(4):
        given, out = call()
        want = torch.autograd.grad(out.sin().sum(), given, retain_graph=True)
    for saved in out.grad_fn._raw_saved_tensors[2:]:
        saved.register_hooks(lambda x: x.detach().clone(memory_format=torch.contiguous_format), lambda x: x)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), given), want, strict=True):
        torch.testing.assert_close(a, b)


@needs_library
@pytest.mark.parametrize("kind", ["hook", "shorter", "half"])
@pytest.mark.parametrize("calls", [1, 4])
def test_saved_tensors_that_come_back_in_another_form_are_refused(kind, calls):
    """A backend would read memory that is not theirs."""
    for _ in range(calls):
        q, k, v = (x.requires_grad_() for x in tensors())
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().half(), lambda x: x)
        with hooks if kind == "hook" else contextlib.nullcontext():
            out = keyspan.attention(q, k, v)
    if kind != "hook":
        k.data = k.data[:, :2].clone() if kind == "shorter" else k.data.half()
    with pytest.raises(RuntimeError, match="comes back as"):
        out.sum().backward()


@needs_library
@pytest.mark.parametrize("calls", [1, 4])
def test_memory_that_is_freed_before_backward(calls):
    for _ in range(calls):
        q, k, v = (x.requires_grad_() for x in tensors())
        out = keyspan.attention(q, k, v)
        k.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="key: got a tensor whose storage was freed"):
            out.sum().backward()


@needs_library
def test_a_replay_does_not_hold_what_it_is_given():
    ranges = []
    for _ in range(4):
        q, k, v = (x.requires_grad_() for x in tensors(N=5))
        mask = keyspan.Causal().lower(1, 5, 5)
        ranges.append(weakref.ref(mask.lo))
        keyspan.attention(q, k, v, mask=mask).sum().backward()
        del mask
    assert CACHE.hits == 3, "two forwards, one backward"
    assert all(x() is None for x in ranges)


@needs_library
def test_calls_with_and_without_gradients_are_told_apart(replayed):
    q, k, v = tensors()
    for _ in range(3):
        keyspan.attention(q, k, v)
    q.requires_grad_()
    assert keyspan.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not keyspan.attention(q, k, v).requires_grad
    slopes = torch.rand(4)
    for _ in range(3):
        keyspan.attention(q.detach(), k, v, bias=keyspan.Alibi(slopes))
    assert keyspan.attention(q.detach(), k, v, bias=keyspan.Alibi(slopes.requires_grad_())).requires_grad
    assert replayed == [False, False, True, False, True, False, False, True, False]


@needs_library
@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 24, 2, 8), (2, 24, 2, 1, 8), (2, 24, 2, 3, 8)], ids=str)
@pytest.mark.parametrize("names", ["xxx", "xxy", "xyx", "yxx"])
def test_one_tensor_for_several_arguments(shape, names):
    """Its gradients are added up in one order, with those of a residual path too."""

    def run(attention, turn):
        torch.manual_seed(turn)
        given = {name: torch.randn(shape, requires_grad=True) for name in "xy"}
        out = attention(*(given[name] for name in names)) + given["x"]
        return torch.autograd.grad(out.sin().sum(), [given[name] for name in sorted(set(names))])

    for turn in range(5):
        hits = CACHE.hits
        got = run(keyspan.attention, turn)
        replays = CACHE.hits - hits
        assert all(map(torch.equal, got, run(without_replay, turn)))
    assert replays == 2


@needs_library
def test_a_key_value_cache_that_grows_records_nothing():
    k, v = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    for n in range(1, 40):
        keyspan.attention(k[:, n - 1 : n], k[:, :n], v[:, :n])
    assert CACHE.recorded == 0


def test_keys_do_not_displace_each_others_first_sight():
    """Forward and backward of a training step alternate; neither may keep the other from being recorded."""
    alternating = range(0, 2**20, 2**10)  # hashes that are alike in their lowest bits
    assert not any(map(CACHE.second_sight, alternating))
    assert all(map(CACHE.second_sight, alternating))
    assert not any(map(CACHE.second_sight, range(1, 10**4, 2)))
    assert len(CACHE.seen) <= 2**12


@needs_library
def test_settings_are_read_each_time(replayed):
    q, k, v = tensors(M=40, N=40)
    for _ in range(3):
        want = keyspan.attention(q, k, v)
    with torch.autocast("cpu"):
        assert keyspan.attention(q, k, v).dtype == torch.bfloat16
    threads = torch.get_num_threads()
    for isa in native.binding.SUPPORTED:
        with native.use_isa(isa):
            torch.testing.assert_close(keyspan.attention(q, k, v), want)
            assert torch.equal(keyspan.attention(q, k, v), without_replay(q, k, v))
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(keyspan.attention(q, k, v), want)
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        assert keyspan.attention(q, k, v).is_inference()
    assert replayed[2]
    assert replayed[-1]


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
    lower = cache.lower
    first = lower(mask, 1, 5, 5, cpu)
    same = keyspan.Documents([2, 3]) & keyspan.Causal()
    assert lower(same, 1, 5, 5, cpu) is first
    others = [
        lower(keyspan.Documents([3, 2]) & keyspan.Causal(), 1, 5, 5, cpu),
        lower(keyspan.Documents([2, 3]) & keyspan.Causal("bottom_right"), 1, 5, 5, cpu),
        lower(keyspan.Documents(torch.tensor([2, 3])) & keyspan.Causal(), 1, 5, 5, cpu),
        lower(mask & torch.ones(5, 5, dtype=torch.bool), 1, 5, 5, cpu),
    ]
    assert all(x is not first for x in others)
    with torch.inference_mode():
        made = lower(keyspan.Causal(), 1, 5, 5, cpu)
    assert not made.lo.is_inference(), "it will be saved for backward"
    assert CACHE.nbytes == sum(x.nbytes for x in CACHE.entries.values()) > 0
    lower(keyspan.Causal(), 1, cache.LARGEST_MASK + 1, 5, cpu)
    assert not any(x.ranges.lo.numel() > cache.LARGEST_MASK for x in CACHE.entries.values())


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


def test_what_is_lowered_under_a_mode_is_not_cached():
    q, k, v = tensors(N=5)
    want = keyspan.attention(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool).tril())

    class Observer(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda q: keyspan.attention(q, k, v, mask=keyspan.Causal()).sum())(q)
    with Observer():
        keyspan.attention(q, k, v, mask=keyspan.Causal())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda q: keyspan.attention(q, k, v, mask=keyspan.Causal()), q, check_trace=False)
    assert not any(isinstance(x, cache.Lowered) for x in CACHE.entries.values())
    torch.testing.assert_close(keyspan.attention(q, k, v, mask=keyspan.Causal()), want)


@needs_library
@pytest.mark.parametrize("kind", ["context", "global"])
def test_a_default_device_is_no_observer(replayed, kind):
    """It changes what factory functions make, so that results must name their device: here they are on the CPU."""
    q, k, v = (x.requires_grad_() for x in tensors(N=5))
    want = torch.autograd.grad(keyspan.attention(q, k, v, mask=keyspan.Causal()).sin().sum(), (q, k, v))
    CACHE.clear()
    replayed.clear()
    context = torch.device("meta") if kind == "context" else contextlib.nullcontext()
    if kind == "global":
        torch.set_default_device("meta")
    try:
        with context:
            for _ in range(5):
                out = keyspan.attention(q, k, v, mask=keyspan.Causal())
                assert out.device.type == "cpu"
                for a, b in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), want, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_default_device(None)
    assert replayed == [False, False, True, True, True]
    assert CACHE.recorded == 2


def test_the_cache_is_bounded(monkeypatch):
    """By entries, and by the bytes of the masks that it holds; what was used last stays."""
    monkeypatch.setattr(CACHE, "most_entries", 4)
    one = torch.zeros(2, 1, 1, 4)
    for n in range(1, 12):
        q = torch.zeros(1, n, 1, 4)
        keyspan.attention(q, q, q)
        keyspan.attention(one, one, one)
        assert len(CACHE.entries) <= 4
    assert sum(isinstance(x, replay._Recorded) for x in CACHE.entries.values()) == bool(not needs_library.args[0])
    CACHE.clear()
    monkeypatch.setattr(CACHE, "most_bytes", 1000)
    for n in range(1, 40):
        cache.lower(keyspan.Window(n), 1, 20, 20, torch.device("cpu"))
        assert CACHE.nbytes == sum(x.nbytes for x in CACHE.entries.values()) <= 1000
    assert len(CACHE.entries) > 1
