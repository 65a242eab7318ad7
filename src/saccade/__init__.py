"""Saccade: exact attention in linear memory. The names most people need; nothing happens at import."""

from saccade.backends import BACKENDS
from saccade.core.api import attention
from saccade.core.biases import Alibi, RelativeBias
from saccade.core.masks import (
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
from saccade.core.merge import merge
from saccade.core.quantize import quantize
from saccade.core.ranges import KeyRanges
from saccade.info import explain

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
