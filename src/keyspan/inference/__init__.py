"""Text from models: a key/value cache, sampling, generation. Works on token ids."""

from keyspan.inference.cache import KVCache
from keyspan.inference.generate import generate, stream
from keyspan.inference.sampling import probabilities, sample

__all__ = ["generate", "stream", "sample", "probabilities", "KVCache"]
