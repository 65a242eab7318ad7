"""Launches made again: what a recorded launch is given the second time. The kernels are stand-ins that record."""

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import saccade
from saccade.backends.triton import launch, plans
from saccade.core.problem import make_problem


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
    return make_problem(q, k, k, mask=saccade.Causal())[0]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(plans, "_stream", lambda index: 99)
    monkeypatch.setattr(plans, "_current_device", lambda: None)


def record(problem, kernel, out):
    arguments = launch._arguments(problem)
    keys = problem.key.transpose(1, 2)
    descriptor = TensorDescriptor(keys, list(keys.shape), list(keys.stride()), [1, 1, 16, 16])
    given = [arguments, out, 7, problem.query] if kernel.direct else [arguments, out, 7, problem.query, descriptor]
    seen = plans.look(problem)
    plans.keep(seen, [(kernel, (5, 2), given)], {"out": out})
    return seen, given


@pytest.mark.parametrize("direct", [False, True])
def test_again_on_other_memory(direct, monkeypatch):
    if direct and not triton.__version__.startswith("3.6."):
        pytest.skip("the C function is called directly on Triton 3.6 alone")
    kernel = Kernel()
    kernel.direct = direct
    if not direct:
        monkeypatch.setattr(plans, "_direct", lambda kernel, grid: None)
    q, k = torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16)
    first = problem_of(q, k)
    seen, given = record(first, kernel, torch.empty(3, 4))
    assert plans.find(seen) is not None

    other = problem_of(torch.randn(1, 32, 2, 16), torch.randn(1, 32, 2, 16))
    seen = plans.look(other)
    made = plans.find(seen)(seen.pointers)
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
    known = lambda *given: plans.find(plans.look(*given)) is not None  # noqa: E731
    assert known(problem_of(k, q))
    assert not known(problem_of(q, q)), "memory that was apart is now shared"
    assert not known(problem_of(q[:, 1:], k[:, 1:]))
    assert not known(problem_of(torch.randn(1, 32, 2, 17)[..., 1:], k)), "not aligned, other strides"
    assert not known(problem_of(q, k)._replace(scale=0.5))
    assert not known(problem_of(q, k), (q,))
    assert not known(problem_of(q, k), (), "more")
    plans.forget()
    assert not known(problem_of(q, k))


def test_what_was_copied_is_not_kept():
    kernel = Kernel()
    kernel.direct = True
    q, k = torch.randn(1, 32, 16, 2).transpose(2, 3), torch.randn(1, 32, 2, 16)
    seen, _ = record(problem_of(q, k), kernel, torch.empty(3))
    assert plans.find(seen) is None
