"""Decoding steps on static tensors, as CUDA graphs are captured from: answers are those of the plain engine."""

import random

import pytest
import torch

from keyspan.inference import graphs
from keyspan.inference.engine import Engine
from keyspan.inference.graphs import DecodeGraphs
from keyspan.inference.pages import Held, PagedCache
from keyspan.inference.sampling import Sampling
from keyspan.models import GPT
from test_engine import CONFIGS, draw, model, pages


@pytest.fixture
def captured(monkeypatch):
    """Graphs on the CPU: a captured function is called again. The list has the shapes that were captured."""
    shapes = []

    def capture(run, device):
        logits, _ = run()
        shapes.append(tuple(logits.shape))
        return run

    monkeypatch.setattr(DecodeGraphs, "reason_against", staticmethod(lambda model: None))
    monkeypatch.setattr(graphs, "capture", capture)
    return shapes


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("room", "draft"), [(200, 0), (24, 0), (24, 3)])
def test_answers_are_those_without_graphs(captured, name, room, draft):
    net = model(name)
    source = random.Random(room + draft)
    prompts = draw(1, *(source.randrange(1, 20) for _ in range(11)))
    sampling = [Sampling(max_tokens=source.randrange(1, 30), temperature=n % 3 * 0.7, seed=n) for n in range(11)]
    options = {"page_size": 4, "running": 9, "draft": draft, "ngram": 2, "step_tokens": 16}
    want = Engine(net, memory=pages(room, net.config), graphs=False, **options).generate(prompts, sampling)
    engine = Engine(net, memory=pages(room + 1, net.config), **options)
    assert engine.generate(prompts, sampling) == want
    assert captured or draft, "no step was captured"
    assert {shape[0] for shape in captured} <= {1, 2, 4, 8, 9}
    assert room > 100 or name == "all windows" or engine.counters.preemptions
    assert engine.cache.available() == engine.cache.pages == room
    # The spare page is all that rows without a request have written to.
    assert all(x.isfinite().all() for layer in range(net.config.layers) for x in engine.cache.storage(layer)[:2])


@pytest.mark.parametrize("C", [29, 256, 768])
def test_argmax_is_that_of_the_whole_row(C):
    x = torch.randint(0, 40, (5, C)).float()  # the largest number comes several times
    assert graphs._argmax(x).tolist() == x.argmax(-1).tolist()
    x[1, C // 2] = torch.nan
    assert graphs._argmax(x).tolist() == x.argmax(-1).tolist()


def test_reasons():
    experts = GPT(CONFIGS["plain"].__class__(29, 32, 1, 4, experts=4, experts_per_token=2))
    assert "GPUs" in DecodeGraphs.reason_against(experts)
    with pytest.raises(ValueError, match="model: CUDA graphs are captured on GPUs"):
        DecodeGraphs(model(), PagedCache(CONFIGS["plain"], 4), 2)


def test_a_spare_page_is_needed(captured):
    with pytest.raises(ValueError, match="cache: got none, want a spare page"):
        DecodeGraphs(model(), PagedCache(CONFIGS["plain"], 4), 2)
    one = PagedCache.bytes_per_page(CONFIGS["plain"], 4, torch.float32)
    with pytest.raises(ValueError, match=f"want at least {2 * one}: 2 pages of 4 tokens"):
        Engine(model(), memory=2 * one - 1, page_size=4)


@pytest.mark.parametrize("windows", [None, (3, 9), (None, 5)])
def test_adopted_pages_are_the_most_that_a_window_still_reaches(windows):
    """Beside a search that tries every number of pages."""
    config = CONFIGS["plain"].__class__(29, 32, 2, 4, windows=windows)
    source = random.Random(3)
    tokens = [source.randrange(29) for _ in range(41)]
    for _ in range(60):
        cache = PagedCache(config, 30, 4)
        keys = []
        cache._extend(keys, tokens, 10)
        there = {w: [source.random() < 0.7 for _ in keys] for w in cache.pools}
        for w, pool in cache.pools.items():
            for key, known in zip(keys, there[w], strict=True):
                page = pool.allocate()
                if known:
                    pool.publish(page, key)
                pool.release(page)

        def usable(count, there=there):
            return all(
                all(known[(0 if w is None else max(0, (count * 4 - w + 1) // 4)) : count]) for w, known in there.items()
            )

        held = Held()
        cache.adopt(held, tokens)
        assert held.tokens == 4 * max((n for n in range(1, 11) if usable(n)), default=0)
