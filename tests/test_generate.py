"""Generation: cached = uncached, sampling draws what it says, batches = each prompt alone."""

import pytest
import torch
from torch import Tensor

from keyspan.inference import KVCache, generate, probabilities, sample, stream
from keyspan.models import GPT
from test_gpt import POSITIONS, draw, small

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3]]


def lively(positions="rope", **changes) -> GPT:
    """A model whose next tokens are far from uniform, and depend on the context."""
    model = small(positions, **changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(6)
    return model


def uncached(model: GPT, sequence: list[int]) -> Tensor:
    return model.logits(model(torch.tensor(sequence), [len(sequence)]))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("capacity", [4, 32])
@torch.no_grad()
def test_cached_logits_equal_uncached_logits(positions, capacity):
    """Prompts of several lengths read at once, then steps of one, of several and of no token per sequence."""
    model = lively(positions).double()
    full = [p + draw([16], seed=b).tolist() for b, p in enumerate(PROMPTS)]
    want = [uncached(model, sequence) for sequence in full]
    cache = KVCache(len(PROMPTS), capacity)
    done = [0] * len(PROMPTS)
    for lengths in ([5, 1, 9, 3], [1, 1, 1, 1], [1, 0, 1, 0], [0, 6, 0, 2], [4, 1, 0, 0], [1, 1, 1, 1]):
        tokens = [t for b, n in enumerate(lengths) for t in full[b][done[b] : done[b] + n]]
        logits = model.logits(model(torch.tensor(tokens), lengths, cache=cache)).split(lengths)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(logits[b], want[b][done[b] : done[b] + n], rtol=0, atol=1e-10)
            done[b] += n
    assert cache.lengths == done == [12, 10, 12, 7]
    assert cache.capacity == (16 if capacity == 4 else 32)


@torch.no_grad()
def test_cached_logits_under_autocast():
    model = small()
    cache = KVCache(1, 2)
    sequence = PROMPTS[2]
    with torch.autocast("cpu", torch.bfloat16):
        want = uncached(model, sequence)
        got = torch.cat([model.logits(model(torch.tensor([t]), [1], cache=cache)) for t in sequence])
    assert got.dtype == torch.bfloat16
    atol = 8 * torch.finfo(torch.bfloat16).eps * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_cache_errors():
    model = small()
    cache = KVCache(2, 4, grow=False)
    model(torch.tensor([1, 2, 3]), [2, 1], cache=cache)
    with pytest.raises(ValueError, match=r"lengths: got 5 tokens in all for sequence 1, want at most .* = 4"):
        model(torch.tensor([1, 2, 3, 4]), [0, 4], cache=cache)
    assert cache.lengths == [2, 1]
    with pytest.raises(ValueError, match="lengths: got 3 sequences, want the cache's 2"):
        model(torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1]), cache=cache)
    with pytest.raises(ValueError, match="lengths: got 2 in all, want the 3 tokens"):
        model(torch.tensor([1, 2, 3]), [1, 1], cache=cache)
    assert cache.lengths == [2, 1]
    for arguments, name in (((0, 4), "sequences"), ((2, 0), "capacity")):
        with pytest.raises(ValueError, match=f"{name}: got 0, want an int ≥ 1"):
            KVCache(*arguments)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_token_of_the_whole_context(positions):
    model = lively(positions).double()
    want = []
    for prompt in PROMPTS:
        sequence = list(prompt)
        for _ in range(6):
            sequence.append(int(uncached(model, sequence)[-1].argmax()))
        want.append(sequence[len(prompt) :])
    got = generate(model, PROMPTS, 6, temperature=0)
    assert got == want
    assert len({tuple(new) for new in got}) == len(PROMPTS)  # the context matters
    assert [generate(model, [p], 6, temperature=0)[0] for p in PROMPTS] == want


def test_stop_tokens_end_a_sequence_and_not_the_others():
    model = lively().double()
    free = generate(model, PROMPTS, 8, temperature=0)
    stop = {free[0][2], free[2][5]}

    def cut(new: list[int]) -> list[int]:
        return new[: next((i for i, t in enumerate(new) if t in stop), len(new))]

    assert generate(model, PROMPTS, 8, temperature=0, stop=stop) == [cut(new) for new in free]
    assert len(cut(free[0])) <= 2
    assert {len(cut(new)) for new in free} & {8}  # at least one runs to the end
    alone = generate(model, PROMPTS[:1], 8, temperature=0, stop=free[0][0])
    assert alone == [[]]
    steps = list(stream(model, PROMPTS, 8, temperature=0, stop=stop))
    assert [[s[b] for s in steps if b in s] for b in range(4)] == [cut(new) for new in free]


def test_seeded_generation_repeats_and_leaves_the_global_generator_alone():
    model = lively()

    def run(seed: int) -> list[list[int]]:
        return generate(model, PROMPTS, 8, 1.0, 0.95, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = run(7)
    assert run(7) == first
    assert run(8) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_keeps_the_models_mode_and_ignores_dropout():
    model = lively(dropout=0.5)
    assert model.training
    got = generate(model, PROMPTS, 5, temperature=0)
    assert model.training
    assert got == generate(lively().eval(), PROMPTS, 5, temperature=0)
    steps = stream(model, PROMPTS, 5)
    next(steps)
    steps.close()
    assert model.training
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "prompts: got none"),
        (([[1], []], 3), "prompts: got an empty prompt 1"),
        (([[1], [2, 23]], 3), "prompts: got tokens 2 … 23 in prompt 1, want 0 … 22"),
        (([[-1]], 3), "prompts: got tokens -1"),
        (([[1]], -1), "max_tokens: got -1"),
        (([[1]], 1, -1.0), r"temperature: got -1\.0"),
        (([[1]], 1, 1.0, 0.0), r"top_p: got 0\.0"),
        (([[1]], 1, 1.0, 1.5), r"top_p: got 1\.5"),
    ],
)
def test_generate_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), *arguments)


def test_no_new_tokens():
    assert generate(small(), PROMPTS, 0) == [[], [], [], []]


# sampling

P = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])  # sums of powers of two are exact


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.0001}, [1]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.75}, [1, 3]),
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"top_p": 0.9}, [0, 1, 2, 3]),  # of the two equal ones the earlier
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.66}, [1]),  # after top_k: 2/3 and 1/3
        ({"top_k": 2, "top_p": 0.67}, [1, 3]),
    ],
)
def test_top_p_and_top_k_keep_exactly_the_set(options, kept):
    p = probabilities(P.log(), **options)
    want = torch.zeros(5)
    want[kept] = P[kept] / P[kept].sum()
    assert p.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(p, want)


def test_rows_are_independent_and_any_shape_is_accepted():
    logits = torch.stack([P.log(), P.flip(0).log()]).view(2, 1, 5)
    p = probabilities(logits, top_p=0.75)
    torch.testing.assert_close(p[0, 0], probabilities(P.log(), top_p=0.75))
    torch.testing.assert_close(p[1, 0], probabilities(P.log(), top_p=0.75).flip(0))


def test_temperature():
    torch.testing.assert_close(probabilities(P.log(), 0.5), P**2 / (P**2).sum())
    torch.testing.assert_close(probabilities(P.log(), 2.0), P**0.5 / (P**0.5).sum())
    assert probabilities(P.log(), 0).tolist() == [0, 1, 0, 0, 0]
    assert probabilities(torch.tensor([1.0, 2.0, 2.0]), 0).tolist() == [0, 1, 0]
    assert probabilities(torch.tensor([100.0, 200.0]), 1e-40).tolist() == [0, 1]
    for tiny in (1e-45, 1e-300, 5e-324):
        assert probabilities(torch.tensor([1.0, 2.0, 2.0]), tiny).tolist() == [0, 0.5, 0.5]
    assert probabilities(P.log().bfloat16()).dtype == torch.float32


def test_samples_follow_the_distribution():
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sample(P.log().expand(n, 5), 0.8, None, 0.95, generator=generator)
    p = probabilities(P.log(), 0.8, top_p=0.95)
    counts = torch.bincount(drawn, minlength=5)
    deviation = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 5 * deviation).all()
    assert (counts[p == 0] == 0).all()
    state = generator.get_state()
    assert sample(P.log().expand(3, 5), 0, generator=generator).tolist() == [1, 1, 1]
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature: got -0\.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, r"top_p: got 0\.0"),
        ({"top_p": 1.1}, r"top_p: got 1\.1"),
    ],
)
def test_sampling_errors(options, message):
    with pytest.raises(ValueError, match=message):
        sample(P.log()[None], **options)
