"""Named shapes of real models, shared by benchmarks and tests. Knows nothing of either."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Heads of one attention layer: query heads, key/value heads, head dim."""

    heads: int
    kv_heads: int
    dim: int


SHAPES = {
    "gpt2": Shape(12, 12, 64),
    "llama3-8b": Shape(32, 8, 128),
    "qwen3-0.6b": Shape(16, 8, 128),
    "gemma2-2b": Shape(8, 4, 256),
    "t5-base": Shape(12, 12, 64),
    "dinov2-base": Shape(12, 12, 64),
    "minilm-l6": Shape(12, 12, 32),
    "small": Shape(8, 8, 64),
    "small-wide": Shape(4, 4, 128),
    "two-wide": Shape(2, 2, 128),
    "two": Shape(2, 2, 64),
    "one": Shape(1, 1, 64),
}
