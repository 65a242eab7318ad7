"""`attention`, the public function: lookup → check → choose → run."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from keyspan.core.problem import DTYPES, BiasLike, HeadLayout, MaskLike, Options, Problem, make_problem
from keyspan.dispatch import replay
from keyspan.dispatch.cache import lower
from keyspan.dispatch.choose import choose
from keyspan.dispatch.shards import attend_shards, sharded
from keyspan.dispatch.spelling import refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class CallOptions(Options, total=False):
        layout: Literal["bmhk", "bhmk"]
        backend: str | None


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[CallOptions]
) -> Tensor: ...


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[CallOptions]
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *positional: object,
    mask: MaskLike = None,
    bias: BiasLike = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    output_dtype: torch.dtype | None = None,
    invariant: bool = False,
    layout: Literal["bmhk", "bhmk"] = "bmhk",
    backend: str | None = None,
    **unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, `softmax(softcap(scale · Q Kᵀ) + bias, over the visible keys) V`, in memory linear in length.

    The score matrix is never stored, forward or backward. Differentiable in query, key, value, every bias term and
    `sinks`, through the output and through lse; deterministic. Letters: B batch, M queries, N keys, G key/value
    heads, H query heads per group, K key dim, V value dim.

    Args:
        query: `[B, M, Hq, K]`, `[B, M, G, H, K]` or `[B, M, K]` (one head); fp32, fp64, bf16 or fp16; any strides.
            Under autocast query, key and value are cast to the autocast dtype, but for what is stored in 8 bits.
            `float8_e4m3fn` where key and value are.
        key: `[B, N, Hkv, K]` with `Hq % Hkv == 0` (query head h reads key head `h // (Hq // Hkv)`),
            `[B, N, G, H or 1, K]` or `[B, N, K]`. For paged keys `[1, pages·page_size, …]`. In the query's dtype; or,
            for inference, stored as `float8_e4m3fn` or `int8` with a scale, as `keyspan.quantize` makes them. There
            are no gradients then: an input that requires one is an error while grad mode is on.
        value: as key, with V in place of K.
        mask: a layout & visibility, e.g. `Documents(lengths) & Causal()`; the same lowered once, `mask.lower(...)`;
            or a bool tensor broadcastable to the scores, true = visible. `None`: every key is visible.
            A row that sees nothing gets output 0, lse −inf and zero gradients.
        bias: `Alibi`, `RelativeBias`, a floating tensor broadcastable to the scores (`[B, Hq, M, N]`,
            `[B, G, H, M, N]` or `[B, M, N]` as the query's layout), or a sum of them. Added after the scale.
        scale: factor on `Q Kᵀ`; `None` means `K ** -0.5`.
        softcap: `c` replaces a scaled score s by `c · tanh(s / c)` (Gemma 2), before the bias; `None` for none.
        sinks: learned logits `[Hq]` (`[G, H]` for 5-D) of one more key per head whose value is zero (GPT-OSS). lse
            counts them, so a row that sees no key then has lse = sink.
        dropout_p: probability in [0, 1) with which a weight is dropped; the others grow by 1/(1 − p). Applied
            whenever it is not 0. Drawn from torch's generator of the query's device, one number a call.
        key_scale: what stored 8-bit keys are to be multiplied by; `None` for 1 (`float8_e4m3fn`) and for keys that are
            not stored so. One element; or `[B or 1, C, Hkv or 1]` where C divides N, one entry for each run of N / C
            keys as they lie in memory: C = 1 for one per sequence and head, C = N for one per key, C = pages for one
            per page of paged keys. For other layouts key's shape, likewise, without its last dimension. Any floating
            dtype.
        value_scale: the same for values.
        query_scale: the same for an 8-bit query, `[B or 1, C, Hq or 1]` where C divides M.
        return_lse: also return the natural logarithm of the softmax's denominator.
        output_dtype: dtype of the output; `None` means the query's (after autocast), bf16 for an 8-bit query.
        invariant: on a GPU, too, bits of a row's output do not depend on its pack, chunk, batch or layout of keys, and
            those of the gradients of query, key and value not on pack and batch. Plain Triton kernels compute it there,
            not Hopper's, at a cost that the guide "One numerics" has; on a CPU it changes nothing.
        layout: "bhmk" for query, key, value and output with heads before tokens, `[B, H, M, K]`, as torch's
            `scaled_dot_product_attention` has them; they are transposed, not copied. All else is as with "bmhk".
        backend: a name from `keyspan.BACKENDS`, which is then used or refused, never replaced; `None` takes the
            first that has no reason against the problem. `keyspan.explain` tells which and why.

    Query, key and value may be DTensors sharded alike: on the batch, on heads (key heads of 5-D queries), or both,
    evenly. Each rank computes its shard and nothing is sent. Biases and sinks are DTensors then, sharded where they
    have a batch or heads, or plain tensors without gradients that all ranks have, as masks are. Dropout is drawn per
    rank.

    Returns:
        `out` in the query's layout with V in place of K; with `return_lse` also lse, fp32 (fp64 for fp64 inputs), in
        the query's layout without its last dimension and heads before M: `[B, Hq, M]`, `[B, G, H, M]` or `[B, M]`.

    Raises:
        ValueError: for a wrong argument; the message names it, what was got and what was wanted.
        TypeError: for an argument that is not one of these; the message names the right one.
        NotImplementedError: where the backend asked for by name cannot compute the problem, or with `invariant` none.
    """
    if positional or unknown:
        raise refuse(positional, unknown)
    if layout != "bmhk":
        query, key, value = _tokens_first(layout, query, key, value)
    if query is key or key is value or query is value:
        query, key, value = _apart(query, key, value)
    terms = None
    if not sinks is query_scale is key_scale is value_scale is None:
        terms = (sinks, query_scale, key_scale, value_scale)
    numbers = (scale, softcap, dropout_p, bool(return_lse), output_dtype, backend, bool(invariant))
    call = replay.lookup(query, key, value, mask, bias, terms, numbers)
    results = None if call is None else replay.replay(call)
    if results is None and (sharded(query) or sharded(key) or sharded(value)):
        options: dict[str, Any] = {
            "scale": scale, "softcap": softcap, "dropout_p": dropout_p, "invariant": invariant,
        }  # fmt: skip
        results = attend_shards(
            query, key, value, mask, bias, sinks, (query_scale, key_scale, value_scale),
            partial(attention, **options, output_dtype=output_dtype, return_lse=True, backend=backend),
        )  # fmt: skip
    if results is None:
        problem, heads = _checked_problem(
            layout, *autocast_inputs(query, key, value), mask=mask, bias=bias, scale=scale, softcap=softcap,
            sinks=sinks, dropout_p=dropout_p, query_scale=query_scale, key_scale=key_scale, value_scale=value_scale,
            output_dtype=output_dtype, invariant=invariant,
        )  # fmt: skip
        results = replay.compute(call, problem, heads, choose(problem, backend), return_lse)
    out = results[0] if layout == "bmhk" else results[0].transpose(1, 2)
    return (out, results[1]) if return_lse else out


def _tokens_first(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Views `[B, M, H, K]` of `[B, H, M, K]`."""
    if layout != "bhmk":
        raise ValueError(f"layout: got {layout!r}, want 'bmhk' or 'bhmk'")
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != 4:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise ValueError(f"{name}: got {got}, want [B, H, M, K] with layout='bhmk'")
    return tuple(x.transpose(1, 2) for x in tensors)


def _apart(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One tensor in several arguments as a view for each: autograd then adds up their gradients in the order of the
    views, whether a call is replayed or not, so that both have the same bits."""
    x = tensors[1] if tensors[1] is tensors[2] else tensors[0]
    if not torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.requires_grad or x.is_nested:
        return tensors
    return tuple(y.view_as(y) if y is x and x.layout is torch.strided else y for y in tensors)


_MOST_HEADS = 128
"""No model has more heads; a query with more than these, and fewer tokens, is likely `[B, H, M, K]`."""


def _checked_problem(
    layout: str, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[Options]
) -> tuple[Problem, HeadLayout]:
    """`make_problem`, with a hint in its errors where the tensors fit in another layout."""
    try:
        problem, heads = make_problem(query, key, value, lower=lower, **options)
    except ValueError as error:
        raise ValueError(f"{error}{_layout_hint(layout, (query, key, value), options)}") from None
    if heads.dims == 4 and heads.groups * heads.heads > _MOST_HEADS > query.shape[1] > 1 and layout == "bmhk":
        warnings.warn(
            f"query: got {query.shape[1]} tokens of {query.shape[2]} heads; if heads come before tokens, pass "
            "layout='bhmk'",
            stacklevel=3,
        )
    return problem, heads


def _layout_hint(layout: str, tensors: tuple[Any, ...], options: Options) -> str:
    if torch.compiler.is_compiling() or not all(isinstance(x, Tensor) for x in tensors):
        return ""
    try:
        if tensors[0].dim() == 3:
            other, hint = [x[None] for x in tensors], "[tokens, heads, dim] without a batch? pass query[None], …"
        else:
            other = [x.transpose(1, 2) for x in tensors]
            hint = "heads before tokens? pass layout='bhmk'" if layout == "bmhk" else "tokens first? pass layout='bmhk'"
        p = options["dropout_p"]
        undropped: Options = {**options, "dropout_p": 0.0 if isinstance(p, float) and 0 < p < 1 else p}
        make_problem(*other, **undropped)  # draws no random number
    except (ValueError, RuntimeError, IndexError):
        return ""
    return f" ({hint})"


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors in the autocast dtype where autocast is on; fp64, as torch does, and 8 bits are left alone."""
    for x in tensors:
        if not isinstance(x, Tensor) or x.is_meta:  # of which torch knows no autocast
            return tensors
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.dtype in DTYPES and x.dtype != torch.float64 else x for x in tensors)
