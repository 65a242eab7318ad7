"""Generation from several prompts at once through a key/value cache. Works on token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from keyspan.core.checks import check_int, check_type
from keyspan.inference.cache import KVCache
from keyspan.inference.sampling import sample
from keyspan.models.gpt import GPT


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    *,
    top_k: int | None = None,
    stop: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[dict[int, int]]:
    """Yields, step by step, the new token of each prompt still running: {index of the prompt: token}.

    The arguments are those of `generate`; a stop token is not yielded, its prompt is merely absent from then on.
    """
    check_type("model", model, GPT)
    device = model.embedding.weight.device
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    if not all(isinstance(token, int) for token in stops):
        raise ValueError(f"stop: got {stop!r}, want a token or several")
    if generator is not None:
        check_type("generator", generator, torch.Generator)
    _check(model, prompts, max_tokens)
    cache = KVCache(len(prompts))
    running = list(range(len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    try:
        for _ in range(max_tokens):
            hidden = model(tokens, lengths, cache=cache)
            last = torch.tensor([lengths[b] for b in running], device=device).cumsum(0) - 1
            chosen: Tensor = sample(model.logits(hidden[last]), temperature, top_k, top_p, generator)
            found = dict(zip(running, chosen.tolist(), strict=True))
            running = [b for b in running if found[b] not in stops]
            if not running:
                return
            yield {b: found[b] for b in running}
            lengths = [int(b in running) for b in range(len(prompts))]
            tokens = torch.tensor([found[b] for b in running], dtype=torch.int64, device=device)
    finally:
        model.train(training)


def generate(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    *,
    top_k: int | None = None,
    stop: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continues each prompt; returns the new tokens of each, without the prompt and without the stop token.

    All prompts are read in one packed pass, then all that are still running advance by a token at a time, without
    padding. Autocast is the caller's choice. A model in training mode is put into evaluation mode meanwhile.

    Args:
        model: the model; it runs on the device of its weights.
        prompts: tokens of each prompt, at least one each.
        max_tokens: most new tokens per prompt.
        temperature, top_p, top_k: see `probabilities`; temperature 0 is greedy.
        stop: a token, or several, that end a sequence.
        generator: source of the draws, on the model's device; seed it to have the same text again.

    Raises ValueError for an empty prompt, a token outside the vocabulary, a negative max_tokens.
    """
    check_type("prompts", prompts, list, tuple)
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_tokens, temperature, top_p, top_k=top_k, stop=stop, generator=generator):
        for b, token in step.items():
            new[b].append(token)
    return new


def _check(model: GPT, prompts: list[list[int]], max_tokens: int) -> None:
    check_int("max_tokens", max_tokens, 0)
    check_type("prompts", prompts, list, tuple)
    if not all(isinstance(prompt, (list, tuple)) for prompt in prompts):
        raise ValueError(f"prompts: got {_shortened(prompts)}, want a list of tokens for each prompt")
    if not prompts:
        raise ValueError("prompts: got none, want at least one")
    for b, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts: got an empty prompt {b}, want at least one token in each")
        if not all(isinstance(token, int) for token in prompt):
            raise ValueError(f"prompts: got {_shortened(prompt)} as prompt {b}, want a list of int, the tokens")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(
                f"prompts: got tokens {min(prompt)} … {max(prompt)} in prompt {b}, "
                f"want 0 … {model.config.vocab_size - 1}"
            )


def _shortened(given: object) -> str:
    text = f"{type(given).__name__} {given!r}"
    return text if len(text) < 80 else text[:80] + "…"
