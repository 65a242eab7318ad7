"""A key/value cache for sequences of different lengths, so that each token is computed once.

Every sequence has a slot of `capacity` tokens in one contiguous row per layer:

    [1, sequences * capacity, G, K]      a a a · b b b b c · · ·      capacity 4, lengths 3, 4, 1

New tokens come packed, without padding, any number per sequence: whole prompts, one token each, or none for sequences
that have ended. They attend through `PaddedKeys & Causal("bottom_right")`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keyspan import Causal, PaddedKeys
from keyspan.core.checks import check_int, check_type
from keyspan.models.gpt import Stored


class KVCache:
    """A cache for `GPT.forward(..., cache=...)`; for inference: no gradient flows through what it stores.

    Args:
        sequences: how many sequences it holds.
        capacity: tokens per sequence for which there is room at first.
        grow: whether the capacity doubles as often as needed (the storage is then copied); else ValueError.

    Attributes:
        lengths: tokens stored per sequence.
        capacity: tokens per sequence for which there is room now.
    """

    def __init__(self, sequences: int, capacity: int = 256, *, grow: bool = True) -> None:
        for name, value in (("sequences", sequences), ("capacity", capacity)):
            check_int(name, value, bits=31)
        self.lengths = [0] * sequences
        self.capacity = capacity
        self.grow = grow
        self._storage: dict[int, tuple[Tensor, Tensor]] = {}  # per layer: keys, values
        self._slots = torch.empty(0, dtype=torch.int64)
        self._layout = PaddedKeys([0] * sequences, [0] * sequences, capacity)

    def extend(self, lengths: list[int] | Tensor, tokens: int, device: torch.device) -> None:
        """Makes room for `lengths[b]` new tokens of each sequence b.

        A tensor of lengths is read on the host. Raises ValueError for another number of sequences, for lengths that do
        not add up to `tokens`, and where a sequence outgrows a capacity that may not grow.
        """
        new = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        check_type("lengths", new, list, tuple)
        if len(new) != len(self.lengths):
            raise ValueError(f"lengths: got {len(new)} sequences, want the cache's {len(self.lengths)}")
        if sum(new) != tokens:
            raise ValueError(f"lengths: got {sum(new)} in all, want the {tokens} tokens")
        total = [old + n for old, n in zip(self.lengths, new, strict=True)]
        longest = max(total)
        if longest > self.capacity:
            if not self.grow:
                raise ValueError(
                    f"lengths: got {longest} tokens in all for sequence {total.index(longest)}, "
                    f"want at most the cache's capacity = {self.capacity} (or grow=True)"
                )
            self._grow_to(longest)
        self._layout = PaddedKeys(new, total, self.capacity)
        # The last query of a sequence stands beside its last key, so a query's own key is on the diagonal.
        mask = self._layout & Causal("bottom_right")
        self._slots = mask.lower(1, tokens, len(total) * self.capacity, device).diagonal[0, 0].long()
        self.lengths = total

    def layout(self, window: int | None) -> tuple[PaddedKeys, int]:
        """Where the keys of all layers lie after `extend`, and how many slots there are."""
        return self._layout, len(self.lengths) * self.capacity

    def append(self, layer: int, key: Tensor, value: Tensor) -> Stored:
        """Stores the new tokens' keys and values [1, T, G, K] of a layer; returns its whole storage."""
        if layer not in self._storage:
            N = len(self.lengths) * self.capacity
            self._storage[layer] = (
                key.new_zeros((1, N, *key.shape[2:])),
                value.new_zeros((1, N, *value.shape[2:])),
            )
        for stored, new in zip(self._storage[layer], (key, value), strict=True):
            stored.index_copy_(1, self._slots, new.detach())
        return Stored(*self._storage[layer])

    def _grow_to(self, longest: int) -> None:
        sequences, old = len(self.lengths), self.capacity
        while self.capacity < longest:
            self.capacity *= 2

        def grown(stored: Tensor) -> Tensor:
            larger = stored.new_zeros((sequences, self.capacity, *stored.shape[2:]))
            larger[:, :old] = stored.view(sequences, old, *stored.shape[2:])
            return larger.flatten(0, 1).unsqueeze(0)

        self._storage = {layer: (grown(k), grown(v)) for layer, (k, v) in self._storage.items()}
