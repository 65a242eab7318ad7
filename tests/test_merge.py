"""Merging parts that hold NaN or see nothing."""

import pytest
import torch

import keyspan

NAN, INF = torch.nan, torch.inf


def part(out: float, lse: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, 1, 2), out), torch.full((1, 1, 1), lse)


@pytest.mark.parametrize("far", [0.0, 200.0])  # 200: the share of the other part rounds to 0
@pytest.mark.parametrize("nan", [(NAN, NAN), (NAN, 0.0)])
def test_nan_of_a_part_that_sees_keys_is_kept(nan, far):
    for parts in ([part(*nan), part(1.0, far)], [part(1.0, far), part(*nan)]):
        out, lse = keyspan.merge(parts)
        assert out.isnan().all()
        assert lse.isnan().all() == torch.tensor(nan[1]).isnan()


def test_output_of_an_empty_part_is_ignored():
    dead, live = part(NAN, -INF), part(1.0, 0.5)
    leaves = [x.requires_grad_() for x in (*dead, *live)]
    out, lse = keyspan.merge([dead, live])
    assert torch.equal(out, live[0])
    assert torch.equal(lse, live[1])
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert [x.unique().tolist() for x in grads] == [[0.0], [0.0], [1.0], [1.0]]
    out, lse = keyspan.merge([part(NAN, -INF), part(INF, -INF)])
    assert not out.any()
    assert (lse == -INF).all()
