"""Padded batches, computed without their padding: hooks on a model's layers pack and unpack the real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from keyspan.core.checks import check_type
from keyspan.interop.transformers.linears import Model, replace_linears
from keyspan.interop.transformers.masks import PACKINGS, Packing
from keyspan.interop.transformers.model import outermost
from keyspan.interop.transformers.registry import NAME, register

_UNPADDED = "_keyspan_unpadded"
"""Attribute of modules that `unpadded` has put hooks on."""


def unpadded(model: Model) -> Model:
    """Let a model compute its layers on the real tokens of a padded batch only; results at these tokens are equal.

    The model is called as before, with `input_ids` and `attention_mask` padded left or right. Before its first layer
    the real tokens are packed into one row; behind its last layer they are put back, with zeros at the padding.
    Embeddings, poolers and heads see the padded batch. Inference and training. For encoders (BERT, RoBERTa,
    ModernBERT, …), and for decoders without a cache (`use_cache=False`); where a layer is given a cache, the batch
    stays padded. So does a batch whose mask has holes.

        model = keyspan.interop.transformers.unpadded(AutoModel.from_pretrained(name))
        states = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state

    Args:
        model: a model of transformers, or a module that holds some (sentence-transformers). It is changed: attention is
            set to `"keyspan"`, hooks are put on its layers, and their linear layers are those of `replace_linears`.

    Returns:
        The same model.

    Raises:
        ValueError: where the model has no stack of layers; in a call, for `output_hidden_states=True`.
    """
    check_type("model", model, nn.Module)
    register()
    stacks = [
        stack
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and stack and all(isinstance(x, GradientCheckpointingLayer) for x in stack)
    ]
    if not stacks:
        raise ValueError(f"model: got {type(model).__name__}, want a transformers model with a stack of layers")
    for outer in outermost(model):
        outer.set_attn_implementation(NAME)
    for stack in stacks:
        if hasattr(stack[0], _UNPADDED):
            continue
        replace_linears(stack)
        for layer in stack:
            setattr(layer, _UNPADDED, True)
            layer.register_forward_pre_hook(_pack_all if layer is stack[0] else _pack_rest, with_kwargs=True)
        stack[-1].register_forward_hook(_unpack, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not hasattr(module, _UNPADDED):
            setattr(module, _UNPADDED, True)
            module.register_forward_pre_hook(_refuse_hidden_states, with_kwargs=True)
    return model


_packed_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tensor that layers are given beside the hidden states -> (rows of the packing, its packed form for all layers)."""
_unpackings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask of packed tokens -> the Packing that it was made with."""


def _refuse_hidden_states(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(model.config, "output_hidden_states", False)
    if wanted:
        raise ValueError(
            "output_hidden_states: got True, want False: between layers an unpadded model has packed states"
        )


def _pack_all(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the first layer: pack the hidden states and what comes with them."""
    packing = _packing_of(args, kwargs)
    if packing is None:
        return None
    states = args[0] if args else kwargs["hidden_states"]
    args, kwargs = _packed_arguments(args, kwargs, packing)
    states = _rows(states, packing)
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})


def _pack_rest(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the other layers, whose hidden states are packed already."""
    packing = _packing_of(args, kwargs)
    return None if packing is None else _packed_arguments(args, kwargs, packing)


def _packing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packing | None:
    """The packing that a layer's mask belongs to; None where the layer must see the batch as it is."""
    if kwargs.get("past_key_values") is not None:
        return None
    found = (PACKINGS.get(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.int32)
    return next((packing for packing in found if packing is not None), None)


def _packed_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], packing: Packing
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments but for the hidden states, which come first."""
    others = {name: x if name == "hidden_states" else _packed(x, packing) for name, x in kwargs.items()}
    return (*args[:1], *(_packed(x, packing) for x in args[1:])), others


def _packed(x: Any, packing: Packing) -> Any:
    """The mask, positions or rotary tables with the real tokens packed; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(_packed(part, packing) for part in x)
    if not isinstance(x, Tensor):
        return x
    is_mask = PACKINGS.get(x) is not None
    B, M = packing.shape
    if not is_mask and (x.dim() < 2 or x.shape[1] != M or x.shape[0] not in (1, B)):
        return x
    known = None if x.requires_grad else _packed_forms.get(x)
    if known is not None and known[0] is packing.rows:
        return known[1]
    packed = _packed_ranges(x, packing) if is_mask else _rows(x, packing)
    if not x.requires_grad:
        _packed_forms[x] = (packing.rows, packed)
    return packed


def _rows(x: Tensor, packing: Packing) -> Tensor:
    """`[B or 1, M, …]` to `[1, T, …]`."""
    B, M = packing.shape
    if x.shape[0] == B:
        return x.flatten(0, 1)[packing.rows][None]
    return x[:, packing.rows % M]


def _packed_ranges(mask: Tensor, packing: Packing) -> Tensor:
    """The real tokens' ranges, counted among the real tokens: one row's keys stay side by side."""
    rows = mask[:, 0].flatten(0, 1)[packing.rows]
    S = mask.shape[-1] // 2 * 2
    packed = torch.cat([rows[:, :S] + packing.shift[:, None], rows[:, S:]], -1)[None, None]
    _unpackings[packed] = packing
    return packed


def _unpack(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the last layer: put the real tokens back to where they were, zeros elsewhere."""
    found = (_unpackings.get(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    packing = next((packing for packing in found if packing is not None), None)
    if packing is None:
        return None
    states = output[0] if isinstance(output, tuple) else output
    B, M = packing.shape
    padded = states.new_zeros(B * M, *states.shape[2:]).index_copy(0, packing.rows, states[0]).unflatten(0, (B, M))
    return (padded, *output[1:]) if isinstance(output, tuple) else padded
