"""`use_keyspan(model)`: attention, linear layers and cache of a model by Keyspan, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from keyspan.core.checks import check_type
from keyspan.interop.transformers.cache import grow_in_place
from keyspan.interop.transformers.linears import Model, replace_linears
from keyspan.interop.transformers.registry import NAME, register

_HOOKED = "_keyspan_caches_grow"
"""Attribute of modules that `use_keyspan` has put a hook on."""


def use_keyspan(model: Model) -> Model:
    """Compute a model's attention with Keyspan, its linear layers with the native library, and grow its cache in place.

    The same as `register()` and `model.set_attn_implementation("keyspan")`, then `replace_linears(model)`; and each
    `DynamicCache` that the model is called with, also by `generate`, appends in place as a `GrowingCache` does. For
    inference and training; results are equal but for rounding.

        model = keyspan.interop.transformers.use_keyspan(AutoModelForCausalLM.from_pretrained(name))

    Args:
        model: a model of transformers, or a module that holds some. It is changed.

    Returns:
        The same model.

    Raises:
        ValueError: where there is no model of transformers.
    """
    register()
    for outer in outermost(model):
        outer.set_attn_implementation(NAME)
        if not hasattr(outer, _HOOKED):
            setattr(outer, _HOOKED, True)
            outer.register_forward_pre_hook(_grow_caches, with_kwargs=True)
    return replace_linears(model)


def outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module, without those inside others."""
    check_type("model", model, nn.Module)
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not models:
        raise ValueError(f"model: got {type(model).__name__}, want a model of transformers, or a module that holds one")
    inner = {id(child) for m in models for child in m.modules() if child is not m}
    return [m for m in models if id(m) not in inner]


def _grow_caches(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    cache = kwargs.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, DynamicCache):
        grow_in_place(cache)
