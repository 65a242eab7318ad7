"""Models built from the layers and `keyspan.attention`: tokens in, hidden states, logits or loss out."""

from keyspan.models.checkpoints import load, save
from keyspan.models.encoder import Encoder, EncoderConfig, load_encoder
from keyspan.models.gpt import GPT, GPTConfig, RopeScaling, alibi_slopes

__all__ = [
    "GPT",
    "GPTConfig",
    "RopeScaling",
    "alibi_slopes",
    "load",
    "save",
    "Encoder",
    "EncoderConfig",
    "load_encoder",
]
