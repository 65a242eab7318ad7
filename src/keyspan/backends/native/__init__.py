"""Attention on CPUs through the compiled library in native/: forward, backward and decoding. Knows no masks.

fp32, bf16 and fp16 storage, fp32 sums and softmax; keys packed once a call; threads as many as torch uses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from keyspan.backends import Again, Gradients, Needs, cast, mould
from keyspan.backends.native import binding
from keyspan.backends.native.binding import ADDRESSES, DENSE, NUMBERS, use_isa
from keyspan.core.problem import Problem

__all__ = ["use_isa", "reason_against", "forward", "record", "backward"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDEST = 256
"""Largest head dim."""
RANGES = 4
"""Most ranges of keys of a query row."""


def reason_against(problem: Problem) -> str | None:
    query = problem.query
    if not query.is_cpu:
        return f"it computes on CPUs, and query is on {query.device.type}"
    if binding.WHY_ABSENT is not None:
        return binding.WHY_ABSENT
    if query.dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, and query is {str(query.dtype)[6:]}"
    if problem.key.dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, and key is {str(problem.key.dtype)[6:]}"
    if problem.output_dtype not in _DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, and output is {str(problem.output_dtype)[6:]}"
    for bias in problem.biases:
        if bias.dtype not in _DTYPES:
            return f"its dtypes are float32, bfloat16 and float16, and a bias is {str(bias.dtype)[6:]}"
    widest = max(query.shape[-1], problem.value.shape[-1])
    if widest > WIDEST:
        return f"head dims go up to {WIDEST}, and this one is {widest}"
    if problem.lo is not None and problem.lo.shape[0] > RANGES:
        return f"a query row may see up to {RANGES} ranges of keys, and this mask has {problem.lo.shape[0]}"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    return _forward(problem)[:2]


def _forward(problem: Problem) -> tuple[Tensor, Tensor, list[int], bytes]:
    """(out, lse), and what the library was given, without what it keeps of dense terms."""
    B, M, G, H, _ = problem.query.shape
    out = torch.empty((B, M, G, H, problem.value.shape[-1]), dtype=problem.output_dtype)
    lse = torch.empty((B, G, H, M), dtype=torch.float32)
    call = _Call(problem, out, lse)
    addresses, numbers = call.addresses(), call.numbers()
    if lse.numel():
        _run(binding.FORWARD, addresses, numbers)
    return out, lse, addresses, numbers


def record(
    problem: Problem, pointers: Sequence[int], shapes: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Again | None]:
    out, lse, addresses, numbers = _forward(problem)
    if problem.dense is not None or problem.biases or not lse.numel():
        return out, lse, None
    moulds = [mould(x, shape) for x, shape in zip((out, lse), shapes, strict=False)]
    # Behind the pointers come those of the results, and for what is absent 0.
    where = {address: n for n, address in reversed([*enumerate([*pointers, out.data_ptr(), lse.data_ptr()])])}
    where[0] = len(pointers) + 2
    if any(address not in where for address in addresses):
        return out, lse, None  # a copy, which must be made every time
    ordered = itemgetter(*(where[address] for address in addresses))

    def again(pointers: list[int]) -> list[Tensor]:
        made = [*map(cast, moulds)]
        addresses = [*pointers, *(x.data_ptr() for x in made), 0, 0]
        _run(binding.FORWARD, ordered(addresses), numbers)
        return made

    return out, lse, again


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    query, key, value = problem.query, problem.key, problem.value
    B, M, G, H, _ = query.shape
    out, lse = out.contiguous(), lse.contiguous()
    if not lse.numel():
        return _nothing(problem, needs)
    call = _Call(problem, out, lse)
    biases = list(zip(problem.biases, needs.biases, strict=True))
    # A gradient that several batches or groups share, and that has a row for each query, is summed by one thread.
    tall = [x for x, needed in biases if needed and x.shape[3] > 1 and x.shape[4] > 1]
    folds = (any(x.shape[0] < B for x in tall), any(x.shape[1] < G for x in tall))
    chunks = call.chunks(folds)

    paged = problem.block_table is not None
    dq = torch.empty_like(query, memory_format=torch.contiguous_format) if needs.query else None
    dk, dv = (
        None
        if not needed
        else x.new_zeros(x.shape, dtype=torch.float32)  # shared pages are added to
        if paged
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, needed in ((key, needs.key), (value, needs.value))
    )
    heads = (chunks, B, G, H)
    dslopes = lse.new_zeros(heads) if needs.slopes else None
    dtable = lse.new_zeros((*heads, problem.table.shape[-1])) if needs.table and problem.table is not None else None
    dsinks = lse.new_zeros(heads) if needs.sinks else None
    dbiases = [
        # A row for each query belongs to one unit of work; what has none gets sums of its own for each unit and head.
        None
        if not needed
        else lse.new_zeros((1, *(x.shape[:3] if x.shape[4] > 1 else (B, G, H)), M, x.shape[4]))
        if x.shape[3] > 1
        else lse.new_zeros((*heads, 1, x.shape[4]))
        for x, needed in biases
    ]
    results = (dq, dk, dv, dslopes, dtable, dsinks)
    addresses = call.addresses(grad_out, grad_lse, results, dbiases)
    _run(binding.BACKWARD, addresses, call.numbers(grad_out, chunks, folds))

    def like(x: Tensor | None, grad: Tensor | None) -> Tensor | None:
        """The sum over chunks, and over what `x` broadcasts, in the dtype of `x`."""
        return None if x is None or grad is None else grad.sum(0).sum_to_size(x.shape).to(x.dtype)

    return Gradients(
        dq,
        None if dk is None else dk.to(key.dtype),
        None if dv is None else dv.to(value.dtype),
        like(problem.slopes, dslopes),
        like(problem.table, None if dtable is None else dtable.sum(1)),
        like(problem.sinks, None if dsinks is None else dsinks.sum(1)),
        [like(x, grad) for x, grad in zip(problem.biases, dbiases, strict=True)],
    )


def _nothing(problem: Problem, needs: Needs) -> Gradients:
    """The gradients where there is no query."""

    def zeros(name: str) -> Tensor | None:
        return torch.zeros_like(getattr(problem, name)) if getattr(needs, name) else None

    dense = [torch.zeros_like(x) if needed else None for x, needed in zip(problem.biases, needs.biases, strict=True)]
    return Gradients(
        zeros("query"), zeros("key"), zeros("value"), zeros("slopes"), zeros("table"), zeros("sinks"), dense
    )


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A contiguous tensor of this dtype."""
    return None if x is None else x.detach().to(dtype).contiguous()


def _strides(x: Tensor) -> list[int]:
    """Strides in elements, 0 where a dimension broadcasts."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


class _Call:
    """One problem as the library takes it. Holds what its pointers point to."""

    lo: Tensor | None = None
    hi: Tensor | None = None
    diagonal: Tensor | None = None
    sequence: Tensor | None = None
    block_table: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    sinks: Tensor | None = None

    def __init__(self, problem: Problem, out: Tensor, lse: Tensor):
        self.problem, self.out, self.lse = problem, out, lse
        if problem.lo is not None:
            self.lo, self.hi, self.diagonal = (
                _plain(x, torch.int32) for x in (problem.lo, problem.hi, problem.diagonal)
            )
            self.sequence, self.block_table = (_plain(x, torch.int32) for x in (problem.sequence, problem.block_table))
        if problem.slopes is not None or problem.table is not None or problem.sinks is not None:
            self.slopes, self.table, self.sinks = (
                _plain(x, torch.float32) for x in (problem.slopes, problem.table, problem.sinks)
            )
        self.kept: list[object] = []

    def _dense(self, terms: list[tuple[Tensor, Tensor | None]]) -> int:
        """Address of an array of dense terms with their gradients."""
        block = b"".join(
            DENSE.pack(
                x.data_ptr(),
                _DTYPES.get(x.dtype, 0),
                *_strides(x),
                _pointer(grad),
                *((0,) * 6 if grad is None else _strides(grad)),
            )
            for x, grad in terms
        )
        buffer = ctypes.create_string_buffer(block, len(block))
        self.kept.append(buffer)
        return ctypes.addressof(buffer)

    def chunks(self, folds: tuple[bool, bool]) -> int:
        """How many runs of rows backward is cut into."""
        addresses = ADDRESSES.pack(*self.addresses(), 0, binding.isa_number(), torch.get_num_threads())
        count: int = binding.LIBRARY.keyspan_backward_chunks(addresses + self.numbers(folds=folds))  # type: ignore[union-attr]
        return count

    def addresses(
        self,
        grad_out: Tensor | None = None,
        grad_lse: Tensor | None = None,
        results: tuple[Tensor | None, ...] = (None,) * 6,
        dbiases: list[Tensor | None] | None = None,
    ) -> list[int]:
        """The pointers of `Params`, without a workspace; those from `grad_out` on are for backward."""
        problem = self.problem
        grads = [None] * len(problem.biases) if dbiases is None else dbiases
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        self.kept.append(grad_lse)
        tensors = (self.lo, self.hi, self.diagonal, self.sequence, self.block_table)
        return [
            *map(_pointer, (problem.query, problem.key, problem.value, *tensors)),
            0 if problem.dense is None else self._dense([(problem.dense, None)]),
            self._dense(list(zip(problem.biases, grads, strict=True))) if grads else 0,
            *map(_pointer, (self.slopes, self.table, self.sinks, problem.seed, self.out, self.lse)),
            *map(_pointer, (grad_out, grad_lse, *results)),
        ]  # fmt: skip

    def numbers(
        self, grad_out: Tensor | None = None, chunks: int = 1, folds: tuple[bool, bool] = (False, False)
    ) -> bytes:
        """The fields of `Params` behind `threads`."""
        problem = self.problem
        query, key, value, lo, pages = problem.query, problem.key, problem.value, self.lo, self.block_table
        B, M, G, H, K = query.shape
        return NUMBERS.pack(
            _DTYPES[query.dtype], _DTYPES[problem.output_dtype],
            B, M, key.shape[1], G, H, K, value.shape[-1],
            *query.stride(), *key.stride(), *value.stride(), *((0,) * 5 if grad_out is None else grad_out.stride()),
            *((1, 1) if lo is None else lo.shape[:2]),
            *((0, 0) if pages is None else pages.shape), problem.page_size,
            len(problem.biases),
            0 if self.slopes is None else int(self.slopes.shape[0] > 1),
            0 if self.table is None else self.table.shape[-1] // 2,
            chunks, *folds,
            problem.scale, problem.softcap, problem.dropout_p,
        )  # fmt: skip


def _run(function: Any, addresses: Sequence[int], numbers: bytes) -> None:
    """Forward or backward, in a workspace from torch's allocator where the library has none large enough."""
    state = binding.isa_number(), torch.get_num_threads()
    size = function(ADDRESSES.pack(*addresses, 0, *state) + numbers)
    if size:
        workspace = torch.empty(size, dtype=torch.uint8)
        function(ADDRESSES.pack(*addresses, workspace.data_ptr(), *state) + numbers)
