"""The top level of the xFormers package: version and flags. `compat/xformers` re-exports it."""

from __future__ import annotations

from importlib.util import find_spec

__version__ = "0.0.35+keyspan"
"""The version of xFormers with this API."""

_has_cpp_library = True
"""Callers check this before they use attention, which keyspan always has."""


def _is_triton_available() -> bool:
    """Whether Triton is installed and torch sees a GPU."""
    import torch

    return torch.cuda.is_available() and find_spec("triton") is not None
