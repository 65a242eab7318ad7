"""Several prepared folders as one task: each has a share of the micro-batches.

Which source a micro-batch is from is a function of its number alone: the fractional parts of n · φ fill [0, 1) evenly
(Weyl 1916), and each source has a part of that as long as its weight. So every run of micro-batches has the sources in
about these shares, and a resumed run, or one on another number of ranks, goes on with the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyspan.training.corpus import Corpus
from keyspan.training.packing import Batch

PHI = (math.sqrt(5) - 1) / 2
MOST = 2**20
"""Micro-batches that are counted at a time."""


class Mixture:
    """The task `data` with several sources.

    Args:
        corpora: the sources; of one tokenizer.
        weights: share of the micro-batches that each has, in any unit.

    Raises ValueError where the sources have other tokenizers.
    """

    name = Corpus.name
    metric = Corpus.metric

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
        self.corpora = list(corpora)
        first = self.corpora[0]
        for corpus in self.corpora[1:]:
            if corpus.tokenizer != first.tokenizer:
                name = first.index["tokenizer"]
                raise ValueError(
                    f"data: got {first.folder} and {corpus.folder} of other tokenizers, want all prepared with "
                    f"--tokenizer {name if name == 'bytes' else first.folder / name}"
                )
        self.vocab_size, self.stop, self.tokenizer_file = first.vocab_size, first.stop, first.tokenizer_file
        self.encode, self.decode = first.encode, first.decode
        self._bounds = np.cumsum(np.asarray(weights, np.float64) / math.fsum(weights))[:-1]
        self._known = 0, np.zeros(len(self.corpora), np.int64)  # micro-batches, and how many of them each source has

    def train_batch(self, seed: int, index: int, tokens: int) -> Batch:
        """Micro-batch `index` of the run `seed`, at most `tokens` tokens of one source."""
        source = int(self._sources(index, index + 1)[0])
        return self.corpora[source].train_batch(seed, int(self._counts(index)[source]), tokens)

    def position(self, seed: int, index: int, tokens: int) -> dict[str, Any]:
        """Where the plans of the sources are at micro-batch `index`, see `Corpus.position`."""
        counts = self._counts(index).tolist()
        places = [corpus.position(seed, n, tokens) for corpus, n in zip(self.corpora, counts, strict=True)]
        return {"sources": places}

    def seek(self, position: dict[str, Any], seed: int, tokens: int) -> None:
        """Plan from there on, see `Corpus.seek`."""
        for corpus, place in zip(self.corpora, position["sources"], strict=True):
            if place is not None:
                corpus.seek(place, seed, tokens)

    def held_out(self, tokens: int, limit: int | None = None) -> list[Batch]:
        """The held-out documents of all sources; with `limit`, of each so large a part that they come to about that."""
        sizes = [sum(shard["tokens"] for shard in corpus._shards("held-out")) for corpus in self.corpora]
        limits = [None if limit is None else max(limit * size // sum(sizes), 1) for size in sizes]
        return [b for corpus, n in zip(self.corpora, limits, strict=True) for b in corpus.held_out(tokens, n)]

    def baselines(self) -> dict[str, float]:
        """None, see `Corpus.baselines`."""
        return {}

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text of all sources, end tokens counted."""
        shards = [shard for corpus in self.corpora for shard in corpus._shards("held-out")]
        return sum(x["bytes"] for x in shards) / max(1, sum(x["tokens"] for x in shards)) or 1.0

    def _sources(self, first: int, stop: int) -> NDArray[np.int64]:
        """The source of each of these micro-batches."""
        places = np.arange(first, stop) * PHI % 1.0
        return np.searchsorted(self._bounds, places, side="right")

    def _counts(self, index: int) -> NDArray[np.int64]:
        """How many of the micro-batches before this one each source has."""
        at, counts = self._known  # another thread may be asking too: both are replaced at once
        if at > index:
            at, counts = 0, np.zeros_like(counts)
        while at < index:
            stop = min(index, at + MOST)
            counts = counts + np.bincount(self._sources(at, stop), minlength=len(counts))
            at = stop
        self._known = index, counts
        return counts
