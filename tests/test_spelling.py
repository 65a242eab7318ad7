"""Arguments under other libraries' names: errors that name Keyspan's spelling."""

import pytest
import torch

import keyspan
from keyspan.dispatch.spelling import ARGUMENTS


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_other_libraries(name):
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(TypeError, match=f"^{name}: got bool, want .") as error:
        keyspan.attention(x, x, x, **{name: True})
    assert ARGUMENTS[name] in str(error.value)


def test_positional_and_unknown_arguments():
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(TypeError, match="got Causal, float after query, key and value, want all others by name: mask="):
        keyspan.attention(x, x, x, keyspan.Causal(), 0.5)
    with pytest.raises(TypeError, match=r"^nonsense: got int, which is no argument of keyspan\.attention"):
        keyspan.attention(x, x, x, nonsense=3)


def test_padding_masks():
    q, k = torch.randn(2, 5, 2, 4), torch.randn(2, 7, 2, 4)
    with pytest.raises(ValueError, match=r"mask: got shape \[2, 7\].* a padding mask \[B, N\]\? .*from_padding_mask"):
        keyspan.attention(q, k, k, mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: got a tensor of torch.int64, .* a padding mask .*from_padding_mask"):
        keyspan.attention(q, k, k, mask=torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask: got shape \[3, 7\], want one broadcastable to \[2, 2, 5, 7\]$"):
        keyspan.attention(q, k, k, mask=torch.ones(3, 7, dtype=torch.bool))
