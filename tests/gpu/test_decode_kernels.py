"""The kernel of decoding steps in Triton's interpreter."""

import pytest
import torch

from keyspan.layers import Linear, RMSNorm, rotary_table, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "K"), [((4, 2), 16), ((6, 1), 20), ((1, 1), 2)])
def test_heads_are_rotated_and_stored(dtype, heads, K):
    from keyspan.inference.decode_kernels import rotate_and_store

    (Q, G), T, before = heads, 3, torch.tensor([7, 0, 11])
    table = torch.tensor([[2, 0, 9], [1, 7, 7], [8, 4, 3]], dtype=torch.int32)  # pages of 4 tokens
    slots = torch.tensor([0 * 4 + 3, 1 * 4 + 0, 3 * 4 + 3])
    qkv = torch.randn(T, (Q + 2 * G) * K).to(dtype)
    turns = rotary_table(torch.arange(12), K)
    turn = turns[0][before], turns[1][before]
    q, k, v = qkv.clone().view(1, T, Q + 2 * G, K).split([Q, G, G], dim=2)
    storage = tuple(torch.full((1, 40, G, K), 5.0, dtype=dtype) for _ in "kv")
    want = [x.clone().index_copy(1, slots, y) for x, y in zip(storage, (rotate(k, turn), v), strict=True)]
    rotate_and_store(qkv, turns, heads, storage, before, table, 4)
    assert torch.equal(qkv.view(1, T, -1, K)[:, :, :Q], rotate(q, turn))
    for got, expected in zip(storage, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("D", "N", "norm", "add"), [(20, 6, True, True), (33, 5, True, False), (1100, 3, False, False)]
)
@pytest.mark.parametrize("out", [None, torch.float32])
def test_products_of_one_row(dtype, gate, bias, D, N, norm, add, out):
    from keyspan.inference.decode_kernels import row_product

    layer = Linear(D, 2 * N if gate else N, bias=bias).to(dtype)
    normed = RMSNorm(D, 1e-5)
    torch.nn.init.normal_(normed.weight)
    x, residual = torch.randn(2, 1, D).to(dtype).unbind()
    with torch.no_grad():
        got, total = row_product(
            x, layer.weight, layer.bias, normed if norm else None, residual if add else None, gate=gate, dtype=out
        )
        want = x + residual if add else x
        assert torch.equal(total, want)
        y, layer64 = want.double(), layer.double()
        if norm:
            y = y * (y.square().mean() + 1e-5).rsqrt() * normed.weight.double()
        y = layer64(y)
        if gate:
            a, b = y.chunk(2, -1)
            y = torch.nn.functional.silu(a) * b
    assert got.dtype == (out or dtype)
    # One rounding of the result, and those of sums in fp32.
    error = torch.finfo(got.dtype).eps * y.abs() + D**0.5 * torch.finfo(torch.float32).eps * y.abs().max()
    assert ((got.double() - y).abs() <= error).all()
