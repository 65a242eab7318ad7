"""Keyspan: exact attention in linear memory. The names most people need; nothing happens at import."""

from keyspan.backends import BACKENDS
from keyspan.core.biases import Alibi, RelativeBias
from keyspan.core.masks import (
    Causal,
    Documents,
    GappyKeys,
    KeyLengths,
    PaddedKeys,
    PagedKeys,
    Prefix,
    SharedPrompt,
    Sinks,
    Window,
)
from keyspan.core.merge import merge
from keyspan.core.quantize import quantize
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import attention
from keyspan.info import explain

__version__ = "0.1.0"

__all__ = [
    "attention",
    "merge",
    "quantize",
    "explain",
    "Documents",
    "PaddedKeys",
    "GappyKeys",
    "PagedKeys",
    "KeyLengths",
    "SharedPrompt",
    "Causal",
    "Window",
    "Prefix",
    "Sinks",
    "Alibi",
    "RelativeBias",
    "KeyRanges",
    "BACKENDS",
    "__version__",
]
