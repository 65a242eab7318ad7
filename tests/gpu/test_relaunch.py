"""Launches made again: what a recorded launch is given the second time. The kernels are stand-ins that record."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import keyspan
from keyspan.backends.triton import launch, relaunch
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


def problem_of(q, k):
    return make_problem(q, k, k, mask=keyspan.Causal())[0]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(relaunch, "_plans", {})
    monkeypatch.setattr(relaunch, "_stream", lambda index: 99)
    monkeypatch.setattr(relaunch, "_current_device", lambda: None)
    monkeypatch.setattr(relaunch, "_capturing", lambda: False)
    monkeypatch.setattr(relaunch, "_scratch", relaunch._Scratch())
    if not triton.__version__.startswith("3.6."):
        monkeypatch.setattr(relaunch, "_direct", lambda kernel, grid: None)


def record(problem, kernel, out):
    arguments = launch._arguments(problem)
    keys = problem.key.transpose(1, 2)
    descriptor = TensorDescriptor(keys, list(keys.shape), list(keys.stride()), [1, 1, 16, 16])
    given = [arguments, out, 7, problem.query] if kernel.direct else [arguments, out, 7, problem.query, descriptor]
    seen = relaunch.look(problem)
    relaunch.keep(seen, [(kernel, (5, 2), given)], {"out": out})
    return seen, given


@pytest.mark.parametrize("direct", [False, True])
def test_again_on_other_memory(direct, monkeypatch):
    if direct and not triton.__version__.startswith("3.6."):
        pytest.skip("the C function is called directly on Triton 3.6 alone")
    kernel = Kernel()
    kernel.direct = direct
    if not direct:
        monkeypatch.setattr(relaunch, "_direct", lambda kernel, grid: None)
    q, k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
    first = problem_of(q, k)
    seen, given = record(first, kernel, torch.empty(3, 4))
    assert relaunch.find(seen) is not None

    other = problem_of(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
    seen = relaunch.look(other)
    made = relaunch.find(seen)(seen.pointers)
    assert made["out"].shape == (3, 4)
    (call,) = kernel.calls
    before = (5, 2, 1, 99)
    if direct:
        before += (17, False, False, None, None, (4, 1, 1000), None, None, None)
    arguments, out, seven, query, *descriptors = call[len(before) :]
    assert call[: len(before)] == before
    assert (out, seven, query) == (made["out"].data_ptr(), 7, other.query.data_ptr())
    want = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in launch._arguments(other)]
    assert list(arguments) == want
    for x in descriptors:
        assert x.base.data_ptr() == other.key.data_ptr()
        assert x.strides == given[-1].strides


def test_other_problems_are_not_known():
    kernel = Kernel()
    kernel.direct = True
    q, k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
    record(problem_of(q, k), kernel, torch.empty(3))
    known = lambda *given: relaunch.find(relaunch.look(*given)) is not None  # noqa: E731
    assert known(problem_of(k, q))
    assert not known(problem_of(q, q)), "memory that was apart is now shared"
    assert not known(problem_of(q[:, 1:], k[:, 1:]))
    assert not known(problem_of(torch.randn(1, 32, 2, 17)[..., 1:], k)), "not aligned, other strides"
    assert not known(problem_of(q, k)._replace(scale=0.5))
    assert not known(problem_of(q, k), (q,))
    assert not known(problem_of(q, k), (), "more")
    relaunch.forget()
    assert not known(problem_of(q, k))


def test_what_was_copied_is_not_kept():
    kernel = Kernel()
    kernel.direct = True
    q, k = torch.randn(1, 32, 16, 2).transpose(2, 3), torch.randn(1, 32, 2, 16)
    seen, _ = record(problem_of(q, k), kernel, torch.empty(3))
    assert relaunch.find(seen) is None


class Recorded:
    """A call recorded with stand-ins: q, k, out, lse and parts; only `results` of the last three are asked for."""

    def __init__(self, results):
        self.kernel = Kernel()
        q, k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
        problem = make_problem(q, k, k)[0]
        self.made = [torch.empty(1, 32, 2, 1, 16), torch.empty(1, 2, 1, 32), torch.empty(2, 3, dtype=torch.float64)]
        calls = [(self.kernel, (5, 2), [launch._arguments(problem), *self.made, problem.query])]
        shapes = [(1, 32, 2, 16), (1, 2, 32)][:results]
        self.again = relaunch.repeated([q.data_ptr(), k.data_ptr()], calls, self.made, shapes)

    def __call__(self):
        """The results, and what the kernel was given: (arguments, out, lse, parts, query)."""
        self.q, self.k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
        results = self.again([self.q.data_ptr(), self.k.data_ptr()])
        return results, None if results is None else self.kernel.calls[-1][-5:]


@pytest.mark.parametrize("results", [1, 2])
def test_a_call_again_makes_what_is_asked_for(results):
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


def test_scratch_is_of_a_thread_and_a_stream_and_of_no_graph(monkeypatch):
    call = Recorded(1)
    where = lambda: call()[1][2]  # noqa: E731
    first = where()
    assert where() == first
    monkeypatch.setattr(relaunch, "_stream", lambda index: 98)
    second = where()
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(where).result()
        assert len({first, second, third}) == 3
    assert where() == second
    held = dict(relaunch._scratch.by_stream)
    monkeypatch.setattr(relaunch, "_capturing", lambda: True)
    where()
    assert relaunch._scratch.by_stream == held
    monkeypatch.setattr(relaunch, "_capturing", lambda: False)
    large = relaunch._scratch(10**6, torch.device("cpu"), 98)
    assert large.nbytes >= 10**6
    where()
    assert relaunch._scratch.by_stream[torch.device("cpu"), 98] is large
    relaunch._scratch(8, torch.device("meta"), 98)
    assert relaunch._scratch.by_stream[torch.device("cpu"), 98] is large, (
        "another device has a stream of the same number"
    )


def test_a_call_again_sees_what_has_changed(monkeypatch):
    call = Recorded(1)
    assert call()[0] is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaunch, "_listened_to", lambda: True)
        assert call()[0] is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
        assert call()[0] is None
    finally:
        torch.set_float32_matmul_precision(before)
    assert call()[0] is not None


def test_a_profiler_is_heard(monkeypatch):
    assert not relaunch._listened_to()
    hook = triton.knobs.runtime.launch_enter_hook
    if hasattr(hook, "add"):
        monkeypatch.setattr(hook, "calls", [print])
    else:
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    assert relaunch._listened_to()
