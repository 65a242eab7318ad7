"""Attention for diffusers: `use_keyspan(model)`, or its two halves, a backend and an attention processor.

diffusers computes attention in two ways. Newer transformers (Flux, Wan, …) call a backend by its name; names are a
closed list, so Keyspan takes the place of the backend `native`. UNets, autoencoders and DiT have a processor object on
each attention layer; Keyspan has one of its own. Needs `diffusers` 0.42 (`pip install keyspan[diffusers]`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from keyspan.core.checks import check_type
from keyspan.core.masks import Causal, Mask
from keyspan.dispatch.api import attention
from keyspan.layers.multihead_attention import padding_mask

Model = TypeVar("Model", bound=nn.Module)
_NATIVE = AttentionBackendName.NATIVE
_native: Callable[..., Any] = attention_dispatch._native_attention


def use_keyspan(model: Model) -> Model:
    """Send all attention of a model through Keyspan.

    Puts `KeyspanAttnProcessor` on the layers that have diffusers' standard processor, and calls `install()` where the
    model has layers that call a backend, which then holds for all models of the process.

    Args:
        model: a model of diffusers, or a module that holds some. It is changed.

    Returns:
        The same model.

    Raises:
        ValueError: where a layer has another processor; `keyspan.interop.torch.replace_sdpa` reaches those as well.
    """
    check_type("model", model, nn.Module)
    layers = [m for m in model.modules() if isinstance(m, (Attention, AttentionModuleMixin))]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without attention layers, want a model of diffusers")
    by_backend = [layer for layer in layers if hasattr(layer.processor, "_attention_backend")]
    known = (AttnProcessor, AttnProcessor2_0, KeyspanAttnProcessor)
    others = [layer for layer in layers if layer not in by_backend]
    for layer in others:
        if not isinstance(layer.processor, known):
            raise ValueError(
                f"model: got the processor {type(layer.processor).__name__}, want AttnProcessor2_0 or one that calls a "
                "backend; run the model inside keyspan.interop.torch.replace_sdpa()"
            )
    for layer in others:
        layer.set_processor(KeyspanAttnProcessor())
    if by_backend:
        install()
    return model


def install() -> None:
    """Let the backend `native`, the default, be computed by Keyspan, in all models, until `uninstall()`."""
    _register(_attend)


def uninstall() -> None:
    """Let the backend `native` be torch's again."""
    _register(_native)


def _register(function: Callable[..., Any]) -> None:
    constraints = _AttentionBackendRegistry._constraints[_NATIVE]
    _AttentionBackendRegistry.register(_NATIVE, constraints=constraints, supports_context_parallel=True)(function)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """The backend: query `[B, M, Hq, K]`, key and value `[B, N, H, ·]`, mask `[B, N]`, `[M, N]` or 4-D."""
    if return_lse or _parallel_config is not None:
        return _native(
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _parallel_config)
        )
    mask: Mask | Tensor | None = Causal() if is_causal else None
    bias = None
    if attn_mask is not None:
        of_keys = tuple(attn_mask.shape) == (query.shape[0], key.shape[1])
        if attn_mask.is_floating_point():
            bias = attn_mask[:, None, None] if of_keys else attn_mask
        else:
            mask = padding_mask(attn_mask) if of_keys else attn_mask
    return attention(query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p)


class KeyspanAttnProcessor:
    """Computes a `diffusers.models.attention_processor.Attention` layer: self- and cross-attention, masks, norms.

    unet.set_attn_processor(KeyspanAttnProcessor())
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output, in the shape of its input.

        Args:
            attn: the layer, whose projections and norms are used.
            hidden_states: `[B, M, C]`, or an image `[B, C, height, width]`.
            encoder_hidden_states: `[B, N, C']` for cross-attention.
            attention_mask: added to the scores: `[B, 1, N]` or `[B, M, N]`.
            temb: what a spatial norm is conditioned on.
            kwargs: must be empty, as diffusers warns about what a processor does not name.
        """
        if kwargs:
            raise ValueError(f"{next(iter(kwargs))}: got a value, want none: KeyspanAttnProcessor has no such argument")
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        tokens = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q = attn.to_q(tokens).unflatten(-1, (attn.heads, -1))
        k, v = (project(context).unflatten(-1, (-1, q.shape[-1])) for project in (attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        bias = None
        if attention_mask is not None:
            B, N = k.shape[:2]
            if attention_mask.shape[-1] != N:
                attention_mask = attn.prepare_attention_mask(attention_mask, N, B)
            heads = attention_mask.shape[0] // B  # 1, or all of them once diffusers has prepared the mask
            bias = attention_mask.reshape(B, heads, -1, N).to(q.dtype)
        out = attention(q, k, v, bias=bias, scale=attn.scale).flatten(2).to(q.dtype)

        for layer in attn.to_out:
            out = layer(out)
        if x.dim() == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor  # type: ignore[no-any-return]
