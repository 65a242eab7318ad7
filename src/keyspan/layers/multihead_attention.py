"""Multi-head attention with the parameters, arguments and state dict of `nn.MultiheadAttention`, by Keyspan."""

from __future__ import annotations

from contextlib import suppress
from functools import reduce
from operator import and_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyspan.core.biases import Bias
from keyspan.core.checks import check_factory, check_int, check_tensor, check_type, readable
from keyspan.core.masks import Causal, Dense, KeyLengths, Layout, Mask, as_mask
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import attention
from keyspan.layers.gemm import gemm_dtype


def padding_mask(visible: Tensor) -> Mask:
    """A padding mask `[B, N]`, true = a key, as key ranges where it can be read and each row's keys are one run.

    Ranges skip the padding; the bool tensor that is the mask otherwise does not.
    """
    if readable(visible):
        with suppress(ValueError):
            return KeyLengths.from_padding_mask(visible)
    return Dense(visible[:, None, None])


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` (Vaswani et al. 2017) in linear memory: same constructor, parameters and state dict.

    It is a subclass, so it goes wherever the original goes, `nn.TransformerEncoderLayer.self_attn` included.
    Attention weights are never made: `forward` returns `(output, None)` and refuses `need_weights=True`, which is
    why its default is False here.

        layer = keyspan.layers.MultiheadAttention(256, 8, batch_first=True)
        layer.load_state_dict(old.state_dict())
        y, _ = layer(x, x, x, mask=Documents(lengths) & Causal())
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if name in ("embed_dim", "num_heads") or size is not None:
                check_int(name, size)
        check_factory(device, dtype)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: got {embed_dim}, want a multiple of num_heads = {num_heads}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | KeyRanges | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of `query` over `key` and `value`.

        Args:
            query: `[M, B, E]`, with `batch_first` `[B, M, E]`, or `[M, E]` without a batch.
            key: the same with N and `kdim`.
            value: the same with N and `vdim`.
            key_padding_mask: torch's meaning: bool `[B, N]` (`[N]` without a batch), true = **hidden**; floating values
                are added to the scores.
            need_weights: must be False.
            attn_mask: torch's meaning: bool `[M, N]` or `[B · heads, M, N]`, true = **hidden**; floating values are
                added to the scores, with a gradient where they require one.
            average_attn_weights: of no effect, as no weights are returned.
            is_causal: query i sees keys up to i (top-left). An `attn_mask` given as well is taken to say the same, as
                in torch, and is not read.
            mask: a mask of Keyspan over the batch, true = visible.
            bias: added to the scores: `Alibi`, `RelativeBias` or a tensor broadcastable to `[B, heads, M, N]`.

        Returns:
            `[M, B, E]`, `[B, M, E]` or `[M, E]` as query; and `None` for the weights.

        Raises:
            ValueError: for `need_weights=True`, and for shapes that do not fit.
        """
        if need_weights:
            raise ValueError(
                "need_weights: got True, want False: the weights are never made (nn.MultiheadAttention does)"
            )
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            check_tensor(name, x, self.out_proj.weight)
            if gemm_dtype(x) != gemm_dtype(self.out_proj.weight):
                raise ValueError(f"{name}: got {x.dtype}, want {self.out_proj.weight.dtype}, of this layer")
            if x.shape[-1] != width:
                raise ValueError(f"{name}: got shape {list(x.shape)}, want a last size of {width}, of this layer")
        for name, scores in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if scores is not None:
                check_type(name, scores, Tensor)
        if bias is not None:
            check_type("bias", bias, Bias, Tensor)
        if query.dim() not in (2, 3) or {key.dim(), value.dim()} != {query.dim()}:
            shapes = [list(x.shape) for x in (query, key, value)]
            raise ValueError(f"query, key, value: got shapes {shapes}, want three of [tokens, B, E] or of [tokens, E]")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        B, N = key.shape[:2]

        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._projected(query, key, value))
        # A mask has one layout, so padding beside another one stays a bool tensor.
        alone = mask is None or (isinstance(mask, Mask) and not any(isinstance(part, Layout) for part in mask.parts))
        visible, added = self._scores(key_padding_mask, None if is_causal else attn_mask, B, N, alone)
        parts = [*([Causal()] if is_causal else []), *visible]
        if isinstance(mask, KeyRanges) and parts:
            raise ValueError("mask: got KeyRanges beside another mask, want a mask that is not lowered yet")
        whole = mask
        if parts:
            given = [] if mask is None or isinstance(mask, KeyRanges) else [as_mask(mask)]
            whole = reduce(and_, [*given, *parts])
        for term in added:
            bias = term if bias is None else bias + term
        if self.bias_k is not None or self.add_zero_attn:
            k, v, whole, bias = self._with_added_keys(k, v, whole, bias, q.shape[1])

        dropout_p = self.dropout if self.training else 0.0
        out = self.out_proj(attention(q, k, v, mask=whole, bias=bias, dropout_p=dropout_p).flatten(2))
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _scores(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, B: int, N: int, ranges: bool
    ) -> tuple[list[Mask], list[Tensor]]:
        """What torch's two masks hide, and what they add, broadcastable to `[B, heads, M, N]`."""
        visible: list[Mask] = []
        added = []
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (B, N):
                raise ValueError(f"key_padding_mask: got shape {list(key_padding_mask.shape)}, want [{B}, {N}]")
            if key_padding_mask.dtype != torch.bool:
                added.append(key_padding_mask[:, None, None])
            elif ranges:
                visible.append(padding_mask(~key_padding_mask))
            else:
                visible.append(Dense(~key_padding_mask[:, None, None]))
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                if attn_mask.shape[0] != B * self.num_heads:
                    want = f"[{B} · {self.num_heads}, M, N]"
                    raise ValueError(f"attn_mask: got shape {list(attn_mask.shape)}, want {want} or [M, N]")
                attn_mask = attn_mask.unflatten(0, (B, self.num_heads))
            if attn_mask.dtype == torch.bool:
                visible.append(Dense(~attn_mask))
            else:
                added.append(attn_mask)
        return visible, added

    def _with_added_keys(
        self, k: Tensor, v: Tensor, mask: Mask | KeyRanges | Tensor | None, bias: Bias | Tensor | None, M: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values and scores with the learned key (`add_bias_kv`) and the zero key behind; all rows see both."""
        B, N = k.shape[:2]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.view(1, 1, *k.shape[2:]).expand(B, -1, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.view(1, 1, *v.shape[2:]).expand(B, -1, -1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(B, 1, *x.shape[2:])], 1) for x in (k, v))
        more = k.shape[1] - N
        if isinstance(bias, Bias):
            raise ValueError(
                f"bias: got {type(bias).__name__} with add_bias_kv or add_zero_attn, want a tensor or None"
            )
        if isinstance(mask, (Mask, KeyRanges)):
            ranges = mask if isinstance(mask, KeyRanges) else mask.lower(B, M, N, k.device)
            mask = ranges.materialize(N)
            mask = mask if mask.dim() == 4 else mask[:, None]
        if mask is not None:
            mask = F.pad(mask.expand(*mask.shape[:-1], N), (0, more), value=True)
        if bias is not None:
            bias = F.pad(bias.expand(*bias.shape[:-1], N), (0, more))
        return k, v, mask, bias
