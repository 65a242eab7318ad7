"""Masks, written as layout & visibility, and their lowering to key ranges. Knows nothing of scores, biases or backends.

The layout says where a query's keys live, the visibility which of them it may see:

    visible(i, j) = layout(i, j) and (j < prefix or (causal(i, j) and (window(i, j) or j < sinks)))

with `i` and `j` counted inside the document. `&` puts the parts together; a part not given allows everything.
In the pictures below rows are queries, columns are keys, `■` is visible.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from keyspan.core.ranges import KeyRanges

Align: TypeAlias = Literal["top_left", "bottom_right"]
Lengths: TypeAlias = Sequence[int] | Tensor
_AND = (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and, operator.and_)
"""What torch calls `&`: when it runs, compiles and exports."""
_UNBOUNDED = 2**30
"""Longer than any sequence; small enough that positions and it add up in int32."""


class Frame(NamedTuple):
    """Where each query row's keys lie, before any visibility: int32 tensors `[S, B or 1, M]`."""

    start: Tensor
    stop: Tensor
    top_left: Tensor
    """The key beside query `i` when the first query stands beside the first key."""
    bottom_right: Tensor
    """The key beside query `i` when the last query stands beside the last key."""
    sequence: Tensor | None = None
    block_table: Tensor | None = None
    page_size: int = 0


class Mask:
    """What all masks can do: be combined with `&`, lowered, materialised, drawn and moved to a device."""

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self,)

    def __and__(self, other: Mask | Tensor) -> Mask:
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        return Combined((*self.parts, *as_mask(other).parts))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Mask:
        """`tensor & mask`: torch asks here; its compiler does for `mask & tensor` too, which it turns round."""
        return as_mask(args[0]) & as_mask(args[1]) if func in _AND else NotImplemented

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return hash((type(self), *(v for v in values if not isinstance(v, Tensor))))

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        """The mask as ranges of keys per query row.

        Args:
            batch: batch size of the query.
            M: query rows per batch entry.
            N: keys per batch entry (for paged keys, the physical slots).
            device: where the ranges are made. Lengths given as tensors on that device are not read on the host.

        Raises:
            ValueError: where the lengths do not fit `batch`, `M` or `N`.
        """
        return _lower(self.parts, batch, M, N, torch.device(device))

    def materialize(
        self,
        M: int | None = None,
        N: int | None = None,
        *,
        batch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The mask as a bool tensor `[B or 1, M, N]`, true = visible. Sizes are taken from the lengths where known."""
        batch, M, N = _sizes(self.parts, batch, M, N)
        return self.lower(batch, M, N, device).materialize(N)

    def draw(
        self,
        M: int | None = None,
        N: int | None = None,
        *,
        batch: int | None = None,
        path: str | Path | None = None,
    ) -> str:
        """The mask as text, a line per query; with `path`, also as a picture (PNG, needs matplotlib)."""
        from keyspan.draw import mask_picture, mask_text

        visible = self.materialize(M, N, batch=batch)
        if path is not None:
            mask_picture(visible, path, title=repr(self))
        return mask_text(visible)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return replace(self, **changed) if changed else self  # type: ignore[type-var]


class Layout(Mask):
    """A mask that says where keys live. A mask has at most one; without any, query and keys are the batch itself."""

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        """(batch, M, N) as far as the lengths tell them without reading a device."""
        raise NotImplementedError

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Documents(Layout):
    """Packed documents in one row: queries and keys of document `d` follow those of `d − 1`; none sees another's.

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
        q_lengths: queries per document, list of int or int tensor `[documents]`. Zero is allowed. A list must add
            up to M; a tensor may add up to less, then the rows behind see nothing.
        k_lengths: keys per document; `None` means `q_lengths`.
    """

    q_lengths: Lengths
    k_lengths: Lengths | None = None

    def __post_init__(self) -> None:
        _set(self, q_lengths=_lengths("q_lengths", self.q_lengths))
        if self.k_lengths is not None:
            _set(self, k_lengths=_lengths("k_lengths", self.k_lengths))
            _same_count("k_lengths", self.k_lengths, "q_lengths", self.q_lengths)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return 1, _total(self.q_lengths), _total(self.q_lengths if self.k_lengths is None else self.k_lengths)

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        _fits("q_lengths", self.q_lengths, "M", M)
        q = _tensor(self.q_lengths, device)
        if self.k_lengths is None:
            _fits("q_lengths (which are k_lengths too)", self.q_lengths, "N", N)
            k = q
        else:
            _fits("k_lengths", self.k_lengths, "N", N)
            k = _tensor(self.k_lengths, device)
        return _document_frame(q, k.cumsum(0) - k, k, M, N)


@dataclass(frozen=True, eq=False)
class PaddedKeys(Layout):
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
        _set(
            self,
            q_lengths=_lengths("q_lengths", self.q_lengths),
            k_lengths=_lengths("k_lengths", self.k_lengths),
        )
        _same_count("k_lengths", self.k_lengths, "q_lengths", self.q_lengths)
        _positive("padding", self.padding)
        longest = max(_host(self.k_lengths) or [0])
        if longest > self.padding:
            raise ValueError(f"k_lengths: got a document of {longest} keys, want at most padding = {self.padding}")

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return 1, _total(self.q_lengths), len(self.k_lengths) * self.padding

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        _fits("q_lengths", self.q_lengths, "M", M)
        if len(self.k_lengths) * self.padding > N:
            raise ValueError(
                f"padding: got {len(self.k_lengths)} documents of {self.padding} slots, want at most N = {N} in all"
            )
        k = _tensor(self.k_lengths, device)
        start = torch.arange(len(self.k_lengths), device=device, dtype=torch.int32) * self.padding
        return _document_frame(_tensor(self.q_lengths, device), start, k, M, N)


@dataclass(frozen=True, eq=False)
class GappyKeys(Layout):
    """Packed queries; document `d` has keys `k_starts[d] … k_starts[d] + k_lengths[d] − 1`, anywhere, even shared.

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
        for name in ("q_lengths", "k_starts", "k_lengths"):
            _set(self, **{name: _lengths(name, getattr(self, name))})
        _same_count("k_starts", self.k_starts, "q_lengths", self.q_lengths)
        _same_count("k_lengths", self.k_lengths, "q_lengths", self.q_lengths)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        starts, lengths = _host(self.k_starts), _host(self.k_lengths)
        known = starts is not None and lengths is not None
        stop = max([0, *map(sum, zip(starts, lengths, strict=True))]) if known else None  # type: ignore[arg-type]
        return 1, _total(self.q_lengths), stop

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        _fits("q_lengths", self.q_lengths, "M", M)
        stop = self.sizes()[2]
        if stop is not None and stop > N:
            raise ValueError(f"k_starts + k_lengths: got keys up to {stop}, want at most N = {N}")
        starts, lengths = _tensor(self.k_starts, device), _tensor(self.k_lengths, device)
        return _document_frame(_tensor(self.q_lengths, device), starts, lengths, M, N)


@dataclass(frozen=True, eq=False)
class PagedKeys(Layout):
    """Packed queries; keys in pages of equal size, any page anywhere, as in vLLM's cache (Kwon et al. 2023).

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
        _set(
            self,
            q_lengths=_lengths("q_lengths", self.q_lengths),
            k_lengths=_lengths("k_lengths", self.k_lengths),
        )
        _same_count("k_lengths", self.k_lengths, "q_lengths", self.q_lengths)
        _positive("page_size", self.page_size)
        try:
            table = torch.as_tensor(self.block_table)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"block_table: got {self.block_table!r}, want an int tensor [documents, pages]") from None
        if (
            table.dim() != 2
            or table.is_floating_point()
            or table.dtype == torch.bool
            or table.shape[0] != len(self.q_lengths)
        ):
            raise ValueError(
                f"block_table: got {table.dtype} of shape {list(table.shape)}, "
                f"want an int tensor [{len(self.q_lengths)} documents, pages]"
            )
        _set(self, block_table=table)
        longest = max(_host(self.k_lengths) or [0])
        if longest > table.shape[1] * self.page_size:
            raise ValueError(
                f"k_lengths: got a document of {longest} keys, "
                f"want at most {table.shape[1]} pages of {self.page_size} = {table.shape[1] * self.page_size}"
            )

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return 1, _total(self.q_lengths), None

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        _fits("q_lengths", self.q_lengths, "M", M)
        if batch != 1:
            raise ValueError(f"query: got batch {batch}, want 1 with PagedKeys (the documents are packed in one row)")
        if N % self.page_size:
            raise ValueError(f"key: got N = {N} slots, want a multiple of page_size = {self.page_size}")
        self._check_pages(N // self.page_size)
        k = _tensor(self.k_lengths, device)
        table = self.block_table.to(device=device, dtype=torch.int32)
        frame = _document_frame(_tensor(self.q_lengths, device), k * 0, k, M, table.shape[1] * self.page_size)
        document = _document_of_row(_tensor(self.q_lengths, device), M)
        sequence = document.clamp(max=max(table.shape[0] - 1, 0)).int()
        return frame._replace(sequence=sequence, block_table=table, page_size=self.page_size)

    def _check_pages(self, pages: int) -> None:
        lengths = _host(self.k_lengths)
        if lengths is None or not _readable(self.block_table):
            return
        for document, (row, length) in enumerate(zip(self.block_table.tolist(), lengths, strict=True)):
            for page in row[: -(-length // self.page_size)]:
                if not 0 <= page < pages:
                    raise ValueError(f"block_table: got page {page} for document {document}, want 0 … {pages - 1}")


@dataclass(frozen=True, eq=False)
class KeyLengths(Layout):
    """The batch itself, each entry with its own run of valid keys: right-padded (`starts=None`) or left-padded keys.

    The frame stays the batch row: `top_left` puts query `i` beside key `i`; `bottom_right` puts the last query
    beside the last valid key. `Sinks` and `Prefix` count from the first valid key.

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
        _set(self, lengths=_lengths("lengths", self.lengths))
        if self.starts is not None:
            _set(self, starts=_lengths("starts", self.starts))
            _same_count("starts", self.starts, "lengths", self.lengths)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        return len(self.lengths), None, None

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        if len(self.lengths) != batch:
            raise ValueError(f"lengths: got {len(self.lengths)} entries, want one per batch entry = {batch}")
        lengths, starts = _host(self.lengths), [0] * batch if self.starts is None else _host(self.starts)
        if lengths is not None and starts is not None:
            for entry, end in enumerate(map(sum, zip(starts, lengths, strict=True))):
                if end > N:
                    raise ValueError(f"lengths: got keys up to {end} in entry {entry}, want at most N = {N}")
        length = _tensor(self.lengths, device)
        start = torch.zeros_like(length) if self.starts is None else _tensor(self.starts, device)
        row = torch.arange(M, device=device, dtype=torch.int32).expand(1, batch, M)
        start, stop = (x.clamp(0, N)[None, :, None].expand(1, batch, M) for x in (start, start + length))
        return Frame(start, stop, row, stop - M + row)


@dataclass(frozen=True, eq=False)
class SharedPrompt(Layout):
    """Packed prompts, each followed by its answers; an answer sees its prompt and itself, causally, and no other.

    Each answer stands at the position right behind its prompt, so the result (biases included) equals that of
    every answer computed alone behind a copy of the prompt. Two ranges per row. `Sinks` and `Prefix` name keys of the
    prompt, so they may not be longer than it.

    >>> print(SharedPrompt([2], [[2, 1]]).draw())
    ■ · · · ·
    ■ ■ · · ·
    ■ ■ ■ · ·
    ■ ■ ■ ■ ·
    ■ ■ · · ■

    Args:
        prompt_lengths: tokens of each prompt, list of int or int tensor `[prompts]`.
        answer_lengths: tokens of each prompt's answers: a list of lists, or an int tensor `[prompts, answers]`
            in which 0 stands for no answer.
    """

    prompt_lengths: Lengths
    answer_lengths: Sequence[Sequence[int]] | Tensor

    def __post_init__(self) -> None:
        _set(self, prompt_lengths=_lengths("prompt_lengths", self.prompt_lengths))
        answers = self.answer_lengths
        if isinstance(answers, Tensor):
            if answers.dim() != 2 or answers.is_floating_point() or answers.dtype == torch.bool:
                raise ValueError(
                    f"answer_lengths: got {answers.dtype} of shape {list(answers.shape)}, want int [prompts, answers]"
                )
            if _readable(answers) and answers.numel() and int(answers.min()) < 0:
                raise ValueError(f"answer_lengths: got {int(answers.min())}, want every length ≥ 0")
        elif not isinstance(answers, Sequence):
            raise ValueError(f"answer_lengths: got {answers!r}, want a list of lists or an int tensor")
        else:
            answers = tuple(tuple(_host(_lengths("answer_lengths", row)) or ()) for row in answers)
            _set(self, answer_lengths=answers)
        if len(answers) != len(self.prompt_lengths):
            raise ValueError(
                f"answer_lengths: got {len(answers)} rows, want one per prompt = {len(self.prompt_lengths)}"
            )

    def _segments(self, device: torch.device) -> Tensor:
        """Lengths of prompts and answers in the order they are packed, int32 `[prompts, 1 + answers]`."""
        answers = self.answer_lengths
        if not isinstance(answers, Tensor):
            width = max([0, *map(len, answers)])
            answers = torch.tensor([[*row, *[0] * (width - len(row))] for row in answers], dtype=torch.int32)
            answers = answers.reshape(len(self.prompt_lengths), width)
        prompts = _tensor(self.prompt_lengths, device)
        return torch.cat([prompts[:, None], answers.to(device=device, dtype=torch.int32)], 1)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        prompts, answers = _host(self.prompt_lengths), self.answer_lengths
        if prompts is None or (isinstance(answers, Tensor) and not _readable(answers)):
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
        segment = _document_of_row(length, M)
        # A phantom segment of length 0 stands behind the last, for rows behind the last token.
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
        # Range 0: the prompt, met by an answer from behind its end. Range 1: the answer itself; empty for prompts.
        position = torch.where(answer, prompt_stop + row - start, row)
        own_stop = torch.where(answer, row + 1, start)
        diagonal = torch.stack([position, row])[:, None]
        first = torch.stack([prompt_start, start])[:, None].clamp(max=N)
        stop = torch.stack([prompt_stop, own_stop])[:, None].clamp(max=N)
        return Frame(first, stop, diagonal, diagonal)


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Query `i` sees the keys up to its own position.

    `align` says which key stands beside which query when a document has more keys than queries, or fewer.
    `top_left`: the first query beside the first key (torch's `is_causal`, xFormers' `LowerTriangularMask`).
    `bottom_right`: the last query beside the last key (flash-attention; what decoding with a cache needs).

    >>> print(Causal().draw(3, 5))
    ■ · · · ·
    ■ ■ · · ·
    ■ ■ ■ · ·
    >>> print(Causal("bottom_right").draw(3, 5))
    ■ ■ ■ · ·
    ■ ■ ■ ■ ·
    ■ ■ ■ ■ ■
    >>> print(Causal("bottom_right").draw(4, 2))
    · ·
    · ·
    ■ ·
    ■ ■
    """

    align: Align = "top_left"

    def __post_init__(self) -> None:
        _check_align(self.align)


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """Query `i` sees keys from `i − left` to `i + right`, both inclusive, counted along the diagonal.

    >>> print(Window(1, 2).draw(4, 6))
    ■ ■ ■ · · ·
    ■ ■ ■ ■ · ·
    · ■ ■ ■ ■ ·
    · · ■ ■ ■ ■
    >>> print((Causal() & Window(1)).draw(4, 4))
    ■ · · ·
    ■ ■ · ·
    · ■ ■ ·
    · · ■ ■

    Args:
        left: how many keys before its own a query sees; `None` for all.
        right: how many after; `None` for all.
        align: as in `Causal`; `None` takes that of the `Causal` it is combined with, or `top_left`.
    """

    left: int | None = None
    right: int | None = None
    align: Align | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}: got {value!r}, want an int ≥ 0 or None")
        if self.align is not None:
            _check_align(self.align)


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """The first `length` keys of each document are visible to all its queries, whatever `Causal` and `Window` say.

    Prefix-LM, and with a window Longformer's global tokens (Beltagy et al. 2020).

    >>> print((Causal() & Prefix(2)).draw(4, 4))
    ■ ■ · ·
    ■ ■ · ·
    ■ ■ ■ ·
    ■ ■ ■ ■
    >>> print((Window(0, 1) & Prefix(1)).draw(4, 4))
    ■ ■ · ·
    ■ ■ ■ ·
    ■ · ■ ■
    ■ · · ■
    """

    length: int

    def __post_init__(self) -> None:
        _nonnegative("length", self.length)


@dataclass(frozen=True, eq=False)
class Sinks(Mask):
    """The first `count` keys of each document are exempt from `Window`; `Causal` still holds for them.

    Attention sinks of StreamingLLM (Xiao et al. 2023), used as `Causal() & Window(w, 0) & Sinks(4)`.
    (The learned sinks of GPT-OSS are not keys but logits: `attention(..., sinks=)`.)

    >>> print((Causal() & Window(1, 0) & Sinks(1)).draw(5, 5))
    ■ · · · ·
    ■ ■ · · ·
    ■ ■ ■ · ·
    ■ · ■ ■ ·
    ■ · · ■ ■
    """

    count: int

    def __post_init__(self) -> None:
        _nonnegative("count", self.count)


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor broadcastable to `[B, H, M, N]`, true where a key may be seen: for masks no range describes.

    >>> print(Dense(torch.tensor([[True, False, True]])).draw(2, 3))
    ■ · ■
    ■ · ■
    """

    visible: Tensor

    def __post_init__(self) -> None:
        if self.visible.dtype != torch.bool:
            raise ValueError(
                f"mask: got a tensor of {self.visible.dtype}, want bool (true = visible); "
                "scores to be added go to bias="
            )
        if not 1 <= self.visible.dim() <= 5:
            raise ValueError(f"mask: got shape {list(self.visible.shape)}, want one broadcastable to [B, H, M, N]")


@dataclass(frozen=True, eq=False)
class Combined(Mask):
    """Parts put together by `&`: at most one layout, one `Prefix` and one `Sinks`, all of one alignment."""

    members: tuple[Mask, ...]

    def __post_init__(self) -> None:
        for kind, name in ((Layout, "layout"), (Prefix, "Prefix"), (Sinks, "Sinks")):
            found = [part for part in self.members if isinstance(part, kind)]
            if len(found) > 1:
                raise ValueError(f"mask: got {' & '.join(map(_name, found))}, want at most one {name}")
        _alignment(self.members)
        for prompt in (part for part in self.members if isinstance(part, SharedPrompt)):
            shortest = min(_host(prompt.prompt_lengths) or [_UNBOUNDED])
            for part in self.members:
                exempt = part.length if isinstance(part, Prefix) else part.count if isinstance(part, Sinks) else 0
                if exempt > shortest:
                    field = "length" if isinstance(part, Prefix) else "count"
                    raise ValueError(f"{field}: got {exempt}, want at most the shortest prompt = {shortest}")

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.members

    def to(self, device: torch.device | str) -> Mask:
        return Combined(tuple(part.to(device) for part in self.members))

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.members))


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask as it is, a bool tensor as `Dense`."""
    return Dense(mask) if isinstance(mask, Tensor) else mask


def _lower(parts: tuple[Mask, ...], batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
    align = _alignment(parts)
    frame = _frame(parts, batch, M, N, device)
    start, stop = frame.start, frame.stop
    diagonal = frame.top_left if align == "top_left" else frame.bottom_right
    windows = [part for part in parts if isinstance(part, Window)]
    lo, hi = start, stop
    if any(isinstance(part, (Causal, SharedPrompt)) for part in parts):
        hi = torch.minimum(hi, diagonal + 1)
    reach = hi
    for window in windows:
        if window.left is not None:
            lo = torch.maximum(lo, diagonal - min(window.left, _UNBOUNDED))
        if window.right is not None:
            hi = torch.minimum(hi, diagonal + min(window.right, _UNBOUNDED) + 1)

    exempt = _exempt(parts, start[:1], stop[:1], reach[:1])
    if exempt is not None and all(window.left is None for window in windows):
        # Both the exempt keys and what is visible anyway begin at `start`: their union is one range.
        hi = torch.cat([torch.maximum(hi[:1], exempt), hi[1:]])
    elif exempt is not None:
        lo = torch.cat([start[:1], torch.maximum(lo[:1], exempt), lo[1:]])
        hi = torch.cat([exempt, hi])
        start, stop, diagonal = (torch.cat([x[:1], x]) for x in (start, stop, diagonal))
    lo = torch.minimum(torch.maximum(lo, start), stop)
    hi = torch.maximum(torch.minimum(hi, stop), lo)

    dense = None
    for part in parts:
        if isinstance(part, Dense):
            dense = part.visible if dense is None else dense & part.visible
    if dense is not None and dense.device != device:
        raise ValueError(f"mask: got a bool tensor on {dense.device}, want {device}")
    shape = (lo.shape[0], lo.shape[1], M)
    return KeyRanges(
        lo.expand(shape).int(),
        hi.expand(shape).int(),
        diagonal.expand(shape).int(),
        frame.sequence,
        frame.block_table,
        frame.page_size,
        dense,
        N,
    )


def _exempt(parts: tuple[Mask, ...], start: Tensor, stop: Tensor, reach: Tensor) -> Tensor | None:
    """One past the last key that Prefix or Sinks exempt, per row; they begin at `start`. None where nothing is."""
    exempt = None
    for part in parts:
        if isinstance(part, Prefix):
            end = torch.minimum(start + min(part.length, _UNBOUNDED), stop)
        elif isinstance(part, Sinks):
            end = torch.maximum(torch.minimum(start + min(part.count, _UNBOUNDED), reach), start)
        else:
            continue
        exempt = end if exempt is None else torch.maximum(exempt, end)
    return exempt


def _frame(parts: tuple[Mask, ...], batch: int, M: int, N: int, device: torch.device) -> Frame:
    for part in parts:
        if isinstance(part, Layout):
            return part.frame(batch, M, N, device)
    row = torch.arange(M, device=device, dtype=torch.int32).reshape(1, 1, M)
    start = torch.zeros_like(row)
    return Frame(start, start + N, row, row + (N - M))


def _document_of_row(lengths: Tensor, M: int) -> Tensor:
    """The document that row `i` belongs to, int64 `[M]`; the number of documents for rows behind the last."""
    row = torch.arange(M, device=lengths.device, dtype=torch.int32)
    return torch.searchsorted(lengths.cumsum(0).int(), row, right=True)


def _document_frame(q: Tensor, k_start: Tensor, k: Tensor, M: int, N: int) -> Frame:
    document = _document_of_row(q, M)
    # A phantom document of length 0 stands behind the last, for rows behind the last query.
    q_start, q, k_start, k = (
        torch.nn.functional.pad(x, (0, 1)).int()[document] for x in (q.cumsum(0) - q, q, k_start, k)
    )
    offset = torch.arange(M, device=q.device, dtype=torch.int32) - q_start
    start, stop = k_start.clamp(0, N), (k_start + k).clamp(0, N)
    start, stop, top_left, bottom_right = (x.reshape(1, 1, M) for x in (start, stop, start + offset, stop - q + offset))
    return Frame(start, stop, top_left, bottom_right)


def _alignment(parts: tuple[Mask, ...]) -> Align:
    given = {part.align for part in parts if isinstance(part, (Causal, Window)) and part.align is not None}
    if len(given) > 1:
        raise ValueError(f"align: got {' and '.join(sorted(given))} in one mask, want one of them")
    align: Align = given.pop() if given else "top_left"
    if align == "bottom_right" and any(isinstance(part, SharedPrompt) for part in parts):
        raise ValueError("align: got bottom_right with SharedPrompt, want top_left (its queries are its keys)")
    return align


def _sizes(parts: tuple[Mask, ...], batch: int | None, M: int | None, N: int | None) -> tuple[int, int, int]:
    known: tuple[int | None, int | None, int | None] = (1, None, None)
    for part in parts:
        if isinstance(part, Layout):
            known = part.sizes()
    shapes = [part.visible.shape for part in parts if isinstance(part, Dense)]
    if shapes and not any(isinstance(part, Layout) for part in parts):
        shape = (1, 1, *torch.broadcast_shapes(*shapes))
        # A size of 1 may broadcast: it does not tell how many rows or keys there are.
        rows, keys = (None if size == 1 else size for size in shape[-2:])
        known = (shape[2] if len(shape) > 5 else 1, rows, keys)
    B, M, N = (given if given is not None else found for given, found in zip((batch, M, N), known, strict=True))
    if B is None or M is None or N is None:
        missing = [name for name, size in (("batch", B), ("M", M), ("N", N)) if size is None]
        raise ValueError(f"{missing[0]}: got None, want a size: {' & '.join(map(_name, parts))} does not tell it")
    for name, size in (("batch", B), ("M", M), ("N", N)):
        _nonnegative(name, size)
    return B, M, N


def _lengths(name: str, lengths: Any) -> tuple[int, ...] | Tensor:
    """Lengths checked as far as they can be read without waiting for a device."""
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"{name}: got {lengths.dtype} of shape {list(lengths.shape)}, want a 1-D int tensor")
        if _readable(lengths) and lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"{name}: got {int(lengths.min())}, want every length ≥ 0")
        return lengths
    try:
        values = tuple(int(n) if n == int(n) and not isinstance(n, bool) else None for n in lengths)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: got {lengths!r}, want a sequence of int or an int tensor") from None
    for given, value in zip(lengths, values, strict=True):
        if value is None or value < 0:
            raise ValueError(f"{name}: got {given!r}, want every length an int ≥ 0")
    return values  # type: ignore[return-value]


def _readable(x: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device and without breaking a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def _host(lengths: Lengths | None) -> list[int] | None:
    """The lengths as a list where the host knows them."""
    if isinstance(lengths, Tensor):
        return lengths.tolist() if _readable(lengths) else None
    return None if lengths is None else list(lengths)


def _total(lengths: Lengths) -> int | None:
    values = _host(lengths)
    return None if values is None else sum(values)


def _tensor(lengths: Lengths, device: torch.device) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths.to(device=device, dtype=torch.int32)
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def _fits(name: str, lengths: Lengths, size_name: str, size: int) -> None:
    total = _total(lengths)
    if total is None:
        return
    exact = not isinstance(lengths, Tensor)
    if total > size or (exact and total != size):
        raise ValueError(f"{name}: got {total} in all, want {'' if exact else 'at most '}{size_name} = {size}")


def _same_count(name: str, lengths: Lengths, other_name: str, other: Lengths) -> None:
    if len(lengths) != len(other):
        raise ValueError(f"{name}: got {len(lengths)} documents, want {len(other)} as in {other_name}")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, want an int ≥ 1")


def _nonnegative(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: got {value!r}, want an int ≥ 0")


def _check_align(align: object) -> None:
    if align not in ("top_left", "bottom_right"):
        raise ValueError(f"align: got {align!r}, want 'top_left' or 'bottom_right'")


def _set(mask: Mask, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(mask, name, value)


def _name(mask: Mask) -> str:
    return type(mask).__name__


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
