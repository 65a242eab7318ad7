"""Text from models: an engine over a paged key/value cache, sampling, and the simple generation loop."""

from keyspan.inference.cache import KVCache
from keyspan.inference.engine import Answer, Engine, Event, QueueFullError
from keyspan.inference.generate import generate, stream
from keyspan.inference.pages import PagedCache
from keyspan.inference.sampling import Sampling, probabilities, sample
from keyspan.inference.tokenizer import ByteTokenizer, FolderTokenizer, GgufTokenizer

__all__ = [
    "Engine",
    "Sampling",
    "Event",
    "Answer",
    "QueueFullError",
    "PagedCache",
    "FolderTokenizer",
    "GgufTokenizer",
    "ByteTokenizer",
    "generate",
    "stream",
    "sample",
    "probabilities",
    "KVCache",
]
