"""One numerics on the Triton backend, in its interpreter: bits of a row with `invariant=True`."""

import os

import pytest
import torch
from interpreter import dot_in_order
from triton.runtime.interpreter import InterpreterBuilder

import keyspan
from invariance_cases import Random, check_forms, gradients, gradients_in_a_batch, moved
from keyspan.backends.triton import config, launch

EVERY = os.environ.get("KEYSPAN_GPU_TESTS") == "all"
"""`make test-gpu-offline`: more problems."""

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Of one or two blocks of the small tiles, so that few keys have several."""
    monkeypatch.setattr(config, "SEGMENT", 64)


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch):
    """Products add up in the order of the inner dimension, for each element alike, as tensor cores do; NumPy's depend on
    the place in the tile."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_in_order)


def in_turn(seeds, every):
    """Seeds, each with plain loads and with TMA; or with either in turn."""
    pairs = [(seed, tma) for seed in range(every if EVERY else seeds) for tma in (False, True)]
    return [(seed, tma) for seed, tma in pairs if EVERY or tma == seed % 2]


@pytest.mark.parametrize(("seed", "descriptors"), in_turn(6, 12), indirect=["descriptors"])
def test_a_row_has_the_same_bits_in_every_form(seed, descriptors):
    check_forms("triton", torch.float16 if descriptors else torch.float32, seed, small=True)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("seed", range(20, 24 if EVERY else 21))
def test_a_row_has_the_same_bits_in_every_form_with_keys_of_8_bits(seed, stored):
    check_forms("triton", torch.float16, seed, small=True, stored=stored)


@pytest.mark.parametrize("seed", range(4 if EVERY else 3))
def test_gradients_do_not_depend_on_the_batch(seed):
    case = Random(200 + seed, torch.float32, small=True)
    want = gradients_in_a_batch(case, "triton", 1, 0)
    for batch, at in ((2, 1), (3, 0)):
        for name, x in gradients_in_a_batch(case, "triton", batch, at).items():
            assert torch.equal(x, want[name]), f"d{name} of entry {at} of {batch}"


@pytest.mark.parametrize(("seed", "descriptors"), in_turn(3, 5), indirect=["descriptors"])
def test_gradients_do_not_depend_on_the_pack(seed, descriptors):
    case = Random(300 + seed, torch.float32, small=True)
    order = list(range(len(case.keys)))
    case.rng.shuffle(order)
    _, packed = gradients(case, "triton", order, 1)
    for d in order:
        alone = gradients(case, "triton", [d], 1)[1][d]
        for name, x, y in zip("qkv", packed[d], alone, strict=True):
            assert torch.equal(x, y), f"d{name} of document {d}: {int((x != y).sum())} of {x.numel()} differ"


@pytest.mark.parametrize("moves", ["q", "kv", "qkv"])
def test_the_place_in_memory_chooses_no_tile(moves, monkeypatch):
    """On Hopper rows that are no whole vectors take smaller tiles, which add in another order."""
    tiles, run = [], launch.run
    monkeypatch.setattr(launch, "_family", lambda device: "hopper")
    monkeypatch.setattr(config, "tile", lambda *form: config.TileConfig(64, 64, 1, 1))
    monkeypatch.setattr(launch, "run", lambda *args, tile: tiles.append(tile) or run(*args, tile=tile))

    def results(x, invariant=True):
        tiles.clear()
        x = {name: y.requires_grad_() for name, y in x.items()}
        out = keyspan.attention(*x.values(), mask=keyspan.Causal(), backend="triton", invariant=invariant)
        return [out, *torch.autograd.grad(out.sum(), list(x.values()))], tiles.copy()

    inputs = {
        name: torch.randn(1, 40, 1, 16, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("qkv")
    }
    want, tiles_of_want = results(inputs)
    views = {name: moved(x.detach()) if name in moves else x for name, x in inputs.items()}
    got, tiles_of_got = results(views)
    assert tiles_of_got == tiles_of_want
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert results(views, invariant=False)[1] != results(inputs, invariant=False)[1]
