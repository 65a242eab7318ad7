"""The layers' fused kernels in Triton's interpreter."""

import pytest

from layer_cases import *  # noqa: F403


@pytest.fixture
def kernels():
    from keyspan.layers import triton_kernels  # decorated for the interpreter: the fixture `interpreted` has set it

    return triton_kernels
