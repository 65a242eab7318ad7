"""These tests are about CPU tensors. xFormers puts a mask's lengths on a GPU where there is one; here there is none."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield
