"""Tile sizes, warps and stages by kernel, element size, head dimension and architecture. Knows no problem and no launch.

The table is plain data; nothing is tuned at run time. What it says of `hopper` was the fastest on an H200 or an H100
among what benchmarks/tune_triton.py tries; the other families were only compiled.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Query rows × keys of a tile, and how it is run."""

    BM: int
    BN: int
    warps: int
    stages: int


KERNELS = ("forward", "decode", "keys", "keys alone", "values alone", "queries", "bias", "table")
"""`forward` and `decode` are one kernel; `decode` has few rows, which are then heads of one query. So are `keys` and
those alone, which make one of the two gradients; see `apart`."""

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


Row = tuple[Tile, Tile, Tile]
"""The tiles for head dimensions up to 64, 128 and 256."""

# Of 16-bit elements, by family and kernel.
_HALF: dict[str, dict[str, Row]] = {
    "hopper": {
        "forward": (Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        "keys": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        "queries": (Tile(64, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 3)),
        "table": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1)),
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

# Where two accumulators of keys are too much for the registers: on hopper, of wide heads.
_ALONE = {"keys alone": Tile(64, 64, 4, 2), "values alone": Tile(64, 128, 8, 2)}

# The same on hopper where ALiBi or a table takes registers, and where every score reads something: a bias, a dense mask.
_HOPPER_TERMS: dict[str, dict[str, Row]] = {
    "positions": {
        "forward": (Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        "keys": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    },
    "loads": {
        "forward": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
        "keys": (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 2)),
        "queries": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    },
}

# Of keys and values of 8 bits, on hopper; `stored` where the query has 16. Chosen by what they compile to, not measured.
_HOPPER_EIGHT: dict[str, dict[str, Row]] = {
    "plain": {"forward": (Tile(64, 128, 4, 3), Tile(64, 128, 4, 2), Tile(64, 64, 4, 2))},
    "stored": {"forward": (Tile(64, 128, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2))},
    "positions": {"forward": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))},
    "loads": {"forward": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))},
}

# Of fp32 elements; on hopper as tf32 products.
_SINGLE: dict[str, Row] = {
    "forward": (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 1)),
    "keys": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    "queries": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
}
_HOPPER_SINGLE: dict[str, Row] = {
    "forward": (Tile(128, 64, 8, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 1)),
    "queries": (Tile(128, 64, 8, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
}

# Gradients of biases and tables: small tiles everywhere.
_RARE: Row = (Tile(64, 64, 4, 1), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1))


def apart(itemsize: int, head_dim: int, family: str, terms: str = "plain") -> bool:
    """Whether the gradients of keys and of values are made by a launch each; arguments as of `tile`."""
    return family == "hopper" and itemsize == 2 and head_dim > 128 and terms != "loads"


def tile(kernel: str, itemsize: int, head_dim: int, family: str, terms: str = "plain") -> Tile:
    """The tile of a kernel for the larger of the two head dimensions.

    Args:
        itemsize: bytes of an element; of a query of 16 bits with keys of 8, that of keys.
        terms: `loads` where every score reads a bias or a dense mask; else `positions` where there is ALiBi or a table;
            else `stored` where keys have 8 bits and the query does not; else `plain`.
    """
    if kernel in _ALONE:
        return _ALONE[kernel]
    column = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if kernel == "decode":
        stages = 1 if family == "amd" else 3 if head_dim <= 128 and itemsize == 2 else 2
        keys = 128 if itemsize == 1 else 64 if itemsize == 2 else 32
        return Tile(16, keys if head_dim <= 128 else max(32, keys // 2), 4, stages)
    hopper = family == "hopper"
    tables: list[dict[str, Row]]
    if itemsize == 4:
        tables = [_HOPPER_SINGLE, _SINGLE] if hopper and terms != "loads" else [_SINGLE]
    elif itemsize == 1:
        tables = [_HOPPER_EIGHT[terms] if hopper else {}, _HALF[family]]
    else:
        tables = [_HOPPER_TERMS.get(terms, {}) if hopper else {}, _HALF[family]]
    for table in tables:
        if kernel in table:
            found = table[kernel][column]
            # What is read per score is staged as keys are; unstaged it fits beside them. On amd Triton 3.6 does not
            # compile the far walk of a table in two stages.
            return found if hopper or (terms != "loads" and family != "amd") else found._replace(stages=1)
    # Of fp32 elements only the smallest fits everywhere.
    return _RARE[column if itemsize <= 2 else 2]
