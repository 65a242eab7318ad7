"""`attention` of DTensors that are sharded on the batch or on heads: each rank computes its own shard.

Nothing is sent: every tensor is turned into its local part, and the results into DTensors. A sharding rule registered
for the op would let torch gather the keys of a sequence that is sharded on its rows; this refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from keyspan.core.biases import Alibi, Bias, BiasSum, DenseBias, RelativeBias, as_bias
from keyspan.core.masks import Mask, as_mask
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.cache import lower


def sharded(x: object) -> bool:
    """Whether `x` is a DTensor, whose module takes half a second to import."""
    return type(x).__name__ == "DTensor" and hasattr(x, "device_mesh")


def attend_shards(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    bias: Any,
    sinks: Any,
    scales: tuple[Tensor | None, ...],
    attend: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    """(out, lse) as DTensors.

    Args:
        scales: those of 8-bit tensors, which are refused.
        attend: `attention` of local tensors, with lse.

    Raises ValueError for other placements than those of the batch and of heads, and where tensors differ in theirs.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not sharded(x):
            raise ValueError(
                f"{name}: got {type(x).__name__}, want a DTensor as query, key and value are, or none of them"
            )
        if x.device_mesh != query.device_mesh or x.placements != query.placements:
            raise ValueError(f"{name}: got {_words(x)}, want {_words(query)} as query")
    for name, x in zip(("query_scale", "key_scale", "value_scale"), scales, strict=True):
        if x is not None:
            raise ValueError(f"{name}: got one for DTensors, want None: keys in 8 bits are not sharded")
    cut = _Cut.of(query, key)
    dims = query.dim()
    local = [x.to_local() for x in (query, key, value)]
    if isinstance(mask, (Mask, Tensor)) and not sharded(mask):
        mask = lower(as_mask(mask), query.shape[0], query.shape[1], key.shape[1], query.device)
    elif sharded(mask):
        raise ValueError("mask: got a DTensor, want a mask that all ranks have")
    if isinstance(mask, KeyRanges):
        mask = _ranges(mask, cut, dims)
    if bias is not None:
        terms = [_term(term, cut, dims) for term in as_bias(bias).terms]
        bias = terms[0] if len(terms) == 1 else BiasSum(tuple(terms))
    if sinks is not None:
        sinks = cut.local("sinks", sinks, None, 3 - dims)
    out, lse = attend(*local, mask=mask, bias=bias, sinks=sinks)
    return cut.whole(out, 0, 2), cut.whole(lse, 0, 1)


class _Cut(NamedTuple):
    """How the mesh cuts batch and heads."""

    mesh: Any
    axes: list[int | None]
    """By dimension of the mesh: 0 where it cuts the batch, 1 where it cuts heads, None where it cuts nothing."""
    place: tuple[tuple[int, int], tuple[int, int]]
    """For the batch and for heads: (this rank's shard, how many there are)."""

    @classmethod
    def of(cls, query: Any, key: Any) -> _Cut:
        from torch.distributed.tensor import Replicate, Shard

        heads = 2 if query.dim() > 3 else None
        mesh, axes = query.device_mesh, []
        index, count = [0, 0], [1, 1]
        for n, placement in enumerate(query.placements):
            axis = None
            if type(placement) is Shard and placement.dim in (0, heads):
                axis = 0 if placement.dim == 0 else 1
                index[axis] = index[axis] * mesh.size(n) + mesh.get_local_rank(n)
                count[axis] *= mesh.size(n)
            elif type(placement) is not Replicate:
                allowed = "Shard(0) (the batch)" + (f" or Shard({heads}) (heads)" if heads else "")
                hint = "; for rows cut across ranks, keyspan.parallel" if placement == Shard(1) else ""
                raise ValueError(f"query: got {_words(query)}, want {allowed} or Replicate(){hint}")
            axes.append(axis)
        for name, x in (("query", query), ("key", key)):
            for axis, dim, of in ((0, 0, "batch"), (1, heads, "heads")):
                if dim is not None and x.shape[dim] % count[axis]:
                    raise ValueError(f"{name}: got {of} {x.shape[dim]} on {count[axis]} ranks, want a multiple of that")
        return cls(mesh, axes, ((index[0], count[0]), (index[1], count[1])))

    def local(self, name: str, x: Any, batch: int | None, heads: int | None) -> Tensor:
        """This rank's part of a tensor that has the batch and the heads in these dimensions, counted from behind, or
        broadcasts along them. Heads of queries without any are in one that is never cut."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        present = [d is not None and 0 < -d <= x.dim() and x.shape[d] > 1 for d in (batch, heads)]
        dims = [x.dim() + (d or 0) if there else None for d, there in zip((batch, heads), present, strict=True)]
        if not sharded(x):
            if x.requires_grad:
                raise ValueError(f"{name}: got a plain tensor that requires gradients, want a DTensor as query is")
            for dim, (index, count) in zip(dims, self.place, strict=True):
                if dim is not None and count > 1:
                    x = x.narrow(dim, index * (x.shape[dim] // count), x.shape[dim] // count)
            plain: Tensor = x
            return plain
        want, grads = [], []
        for axis in self.axes:
            dim = None if axis is None else dims[axis]
            want.append(Replicate() if dim is None else Shard(dim))
            # Of what all ranks have, each has the gradient of its own shard.
            grads.append(Partial() if axis is not None and dim is None else want[-1])
        if x.device_mesh != self.mesh or list(x.placements) != want:
            raise ValueError(f"{name}: got {_words(x)}, want {', '.join(map(repr, want))} as query is sharded")
        found: Tensor = x.to_local(grad_placements=grads)
        return found

    def whole(self, x: Tensor, batch: int, heads: int) -> Tensor:
        """The DTensor of which `x` is this rank's shard."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate() if axis is None else Shard((batch, heads)[axis]) for axis in self.axes]
        found: Tensor = DTensor.from_local(x, self.mesh, placements, run_check=False)
        return found


def _term(term: Bias, cut: _Cut, dims: int) -> Bias:
    """This rank's part of a bias term for queries of so many dimensions."""
    if isinstance(term, DenseBias):  # [B, heads, M, N], where heads are [H], [G, H] or [] as dims say
        return DenseBias(cut.local("bias", term.values, -dims, 1 - dims))
    if isinstance(term, Alibi):  # [B, heads]
        return Alibi(cut.local("slopes", term.slopes, 2 - dims, 3 - dims))
    if isinstance(term, RelativeBias):  # [heads, 2R + 1]
        return RelativeBias(cut.local("table", term.table, None, 2 - dims))
    raise ValueError(f"bias: got {type(term).__name__}, want a tensor, Alibi, RelativeBias or a sum of them")


def _ranges(ranges: KeyRanges, cut: _Cut, dims: int) -> KeyRanges:
    """The ranges of this rank's batch entries; those of a dense mask also of its heads."""
    lo, hi, diagonal = (cut.local("mask", x, -2, None) for x in (ranges.lo, ranges.hi, ranges.diagonal))
    origin = None if ranges.origin is None else cut.local("mask", ranges.origin, -2, None)
    dense = ranges.dense
    if dense is not None:
        dense = cut.local("mask", dense, -dims, 1 - dims)
    return replace(ranges, lo=lo, hi=hi, diagonal=diagonal, origin=origin, dense=dense)


def _words(x: Any) -> str:
    return f"{', '.join(map(repr, x.placements))} on a mesh of {' × '.join(map(str, x.device_mesh.shape))}"
