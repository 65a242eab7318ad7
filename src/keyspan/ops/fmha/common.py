"""Converts xFormers' arguments to those of `keyspan.attention`, and results back.

The operator classes that users pass as `op=` are hints: they change the form of some results, never the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from keyspan.core.biases import Bias
from keyspan.core.checks import check_tensor, check_type
from keyspan.core.masks import Mask
from keyspan.core.merge import merge
from keyspan.core.problem import DTYPES, HeadLayout, Problem, make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import attention, autocast_inputs
from keyspan.dispatch.cache import lower
from keyspan.dispatch.choose import choose
from keyspan.dispatch.op import attend
from keyspan.ops.common import BaseOperator
from keyspan.ops.fmha import attn_bias as masks
from keyspan.ops.fmha.attn_bias import AttentionBias

NO_PACKED_KEYS = (
    "keys packed as int4 or fp8 in int32 are left out; see keyspan.quantize, key_scale and value_scale of "
    "keyspan.attention"
)

Biases = AttentionBias | Mask | KeyRanges | Tensor | Bias | None


@dataclass
class Inputs:
    """The arguments of one attention call, B batch, M queries, N keys, G groups, H heads, K key dim, V value dim.

    Attributes:
        query: `[B, M, H, K]`, `[B, M, G, H, K]` or `[B, M, K]`.
        key: `[B, N, H or a divisor, K]`, `[B, N, G, H or 1, K]` or `[B, N, K]`.
        value: as key, with V in place of K.
        attn_bias: a mask of `attn_bias`, or a tensor broadcastable to `[B, H, M, N]` (`[B, G, H, M, N]`,
            `[B, M, N]`), added to the scores if floating, true = visible if bool; or any mask or bias of `keyspan`.
        p: dropout probability; `scale`: factor on Q·Kᵀ, `None` for K^-½; `output_dtype`: `None` for the query's.
        is_partial: whether `out` is to be merged with others.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Biases = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def scale_float(self) -> float:
        return float(self.query.shape[-1]) ** -0.5 if self.scale is None else float(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of query, key and value, without the bias."""
        return sum(x.untyped_storage().nbytes() for x in (self.query, self.key, self.value))

    def get_output_dtype(self) -> torch.dtype:
        if self.output_dtype is not None:
            return self.output_dtype
        return torch.float32 if self.is_partial and self.query.dtype != torch.float64 else self.query.dtype

    def get_qkv_in_bmghk(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as `[B, M, G, H, K]`."""
        return self._with_dims(self.query, 5), self._with_dims(self.key, 5), self._with_dims(self.value, 5)

    def normalize_bmhk(self) -> tuple[int, ...]:
        """Reshape 3-D inputs to `[B, M, 1, K]`, in place; returns the output's shape before that."""
        shape = (*self.query.shape[:-1], self.value.shape[-1])
        if self.query.dim() == 3:
            self.query, self.key, self.value = (self._with_dims(x, 4) for x in (self.query, self.key, self.value))
            if isinstance(self.attn_bias, Tensor) and self.attn_bias.dim() == 3:
                self.attn_bias = self.attn_bias[:, None]
        return shape

    @staticmethod
    def _with_dims(x: Tensor, dims: int) -> Tensor:
        return x if x.dim() >= dims else x.reshape(*x.shape[:2], *[1] * (dims - x.dim()), *x.shape[2:])

    def validate_inputs(self) -> None:
        """Raise ValueError for wrong arguments."""
        self._check_dropout()
        replace(self, p=0.0).canonical()  # no dropout: the check must not draw a seed

    def _check_dropout(self) -> None:
        try:
            fits = 0 <= self.p <= 1
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"p: got {self.p!r}, want a probability in [0, 1]")

    def canonical(self) -> tuple[Problem, HeadLayout]:
        """The problem for keyspan's backends, and the layout of its results."""
        query, key, value, terms = self.arguments()
        dropout_p = float(self.p) % 1
        try:
            return make_problem(*autocast_inputs(query, key, value), lower=lower, **terms, dropout_p=dropout_p)
        except ValueError as error:
            raise _in_xformers_words(error) from None

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Query, key, value and the keyword arguments of `keyspan.attention`, without dropout."""
        for name, x in (("query", self.query), ("key", self.key), ("value", self.value)):
            check_type(name, x, Tensor)
            if x.dim() < 3:
                raise ValueError(f"{name}: got shape {list(x.shape)}, want [B, M, K], [B, M, H, K] or [B, M, G, H, K]")
            if x.dtype == torch.int32:  # xFormers' quantised cache
                raise ValueError(f"{name}: got {x.dtype}, want a floating dtype: {NO_PACKED_KEYS}")
        value = self._with_heads(self.value)
        if self.p == 1:
            # All weights are dropped: the output and the gradients are 0, and lse is unchanged.
            value = value.masked_fill(value.new_ones((), dtype=torch.bool), 0)
        mask, bias = self._mask_and_bias()
        if getattr(self.scale, "requires_grad", False) and torch.is_grad_enabled():
            raise ValueError(
                "scale: got a tensor that requires a gradient, want a number: multiply query by it and pass scale=1.0"
            )
        try:
            scale = None if self.scale is None else float(self.scale)
        except (TypeError, ValueError):
            raise ValueError(f"scale: got {self.scale!r}, want a number or None") from None
        terms = {"mask": mask, "bias": bias, "scale": scale, "output_dtype": self.output_dtype}
        return self.query, self._with_heads(self.key), value, terms

    def _with_heads(self, x: Tensor) -> Tensor:
        """Expand key or value where it has one head (or group) and the other (or the query) has more."""
        if x.dim() == 4 and self.key.dim() == self.value.dim() == 4 and x.shape[2] == 1:
            return x.expand(-1, -1, max(self.key.shape[2], self.value.shape[2]), -1)
        if x.dim() == 5 and self.query.dim() == 5 and x.shape[2] == 1:
            return x.expand(-1, -1, self.query.shape[2], -1, -1)
        return x

    def _mask_and_bias(self) -> tuple[Mask | KeyRanges | Tensor | None, Bias | Tensor | None]:
        given = self.attn_bias
        if isinstance(given, AttentionBias) and type(given).materialize is not AttentionBias.materialize:
            B, M, *heads, _ = self.query.shape
            given = given.materialize((B, *heads, M, self.key.shape[1]), self.query.dtype, self.device)
        if isinstance(given, AttentionBias):
            if given.device not in (None, self.device):
                raise ValueError(f"attn_bias: got a mask on {given.device}, want {self.device} as query (mask.to(...))")
            ranges = given.lowered(self.query.shape[0], self.query.shape[1], self.key.shape[1], self.device)
            if given.visible is not None:
                ranges = replace(ranges, dense=self._for_heads(given.visible))
            added = given.added
            return ranges, self._for_heads(added) if isinstance(added, Tensor) else added
        if isinstance(given, Tensor):
            tensor = self._for_heads(given)
            return (tensor, None) if tensor.dtype == torch.bool else (None, tensor)
        if given is None or isinstance(given, (Mask, KeyRanges)):
            return given, None
        if isinstance(given, Bias):
            return None, given
        raise ValueError(f"attn_bias: got {type(given).__name__}, want a mask of attn_bias, a tensor or None")

    def _for_heads(self, bias: Tensor) -> Tensor:
        """A bias `[B, G·H or 1, M, N]` of a 5-D query as `[B, G, H, M, N]`."""
        if self.query.dim() != 5 or bias.dim() != 4:
            return bias
        G, H = self.query.shape[2:4]
        return bias.unflatten(1, (G, H)) if bias.shape[1] == G * H else bias.unsqueeze(1)


@dataclass
class Context:
    """The results of forward that backward needs: lse `[B, H, M]`, the output, and the dropout seed."""

    lse: Tensor
    out: Tensor
    op_bw: type[AttentionBwOpBase] | None = None
    rng_state: Any = None
    qkv_share_storage: bool = False

    def get_padded_lse(self, pad_to: int, force_pad_inf: bool = False) -> Tensor:
        """lse padded with +inf to a multiple of `pad_to`; with `force_pad_inf`, everything behind the output's M."""
        lse, M = self.lse, self.out.shape[1]
        if force_pad_inf:
            # As in xFormers, an lse of a fitting size keeps it.
            lse = lse[..., :M] if lse.shape[-1] % pad_to else lse
            lse = lse.masked_fill(torch.arange(lse.shape[-1], device=lse.device) >= M, math.inf)
        return pad(lse, (0, -lse.shape[-1] % pad_to), value=math.inf)


@dataclass
class Gradients:
    """Gradients of query, key, value, and of a bias tensor that requires one."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    db: Tensor | None = None


def forward(inp: Inputs) -> tuple[Tensor, Context]:
    """(out, context); differentiable where grad mode is on."""
    seed = None
    inp._check_dropout()
    if 0 < inp.p < 1:
        problem, layout = inp.canonical()
        out, lse = attend(problem, choose(problem, None))
        out, lse, seed = layout.output(out), layout.lse(lse), problem.seed
    else:
        query, key, value, terms = inp.arguments()
        try:
            out, lse = attention(query, key, value, **terms, return_lse=True)
        except ValueError as error:
            raise _in_xformers_words(error) from None
    return out, Context(lse[:, None] if out.dim() == 3 else lse, out, rng_state=seed)


def _in_xformers_words(error: ValueError) -> ValueError:
    """The error with `attn_bias` in place of `mask` or `bias`, keyspan's names of the argument."""
    name, colon, rest = str(error).partition(":")
    return ValueError(f"attn_bias:{rest}") if colon and name in ("mask", "bias") else error


def partial(inp: Inputs, op: AttentionOp | FwOp) -> tuple[Tensor, Tensor]:
    """(out, lse) over some of the keys (`inp.is_partial`); in fp32 for some operators, as in xFormers."""
    if isinstance(op, tuple):
        check_pair(op)
        op = op[0]
    check_op(op, AttentionFwOpBase)
    if op is not None and op.PARTIAL_IN_FLOAT32:
        inp = replace(inp, output_dtype=inp.get_output_dtype())
    out, context = forward(inp)
    return out, context.lse


def backward(ctx: Context, inp: Inputs, grad: Tensor) -> Gradients:
    """Gradients of query, key, value and a bias tensor that requires one, from `ctx.out` and `ctx.lse`.

    Both may come from a merged attention. `ctx.lse` is `[B, H, M]`, or for a packed mask
    `[sequences, H, padded M]` in CUTLASS's form.
    """
    inp._check_dropout()
    check_type("grad", grad, Tensor)
    check_type("lse", ctx.lse, Tensor)
    for name, x in (("output", ctx.out), ("query", inp.query), ("key", inp.key), ("value", inp.value)):
        check_tensor(name, x)
    if ctx.lse.dim() < 3:
        raise ValueError(f"lse: got shape {list(ctx.lse.shape)}, want [B, H, M] or [B, G, H, M]")
    if ctx.out.shape[-1:] != inp.value.shape[-1:]:
        raise ValueError(
            f"value: got shape {list(inp.value.shape)}, want the last size of output {list(ctx.out.shape)}"
        )
    if ctx.out.shape != grad.shape or grad.shape[:-1] != inp.query.shape[:-1]:
        raise ValueError(
            f"grad: got shape {list(grad.shape)}, with output {list(ctx.out.shape)} and query {list(inp.query.shape)}, "
            "want the output's shape, which is the query's but for the last dimension"
        )
    dropped = 0 < inp.p < 1
    with torch.enable_grad():
        q, k, v = leaves = [x.detach().requires_grad_() for x in (inp.query, inp.key, inp.value)]
        problem, _ = replace(inp, query=q, key=k, value=v, p=0.0 if dropped else inp.p).canonical()
    if dropped:
        if ctx.rng_state is None:
            raise ValueError("lse: got one without a dropout seed, want that of the forward with the same p")
        problem = problem._replace(seed=ctx.rng_state, dropout_p=float(inp.p))
    B, M, G, H, _ = problem.query.shape
    lse = unpadded(ctx.lse, inp.attn_bias, B, M)
    if lse.numel() != B * G * H * M:
        raise ValueError(f"lse: got shape {list(ctx.lse.shape)}, want that of the forward of query {list(q.shape)}")
    lse = lse.reshape(B, G, H, M).to(problem.compute_dtype)
    out, grad = (x.reshape(B, M, G, H, problem.value.shape[-1]) for x in (ctx.out, grad))
    bias = inp.attn_bias.added if isinstance(inp.attn_bias, AttentionBias) else inp.attn_bias
    dense = [bias] if isinstance(bias, Tensor) and bias.requires_grad else []
    needs = [True, True, True, False, False, False] + [bool(dense)] * len(problem.biases)
    with torch.no_grad():
        grads = torch.ops.keyspan.attention_backward(grad, None, out, lse, *problem, needs, choose(problem, None))
    # torch differentiates the views from the user's layout to the problem's.
    canonical = [problem.query, problem.key, problem.value, *(problem.biases if dense else ())]
    given = [*grads[:3], *(grads[6:] if dense else ())]
    return Gradients(*torch.autograd.grad(canonical, [*leaves, *dense], given))


def merged(attn: Sequence[Tensor], lse: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from parts over disjoint sets of keys, in xFormers' layouts; out in attn's dtype.

    Weights and sums are in lse's dtype (fp32 or fp64), so the result is rounded once.
    """
    if len(attn) != len(lse):
        raise ValueError(f"lse_split: got {len(lse)} parts, want {len(attn)} as in attn_split")
    if not attn:
        raise ValueError("attn_split: No partials to merge")
    one_head = attn[0].dim() == 3  # its lse is [B, 1, M]
    parts = [(a.unsqueeze(2) if one_head else a, s) for a, s in zip(attn, lse, strict=True)]
    out, total = merge([(a.to(s.dtype), s) for a, s in parts])
    return (out.squeeze(2) if one_head else out).to(dtype or attn[0].dtype), total


def padded(lse: Tensor, attn_bias: Biases) -> Tensor:
    """lse `[1, H, ΣM]` of a packed mask in CUTLASS's form `[sequences, H, longest rounded up to 32]`, padded with +inf.

    That form has no batch dimension, so a batch of packed rows, which CUTLASS refuses, keeps `[B, H, ΣM]`.
    """
    starts = _starts(attn_bias)
    if starts is None or len(lse) != 1:
        return lse
    longest = max((end - start for start, end in pairwise(starts)), default=0)
    width = math.ceil(longest / 32) * 32
    rows = [pad(lse[0, ..., a:b], (0, width - (b - a)), value=math.inf) for a, b in pairwise(starts)]
    return torch.stack(rows) if rows else lse[:0]


def unpadded(lse: Tensor, attn_bias: Biases, batch: int, M: int) -> Tensor:
    """The inverse of `padded`; a packed lse is returned unchanged."""
    starts = _starts(attn_bias)
    if starts is None or batch != 1 or (len(lse) == 1 and lse.shape[-1] == M):
        return lse[..., :M]
    if len(lse) != len(starts) - 1:
        raise ValueError(f"lse: got {len(lse)} rows, want 1 (packed) or {len(starts) - 1}, one a sequence (padded)")
    return torch.cat([row[..., : b - a] for row, (a, b) in zip(lse, pairwise(starts), strict=True)], -1)[None]


def _starts(attn_bias: Biases) -> Sequence[int] | None:
    while isinstance(attn_bias, masks.MaskWithBias):
        attn_bias = attn_bias.mask
    return attn_bias.q_seqinfo.starts if isinstance(attn_bias, masks.VARLEN_BIASES) else None


class AttentionOpBase(BaseOperator):
    """An operator of xFormers. Keyspan chooses its backend itself, so all operators compute the same."""

    NAME: ClassVar[str] = "keyspan"
    OPERATOR_CATEGORY: ClassVar[str] = "memory_efficient_attention"
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cpu", "cuda", "mps", "mtia", "xpu"}
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = set(DTYPES)
    SUPPORTED_MAX_K: ClassVar[float] = math.inf
    SUPPORTED_MIN_K: ClassVar[int] = 1
    SUPPORTED_ATTN_BIAS_TYPES: ClassVar[tuple[type, ...]] = (type(None), Tensor, *masks.MASK_CLASSES)
    SUPPORTS_DROPOUT: ClassVar[bool] = True
    SUPPORTS_CUSTOM_SCALE: ClassVar[bool] = True
    SUPPORTS_DIFFERENT_VALUE_EMBED: ClassVar[bool] = True
    SUPPORTS_BMGHK: ClassVar[bool] = True
    SUPPORTS_PARTIAL: ClassVar[bool] = True
    SUPPORTS_OUTPUT_DTYPE: ClassVar[bool] = True
    SUPPORTS_ATTN_BIAS_GRAD: ClassVar[bool] = True
    IS_DETERMINISTIC: ClassVar[bool] = True
    VARLEN_LSE_PACKED: ClassVar[bool] = True
    PARTIAL_IN_FLOAT32: ClassVar[bool] = False
    """Whether partial results of this operator are fp32 instead of the query's dtype."""
    CUDA_MINIMUM_COMPUTE_CAPABILITY: ClassVar[tuple[int, int]] = (0, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY: ClassVar[tuple[int, int] | None] = None
    ERROR_ATOL: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-8, torch.float32: 3e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2,
    }  # fmt: skip
    ERROR_RTOL: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-8, torch.float32: 2e-5, torch.float16: 4e-4, torch.bfloat16: 5e-3,
    }  # fmt: skip
    _TEST_BATCH_SIZES: ClassVar[list[int]] = [1, 300]
    _TEST_K: ClassVar[list[int]] = [32, 128]

    @classmethod
    def supports(cls, d: Inputs) -> bool:
        """Whether keyspan can compute these inputs."""
        return not cls.not_supported_reasons(d)

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        """Why keyspan cannot compute these inputs; empty where it can."""
        try:
            d.validate_inputs()
        except ValueError as reason:
            return [str(reason)]
        return []

    @classmethod
    def shape_not_supported_reasons(cls, Mq: int, Mkv: int, K: int, Kv: int) -> list[str]:
        """Empty: every shape is supported."""
        return []


class AttentionFwOpBase(AttentionOpBase):
    """The forward half of an operator of xFormers."""

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[Tensor, Context | None]:
        with torch.no_grad():
            out, context = forward(inp)
        if not cls.VARLEN_LSE_PACKED:
            context.lse = padded(context.lse, inp.attn_bias)
        return out, context if needs_gradient else None


class AttentionBwOpBase(AttentionOpBase):
    """The backward half of an operator of xFormers."""

    ERROR_ATOL: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-8, torch.float32: 9e-4, torch.float16: 0.2, torch.bfloat16: 0.9,
    }  # fmt: skip
    ERROR_RTOL: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1,
    }  # fmt: skip

    @classmethod
    def apply(cls, ctx: Context, inp: Inputs, grad: Tensor) -> Gradients:
        return backward(ctx, inp, grad)


AttentionOp = tuple[type[AttentionFwOpBase] | None, type[AttentionBwOpBase] | None] | None
FwOp = type[AttentionFwOpBase] | None


def check_op(op: object, base: type[AttentionOpBase]) -> None:
    """Raise ValueError unless `op` is None or a subclass of `base`."""
    if op is not None and not (isinstance(op, type) and issubclass(op, base)):
        half = "FwOp" if base is AttentionFwOpBase else "BwOp"
        raise ValueError(f"op: got {op!r}, want None or an operator's {half}")


def check_pair(op: object) -> None:
    """Raise ValueError unless `op` is None or a pair (forward, backward) of operators or None."""
    if op is None:
        return
    if not isinstance(op, (tuple, list)) or len(op) != 2:
        raise ValueError(f"op: got {op!r}, want None or a pair (FwOp or None, BwOp or None)")
    check_op(op[0], AttentionFwOpBase)
    check_op(op[1], AttentionBwOpBase)


def _is_bias_type_supported_in_BMK(attn_bias_type: Any) -> bool:
    """Whether xFormers takes the class with 3-D inputs; keyspan takes every class."""
    return attn_bias_type in (type(None), Tensor, masks.LowerTriangularMask)


def bmk2bmhk(tensor: Tensor, num_heads: int) -> Tensor:
    """`[B·H, M, K]` as `[B, M, H, K]`."""
    return tensor.reshape(-1, num_heads, *tensor.shape[1:]).transpose(1, 2)


def pack_fp8_tensorwise_per_head(x: Tensor, scale: Tensor | float, original_dtype: torch.dtype) -> Tensor:
    """Left out: raises NotImplementedError."""
    raise NotImplementedError(
        "pack_fp8_tensorwise_per_head is left out of keyspan: pass the fp8 tensors to keyspan.attention with "
        "query_scale, key_scale and value_scale; keyspan.quantize makes both"
    )
