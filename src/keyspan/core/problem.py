"""The canonical problem: what every backend is given. The only file that knows the layouts users write.

Letters: B batch, M queries, N keys, G key/value heads, H query heads per group, K key dim, V value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from keyspan.core.biases import Alibi, Bias, DenseBias, RelativeBias, as_bias
from keyspan.core.masks import Combined, Mask, as_mask
from keyspan.core.ranges import KeyRanges

if TYPE_CHECKING:
    from typing_extensions import Unpack

MaskLike: TypeAlias = Mask | KeyRanges | Tensor | None
BiasLike: TypeAlias = Bias | Tensor | None
EVERYTHING = Combined(())
"""The mask that hides nothing, lowered where a bias needs positions."""

_LARGEST = (torch.finfo(torch.float32).max, torch.finfo(torch.float64).max)
"""The largest numbers of the compute dtypes: fp32, and fp64 for a query in fp64."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STORED = (torch.float8_e4m3fn, torch.int8)
"""What keys and values may be stored as, for inference: a stored number times its scale is the true one. The query may
be stored as the first of them, if keys and values are."""
_OF_QUERIES = (*DTYPES, STORED[0])


class Options(TypedDict, total=False):
    """The arguments of `attention` besides query, key and value that make the problem; all may be left out."""

    mask: MaskLike
    bias: BiasLike
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    query_scale: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    output_dtype: torch.dtype | None
    invariant: bool


class Problem(NamedTuple):
    """One attention problem in canonical form; its fields, in this order, are the arguments of the registered op."""

    query: Tensor
    """`[B, M, G, H, K]`, any strides."""
    key: Tensor
    """`[B, N, G, K]`; for paged keys `[1, pages·page_size, G, K]`."""
    value: Tensor
    """`[B, N, G, V]`; for paged keys `[1, pages·page_size, G, V]`."""
    lo: Tensor | None
    """First visible key, int32 `[S, B or 1, M]`; `None` (with `hi` and `diagonal`): every key is visible."""
    hi: Tensor | None
    diagonal: Tensor | None
    origin: Tensor | None
    """First key of the document of each query, int32 `[B or 1, M]`: blocks of keys are counted from it; `None`: 0."""
    sequence: Tensor | None
    """Row of `block_table` of each query, int32 `[M]`, or `None`."""
    block_table: Tensor | None
    dense: Tensor | None
    """bool `[B or 1, G or 1, H or 1, M or 1, N or 1]` or `None`."""
    biases: list[Tensor]
    """Dense terms, each `[B or 1, G or 1, H or 1, M or 1, N or 1]`."""
    slopes: Tensor | None
    """`[B or 1, G, H]`."""
    table: Tensor | None
    """`[G, H, 2R + 1]`."""
    sinks: Tensor | None
    """`[G, H]`."""
    query_scale: Tensor | None
    """`[B, C, G, H]`, any strides: row i of the query, as stored, counts times entry `i // (M / C)`; C divides M."""
    key_scale: Tensor | None
    """`[B, C, G]`, any strides: key j, as it lies in memory, counts times entry `j // (length / C)`."""
    value_scale: Tensor | None
    seed: Tensor | None
    """int64 `[1]` where `dropout_p > 0`."""
    host_row_keys: Tensor | None
    """int64 `[]` on the CPU: `row_keys` in a compiled function; backends get `row_keys` in its place."""
    page_size: int
    row_keys: int
    """As of `KeyRanges`."""
    scale: float
    softcap: float
    """0 for none."""
    dropout_p: float
    output_dtype: torch.dtype
    invariant: bool
    """Whether bits of a row must not depend on its pack, chunk, batch or layout of keys where that costs time."""

    def known(self) -> Problem:
        """The problem with `row_keys` as a number."""
        if self.host_row_keys is None:
            return self
        return self._replace(host_row_keys=None, row_keys=int(self.host_row_keys))

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of out, `[B, M, G, H, V]`, and of lse, `[B, G, H, M]`."""
        B, M, G, H, _ = self.query.shape
        return (B, M, G, H, self.value.shape[-1]), (B, G, H, M)

    @property
    def N(self) -> int:
        """Keys a query can address: logical ones where keys are paged."""
        return self.key.shape[1] if self.block_table is None else self.block_table.shape[1] * self.page_size

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of scores, softmax, accumulators and lse."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def quantized(self) -> bool:
        """Whether keys and values are stored in 8 bits; then there are no gradients."""
        return self.key.dtype in STORED

    @property
    def ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lo, hi, diagonal) over the keys in one row: as they are, or for paged keys over the sequences' logical
        keys laid end to end, `sequence · N + j`; `keys_in_row` says where those lie."""
        if self.lo is None or self.hi is None or self.diagonal is None:
            row = torch.arange(self.query.shape[1], device=self.query.device, dtype=torch.int32).reshape(1, 1, -1)
            lo = torch.zeros_like(row)
            return lo, lo + self.N, row
        # Ranges may be written to after they were checked: they are clamped to the keys there are.
        lo, hi = self.lo.clamp(0, self.N), self.hi.clamp(0, self.N)
        if self.sequence is None or self.block_table is None:
            return lo, hi, self.diagonal
        sequences = self.block_table.shape[0]
        base = self.sequence.long().clamp(0, max(sequences - 1, 0)) * self.N  # may pass 2³¹
        hi = hi if sequences else hi.clamp(max=0)
        return lo + base, hi + base, self.diagonal + base

    @property
    def origin_in_row(self) -> Tensor:
        """The first key of the document of each query in the row that `ranges` counts in, int `[B or 1, M]`."""
        if self.sequence is not None and self.block_table is not None:
            return self.sequence.long().clamp(0, max(self.block_table.shape[0] - 1, 0))[None] * self.N
        if self.origin is not None:
            return self.origin.clamp(0, self.N)
        entries = 1 if self.lo is None else self.lo.shape[1]
        return torch.zeros(entries, self.query.shape[1], dtype=torch.int32, device=self.query.device)

    def keys_in_row(self, first: int, last: int) -> Tensor | None:
        """Physical slots of keys first … last − 1 of the row that `ranges` counts in, int64; None: the same numbers."""
        if self.block_table is None:
            return None
        j = torch.arange(first, last, device=self.block_table.device)
        page = self.block_table.flatten()[j // self.page_size].long()
        slot = page * self.page_size + j % self.page_size
        return slot.clamp(0, max(self.key.shape[1] - 1, 0))

    @property
    def row_length(self) -> int:
        """Number of keys in the row that `ranges` counts in."""
        return self.key.shape[1] if self.block_table is None else self.block_table.shape[0] * self.N

    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible, over batch and query heads. Reads the ranges and a dense mask."""
        B, M, G, H, _ = self.query.shape
        if self.dense is not None:
            return self._visible_in_dense(self.dense)
        if self.lo is None or self.hi is None:
            return B * G * H * M * self.N
        copies = B if self.lo.shape[1] == 1 else 1
        return G * H * copies * int((self.hi - self.lo).sum())

    def _visible_in_dense(self, dense: Tensor, rows: int = 256) -> int:
        """The same, counted pair by pair, some rows at a time."""
        B, M, G, H, _ = self.query.shape
        lo, hi, _ = self.ranges
        j = torch.arange(self.row_length, device=dense.device)
        if dense.shape[-1] > 1:
            dense = dense[..., j % self.N]  # each sequence of paged keys has the same columns
        pairs = 0
        for first in range(0, M, rows):
            part = slice(first, first + rows)
            in_range = ((j >= lo[..., part, None]) & (j < hi[..., part, None])).any(0)[:, None, None]
            visible = in_range & (dense[..., part, :] if dense.shape[3] > 1 else dense)
            pairs += int(visible.sum()) * (B * G * H // math.prod(visible.shape[:3]))
        return pairs


class HeadLayout(NamedTuple):
    """How the user wrote query and output, to give the results back in the same form."""

    dims: int
    groups: int
    heads: int

    def output(self, out: Tensor) -> Tensor:
        """`[B, M, g, h, V]` to `[B, M, V]`, `[B, M, Hq, V]` or `[B, M, G, H, V]`."""
        if self.dims == 3:
            return out[:, :, 0, 0]
        flat = out.flatten(2, 3)
        return flat if self.dims == 4 else flat.unflatten(2, (self.groups, self.heads))

    def shapes(self, problem: Problem) -> tuple[tuple[int, ...], ...]:
        """Of out and lse as `output` and `lse` give them."""
        (B, M, _, _, V), _ = problem.shapes
        heads = {3: (), 4: (self.groups * self.heads,), 5: (self.groups, self.heads)}[self.dims]
        return (B, M, *heads, V), (B, *heads, M)

    def lse(self, lse: Tensor) -> Tensor:
        """`[B, g, h, M]` to `[B, M]`, `[B, Hq, M]` or `[B, G, H, M]`."""
        if self.dims == 3:
            return lse[:, 0, 0]
        flat = lse.flatten(1, 2)
        return flat if self.dims == 4 else flat.unflatten(1, (self.groups, self.heads))


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lower: Callable[[Mask, int, int, int, torch.device], KeyRanges] = lambda mask, *sizes: mask.lower(*sizes),
    **options: Unpack[Options],
) -> tuple[Problem, HeadLayout]:
    """Check what the user gave and bring it into canonical form, without copying where strides allow.

    Args:
        lower: what lowers a mask, given batch, M, N and device; may use a cache.
    """
    mask, bias, sinks = options.get("mask"), options.get("bias"), options.get("sinks")
    dropout_p = options.get("dropout_p", 0.0)
    _check_tensors(query, key, value)
    scales = (
        _by_row("query_scale", options.get("query_scale"), "query", query),
        _by_row("key_scale", options.get("key_scale"), "key", key),
        _by_row("value_scale", options.get("value_scale"), "value", value),
    )
    (q, q_scale), (k, v, k_scale, v_scale), layout = _canonical((query, scales[0]), (key, value, *scales[1:]))
    B, M, G, H, K = q.shape
    if mask is None and bias is not None:
        mask = EVERYTHING
    if isinstance(mask, Tensor):
        _check_strided("mask", mask)
    if isinstance(mask, (Mask, Tensor)):
        ranges: KeyRanges | None = lower(as_mask(mask), B, M, k.shape[1], query.device)
    else:
        ranges = None if mask is None else _checked(mask, B, M, k.shape[1], query.device)
    paged = ranges is not None and ranges.block_table is not None
    N = ranges.block_table.shape[1] * ranges.page_size if paged else k.shape[1]  # type: ignore[union-attr]
    if k.shape[0] != B:
        raise ValueError(f"key: got batch {k.shape[0]}, want {B} as in query")

    biases: list[Tensor] = []
    dense = slopes = table = None
    if bias is not None or (ranges is not None and ranges.dense is not None):
        to_five = Broadcast(layout, B, G, H, M, N)
        dense = None if ranges is None or ranges.dense is None else to_five("mask", ranges.dense)
        biases, slopes, table = _bias_terms(bias, layout, to_five, B, G, H, query.device)
    if sinks is not None:
        _check_head_tensor("sinks", sinks, layout, query.device)
        sinks = sinks.reshape(G, H)
    row_keys = 0 if ranges is None else ranges.row_keys
    if isinstance(row_keys, Tensor) and not torch.compiler.is_compiling():
        row_keys = int(row_keys)
    problem = Problem(
        q,
        k,
        v,
        None if ranges is None else ranges.lo,
        None if ranges is None else ranges.hi,
        None if ranges is None else ranges.diagonal,
        None if ranges is None else ranges.origin,
        None if ranges is None else ranges.sequence,
        None if ranges is None else ranges.block_table,
        dense,
        biases,
        slopes,
        table,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        _seed(dropout_p, query.device),
        row_keys if isinstance(row_keys, Tensor) else None,
        0 if ranges is None else ranges.page_size,
        0 if isinstance(row_keys, Tensor) else row_keys,
        _scale(options.get("scale"), K, query.dtype),
        _softcap(options.get("softcap"), query.dtype),
        float(dropout_p),
        _output_dtype(options.get("output_dtype"), torch.bfloat16 if query.dtype in STORED else query.dtype),
        bool(options.get("invariant", False)),
    )
    if problem.quantized and torch.is_grad_enabled():
        _refuse_gradients(problem)
    return problem, layout


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}, want a tensor")
        _check_strided(name, x)
    # Read once: tensor attributes build a new Python object on each access.
    dtype, device, dims, stored_dtype = query.dtype, query.device, query.dim(), key.dtype
    if dtype not in _OF_QUERIES:
        raise ValueError(f"query: got {dtype}, want one of {names(*_OF_QUERIES)}")
    if stored_dtype != dtype and (stored_dtype not in STORED or dtype not in DTYPES):
        stored = f", or with a scale {names(*STORED)}" if dtype in DTYPES else ""
        raise ValueError(f"key: got {stored_dtype}, want {dtype} as in query{stored}")
    if value.dtype != stored_dtype:
        raise ValueError(f"value: got {value.dtype}, want {stored_dtype} as in key")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.device != device:
            raise ValueError(f"{name}: got a tensor on {x.device}, want {device} as query")
        if x.dim() != dims or not 3 <= dims <= 5:
            want = "[B, M, K], [B, M, H, K] or [B, M, G, H, K]" if name == "query" else f"{dims} dimensions"
            raise ValueError(f"{name}: got shape {list(x.shape)}, want {want}")
        if x.shape[-1] < 1:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want a last dimension ≥ 1")
        if x.shape[1] >= 2**31:
            raise ValueError(f"{name}: got {x.shape[1]} rows, want fewer than 2³¹")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: got shape {list(key.shape)}, want a last dimension of {query.shape[-1]} as in query")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: got {value.shape[1]} keys, want {key.shape[1]} as in key")
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value: got batch {value.shape[0]}, want {key.shape[0]} as in key")


def _check_strided(name: str, x: Tensor) -> None:
    if x.is_nested:
        raise ValueError(f"{name}: got a nested tensor, want a strided one; packed rows and Documents(lengths) as mask")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: got a tensor of layout {x.layout}, want a strided one (x.to_dense())")


def names(*dtypes: torch.dtype) -> str:
    """Dtypes as an error message lists them."""
    return ", ".join(str(dtype)[6:] for dtype in dtypes)


def _by_row(name: str, scale: Tensor | None, of: str, x: Tensor) -> Tensor | None:
    """A scale as `x` without its last dimension, but for the rows, of which a run shares an entry: `[B, C, …]`."""
    if scale is None:
        if x.dtype == torch.int8:
            raise ValueError(f"{name}: got None, want a tensor: {of} is int8")
        return None
    if not isinstance(scale, Tensor) or scale.dtype not in DTYPES:
        got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"{name}: got {got}, want a tensor of {names(*DTYPES)}")
    if x.dtype not in STORED:
        raise ValueError(f"{name}: got a tensor, want None: {of} is {x.dtype}, which counts as it is")
    if scale.device != x.device:
        raise ValueError(f"{name}: got a tensor on {scale.device}, want {x.device} as {of}")
    B, length, *heads = x.shape[:-1]
    shape = (1,) * (2 + len(heads)) if scale.numel() == 1 else tuple(scale.shape)
    fits = len(shape) == 2 + len(heads) and shape[1] >= 1 and length % shape[1] == 0
    if not fits or any(not _broadcasts(n, m) for n, m in zip((shape[0], *shape[2:]), (B, *heads), strict=True)):
        want = ", ".join([f"{B} or 1", "C", *(f"{n} or 1" for n in heads)])
        raise ValueError(
            f"{name}: got shape {list(scale.shape)}, want one element or [{want}] where C divides the {length} rows "
            f"of {of}"
        )
    return scale.reshape(shape).expand(B, -1, *heads)


def _broadcasts(size: int, want: int) -> bool:
    """Whether `size` is 1 or `want`. Not `in`: there torch's compiler tells a number from a symbol equal to it."""
    if size == 1:
        return True
    return size == want


_Rows = tuple[Tensor, Tensor | None]
_Keys = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _canonical(rows: _Rows, keys: _Keys) -> tuple[_Rows, _Keys, HeadLayout]:
    """Query and its scale, keys, values and their scales with heads as `[G, H]` and `[G]`."""
    query, query_scale = rows
    key, value, key_scale, value_scale = keys
    if query.dim() == 3:
        layout = HeadLayout(3, 1, 1)
    elif query.dim() == 4:
        Hq, G = query.shape[2], key.shape[2]
        if value.shape[2] != G:
            raise ValueError(f"value: got {value.shape[2]} heads, want {G} as in key")
        if G < 1 or Hq < 1 or Hq % G:
            raise ValueError(f"key: got {G} heads, want a divisor of query's {Hq} heads")
        layout = HeadLayout(4, G, Hq // G)
    else:
        G, H = query.shape[2:4]
        for name, x in (("key", key), ("value", value)):
            if x.shape[2] != G or not _broadcasts(x.shape[3], H) or min(G, H) < 1:
                raise ValueError(f"{name}: got heads {list(x.shape[2:4])}, want [{G}, {H}] as in query, or [{G}, 1]")
        layout = HeadLayout(5, G, H)
    shared = layout.dims < 5 or all(x is None or _shared_by_group(x) for x in keys)

    def of_query(x: Tensor) -> Tensor:
        """`[B, M, …]` to `[B, M, G, H]`, whatever follows."""
        if layout.dims == 3:
            return x[:, :, None, None]
        if layout.dims == 5:
            return x if shared else x.flatten(2, 3).unsqueeze(3)
        return x.view(*x.shape[:2], layout.groups, layout.heads, *x.shape[3:])

    def of_keys(x: Tensor) -> Tensor:
        """`[B, N, …]` to `[B, N, G]`, whatever follows."""
        if layout.dims == 3:
            return x[:, :, None]
        if layout.dims == 4:
            return x
        if shared:
            return x[:, :, :, 0]
        return x.expand(-1, -1, layout.groups, layout.heads, *x.shape[4:]).flatten(2, 3)

    return (
        (of_query(query), None if query_scale is None else of_query(query_scale)),
        (
            of_keys(key),
            of_keys(value),
            None if key_scale is None else of_keys(key_scale),
            None if value_scale is None else of_keys(value_scale),
        ),
        layout,
    )


def _refuse_gradients(problem: Problem) -> None:
    """8-bit inputs have no gradients: ValueError where an input requires one, which would silently get none."""
    names = ("query", "key", "value", "slopes", "table", "sinks", "query_scale", "key_scale", "value_scale")
    tensors = [(name, getattr(problem, name)) for name in names] + [("bias", x) for x in problem.biases]
    for name, x in tensors:
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, want none, or torch.no_grad(): there are no gradients "
                f"where keys are {problem.key.dtype}"
            )


def _shared_by_group(x: Tensor) -> bool:
    """Whether the query heads of a group read the same keys, so that those of one head stand for all.

    An expanded tensor that needs a gradient is not collapsed: its gradient has an entry for every head.
    """
    return x.shape[3] == 1 or (x.stride(3) == 0 and not (x.requires_grad and torch.is_grad_enabled()))


def _checked(mask: KeyRanges, B: int, M: int, N: int, device: torch.device) -> KeyRanges:
    """Ranges that a user lowered or made, for these sizes."""
    if not isinstance(mask, KeyRanges):
        raise ValueError(
            f"mask: got {getattr(mask, '__name__', type(mask).__name__)}, "  # that of a class that was not called
            "want a mask such as Causal(), KeyRanges, a bool tensor or None"
        )
    for x in (mask.lo, mask.hi, mask.diagonal):
        if x.dim() != 3 or x.shape[2] != M or not _broadcasts(x.shape[1], B) or x.shape != mask.lo.shape:
            raise ValueError(f"mask: got ranges of shape {list(x.shape)}, want [S, {B} or 1, {M}], all alike")
        if x.dtype != torch.int32:  # checked at construction, but `x.data` may have been assigned to since
            raise ValueError(f"mask: got ranges of {x.dtype}, want int32")
        if x.device != device:
            raise ValueError(f"mask: got ranges on {x.device}, want {device} as query")
    mask.__post_init__()  # tensors may have been resized or exchanged since it was made
    if mask.keys is None:
        stop = N if mask.block_table is None else mask.block_table.shape[1] * mask.page_size
        lo = mask.lo.clamp(0, stop)
        return replace(mask, lo=lo, hi=torch.maximum(mask.hi.clamp(max=stop), lo), keys=N)
    if mask.keys != N:
        raise ValueError(f"mask: got ranges lowered for N = {mask.keys} keys, want N = {N} as in key")
    return mask


class Broadcast:
    """Views a tensor broadcastable to the user's score matrix as `[B|1, g|1, h|1, M|1, N|1]`."""

    def __init__(self, layout: HeadLayout, B: int, g: int, h: int, M: int, N: int):
        self.layout, self.groups, self.per_group = layout, g, h
        heads = {3: (), 4: (layout.groups * layout.heads,), 5: (layout.groups, layout.heads)}[layout.dims]
        self.want = (B, *heads, M, N)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        want = self.want
        _check_strided(name, x)
        fits = x.dim() <= len(want) and all(_broadcasts(a, b) for a, b in zip(x.shape[::-1], want[::-1], strict=False))
        if not fits:
            padding = name == "mask" and x.shape == (want[0], want[-1])
            hint = "; a padding mask [B, N]? keyspan.KeyLengths.from_padding_mask(mask)" if padding else ""
            raise ValueError(f"{name}: got shape {list(x.shape)}, want one broadcastable to {list(want)}{hint}")
        x = x.reshape((1,) * (len(want) - x.dim()) + tuple(x.shape))
        if self.layout.dims == 3:
            return x[:, None, None]
        if self.layout.dims == 4:
            return x[:, :, None] if x.shape[1] == 1 else x.unflatten(1, (self.groups, self.per_group))
        if (self.groups, self.per_group) == (self.layout.groups, self.layout.heads):
            return x
        # The heads were merged into groups of one; a bias that broadcasts over only one of the two is expanded.
        if x.shape[1] == x.shape[2] == 1:
            return x
        heads = (self.layout.groups, self.layout.heads)
        return x.expand(-1, *heads, -1, -1).flatten(1, 2).unsqueeze(2)


def _bias_terms(
    bias: Bias | Tensor | None,
    layout: HeadLayout,
    to_five: Broadcast,
    B: int,
    G: int,
    H: int,
    device: torch.device,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Dense terms, and the sum of all ALiBi slopes and of all relative tables: both terms are linear in those."""
    biases: list[Tensor] = []
    slopes: Tensor | None = None
    table: Tensor | None = None
    for term in () if bias is None else as_bias(bias).terms:
        if isinstance(term, DenseBias):
            if term.values.device != device:
                raise ValueError(f"bias: got a tensor on {term.values.device}, want {device} as query")
            biases.append(to_five("bias", term.values))
        elif isinstance(term, Alibi):
            _check_head_tensor("slopes", term.slopes, layout, device, batch=B)
            batched = term.slopes.numel() != G * H
            more = term.slopes.reshape(B if batched else 1, G, H)
            slopes = more if slopes is None else slopes + more
        elif isinstance(term, RelativeBias):
            _check_head_tensor("table", term.table[..., 0], layout, device)
            more = term.table.reshape(G, H, -1)
            table = more if table is None else _sum_tables(table, more)
    return biases, slopes, table


def _sum_tables(a: Tensor, b: Tensor) -> Tensor:
    """The table of the sum of two relative biases: the shorter one goes on with its end values."""
    reach = max(a.shape[-1], b.shape[-1]) // 2

    def stretched(t: Tensor) -> Tensor:
        index = torch.arange(-reach, reach + 1, device=t.device).clamp(-(t.shape[-1] // 2), t.shape[-1] // 2)
        return t[..., index + t.shape[-1] // 2]

    return stretched(a) + stretched(b)


def _check_head_tensor(
    name: str, x: Tensor, layout: HeadLayout, device: torch.device, batch: int | None = None
) -> None:
    """One value per query head: [Hq], [G, H], and with `batch` also with a leading batch dimension."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(
            f"{name}: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, want a floating tensor"
        )
    _check_strided(name, x)
    heads: list[list[int]] = [[layout.groups * layout.heads]]
    if layout.dims == 5:
        heads.append([layout.groups, layout.heads])
    if batch is not None:
        heads += [[batch, *shape] for shape in heads]
    # Not `in`: torch's compiler takes a number and a symbol for two things there, though they are equal.
    if not any(list(x.shape) == shape for shape in heads):
        raise ValueError(f"{name}: got shape {list(x.shape)} (heads), want {' or '.join(map(str, heads))}")
    if x.device != device:
        raise ValueError(f"{name}: got a tensor on {x.device}, want {device} as query")


def _scale(scale: float | None, K: int, query: torch.dtype) -> float:
    if scale is None:
        return 1 / math.sqrt(K)
    largest = _LARGEST[query == torch.float64]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= largest:
        raise ValueError(f"scale: got {scale!r}, want a number up to ±{largest:.1e}, or None (K^-½)")
    return float(scale)


def _softcap(softcap: float | None, query: torch.dtype) -> float:
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap!r}, want a finite number > 0 or None")
    # A cap above every score of the compute dtype changes none.
    return 0.0 if softcap > _LARGEST[query == torch.float64] else float(softcap)


def check_dropout(dropout_p: float) -> None:
    """A ValueError for what is no probability in [0, 1)."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p!r}, want a probability in [0, 1)")


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    check_dropout(dropout_p)
    return torch.randint(2**62, (1,), device=device, dtype=torch.int64) if dropout_p else None


def _output_dtype(output_dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if output_dtype is not None and output_dtype not in DTYPES:
        raise ValueError(f"output_dtype: got {output_dtype}, want one of {names(*DTYPES)}")
    return default if output_dtype is None else output_dtype
