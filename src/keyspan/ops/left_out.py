"""Names of xFormers that are left out: access raises an error with the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_SPARSE = "2:4 sparsity is a matter of NVIDIA's sparse tensor cores; see torch.sparse.to_sparse_semi_structured"
_GONE = "xFormers itself has removed it; pass op=None"

LEFT_OUT = {
    "sparsify24": _SPARSE,
    "sparsify24_like": _SPARSE,
    "sparsify24_ste": _SPARSE,
    "Sparse24Tensor": _SPARSE,
    "sp24": _SPARSE,
    "ipc": "it shares memory between processes over NVLink; see torch.distributed._symmetric_memory",
    "AttentionOpDispatch": _GONE,
    "MemoryEfficientAttentionTritonFwdFlashBwOp": _GONE,
    "TritonFlashAttentionOp": _GONE,
    "decoder": _GONE,
    "small_k": _GONE,
    "triton": _GONE,
    "profiler": "use torch.profiler",
    "sparse": "use a mask of keyspan, which skips what it hides, or torch.sparse",
    "components": "xFormers itself has removed most of it",
    "fwbw_overlap": "it schedules NVIDIA streams",
}
"""Name to reason."""


def refuse(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__`, which raises AttributeError (so `hasattr` is False) with the reason.

    `from package import name` drops the message of an AttributeError, so an import gets an ImportError.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in LEFT_OUT:
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
        why = f"{module}.{name} is left out of keyspan: {LEFT_OUT[name]}"
        if sys._getframe(1).f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
            raise ImportError(why, name=f"{module}.{name}")
        raise AttributeError(why, name=name)

    return __getattr__
