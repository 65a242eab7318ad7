"""The one list of attention problems that every backend must solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import keyspan
from keyspan.backends import Needs, load
from keyspan.core.problem import Problem, make_problem
from keyspan.dispatch.op import attend
from keyspan.testing import _cotangents, differentiable, results, tolerances, with_inputs, worst


@dataclass(frozen=True)
class Case:
    """One problem: sizes, a mask, and which terms it has."""

    name: str
    M: int = 33
    N: int = 47
    B: int = 1
    heads: int = 2
    kv_heads: int = 2
    K: int = 16
    V: int = 16
    dims: int = 4
    mask: Callable[[], Any] | None = None
    alibi: bool = False
    batched_slopes: bool = False
    reach: int | None = None
    """R of a relative table."""
    bias: tuple[tuple[int, ...], ...] = ()
    """Shapes of dense biases."""
    hiding: float | str | None = None
    """Value of the first bias, of shape `[M, N]`, in row 3 and in half of row 7, of the first sink and of the relative
    table's first entry; "finfo" is the dtype's smallest number. Entry [8, 5] of the bias is minus that."""
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    scale: float | None = None
    strides: str = "contiguous"
    stored: torch.dtype | None = None
    """What keys and values are stored as."""
    run: int | None = None
    """Keys that share a scale; `None`: all of a batch entry and head; 0: all there are."""
    query_run: int | None = None
    """Rows that share a scale of the query, which then is stored as `stored` too."""

    def problem(self, dtype: torch.dtype = torch.float64) -> Problem:
        """The problem with random fp64 values that `dtype` holds exactly."""
        torch.manual_seed(len(self.name) + self.M)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype).double()

        def heads_of(length: int, heads: int, dim: int) -> Tensor:
            if self.dims == 3:
                return values(self.B, length, dim)
            if self.strides == "heads first":
                return values(self.B, heads, length, dim).transpose(1, 2)
            if self.strides == "last":
                return values(self.B, length, dim, heads).transpose(2, 3)
            if self.strides == "sliced":
                return values(self.B, length + 3, heads, 2 * dim + 1)[:, 2:-1, :, 1::2]
            if self.strides == "expanded":
                return values(1, length, 1, dim).expand(self.B, -1, heads, -1)
            return values(self.B, length, heads, dim)

        q, k, v = (
            heads_of(self.M, self.heads, self.K),
            heads_of(self.N, self.kv_heads, self.K),
            heads_of(self.N, self.kv_heads, self.V),
        )
        terms: list[Any] = [values(*shape) for shape in self.bias]
        hiding = torch.finfo(dtype).min if self.hiding == "finfo" else self.hiding
        if hiding is not None:
            hiding = torch.tensor(hiding, dtype=dtype).double()
        if hiding is not None and self.bias:
            first = terms[0]
            first[3] = first[7, self.N // 2 :] = hiding
            first[8, 5] = -hiding
        if self.alibi:
            shape = (self.B, self.heads) if self.batched_slopes else (self.heads,)
            terms.append(keyspan.Alibi((values(*shape).abs() * 0.2).to(dtype).double()))
        if self.reach is not None:
            table = values(self.heads, 2 * self.reach + 1)
            if hiding is not None:
                table[:, 0] = hiding
            terms.append(keyspan.RelativeBias(table))
        bias = None
        for term in terms:
            bias = term if bias is None else bias + term
        sinks = values(self.heads) if self.sinks else None
        if sinks is not None and hiding is not None:
            sinks[0] = hiding
        mask = None if self.mask is None else self.mask()
        scales: dict[str, Any] = {}
        if self.stored is not None:
            k, scales["key_scale"] = self.quantized(k)
            v, scales["value_scale"] = self.quantized(v)
            if self.query_run is not None:
                q, scales["query_scale"] = keyspan.quantize(q.float(), self.stored, self.query_run)
        return make_problem(
            q, k, v, mask=mask, bias=bias, scale=self.scale, softcap=self.softcap, sinks=sinks, dropout_p=self.dropout,
            **scales,
        )[0]  # fmt: skip

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys or values as they are stored, and their scale; keys and heads differ in size, and so do scales."""
        assert self.stored is not None
        x = x.float() * torch.exp2(torch.randint(-2, 2, x.shape[:-1]))[..., None]
        if self.run != 0:
            return keyspan.quantize(x, self.stored, self.run)
        # As one row, which has one scale.
        stored, scale = keyspan.quantize(x.reshape(1, -1, x.shape[-1]), self.stored)
        return stored.view(x.shape), scale[0, 0]


def _holes(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4


S = keyspan
TABLE = torch.tensor([[3, 0, 5], [6, 1, 2], [4, 0, 3]], dtype=torch.int32)
INT8, FP8 = torch.int8, torch.float8_e4m3fn
SHORT = [5, 0, 9, 1, 17, 1, 7, 23]

CASES = [
    Case("plain"),
    Case("one query, one key", M=1, N=1, K=1, V=1),
    Case("prime sizes", M=61, N=127, K=19, V=23),
    Case("head dim 1", K=1, V=3),
    Case("wide head", M=9, N=11, K=200, V=72),
    Case("three dims", B=2, heads=1, kv_heads=1, dims=3, mask=lambda: S.Causal()),
    Case("several tiles", M=300, N=1100, K=8, V=8, mask=lambda: S.Causal("bottom_right")),
    Case("gqa", heads=6, kv_heads=2, mask=lambda: S.Causal()),
    Case("mqa", B=2, heads=4, kv_heads=1),
    Case("causal, fewer keys, top left", M=47, N=33, mask=lambda: S.Causal()),
    Case("causal, fewer keys, bottom right", M=47, N=33, mask=lambda: S.Causal("bottom_right")),
    Case("causal, more keys, bottom right", mask=lambda: S.Causal("bottom_right")),
    Case("window", M=64, N=64, mask=lambda: S.Window(7, 3)),
    Case("window, bottom right, one side", mask=lambda: S.Window(None, 2, align="bottom_right")),
    Case("window and sinks", M=90, N=90, mask=lambda: S.Causal() & S.Window(10, 0) & S.Sinks(3)),
    Case("window and prefix", M=70, N=70, heads=4, mask=lambda: S.Window(5, 5) & S.Prefix(4)),
    Case("prefix lm", M=40, N=40, mask=lambda: S.Causal() & S.Prefix(13)),
    Case("union of windows", M=41, N=41, alibi=True, mask=lambda: S.Documents([20, 21]) & (
        (S.Causal() & S.Window(3) & S.Sinks(2)) | S.Window(0, 2))),
    Case("shared prompt", M=41, N=41, alibi=True, reach=6, mask=lambda: S.SharedPrompt([5, 9], [[3, 7, 0], [11, 6]])),
    Case("shared prompt, window, sinks", M=30, N=30, alibi=True,
         mask=lambda: S.SharedPrompt([12], [[9, 9]]) & S.Window(4) & S.Sinks(2)),
    Case("documents", M=63, N=63, mask=lambda: S.Documents(SHORT) & S.Causal()),
    Case("documents, cross", M=63, N=40, mask=lambda: S.Documents(SHORT, [3, 4, 0, 9, 10, 5, 8, 1])),
    Case("documents, cross, causal", M=63, N=40, heads=4, alibi=True, reach=3,
         mask=lambda: S.Documents(SHORT, [3, 4, 0, 9, 10, 5, 8, 1]) & S.Causal("bottom_right")),
    Case("documents, tensor with rows behind", M=70, N=63, mask=lambda: S.Documents(torch.tensor(SHORT)) & S.Causal()),
    Case("documents, batch of two", B=2, M=63, N=63, mask=lambda: S.Documents(SHORT) & S.Window(3, 1)),
    Case("padded keys", M=9, N=60, heads=4, alibi=True,
         mask=lambda: S.PaddedKeys([3, 0, 6], [17, 4, 20], 20) & S.Causal("bottom_right")),
    Case("gappy keys, shared", M=9, N=60, reach=4, mask=lambda: S.GappyKeys([3, 2, 4], [40, 0, 5], [20, 11, 9])),
    Case("paged keys", M=9, N=28, heads=4, alibi=True, reach=5, bias=((4, 9, 12),), dropout=0.3,
         mask=lambda: S.PagedKeys([4, 1, 4], [11, 3, 9], TABLE, 4) & S.Causal("bottom_right")),
    Case("paged keys, window and sinks", M=9, N=28,
         mask=lambda: S.PagedKeys([4, 1, 4], [11, 3, 9], TABLE, 4) & S.Window(2, 0, "bottom_right") & S.Sinks(1)),
    Case("right padded batch", B=3, M=20, N=20, alibi=True, mask=lambda: S.KeyLengths([20, 0, 7]) & S.Causal()),
    Case("left padded batch", B=2, M=20, N=20, mask=lambda: S.KeyLengths([12, 20], [8, 0]) & S.Causal()),
    Case("decode with a batch of caches", B=3, M=1, N=50, heads=8, kv_heads=2,
         mask=lambda: S.KeyLengths([50, 1, 33]) & S.Causal("bottom_right")),
    Case("dense mask", mask=lambda: _holes(33, 47)),
    Case("dense mask by head and batch", B=2, mask=lambda: _holes(2, 2, 33, 47)),
    Case("dense mask of keys, causal", M=47, B=2, mask=lambda: S.Causal() & _holes(2, 1, 1, 47)),
    Case("all hidden", mask=lambda: torch.zeros(33, 47, dtype=torch.bool), sinks=True),
    Case("alibi without mask", alibi=True),
    Case("alibi by batch", B=2, M=40, N=40, alibi=True, batched_slopes=True, mask=lambda: S.Causal()),
    Case("relative table", reach=9, heads=4, kv_heads=2),
    Case("relative table, long, causal", M=80, N=80, reach=100, mask=lambda: S.Causal()),
    Case("relative table, most keys beyond it on both sides", M=96, N=96, reach=2),
    Case("relative table, documents, gqa", M=96, N=96, heads=4, kv_heads=2, reach=5,
         mask=lambda: S.Documents([70, 4, 22]) & S.Causal()),
    Case("relative table, two ranges", M=96, N=96, reach=3, mask=lambda: S.Causal() & S.Window(50, 0) & S.Sinks(40)),
    Case("relative table of one entry, alibi", M=70, N=90, heads=4, kv_heads=2, alibi=True, reach=0),
    Case("dense bias", bias=((2, 33, 47),)),
    Case("bias of -1e4 hides rows", bias=((33, 47),), hiding=-1e4),
    Case("bias of -1e4 hides rows, causal, sinks, alibi", M=47, bias=((47, 47),), hiding=-1e4, sinks=True, alibi=True,
         mask=lambda: S.Causal()),
    Case("bias of the smallest number hides rows", bias=((33, 47),), hiding="finfo"),
    Case("bias of the smallest number hides rows, gqa, sinks, dropout", heads=4, kv_heads=2, bias=((33, 47),),
         hiding="finfo", sinks=True, dropout=0.3),
    Case("bias of the smallest number hides rows, decode", B=2, M=9, N=600, heads=4, kv_heads=1, bias=((9, 600),),
         hiding="finfo", mask=lambda: S.KeyLengths([600, 431])),
    Case("table of -1e9 hides rows", M=60, N=25, reach=9, hiding=-1e9),
    Case("table of -1e4 hides rows, gqa, sinks, dropout", M=60, N=25, heads=4, kv_heads=2, reach=2, hiding=-1e4,
         sinks=True, dropout=0.3),
    Case("table of the smallest number hides rows, causal", M=40, N=20, reach=3, hiding="finfo", alibi=True,
         mask=lambda: S.Causal()),
    Case("dense biases of many shapes", B=2, heads=4,
         bias=((33, 1), (4, 1, 47), (2, 1, 1, 47), (1, 1), (2, 4, 33, 47))),
    Case("softcap", softcap=2.5, mask=lambda: S.Causal()),
    Case("softcap far above the scores", softcap=1e5, alibi=True),
    Case("learned sinks", sinks=True, mask=lambda: S.Window(0, 0)),
    Case("scale", scale=0.7),
    Case("large scale, peaks that rise", M=40, N=300, scale=4.0),
    Case("negative scale", scale=-0.3, alibi=True),
    Case("dropout", B=2, dropout=0.4, heads=4, kv_heads=2, mask=lambda: S.Causal()),
    Case("everything", B=2, M=40, N=46, heads=4, kv_heads=2, alibi=True, reach=5, bias=((4, 40, 1),), softcap=4.0,
         sinks=True, dropout=0.2, scale=0.4, mask=lambda: S.Causal("bottom_right") & S.Window(20, 0) & S.Sinks(3)),
    Case("heads first", B=2, strides="heads first"),
    Case("last stride not one", B=2, strides="last", mask=lambda: S.Causal()),
    Case("sliced", B=2, strides="sliced"),
    Case("expanded", B=2, heads=4, kv_heads=2, strides="expanded", alibi=True),
    Case("no queries", M=0),
    Case("no keys", N=0),
    Case("no keys, learned sinks", N=0, sinks=True),
    Case("empty batch", B=0),
    Case("no documents", M=0, N=0, mask=lambda: S.Documents([])),
    Case("int8, a scale per head", B=2, heads=4, stored=INT8),
    Case("int8, one scale, causal", stored=INT8, run=0, mask=lambda: S.Causal("bottom_right")),
    Case("int8, a scale per key, window and sinks", M=90, N=90, stored=INT8, run=1, V=24,
         mask=lambda: S.Causal() & S.Window(10, 0) & S.Sinks(3)),
    Case("int8, paged, a scale per page", M=9, N=28, heads=4, stored=INT8, run=4, alibi=True, bias=((4, 9, 12),),
         mask=lambda: S.PagedKeys([4, 1, 4], [11, 3, 9], TABLE, 4) & S.Window(5, 0, "bottom_right")),
    Case("fp8, a scale per head, decode", B=3, M=1, N=50, heads=8, kv_heads=2, stored=FP8,
         mask=lambda: S.KeyLengths([50, 1, 33]) & S.Causal("bottom_right")),
    Case("fp8, one scale, dense mask, softcap", stored=FP8, run=0, softcap=2.5, mask=lambda: _holes(33, 47)),
    Case("fp8, padded, a scale per sequence", M=9, N=60, heads=4, kv_heads=2, stored=FP8, run=20, V=8,
         mask=lambda: S.PaddedKeys([3, 0, 6], [17, 4, 20], 20) & S.Causal("bottom_right")),
    Case("fp8, paged, a scale per page, one token each", M=3, N=28, heads=4, stored=FP8, run=4,
         mask=lambda: S.PagedKeys([1, 1, 1], [11, 3, 9], TABLE, 4) & S.Causal("bottom_right")),
    Case("fp8, paged, a scale per key", M=9, N=28, heads=4, stored=FP8, run=1, reach=5, dropout=0.3, sinks=True,
         mask=lambda: S.PagedKeys([4, 1, 4], [11, 3, 9], TABLE, 4) & S.Causal("bottom_right")),
    Case("fp8 query, window", M=50, N=50, B=2, heads=4, K=24, stored=FP8, query_run=50,
         mask=lambda: S.Causal() & S.Window(4, 0)),
    Case("fp8 query, scales by rows, packed", M=63, N=63, heads=4, stored=FP8, run=9, query_run=7, alibi=True,
         mask=lambda: S.Documents(SHORT) & S.Causal()),
    Case("fp8 query, a scale per row", M=40, N=47, heads=6, kv_heads=2, stored=FP8, run=0, query_run=1, scale=-0.3,
         V=32),
    Case("int8, no keys", N=0, stored=INT8, sinks=True),
]  # fmt: skip

LONG = [
    Case("long rows", M=64, N=1024, K=64, V=64, scale=9 / 8),
    Case("long rows, causal, gqa", M=192, N=512, heads=4, kv_heads=2, K=64, V=64, scale=9 / 8,
         mask=lambda: S.Causal("bottom_right")),
    Case("long rows, alibi, bias, sinks", M=96, N=700, K=64, V=64, scale=9 / 8, alibi=True, sinks=True,
         bias=((2, 96, 700),), mask=lambda: S.Causal("bottom_right")),
]  # fmt: skip
"""Enough keys for several blocks and enough scores for stable mean errors; scores have a spread of 9."""


def malformed(field: str, value: int, dense: bool) -> Problem:
    """A problem with a field of its ranges overwritten, for half of the rows, after they were checked.

    Keys, values and a dense bias lie between NaNs: what is read outside of them shows in the result.
    """
    torch.manual_seed(0)
    M, N, paged = 9, 28, field in ("sequence", "block_table")

    def guarded(*shape: int) -> Tensor:
        around = torch.full((shape[0], shape[1] + 256, *shape[2:]), torch.nan)
        around[:, 128:-128] = torch.randn(shape)
        return around[:, 128:-128]

    q, k, v = torch.randn(1, M, 2, 16), guarded(1, N, 2, 16), guarded(1, N, 2, 16)
    mask = S.PagedKeys([4, 1, 4], [11, 3, 9], TABLE, 4) if paged else S.Causal("bottom_right")
    ranges = mask.lower(1, M, N)
    bias = guarded(M, 12 if paged else N) if dense else None
    problem = make_problem(q, k, v, mask=ranges, bias=bias)[0]
    overwritten = getattr(problem, field).clone()
    overwritten.view(-1)[::2] = value
    return problem._replace(**{field: overwritten})


def position_gradient_errors(backend: str, dtype: torch.dtype, M: int, N: int, sinks: bool = False) -> dict[str, float]:
    """Errors of the gradients of ALiBi slopes and of a relative table's two ends, as shares of what is allowed.

    Each is a sum of many terms that nearly cancel: what rounding `out` to `dtype` adds to them must not add up. Allowed
    is one fp32 rounding of rows × spread of a row's terms.
    """
    K = 32
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, n, 4, K, generator=generator).to(dtype) for n in (M, N, N, M))
    terms = [torch.rand(4, generator=generator) * 0.01, torch.randn(4, 11, generator=generator) * 0.1]
    sink = torch.zeros(4) if sinks else None

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        slopes, table = (x.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in terms)
        out = keyspan.attention(
            *(x.to(dtype) for x in (q, k, v)), bias=keyspan.Alibi(slopes) + keyspan.RelativeBias(table),
            mask=keyspan.Causal("bottom_right"), sinks=None if sink is None else sink.to(slopes.dtype),
            backend=backend,
        )  # fmt: skip
        dslopes, dtable = torch.autograd.grad(out, [slopes, table], grad.to(dtype))
        return dslopes.double(), dtable[:, [0, -1]].double()

    got, want = gradients(backend, dtype), gradients("reference", torch.float64)
    one = torch.finfo(torch.float32).eps * M * K**0.5
    slopes, ends = (float((x - y).abs().max()) / one for x, y in zip(got, want, strict=True))
    return {"slopes": slopes / (N / 4), "ends": ends}


def errors_of_gradients_in_parts(backend: str, parts: int) -> dict[str, float]:
    """Errors of gradients as shares of their tolerance, by name, from parts of the keys.

    Each part is given the output and the large lse of all keys, as in ring attention and with merged results.
    The tolerance has what rounding lse to fp32 does to the weights: a part alone cannot know what was lost.
    """
    case = Case("parts", M=40, N=200, K=32, V=32, alibi=True, reach=7, bias=((40, 200),), scale=1.0)
    problem = case.problem(torch.float32)
    problem = problem._replace(biases=[problem.biases[0] - 100])
    want = results(lambda p: attend(p, "reference"), problem, torch.float64)
    allowed = tolerances(problem, torch.float32, want)
    inputs = {name: x.float() for name, x in differentiable(problem).items()}
    problem = with_inputs(problem, inputs)._replace(output_dtype=torch.float32)
    assert problem.lo is not None
    assert problem.diagonal is not None
    out, lse = load(backend).forward(problem)
    lost = float(lse.abs().max()) * torch.finfo(torch.float32).eps / 2
    allowed = {name: x + lost * float(want[name].abs().max()) for name, x in allowed.items()}
    grad_out, grad_lse = (x.float() for x in _cotangents(out, lse))
    found = []
    for keys in torch.arange(200).chunk(parts):
        first, last = int(keys[0]), int(keys[-1]) + 1
        part = problem._replace(
            key=problem.key[:, first:last], value=problem.value[:, first:last],
            biases=[problem.biases[0][..., first:last]], hi=problem.lo + last - first,
            diagonal=problem.diagonal - first,
        )  # fmt: skip
        needs = Needs(True, True, True, True, True, False, [True])
        found.append(load(backend).backward(part, grad_out, grad_lse, out, lse, needs))
    got: dict[str, Any] = {f"d{name}": sum(getattr(x, name) for x in found) for name in ("query", "slopes", "table")}
    got |= {f"d{name}": torch.cat([getattr(x, name) for x in found], 1) for name in ("key", "value")}
    got["dbias0"] = torch.cat([x.biases[0] for x in found], -1)
    return {name: worst(x.double(), want[name]) / allowed[name] for name, x in got.items()}
