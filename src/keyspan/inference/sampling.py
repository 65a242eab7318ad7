"""The next token from logits: temperature, top-k, top-p, min-p, penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keyspan.core.checks import check_fields, check_int, check_number, check_tensor, check_type, is_a, readable
from keyspan.layers import log_softmax


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
    check_tensor("logits", logits)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, want a token at least in the last dimension")
    check_number("temperature", temperature)
    if top_k is not None:
        check_int("top_k", top_k)
    if top_p is not None and not (is_a(top_p, float) and 0 < top_p <= 1):
        raise ValueError(f"top_p: got {top_p}, want a number in (0, 1] (or None)")
    logits = logits.float()
    peak = logits.amax(-1, keepdim=True)
    if readable(peak) and not peak.isfinite().all():
        raise ValueError("logits: got a row whose largest is NaN or infinite, want a finite one")
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Less the maximum first, and divided by a number that fp32 holds: a small temperature must give no inf or NaN.
    tiny = torch.finfo(torch.float32).tiny
    logits = (logits - peak) / max(temperature, tiny)
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
    if generator is not None:
        check_type("generator", generator, torch.Generator)
    check_tensor("logits", logits)
    if logits.dim() > 2:
        raise ValueError(f"logits: got shape {list(logits.shape)}, want [B, C]")
    p = probabilities(logits, temperature, top_k, top_p)
    return p.argmax(-1) if temperature == 0 else torch.multinomial(p, 1, generator=generator).squeeze(-1)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen.

    Raises ValueError, in words, for a value out of range.
    """

    max_tokens: int = 128
    """Most new tokens."""
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens stay."""
    top_p: float | None = None
    """Only the likeliest tokens that first add up to so much stay."""
    min_p: float | None = None
    """Only tokens at least so many times as likely as the likeliest stay (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and answer are divided by it where positive, else multiplied (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer contains."""
    frequency_penalty: float = 0.0
    """Subtracted from them once for each time that the answer contains them."""
    seed: int | None = None
    """Of this request's draws; None draws one. The tokens do not depend on what else the engine runs."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, which does not include them."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's own."""
    ignore_end: bool = False
    """Whether the model's own end tokens do not end the answer."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside each token, with log-probabilities; None: not even its own."""

    def __post_init__(self) -> None:
        check_fields(self)
        limits = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or a positive number"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1 (or None)"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "a number in (0, 1] (or None)"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "a number in [0, 1] (or None)"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "a positive number"),
            "presence_penalty": (abs(self.presence_penalty) < float("inf"), "a finite number"),
            "frequency_penalty": (abs(self.frequency_penalty) < float("inf"), "a finite number"),
            "seed": (self.seed is None or abs(self.seed) < 2**64, "a number of at most 64 bits (or None)"),
            "stop": (isinstance(self.stop, tuple) and all(self.stop), "a tuple of texts that are not empty"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more (or None)"),
        }
        for name, (good, want) in limits.items():
            if not good:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want {want}")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the model's own logits is taken, so that rows can be chosen together."""
        return (
            self.temperature == 0
            and self.logprobs is None
            and self.repetition_penalty == 1
            and not self.presence_penalty
            and not self.frequency_penalty
        )


class Chosen(NamedTuple):
    """One token of an answer."""

    token: int
    logprob: float | None
    """Its log-probability under the model's own distribution, at temperature 1 and without penalties."""
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities."""


def choose(logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], draw: float) -> Chosen:
    """The next token of one request.

    Args:
        logits: [C], in the model's dtype.
        prompt, answer: the tokens so far, for the penalties.
        draw: a number in [0, 1), uniform. The token is where the distribution, laid out from the likeliest token on,
            first adds up to more: the choice depends on these arguments alone.

    Raises ValueError where the largest logit, with the penalties, is NaN or infinite.
    """
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs is not None:
        natural = log_softmax(logits)
        values, ids = natural.topk(min(sampling.logprobs, len(natural))) if sampling.logprobs else (natural[:0],) * 2
        likeliest = tuple(zip(ids.long().tolist(), values.tolist(), strict=True))
    changed = _penalized(logits.float(), sampling, prompt, answer)
    if sampling.temperature == 0:
        token = int(changed.argmax())
        if not changed[token].isfinite():
            raise ValueError("logits: got a row whose largest is NaN or infinite, want a finite one")
    else:
        p = probabilities(changed, sampling.temperature, sampling.top_k, sampling.top_p)
        if sampling.min_p:
            p = p.where(p >= sampling.min_p * p.max(), 0.0)
        ordered, order = p.double().sort(descending=True, stable=True)
        sums = ordered.cumsum(0)
        token = int(order[min(int((sums <= draw * sums[-1]).sum()), int((ordered > 0).sum()) - 1)])
    if sampling.logprobs is not None:
        logprob = float(natural[token])
    return Chosen(token, logprob, likeliest)


def _penalized(logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        z = logits[seen]
        logits = logits.index_copy(
            0, seen, torch.where(z > 0, z / sampling.repetition_penalty, z * sampling.repetition_penalty)
        )
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, times = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        less = sampling.presence_penalty + sampling.frequency_penalty * times
        logits = logits.index_add(0, seen, -less.to(logits.dtype))
    return logits
