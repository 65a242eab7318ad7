"""Layouts: where the keys of each query lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from keyspan.core.checks import check_int, readable
from keyspan.core.masks.base import Frame, Layout
from keyspan.core.masks.lengths import (
    INT_DTYPES,
    Lengths,
    as_tensor,
    check_lengths,
    check_total,
    on_host,
    set_fields,
    set_lengths,
    total_of,
)


@dataclass(frozen=True, eq=False)
class Documents(Layout, keyed=True):
    """Packed documents in one row: document `d` follows document `d − 1`, and its queries see its own keys only.

    >>> print(Documents([2, 3]).draw())
    ■ ■ · · ·
    ■ ■ · · ·
    · · ■ ■ ■
    · · ■ ■ ■
    · · ■ ■ ■
    >>> print(Documents([2, 2], [1, 4]).draw())
    ■ · · · ·
    ■ · · · ·
    · ■ ■ ■ ■
    · ■ ■ ■ ■

    Args:
        q_lengths: queries per document, list of int or int tensor `[documents]`. Zero is allowed. The sum of a
            list must be M; the sum of a tensor may be less, and the rows behind it see no key.
        k_lengths: keys per document; `None` means `q_lengths`.
    """

    q_lengths: Lengths
    k_lengths: Lengths | None = None

    def __post_init__(self) -> None:
        set_lengths(self, "q_lengths", optional="k_lengths")

    @classmethod
    def from_cu_seqlens(cls, cu_q: Lengths, cu_k: Lengths | None = None) -> Documents:
        """From cumulative lengths, as FlashAttention's varlen functions take them.

        >>> Documents.from_cu_seqlens([0, 2, 5])
        Documents(q_lengths=(2, 3), k_lengths=None)

        Args:
            cu_q: list of int or int tensor `[documents + 1]`: 0, then the end of each document's queries.
            cu_k: the same for keys; `None` means `cu_q`.
        """
        return cls(_differences("cu_q", cu_q), None if cu_k is None else _differences("cu_k", cu_k))

    @classmethod
    def from_position_ids(cls, ids: Tensor) -> Documents:
        """From positions inside the documents, as packing collators give them (`position_ids` of transformers).

        A document begins where a position is not the previous one plus 1.

        >>> Documents.from_position_ids(torch.tensor([0, 1, 0, 1, 2])).q_lengths
        tensor([2, 3], dtype=torch.int32)

        Args:
            ids: int tensor `[T]` or `[1, T]`. On a GPU and in a compiled function its values are not read on the
                host: `q_lengths` then has T entries, of which the last are 0.
        """
        ids = _packed_ids("position ids", ids)
        return cls(_run_lengths(ids[1:] != ids[:-1] + 1, len(ids)))

    @classmethod
    def from_document_ids(cls, ids: Tensor) -> Documents:
        """From the number of the document of each token (`document_id` of FlexAttention's examples).

        A document is a run of equal numbers. A number that comes back later begins a new document.

        >>> Documents.from_document_ids(torch.tensor([7, 7, 4, 4, 4])).q_lengths
        tensor([2, 3], dtype=torch.int32)

        Args:
            ids: int tensor `[T]` or `[1, T]`; see `from_position_ids` for tensors on a GPU.
        """
        ids = _packed_ids("document ids", ids)
        return cls(_run_lengths(ids[1:] != ids[:-1], len(ids)))

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return 1, total_of(self.q_lengths), total_of(self.q_lengths if self.k_lengths is None else self.k_lengths)

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        check_total("q_lengths", self.q_lengths, "M", M)
        q = as_tensor(self.q_lengths, device)
        if self.k_lengths is None:
            check_total("q_lengths (which are k_lengths too)", self.q_lengths, "N", N)
            k = q
        else:
            check_total("k_lengths", self.k_lengths, "N", N)
            k = as_tensor(self.k_lengths, device)
        return document_frame(q, k.cumsum(0) - k, k, M, N)


@dataclass(frozen=True, eq=False)
class PaddedKeys(Layout, keyed=True):
    """Packed queries; keys in slots of equal size: document `d` has keys `d·padding … d·padding + k_lengths[d] − 1`.

    >>> print((PaddedKeys([1, 2], [3, 2], padding=4) & Causal("bottom_right")).draw())
    ■ ■ ■ · · · · ·
    · · · · ■ · · ·
    · · · · ■ ■ · ·

    Args:
        q_lengths: queries per document, list of int or int tensor `[documents]`.
        k_lengths: keys in use per document, at most `padding`.
        padding: size of a document's slot, in keys.
    """

    q_lengths: Lengths
    k_lengths: Lengths
    padding: int

    def __post_init__(self) -> None:
        set_lengths(self, "q_lengths", "k_lengths")
        check_int("padding", self.padding)
        longest = max(on_host(self.k_lengths) or [0])
        if longest > self.padding:
            raise ValueError(f"k_lengths: got a document of {longest} keys, want at most padding = {self.padding}")

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return 1, total_of(self.q_lengths), len(self.k_lengths) * self.padding

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        check_total("q_lengths", self.q_lengths, "M", M)
        if len(self.k_lengths) * self.padding > N:
            raise ValueError(
                f"padding: got {len(self.k_lengths)} documents of {self.padding} slots, want at most N = {N} in all"
            )
        k = as_tensor(self.k_lengths, device)
        start = torch.arange(len(self.k_lengths), device=device, dtype=torch.int32) * self.padding
        return document_frame(as_tensor(self.q_lengths, device), start, k, M, N)


@dataclass(frozen=True, eq=False)
class GappyKeys(Layout, keyed=True):
    """Packed queries; document `d` has keys `k_starts[d] … k_starts[d] + k_lengths[d] − 1`. Documents may share keys.

    >>> print(GappyKeys([2, 1], k_starts=[1, 5], k_lengths=[3, 2]).draw(N=8))
    · ■ ■ ■ · · · ·
    · ■ ■ ■ · · · ·
    · · · · · ■ ■ ·

    Args:
        q_lengths: queries per document, list of int or int tensor `[documents]`.
        k_starts: first key of each document.
        k_lengths: keys of each document.
    """

    q_lengths: Lengths
    k_starts: Lengths
    k_lengths: Lengths

    def __post_init__(self) -> None:
        set_lengths(self, "q_lengths", "k_starts", "k_lengths")

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        starts, lengths = on_host(self.k_starts), on_host(self.k_lengths)
        known = starts is not None and lengths is not None
        stop = max([0, *map(sum, zip(starts, lengths, strict=True))]) if known else None  # type: ignore[arg-type]
        return 1, total_of(self.q_lengths), stop

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        check_total("q_lengths", self.q_lengths, "M", M)
        stop = self.sizes()[2]
        if stop is not None and stop > N:
            raise ValueError(f"k_starts + k_lengths: got keys up to {stop}, want at most N = {N}")
        starts, lengths = as_tensor(self.k_starts, device), as_tensor(self.k_lengths, device)
        return document_frame(as_tensor(self.q_lengths, device), starts, lengths, M, N)


@dataclass(frozen=True, eq=False)
class PagedKeys(Layout):
    """Packed queries; keys in pages of equal size in any order, as in vLLM's cache (Kwon et al. 2023).

    Key `j` of document `d` is in slot `block_table[d, j // page_size] · page_size + j % page_size`.

    >>> print(PagedKeys([1, 2], [3, 1], block_table=[[2, 0], [1, -1]], page_size=2).draw(N=6))
    ■ · · · ■ ■
    · · ■ · · ·
    · · ■ · · ·

    Args:
        q_lengths: queries per document, list of int or int tensor `[documents]`.
        k_lengths: keys of each document.
        block_table: int `[documents, pages]`, page numbers; entries behind a document's last page are not read.
        page_size: keys per page. Key and value are `[1, pages·page_size, heads, dim]`.
    """

    q_lengths: Lengths
    k_lengths: Lengths
    block_table: Tensor
    page_size: int

    def __post_init__(self) -> None:
        set_lengths(self, "q_lengths", "k_lengths")
        check_int("page_size", self.page_size)
        try:
            table = torch.as_tensor(self.block_table)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"block_table: got {self.block_table!r}, want an int tensor [documents, pages]") from None
        if table.dim() != 2 or table.dtype not in INT_DTYPES or table.shape[0] != len(self.q_lengths):
            raise ValueError(
                f"block_table: got {table.dtype} of shape {list(table.shape)}, "
                f"want an int tensor [{len(self.q_lengths)} documents, pages]"
            )
        if table.shape[1] * self.page_size >= 2**31:
            raise ValueError(
                f"page_size: got {self.page_size} with {table.shape[1]} pages per document, want less than 2³¹ keys"
            )
        set_fields(self, block_table=table)
        longest = max(on_host(self.k_lengths) or [0])
        if longest > table.shape[1] * self.page_size:
            raise ValueError(
                f"k_lengths: got a document of {longest} keys, "
                f"want at most {table.shape[1]} pages of {self.page_size} = {table.shape[1] * self.page_size}"
            )

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return 1, total_of(self.q_lengths), None

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        check_total("q_lengths", self.q_lengths, "M", M)
        if batch != 1:
            raise ValueError(f"query: got batch {batch}, want 1 with PagedKeys (the documents are packed in one row)")
        if N % self.page_size:
            raise ValueError(f"key: got N = {N} slots, want a multiple of page_size = {self.page_size}")
        self._check_pages(N // self.page_size)
        k = as_tensor(self.k_lengths, device)
        table = self.block_table.to(device=device, dtype=torch.int32)
        if not table.numel():  # rows without keys read an entry all the same
            table = table.new_zeros(max(table.shape[0], 1), max(table.shape[1], 1))
        frame = document_frame(as_tensor(self.q_lengths, device), k * 0, k, M, table.shape[1] * self.page_size)
        document = document_of_row(as_tensor(self.q_lengths, device), M)
        sequence = document.clamp(max=max(table.shape[0] - 1, 0)).int()
        return frame._replace(sequence=sequence, block_table=table, page_size=self.page_size, at_zero=True)

    def _check_pages(self, pages: int) -> None:
        lengths = on_host(self.k_lengths)
        if lengths is None or not readable(self.block_table):
            return
        for document, (row, length) in enumerate(zip(self.block_table.tolist(), lengths, strict=True)):
            for page in row[: -(-length // self.page_size)]:
                if not 0 <= page < pages:
                    raise ValueError(f"block_table: got page {page} for document {document}, want 0 … {pages - 1}")


@dataclass(frozen=True, eq=False)
class KeyLengths(Layout, keyed=True):
    """A batch in which each entry has its own run of valid keys: right-padded (`starts=None`) or left-padded.

    Positions count from the start of the row, padding included: `top_left` aligns query `i` with key `i`,
    `bottom_right` the last query with the last valid key. `Sinks` and `Prefix` count from the first valid key.

    >>> print((KeyLengths([2, 3], starts=[1, 0]) & Causal()).draw(3, 3))
    · · ·
    · ■ ·
    · ■ ■
    <BLANKLINE>
    ■ · ·
    ■ ■ ·
    ■ ■ ■

    Args:
        lengths: valid keys per batch entry, list of int or int tensor `[B]`.
        starts: first valid key per batch entry; `None` means 0.
    """

    lengths: Lengths
    starts: Lengths | None = None

    def __post_init__(self) -> None:
        set_lengths(self, "lengths", optional="starts")

    @classmethod
    def from_padding_mask(cls, visible: Tensor) -> KeyLengths:
        """From a padding mask, left- or right-padded (`attention_mask` of transformers).

        >>> print(KeyLengths.from_padding_mask(torch.tensor([[1, 1, 0], [0, 1, 1]])).draw(1, 3))
        ■ ■ ·
        <BLANKLINE>
        · ■ ■

        Args:
            visible: bool or int tensor `[B, N]`, true or not 0 = a key, false or 0 = padding. The keys of an entry must
                be contiguous. Values on a GPU are not read, so that is not checked there: the keys are those from the
                first true one to the last.
        """
        if not isinstance(visible, Tensor) or visible.dim() != 2 or visible.dtype not in (*INT_DTYPES, torch.bool):
            got = f"{visible.dtype} of shape {list(visible.shape)}" if isinstance(visible, Tensor) else repr(visible)
            raise ValueError(f"visible: got {got}, want a bool or int tensor [B, N], true = a key")
        N = visible.shape[1]
        key = torch.arange(N, device=visible.device, dtype=torch.int32)
        visible = visible != 0
        # An entry without keys begins and ends at 0.
        stop = torch.where(visible, key + 1, 0).amax(1) if N else visible.sum(1, dtype=torch.int32)
        start = torch.minimum(torch.where(visible, key, N).amin(1), stop) if N else stop
        if readable(visible) and not torch.equal(visible.sum(1), stop - start):
            entry = int((visible.sum(1) != stop - start).nonzero()[0])
            raise ValueError(
                f"visible: got padding between the keys of entry {entry}, want contiguous keys; "
                "a bool tensor with gaps goes to mask= as [B, 1, 1, N]"
            )
        return cls(stop - start, start)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return len(self.lengths), None, None

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        if len(self.lengths) != batch:
            raise ValueError(f"lengths: got {len(self.lengths)} entries, want one per batch entry = {batch}")
        lengths, starts = on_host(self.lengths), [0] * batch if self.starts is None else on_host(self.starts)
        if lengths is not None and starts is not None:
            for entry, end in enumerate(map(sum, zip(starts, lengths, strict=True))):
                if end > N:
                    raise ValueError(f"lengths: got keys up to {end} in entry {entry}, want at most N = {N}")
        length = as_tensor(self.lengths, device)
        start = torch.zeros_like(length) if self.starts is None else as_tensor(self.starts, device)
        row = torch.arange(M, device=device, dtype=torch.int32).expand(1, batch, M)
        start, stop = (x.clamp(0, N)[None, :, None].expand(1, batch, M) for x in (start, start + length))
        return Frame(start, stop, row, stop - M + row, at_zero=self.starts is None)


@dataclass(frozen=True, eq=False)
class SharedPrompt(Layout, keyed=True):
    """Packed prompts, each followed by its answers. An answer sees its prompt and, causally, itself.

    Every answer's positions start at the end of its prompt, so the result (biases included) is that of each answer
    computed alone behind a copy of the prompt, but for rounding. Rows have two ranges. `Sinks` and `Prefix` count keys
    of the prompt, so they may not exceed the shortest one.

    >>> print(SharedPrompt([2], [[2, 1]]).draw())
    ■ · · · ·
    ■ ■ · · ·
    ■ ■ ■ · ·
    ■ ■ ■ ■ ·
    ■ ■ · · ■

    Args:
        prompt_lengths: tokens of each prompt, list of int or int tensor `[prompts]`.
        answer_lengths: tokens of each prompt's answers: a list of lists, or an int tensor `[prompts, answers]`
            in which 0 means no answer.
    """

    prompt_lengths: Lengths
    answer_lengths: Sequence[Sequence[int]] | Tensor

    def __post_init__(self) -> None:
        set_fields(self, prompt_lengths=check_lengths("prompt_lengths", self.prompt_lengths))
        answers = self.answer_lengths
        if isinstance(answers, Tensor):
            if answers.dim() != 2 or answers.dtype not in INT_DTYPES:
                raise ValueError(
                    f"answer_lengths: got {answers.dtype} of shape {list(answers.shape)}, want int [prompts, answers]"
                )
            if readable(answers) and answers.numel() and int(answers.min()) < 0:
                raise ValueError(f"answer_lengths: got {int(answers.min())}, want every length ≥ 0")
        elif not isinstance(answers, Sequence):
            raise ValueError(f"answer_lengths: got {answers!r}, want a list of lists or an int tensor")
        else:
            answers = tuple(tuple(on_host(check_lengths("answer_lengths", row)) or ()) for row in answers)
            set_fields(self, answer_lengths=answers)
        if len(answers) != len(self.prompt_lengths):
            raise ValueError(
                f"answer_lengths: got {len(answers)} rows, want one per prompt = {len(self.prompt_lengths)}"
            )

    def _segments(self, device: torch.device) -> Tensor:
        """Lengths of prompts and answers in packed order, int32 `[prompts, 1 + answers]`."""
        answers = self.answer_lengths
        if not isinstance(answers, Tensor):
            width = max([0, *map(len, answers)])
            answers = torch.tensor([[*row, *[0] * (width - len(row))] for row in answers], dtype=torch.int32)
            answers = answers.reshape(len(self.prompt_lengths), width)
        prompts = as_tensor(self.prompt_lengths, device)
        return torch.cat([prompts[:, None], answers.to(device=device, dtype=torch.int32)], 1)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        prompts, answers = on_host(self.prompt_lengths), self.answer_lengths
        if prompts is None or (isinstance(answers, Tensor) and not readable(answers)):
            return 1, None, None
        rows = answers.tolist() if isinstance(answers, Tensor) else answers
        total = sum(prompts) + sum(sum(row) for row in rows)
        return 1, total, total

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        total = self.sizes()[1]
        exact = not isinstance(self.prompt_lengths, Tensor) and not isinstance(self.answer_lengths, Tensor)
        if total is not None and (M != N or (total != M if exact else total > M)):
            raise ValueError(
                f"prompt_lengths + answer_lengths: got {total} tokens in all and M = {M}, N = {N}, want all three equal"
            )
        segments = self._segments(device)
        columns = segments.shape[1]
        length = segments.flatten()
        start = length.cumsum(0) - length
        segment = document_of_row(length, M)
        # Rows behind the last token belong to a padding segment of length 0.
        start, prompt_length, prompt_start = (
            torch.nn.functional.pad(x, (0, 1)).int()[segment]
            for x in (
                start,
                segments[:, :1].expand(-1, columns).flatten(),
                start.reshape(-1, columns)[:, :1].expand(-1, columns).flatten(),
            )
        )
        row = torch.arange(M, device=device, dtype=torch.int32)
        inside = segment < length.numel()
        answer = (segment % columns > 0) & inside
        prompt_stop = torch.where(inside, prompt_start + prompt_length, prompt_start)
        # Range 0: the prompt; an answer's positions start at its end. Range 1: the answer itself; empty for prompts.
        position = torch.where(answer, prompt_stop + row - start, row)
        own_stop = torch.where(answer, row + 1, start)
        diagonal = torch.stack([position, row])[:, None]
        first = torch.stack([prompt_start, start])[:, None].clamp(max=N)
        stop = torch.stack([prompt_stop, own_stop])[:, None].clamp(max=N)
        return Frame(first, stop, diagonal, diagonal)


def _differences(name: str, ends: Lengths) -> Lengths:
    ends = check_lengths(name, ends)
    if len(ends) == 0:
        raise ValueError(f"{name}: got no entries, want 0 and the end of each document")
    known = on_host(ends)
    if known is not None and (known[0] != 0 or any(b < a for a, b in pairwise(known))):
        raise ValueError(f"{name}: got {known}, want 0 and then numbers that do not decrease")
    return ends.diff() if isinstance(ends, Tensor) else [b - a for a, b in pairwise(ends)]


def _packed_ids(name: str, ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in INT_DTYPES:
        raise ValueError(f"ids: got {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}, want an int tensor")
    if ids.dim() != 1 and (ids.dim() != 2 or ids.shape[0] != 1):
        raise ValueError(
            f"ids: got shape {list(ids.shape)}, want {name} [T] or [1, T] of one packed row; "
            "pack a batch by x.flatten(0, 1)"
        )
    return ids.flatten().long()


def _run_lengths(changes: Tensor, tokens: int) -> Tensor:
    """Lengths of the runs, int32; `changes` `[max(tokens − 1, 0)]` says which tokens after the first begin a run."""
    run = torch.nn.functional.pad(changes, (1, 0)).cumsum(0)[:tokens]
    count = (int(run[-1]) + 1 if tokens else 0) if readable(run) else tokens
    return torch.zeros(count, dtype=torch.int32, device=run.device).scatter_add_(0, run, torch.ones_like(run).int())


def document_of_row(lengths: Tensor, M: int) -> Tensor:
    """The document of each row, int64 `[M]`; rows behind the last document get the number of documents."""
    row = torch.arange(M, device=lengths.device, dtype=torch.int32)
    return torch.searchsorted(lengths.cumsum(0).int(), row, right=True)


def document_frame(q: Tensor, k_start: Tensor, k: Tensor, M: int, N: int) -> Frame:
    document = document_of_row(q, M)
    # Rows behind the last query belong to a padding document of length 0.
    q_start, q, k_start, k = (
        torch.nn.functional.pad(x, (0, 1)).int()[document] for x in (q.cumsum(0) - q, q, k_start, k)
    )
    offset = torch.arange(M, device=q.device, dtype=torch.int32) - q_start
    start, stop = k_start.clamp(0, N), (k_start + k).clamp(0, N)
    start, stop, top_left, bottom_right = (x.reshape(1, 1, M) for x in (start, stop, start + offset, stop - q + offset))
    return Frame(start, stop, top_left, bottom_right)
