"""A dynamic key-value cache that appends in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from keyspan.core.checks import check_type


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """transformers' `DynamicCache` that appends in place: a new token is written, the cached ones are not copied.

    `DynamicCache` concatenates, so that a step of decoding reads and writes the whole cache once more. Here keys and
    values are the first tokens of larger tensors, which are replaced by ones a quarter larger when they are full.
    Layers with a sliding window are those of `DynamicCache`. Where gradients are computed, and while torch's compiler
    traces, tokens are concatenated.

        model.generate(**inputs, past_key_values=keyspan.interop.transformers.GrowingCache(config=model.config))

    Keys and values that were read from the cache before a `crop` change when tokens are appended after it: clone them.

    Args:
        config: the model's, which says which layers have a sliding window; `None` for a model without.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig | None = None):
        if config is not None:
            check_type("config", config, PreTrainedConfig)
        super().__init__(config=config)
        grow_in_place(self)


def grow_in_place(cache: DynamicCache) -> None:
    """Let the layers of a `DynamicCache` append in place from now on."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
            layer._rooms = {}


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    keys: Tensor
    values: Tensor
    _LEAST = 256
    """Fewest tokens that a tensor is made larger by."""

    _rooms: dict[str, Tensor]
    """The tensors whose first tokens `keys` and `values` are."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._rooms.clear()

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """`held` and `new` tokens, `[B, H, N, K]`."""
        tracked = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
        if torch.compiler.is_compiling() or tracked or (held.numel() and held.shape[:2] != new.shape[:2]):
            return torch.cat([held, new], -2)
        used = held.shape[-2] if held.numel() else 0
        wanted = used + new.shape[-2]
        room = self._rooms.get(name)
        # Reordering, selecting and offloading replace what is held.
        fits = (
            room is not None
            and wanted <= room.shape[-2]
            and (not used or (held.data_ptr() == room.data_ptr() and held.stride() == room.stride()))
            and (room.shape[:2], room.shape[-1], room.dtype) == (new.shape[:2], new.shape[-1], new.dtype)
            and room.is_inference() == torch.is_inference_mode_enabled()
        )
        if not fits:
            larger = wanted + max(wanted // 4, self._LEAST)
            room = self._rooms[name] = new.new_empty(*new.shape[:2], larger, new.shape[-1])
            if used:
                room[:, :, :used] = held
        assert room is not None
        room[:, :, used:wanted] = new
        return room[:, :, :wanted]
