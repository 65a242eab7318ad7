"""A packed batch: variable-length documents end to end, no padding. Knows nothing of tasks, text or models.

Letters: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the lengths stay with Python."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.lengths)

    def scored(self) -> int:
        """How many targets count in the loss."""
        return int((self.targets != IGNORE).sum())


def pack(examples: Iterable[tuple[Sequence[int], int]]) -> Batch:
    """Pack examples, each a (sequence, prompt length), into one batch.

    A sequence of n tokens becomes n − 1 inputs and n − 1 targets; only the tokens after the prompt (of one token or
    more) are scored.
    """
    tokens: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for sequence, prompt in examples:
        tokens += sequence[:-1]
        targets += [IGNORE] * (prompt - 1) + list(sequence[prompt:])
        lengths.append(len(sequence) - 1)
    return Batch(torch.tensor(tokens, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64), lengths)
