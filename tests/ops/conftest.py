"""Hides GPUs: these tests use CPU tensors, and xFormers' masks put their lengths on a GPU where there is one."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield
