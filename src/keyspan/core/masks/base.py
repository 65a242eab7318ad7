"""Base classes of masks, and their combination with `&`."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keyspan.core.checks import check_device, check_int
from keyspan.core.masks.lengths import set_fields
from keyspan.core.ranges import KeyRanges

_AND = (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and, operator.and_)
_OR = (Tensor.__or__, Tensor.__ror__, Tensor.bitwise_or, operator.or_)
"""The functions that torch reports for `&` and `|`: in eager mode, when it compiles and when it exports."""


class Frame(NamedTuple):
    """The keys of each query row before any visibility applies: int32 tensors `[S, B or 1, M]`."""

    start: Tensor
    stop: Tensor
    top_left: Tensor
    """The key beside query `i` when the first query stands beside the first key."""
    bottom_right: Tensor
    """The key beside query `i` when the last query stands beside the last key."""
    sequence: Tensor | None = None
    block_table: Tensor | None = None
    page_size: int = 0
    at_zero: bool = False
    """Whether every document begins at key 0."""


_KEY = "_cache_key"
"""Where a mask keeps its `cache_key`, which a call of `attention` asks for each time."""


class Mask:
    """Base class: masks combine with `&`, lower to key ranges, materialise, draw and move to a device."""

    _keyed = False

    def __init_subclass__(cls, keyed: bool = False, **kwargs: Any) -> None:
        """`keyed`: the fields determine the lowered mask. Not inherited: a subclass may depend on more."""
        super().__init_subclass__(**kwargs)
        cls._keyed = keyed

    def cache_key(self) -> Hashable | None:
        """A key for a cache of lowered masks: masks with equal keys lower to equal ranges.

        `None` where the lowered form may not be cached: a field is a tensor, which may be written to, or the class
        is a user's.
        """
        fields = vars(self)
        key: Hashable | None = fields.get(_KEY)
        if key is None:
            key = self._key()
            if key is not None:  # of fields that nobody writes to
                fields[_KEY] = key
        return key

    def _key(self) -> Hashable | None:
        values = tuple(vars(self).values())
        known = all(value is None or isinstance(value, (int, str, tuple)) for value in values)
        return (type(self), values) if self._keyed and known else None

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self,)

    __array_ufunc__ = None  # `array & mask` calls `__rand__` with the whole array

    def __and__(self, other: Mask | Tensor) -> Mask:
        other = as_mask(other)
        if isinstance(other, Union):
            return Union(tuple(self & member for member in other.members))
        return Combined((*self.parts, *other.parts))

    def __rand__(self, other: object) -> Mask:
        return as_mask(other) & self

    def __or__(self, other: Mask | Tensor) -> Mask:
        return Union((*_members(self), *_members(as_mask(other))))

    def __ror__(self, other: object) -> Mask:
        return as_mask(other) | self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Mask:
        """`tensor & mask`: torch calls this; its compiler does for `mask & tensor` too, which it reverses."""
        if func in _AND:
            return as_mask(args[0]) & as_mask(args[1])
        return as_mask(args[0]) | as_mask(args[1]) if func in _OR else NotImplemented

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
            device: of the ranges. Lengths that are tensors on that device are not read on the host.

        Raises:
            ValueError: where the lengths do not fit `batch`, `M` or `N`, and for sizes of 2³¹ or more.
        """
        from keyspan.core.masks.lowering import lower_parts  # its classes derive from this one

        for name, size in (("batch", batch), ("M", M), ("N", N)):
            check_int(name, size, 0, bits=31)
        return lower_parts(self.parts, batch, M, N, check_device("device", device))

    def materialize(
        self,
        M: int | None = None,
        N: int | None = None,
        *,
        batch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The mask as a bool tensor `[B or 1, M, N]`, true = visible. Sizes are taken from the lengths where known."""
        from keyspan.core.masks.lowering import sizes_of

        batch, M, N = sizes_of(self.parts, batch, M, N)
        return self.lower(batch, M, N, device).materialize(N)

    def draw(
        self,
        M: int | None = None,
        N: int | None = None,
        *,
        batch: int | None = None,
        path: str | Path | None = None,
    ) -> str:
        """The mask as text, one line per query; `path` writes a PNG too (needs matplotlib)."""
        from keyspan.draw import mask_picture, mask_text

        visible = self.materialize(M, N, batch=batch)
        if path is not None:
            mask_picture(visible, path, title=repr(self))
        return mask_text(visible)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on another device."""
        device = check_device("device", device)
        moved = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return replace(self, **changed) if changed else self  # type: ignore[type-var]


class Layout(Mask):
    """Base class of layouts: where keys lie. A mask has at most one; without one, batch entry b has its own N keys."""

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        """(batch, M, N) as the lengths give them; `None` where they do not, or where a device would have to be read."""
        raise NotImplementedError

    def frame(self, batch: int, M: int, N: int, device: torch.device) -> Frame:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor broadcastable to `[B, H, M, N]`, true = visible: for masks that ranges cannot express.

    >>> print(Dense(torch.tensor([[True, False, True]])).draw(2, 3))
    ■ · ■
    ■ · ■
    """

    visible: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.visible, Tensor):
            raise ValueError(f"mask: got {type(self.visible).__name__}, want a bool tensor")
        if self.visible.dtype != torch.bool:
            raise ValueError(
                f"mask: got a tensor of {self.visible.dtype}, want bool (true = visible); scores to be added go to "
                "bias=, a padding mask [B, N] to keyspan.KeyLengths.from_padding_mask"
            )
        if not 1 <= self.visible.dim() <= 5:
            raise ValueError(f"mask: got shape {list(self.visible.shape)}, want one broadcastable to [B, H, M, N]")


@dataclass(frozen=True, eq=False)
class Combined(Mask, keyed=True):
    """Parts combined by `&`: at most one layout, one `Prefix` and one `Sinks`, all with the same alignment."""

    members: tuple[Mask, ...]

    def __post_init__(self) -> None:
        from keyspan.core.masks.lowering import check_parts

        check_parts(self.members)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.members

    def _key(self) -> Hashable | None:
        keys = tuple(part.cache_key() for part in self.members)
        return None if not self._keyed or None in keys else keys

    def to(self, device: torch.device | str) -> Mask:
        return Combined(tuple(part.to(device) for part in self.members))

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.members))


@dataclass(frozen=True, eq=False)
class Union(Mask, keyed=True):
    """What any of the members sees; the result of `mask1 | mask2`.

    Members that name no alignment take that of the others. Biases count positions as each member does; where members
    with different positions see the same keys, the range that begins first counts.

    >>> print(((Causal() & Window(1)) | Window(0, 2)).draw(5, 5))
    ■ ■ ■ · ·
    ■ ■ ■ ■ ·
    · ■ ■ ■ ■
    · · ■ ■ ■
    · · · ■ ■

    Args:
        members: masks of ranges. A bool tensor raises ValueError, as do members with different `PagedKeys`.
    """

    members: tuple[Mask, ...]

    def __post_init__(self) -> None:
        from keyspan.core.masks.lowering import united

        set_fields(self, members=united(self.members))

    def __and__(self, other: Mask | Tensor) -> Mask:
        return Union(tuple(member & other for member in self.members))

    def _key(self) -> Hashable | None:
        keys = tuple(member.cache_key() for member in self.members)
        return None if not self._keyed or None in keys else (Union, keys)

    def sizes(self) -> tuple[int | None, int | None, int | None]:
        """(batch, M, N) as the members' layouts give them."""
        known = [part.sizes() for member in self.members for part in member.parts if isinstance(part, Layout)]
        batch = max([1, *(sizes[0] for sizes in known if sizes[0] is not None)])
        M, N = (next((sizes[i] for sizes in known if sizes[i] is not None), None) for i in (1, 2))
        return batch, M, N

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        from keyspan.core.masks.lowering import unite

        return unite([member.lower(batch, M, N, device) for member in self.members])

    def to(self, device: torch.device | str) -> Mask:
        return Union(tuple(member.to(device) for member in self.members))

    def __repr__(self) -> str:
        return " | ".join(f"({member!r})" if len(member.parts) > 1 else repr(member) for member in self.members)


def _members(mask: Mask) -> tuple[Mask, ...]:
    return mask.members if isinstance(mask, Union) else (mask,)


def as_mask(mask: object) -> Mask:
    """`mask` itself, or a bool tensor as `Dense`."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return Dense(mask)
    got = mask.__name__ + ", a class" if isinstance(mask, type) else type(mask).__name__
    raise ValueError(f"mask: got {got}, want a mask such as Causal() or a bool tensor")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
