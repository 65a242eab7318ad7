"""Models built from the layers and `keyspan.attention`: tokens in, hidden states, logits or loss out."""

from keyspan.models.gpt import GPT, GPTConfig, alibi_slopes

__all__ = ["GPT", "GPTConfig", "alibi_slopes"]
