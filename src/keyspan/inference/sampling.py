"""The next token from logits: temperature, top-k, top-p."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that `sample` draws from: logits [..., C] -> fp32 [..., C].

    temperature: logits are divided by it; 0 leaves the likeliest token alone (the first, where several are equal).
    top_k: only the k likeliest tokens stay. None: all.
    top_p: only the likeliest tokens whose probabilities first add up to top_p or more stay, at least one ("nucleus",
        Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019), counted after temperature and top_k.
        None or 1: all. Among equal tokens the earlier one is the likelier.
    Raises ValueError for a negative temperature, top_k below 1, top_p outside (0, 1].
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, want 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, want at least 1 (or None)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, want a number in (0, 1] (or None)")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Less the maximum first: a small temperature must not make the quotient infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p in (None, 1.0):
        return logits.softmax(-1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -torch.inf
    p = ordered.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p  # what the likelier tokens add up to
        p = p.where(before < top_p, 0.0)
        p /= p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, order, p)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row, drawn from `probabilities`: logits [B, C] -> int64 [B].

    generator: on the logits' device; the same seed gives the same tokens. Temperature 0 draws nothing from it.
    """
    p = probabilities(logits, temperature, top_k, top_p)
    return p.argmax(-1) if temperature == 0 else torch.multinomial(p, 1, generator=generator).squeeze(-1)
