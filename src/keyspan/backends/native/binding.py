"""The compiled library: where it is, what this machine can run of it, and its calls. Knows no attention problem.

The library has a plain C interface (native/params.h) and is loaded with ctypes, so that one build serves every torch
and every Python. Loaded when this module is first imported, which is when a backend is first chosen.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
"""Instruction sets, least first; each is a build of the same source."""

# The fields of `Params` and `Dense` in native/params.h, in their order.
ADDRESSES = struct.Struct("=27q")
"""Those of `Params` up to `threads`; the other ones are the same wherever tensors lie."""
NUMBERS = struct.Struct("=38q 3d")
DENSE = struct.Struct("=14q")

_HERE = Path(__file__).parent
_WHY_NOT_BUILT = _HERE / "not_built.txt"
"""Written when the package is installed and the library cannot be compiled."""


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found = sorted(_HERE.glob("libkeyspan.*"))
    if not found:
        return None, (
            _WHY_NOT_BUILT.read_text().strip()
            if _WHY_NOT_BUILT.exists()
            else "the native library was not built: install keyspan with pip"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        sizes = library.keyspan_params_size(), library.keyspan_dense_size()
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded: {error}"
    if sizes != (ADDRESSES.size + NUMBERS.size, DENSE.size):
        return None, "the native library was built from another version of keyspan: install keyspan again"
    for name in ("forward", "backward", "backward_chunks", "supports"):
        getattr(library, f"keyspan_{name}").restype = ctypes.c_int64
    library.keyspan_supports.argtypes = [ctypes.c_int64]
    library.keyspan_threading.restype = ctypes.c_char_p
    return library, None


LIBRARY, WHY_ABSENT = _load()
FORWARD: Any = getattr(LIBRARY, "keyspan_forward", None)
BACKWARD: Any = getattr(LIBRARY, "keyspan_backward", None)
SUPPORTED = tuple(isa for number, isa in enumerate(ISAS) if LIBRARY is not None and LIBRARY.keyspan_supports(number))
"""Those of `ISAS` that this machine runs."""

_isa = len(SUPPORTED) - 1 if SUPPORTED else 0


def isa_number() -> int:
    """The number of the instruction set in use."""
    return _isa


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Inside, the native backend uses this instruction set instead of the best one that the machine has.

    Args:
        isa: one of `ISAS`.

    Raises:
        ValueError: for an unknown instruction set, or one that this machine does not run.
    """
    global _isa  # noqa: PLW0603
    if isa not in SUPPORTED:
        raise ValueError(f"isa: got {isa!r}, want one that this machine runs: {', '.join(SUPPORTED) or 'none'}")
    before, _isa = _isa, ISAS.index(isa)
    try:
        yield
    finally:
        _isa = before


def threading() -> str:
    """How the library runs its threads, and which OpenMP runtimes the process holds: more than one may contend."""
    if LIBRARY is None:
        return "none"
    name: str = LIBRARY.keyspan_threading().decode()
    maps = Path("/proc/self/maps")
    if name != "OpenMP" or not maps.exists():
        return name
    loaded = {line.split("/")[-1] for line in maps.read_text().splitlines() if "omp" in line.split("/")[-1]}
    runtimes = sorted(x for x in loaded if x.startswith(("libgomp", "libomp", "libiomp")))
    return f"OpenMP ({', '.join(runtimes)})"
