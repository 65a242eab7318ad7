"""Starts and lengths of packed sequences: the fields of xFormers' masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from keyspan.core.checks import check_device, check_int, check_type

Device = torch.device | str | None


class ByValue:
    """Equality by the values of a dataclass's fields, tensors included; hashable, since callers key caches by masks."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        # Fields and tensors are mutable, so only the type is hashed.
        return hash(type(self))


Info = TypeVar("Info", bound="_SeqLenInfo")


@dataclass(eq=False)
class _SeqLenInfo(ByValue):
    """Packed sequences.

    Attributes:
        seqstart: int32 `[sequences + 1]`, the start of each sequence, then the total.
        max_seqlen, min_seqlen: longest and shortest sequence.
        seqstart_py: `seqstart` as a list, or `None` where the host does not know it.
    """

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int] | None

    def __post_init__(self) -> None:
        self._given = None if torch.compiler.is_compiling() else (self.seqstart, _version(self.seqstart))

    @property
    def host(self) -> list[int] | None:
        """`seqstart_py` if it is still valid: `seqstart` is the tensor it came with, and was not written to."""
        if torch.compiler.is_compiling() or self._given is None:  # a compiled program reads lengths from the tensor
            return None
        tensor, version = self._given
        same = tensor is self.seqstart and version is not None and version == _version(tensor)
        return self.seqstart_py if same else None

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor restarts its version counter, so an outdated list must not be copied.
        return {**self.__dict__, "seqstart_py": self.host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def starts(self) -> list[int]:
        """`seqstart` as a list, read from the device where the host does not know it."""
        return self.host if self.host is not None else self.seqstart.tolist()

    def runs(self) -> tuple[Tensor, Tensor]:
        """(start, length) of every sequence, int32 `[sequences]`."""
        return self.seqstart[:-1], self.seqstart.diff()

    def intervals(self) -> Iterator[tuple[int, int]]:
        """(start, end) of every sequence."""
        yield from pairwise(self.starts)

    def to(self: Info, device: torch.device | str) -> Info:
        """The same on another device; `self` where it is already there."""
        if self.seqstart.device == check_device("device", device):
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved, seqstart_py=self.host)

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device = None) -> _SeqLenInfo:
        """From the lengths. `device=None` is the current CUDA device where there is one, else the CPU."""
        lengths = lengths_of("seqlens", seqlens)
        starts = [0, *accumulate(lengths)]
        return cls(int_tensor(starts, device), _longest(lengths), _shortest(lengths), starts)

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        """Write other lengths into the same tensor, which captured CUDA graphs then read.

        Raises ValueError for another number of sequences or one longer than `max_seqlen`.
        """
        lengths = lengths_of("seqlens", seqlens)
        self._check_lengths(lengths, self.max_seqlen)
        self.seqstart_py = [0, *accumulate(lengths)]
        self.min_seqlen = _shortest(lengths)
        self.seqstart.copy_(torch.tensor(self.seqstart_py, dtype=torch.int32))
        self._given = None  # from here on only the tensor is valid; its total may be less than M

    def _check_lengths(self, lengths: list[int], longest: int) -> None:
        count = len(self.seqstart) - 1
        if len(lengths) != count or _longest(lengths) > longest:
            raise ValueError(f"seqlens: got {lengths}, want {count} lengths of at most {longest}")

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """`[1, T, *]` into one `[batch_size, length, *]` per entry of `batch_sizes` (default: 1 each)."""
        starts = self.starts
        check_type("x", x, Tensor)
        if x.dim() < 2 or x.shape[0] != 1 or x.shape[1] != starts[-1]:
            raise ValueError(f"x: got shape {list(x.shape)}, want [1, {starts[-1]}, ...]")
        sizes = [1] * (len(starts) - 1) if batch_sizes is None else list(batch_sizes)
        if sum(sizes) != len(starts) - 1:
            raise ValueError(f"batch_sizes: got {sizes}, want {len(starts) - 1} sequences in all")
        edges = [0, *accumulate(sizes)]
        parts = [x[:, starts[first] : starts[last]] for first, last in pairwise(edges)]
        return [
            part.reshape(size, part.shape[1] // max(size, 1), *x.shape[2:])
            for part, size in zip(parts, sizes, strict=True)
        ]


@dataclass(eq=False)
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences in slots of equal size: sequence b has `b·padding … b·padding + seqlen[b] − 1`.

    Attributes:
        seqlen, seqlen_py: used lengths, int32 `[sequences]` and as a list.
        padding: size of a slot.
    """

    seqlen: Tensor
    seqlen_py: Sequence[int] | None
    padding: int

    def runs(self) -> tuple[Tensor, Tensor]:
        return self.seqstart[:-1], self.seqlen

    def intervals(self) -> Iterator[tuple[int, int]]:
        for start, length in zip(self.starts, self.seqlen.tolist(), strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device = None) -> _SeqLenInfo:
        raise NotImplementedError("_PaddedSeqLenInfo.from_seqlens: want from_seqlens_padded")

    @classmethod
    def from_seqlens_padded(cls, seqlens: Sequence[int], padding: int, *, device: Device = None) -> _PaddedSeqLenInfo:
        """From the used lengths, each at most `padding`."""
        lengths = lengths_of("seqlens", seqlens)
        check_int("padding", padding, 0, bits=31)
        if _longest(lengths) > padding:
            raise ValueError(f"seqlens: got a sequence of {max(lengths)}, want at most padding = {padding}")
        starts = [b * padding for b in range(len(lengths) + 1)]
        longest, shortest = _longest(lengths), _shortest(lengths)
        return cls(int_tensor(starts, device), longest, shortest, starts, int_tensor(lengths, device), lengths, padding)

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        raise NotImplementedError("_PaddedSeqLenInfo.from_seqlens_inplace: want from_seqlens_padded_inplace")

    def from_seqlens_padded_inplace(self, seqlens: Sequence[int]) -> None:
        """Write other lengths into the same tensor: as many as before, each at most `padding`."""
        lengths = lengths_of("seqlens", seqlens)
        self._check_lengths(lengths, self.padding)
        self.seqlen_py, self.max_seqlen, self.min_seqlen = lengths, _longest(lengths), _shortest(lengths)
        self.seqlen.copy_(torch.tensor(lengths, dtype=torch.int32))

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError("_PaddedSeqLenInfo.split: padded sequences are not packed")


@dataclass(eq=False)
class _GappySeqInfo(_SeqLenInfo):
    """Sequences anywhere, possibly overlapping: sequence b has `seqstart[b] … seqstart[b] + seqlen[b] − 1`.

    For paged keys (`paged=True`) `seqstart` counts within the sequence's own pages and ends with −1 instead of the
    total, and `seqlen` holds the end, not the length.
    """

    seqlen: Tensor
    seqlen_py: Sequence[int] | None

    def runs(self) -> tuple[Tensor, Tensor]:
        return self.seqstart[: len(self.seqlen)], self.seqlen

    def intervals(self) -> Iterator[tuple[int, int]]:
        starts = self.starts
        paged = starts[-1] < 0  # then `seqlen` holds ends
        for start, length in zip(starts, self.seqlen.tolist(), strict=False):
            yield start, (length if paged else start + length)

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device = None) -> _SeqLenInfo:
        raise NotImplementedError("_GappySeqInfo.from_seqlens: want from_seqlens_gappy")

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool, *, device: Device = None
    ) -> _GappySeqInfo:
        """From starts and lengths. `seqstarts` has one more entry than `seqlens`, the total; optional if `paged`."""
        lengths, starts = lengths_of("seqlens", seqlens), lengths_of("seqstarts", seqstarts)
        count = len(lengths)
        if len(starts) != count + 1 and not (paged and len(starts) == count):
            wanted = f"{count} or {count + 1}" if paged else f"{count + 1}"
            raise ValueError(f"seqstarts: got {len(starts)} entries, want {wanted} for {count} sequences")
        starts = starts[:count] if paged else starts
        seqlen = [s + n for s, n in zip(starts, lengths, strict=True)] if paged else lengths
        longest, shortest = _longest(lengths), _shortest(lengths)
        listed = [*starts, -1] if paged else starts
        return cls(int_tensor(listed, device), longest, shortest, listed, int_tensor(seqlen, device), seqlen)

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        raise NotImplementedError("_GappySeqInfo.from_seqlens_inplace: assign to seqstart and seqlen in place")

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError("_GappySeqInfo.split: gappy sequences are not packed")


def lengths_of(name: str, lengths: Iterable[int]) -> list[int]:
    """Lengths as a list of int, from any sequence, array or tensor."""
    try:
        values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        wrong = any(int(n) != n or n < 0 for n in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {lengths!r}, want a sequence of ints ≥ 0") from None
    if wrong:
        raise ValueError(f"{name}: got {values}, want ints ≥ 0")
    return [int(n) for n in values]


def int_tensor(values: Sequence[int], device: Device) -> Tensor:
    """An int32 tensor on `device`; `None` is xFormers' default: CUDA, else MTIA, else the CPU."""
    device = _default_device() if device is None else check_device("device", device)
    return torch.tensor(values, dtype=torch.int32, device=device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mtia" if torch.mtia.is_available() else "cpu"


def _version(x: Tensor) -> int | None:
    """A number that changes when x is written to; `None` where computing one would read a device."""
    if not x.is_inference():
        return x._version
    return hash(tuple(x.tolist())) if x.device.type == "cpu" else None


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.shape == b.shape and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


# The compiler, to which changing lengths are symbols, does not trace max(…, default=0).


def _longest(lengths: Sequence[int]) -> int:
    return max(lengths) if lengths else 0


def _shortest(lengths: Sequence[int]) -> int:
    return min(lengths) if lengths else 0
