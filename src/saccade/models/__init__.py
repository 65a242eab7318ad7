"""Models built from the layers and `saccade.attention`. They know nothing about training or text."""

from saccade.models.gpt import GPT, GPTConfig, alibi_slopes

__all__ = ["GPT", "GPTConfig", "alibi_slopes"]
