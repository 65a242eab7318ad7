"""Text from models: an engine over a paged key/value cache, sampling, the simple loop; and embeddings of texts."""

from keyspan.inference.cache import KVCache
from keyspan.inference.embedding import Embedder, load_embedder
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
    "Embedder",
    "load_embedder",
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
