"""The native backend: attention on CPUs through the compiled library in native/ (forward, backward, decoding).

Storage in fp32, bf16 or fp16, sums and softmax in fp32, as many threads as torch uses. This module packs a `Problem`
into the C structs of native/params.h; masks arrive as key ranges.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from keyspan.backends import Gradients, Needs, Replay, empty_like, template
from keyspan.backends.native import binding
from keyspan.backends.native.binding import DENSE, NUMBERS, POINTERS, use_isa
from keyspan.core.problem import Problem

__all__ = ["use_isa", "reason_against", "forward", "backward", "record_forward", "record_backward"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORED = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""`Stored` of native/params.h."""
MAX_HEAD_DIM = 256
"""Largest head dim; `MAX_HEAD_DIM` in native/pack.h."""
MAX_RANGES = 4
"""Largest number of key ranges of a query row; `MAX_RANGES` in native/plan.h."""


def reason_against(problem: Problem) -> str | None:
    query = problem.query
    if not query.is_cpu:
        return f"it computes on CPUs, and query is on {query.device.type}"
    if binding.WHY_ABSENT is not None:
        return binding.WHY_ABSENT
    if query.dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, and query is {str(query.dtype)[6:]}"
    if problem.quantized:
        for name, x in (("key", problem.key), ("value", problem.value)):
            if x.shape[3] > 1 and x.stride(3) != 1:
                return f"numbers of 8 bits lie side by side in each head, and {name} has strides {x.stride()}"
    elif problem.key.dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, and key is {str(problem.key.dtype)[6:]}"
    if problem.output_dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, and output is {str(problem.output_dtype)[6:]}"
    for bias in problem.biases:
        if bias.dtype not in _DTYPES:
            return f"its dtypes are float32, bfloat16 and float16, and a bias is {str(bias.dtype)[6:]}"
    widest = max(query.shape[-1], problem.value.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}, and this one is {widest}"
    if problem.lo is not None and problem.lo.shape[0] > MAX_RANGES:
        return f"a query row may see up to {MAX_RANGES} ranges of keys, and this mask has {problem.lo.shape[0]}"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    out, lse = _results(problem, problem.shapes)
    _forward(problem, out, lse)
    return out, lse


def record_forward(
    problem: Problem, given: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> tuple[list[Tensor], Replay[list[Tensor]] | None]:
    results = _results(problem, shapes)
    made = [*results, *_results(problem, problem.shapes)[len(results) :]]
    out, lse = (x.view(shape) for x, shape in zip(made, problem.shapes, strict=True))
    call_pointers, numbers = _forward(problem, out, lse)
    if len(results) == 1:  # the library need not write lse
        call_pointers[call_pointers.index(lse.data_ptr())] = 0
    pack = _packer(problem, call_pointers, [*given, *results], numbers)
    if pack is None:
        return results, None
    templates = [template(x, x.shape) for x in results]

    def replay(pointers: list[int], tensors: Sequence[Tensor]) -> list[Tensor]:
        made = [*map(empty_like, templates)]
        _call(binding.FORWARD, pack, [*pointers, *[x.data_ptr() for x in made]])
        return made

    return results, replay


def _results(problem: Problem, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """New tensors for out and lse."""
    dtypes = (problem.output_dtype, torch.float32)
    return [problem.query.new_empty(tuple(shape), dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]


def _forward(problem: Problem, out: Tensor, lse: Tensor) -> tuple[list[int], bytes]:
    """Fills out and lse; returns the pointers and numbers that the library was called with."""
    call = _NativeCall(problem, out, lse)
    pointers, numbers = call.pointers(), call.numbers()
    if lse.numel():
        _run(binding.FORWARD, pointers, numbers)
    return pointers, numbers


def pack_forward(problem: Problem, out: Tensor) -> tuple[bytes, object]:
    """`Params` of a forward pass that fills `out`, without lse, and what must live until it has run."""
    call = _NativeCall(problem, out, out)
    pointers = call.pointers()
    pointers[binding.POINTER_FIELDS.index(("lse", "pointer"))] = 0
    return POINTERS.pack(*pointers, 0, *_state()) + call.numbers(), call


def _packer(
    problem: Problem, call_pointers: Sequence[int], tensors: Sequence[Tensor], numbers: bytes
) -> Callable[[Sequence[int], int], bytes] | None:
    """Packs `Params` of a call again, from the addresses that `tensors` have then and that of a workspace.

    None where the call reads a copy or an array of dense terms.
    """
    if problem.dense is not None or problem.biases or 0 in problem.shapes[1]:
        return None
    own = [x for x in (problem.lo, problem.hi, problem.diagonal, problem.origin) if x is not None]
    given = [x.data_ptr() for x in tensors]
    constants = {0, *(x.data_ptr() for x in own)}
    if not set(call_pointers) <= {*given, *constants}:
        return None
    # Addresses of `tensors` are packed one by one, all between them as bytes that stay the same.
    codes: list[str] = []
    values: list[int | bytes] = []  # an index in `tensors`, or bytes
    for constant, run in itertools.groupby(call_pointers, lambda pointer: pointer not in given):
        listed = list(run)
        if constant:
            values.append(struct.pack(f"={len(listed)}q", *listed))
            codes.append(f"{8 * len(listed)}s")
        else:
            values += map(given.index, listed)
            codes.append(f"{len(listed)}q")
    ends: dict[tuple[int, int], bytes] = {}
    pack = struct.Struct("=" + "".join(codes)).pack
    fixed = [x for x in values if isinstance(x, bytes)]
    places = iter(range(len(tensors), len(tensors) + len(fixed)))
    order = itemgetter(*[next(places) if isinstance(x, bytes) else x for x in values])

    def packed(pointers: Sequence[int], workspace: int) -> bytes:
        state = _state()
        end = None if workspace else ends.get(state)
        if end is None:
            end = struct.pack("=3q", workspace, *state) + numbers
            if not workspace:
                ends[state] = end
        return pack(*order([*pointers, *fixed])) + end

    return packed


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    if not lse.numel():
        return _zero_gradients(problem, needs)
    made, _, _ = _backward(problem, grad_out, grad_lse, out, lse, needs)
    return _reduced(made, _forms(problem))


def record_backward(
    problem: Problem,
    given: Sequence[Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Needs,
) -> tuple[Gradients, Replay[Gradients] | None]:
    if not lse.numel():
        return _zero_gradients(problem, needs), None
    made, call_pointers, numbers = _backward(problem, grad_out, grad_lse, out, lse, needs)
    forms = _forms(problem)
    pack = _packer(problem, call_pointers, [*given, *(x for x in made if x is not None)], numbers)
    if pack is None:
        return _reduced(made, forms), None
    templates = [None if x is None else template(x, x.shape) for x in made]
    first_sum = 1 if problem.block_table is not None else 3

    def replay(pointers: list[int], tensors: Sequence[Tensor]) -> Gradients:
        made = [None if x is None else empty_like(x) for x in templates]
        for x in made[first_sum:]:  # what the library adds to
            if x is not None:
                x.zero_()
        _call(binding.BACKWARD, pack, [*pointers, *[x.data_ptr() for x in made if x is not None]])
        return _reduced(made, forms)

    return _reduced(made, forms), replay


def _backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> tuple[list[Tensor | None], list[int], bytes]:
    """What the library wrote for each differentiable input, and the pointers and numbers that it was called with."""
    query, key, value = problem.query, problem.key, problem.value
    B, M, G, H, _ = query.shape
    call = _NativeCall(problem, out.contiguous(), lse.contiguous())
    biases = list(zip(problem.biases, needs.biases, strict=True))
    # A bias gradient with a row for each query that several batch entries or groups share is summed by one thread.
    by_row = [x for x, needed in biases if needed and x.shape[3] > 1 and x.shape[4] > 1]
    folds = (any(x.shape[0] < B for x in by_row), any(x.shape[1] < G for x in by_row))

    paged = problem.block_table is not None
    dq = torch.empty_like(query, memory_format=torch.contiguous_format) if needs.query else None
    dk, dv = (
        None
        if not needed
        else x.new_zeros(x.shape, dtype=torch.float32)  # sequences may share a page: sums
        if paged
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, needed in ((key, needs.key), (value, needs.value))
    )
    heads = (B, G, H)
    dslopes = lse.new_zeros(heads) if needs.slopes else None
    dtable = lse.new_zeros((*heads, problem.table.shape[-1])) if needs.table and problem.table is not None else None
    dsinks = lse.new_zeros(heads) if needs.sinks else None
    dbiases = [
        # A bias without a row for each query gets a sum for each head.
        None
        if not needed
        else lse.new_zeros((*(x.shape[:3] if x.shape[4] > 1 else heads), M, x.shape[4]))
        if x.shape[3] > 1
        else lse.new_zeros((*heads, 1, x.shape[4]))
        for x, needed in biases
    ]
    pointers = call.pointers(grad_out, grad_lse, (dq, dk, dv, dslopes, dtable, dsinks), dbiases)
    numbers = call.numbers(grad_out, folds)
    _run(binding.BACKWARD, pointers, numbers)
    return [dq, dk, dv, dslopes, dtable, dsinks, *dbiases], pointers, numbers


_Form = tuple[torch.Size, torch.dtype] | None


def _forms(problem: Problem) -> list[_Form]:
    """Shape and dtype of each differentiable input."""
    inputs = (problem.query, problem.key, problem.value, problem.slopes, problem.table, problem.sinks)
    return [None if x is None else (x.shape, x.dtype) for x in (*inputs, *problem.biases)]


def _reduced(made: list[Tensor | None], forms: list[_Form]) -> Gradients:
    """Gradients in shape and dtype of their inputs: summed over what an input broadcasts."""
    dq, dk, dv, dslopes, dtable, dsinks, *dbiases = made

    def cast_like(form: _Form, grad: Tensor | None) -> Tensor | None:
        return grad if form is None or grad is None or grad.dtype == form[1] else grad.to(form[1])

    def like(form: _Form, grad: Tensor | None) -> Tensor | None:
        return None if form is None or grad is None else grad.sum_to_size(form[0]).to(form[1])

    return Gradients(
        dq,
        cast_like(forms[1], dk),
        cast_like(forms[2], dv),
        like(forms[3], dslopes),
        like(forms[4], None if dtable is None else dtable.sum(0)),
        like(forms[5], None if dsinks is None else dsinks.sum(0)),
        [like(form, grad) for form, grad in zip(forms[6:], dbiases, strict=True)],
    )


def _zero_gradients(problem: Problem, needs: Needs) -> Gradients:
    """Gradients of a problem without queries."""

    def zeros(name: str) -> Tensor | None:
        return torch.zeros_like(getattr(problem, name)) if getattr(needs, name) else None

    dense = [torch.zeros_like(x) if needed else None for x, needed in zip(problem.biases, needs.biases, strict=True)]
    return Gradients(
        zeros("query"), zeros("key"), zeros("value"), zeros("slopes"), zeros("table"), zeros("sinks"), dense
    )


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`x` as a contiguous tensor of this dtype."""
    return None if x is None else x.detach().to(dtype).contiguous()


def _strides(x: Tensor) -> list[int]:
    """Strides in elements, 0 where a dimension broadcasts."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


class _NativeCall:
    """Packs one problem into the C structs, and keeps alive the memory that their pointers refer to."""

    lo: Tensor | None = None
    hi: Tensor | None = None
    diagonal: Tensor | None = None
    origin: Tensor | None = None
    sequence: Tensor | None = None
    block_table: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    sinks: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __init__(self, problem: Problem, out: Tensor, lse: Tensor):
        self.problem, self.out, self.lse = problem, out, lse
        if problem.lo is not None:
            self.lo, self.hi, self.diagonal, self.origin = (
                _contiguous(x, torch.int32) for x in (problem.lo, problem.hi, problem.diagonal, problem.origin)
            )
            self.sequence = _contiguous(problem.sequence, torch.int32)
            self.block_table = _contiguous(problem.block_table, torch.int32)
        if problem.slopes is not None or problem.table is not None or problem.sinks is not None:
            self.slopes, self.table, self.sinks = (
                _contiguous(x, torch.float32) for x in (problem.slopes, problem.table, problem.sinks)
            )
        if problem.quantized:
            self.key_scale, self.value_scale = (
                x.new_ones((x.shape[0], 1, x.shape[2]), dtype=torch.float32) if scale is None
                else scale.detach().to(torch.float32).contiguous()
                for x, scale in ((problem.key, problem.key_scale), (problem.value, problem.value_scale))
            )  # fmt: skip
        self.keep_alive: list[object] = []

    def _dense(self, terms: list[tuple[Tensor, Tensor | None]]) -> int:
        """Address of an array of `Dense`: (tensor, sums of its gradient) each."""
        block = b"".join(
            DENSE.pack(
                x.data_ptr(),
                _DTYPES.get(x.dtype, 0),
                *_strides(x),
                _pointer(grad),
                *((0,) * 6 if grad is None else (*_strides(grad), grad.shape[-1])),
            )
            for x, grad in terms
        )
        buffer = ctypes.create_string_buffer(block, len(block))
        self.keep_alive.append(buffer)
        return ctypes.addressof(buffer)

    def pointers(
        self,
        grad_out: Tensor | None = None,
        grad_lse: Tensor | None = None,
        results: tuple[Tensor | None, ...] = (None,) * 6,
        dbiases: list[Tensor | None] | None = None,
    ) -> list[int]:
        """The values of `POINTER_FIELDS` but the workspace; those from `grad_out` on are for backward."""
        problem = self.problem
        grads = [None] * len(problem.biases) if dbiases is None else dbiases
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        self.keep_alive.append(grad_lse)
        tensors = (self.lo, self.hi, self.diagonal, self.origin, self.sequence, self.block_table)
        return [
            *map(_pointer, (problem.query, problem.key, problem.value, *tensors)),
            0 if problem.dense is None else self._dense([(problem.dense, None)]),
            self._dense(list(zip(problem.biases, grads, strict=True))) if grads else 0,
            *map(_pointer, (self.slopes, self.table, self.sinks, self.key_scale, self.value_scale)),
            *map(_pointer, (problem.seed, self.out, self.lse)),
            *map(_pointer, (grad_out, grad_lse, *results)),
        ]  # fmt: skip

    def numbers(self, grad_out: Tensor | None = None, folds: tuple[bool, bool] = (False, False)) -> bytes:
        """The packed values of `NUMBER_FIELDS`."""
        problem = self.problem
        query, key, value, lo, pages = problem.query, problem.key, problem.value, self.lo, self.block_table
        B, M, G, H, K = query.shape
        return NUMBERS.pack(
            _DTYPES[query.dtype], _DTYPES[problem.output_dtype], STORED.get(key.dtype, 0),
            *(1 if x is None else max(1, key.shape[1] // x.shape[1]) for x in (self.key_scale, self.value_scale)),
            B, M, key.shape[1], G, H, K, value.shape[-1],
            *query.stride(), *key.stride(), *value.stride(), *((0,) * 5 if grad_out is None else grad_out.stride()),
            *((1, 1) if lo is None else lo.shape[:2]),
            *((0, 0) if pages is None else pages.shape), problem.page_size,
            len(problem.biases),
            0 if self.slopes is None else int(self.slopes.shape[0] > 1),
            0 if self.table is None else self.table.shape[-1] // 2,
            *folds,
            problem.scale, problem.softcap, problem.dropout_p,
        )  # fmt: skip


def _state() -> tuple[int, int]:
    return binding.isa_number(), torch.get_num_threads()


def _run(function: Any, pointers: Sequence[int], numbers: bytes) -> None:
    """Calls forward or backward."""
    state = _state()
    _call(function, lambda pointers, workspace: POINTERS.pack(*pointers, workspace, *state) + numbers, pointers)


def _call(function: Any, pack: Callable[[Sequence[int], int], bytes], pointers: Sequence[int]) -> None:
    """Calls forward or backward; where it asks for a workspace, again with one from torch's allocator."""
    size = function(pack(pointers, 0))
    if size:
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        function(pack(pointers, workspace.data_ptr()))
