"""Tile sizes, warps and stages by kernel, element size, head dimension and architecture, as a table.

Nothing is tuned at run time. The entries of `hopper` were the fastest on an H200 or an H100 among the candidates of
benchmarks/tune_triton.py; those of the other families were compiled, not timed.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class TileConfig(NamedTuple):
    """Shape of a tile of scores, and the launch options of the program that computes it."""

    BM: int
    """Query rows, times the heads that are packed."""
    BN: int
    """Keys."""
    warps: int
    stages: int
    registers: int = 0
    """Of a thread when the program starts, for kernels whose warps then divide them anew; 0: the compiler's choice."""
    fusion: bool = True
    """Whether the compiler may round a product and a sum once. It does so in some forms of a kernel and not in others."""

    def options(self) -> dict[str, Any]:
        """The launch options, as Triton names them."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers:
            found["maxnreg"] = self.registers
        if not self.fusion:
            found["enable_fp_fusion"] = False
        return found


SEGMENT = 1024
"""Keys after which sums of invariant results begin anew, which is where few rows are split: a multiple of every BN."""

KERNELS = ("forward", "invariant", "decode", "keys", "keys alone", "values alone", "queries", "bias", "table")
"""Entries of the table. `forward`, `invariant` and `decode` are one kernel: in `decode` the rows of a tile are heads of few
queries; `invariant` is one tile for many queries and few, as `forward` where it has no entry.
`keys`, `keys alone` and `values alone` are one kernel: the gradients of keys and values by one launch or two, see
`split_key_value`."""

FAMILIES = ("hopper", "blackwell", "ampere", "small", "amd")
"""Architectures by shared memory per program: hopper sm_90 and blackwell sm_100 (227 KiB), ampere sm_80 (163 KiB), small
sm_86, sm_89 and sm_120 (99 KiB), amd (64 KiB)."""


def family(capability: tuple[int, int], amd: bool = False) -> str:
    """The family of a compute capability, as `torch.cuda.get_device_capability()` gives it."""
    if amd:
        return "amd"
    if capability[0] == 9:
        return "hopper"
    if capability[0] in (10, 11):
        return "blackwell"
    return "ampere" if capability == (8, 0) else "small"


Row = tuple[TileConfig, TileConfig, TileConfig]
"""The tiles for head dimensions up to 64, 128 and 256."""

# 16-bit elements, by family and kernel.
_HALF: dict[str, dict[str, Row]] = {
    "hopper": {
        "forward": (TileConfig(64, 128, 4, 2), TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 3)),
        "keys": (TileConfig(128, 64, 4, 2), TileConfig(64, 64, 4, 2), TileConfig(64, 64, 8, 2)),
        "queries": (TileConfig(64, 128, 4, 3), TileConfig(128, 64, 8, 3), TileConfig(64, 32, 4, 3)),
        "table": (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2), TileConfig(32, 32, 4, 1)),
    },
    "blackwell": {
        "forward": (TileConfig(128, 128, 8, 3), TileConfig(128, 128, 8, 2), TileConfig(128, 64, 8, 2)),
        "keys": (TileConfig(64, 128, 8, 2), TileConfig(64, 128, 8, 1), TileConfig(64, 64, 8, 1)),
        "queries": (TileConfig(128, 64, 8, 2), TileConfig(128, 64, 8, 2), TileConfig(64, 64, 8, 1)),
    },
    "ampere": {
        "forward": (TileConfig(128, 64, 4, 3), TileConfig(128, 64, 8, 3), TileConfig(64, 64, 8, 2)),
        "keys": (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 8, 2), TileConfig(32, 64, 8, 1)),
        "queries": (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 8, 2), TileConfig(64, 32, 8, 1)),
    },
    "small": {
        "forward": (TileConfig(128, 64, 4, 2), TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 2)),
        "keys": (TileConfig(64, 64, 4, 2), TileConfig(32, 64, 4, 2), TileConfig(32, 32, 4, 1)),
        "queries": (TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 2), TileConfig(32, 32, 4, 1)),
    },
    "amd": {
        "forward": (TileConfig(128, 64, 4, 1), TileConfig(128, 64, 4, 1), TileConfig(64, 32, 4, 1)),
        "keys": (TileConfig(64, 64, 4, 1), TileConfig(32, 64, 4, 1), TileConfig(32, 32, 4, 1)),
        "queries": (TileConfig(64, 64, 4, 1), TileConfig(64, 32, 4, 1), TileConfig(32, 32, 4, 1)),
    },
}

# Two accumulators over keys need too many registers: hopper, heads wider than 128.
_ALONE = {"keys alone": TileConfig(64, 64, 4, 2), "values alone": TileConfig(64, 128, 8, 2)}

# 16-bit elements on hopper, where ALiBi or a table needs registers, and where every score loads a bias or a dense mask.
_HOPPER_TERMS: dict[str, dict[str, Row]] = {
    "positions": {
        "forward": (TileConfig(64, 128, 4, 3), TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 3)),
        "keys": (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2), TileConfig(64, 64, 8, 2)),
    },
    "loads": {
        "forward": (TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 3), TileConfig(64, 32, 4, 2)),
        "keys": (TileConfig(64, 64, 4, 3), TileConfig(32, 64, 4, 3), TileConfig(32, 64, 8, 2)),
        "queries": (TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 1)),
    },
}

# Invariant results of heads up to 64: with more registers there is room for two programs instead of three.
_HOPPER_INVARIANT = dict.fromkeys(("plain", "positions"), TileConfig(64, 64, 4, 3, registers=168))

# The weights of a table's ends are summed beside their gradients: registers of half a tile.
_HOPPER_TERMS["table"] = _HOPPER_TERMS["positions"] | {
    "queries": (TileConfig(64, 64, 4, 3), *_HALF["hopper"]["queries"][1:])
}

# 8-bit keys and values on hopper; `stored`: with a 16-bit query. Chosen by registers and spills, not timed.
_HOPPER_EIGHT: dict[str, dict[str, Row]] = {
    "plain": {"forward": (TileConfig(64, 128, 4, 3), TileConfig(64, 128, 4, 2), TileConfig(64, 64, 4, 2))},
    "stored": {"forward": (TileConfig(64, 128, 4, 2), TileConfig(128, 64, 8, 2), TileConfig(64, 32, 4, 2))},
    "positions": {"forward": (TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 2))},
    "loads": {"forward": (TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 2))},
}
_HOPPER_EIGHT["table"] = _HOPPER_EIGHT["positions"]

# fp32 elements; on hopper products are of tf32.
_SINGLE: dict[str, Row] = {
    "forward": (TileConfig(64, 32, 4, 2), TileConfig(32, 32, 4, 2), TileConfig(16, 32, 4, 1)),
    "keys": (TileConfig(32, 32, 4, 1), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "queries": (TileConfig(32, 32, 4, 1), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
}
_HOPPER_SINGLE: dict[str, Row] = {
    "forward": (TileConfig(128, 64, 8, 2), TileConfig(32, 32, 4, 2), TileConfig(16, 32, 4, 1)),
    "queries": (TileConfig(128, 64, 8, 2), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
}

# Gradients of biases and tables: one small tile for every family.
_BIAS_GRADIENT: Row = (TileConfig(64, 64, 4, 1), TileConfig(64, 64, 8, 1), TileConfig(32, 32, 4, 1))


def split_key_value(itemsize: int, head_dim: int, family: str, terms: str = "plain") -> bool:
    """Whether the gradients of keys and of values take a launch each; arguments as of `tile`."""
    return family == "hopper" and itemsize == 2 and head_dim > 128 and terms != "loads"


MOST_ROWS_OF_MMA = 32
"""Products of at most so many rows are mma, which reads shared memory by address; of more, on hopper, wgmma."""


def without_wgmma(kernel: str, tile: TileConfig) -> TileConfig:
    """The tile with so few rows that no product is wgmma."""
    rows, keys = min(tile.BM, MOST_ROWS_OF_MMA), min(tile.BN, MOST_ROWS_OF_MMA)
    if kernel in ("bias", "table"):
        return tile._replace(BM=rows, BN=keys)
    # The gradients of keys are products of transposed tiles.
    return tile._replace(BM=rows) if kernel in ("forward", "invariant", "decode", "queries") else tile._replace(BN=keys)


def tile(kernel: str, itemsize: int, head_dim: int, family: str, terms: str = "plain") -> TileConfig:
    """The tile of a kernel.

    Args:
        kernel: one of `KERNELS`.
        itemsize: bytes of an element; the keys' where they have 8 bits and the query has 16.
        head_dim: the larger of the two head dimensions.
        family: one of `FAMILIES`.
        terms: `loads` if every score loads a bias or a dense mask; else `table` with one; else `positions` with ALiBi;
            else `stored` if keys have 8 bits and the query does not; else `plain`.
    """
    if kernel in _ALONE:
        return _ALONE[kernel]
    column = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if kernel == "decode":
        stages = 1 if family == "amd" else 3 if head_dim <= 128 and itemsize == 2 else 2
        keys = 128 if itemsize == 1 else 64 if itemsize == 2 else 32
        return TileConfig(16, keys if head_dim <= 128 else max(32, keys // 2), 4, stages)
    hopper = family == "hopper"
    if kernel == "invariant":
        if hopper and itemsize == 2 and column == 0 and terms in _HOPPER_INVARIANT:
            return _HOPPER_INVARIANT[terms]
        kernel = "forward"
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
            # Pipelining would stage the loads of every score as well, more than fits; one stage fits. On amd Triton 3.6
            # does not compile the far walk of a table in two stages.
            return found if hopper or (terms != "loads" and family != "amd") else found._replace(stages=1)
    # With fp32 elements only the smallest tile fits everywhere.
    return _BIAS_GRADIENT[column if itemsize <= 2 else 2]
