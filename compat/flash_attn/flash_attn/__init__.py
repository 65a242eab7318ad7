"""A stand-in for flash-attn: its functions are those of `keyspan.interop.flash_attn`. Holds no code of its own."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from keyspan.interop.flash_attn import (
    bert_padding,
    cute,
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

from .version import __version__

_here = Path(__file__).resolve()
for _entry in sys.path:
    _spec = PathFinder.find_spec("flash_attn", [_entry])
    if _spec is None or _spec.origin is None:
        continue
    _other = Path(_spec.origin).resolve()
    if _other != _here and _other.read_bytes() != _here.read_bytes():
        raise ImportError(
            f"this is keyspan's stand-in for flash-attn, and there is a real one in {_other.parent}: "
            "it does not shadow it; uninstall one of the two (pip uninstall flash-attn)"
        )

sys.modules[f"{__name__}.bert_padding"] = bert_padding
sys.modules[f"{__name__}.cute"] = cute
sys.modules[f"{__name__}.cute.interface"] = cute.interface
sys.modules[f"{__name__}.flash_attn_interface"] = flash_attn_interface

__all__ = [
    "__version__",
    "bert_padding",
    "cute",
    "flash_attn_interface",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
