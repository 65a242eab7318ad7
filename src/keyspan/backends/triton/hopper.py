"""Which passes the kernels for Hopper compute, and their launches. Imports Triton's Gluon for the first one that fits."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from keyspan.backends import Needs
from keyspan.core.problem import Problem

# By head dimension: fewest queries, fewest keys, and fewest tiles of queries for each multiprocessor. Below these the plain
# kernel was as fast on an H100, or faster.
_LEAST = {64: (512, 512, 1.9), 128: (512, 512, 1.2), 256: (256, 256, 1.2)}
_LEAST_DIM = 40
"""Head dimensions are padded to 64 and more."""
_CACHED_KEYS = 16 * 2**20
"""Bytes of keys and values that programs running at the same time should share; a third of an H100's L2. Four times as
many where rows have ranges over many keys, of which they are likely to see a part, and heads are of up to 128."""
_MANY_KEYS = 16384
_LEAST_FORWARD_ROW_KEYS = 256
"""Forward with heads of up to 64: fewest keys that rows see on average, see `KeyRanges.row_keys`."""
_LEAST_ROW_KEYS = 1024
"""The same of backward, where half of it is enough if query heads share a key head, and `_LEAST_UPWARD_KEYS` if blocks go
up."""
_MANY_ROW_KEYS = 4096
_SMALLEST = torch.finfo(torch.float32).tiny


def reason_against(problem: Problem) -> str | None:
    """Why the plain Triton kernel computes the forward pass of a problem, and not the kernel for Hopper."""
    query, value = problem.query, problem.value
    B, M, G, H, K = query.shape
    if not _runs_on(query.device):
        return "the device is not a GPU of compute capability 9.0 with a Triton whose Gluon has Hopper's instructions"
    reason = missing(problem)
    if reason is not None:
        return reason
    if min(K, value.shape[-1]) < _LEAST_DIM:
        return f"head dimensions are {K} and {value.shape[-1]}, want at least {_LEAST_DIM}"
    dim = _padded(max(K, value.shape[-1]))
    if dim == 64 and problem.lo is not None and problem.row_keys < _LEAST_FORWARD_ROW_KEYS:
        if not problem.row_keys:
            return "a mask whose lengths the host does not know may be short documents"
        least = _LEAST_FORWARD_ROW_KEYS
        return f"rows see {problem.row_keys} keys on average, want at least {least} with heads of up to 64"
    queries, keys, share = _LEAST[dim]
    if min(M - queries, value.shape[1] - keys) < 0:
        return f"there are {M} queries and {value.shape[1]} keys, want at least {queries} and {keys}"
    tiles, least = B * G * H * -(-M // tile(problem).BM), share * _processors(query.device.index)
    if tiles < least:
        return f"there are {tiles} tiles of queries, want at least {least:.0f}, {share} for each multiprocessor"
    return None


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _padded(dim: int) -> int:
    return max(64, 1 << (dim - 1).bit_length())


def missing(problem: Problem) -> str | None:
    """What of a problem the Hopper kernel does not have."""
    query, key, value = problem.query, problem.key, problem.value
    if query.dtype not in (torch.bfloat16, torch.float16) or key.dtype != query.dtype:
        return f"query is {query.dtype} and key {key.dtype}, want both bfloat16 or both float16"
    if problem.output_dtype != query.dtype:
        return f"output_dtype is {problem.output_dtype}, want {query.dtype} as query"
    for reason, found in (
        ("keys are paged", problem.block_table is not None),
        ("rows have more than three ranges", problem.lo is not None and problem.lo.shape[0] > 3),
        ("there is a dense mask", problem.dense is not None),
        ("there is a dense bias", bool(problem.biases)),
        ("there is dropout", problem.dropout_p > 0),
        ("results are to be invariant", problem.invariant),
        ("there are no keys", key.shape[1] == 0),
        ("TMA cannot read tensors of these strides", not all(map(_describable, (query, key, value)))),
        ("the relative table's last stride is not 1", problem.table is not None and problem.table.stride(-1) != 1),
    ):
        if found:
            return reason
    return None


_LEAST_BACKWARD = 1024
"""Fewest queries, and fewest keys; half of it where the host knows what rows see or, with heads wider than 64, they see all."""
_LEAST_BLOCKS = 6
"""Fewest blocks of keys for each multiprocessor: with fewer, blocks of one group wait for each other."""
_LEAST_MASKED_BLOCKS = 1.9
"""The same where rows have ranges and heads are wider than 64, however many query heads share a key head."""
_LEAST_UPWARD_KEYS = 256
"""Fewest keys that rows see on average for `backward_order` to go up; fewer were not timed."""
_LEAST_RUNS = 4
"""Fewest runs of groups for it where rows see half of all keys; fewer were not timed."""
_LEAST_WIDE_BLOCKS = 2
"""Fewest blocks of 64 keys, or of 64 queries, for each multiprocessor, with heads wider than 128."""


def backward_reason_against(problem: Problem, needs: Needs) -> str | None:
    """Why the plain Triton kernels compute the backward pass of a problem, and not the kernel for Hopper."""
    if not _runs_on(problem.query.device):
        return "the device is not a GPU of compute capability 9.0 with a Triton whose Gluon has Hopper's instructions"
    reason = backward_missing(problem, needs)
    if reason is not None:
        return reason
    dims = problem.query.shape[-1], problem.value.shape[-1]
    if min(dims) < _LEAST_DIM:
        return f"head dimensions are {dims[0]} and {dims[1]}, want at least {_LEAST_DIM}"
    B, M, G, H, _ = problem.query.shape
    N = problem.key.shape[1]
    tile = backward_tile(problem)
    known = problem.row_keys > 0 if problem.lo is not None else tile.BM == 64
    least = _LEAST_BACKWARD // (2 if known else 1)
    if min(M, N) < least:
        return f"there are {M} queries and {N} keys, want at least {least}"
    share = _LEAST_BLOCKS if problem.lo is None or tile.BM > 64 else _LEAST_MASKED_BLOCKS
    blocks, least = B * G * -(-N // tile.BN), share * _processors(problem.query.device.index)
    if blocks < least:
        return f"there are {blocks} blocks of keys, want at least {least:.0f}, {share} for each multiprocessor"
    if problem.lo is not None:
        # Rows see half of all keys where each batch entry is one causal sequence.
        short = H > 1 or (tile.BM == 64 and 2 * problem.row_keys >= N)
        keys, least = problem.row_keys, _LEAST_ROW_KEYS // (2 if short else 1)
        if backward_order(problem, tile)[1] > 0:
            least = _LEAST_UPWARD_KEYS
        if not keys and B == 1:
            return "one batch entry with a mask whose lengths the host does not know may be short documents"
        if 0 < keys < least:
            return f"rows see {keys} keys on average, want at least {least}"
    return None


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and _gluon(device.index)


@functools.cache
def _gluon(index: int) -> bool:
    # Compiled for any other architecture these kernels end the process.
    if torch.cuda.get_device_capability(index) != (9, 0):
        return False
    try:
        import triton
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def tile(problem: Problem) -> Any:
    """The tile of a problem, a `config.TileConfig`."""
    from keyspan.backends.triton.config import TileConfig

    dim = _padded(max(problem.query.shape[-1], problem.value.shape[-1]))
    if dim == 64:
        # Three consumers where rows see many keys; with few, what a tile costs beside its loop is shared by fewer.
        few = problem.lo is not None and problem.row_keys < _MANY_ROW_KEYS
        return TileConfig(128, 128, 4, 3, 168) if few else TileConfig(192, 128, 4, 3, 128)
    return TileConfig(128, 128 if dim == 128 else 64, 4, 2, 168)


def launch(
    problem: Problem, arguments: Any, tile: Any, out: Tensor, lse: Tensor, counters: Any, processors: int
) -> tuple[Any, tuple[int, ...], list[Any], Any]:
    """Kernel, grid, arguments and tile of the forward pass.

    Args:
        arguments: `arguments.Arguments` of the problem.
        counters: `relaunch.Counters`.
        processors: how many programs run at a time.
    """
    from keyspan.backends.triton.hopper_kernels import ROWS, Form, Scales, hopper_forward_kernel

    B, M, G, H, k_dim = problem.query.shape
    N, v_dim = problem.value.shape[1], problem.value.shape[-1]
    K, V = map(_padded, (k_dim, v_dim))
    consumers = tile.BM // ROWS.value
    # Registers of a thread: what a consumer can have where the launch begins with tile.registers each.
    registers = {2: (240, 24), 3: (160, 32)}[consumers]
    simple = problem.scale >= _SMALLEST and not problem.softcap and problem.slopes is None and problem.table is None
    S = 0 if problem.lo is None else problem.lo.shape[0]
    kind = simple, problem.softcap > 0
    # Weights greater than 1 overflow in fp16; a sink's score is a pivot from the start; how ALiBi's term still grows is
    # known within one range.
    lazy = (
        problem.query.dtype == torch.bfloat16
        and problem.table is None
        and problem.sinks is None
        and (problem.slopes is None or S <= 1)
    )
    # Without ranges a query that is loaded early made the kernel slower; with three consumers registers are too few.
    ahead = lazy and S > 0 and consumers == 2 and problem.slopes is None
    form = Form(tile.BM, tile.BN, K, V, k_dim, v_dim, H, S, *kind, consumers, tile.stages, *registers, lazy, ahead)
    unit = math.log2(math.e) if problem.table is None else 1
    score = problem.scale / problem.softcap if problem.softcap else problem.scale * unit
    scales = Scales(*map(_single, (score, problem.softcap * unit)))
    heads = B * G * H
    cached = _CACHED_KEYS * (4 if S > 0 and N >= _MANY_KEYS and max(K, V) <= 128 else 1)
    at_once = min(heads, max(1, cached * H // max(1, N * (K + V) * 2)))
    items = heads * -(-M // tile.BM)
    queries = _described(problem.query.permute(0, 2, 3, 1, 4), [1, 1, 1, ROWS.value, K])
    keys = _described(problem.key.transpose(1, 2), [1, 1, tile.BN, K])
    values = _described(problem.value.transpose(1, 2), [1, 1, tile.BN, V])
    given = [arguments, scales, queries, keys, values, out, lse, counters, at_once, items, form]
    return hopper_forward_kernel, (min(items, processors),), given, tile


def backward_missing(problem: Problem, needs: Needs) -> str | None:
    """What of a backward pass the Hopper kernel does not have."""
    reason = missing(problem)
    if reason is not None:
        return reason
    dims = problem.query.shape[-1], problem.value.shape[-1]
    for reason, found in (
        (f"head dimensions are {dims[0]} and {dims[1]}, want at most 128", max(dims) > 128),
        (f"the head dimension of query and key is {dims[0]}, want a multiple of 8", dims[0] % 8 > 0),
        ("there is a softcap", problem.softcap > 0),
        ("slopes of ALiBi need gradients", needs.slopes and problem.slopes is not None),
        ("not all of query, key and value need gradients", not (needs.query and needs.key and needs.value)),
    ):
        if found:
            return reason
    return _terms_missing(problem)


def _terms_missing(problem: Problem) -> str | None:
    """What of a problem neither of the kernels for backward has."""
    for reason, found in (
        (f"value's head dimension is {problem.value.shape[-1]}, want a multiple of 8", problem.value.shape[-1] % 8 > 0),
        ("there are ALiBi and a softcap", problem.slopes is not None and problem.softcap > 0),
        ("there is a relative table", problem.table is not None),
    ):
        if found:
            return reason
    return None


def wide_missing(problem: Problem) -> str | None:
    """What of a backward pass neither the Hopper kernel of queries nor that of keys and values has."""
    reason = missing(problem)
    if reason is not None:
        return reason
    dims = problem.query.shape[-1], problem.value.shape[-1]
    if max(dims) <= 128:
        return f"head dimensions are {dims[0]} and {dims[1]}, want more than 128"
    return _terms_missing(problem)


def keys_missing(problem: Problem, needs: Needs) -> str | None:
    """What of a backward pass the Hopper kernel of keys and values does not have."""
    return wide_missing(problem) if needs.key and needs.value else "not both key and value need gradients"


def queries_missing(problem: Problem, needs: Needs) -> str | None:
    """What of a backward pass the Hopper kernel of queries does not have."""
    if not needs.query:
        return "query needs no gradient"
    return "slopes of ALiBi need gradients" if needs.slopes else wide_missing(problem)


def keys_reason_against(problem: Problem, needs: Needs) -> str | None:
    """Why the plain Triton kernels compute the gradients of keys and values, and not the Hopper kernel for wide heads."""
    B, _, G, _, _ = problem.query.shape
    return keys_missing(problem, needs) or _wide_reason(problem, B * G * -(-problem.key.shape[1] // 64))


def queries_reason_against(problem: Problem, needs: Needs) -> str | None:
    """Why the plain Triton kernel computes the gradient of the query, and not the Hopper kernel for wide heads."""
    B, M, G, H, _ = problem.query.shape
    return queries_missing(problem, needs) or _wide_reason(problem, B * G * H * -(-M // 64))


def _wide_reason(problem: Problem, blocks: int) -> str | None:
    if not _runs_on(problem.query.device):
        return "the device is not a GPU of compute capability 9.0 with a Triton whose Gluon has Hopper's instructions"
    least = _LEAST_WIDE_BLOCKS * _processors(problem.query.device.index)
    if blocks < least:
        return f"there are {blocks} blocks of 64, want at least {least}, {_LEAST_WIDE_BLOCKS} for each multiprocessor"
    return None


def backward_tile(problem: Problem) -> Any:
    """Queries and keys of a tile of the backward kernel, a `config.TileConfig`."""
    from keyspan.backends.triton.config import TileConfig

    dim = _padded(max(problem.query.shape[-1], problem.value.shape[-1]))
    return TileConfig(64 if dim == 128 else 128, 128, 4, 2, 168)


def launch_backward(
    problem: Problem,
    arguments: Any,
    tile: Any,
    grads: tuple[Any, ...],
    stats: Tensor,
    bounds: list[Any],
    made: dict[str, Tensor],
    processors: int,
) -> tuple[Any, tuple[int, ...], list[Any], Any]:
    """Kernel, grid, arguments and tile of the backward pass.

    Args:
        grads: the output's gradient, then its strides.
        bounds: of tiles of queries, and its strides over ranges and batch entries; None and 0 without ranges.
        made: `query`, `key` and `value`, which it fills, and the scratch of `backward_scratch`.
        processors: how many programs run at a time.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from keyspan.backends.triton.hopper_backward_kernels import BackwardForm, hopper_backward_kernel

    B, M, G, H, k_dim = problem.query.shape
    N, v_dim = problem.value.shape[1], problem.value.shape[-1]
    K = _padded(max(k_dim, v_dim))
    S = 0 if problem.lo is None else problem.lo.shape[0]
    form = BackwardForm(tile.BM, tile.BN, K, K, k_dim, v_dim, H, S, False, tile.stages, 240, 24)
    rows = [1, 1, 1, tile.BM, K]
    items = -(-N // tile.BN) * G * B
    halves = [1, 1, tile.BN // 2, K]
    sums = made["sums"]
    # Half a tile, as it lies.
    sum_tiles = TensorDescriptor(
        sums,
        list(sums.shape),
        [256, 1],
        [16, 256],
        NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2),
    )
    given = [
        arguments,
        _single(problem.scale * math.log2(math.e)),
        _described(problem.query.permute(0, 2, 3, 1, 4), rows),
        _described(grads[0].permute(0, 2, 3, 1, 4), rows),
        _described(problem.key.transpose(1, 2), halves),
        _described(problem.value.transpose(1, 2), halves),
        _described_stats(stats, tile.BM),
        sum_tiles,
        *bounds,
        made["order"],
        _described(made["query"].view(B, M, G * H, k_dim).transpose(1, 2), [1, 1, 64, 64]),
        _described(made["key"].transpose(1, 2), halves),
        _described(made["value"].transpose(1, 2), halves),
        made["broken"],
        *backward_order(problem, tile),
        items,
        form,
    ]
    return hopper_backward_kernel, (min(items, processors),), given, tile


def keys_tile(problem: Problem) -> Any:
    """Queries and keys of a tile of the kernel of keys and values, a `config.TileConfig`."""
    from keyspan.backends.triton.config import TileConfig

    return TileConfig(64, 64, 4, 2, 168)


def launch_keys(
    problem: Problem,
    arguments: Any,
    tile: Any,
    grad: Tensor,
    stats: Tensor,
    bounds: list[Any],
    made: dict[str, Tensor],
    counters: Any,
    processors: int,
) -> tuple[Any, tuple[int, ...], list[Any], Any]:
    """Kernel, grid, arguments and tile of the gradients of keys and values alone.

    Args:
        bounds: as of `launch_backward`.
        made: `key`, `value` and `broken`, which it fills.
        counters: `relaunch.Counters`.
        processors: how many programs run at a time.
    """
    from keyspan.backends.triton.hopper_backward_kernels import BackwardForm
    from keyspan.backends.triton.hopper_keys_kernels import hopper_keys_kernel

    B, M, G, H, k_dim = problem.query.shape
    N, v_dim = problem.value.shape[1], problem.value.shape[-1]
    K, V = map(_padded, (k_dim, v_dim))
    S = 0 if problem.lo is None else problem.lo.shape[0]
    form = BackwardForm(tile.BM, tile.BN, K, V, k_dim, v_dim, H, S, problem.softcap > 0, tile.stages, 240, 24)
    items = -(-N // tile.BN) * G * B
    at_once = min(B * G, max(1, _CACHED_KEYS // (M * H * (K + V) * 2)))
    given = [
        arguments,
        _scales(problem),
        _described(problem.query.permute(0, 2, 3, 1, 4), [1, 1, 1, tile.BM, K]),
        _described(grad.permute(0, 2, 3, 1, 4), [1, 1, 1, tile.BM, V]),
        _described(problem.key.transpose(1, 2), [1, 1, tile.BN, K]),
        _described(problem.value.transpose(1, 2), [1, 1, tile.BN, V]),
        _described_stats(stats, tile.BM),
        *bounds,
        made["key"],
        made["value"],
        made["broken"],
        counters,
        at_once,
        items,
        form,
    ]
    return hopper_keys_kernel, (min(items, processors),), given, tile


def queries_tile(problem: Problem) -> Any:
    """Queries and keys of a tile of the kernel of queries, a `config.TileConfig`."""
    from keyspan.backends.triton.config import TileConfig

    return TileConfig(128, 64, 4, 2, 168)


def launch_queries(
    problem: Problem,
    arguments: Any,
    tile: Any,
    grad: Tensor,
    stats: Tensor,
    dq: Tensor,
    broken: Tensor,
    counters: Any,
    processors: int,
) -> tuple[Any, tuple[int, ...], list[Any], Any]:
    """Kernel, grid, arguments and tile of the gradient of the query alone, which fills `dq` and `broken`; the others as of
    `launch_keys`."""
    from keyspan.backends.triton.hopper_kernels import ROWS, Form
    from keyspan.backends.triton.hopper_queries_kernels import hopper_queries_kernel

    B, M, G, H, k_dim = problem.query.shape
    N, v_dim = problem.value.shape[1], problem.value.shape[-1]
    K, V = map(_padded, (k_dim, v_dim))
    S = 0 if problem.lo is None else problem.lo.shape[0]
    consumers = tile.BM // ROWS.value
    softcap = problem.softcap > 0
    form = Form(tile.BM, tile.BN, K, V, k_dim, v_dim, H, S, False, softcap, consumers, tile.stages, 240, 24)
    items = B * G * H * -(-M // tile.BM)
    at_once = min(B * G * H, max(1, _CACHED_KEYS * H // (N * (K + V) * 2)))
    given = [
        arguments,
        _scales(problem),
        _described(problem.query.permute(0, 2, 3, 1, 4), [1, 1, 1, ROWS.value, K]),
        _described(grad.permute(0, 2, 3, 1, 4), [1, 1, 1, ROWS.value, V]),
        _described(problem.key.transpose(1, 2), [1, 1, tile.BN, K]),
        _described(problem.value.transpose(1, 2), [1, 1, tile.BN, V]),
        stats,
        dq,
        broken,
        counters,
        at_once,
        items,
        form,
    ]
    return hopper_queries_kernel, (min(items, processors),), given, tile


def _scales(problem: Problem) -> Any:
    """What makes scores in log₂ of products, or what the softcap takes; and the softcap in log₂."""
    from keyspan.backends.triton.hopper_kernels import Scales

    unit = math.log2(math.e)
    score = problem.scale / problem.softcap if problem.softcap else problem.scale * unit
    return Scales(_single(score), _single(problem.softcap * unit))


def _described_stats(stats: Tensor, rows: int) -> Any:
    """A descriptor for TMA that reads statistics of so many rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(stats.view(-1), [stats.numel()], [1], [rows], layout)


def backward_order(problem: Problem, tile: Any) -> tuple[int, int]:
    """How many groups take turns in the backward pass, which makes runs of groups; and how many runs take their blocks from
    the last to the first and the tiles of each from the first to the last, the others the other way.

    Blocks of one group that begin at the same time wait for each other to add to dq, unless they go up under a causal mask:
    then each begins at its own first tile. But where query heads share a key head that is slower. Where rows see half of all
    keys, a group's longest blocks come last; so that none of them is the very last, the last of at least `_LEAST_RUNS` runs
    goes down. The queries, gradients and sums of many groups do not fit in the L2.
    """
    B, M, G, H, _ = problem.query.shape
    if problem.lo is not None and problem.lo.shape[0] == H == 1 and problem.row_keys >= _LEAST_UPWARD_KEYS:
        if 2 * problem.row_keys < problem.key.shape[1]:  # documents or a window
            at_once = min(2 if tile.BM == 64 else 8, B * G)
            return at_once, -(-B * G // at_once)
        # bf16 queries and gradients and fp32 sums.
        at_once = min(max(2, _CACHED_KEYS // (M * 8192 // tile.BM * 8)), 64)
        runs = -(-B * G // at_once)
        if runs >= _LEAST_RUNS:
            return at_once, runs - 1
    if problem.lo is None:
        found = -(-256 // (-(-M // tile.BM) * H))
        least = 2
    elif tile.BM == 128:  # heads of up to 64
        found = least = 16
    else:
        found = 2**16 // (M * H)
        least = max(4, 8 // H)
    return min(max(found, least), 16, B * G), 0


def backward_scratch(problem: Problem, tile: Any) -> dict[str, Tensor]:
    """Memory for the backward pass, by name: sums of dq, who adds to them, and which gradients have a NaN."""
    B, M, G, H, _ = problem.query.shape
    N = problem.key.shape[1]
    K = _padded(max(problem.query.shape[-1], problem.value.shape[-1]))
    tiles, query = B * G * H * -(-M // tile.BM), problem.query
    return {
        "sums": query.new_empty((tiles * tile.BM * K // 256, 256), dtype=torch.float32),
        "order": query.new_empty(1 + tiles, dtype=torch.int32),
        "broken": query.new_empty(B * G * 2 * -(-N // tile.BN) + tiles, dtype=torch.int32),
    }


def _single(x: float) -> float:
    """A number as the kernel takes it, in fp32: 0 or infinite where that has no normal number for it."""
    if abs(x) < _SMALLEST:
        return 0.0
    return x if abs(x) <= torch.finfo(torch.float32).max else math.copysign(math.inf, x)


def _describable(x: Tensor) -> bool:
    """Whether TMA can read it: rows are contiguous, everything else is aligned to 16 bytes."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(
            stride > 0 and stride * x.element_size() % 16 == 0
            for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
            if size > 1
        )
    )


def _described(x: Tensor, block: list[int]) -> Any:
    """A descriptor for TMA that reads blocks of this shape."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout.get_default_for(block, bfloat16)  # or any other dtype of 16 bits
    # A dimension of size 1 may have any stride; the descriptor wants a multiple of 16 bytes.
    strides = [s if n > 1 else 16 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
