"""Keyspan: exact attention in linear memory. The names most people need; nothing happens at import."""

from importlib import import_module
from types import ModuleType

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

_SUBPACKAGES = ("bench", "inference", "interop", "layers", "models", "ops", "parallel", "testing", "training")


def __getattr__(name: str) -> ModuleType:
    """`keyspan.layers` and the other subpackages, imported on first use."""
    if name in _SUBPACKAGES:
        return import_module(f"keyspan.{name}")
    raise AttributeError(f"module 'keyspan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
