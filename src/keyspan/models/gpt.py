"""A decoder-only transformer on packed documents.

Pre-norm blocks (RMSNorm), grouped-query attention, SwiGLU, no biases; positions by RoPE, ALiBi or none at all.
Letters: T packed tokens, D width, H query heads, G key/value heads, K head dim, C vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from keyspan import Alibi, Causal, Documents, KeyRanges, attention
from keyspan.layers import Linear, RMSNorm, SwiGLU, linear, linear_cross_entropy, rotary_table, rotate_qkv
from keyspan.layers.gemm import gemm_dtype

Positions = Literal["rope", "alibi", "none"]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises ValueError for one that cannot be built."""

    vocab_size: int
    dim: int
    """Width of the residual stream; a multiple of `heads`."""
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads; divides `heads`. None: as many as query heads."""
    hidden: int | None = None
    """Width of the SwiGLU. None: 8/3 of `dim` (as many weights as a plain layer of 4 * dim), up to a multiple of 64."""
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embeddings."""
    dropout: float = 0.0
    """Probability of dropping attention weights, outputs of attention and SwiGLU, and embeddings, in training."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "hidden"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}, want an int ≥ 1")
        if self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}, want a multiple of heads = {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads: got {self.kv_heads}, want a divisor of heads = {self.heads}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions: got {self.positions!r}, want one of {', '.join(get_args(Positions))}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"dim: got {self.dim} / heads = {self.head_dim} per head, want an even number for rope")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, want a probability in [0, 1)")
        for name in ("rope_theta", "norm_eps", "embedding_std"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: got {getattr(self, name)}, want a positive number")
        # Defaults that depend on other fields are filled in, so that a saved configuration is complete.
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "hidden", self.hidden or -(-8 * self.dim // 3 // 64) * 64)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Cache(Protocol):
    """What the model asks of a key/value cache; `keyspan.inference.KVCache` is one."""

    def extend(self, lengths: list[int] | Tensor, tokens: int, device: torch.device) -> KeyRanges:
        """Makes room for new tokens, so many per sequence; returns what each may see among the keys of `append`."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values [1, T, G, K]; returns all of them, [1, N, G, K]."""


class Step(NamedTuple):
    """What all layers of one forward pass share."""

    mask: KeyRanges
    turn: tuple[Tensor, Tensor] | None
    """RoPE's cosines and sines."""
    bias: Alibi | None
    cache: Cache | None
    backend: str | None


class Attention(nn.Module):
    """Causal self-attention with grouped queries: x [T, D] -> [T, D]."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_heads is not None
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = [config.heads, config.kv_heads, config.kv_heads]  # of query, key, value
        self.dropout = config.dropout
        self.qkv = Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        qkv = self.qkv(x)
        if step.turn is None:
            q, k, v = qkv.view(1, x.shape[0], sum(self.heads), self.head_dim).split(self.heads, dim=2)
        else:
            q, k, v = rotate_qkv(qkv, step.turn, self.heads)  # [1, T, H, K], [1, T, G, K], [1, T, G, K]
        if step.cache is not None:
            k, v = step.cache.append(self.layer, k, v)
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=step.mask, bias=step.bias, dropout_p=dropout_p, backend=step.backend)
        y: Tensor = self.out(out.reshape(x.shape))
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)): x [T, D] -> [T, D]."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        assert config.hidden is not None
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        dtype = gemm_dtype(x)  # of what the linear layers round their input to
        h = self.dropout(self.attention(self.attention_norm(x, dtype), step))
        h, x = self.mlp_norm.add(x, h, dtype)
        y: Tensor = x + self.dropout(self.mlp(h))
        return y


class GPT(nn.Module):
    """The whole model, from tokens to hidden states, logits or loss.

    Args:
        config: its shape.
        backend: the attention backend of every layer; None chooses (see `keyspan.attention`). May be set later.
    """

    slopes: Tensor

    def __init__(self, config: GPTConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.positions == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.heads), persistent=False)
        initialize(self)

    def forward(self, tokens: Tensor, lengths: list[int] | Tensor, *, cache: Cache | None = None) -> Tensor:
        """Hidden states [T, D] of packed documents, none of which sees another.

        Args:
            tokens: int64 [T], the documents one after the other, no padding.
            lengths: tokens per document, a list of int or an int tensor [documents]. A list must add up to T; a
                tensor (which is not read on the host) may add up to less, then the rows behind mean nothing.
            cache: keys and values of the tokens before; then document b continues the cache's sequence b.

        Raises ValueError for tokens of another shape or dtype, and for lengths that do not fit.
        """
        if tokens.ndim != 1 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens: got {tokens.dtype} of shape {list(tokens.shape)}, want torch.int64 [T]")
        step = self._step(tokens, lengths, cache)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, step)
        hidden: Tensor = self.norm(x)
        return hidden

    def _step(self, tokens: Tensor, lengths: list[int] | Tensor, cache: Cache | None) -> Step:
        T = tokens.shape[0]
        if cache is None:
            mask = (Documents(lengths) & Causal()).lower(1, T, T, tokens.device)
        else:
            mask = cache.extend(lengths, T, tokens.device)
        turn = bias = None
        if self.config.positions == "rope":
            # A causal row sees its document from the first key (lo) to the one beside it (diagonal).
            positions = (mask.diagonal - mask.lo)[0, 0]
            turn = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        elif self.config.positions == "alibi":
            bias = Alibi(self.slopes)
        return Step(mask, turn, bias, cache, self.backend)

    @property
    def head_weight(self) -> Tensor:
        """The output layer [C, D]: the embedding where tied."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., C], in autocast's dtype where autocast is on."""
        return linear(hidden, self.head_weight)

    def loss(self, tokens: Tensor, targets: Tensor, lengths: list[int] | Tensor, *, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy in nats (fp32 scalar) of targets int64 [T] given tokens [T]; see `forward`.

        Targets equal to `ignore_index` do not count. The logits [T, C] are never held as a whole.
        """
        hidden = self(tokens, lengths)
        return linear_cross_entropy(hidden, self.head_weight, targets, ignore_index=ignore_index)

    def num_parameters(self) -> int:
        """How many numbers are learned; shared ones count once."""
        return sum(p.numel() for p in self.parameters())


def initialize(model: GPT) -> None:
    """Every initial value of a GPT, drawn from torch's generator.

    Norms: 1. Matrices: normal. As in GPT-2 (Radford et al., 2019), the two that write to the residual stream in
    each block are smaller by sqrt(2 * layers), so that the stream's variance does not grow with depth.
    The standard deviation is sqrt(2 / (5 * dim)) ("small init", Nguyen and Salazar, 2019): GPT-2's 0.02 at a width
    of 1000, and more for narrow models, whose signals 0.02 would make vanish. Embeddings have `embedding_std`, 0.02
    by default: the first norm rescales them, and with tied weights small logits make the first loss that of a uniform
    guess. At 0.02 the first block's output (about 0.2) outweighs the embeddings in the residual stream until training
    has made them grow; with a larger value the second block sees the tokens from the start. An untied output layer has
    0.02.
    """
    std = math.sqrt(2 / (5 * model.config.dim))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            nn.init.ones_(p)
        elif name == "embedding.weight":
            nn.init.normal_(p, std=model.config.embedding_std)
        elif name == "head.weight":
            nn.init.normal_(p, std=0.02)
        elif name.endswith(("attention.out.weight", "mlp.w3.weight")):
            nn.init.normal_(p, std=std / math.sqrt(2 * model.config.layers))
        else:
            nn.init.normal_(p, std=std)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes, fp32 [heads] (Press et al., "Train Short, Test Long", 2021).

    For n heads, n a power of two, head h (from 1) has 2 ** (-8 h / n). For other counts: the slopes of the next
    smaller power of two n, then every second one of those of 2 n, from the first.
    """
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    between = [2 ** (-8 * h / (2 * n)) for h in range(1, 2 * n + 1, 2)]
    return torch.tensor(slopes + between[: heads - n])
