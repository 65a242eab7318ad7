"""A packed batch: documents of different lengths end to end, without padding.

Letters: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""A target that is not scored (the default `ignore_index` of torch's cross entropy)."""


class Batch(NamedTuple):
    """Documents laid end to end: token i is to be followed by `targets[i]`, or by anything where that is `IGNORE`."""

    tokens: Tensor
    """[T] int64."""
    targets: Tensor
    """[T] int64."""
    lengths: list[int]
    """Tokens of each document; they sum to T."""
    names: Callable[[], list[str]] = list
    """Makes what the task calls each document; an empty list where it has no names for them."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; what is not a tensor stays with Python."""
        return self._replace(tokens=to_device(self.tokens, device), targets=to_device(self.targets, device))

    def scored(self) -> int:
        """How many targets count in the loss."""
        return int((self.targets != IGNORE).sum())


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """`x` where `device` copies it from without being waited for: for a GPU pinned memory of the host."""
    return x.pin_memory() if device.type == "cuda" else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; the host does not wait for what a GPU is at."""
    return pinned(x, device).to(device, non_blocking=device.type == "cuda")


def pack(examples: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Batch:
    """Pack examples, each a sequence and for each of its tokens whether it is scored, into one batch.

    A sequence of n tokens becomes n − 1 inputs and n − 1 targets; the first token is never a target.
    """
    tokens: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for sequence, scored in examples:
        tokens += sequence[:-1]
        targets += [token if counts else IGNORE for token, counts in zip(sequence[1:], scored[1:], strict=True)]
        lengths.append(len(sequence) - 1)
    return Batch(torch.tensor(tokens, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64), lengths)
