"""Recorded launches: what a replay passes to the kernels, which are stand-ins that log their arguments."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import keyspan
from keyspan.backends import Needs
from keyspan.backends.triton import launch, relaunch
from keyspan.backends.triton.arguments import Arguments
from keyspan.core import shims
from keyspan.core.problem import make_problem


class Kernel:
    """As much of a compiled kernel as a launch takes."""

    def __init__(self):
        self.calls = []
        self.function, self.packed_metadata = 17, (4, 1, 1000)
        self.run = self
        self.global_scratch_size = self.profile_scratch_size = 0
        self.launch_cooperative_grid = self.launch_pdl = False

    def launch(self, *given):
        self.calls.append(given)

    def __getitem__(self, grid):
        return lambda *given, stream: self.calls.append((*grid, stream, *given))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(shims, "cuda_stream", lambda index: 99)
    monkeypatch.setattr(shims, "cuda_device", lambda: None)
    monkeypatch.setattr(shims, "cuda_capturing", lambda: False)
    monkeypatch.setattr(relaunch, "_scratch", relaunch._Scratch())
    if not triton.__version__.startswith("3.6."):
        monkeypatch.setattr(shims, "triton_launcher", lambda kernel: None)


def problem_of(q, k):
    return make_problem(q, k, k, mask=keyspan.Causal())[0]


def tensors_of(problem):
    return [x for x in problem[:6] if x is not None]


@pytest.mark.parametrize("direct", [False, True])
def test_replay_on_other_memory(direct, monkeypatch):
    if direct and not triton.__version__.startswith("3.6."):
        pytest.skip("the C function is called directly on Triton 3.6 alone")
    kernel = Kernel()
    if not direct:
        monkeypatch.setattr(shims, "triton_launcher", lambda kernel: None)
    problem = problem_of(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
    out = torch.empty(3, 4)
    arguments = [launch._arguments(problem), out, 7, problem.query]
    if not direct:
        keys = problem.key.transpose(1, 2)
        arguments.append(TensorDescriptor(keys, list(keys.shape), list(keys.stride()), [1, 1, 16, 16]))
    replay = relaunch.recorded(problem, tensors_of(problem), [(kernel, (5, 2), arguments)], [out], [out.shape])

    other = problem_of(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
    tensors = tensors_of(other)
    pointers = [x.data_ptr() for x in tensors]
    (made,) = replay(pointers, tensors)
    assert pointers == [x.data_ptr() for x in tensors], "the caller's list is not changed"
    assert made.shape == (3, 4)
    (call,) = kernel.calls
    before = (5, 2, 1, 99)
    if direct:
        before += (17, False, False, None, None, (4, 1, 1000), None, None, None)
    arguments, out, seven, query, *descriptors = call[len(before) :]
    assert call[: len(before)] == before
    assert (out, seven, query) == (made.data_ptr(), 7, other.query.data_ptr())
    want = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in launch._arguments(other)]
    assert list(arguments) == want
    for x in descriptors:
        assert x.base.data_ptr() == other.key.data_ptr()
        assert x.strides == list(other.key.transpose(1, 2).stride())


def test_ranges_of_a_cached_mask_stay_as_they_are():
    kernel = Kernel()
    problem = problem_of(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
    out = torch.empty(3)
    launches = [(kernel, (1,), [launch._arguments(problem), out])]
    replay = relaunch.recorded(problem, [problem.query, problem.key], launches, [out], [out.shape])
    other = [torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)]
    replay([x.data_ptr() for x in other], other)
    given = dict(zip(Arguments._fields, kernel.calls[0][-2], strict=True))
    assert problem.lo.data_ptr() in given.values()
    assert other[1].data_ptr() in given.values()
    assert problem.key.data_ptr() not in given.values()


def test_a_launch_on_a_copy_is_not_recorded():
    problem = problem_of(torch.randn(1, 32, 16, 2).transpose(2, 3), torch.randn(1, 32, 2, 16))
    out = torch.empty(3)
    launches = [(Kernel(), (5, 2), [launch._arguments(problem), out])]
    assert relaunch.recorded(problem, tensors_of(problem), launches, [out], [out.shape]) is None


class Recorded:
    """A call recorded with stand-ins: q, k, out, lse and parts; only `results` of the last three are asked for."""

    def __init__(self, results):
        self.kernel = Kernel()
        q, k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
        problem = make_problem(q, k, k)[0]
        self.made = [torch.empty(1, 32, 2, 1, 16), torch.empty(1, 2, 1, 32), torch.empty(2, 3, dtype=torch.float64)]
        launches = [(self.kernel, (5, 2), [launch._arguments(problem), *self.made, problem.query])]
        shapes = [(1, 32, 2, 16), (1, 2, 32)][:results]
        self.replay = relaunch.recorded(problem, [q, k], launches, self.made, shapes)

    def __call__(self):
        """The results, and what the kernel was given: (arguments, out, lse, parts, query)."""
        self.q, self.k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
        results = self.replay([self.q.data_ptr(), self.k.data_ptr()], [self.q, self.k])
        return results, None if results is None else self.kernel.calls[-1][-5:]


@pytest.mark.parametrize("results", [1, 2])
def test_a_replay_makes_new_results(results):
    call = Recorded(results)
    for _ in range(2):
        made, (arguments, *given, query) = call()
        assert [(x.shape, x.dtype, x.is_contiguous()) for x in made] == [
            ((1, 32, 2, 16), torch.float32, True),
            ((1, 2, 32), torch.float32, True),
        ][:results]
        assert given[:results] == [x.data_ptr() for x in made]
        assert query == arguments[0] == call.q.data_ptr()
        # The others lie apart, aligned, in memory that the next call of the thread may use again.
        others = sorted(given[results:])
        assert all(x % 16 == 0 for x in others)
        assert all(b - a >= 32 * 2 * 4 for a, b in pairwise(others))
        scratch = relaunch._scratch.by_stream[torch.device("cpu"), 99]
        assert scratch.data_ptr() == others[0]
        assert others[-1] + call.made[-1].nbytes <= scratch.data_ptr() + scratch.nbytes


def test_scratch_belongs_to_a_thread_and_a_stream_and_to_no_graph(monkeypatch):
    call = Recorded(1)
    where = lambda: call()[1][2]  # noqa: E731
    first = where()
    assert where() == first
    monkeypatch.setattr(shims, "cuda_stream", lambda index: 98)
    second = where()
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(where).result()
        assert len({first, second, third}) == 3
    assert where() == second
    held = dict(relaunch._scratch.by_stream)
    monkeypatch.setattr(shims, "cuda_capturing", lambda: True)
    where()
    assert relaunch._scratch.by_stream == held
    monkeypatch.setattr(shims, "cuda_capturing", lambda: False)
    large = relaunch._scratch(10**6, torch.device("cpu"), 98)
    assert large.nbytes >= 10**6
    where()
    assert relaunch._scratch.by_stream[torch.device("cpu"), 98] is large
    relaunch._scratch(8, torch.device("meta"), 98)
    assert relaunch._scratch.by_stream[torch.device("cpu"), 98] is large, (
        "another device has a stream of the same number"
    )


def test_a_replay_sees_changed_settings():
    call = Recorded(1)
    assert call()[0] is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shims, "triton_hooked", lambda: True)
        assert call()[0] is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
        assert call()[0] is None
    finally:
        torch.set_float32_matmul_precision(before)
    assert call()[0] is not None


def test_a_profiler_sees_every_launch(monkeypatch):
    assert not shims.triton_hooked()
    hook = triton.knobs.runtime.launch_enter_hook
    if hasattr(hook, "add"):
        monkeypatch.setattr(hook, "calls", [print])
    else:
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    assert shims.triton_hooked()


def test_replay_takes_the_counters_of_its_stream(monkeypatch):
    monkeypatch.setattr(relaunch, "_counters", {})
    kernel = Kernel()
    problem = problem_of(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
    out, first = torch.empty(3), relaunch.counters(torch.device("cpu"), 99)
    launches = [(kernel, (1,), [launch._arguments(problem), out, first])]
    replay = relaunch.recorded(problem, tensors_of(problem), launches, [out], [out.shape])
    pointers = [x.data_ptr() for x in tensors_of(problem)]
    replay(pointers, tensors_of(problem))
    monkeypatch.setattr(shims, "cuda_stream", lambda index: 98)
    replay(pointers, tensors_of(problem))
    second = relaunch.counters(torch.device("cpu"), 98)
    assert [call[-1] for call in kernel.calls] == [first.pointer, second.pointer]
    assert first.pointer != second.pointer
    assert not torch.cat([first.tensor, second.tensor]).any()


def recorded_backward(monkeypatch, call, **kw):
    """The stand-in for all kernels, and the replay of the gradients of a call, recorded in the caller's layout."""
    kernel = Kernel()
    monkeypatch.setattr(launch, "run", lambda *_, **__: kernel)
    monkeypatch.setattr(shims, "triton_launcher", lambda kernel: None)
    tensors, terms = call
    q, k, v, out, lse, grad = tensors
    problem, _ = make_problem(q, k, v, **kw)
    of_out, of_lse = problem.shapes
    results = grad.reshape(of_out), None, out.reshape(of_out), lse.reshape(of_lse)
    needs = Needs(True, False, False, False, False, problem.sinks is not None, [])
    given = [q, k, v, *terms, out, lse, grad]
    return kernel, launch.record_backward(problem, given, *results, needs)[1]


def test_a_gradient_that_is_copied_when_recorded_is_copied_again(monkeypatch):
    """The kernels' strides are those of the copy, which the caller's dimensions alone would not ask for."""

    def call():
        q, k, v, out = (torch.randn(1, 5, 6) for _ in range(4))
        return [q, k, v, out, torch.randn(1, 5), torch.randn(1, 5, 8)[..., :6]], []

    calls = call(), call()
    kernel, replay = recorded_backward(monkeypatch, calls[0])
    tensors, _ = calls[1]
    replay([x.data_ptr() for x in tensors], tensors)
    given = next(x for x in kernel.calls[0] if isinstance(x, tuple))
    values = kernel.calls[0][kernel.calls[0].index(given) + 1 :]
    assert values[3:7] == (30, 6, 6, 6), "strides behind the tiles of keys and values"
    assert values[2] != tensors[-1].data_ptr()


def test_sinks_may_begin_where_a_larger_tensor_does(monkeypatch):
    def call():
        q, k, v, out = (torch.randn(2, 5, 4, 16) for _ in range(4))
        slopes = torch.randn(2, 4)
        return [q, k, v, out, torch.randn(2, 4, 5), torch.randn(2, 5, 4, 16)], [slopes, slopes[0]]

    calls = call(), call()
    slopes, sinks = calls[0][1]
    kernel, replay = recorded_backward(monkeypatch, calls[0], bias=keyspan.Alibi(slopes), sinks=sinks)
    tensors, terms = calls[1]
    given = [*tensors[:3], *terms, *tensors[3:]]
    assert replay([x.data_ptr() for x in given], given).sinks.shape == (4, 1)
    assert len(kernel.calls) == 1
