"""A decoder-only transformer on packed documents; its configuration covers the dense families of Hugging Face.

Pre-norm blocks (RMSNorm), grouped-query attention, a gated feed-forward layer; positions by RoPE, ALiBi or none at all.
`keyspan.models.checkpoints` loads Llama, Mistral, Qwen, Gemma and GPT-OSS weights into it.
Letters: T packed tokens, D width, H query heads, G key/value heads, K head dim, C vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from keyspan import Alibi, Causal, Documents, KeyRanges, Window, attention
from keyspan.core.checks import check_fields, check_index, check_int, check_type
from keyspan.core.masks import Layout, Mask
from keyspan.layers import (
    GeGLU,
    Linear,
    RMSNorm,
    SwiGLU,
    linear,
    linear_cross_entropy,
    norm_linear,
    rotary_table,
    rotate_qkv,
)  # fmt: skip
from keyspan.layers.gated import Activation
from keyspan.layers.gemm import PackedWeight, gemm_dtype
from keyspan.models.experts import Experts
from keyspan.parallel import Context, ContextMask, context_attention

Positions = Literal["rope", "alibi", "none"]


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's angles are changed so that a model reads longer texts than it was trained on first."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all angles are divided by `factor` (Chen et al., 2023). llama3: those of low frequencies (Llama 3.1).
    yarn: those of low frequencies, less and less from pair to pair (Peng et al., 2023)."""
    factor: float
    original_length: int = 8192
    """llama3, yarn: tokens of the first training; a frequency is judged by its turns in so many."""
    low_turns: float = 1.0
    """llama3, yarn: angles of fewer turns are divided by `factor`; between `low_turns` and `high_turns` in part."""
    high_turns: float = 4.0
    whole: bool = True
    """yarn: whether the pairs between which angles change in part are rounded outwards to whole ones."""
    magnitude: float = 1.0
    """yarn: factor on cosines and sines; a score has its square."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"kind: got {self.kind!r}, want 'linear', 'llama3' or 'yarn'")
        if not self.factor > 0 or self.original_length < 1 or not 0 < self.low_turns < self.high_turns:
            raise ValueError(
                f"rope_scaling: got {self}, want factor > 0, original_length ≥ 1, 0 < low_turns < high_turns"
            )
        if not 0 < self.magnitude < math.inf:
            raise ValueError(f"magnitude: got {self.magnitude}, want a positive number")

    def frequencies(self, frequencies: Tensor, theta: float) -> Tensor:
        """Radians per token of each pair, `theta ** (-pair / pairs)`, scaled."""
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            turns = self.original_length * frequencies / (2 * math.pi)
            kept = ((turns - self.low_turns) / (self.high_turns - self.low_turns)).clamp(0, 1)
        else:
            pairs = len(frequencies)
            first, last = (
                pairs * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)
                for turns in (self.high_turns, self.low_turns)
            )
            if self.whole:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * pairs - 1)
            pair = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device)
            kept = 1 - ((pair - first) / (last - first or 1e-3)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises ValueError for one that cannot be built."""

    vocab_size: int
    dim: int
    """Width of the residual stream; a multiple of `heads` where `head_dim` is 0."""
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int = 0
    """Key and value heads; divides `heads`. 0: as many as query heads."""
    hidden: int = 0
    """Width of the SwiGLU. 0: 8/3 of `dim` (as many weights as a plain layer of 4 * dim), up to a multiple of 64."""
    head_dim: int = 0
    """0: dim / heads."""
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None
    """Most tokens of a text that the model was trained to read, with RoPE's scaling; an engine refuses longer requests
    unless told otherwise. None: unknown."""
    windows: tuple[int | None, ...] | None = None
    """Sliding windows: per layer, how many tokens a token sees, itself included, or None for all. None: no windows."""
    local_rope_theta: float | None = None
    """`rope_theta` of the layers with a window, without scaling (Gemma 3); None: as the others."""
    activation: Activation = "silu"
    """Of the gated feed-forward layer: silu (SwiGLU), or gelu_tanh (Gemma)."""
    qkv_bias: bool = False
    """Whether query, key and value have biases (Qwen 2)."""
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether each query and key head is normed before RoPE (Qwen 3, Gemma 3)."""
    post_norms: bool = False
    """Whether outputs of attention and feed-forward layers are normed too (Gemma 2 and 3)."""
    sinks: bool = False
    """Whether each query head has a learned sink (GPT-OSS)."""
    experts: int = 0
    """Feed-forward layers are mixtures of so many experts, each `hidden` wide (GPT-OSS); 0: no mixture."""
    experts_per_token: int = 0
    expert_limit: float = 7.0
    """Bound on the halves of an expert's gated layer; `expert_alpha` is the factor in its sigmoid."""
    expert_alpha: float = 1.702
    attention_scale: float | None = None
    """Factor on query · key; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    """Factor on embeddings (Gemma: sqrt(dim))."""
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embeddings."""
    dropout: float = 0.0
    """Probability of dropping attention weights, outputs of attention and SwiGLU, and embeddings, in training."""

    def __post_init__(self) -> None:
        check_fields(self)
        least_one = ("vocab_size", "dim", "layers", "heads")
        for name in (*least_one, "kv_heads", "hidden", "head_dim", "experts", "experts_per_token"):
            check_int(name, getattr(self, name), int(name in least_one))
        if not self.head_dim and self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}, want a multiple of heads = {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads: got {self.kv_heads}, want a divisor of heads = {self.heads}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions: got {self.positions!r}, want one of {', '.join(get_args(Positions))}")
        head_dim = self.head_dim or self.dim // self.heads
        if self.positions == "rope" and head_dim % 2:
            raise ValueError(f"dim: got {self.dim} / heads = {head_dim} per head, want an even number for rope")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation: got {self.activation!r}, want one of {', '.join(get_args(Activation))}")
        if self.windows is not None and (
            len(self.windows) != self.layers or any(w is not None and w < 1 for w in self.windows)
        ):
            raise ValueError(f"windows: got {self.windows}, want {self.layers} of None or an int ≥ 1, one a layer")
        if self.max_positions is not None and not (type(self.max_positions) is int and self.max_positions >= 1):
            raise ValueError(f"max_positions: got {self.max_positions!r}, want an int ≥ 1 or None")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token: got {self.experts_per_token}, want 1 … experts = {self.experts}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, want a probability in [0, 1)")
        for name in ("rope_theta", "norm_eps", "embedding_std", "embedding_scale", "expert_limit", "expert_alpha"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: got {getattr(self, name)}, want a positive number")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta: got {self.rope_theta}, want more than 1 with yarn")
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, want a positive number or None")
        # Defaults that depend on other fields are filled in, so that a saved configuration is complete.
        object.__setattr__(self, "head_dim", head_dim)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "hidden", self.hidden or -(-8 * self.dim // 3 // 64) * 64)

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees; None: all."""
        return None if self.windows is None else self.windows[layer]


class Stored(NamedTuple):
    """All keys and values of a layer, as `attention` takes them."""

    key: Tensor
    """[1, N, G, K]"""
    value: Tensor
    key_scale: Tensor | None = None
    """fp32 [1, N, G], where they are stored in 8 bits."""
    value_scale: Tensor | None = None


class Cache(Protocol):
    """What the model asks of a key/value cache; `keyspan.inference.KVCache` is one."""

    def extend(self, lengths: list[int] | Tensor, tokens: int, device: torch.device) -> None:
        """Makes room for new tokens, so many per sequence."""

    def layout(self, window: int | None) -> tuple[Layout, int]:
        """Where the keys of layers with this window lie after `extend`, and how many slots there are."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> Stored:
        """Stores a layer's new keys and values [1, T, G, K]; returns all of them."""


class Step(NamedTuple):
    """What all layers of one forward pass share."""

    masks: dict[int | None, KeyRanges | ContextMask]
    """By window."""
    turns: dict[int | None, tuple[Tensor, Tensor]] | None
    """RoPE's cosines and sines, by window."""
    bias: Alibi | None
    cache: Cache | None
    backend: str | None
    invariant: bool


class Attention(nn.Module):
    """Causal self-attention with grouped queries: x [T, D] -> [T, D]."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window(layer)
        self.head_dim = config.head_dim
        self.heads = [config.heads, config.kv_heads, config.kv_heads]  # of query, key, value
        self.dropout = config.dropout
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.qkv = Linear(config.dim, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.dim, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(config.heads)) if config.sinks else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.attend(self.qkv(x), step)

    def attend(self, qkv: Tensor, step: Step) -> Tensor:
        """The result, given the projection of x to query, key and value heads [T, (H + 2 G) · K]."""
        q, k, v = self._heads(qkv, None if step.turns is None else step.turns[self.window])
        options: dict[str, Any] = {}
        if step.cache is not None:
            k, v, key_scale, value_scale = step.cache.append(self.layer, k, v)
            if key_scale is not None:
                options = {"key_scale": key_scale, "value_scale": value_scale}
        mask = step.masks[self.window]
        if not isinstance(mask, ContextMask):
            options["invariant"] = step.invariant
        attend: Callable[..., Tensor] = context_attention if isinstance(mask, ContextMask) else attention
        out = attend(
            q, k, v, mask=mask, bias=step.bias, scale=self.scale, softcap=self.softcap,
            sinks=self.sinks, dropout_p=self.dropout if self.training else 0.0, backend=step.backend, **options,
        )  # fmt: skip
        y: Tensor = self.out(out.reshape(qkv.shape[0], -1))
        return y

    def _heads(self, qkv: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """[1, T, H, K], [1, T, G, K], [1, T, G, K] of the projection [T, (H + 2 G) · K]."""
        if self.q_norm is None and turn is not None:
            return rotate_qkv(qkv, turn, self.heads)
        q, k, v = qkv.view(1, len(qkv), sum(self.heads), self.head_dim).split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if turn is not None:
                q, k = (rotate_qkv(x.reshape(x.shape[1], -1), turn, (x.shape[2], 0, 0))[0] for x in (q, k))
        return q, k, v


def _feed_forward(c: GPTConfig) -> SwiGLU | Experts:
    if c.experts:
        return Experts(c.dim, c.hidden, c.experts, c.experts_per_token, c.expert_limit, c.expert_alpha)
    return (SwiGLU if c.activation == "silu" else GeGLU)(c.dim, c.hidden, bias=c.mlp_bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), of x [T, D].

    Each sum is computed by the norm that reads it: a block takes and returns x and what is still to be added to it.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = _feed_forward(config)
        self.attention_post_norm = RMSNorm(config.dim, config.norm_eps) if config.post_norms else nn.Identity()
        self.mlp_post_norm = RMSNorm(config.dim, config.norm_eps) if config.post_norms else nn.Identity()
        self.dropout = _dropout(config)

    def forward(self, x: Tensor, more: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        dtype = gemm_dtype(x)  # of what the linear layers round their input to
        if _watched(self.attention):
            h, x = self.attention_norm.of_sum(x, more, dtype)
            h = self.attention(h, step)
        else:
            qkv, x = norm_linear(x, more, self.attention_norm, self.attention.qkv)
            h = self.attention.attend(qkv, step)
        more = self.dropout(self.attention_post_norm(h))
        if isinstance(self.mlp, SwiGLU) and not _watched(self.mlp):
            h, x = self.mlp.of_norm(x, more, self.mlp_norm)
        else:
            h, x = self.mlp_norm.add(x, more, dtype)
            h = self.mlp(h)
        return x, self.dropout(self.mlp_post_norm(h))


def _dropout(config: GPTConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()  # of nothing, it is a copy when compiled


def _watched(module: nn.Module) -> bool:
    """Whether hooks see what the module takes or returns."""
    return any((module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks))


class GPT(nn.Module):
    """The whole model, from tokens to hidden states, logits or loss.

    Args:
        config: its shape.
        backend: the attention backend of every layer; None chooses (see `keyspan.attention`). May be set later.
        invariant: on a GPU, too, the bits of a token's results depend on its document and the weights alone, not on the
            pack, the chunk, the batch or the cache: in training, evaluation and generation they are the same. Slower
            kernels compute attention and products there, `torch.compile` leaves the model as it is, and gradients are
            those of other kernels. On a CPU it changes nothing. May be set later, before an `Engine` is made of it.
            See the guide "One numerics".
    """

    slopes: Tensor

    def __init__(self, config: GPTConfig, backend: str | None = None, invariant: bool = False) -> None:
        check_type("config", config, GPTConfig)
        super().__init__()
        self.config = config
        self.backend = backend
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = _dropout(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self._packed_head: PackedWeight | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.positions == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.heads), persistent=False)
        self.invariant = invariant
        initialize(self)

    @property
    def invariant(self) -> bool:
        """See the class."""
        return self._invariant

    @invariant.setter
    def invariant(self, value: bool) -> None:
        self._invariant = value
        for module in self.modules():
            if isinstance(module, (Linear, Experts)):
                module.invariant = value

    def forward(
        self,
        tokens: Tensor,
        lengths: list[int] | Tensor,
        *,
        cache: Cache | None = None,
        context: Context | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of packed documents, none of which sees another.

        Args:
            tokens: int64 [T], the documents one after the other, no padding.
            lengths: tokens per document, a list of int or an int tensor [documents]. A list must add up to T; a
                tensor may add up to less, then the rows behind mean nothing. A tensor on a GPU is not read by the host.
                One in pinned memory is copied to a GPU without waiting, and tells the choice of a backward kernel, also
                in a compiled model, how many keys rows see.
            cache: keys and values of the tokens before; then document b continues the cache's sequence b.
            context: where ranks share the documents; then tokens are this rank's rows, and lengths those of all. Every
                rank of the group calls the model, forward and backward.
            dtype: of the hidden states; None for that of the residual stream, which is the weights'. What multiplies
                them next may ask for its own at once.

        Raises ValueError for tokens of another shape or dtype, for lengths that do not fit, and where the model is
        `invariant` and cannot be: with a context, for fp64, and without the kernels (see `keyspan.layers.linear`).
        """
        if self.invariant and torch.compiler.is_compiling():
            found: Tensor = _uncompiled(self, tokens, lengths, cache=cache, context=context, dtype=dtype)
            return found
        if self.invariant and context is not None:
            raise ValueError(
                "context: got one with invariant = True, want None: what ranks share is summed in their order"
            )
        check_index("tokens", tokens, self.config.vocab_size, self.embedding.weight.device, (torch.int64,))
        if context is not None:
            check_type("context", context, Context)
        if cache is not None and not (hasattr(cache, "extend") and hasattr(cache, "layout")):
            raise ValueError(f"cache: got {type(cache).__name__}, want one as keyspan.inference.KVCache")
        step = self._step(tokens, lengths, cache, context)
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(
                self.config.embedding_scale, dtype=x.dtype
            )  # rounded to the weights' dtype, as Gemma's
        x = self.dropout(x)
        more = None
        for block in self.blocks:
            x, more = block(x, more, step)
        return self.norm.of_sum(x, more, dtype)[0]

    def _step(
        self, tokens: Tensor, lengths: list[int] | Tensor, cache: Cache | None, context: Context | None = None
    ) -> Step:
        T, config = tokens.shape[0], self.config
        windows = {None, *(config.windows or ())}
        masks: dict[int | None, KeyRanges | ContextMask] = {}
        if cache is not None:
            cache.extend(lengths, T, tokens.device)
        for window in windows:
            layout: Mask
            if cache is None:
                layout, N = Documents(lengths) & Causal(), T
            else:
                keys, N = cache.layout(window)
                layout = keys & Causal("bottom_right")
            mask = layout if window is None else layout & Window(left=window - 1)
            masks[window] = mask.lower(1, T, N, tokens.device) if context is None else context.cut(mask, tokens.device)
        turns = None
        if config.positions == "rope":
            # A causal row sees its document from the first key (lo) to the one beside it (diagonal).
            whole = masks[None]
            rows = whole.ranges if isinstance(whole, ContextMask) else whole
            positions = (rows.diagonal - rows.lo)[0, 0]
            whole_turn = self.turn(positions, None)
            local = whole_turn if config.local_rope_theta is None else self.turn(positions, 1)
            turns = {window: whole_turn if window is None else local for window in masks}
        return Step(masks, turns, self.bias, cache, self.backend, self.invariant)

    @property
    def bias(self) -> Alibi | None:
        """What all layers add to scores."""
        return Alibi(self.slopes) if self.config.positions == "alibi" else None

    def turn(self, positions: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines at these positions for layers with this window, see `rotary_table`."""
        c, theta, scaling = self.config, self.config.rope_theta, self.config.rope_scaling
        if window is not None and c.local_rope_theta is not None:
            theta, scaling = c.local_rope_theta, None
        if scaling is None:
            return rotary_table(positions, c.head_dim, theta)
        cosine, sine = rotary_table(positions, c.head_dim, theta, lambda x: scaling.frequencies(x, theta))
        return (cosine, sine) if scaling.magnitude == 1 else (cosine * scaling.magnitude, sine * scaling.magnitude)

    @property
    def head_weight(self) -> Tensor:
        """The output layer [C, D]: the embedding where tied."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., C], in autocast's dtype where autocast is on."""
        head = self._packed_head if self.config.tie_embeddings else self.head.packed
        z = linear(hidden, self.head_weight, invariant=self.invariant) if head is None else head.multiply(hidden)
        cap = self.config.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        lengths: list[int] | Tensor,
        *,
        ignore_index: int = -100,
        context: Context | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats (fp32 scalar) of targets int64 [T] given tokens [T]; see `forward`.

        Targets equal to `ignore_index` do not count. The logits [T, C] are never held as a whole.
        """
        hidden = self(tokens, lengths, context=context, dtype=gemm_dtype(self.embedding.weight))
        softcap = self.config.logit_softcap
        return linear_cross_entropy(
            hidden, self.head_weight, targets, ignore_index=ignore_index, softcap=softcap, invariant=self.invariant
        )

    def pack(self, int8: bool = False) -> None:
        """Copy the weights of all products into the order in which the native library reads them, for inference.

        Products take half of the time for few tokens, or less, and have the same bits. The plain weights are given up,
        but for an embedding that is the output layer too; the model can be neither trained nor saved then.

        Args:
            int8: whether to round the weights to 8 bits, with a scale for each output.

        Raises ValueError where a weight cannot be packed: off the CPU, in fp64, without the native library.
        """
        reason = self.reason_against_packing(int8)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        for layer in layers:
            layer.pack(int8)
        if self.config.tie_embeddings:
            self._packed_head = PackedWeight(self.embedding.weight, int8)

    def reason_against_packing(self, int8: bool = False) -> str | None:
        """Why `pack` would refuse, or None."""
        weights = [module.weight for module in self.modules() if isinstance(module, Linear)]
        reasons = (PackedWeight.reason_against(weight, int8) for weight in [self.embedding.weight, *weights])
        return next((reason for reason in reasons if reason is not None), None)

    def num_parameters(self) -> int:
        """How many numbers are learned; shared ones count once. A packed weight counts as before."""
        packed = [m.packed for m in self.modules() if isinstance(m, Linear) and m.packed is not None]
        return sum(p.numel() for p in self.parameters()) + sum(w.inputs * w.outputs for w in packed)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(model: GPT, *args: Any, **options: Any) -> Tensor:
    """The model as it is written: a compiler chooses kernels by how many rows there are."""
    hidden: Tensor = model(*args, **options)
    return hidden


def initialize(model: GPT) -> None:
    """Every initial value of a GPT, drawn from torch's generator.

    Norms: 1. Biases and sinks: 0. Matrices: normal. As in GPT-2 (Radford et al., 2019), the two that write to the
    residual stream in each block are smaller by sqrt(2 * layers), so that its variance does not grow with depth.
    The standard deviation is sqrt(2 / (5 * dim)) ("small init", Nguyen and Salazar, 2019): GPT-2's 0.02 at a width
    of 1000, and more for narrow models, whose signals 0.02 would make vanish. Embeddings have `embedding_std`, 0.02
    by default: the first norm rescales them, and with tied weights small logits make the first loss that of a uniform
    guess. At 0.02 the first block's output (about 0.2) outweighs the embeddings in the residual stream until training
    has made them grow; with a larger value the second block sees the tokens from the start. An untied output layer has
    0.02.
    """
    std = math.sqrt(2 / (5 * model.config.dim))
    for name, p in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            nn.init.zeros_(p)
        elif p.ndim < 2:
            nn.init.ones_(p)
        elif name == "embedding.weight":
            nn.init.normal_(p, std=model.config.embedding_std)
        elif name == "head.weight":
            nn.init.normal_(p, std=0.02)
        elif name.endswith(("attention.out.weight", "mlp.w3.weight", "mlp.w3")):
            nn.init.normal_(p, std=std / math.sqrt(2 * model.config.layers))
        else:
            nn.init.normal_(p, std=std)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes, fp32 [heads] (Press et al., "Train Short, Test Long", 2021).

    For n heads, n a power of two, head h (from 1) has 2 ** (-8 h / n). For other counts: the slopes of the next
    smaller power of two n, then every second one of those of 2 n, from the first.
    """
    check_int("heads", heads, bits=31)
    n = 1 << (int(heads).bit_length() - 1)
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    between = [2 ** (-8 * h / (2 * n)) for h in range(1, 2 * n + 1, 2)]
    return torch.tensor(slopes + between[: heads - n])
