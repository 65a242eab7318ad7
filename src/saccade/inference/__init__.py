"""Text from models: a key/value cache, sampling, generation. Knows nothing about tokenizers or training."""

from saccade.inference.cache import KVCache
from saccade.inference.generate import generate, stream
from saccade.inference.sampling import probabilities, sample

__all__ = ["generate", "stream", "sample", "probabilities", "KVCache"]
