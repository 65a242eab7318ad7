"""What holds in every test: one thread, uninitialised memory is NaN, a fixed seed, an empty cache of calls."""

import pytest
import torch

from keyspan.dispatch.cache import CACHE

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that a result which depends on memory nobody wrote fails."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    CACHE.clear()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_held_out_problems(monkeypatch):
    """The last evaluation of 2000 problems would take longer than these runs."""
    monkeypatch.setattr("keyspan.training.tasks.HELD_OUT_PROBLEMS", 60)
