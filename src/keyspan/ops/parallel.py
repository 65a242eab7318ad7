"""Tensor- and sequence-parallel linears over `torch.distributed`, without xFormers' overlap over NVLink.

Any backend of torch.distributed works (NCCL, gloo). Collectives gather and scatter the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:  # a torch built without distribution has no process groups
    Group: TypeAlias = dist.ProcessGroup


def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    if x.shape[0] % group.size():
        raise ValueError(f"x: got {x.shape[0]} rows, want a multiple of the group's {group.size()} ranks")
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _identity(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


class _Collective(torch.autograd.Function):
    """A collective with another one as its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, do: Any, undo: Any) -> Tensor:
        ctx.group, ctx.undo = group, undo
        result: Tensor = do(x, group)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.undo(grad, ctx.group), None, None, None


def _collective(x: Tensor, group: Group, do: Any, undo: Any) -> Tensor:
    result: Tensor = _Collective.apply(x, group, do, undo)  # type: ignore[no-untyped-call]
    return result


def gather_along_first_dim(x: Tensor, *, process_group: Group) -> Tensor:
    """All ranks' x joined along dim 0; backward reduce-scatters."""
    return _collective(x, process_group, _gather, _reduce_scatter)


def reduce_scatter_along_first_dim(x: Tensor, *, process_group: Group) -> Tensor:
    """This rank's slice along dim 0 of the sum over ranks; backward gathers."""
    return _collective(x, process_group, _reduce_scatter, _gather)


def copy_to_model_parallel_region(x: Tensor, process_group: Group) -> Tensor:
    """Returns x; backward sums over ranks."""
    return _collective(x, process_group, _identity, _all_reduce)


def reduce_from_model_parallel_region(x: Tensor, process_group: Group) -> Tensor:
    """The sum over ranks; backward passes the gradient unchanged."""
    return _collective(x, process_group, _all_reduce, _identity)


def sequence_parallel_leading_matmul(
    x: Tensor, ws: Sequence[Tensor], *, fuse: bool, process_group: Group
) -> list[Tensor]:
    """`gather(x) @ w` for each w: x `[M / ranks, ..., K]`, w `[K, N_w]` -> `[M, ..., N_w]`. `fuse` changes nothing."""
    gathered = gather_along_first_dim(x, process_group=process_group)
    return [gathered @ w for w in ws]


def sequence_parallel_trailing_matmul(x: Tensor, w: Tensor, *, fuse: bool, process_group: Group) -> Tensor:
    """`reduce_scatter(x @ w)`: x `[M, ..., K]`, w `[K, N]` -> `[M / ranks, ..., N]`. `fuse` changes nothing."""
    return reduce_scatter_along_first_dim(x @ w, process_group=process_group)


def fused_allgather_and_linear(
    scattered_input: Tensor,
    weight: Tensor | list[Tensor],
    *,
    group: Group,
    out: Tensor | list[Tensor] | None = None,
    timeout_s: int = 3600,
    scale_scattered_input: Tensor | None = None,
    scale_weight: Tensor | list[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    **private: object,
) -> Tensor | list[Tensor]:
    """`linear(gather(scattered_input), weight)`, for one weight `[N, K]` or a list; differentiable."""
    _no_fp8(scale_scattered_input, scale_weight)
    gathered = gather_along_first_dim(scattered_input, process_group=group)
    return _linears(lambda w: gathered @ w.t(), weight, out, out_dtype)


def fused_linear_and_reducescatter(
    gathered_input: Tensor,
    weight: Tensor | list[Tensor],
    *,
    group: Group,
    out: Tensor | list[Tensor] | None = None,
    timeout_s: int = 3600,
    scale_gathered_input: Tensor | None = None,
    scale_weight: Tensor | list[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    **private: object,
) -> Tensor | list[Tensor]:
    """`reduce_scatter(linear(gathered_input, weight))`, for one weight `[N, K]` or a list."""
    _no_fp8(scale_gathered_input, scale_weight)

    def one(w: Tensor) -> Tensor:
        return reduce_scatter_along_first_dim(gathered_input @ w.t(), process_group=group)

    return _linears(one, weight, out, out_dtype)


def _linears(
    one: Callable[[Tensor], Tensor],
    weight: Tensor | list[Tensor],
    out: Tensor | list[Tensor] | None,
    dtype: torch.dtype | None,
) -> Tensor | list[Tensor]:
    results = [one(w) for w in (weight if isinstance(weight, list) else [weight])]
    results = [r if dtype is None else r.to(dtype) for r in results]
    if out is not None:
        targets = out if isinstance(out, list) else [out]
        results = [target.view_as(r).copy_(r) for target, r in zip(targets, results, strict=True)]
    return results if isinstance(weight, list) else results[0]


def _no_fp8(*scales: object) -> None:
    if any(scale is not None for scale in scales):
        raise NotImplementedError("scale_weight: fp8 products are left out of keyspan")


def _streams() -> torch.cuda.Stream | None:
    return torch.cuda.current_stream() if torch.cuda.is_available() else None


def fused_allgather_and_anything(
    scattered_inputs: list[Tensor],
    my_matmul: Callable[[list[Tensor], int, Callable[[], Any]], None],
    *,
    group: Group,
    timeout_s: int = 3600,
    **private: object,
) -> None:
    """Call `my_matmul(inputs of rank r, r, stream_factory)` for every rank r; it stores its own results."""
    gathered = [_gather(x[None], group) for x in scattered_inputs]
    for rank in range(group.size()):
        my_matmul([x[rank] for x in gathered], rank, _streams)


def fused_anything_and_reducescatter(
    my_matmul: Callable[[list[Tensor], int, Callable[[], Any]], None],
    scattered_outputs: list[Tensor],
    *,
    group: Group,
    timeout_s: int = 3600,
    **private: object,
) -> None:
    """`my_matmul(outputs for rank r, r, stream_factory)` fills its outputs, whose sum over ranks goes to rank r."""
    gathered = [x.new_empty(group.size(), *x.shape) for x in scattered_outputs]
    for rank in range(group.size()):
        my_matmul([x[rank] for x in gathered], rank, _streams)
    for target, x in zip(scattered_outputs, gathered, strict=True):
        target.copy_(_reduce_scatter(x, group)[0])


def _slice_of_full(weight: Tensor, init_method: Callable[[Tensor], Any], group: Group, dim: int) -> None:
    """Initialise with every ranks-th row or column of a full weight, so values do not depend on the number of ranks."""
    shape = [n * group.size() if d == dim else n for d, n in enumerate(weight.shape)]
    full = weight.detach().new_empty(shape)
    init_method(full)
    index = torch.arange(group.rank(), shape[dim], group.size(), device=full.device)
    with torch.no_grad():
        weight.copy_(full.index_select(dim, index))


class ColumnParallelLinear(nn.Module):
    """Linears whose outputs are split over the ranks: weights `[out / ranks, in]`, one per entry of `out_features`.

    xFormers' restrictions hold: a list of `out_features`, `bias=False`, `gather_output=False`. Input and output are
    `[M, ..., in]` and a list of `[M, ..., out / ranks]`; with `sequence_parallel` the input is `[M / ranks, ..., in]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: list[int],
        *,
        process_group: Group,
        bias: bool = True,
        gather_output: bool = True,
        init_method: Callable[[Tensor], Any] = nn.init.xavier_normal_,
        sequence_parallel: bool = False,
        fuse_sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(out_features, list):
            raise TypeError(f"out_features: got {type(out_features).__name__}, want a list")
        _only("bias", bias, False)
        _only("gather_output", gather_output, False)
        self.in_features = in_features
        self.global_out_features = out_features
        self.my_out_features = [_share("out_features", n, process_group) for n in out_features]
        self.sequence_parallel = sequence_parallel
        self.fuse_sequence_parallel = fuse_sequence_parallel
        self.process_group = process_group
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(n, in_features)) for n in self.my_out_features)
        for weight in self.weights:
            _slice_of_full(weight, init_method, process_group, 0)

    def forward(self, input_: Tensor) -> list[Tensor]:
        weights = [w.t() for w in self.weights]
        if self.sequence_parallel:
            return sequence_parallel_leading_matmul(
                input_, weights, fuse=self.fuse_sequence_parallel, process_group=self.process_group
            )
        copied = copy_to_model_parallel_region(input_, self.process_group)
        return [copied @ w for w in weights]


class RowParallelLinear(nn.Module):
    """A linear whose input is split over the ranks: weight `[out, in / ranks]`, the outputs summed.

    xFormers' restrictions hold: `bias=False`, `input_is_parallel=True`. Input and output are `[M, ..., in / ranks]` and
    `[M, ..., out]`; with `sequence_parallel` the output is `[M / ranks, ..., out]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        process_group: Group,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_method: Callable[[Tensor], Any] = nn.init.xavier_normal_,
        sequence_parallel: bool = False,
        fuse_sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        _only("bias", bias, False)
        _only("input_is_parallel", input_is_parallel, True)
        self.global_in_features = in_features
        self.my_in_features = _share("in_features", in_features, process_group)
        self.out_features = out_features
        self.sequence_parallel = sequence_parallel
        self.fuse_sequence_parallel = fuse_sequence_parallel
        self.process_group = process_group
        self.weight = nn.Parameter(torch.empty(out_features, self.my_in_features))
        _slice_of_full(self.weight, init_method, process_group, 1)

    def forward(self, input_: Tensor) -> Tensor:
        if self.sequence_parallel:
            return sequence_parallel_trailing_matmul(
                input_, self.weight.t(), fuse=self.fuse_sequence_parallel, process_group=self.process_group
            )
        return reduce_from_model_parallel_region(input_ @ self.weight.t(), self.process_group)


def _share(name: str, features: int, group: Group) -> int:
    if features % group.size():
        raise ValueError(f"{name}: got {features}, want a multiple of the group's {group.size()} ranks")
    return features // group.size()


def _only(name: str, value: bool, want: bool) -> None:
    if value is not want:
        raise ValueError(f"{name}: got {value}, want {want}, as in xFormers")
