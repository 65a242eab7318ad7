"""The top of the xFormers package: version and the flags that others ask for. `compat/xformers` re-exports this."""

from __future__ import annotations

from importlib.util import find_spec

__version__ = "0.0.35+keyspan"
"""The version of xFormers whose API this is."""

_has_cpp_library = True
"""Others ask this before they use attention; keyspan always can."""


def _is_triton_available() -> bool:
    """Whether Triton is installed and torch sees a GPU to use it on."""
    import torch

    return torch.cuda.is_available() and find_spec("triton") is not None
