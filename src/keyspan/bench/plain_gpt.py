"""The GPT of `keyspan.models.gpt` written in plain torch, with its weights' names: what a user would train instead.

Letters: B rows, M tokens a row, D width, K head dim, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyspan.models.gpt import GPTConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q `[B, heads, M, K]` over k and v `[B, kv_heads, M, K]`, to `[B, heads, M, K]`."""


class _Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        B, M, _ = x.shape
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).view(B, M, sum(heads), self.head_dim).split(heads, 2)
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, turn), _rotate(k, turn), v))
        y: Tensor = self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return y


class _MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.w3 = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        y: Tensor = self.w3(F.silu(a) * b)
        return y


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = _Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, attend)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class PlainGPT(nn.Module):
    """A GPT in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings.

    It loads the state dict of a `keyspan.models.gpt.GPT` with `positions="rope"` and tied embeddings.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.theta, self.head_dim = config.rope_theta, config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Summed cross-entropy of tokens, targets and positions, int64 `[B, M]`; target −100 does not count."""
        pair = torch.arange(0, self.head_dim, 2, device=tokens.device).float()
        angle = positions[..., None, None].float() * self.theta ** (-pair / self.head_dim)
        turn = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turn, attend)
        logits = F.linear(self.norm(x), self.embedding.weight).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x `[B, M, heads, K]`."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
