"""Tile sizes, warps and stages by kernel, element size, head dimension and architecture. Knows no problem and no launch.

The table is plain data, filled by benchmarks/gpu_tune.py; nothing is tuned at run time.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Query rows × keys of a tile, and how it is run."""

    BM: int
    BN: int
    warps: int
    stages: int


KERNELS = ("forward", "decode", "keys", "queries", "bias", "table")
"""`forward` and `decode` are one kernel; `decode` has few rows, which are then heads of one query."""

FAMILIES = ("hopper", "blackwell", "ampere", "small", "amd")
"""By what a program may hold: hopper sm_90 and blackwell sm_100 (227 KiB), ampere sm_80 (163 KiB), small sm_86, sm_89
and sm_120 (99 KiB), amd (64 KiB)."""


def family(capability: tuple[int, int], amd: bool = False) -> str:
    """The family of an architecture, e.g. of `torch.cuda.get_device_capability()`."""
    if amd:
        return "amd"
    if capability[0] == 9:
        return "hopper"
    if capability[0] in (10, 11):
        return "blackwell"
    return "ampere" if capability == (8, 0) else "small"


# Of 16-bit elements, by family and kernel: the tile for head dimensions up to 64, 128 and 256.
_HALF: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "hopper": {
        "forward": (Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        "keys": (Tile(32, 128, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        "queries": (Tile(64, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    },
    "blackwell": {
        "forward": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        "keys": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(64, 64, 8, 1)),
        "queries": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
    },
    "ampere": {
        "forward": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
        "keys": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
        "queries": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 1)),
    },
    "small": {
        "forward": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        "keys": (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
        "queries": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    },
    "amd": {
        "forward": (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(64, 32, 4, 1)),
        "keys": (Tile(64, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
        "queries": (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    },
}

# Of fp32 elements, whose products run on the plain cores: one table for all.
_SINGLE: dict[str, tuple[Tile, Tile, Tile]] = {
    "forward": (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 1)),
    "keys": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    "queries": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
}

# Where every score reads something (a bias, a table, a dense mask), which the compiler stages in shared memory too.
_LOADS: dict[str, tuple[Tile, Tile, Tile]] = {
    "forward": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    "keys": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(32, 64, 8, 1)),
    "queries": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
}

# The rare kernels: small tiles everywhere.
_RARE = (Tile(64, 64, 4, 1), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1))


def tile(kernel: str, itemsize: int, head_dim: int, family: str, loads: bool = False) -> Tile:
    """The tile of a kernel for the larger of the two head dimensions; `loads` where every score reads a bias or mask."""
    column = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if kernel == "decode":
        stages = 1 if family == "amd" else 3 if head_dim <= 128 and itemsize == 2 else 2
        return Tile(16, 64 if itemsize == 2 and head_dim <= 128 else 32, 4, stages)
    if kernel in ("bias", "table"):
        return _RARE[column] if itemsize == 2 else _RARE[2]
    if itemsize == 4:
        return _SINGLE[kernel][column]
    return (_LOADS if loads and family in ("hopper", "blackwell") else _HALF[family])[kernel][column]
