"""From problems to kernel launches: arguments, constants, grids and buffers; the arithmetic is in the kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from keyspan.backends import Gradients, Needs, Replay
from keyspan.backends.triton import config, hopper, relaunch
from keyspan.backends.triton.arguments import STATS_PADDING, Arguments, Constants
from keyspan.backends.triton.backward_kernels import (
    bias_kernel,
    bounds_kernel,
    keys_kernel,
    queries_kernel,
    starts_kernel,
    stats_kernel,
    table_kernel,
)
from keyspan.backends.triton.forward_kernels import combine_kernel, forward_kernel, merge_kernel
from keyspan.backends.triton.hopper_ends_kernels import (
    FINISHED,
    hopper_finish_kernel,
    hopper_repair_kernel,
    hopper_repair_queries_kernel,
    hopper_stats_kernel,
)
from keyspan.core import shims
from keyspan.core.problem import Problem

_CACHED_KEYS = 16 * 2**20
"""Bytes of keys and values that programs running at the same time should share; a third of an H200's L2."""
_LEAST_SPLIT = 256
"""Fewest keys worth a split."""
_LARGEST_SCRATCH = 2**28
"""Bytes that the parts of split keys may take where their number is that of segments."""
_MOST_WAVES = 32
"""Programs per processor of splits that fill no device."""
_MOST_SPLITS = 65535
"""Largest second dimension of a grid."""
_SMALLEST = torch.finfo(torch.float32).tiny
Launch = tuple[Any, tuple[int, ...], list[Any], config.TileConfig]
"""Kernel, grid, arguments and tile."""


def run(kernel: Any, grid: tuple[int, ...], *args: Any, tile: config.TileConfig) -> Any:
    """Launch a kernel; returns it compiled. All launches go through here, so that tests can compile for another GPU."""
    return kernel[grid](*args, **tile.options())


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    made, _ = _forward(problem, *_results(problem, problem.shapes))
    return made["out"], made["lse"]


def record_forward(
    problem: Problem, given: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> tuple[list[Tensor], Replay[list[Tensor]] | None]:
    results = _results(problem, shapes)
    views = [*results, *_results(problem, problem.shapes)[len(results) :]]
    made, launches = _forward(problem, *(x.view(shape) for x, shape in zip(views, problem.shapes, strict=True)))
    return results, relaunch.recorded(problem, given, launches, list(made.values()), shapes)


def _results(problem: Problem, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """New tensors for out and lse."""
    dtypes = (problem.output_dtype, torch.float32)
    return [problem.query.new_empty(tuple(shape), dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]


def _forward(problem: Problem, out: Tensor, lse: Tensor) -> tuple[relaunch.Made, list[relaunch.Launched]]:
    """All tensors that the launches fill, `out` and `lse` first, and the launches."""
    problem = _aligned(problem)
    B, M, G, H, _ = problem.query.shape
    N, V = problem.key.shape[1], problem.value.shape[-1]
    query = problem.query
    made = {"out": out, "lse": lse}
    if out.numel() == 0 and lse.numel() == 0:
        return made, []
    if hopper.reason_against(problem) is None:
        step = hopper.launch(
            problem, _arguments(problem), hopper.tile(problem), out, lse, _counters(query), _processors(query.device)
        )
        return made, _launched(query, [step])
    rows = _rows_per_tile(problem)
    if rows * triton.next_power_of_2(H) > config.MOST_ROWS_OF_MMA and not _wgmma_allowed(problem):
        rows = 0
    invariant = problem.invariant
    tile = _tile("invariant" if invariant else "decode" if rows else "forward", problem)
    pack = 1
    if rows and invariant:
        # One tile for all calls: the layout of another in registers has another order of sums.
        rows = max(1, min(rows, tile.BM // triton.next_power_of_2(H)))
        pack = tile.BM // rows
    elif rows:
        pack = triton.next_power_of_2(H)
        tile = tile._replace(BM=max(tile.BM, pack * rows))
        pack = tile.BM // rows
    heads = B * G * triton.cdiv(H, pack)
    programs = triton.cdiv(M, tile.BM // pack) * heads
    splits = _segments(problem, programs, rows > 0) if invariant else _splits(problem, programs, rows > 0)
    constants = _constants(problem, tile, pack)
    arguments = _arguments(problem)
    keys, values = _key_tiles(problem, constants)
    bytes_per_head = max(1, N * (constants.K + constants.V) * problem.key.element_size() // min(H, max(1, H // pack)))
    at_once = min(heads, max(1, _CACHED_KEYS // bytes_per_head))
    parts, part_lse, totals, sums = out, lse, None, None
    if splits > 1:
        made["parts"] = parts = query.new_empty((splits, *out.shape), dtype=torch.float32)
        made["peaks"] = part_lse = query.new_empty((splits, *lse.shape), dtype=torch.float32)
        made["totals"] = totals = torch.empty_like(part_lse)
    elif invariant and problem.N > config.SEGMENT:
        made["sums"] = sums = query.new_empty((programs, tile.BM, constants.V), dtype=torch.float32)
    launches: list[Launch] = [
        (forward_kernel, (programs, splits),
         [arguments, keys, values, parts, part_lse, totals, sums, at_once, splits, constants], tile),
    ]  # fmt: skip
    if splits > 1 and invariant:
        given = [arguments, parts, part_lse, totals, out, lse, splits, constants]
        launches.append((merge_kernel, (B * M * G * H,), given, config.TileConfig(0, 0, 2, 1, fusion=False)))
    elif splits > 1:
        rows = B * M * G * H
        of_split = [
            parts,
            part_lse,
            totals,
            out,
            lse,
            rows,
            splits,
            M,
            G * H,
            constants.V,
            V,
            triton.next_power_of_2(splits),
        ]
        launches.append((combine_kernel, (rows,), of_split, config.TileConfig(0, 0, 2, 1)))
    return made, _launched(query, launches)


def _launched(query: Tensor, launches: list[Launch]) -> list[relaunch.Launched]:
    with _on(query):
        return [(run(kernel, grid, *args, tile=tile), grid, args) for kernel, grid, args, tile in launches]


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    if problem.block_table is not None:
        return _paged_backward(problem, grad_out, grad_lse, out, lse, needs)
    return _backward_in_row(problem, grad_out, grad_lse, out, lse, needs)


def _backward_in_row(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Needs,
    period: int = 0,
) -> Gradients:
    """Gradients where keys are not paged; `period` as of `_arguments`."""
    if problem.query.numel() == 0 or problem.key.numel() == 0:
        return _no_scores(problem, grad_lse, lse, needs)
    prepared = _prepared(problem.query.dtype, out, lse, grad_out, grad_lse)
    made, _ = _backward(problem, *prepared, needs, period)
    return _gradients(_forms(problem), made, needs, problem.sinks, prepared[1])


def record_backward(
    problem: Problem,
    given: Sequence[Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Needs,
) -> tuple[Gradients, Replay[Gradients] | None]:
    # Paged keys are gathered and their gradients scattered by torch, whose launches no relaunch has; they cost more than
    # a launch of ours saves.
    if problem.block_table is not None or problem.query.numel() == 0 or problem.key.numel() == 0:
        return backward(problem, grad_out, grad_lse, out, lse, needs), None
    dtype, forms = problem.query.dtype, _forms(problem)
    prepared = _prepared(dtype, out, lse, grad_out, grad_lse)
    made, launches = _backward(problem, *prepared, needs)
    gradients = _gradients(forms, made, needs, problem.sinks, prepared[1])
    present = [x for x in prepared if x is not None]
    # Where nothing is copied, the kernels read the given tensors; the call's signature says so of every repetition.
    copied = any(x.data_ptr() != y.data_ptr() for x, y in zip(present, given[-len(present) :], strict=True))
    results = [name for name in made if _is_result(name, needs)]
    shapes = [_shape_given(name, made[name], problem, given) for name in results]
    filled = [made[name] for name in (*results, *(name for name in made if name not in results))]
    relaunched = relaunch.recorded(problem, [*given, *present] if copied else given, launches, filled, shapes)
    if relaunched is None:
        return gradients, None
    of_out, of_lse = problem.shapes
    saved_shapes = (of_out, of_lse, of_out, of_lse)[: len(present)]
    sinks = None if problem.sinks is None else _place(problem.sinks, given)
    products_only = set(results) <= {"query", "key", "value"} and not needs.sinks
    absent: list[Tensor | None] = [None] * len(problem.biases)

    def replay(pointers: list[int], tensors: Sequence[Tensor]) -> Gradients | None:
        if copied or not products_only:
            # What is copied depends on the shapes: those of the recorded call.
            last = tensors[-len(saved_shapes) :]
            prepared = _prepared(dtype, *(x.reshape(shape) for x, shape in zip(last, saved_shapes, strict=True)))
            if copied:
                pointers = [*pointers, *(x.data_ptr() for x in prepared if x is not None)]
        filled = relaunched(pointers, tensors)
        if filled is None:
            return None
        found = dict(zip(results, filled, strict=False))
        if products_only:
            dq = found.get("query") if needs.query else None
            return Gradients(dq, found.get("key"), found.get("value"), None, None, None, absent)
        learned = None if sinks is None else tensors[sinks[0]].as_strided(*sinks[1:])
        return _gradients(forms, found, needs, learned, prepared[1])

    return gradients, replay


def _is_result(name: str, needs: Needs) -> bool:
    """Whether `_gradients` reads what the launches fill under this name; the rest is scratch."""
    return (
        name in ("query", "key", "value", "slopes", "ends", "table")
        or name.startswith("bias ")
        or (name == "stats" and needs.sinks)
    )


def _shape_given(name: str, made: Tensor, problem: Problem, given: Sequence[Tensor]) -> torch.Size:
    """The shape in which a replay makes a gradient: that of the given tensor, which is a view of the problem's."""
    if name not in ("query", "key", "value"):
        return made.shape
    place = ("query", "key", "value").index(name)
    return given[place].shape if given[place].numel() == made.numel() else made.shape


def _place(x: Tensor, given: Sequence[Tensor]) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Which of some tensors one is a view of, its shape and strides. Another tensor may begin at the same address."""
    place = x.data_ptr(), x.dtype
    return next(n for n, y in enumerate(given) if (y.data_ptr(), y.dtype) == place), x.shape, x.stride()


def _prepared(
    dtype: torch.dtype, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the backward kernels read besides the problem: products are of the inputs' dtype, which out need not have."""
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    return out.contiguous(), lse.contiguous(), _rows_contiguous(grad_out.to(dtype)), grad_lse


def _backward(
    problem: Problem, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, needs: Needs, period: int = 0
) -> tuple[relaunch.Made, list[relaunch.Launched]]:
    """All tensors that the launches for the gradients fill, and the launches; takes what `_prepared` returns."""
    if not period and hopper.backward_reason_against(problem, needs) is None:
        return _hopper_backward(problem, out, lse, grad, grad_lse)
    problem = _aligned(problem)
    B, M, G, H, K = problem.query.shape
    N, V = problem.value.shape[1], problem.value.shape[-1]
    query = problem.query
    padded = triton.cdiv(M, STATS_PADDING.value) * STATS_PADDING.value
    stats = lse.new_empty((B, G, H, 3 if _natural(problem) else 2, padded))
    made = {"stats": stats}
    arguments = _arguments(problem, period)
    grads = (grad, *grad.stride()[:4])
    launches: list[Launch] = []
    by_hopper = not period and hopper.queries_reason_against(problem, needs) is None
    if not by_hopper and (needs.query or needs.slopes or needs.table or _natural(problem)):
        tile = _tile("queries", problem)
        constants = _constants(problem, tile, 1, period)
        keys, values = _key_tiles(problem, constants)
        made["query"] = query.new_empty((B, M, G, H, K))
        if needs.slopes:
            made["slopes"] = torch.empty_like(lse)
        if needs.table:
            made["ends"] = lse.new_empty((2, *lse.shape))
        by_row = [made.get(name) for name in ("query", "slopes", "ends")]
        launches.append(
            (queries_kernel, (triton.cdiv(M, tile.BM) * H * G * B,),
             [arguments, keys, values, *grads, out, grad_lse, lse, stats, *by_row, constants], tile)
        )  # fmt: skip
    else:
        tile = config.TileConfig(32, 0, 4, 1, fusion=not problem.invariant)
        launches.append(
            (stats_kernel, (triton.cdiv(M, tile.BM) * H * G * B,),
             [arguments, *grads, out, grad_lse, lse, stats, _constants(problem, tile, 1, period)], tile)
        )  # fmt: skip
    if by_hopper:
        made["query"] = query.new_empty((B, M, G, H, K))
        launches += _hopper_queries(problem, arguments, grads, made)
    if needs.key:
        made["key"] = query.new_empty((B, N, G, K), dtype=problem.key.dtype)
    if needs.value:
        made["value"] = query.new_empty((B, N, G, V), dtype=problem.value.dtype)
    dk, dv = made.get("key"), made.get("value")
    if not period and hopper.keys_reason_against(problem, needs) is None:
        launches += _hopper_keys(problem, arguments, grads, made)
        by_kernel: list[tuple[str, Tensor | None, Tensor | None]] = []
    elif _split_key_value(problem):
        by_kernel = [("keys alone", dk, None), ("values alone", None, dv)]
    else:
        by_kernel = [("keys", dk, dv)]
    for name, dk, dv in by_kernel:
        if dk is None and dv is None:
            continue
        tile = _tile(name, problem)
        constants = _constants(problem, tile, 1, period)
        start_launches, starts = _starts(problem, arguments, constants, made)
        bounds_launches, bounds = _bounds(problem, arguments, constants, made, starts)
        launches += start_launches + bounds_launches
        constants = constants._replace(descriptors=constants.descriptors and _describable(grad))
        tiles_of = _query_tiles(problem, grad, constants)
        launches.append(
            (keys_kernel, (triton.cdiv(N, tile.BN) * G * B,),
             [arguments, *tiles_of, *grads, stats, *starts, *bounds, 0 if bounds[0] is None else bounds[0].shape[-1],
              dk, dv, constants], tile)
        )  # fmt: skip
    for n, term in enumerate(problem.biases):
        if not needs.biases[n]:
            continue
        # Each by itself: what all of them broadcast to may be far larger than any of them.
        shape = term.shape
        made[f"bias {n}"] = query.new_empty(shape, dtype=torch.float32)
        tile = _tile("bias", problem)
        tiles = triton.cdiv(shape[3], tile.BM) * triton.cdiv(shape[4], tile.BN)
        launches.append(
            (bias_kernel, (tiles * math.prod(shape[:3]),),
             [arguments, *grads, stats, made[f"bias {n}"], *shape, _constants(problem, tile, 1, period)], tile)
        )  # fmt: skip
    if needs.table and problem.table is not None:
        tile = _tile("table", problem)
        slots = min(B * triton.cdiv(M, tile.BM), max(1, 8 * _processors(query.device) // (G * H)))
        made["table"] = query.new_empty((slots, *problem.table.shape), dtype=torch.float32)
        launches.append(
            (table_kernel, (slots, G * H),
             [arguments, *grads, stats, made["table"], _constants(problem, tile, 1, period)], tile)
        )  # fmt: skip
    return made, _launched(query, launches)


def _hopper_queries(
    problem: Problem, arguments: Arguments, grads: tuple[Any, ...], made: relaunch.Made
) -> list[Launch]:
    """The launches of the Hopper kernel for the query's gradient."""
    query, tile = problem.query, hopper.queries_tile(problem)
    B, M, G, H, _ = query.shape
    tiles = triton.cdiv(M, tile.BM) * 2  # of 64 rows, in which they are repaired
    made["broken queries"] = broken = query.new_empty(tiles * H * G * B, dtype=torch.int32)
    step = hopper.launch_queries(
        problem,
        arguments,
        tile,
        grads[0],
        made["stats"],
        made["query"],
        broken,
        _counters(query),
        _processors(query.device),
    )
    half = config.TileConfig(tile.BM // 2, tile.BN, 4, 1)
    repair = [arguments, *grads, made["stats"], broken, made["query"], tiles, _constants(problem, half, 1)]
    return [step, (hopper_repair_queries_kernel, (tiles * H * G * B,), repair, half)]


def _counters(query: Tensor) -> relaunch.Counters:
    return relaunch.counters(query.device, shims.cuda_stream(query.device.index) if query.is_cuda else 0)


def _hopper_keys(problem: Problem, arguments: Arguments, grads: tuple[Any, ...], made: relaunch.Made) -> list[Launch]:
    """The launches of the Hopper kernel for the gradients of keys and values."""
    query, tile = problem.query, hopper.keys_tile(problem)
    blocks = triton.cdiv(problem.key.shape[1], tile.BN) * problem.query.shape[2] * problem.query.shape[0]
    made["broken"] = query.new_empty(2 * blocks, dtype=torch.int32)
    constants = _constants(problem, tile, 1)
    launches, bounds = _bounds(problem, arguments, constants, made)
    step = hopper.launch_keys(
        problem, arguments, tile, grads[0], made["stats"], bounds, made, _counters(query), _processors(query.device)
    )
    repair = [arguments, *grads, made["stats"], made["broken"], made["key"], made["value"], constants]
    return [*launches, step, (hopper_repair_kernel, (blocks,), repair, config.TileConfig(tile.BM, tile.BN, 4, 1))]


def _starts(
    problem: Problem, arguments: Arguments, constants: Constants, made: relaunch.Made
) -> tuple[list[Launch], list[Any]]:
    """The launch that finds the first rows of tiles of BM queries that begin anew with each document, for invariant
    results; its result and stride over batch entries, None and 0 where tiles are counted from row 0."""
    if arguments.origin is None or not problem.invariant:
        return [], [None, 0]
    # Every row may be a document.
    entries, rows, name = arguments.origin.shape[0], problem.query.shape[1] + 2, f"starts for {constants.BM}"
    launches: list[Launch] = []
    if name not in made:
        made[name] = x = problem.query.new_empty((entries, rows), dtype=torch.int32)
        launches.append((starts_kernel, (entries,), [arguments, x, constants], config.TileConfig(0, 0, 4, 1)))
    return launches, [made[name], rows if entries > 1 else 0]


def _bounds(
    problem: Problem,
    arguments: Arguments,
    constants: Constants,
    made: relaunch.Made,
    starts: Sequence[Any] = (None, 0),
) -> tuple[list[Launch], list[Any]]:
    """The launch that finds which keys tiles of BM queries see; its result and strides over ranges and batch entries, for
    who reads it. `starts`: what `_starts` gives."""
    if problem.lo is None:
        return [], [None, 0, 0]
    S, entries, M = problem.lo.shape
    tiles, name = triton.cdiv(M, constants.BM), f"bounds for {constants.BM}"
    if starts[0] is not None:
        tiles, entries = M, max(entries, starts[0].shape[0])
    launches: list[Launch] = []
    if name not in made:
        made[name] = x = problem.query.new_empty((S, entries, 6, tiles), dtype=torch.int32)
        given = [arguments, *starts, x, tiles, constants]
        launches.append((bounds_kernel, (tiles * entries, S), given, config.TileConfig(0, 0, 1, 1)))
    x = made[name]
    return launches, [x, x.stride(0), x.stride(1) if entries > 1 else 0]


def _hopper_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> tuple[relaunch.Made, list[relaunch.Launched]]:
    """The same by the kernel for Hopper: the gradients of query, key and value."""
    B, M, G, H, K = problem.query.shape
    N, V = problem.value.shape[1], problem.value.shape[-1]
    query, tile = problem.query, hopper.backward_tile(problem)
    padded = triton.cdiv(M, STATS_PADDING.value) * STATS_PADDING.value
    made = {
        "stats": lse.new_empty((B, G, H, 2, padded)),
        "query": query.new_empty((B, M, G, H, K)),
        "key": query.new_empty((B, N, G, K)),
        "value": query.new_empty((B, N, G, V)),
        **hopper.backward_scratch(problem, tile),
    }
    arguments, grads = _arguments(problem), (grad, *grad.stride()[:4])
    constants = _constants(problem, tile, 1)
    tiles, blocks = triton.cdiv(M, tile.BM), triton.cdiv(N, tile.BN)
    ends = config.TileConfig(tile.BM, tile.BN, 4, 1)
    launches, bounds = _bounds(problem, arguments, constants, made)
    launches.append(
        (hopper_stats_kernel, (tiles * H * G * B,),
         [arguments, *grads, out, grad_lse, lse, made["stats"], made["order"], made["broken"],
          made["broken"].numel(), constants], ends._replace(warps=8))
    )  # fmt: skip
    processors, finished = _processors(query.device), FINISHED.value
    launches.append(hopper.launch_backward(problem, arguments, tile, grads, made["stats"], bounds, made, processors))
    launches.append(
        (hopper_finish_kernel, (triton.cdiv(tiles * H * G * B, finished) + triton.cdiv(blocks * G * B, finished),),
         [arguments, *grads, made["stats"], made["order"], made["broken"], made["query"], made["key"], made["value"],
          constants], ends)
    )  # fmt: skip
    return made, _launched(query, launches)


_Forms = dict[str, Any]
"""Shape and dtype of each differentiable input by name, None for one that is absent; of dense biases a list."""


def _forms(problem: Problem) -> _Forms:
    form = lambda x: None if x is None else (x.shape, x.dtype)  # noqa: E731
    forms = {name: form(getattr(problem, name)) for name in Gradients._fields[:-1]}
    return {**forms, "biases": [form(x) for x in problem.biases]}


def _gradients(forms: _Forms, made: relaunch.Made, needs: Needs, sinks: Tensor | None, lse: Tensor) -> Gradients:
    """Gradients in the shape and dtype of their inputs from what the kernels wrote."""
    dslopes = dtable = dsinks = None
    if needs.slopes and forms["slopes"] is not None:
        shape, dtype = forms["slopes"]
        dslopes = made["slopes"].sum(-1).sum_to_size(shape).to(dtype)
    if needs.table and forms["table"] is not None:
        dtable = made["table"].sum(0)
        first, last = made["ends"].sum((1, 4))
        # Both ends are one entry where the reach is 0.
        dtable[..., 0] += first
        dtable[..., -1] += last
        dtable = dtable.to(forms["table"][1])
    found = [made.get(f"bias {n}") for n in range(len(forms["biases"]))]
    dbiases = [None if x is None else x.to(dtype) for x, (_, dtype) in zip(found, forms["biases"], strict=True)]
    if needs.sinks and sinks is not None:
        _, delta, *lost = made["stats"][..., : lse.shape[-1]].unbind(-2)
        dsinks = _sinks_gradient(sinks, lse, delta, *lost)
    dq = made["query"] if needs.query else None
    return Gradients(dq, made.get("key"), made.get("value"), dslopes, dtable, dsinks, dbiases)


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, lost: Tensor | None = None) -> Tensor:
    """`lost`: as of `RowStats`."""
    share = torch.exp(sinks.float()[..., None] - lse)
    if lost is not None:
        share *= torch.exp2(-lost)
    return torch.where(share > 0, -share * delta, 0).sum((0, 3)).to(sinks.dtype)


def _no_scores(problem: Problem, grad_lse: Tensor | None, lse: Tensor, needs: Needs) -> Gradients:
    """Gradients where there is no query or no key: zero, but for sinks, which lse depends on."""
    dsinks = None
    if needs.sinks and problem.sinks is not None:
        delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse
        dsinks = _sinks_gradient(problem.sinks, lse, delta)

    def zeros(x: Tensor | None, needed: bool) -> Tensor | None:
        return torch.zeros_like(x) if x is not None and needed else None

    fields = ("query", "key", "value", "slopes", "table")
    return Gradients(
        *(zeros(getattr(problem, name), getattr(needs, name)) for name in fields),
        dsinks,
        [zeros(x, needed) for x, needed in zip(problem.biases, needs.biases, strict=True)],
    )


def _paged_backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    """The same with the sequences' logical keys gathered into one row; slots that are shared get the sum."""
    slots = problem.keys_in_row(0, problem.row_length)
    assert slots is not None
    # `reason_against` has seen that they fit.
    lo, hi, diagonal = (x.int() for x in problem.ranges)
    column = torch.arange(problem.row_length, device=slots.device) % max(problem.N, 1)

    def in_row(x: Tensor) -> Tensor:
        return x if x.shape[-1] == 1 else x[..., column]

    row = problem._replace(
        key=problem.key[:, slots],
        value=problem.value[:, slots],
        lo=lo,
        hi=hi,
        diagonal=diagonal,
        sequence=None,
        block_table=None,
        page_size=0,
        origin=problem.origin_in_row.int() if problem.invariant else None,
        dense=None if problem.dense is None else in_row(problem.dense),
        biases=[in_row(x) for x in problem.biases],
    )
    grads = _backward_in_row(row, grad_out, grad_lse, out, lse, needs, period=problem.N)

    def scattered(grad: Tensor | None, like: Tensor) -> Tensor | None:
        if grad is None:
            return None
        total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        # index_put sums in a fixed order where index_add would not.
        return (
            total.transpose(0, 1)
            .index_put_((slots,), grad.transpose(0, 1).float(), accumulate=True)
            .transpose(0, 1)
            .to(like.dtype)
        )

    def folded(grad: Tensor | None, like: Tensor) -> Tensor | None:
        if grad is None or like.shape[-1] == 1:
            return grad
        return grad.float().unflatten(-1, (-1, problem.N)).sum(-2).to(like.dtype)

    return grads._replace(
        key=scattered(grads.key, problem.key),
        value=scattered(grads.value, problem.value),
        biases=[folded(grad, like) for grad, like in zip(grads.biases, problem.biases, strict=True)],
    )


def _arguments(problem: Problem, period: int = 0) -> Arguments:
    """The arguments of every kernel.

    Args:
        period: keys per sequence where sequences that were paged are laid end to end: columns of dense terms and
            dropout repeat after it; 0 where they are not.
    """
    q, k, v = problem.query, problem.key, problem.value
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, M, G, _, _ = q.shape
    row = problem.row_length if problem.block_table is not None else k.shape[1]
    none = (None, 0, 0, 0)
    lo, hi, diagonal = (
        none if x is None else (x, *x.stride()[:1], x.stride(1) if x.shape[1] > 1 else 0, x.stride(2))
        for x in (problem.lo, problem.hi, problem.diagonal)
    )
    origin = (None, 0, 0) if problem.origin is None else (problem.origin, *_strides(problem.origin))
    bias = None
    for term in problem.biases:
        bias = term if bias is None else bias.float() + term  # fp16 would overflow
    paged = problem.block_table is not None
    period = problem.N if paged else period or row
    unit = 1 if _natural(problem) else math.log2(math.e)  # of scores
    score_scale = problem.scale / problem.softcap if problem.softcap else problem.scale * unit
    # Random bits are compared as signed numbers: subtract 2³¹ from the unsigned threshold.
    threshold = min(round(problem.dropout_p * 2**32), 2**32 - 1) - 2**31
    slopes, table, sinks = problem.slopes, problem.table, problem.sinks
    table = table if table is None or table.stride(-1) == 1 else table.contiguous()
    return Arguments(
        q, *q.stride()[:4], k, *k.stride()[:3], v, *v.stride()[:3], *lo, *hi, *diagonal, *origin,
        None if problem.sequence is None else problem.sequence.contiguous(),
        None if problem.block_table is None else problem.block_table.contiguous(),
        *_five(None if problem.dense is None else problem.dense.view(torch.uint8)), *_five(bias),
        *((None, 0, 0, 0) if slopes is None else (slopes, *_strides(slopes))),
        *((None, 0, 0, 0) if table is None else (table, *table.stride()[:2], table.shape[-1] // 2)),
        *((None, 0, 0) if sinks is None else (sinks, *sinks.stride())),
        problem.seed, B, M, row, G, period, k.shape[1] // problem.page_size if paged else 0,
        *map(_single, (score_scale, problem.scale, problem.softcap * unit, 1 / (1 - problem.dropout_p))),
        threshold,
        *((None,) * 5 if problem.query_scale is None else (problem.query_scale, *problem.query_scale.stride())),
        *((None,) * 4 if problem.key_scale is None else (problem.key_scale, *problem.key_scale.stride())),
        *((None,) * 4 if problem.value_scale is None else (problem.value_scale, *problem.value_scale.stride())),
    )  # fmt: skip


def _natural(problem: Problem) -> bool:
    """`Constants.natural`: whether a term may hide all keys of a row with a large finite number."""
    return bool(problem.biases) or problem.table is not None


def _single(x: float) -> float:
    """A number as kernels take it, in fp32: 0 or infinite where that has no normal number for it."""
    if abs(x) < _SMALLEST:
        return 0.0
    return x if abs(x) <= torch.finfo(torch.float32).max else math.copysign(math.inf, x)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides with 0 where a dimension broadcasts."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _five(x: Tensor | None) -> tuple[Any, ...]:
    return (None, 0, 0, 0, 0, 0) if x is None else (x, *_strides(x))


def _constants(problem: Problem, tile: config.TileConfig, pack: int, period: int = 0) -> Constants:
    K, V = problem.query.shape[-1], problem.value.shape[-1]
    plain = not problem.biases and problem.slopes is None and not problem.softcap
    paged = problem.block_table is not None
    amd = _family(problem.query.device) == "amd"
    return Constants(
        BM=tile.BM,
        BN=tile.BN,
        # Products of 8 bits are of at least 32, and of fewer columns Triton 3.6 does not compile backward for AMD.
        K=max(32 if amd or problem.query.element_size() == 1 else 16, triton.next_power_of_2(K)),
        V=max(32 if amd else 16, triton.next_power_of_2(V)),
        k_dim=K,
        v_dim=V,
        H=problem.query.shape[3],
        S=0 if problem.lo is None else problem.lo.shape[0],
        pack=pack,
        page=problem.page_size if paged else 0,
        natural=_natural(problem),
        # Hidden scores, −inf, are multiplied by the scale there.
        simple=plain and problem.scale >= _SMALLEST,
        softcap=problem.softcap > 0,
        periodic=paged or period > 0,
        wide=any(
            x.shape[-1] > 1 and x.shape[-1] * x.stride(-1) >= 2**31
            for x in (*problem.biases, problem.dense)
            if x is not None
        ),
        descriptors=not paged
        and _descriptors_allowed(problem.query)
        and _describable(problem.query, problem.key, problem.value),
        precision=_precision(),
        assembly=_assembly(problem.query) if problem.quantized else "none",
        scaled=problem.quantized
        and (
            problem.query.dtype in (torch.bfloat16, torch.float8_e4m3fn)
            or (problem.key_scale is not None and problem.key_scale.shape[1] == 1)
        ),
        query_run=_run(problem.query_scale, problem.query.shape[1]),
        key_run=_run(problem.key_scale, problem.key.shape[1]),
        value_run=_run(problem.value_scale, problem.key.shape[1]),
        segment=config.SEGMENT if problem.invariant else 0,
    )


def _run(scale: Tensor | None, rows: int) -> int:
    """How many rows share an entry of a scale; 0 where all do."""
    return 0 if scale is None or scale.shape[1] == 1 else rows // scale.shape[1]


def _precision() -> str:
    """How fp32 tiles are multiplied: three tf32 products come to nearly fp32 where the plain cores would take ages."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _assembly(x: Tensor) -> str:
    """How 8 bits are converted; the compiler for sm_100 and later stops at effects."""
    if not x.is_cuda or torch.version.hip is not None:
        return "none"
    return "pure" if torch.cuda.get_device_capability(x.device) >= (10, 0) else "effectful"


def _descriptors_allowed(x: Tensor) -> bool:
    """TMA pays on sm_90 and later and for products of 16-bit or smaller elements."""
    return x.element_size() <= 2 and x.is_cuda and _family(x.device) in ("hopper", "blackwell")


def _describable(*tensors: Tensor) -> bool:
    """Whether TMA can read them: contiguous rows, everything else aligned to 16 bytes."""
    return all(
        x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(
            stride > 0 and stride * x.element_size() % 16 == 0
            for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
            if size > 1
        )
        for x in tensors
    )


def _described(x: Tensor, block: list[int]) -> Any:
    # A dimension of size 1 may have any stride; the descriptor wants a multiple of 16 bytes.
    strides = [s if n > 1 else 16 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)


def _key_tiles(problem: Problem, c: Constants) -> tuple[Any, Any]:
    if not c.descriptors:
        return None, None
    keys, values = (x.transpose(1, 2) for x in (problem.key, problem.value))
    return _described(keys, [1, 1, c.BN, c.K]), _described(values, [1, 1, c.BN, c.V])


def _query_tiles(problem: Problem, grad: Tensor, c: Constants) -> tuple[Any, Any]:
    if not c.descriptors:
        return None, None
    queries, grads = (x.permute(0, 2, 3, 1, 4) for x in (problem.query, grad))
    return _described(queries, [1, 1, 1, c.BM, c.K]), _described(grads, [1, 1, 1, c.BM, c.V])


def _rows_contiguous(x: Tensor) -> Tensor:
    """A gradient as kernels and TMA want it: often it comes expanded or permuted."""
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _rows_per_tile(problem: Problem) -> int:
    """Query rows of a tile where heads of a group should share it, since there are few; 0 where there are many."""
    B, M, _, H, _ = problem.query.shape
    if problem.block_table is not None:
        return 1 if 4 * problem.block_table.shape[0] >= M else 0
    if M * H <= 64 and (B > 1 or M == 1 or problem.lo is None):
        return triton.next_power_of_2(M)
    # Packed: rows that see far more keys than there are rows are most likely sequences that go on by one token.
    return 1 if problem.lo is not None and problem.key.shape[1] >= M * 128 else 0


def _splits(problem: Problem, programs: int, decode: bool) -> int:
    """Into how many parts each row's keys are divided, so that the device is full."""
    return max(1, min(_wanted_splits(problem, programs, decode), problem.N // _LEAST_SPLIT, 128))


def _wanted_splits(problem: Problem, programs: int, decode: bool) -> int:
    return (3 if decode else 1) * _processors(problem.query.device) // max(programs, 1)


def _segments(problem: Problem, programs: int, decode: bool) -> int:
    """The number of splits of invariant results, by how many it takes to fill the device: one for each segment, or 1.

    Decoded rows are also split where there are enough programs, since a tile of few rows would keep sums of as many as
    fit; not where most of many programs might find no key."""
    segments = triton.cdiv(problem.N, config.SEGMENT)
    scratch = segments * problem.query[..., 0].numel() * problem.value.shape[-1] * 4
    wanted = _wanted_splits(problem, programs, decode) > 1
    if decode and programs * segments <= _MOST_WAVES * _processors(problem.query.device):
        wanted = True
    return segments if wanted and scratch <= _LARGEST_SCRATCH and segments <= _MOST_SPLITS else 1


def _tile(kernel: str, problem: Problem) -> config.TileConfig:
    head_dim = max(problem.query.shape[-1], problem.value.shape[-1])
    itemsize = problem.query.element_size()
    if itemsize <= 2:
        itemsize = problem.key.element_size()
    found = config.tile(kernel, itemsize, head_dim, _family(problem.query.device), _terms(problem))
    if not _wgmma_allowed(problem):
        found = config.without_wgmma(kernel, found)
    return found._replace(fusion=not problem.invariant)


def _wgmma_allowed(problem: Problem) -> bool:
    """Whether rows are whole vectors of 16 bytes. Where they are not, many addresses crowd the uniform registers, and
    ptxas 12.8 makes descriptors of wgmma from registers that hold something else: a program then reads memory that is
    not its own (see `_lost_descriptors` in tests/gpu/offline.py)."""
    return _family(problem.query.device) != "hopper" or all(
        x.shape[-1] * x.element_size() % 16 == 0 and _begins_aligned(x) for x in _read(problem)
    )


def _read(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.query, problem.key, problem.value


def _begins_aligned(x: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes."""
    strides = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)


def _aligned(problem: Problem) -> Problem:
    """The problem, or where results are to be invariant and only the place of the tensors in memory is against wgmma, one
    whose tensors are copies: another tile would add in another order."""
    if not problem.invariant or _wgmma_allowed(problem):
        return problem
    if any(x.shape[-1] * x.element_size() % 16 for x in _read(problem)):
        return problem
    copies = (x if _begins_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in _read(problem))
    return problem._replace(**dict(zip(("query", "key", "value"), copies, strict=True)))


def _terms(problem: Problem) -> str:
    if problem.biases or problem.dense is not None:
        return "loads"
    if problem.table is not None:
        return "table"
    if problem.slopes is not None:
        return "positions"
    return "stored" if problem.quantized and problem.query.element_size() > 1 else "plain"


def _split_key_value(problem: Problem) -> bool:
    head_dim = max(problem.query.shape[-1], problem.value.shape[-1])
    return config.split_key_value(
        problem.query.element_size(), head_dim, _family(problem.query.device), _terms(problem)
    )


def _family(device: torch.device) -> str:
    return _device(device.index)[0] if device.type == "cuda" else "small"


def _processors(device: torch.device) -> int:
    return _device(device.index)[1] if device.type == "cuda" else 4


@functools.cache
def _device(index: int) -> tuple[str, int]:
    """Family and number of processors of a device."""
    amd = torch.version.hip is not None
    return (
        config.family(torch.cuda.get_device_capability(index), amd),
        torch.cuda.get_device_properties(index).multi_processor_count,
    )


def _on(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
