"""The layers' fused kernels in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from layer_cases import *  # noqa: F403


@pytest.fixture
def kernels():
    from keyspan.layers import triton_kernels  # decorated for the interpreter: the fixture `interpreted` has set it

    return triton_kernels


def test_a_narrower_gradient_overwrites_logits_of_several_blocks_after_they_are_read(kernels):
    torch.manual_seed(0)
    T, C = 3, 20000
    z, targets = torch.randn(T, C), torch.tensor([1, -100, C - 1])
    wide = z.double().requires_grad_()
    F.cross_entropy(wide, targets, reduction="sum").backward()
    options = {"ignore_index": -100, "softcap": None, "z_loss": 0.0, "gradient": torch.bfloat16}
    dz = kernels.cross_entropy_(z, None, targets, torch.empty(T), torch.empty(T), **options)
    assert dz.data_ptr() == z.data_ptr()
    torch.testing.assert_close(dz.double(), wide.grad, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-9)
