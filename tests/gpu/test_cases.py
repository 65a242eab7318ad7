"""The Triton backend on every case against the fp64 reference, run by Triton's interpreter."""

import pytest
import torch

import saccade
from cases import CASES
from saccade.backends import Needs
from saccade.backends.triton import config, launch
from saccade.core.library import attend
from saccade.testing import results, tolerances, worst

# The interpreter warns where NumPy meets what the kernels mean: log2(0) of an empty row, inf − inf of a NaN test.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def agree(case, dtype):
    problem = case.problem(dtype)
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    got = results(lambda p: attend(p, "triton"), problem, dtype)
    for name, allowed in tolerances(problem, dtype, want).items():
        error = worst(got[name], want[name])
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_the_kernels_run(monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_, **__: launched.append((kernel.fn.__name__, grid)))
    q = torch.zeros(1, 100, 3, 16)
    saccade.attention(q, q, q, backend="triton")
    assert launched == [("forward_kernel", (3 * 7, 1))]


@pytest.fixture(autouse=True)
def larger_tiles_for_larger_cases(request, monkeypatch, small_tiles):
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.M * case.N > 10_000:
        monkeypatch.setattr(config, "tile", lambda *_: config.Tile(64, 64, 1, 1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_reference(case):
    agree(case, torch.float32)


@pytest.mark.parametrize("name", ["gqa", "relative table, documents, gqa", "everything"])
def test_gradients_of_keys_and_values_by_a_launch_each(name, monkeypatch):
    monkeypatch.setattr(launch, "_apart", lambda problem: True)
    agree(next(case for case in CASES if case.name == name), torch.float32)


@pytest.mark.parametrize("name", ["everything", "no keys, learned sinks"])
def test_gradients_asked_for_alone(name):
    problem = next(case for case in CASES if case.name == name).problem(torch.float32)
    problem = problem._replace(
        **{n: x.float() for n, x in problem._asdict().items() if isinstance(x, torch.Tensor) and x.is_floating_point()},
        biases=[x.float() for x in problem.biases],
        output_dtype=torch.float32,
    )
    out, lse = launch.forward(problem)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)

    def gradients(*asked):
        biases = [asked[-1]] * len(problem.biases)
        found = launch.backward(problem, grad_out, grad_lse, out, lse, Needs(*asked[:-1], biases))
        return [*found[:-1], *found.biases]

    every = gradients(*[True] * 7)
    for n in range(7):
        alone = gradients(*[m == n for m in range(7)])
        for m, (got, want) in enumerate(zip(alone, every, strict=True)):
            if min(m, 6) == n and want is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            else:
                assert got is None


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_bfloat16(case, descriptors):
    agree(case, torch.bfloat16)
