"""`attention` of DTensors equals `attention` of the whole tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import keyspan as S

B, M, H, G, K = 4, 24, 8, 4, 8


def inputs(dims=4):
    """(tensors by name, those of them that are per head, and in which dimension)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if dims == 3:
        return {"q": draw(B, M, K), "k": draw(B, M, K), "v": draw(B, M, 3), "bias": draw(B, M, M)}
    if dims == 5:
        found = {"q": draw(B, M, G, 2, K), "k": draw(B, M, G, 1, K), "v": draw(B, M, G, 1, 3)}
        return {**found, "bias": draw(G, 1, M, M), "slopes": draw(G, 2).abs(), "sinks": draw(G, 2)}
    found = {"q": draw(B, M, H, K), "k": draw(B, M, G, K), "v": draw(B, M, G, 3), "bias": draw(B, 1, M, M)}
    return {**found, "slopes": draw(H).abs(), "table": draw(H, 9), "sinks": draw(H), "broad": draw(M, M)}


HEADS = {4: {"slopes": 0, "table": 0, "sinks": 0}, 5: {"bias": 0, "slopes": 0, "sinks": 0}, 3: {}}
BATCH = {4: {"bias": 0}, 5: {}, 3: {"bias": 0}}


def call(x, mask, **options):
    bias = x["bias"]
    for name, kind in (("slopes", S.Alibi), ("table", S.RelativeBias), ("broad", lambda y: y)):
        if name in x:
            bias = S.Alibi(x[name]) + bias if kind is S.Alibi else bias + kind(x[name])
    return S.attention(x["q"], x["k"], x["v"], mask=mask, bias=bias, sinks=x.get("sinks"), return_lse=True, **options)


def gradients(out, lse, x):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    other = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view(lse.shape)
    if isinstance(out, DTensor):
        weight = distribute_tensor(weight, out.device_mesh, out.placements, src_data_rank=None)
        other = distribute_tensor(other, lse.device_mesh, lse.placements, src_data_rank=None)
    return torch.autograd.grad([out, lse], list(x.values()), [weight, other])


def every_sharding() -> None:
    four = dist.get_world_size() == 4
    mesh = init_device_mesh("cpu", (2, 2) if four else (2,))
    lengths = torch.tensor([24, 3, 17, 9], dtype=torch.int32)
    dense = torch.rand(B, 1, M, M, generator=torch.Generator().manual_seed(1)) < 0.8
    masks = {
        4: [S.Causal() & S.KeyLengths(lengths), dense | torch.eye(M, dtype=torch.bool), None],
        5: [S.Causal()],
        3: [S.Causal()],
    }
    ways = (
        [(Shard(0), Shard(2)), (Shard(2), Shard(2)), (Replicate(), Shard(0))]
        if four
        else [(Shard(0),), (Shard(2),), (Replicate(),)]
    )
    for dims in (4, 5, 3):
        for way in ways:
            if dims == 3 and Shard(2) in way:
                continue
            for mask in masks[dims]:
                whole = {name: x.requires_grad_() for name, x in inputs(dims).items()}
                out, lse = call(whole, mask)
                want = gradients(out, lse, whole)

                def placed(name, way=way, dims=dims):
                    if name in ("q", "k", "v"):
                        return way
                    of = {Shard(0): BATCH[dims].get(name), Shard(2): HEADS[dims].get(name)}
                    return [Replicate() if of.get(p) is None else Shard(of[p]) for p in way]

                cut = {
                    name: distribute_tensor(x.detach(), mesh, placed(name), src_data_rank=None).requires_grad_()
                    for name, x in whole.items()
                }
                got, got_lse = call(cut, mask)
                assert tuple(got.placements) == way
                grads = gradients(got, got_lse, cut)
                assert torch.equal(got.full_tensor(), out)
                assert torch.equal(got_lse.full_tensor(), lse)
                for name, a, b in zip(whole, grads, want, strict=True):
                    torch.testing.assert_close(a.full_tensor(), b, rtol=1e-12, atol=1e-12, msg=f"{name} {way} {mask}")
    if not four:
        heads_first(mesh)
        refused(mesh)


def heads_first(mesh) -> None:
    x = {name: inputs()[name] for name in "qkv"}
    want = S.attention(**dict(zip(("query", "key", "value"), x.values(), strict=True)), mask=S.Causal())
    cut = [distribute_tensor(y.transpose(1, 2).contiguous(), mesh, [Shard(1)], src_data_rank=None) for y in x.values()]
    out = S.attention(*cut, mask=S.Causal(), layout="bhmk")
    assert out.placements == (Shard(1),)
    assert torch.equal(out.full_tensor().transpose(1, 2), want)


def refused(mesh) -> None:
    x = inputs()

    def at(name, *placements):
        return distribute_tensor(x[name], mesh, placements, src_data_rank=None)

    q, k, v = (at(name, Shard(2)) for name in "qkv")
    plain = x["slopes"].clone().requires_grad_()
    for message, arguments, options in [
        (r"query: got Shard\(dim=1\).*keyspan\.parallel", [at(name, Shard(1)) for name in "qkv"], {}),
        (r"query: got S\w*\(.*3.*want Shard\(0\)", [at(name, Shard(3)) for name in "qkv"], {}),
        (r"query: got Partial", [DTensor.from_local(x[name], mesh, [Partial()]) for name in "qkv"], {}),
        (r"key: got Tensor, want a DTensor", [q, x["k"], v], {}),
        (r"key: got Replicate\(\).*want Shard\(dim=2\)", [q, at("k", Replicate()), v], {}),
        (
            r"key: got heads 3 on 2 ranks",
            [
                q,
                *(
                    distribute_tensor(y[:, :, :3].contiguous(), mesh, [Shard(2)], src_data_rank=None)
                    for y in (x["k"], x["v"])
                ),
            ],
            {},
        ),
        (r"slopes: got Replicate\(\).*want Shard\(dim=0\)", [q, k, v], {"bias": S.Alibi(at("slopes", Replicate()))}),
        (r"slopes: got a plain tensor that requires gradients", [q, k, v], {"bias": S.Alibi(plain)}),
        (r"sinks: got Replicate", [q, k, v], {"sinks": at("sinks", Replicate())}),
    ]:
        with pytest.raises(ValueError, match=message):
            S.attention(*arguments, **options)
    # Plain tensors without gradients, which all ranks have, are cut.
    want = S.attention(x["q"], x["k"], x["v"], bias=S.Alibi(x["slopes"]), sinks=x["sinks"])
    assert torch.equal(S.attention(q, k, v, bias=S.Alibi(x["slopes"]), sinks=x["sinks"]).full_tensor(), want)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_of_batch_and_heads_equal_the_whole(ranks):
    run_ranks(every_sharding, ranks)
