"""Visibilities: which keys of its document a query may see."""

from __future__ import annotations

from dataclasses import dataclass

from keyspan.core.checks import check_int
from keyspan.core.masks.base import Mask
from keyspan.core.masks.lengths import Align, check_align


@dataclass(frozen=True, eq=False)
class Causal(Mask, keyed=True):
    """Query `i` sees the keys up to its own position.

    `align` says which key has the same position as which query where their numbers differ.
    `top_left`: the first query has the first key's position (torch's `is_causal`, xFormers' `LowerTriangularMask`).
    `bottom_right`: the last query has the last key's position (flash-attention; decoding with a cache).

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
        check_align(self.align)


@dataclass(frozen=True, eq=False)
class Window(Mask, keyed=True):
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
        left: keys before its own position that a query sees; `None`: all.
        right: keys after it; `None`: all.
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
            check_align(self.align)


@dataclass(frozen=True, eq=False)
class Prefix(Mask, keyed=True):
    """The first `length` keys of each document are visible to all its queries; `Causal` and `Window` do not hide them.

    This is Prefix-LM, and with a window Longformer's global tokens (Beltagy et al. 2020).

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
        check_int("length", self.length, 0)


@dataclass(frozen=True, eq=False)
class Sinks(Mask, keyed=True):
    """`Window` does not hide the first `count` keys of each document; `Causal` does.

    These are the attention sinks of StreamingLLM (Xiao et al. 2023), used as `Causal() & Window(w, 0) & Sinks(4)`.
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
        check_int("count", self.count, 0)
