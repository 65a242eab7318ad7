"""Decoding steps on a GPU as CUDA graphs: a step in which every request adds one token is captured once and replayed.

A launched kernel costs the host some microseconds, and a step of a decoder has hundreds. A replay costs one launch. The
shapes of a graph are fixed: there is one for each number of requests, rounded up, and each width of the page table,
rounded up to a power of two. Rows that are left over compute one token of a page that nobody holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from keyspan import KeyRanges, attention
from keyspan.inference.pages import Held, PagedCache
from keyspan.layers import Linear, RMSNorm, SwiGLU, rotate_qkv
from keyspan.models.gpt import GPT, Block

Outputs = tuple[Tensor, Tensor]
"""Logits [B, C] in the model's dtype or fp32, and the likeliest tokens, int64 [B]."""


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
        self._new = torch.zeros(2 * most, dtype=torch.int64, device=device)
        """Each row's new token, then how many tokens are stored before each."""
        self._next = torch.zeros(2 * most, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._ones = torch.ones(most, dtype=torch.int32, device=device)
        self._tables = {w: torch.full((most, cache.pages), cache.spare, dtype=torch.int32) for w in cache.pools}
        self._on_device = {window: table.to(device) for window, table in self._tables.items()}
        self._rows: list[dict[int | None, list[int]]] = [{}] * most
        """The pages that each row of the tables holds, by window; none for a row that is left over."""
        self._rows_of_tables = torch.arange(most, dtype=torch.int32, device=device)
        self._known_turns: dict[int, dict[int | None, tuple[Tensor, Tensor]]] = {}
        """By the width of the tables."""
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
        self._next[: 2 * B] = torch.tensor([*tokens, *left, *(held.tokens for held in sequences), *left])
        self._new[: 2 * B].copy_(self._next[: 2 * B], non_blocking=True)  # read before the results are
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
        tokens, before = self._new[: 2 * B].split(B)
        tables = {window: x[:B, :P].contiguous() for window, x in self._on_device.items()}
        c = self._model.config
        fused = c.positions == "rope" and not c.qk_norm and not c.post_norms and c.embedding_scale == 1
        if fused and self._cache.storage(0).key_scale is None:
            logits = self._logits(tokens, before, tables)
        else:
            ones = self._ones[:B]
            self._cache.begin_from(ones, before.int(), tables)
            logits = self._model.logits(self._model(tokens, ones, cache=self._cache))
        return logits, _argmax(logits)

    def _logits(self, tokens: Tensor, before: Tensor, tables: dict[int | None, Tensor]) -> Tensor:
        """[B, C], in fewer launches: sums are part of what reads them, and one kernel rotates and stores."""
        model, cache, page_size = self._model, self._cache, self._cache.page_size
        masks = self._masks(before, tables)
        turns = self._turns(next(iter(tables.values())).shape[1])
        x, h = model.embedding(tokens), None
        # A product with its norm rounds otherwise than the two of a longer step.
        alone = x.is_cuda and len(x) == 1 and _of_one_row(model) and not model.invariant
        product = _row_product if alone else _product
        for n, module in enumerate(model.blocks):
            block = cast(Block, module)
            layer, window, storage = block.attention, block.attention.window, cache.storage(n)[:2]
            qkv, x = product(x, layer.qkv, block.attention_norm, h)
            q = _rotate_and_store(qkv, turns[window], layer.heads, storage, before, tables[window], page_size)
            out = attention(
                q, *storage, mask=masks[window], scale=layer.scale, softcap=layer.softcap, sinks=layer.sinks,
                backend=model.backend, invariant=model.invariant,
            )  # fmt: skip
            h, _ = product(out.reshape(len(x), -1), layer.out)
            if alone:
                mlp = cast(SwiGLU, block.mlp)
                gated, x = _row_product(x, mlp.w12, block.mlp_norm, h, gate=True)
                h, _ = _row_product(gated, mlp.w3)
            else:
                normed, x = block.mlp_norm.add(x, h)
                h = block.mlp(normed)
        assert h is not None
        if alone and model.config.logit_softcap is None:
            from keyspan.inference.decode_kernels import row_product

            return row_product(x, model.head_weight, None, model.norm, h, dtype=torch.float32)[0]
        return model.logits(model.norm.add(x, h)[0])

    def _masks(self, before: Tensor, tables: dict[int | None, Tensor]) -> dict[int | None, KeyRanges]:
        """What `PagedKeys & Causal("bottom_right")` and a window lower to for one query of each sequence."""
        diagonal = before.int()[None, None]
        rows, hi, found = self._rows_of_tables[: len(before)], diagonal + 1, {}
        for window, table in tables.items():
            lo = torch.zeros_like(hi) if window is None else (hi - window).clamp_(min=0)
            N = self._cache.storage(0)[0].shape[1]
            found[window] = KeyRanges(lo, hi, diagonal, rows, table, self._cache.page_size, keys=N)
        return found

    def _turns(self, pages: int) -> dict[int | None, tuple[Tensor, Tensor]]:
        """RoPE's cosines and sines by window, of all positions in so many pages. Graphs refer to them."""
        found = self._known_turns.get(pages)
        if found is None:
            positions = torch.arange(pages * self._cache.page_size, device=self._new.device)
            found = {window: self._model.turn(positions, window) for window in self._tables}
            self._known_turns[pages] = found
        return found


def _argmax(x: Tensor) -> Tensor:
    """`x.argmax(-1)` of a few long rows [B, C] in two steps: one processor a row would take as long as a layer."""
    parts = 256
    if x.shape[1] % parts:
        return x.argmax(-1)
    values, at = x.view(len(x), parts, -1).max(-1)
    part = values.argmax(-1, keepdim=True)
    return (part * (x.shape[1] // parts) + at.gather(1, part))[:, 0]


def _rotate_and_store(
    qkv: Tensor,
    turns: tuple[Tensor, Tensor],
    heads: list[int],
    storage: tuple[Tensor, Tensor],
    before: Tensor,
    table: Tensor,
    page_size: int,
) -> Tensor:
    """The rotated query heads [1, T, Q, K] of a projection, whose key and value heads are stored."""
    if qkv.is_cuda:
        from keyspan.inference.decode_kernels import rotate_and_store

        rotate_and_store(qkv, turns, (heads[0], heads[1]), storage, before, table, page_size)
        return qkv.view(1, len(qkv), sum(heads), -1)[:, :, : heads[0]]
    q, *new = rotate_qkv(qkv, (turns[0][before], turns[1][before]), heads)
    page = table.gather(1, (before // page_size)[:, None])[:, 0].long()
    for stored, x in zip(storage, new, strict=True):
        stored.index_copy_(1, page * page_size + before % page_size, x)
    return q


def _of_one_row(model: GPT) -> bool:
    """Whether a model's layers are those that `row_product` computes."""
    return model.config.activation == "silu" and model.embedding.weight.dtype != torch.float64


def _product(
    x: Tensor, layer: Linear, norm: RMSNorm | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`layer(norm(x + residual))`, and the sum."""
    if norm is None:
        return layer(x), x
    normed, x = (norm(x), x) if residual is None else norm.add(x, residual)
    return layer(normed), x


def _row_product(x: Tensor, layer: Linear, *of: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from keyspan.inference.decode_kernels import row_product

    return row_product(x, layer.weight, layer.bias, *of, **options)


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
