"""Models built from the layers and `keyspan.attention`. They know nothing about training or text."""

from keyspan.models.gpt import GPT, GPTConfig, alibi_slopes

__all__ = ["GPT", "GPTConfig", "alibi_slopes"]
