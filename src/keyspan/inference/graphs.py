"""Decoding steps on a GPU as CUDA graphs: a step in which every request adds one token is captured once and replayed.

A launched kernel costs the host some microseconds, and a step of a decoder has hundreds. A replay costs one launch. The
shapes of a graph are fixed: there is one for each number of requests, rounded up, and each width of the page table,
rounded up to a power of two. Rows that are left over compute one token of a page that nobody holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keyspan.inference.pages import Held, PagedCache
from keyspan.models.gpt import GPT

Outputs = tuple[Tensor, Tensor]
"""Logits, fp32 [B, C], and the likeliest tokens, int64 [B]."""


class DecodeGraphs:
    """`GPT.forward` and `GPT.logits` for one new token of each of some sequences.

    Args:
        model: on a GPU, in evaluation mode; its weights may change in place.
        cache: where keys and values are, with a spare page.
        most: most sequences of a step.

    Raises ValueError where `reason_against` has a reason, and for a cache without a spare page.
    """

    def __init__(self, model: GPT, cache: PagedCache, most: int) -> None:
        reason = self.reason_against(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        if cache.spare is None:
            raise ValueError("cache: got none, want a spare page")
        self._model, self._cache, self._spare, device = model, cache, cache.spare, model.embedding.weight.device
        self._new = torch.zeros(2, most, dtype=torch.int64, device=device)
        """Each row's new token, and how many tokens are stored before it."""
        self._ones = torch.ones(most, dtype=torch.int32, device=device)
        self._tables = {w: torch.full((most, cache.pages), cache.spare, dtype=torch.int32) for w in cache.pools}
        self._on_device = {window: table.to(device) for window, table in self._tables.items()}
        self._rows: list[dict[int | None, list[int]]] = [{}] * most
        """The pages that each row of the tables holds, by window; none for a row that is left over."""
        self._replays: dict[tuple[int, int], Callable[[], Outputs]] = {}

    @staticmethod
    def reason_against(model: GPT) -> str | None:
        """Why a model's steps cannot be captured, or None."""
        if model.embedding.weight.device.type != "cuda":
            return "CUDA graphs are captured on GPUs"
        if model.config.experts:
            return "a mixture of experts reads on the host which experts have tokens"
        return None

    def step(self, sequences: Sequence[Held], tokens: Sequence[int]) -> Outputs:
        """Store one more token of each sequence, for which there is room. The results live until the next call."""
        count = len(sequences)
        B = min(_rounded(count), len(self._ones))
        longest = max(len(table) for held in sequences for table in held.tables.values())
        P = min(1 << (longest - 1).bit_length(), self._cache.pages)
        self._update_tables(sequences, B)
        left = [0] * (B - count)
        new = torch.tensor([[*tokens, *left], [*(held.tokens for held in sequences), *left]])
        self._new[:, :B].copy_(new)
        replay = self._replays.get((B, P))
        if replay is None:
            replay = self._replays[B, P] = capture(lambda: self._run(B, P), self._new.device)
        logits, best = replay()
        return logits[:count], best[:count]

    def _update_tables(self, sequences: Sequence[Held], B: int) -> None:
        """Bring the rows up to date whose pages have changed."""
        width = 0
        for row in range(B):
            pages = sequences[row].tables if row < len(sequences) else {}
            if pages == self._rows[row]:
                continue
            self._rows[row] = {window: list(table) for window, table in pages.items()}
            for window, table in self._tables.items():
                # What a window has given back is seen by no query.
                found = [max(page, 0) for page in pages.get(window, [self._spare])]
                table[row, : len(found)] = torch.tensor(found, dtype=torch.int32)
                width = max(width, len(found))
        if width:
            for window, table in self._tables.items():
                self._on_device[window][:B, :width] = table[:B, :width].to(self._new.device)

    def _run(self, B: int, P: int) -> Outputs:
        tokens, before = self._new[:, :B].unbind()
        ones = self._ones[:B]
        self._cache.begin_from(ones, before.int(), {w: x[:B, :P] for w, x in self._on_device.items()})
        logits = self._model.logits(self._model(tokens, ones, cache=self._cache)).float()
        return logits, logits.argmax(-1)


def _rounded(count: int) -> int:
    """The number of rows of the graph for so many sequences."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def capture(run: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
    """A graph of what a function launches; calling it again launches that on the same memory."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled, and calls recorded on second sight
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay
