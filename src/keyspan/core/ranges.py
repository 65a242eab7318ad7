"""Key ranges: the lowered form of every mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keyspan.core.checks import check_device, check_int


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """Which keys each query row may see: `S` disjoint ranges of keys per row.

    Row `i` sees key `j` where `lo[s, b, i] <= j < hi[s, b, i]` for some `s` (and, where `dense` is given,
    `dense[b, h, i, j]` is true as well). An empty range has `lo == hi`; a row with empty ranges only gives
    output 0, lse −inf and zero gradients.

    Attributes:
        lo: int32 `[S, B or 1, M]`, first visible key.
        hi: int32 `[S, B or 1, M]`, one past the last visible key.
        diagonal: int32 `[S, B or 1, M]`, the key at the same position as query `i`, in the coordinates of
            range `s`. Distances in ALiBi and relative biases are `j − diagonal[s, b, i]`.
        sequence: int32 `[M]`, the row of `block_table` that query `i` reads; only for paged keys.
        block_table: int32 `[sequences, pages]`; only for paged keys. Then `j` is logical:
            `physical = block_table[sequence[i], j // page_size] * page_size + j % page_size`.
        page_size: keys per page; 0 where keys are not paged.
        dense: bool, broadcastable to `[B, H, M, N]`, true = visible; for masks that ranges cannot express.
        keys: the N that the ranges were made for, which calls check; `None`: ranges are cut off at N.
        origin: int32 `[B or 1, M]`, the first key of the document that query `i` reads, whether or not it sees that
            key; `None`: 0. Backends count blocks of keys from it, so that a result does not depend on where its
            document lies. It hides nothing.
        row_keys: keys that a row sees on average, rounded to a power of two, as far as lengths on the host tell; 0:
            unknown. Backends choose kernels by it, results do not depend on it otherwise. In a compiled function, an
            int64 tensor `[]` on the CPU that holds the number: data, not a constant of the graph.

    Shapes, dtypes and devices are checked at construction; values are not read.

    `mask.lower(batch, M, N, device)` makes it. It may be passed as `mask=`: lower once per step and pass the result to
    every layer.
    """

    lo: Tensor
    hi: Tensor
    diagonal: Tensor
    sequence: Tensor | None = None
    block_table: Tensor | None = None
    page_size: int = 0
    dense: Tensor | None = None
    keys: int | None = None
    origin: Tensor | None = None
    row_keys: int | Tensor = 0

    def __post_init__(self) -> None:
        lo = self.lo
        for name in ("lo", "hi", "diagonal"):
            x = getattr(self, name)
            _check(name, x, torch.int32, lo.device if isinstance(lo, Tensor) else None)
            if x.dim() != 3 or x.shape != lo.shape:
                raise ValueError(f"{name}: got shape {list(x.shape)}, want [S, B or 1, M], that of lo")
        if isinstance(self.page_size, bool) or not isinstance(self.page_size, int) or self.page_size < 0:
            raise ValueError(f"page_size: got {self.page_size!r}, want an int ≥ 1, or 0 where keys are not paged")
        paged = [self.sequence is not None, self.block_table is not None, self.page_size > 0]
        if any(paged) != all(paged):
            raise ValueError("page_size: got some of sequence, block_table and page_size, want all of them or none")
        if self.sequence is not None and self.block_table is not None:
            M, table = lo.shape[2], self.block_table
            _check("sequence", self.sequence, torch.int32, lo.device)
            _check("block_table", table, torch.int32, lo.device)
            if self.sequence.shape != (M,):
                raise ValueError(f"sequence: got shape {list(self.sequence.shape)}, want [{M}], one entry per query")
            if table.dim() != 2 or (M > 0 and table.numel() == 0):
                raise ValueError(f"block_table: got shape {list(table.shape)}, want [sequences, pages], not empty")
            if table.shape[1] * self.page_size >= 2**31:
                raise ValueError(
                    f"page_size: got {self.page_size} with {table.shape[1]} pages per sequence, want less than 2³¹ keys"
                )
        if self.origin is not None:
            _check("origin", self.origin, torch.int32, lo.device)
            if self.origin.shape != lo.shape[1:]:
                raise ValueError(f"origin: got shape {list(self.origin.shape)}, want {list(lo.shape[1:])}, as lo[0]")
        if self.dense is not None:
            _check("dense", self.dense, torch.bool, lo.device)
        count = self.row_keys
        if isinstance(count, Tensor):
            if count.dtype != torch.int64 or count.dim() or count.device.type != "cpu":
                raise ValueError(
                    f"row_keys: got {count.dtype} of shape {list(count.shape)} on {count.device}, "
                    "want an int, or torch.int64 of shape [] on the CPU"
                )
        elif isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"row_keys: got {self.row_keys!r}, want an int ≥ 1, or 0 where it is not known")
        if self.keys is not None:
            check_int("keys", self.keys, 0, bits=31)

    def tensors(self) -> list[Tensor]:
        """Those of the fields that are tensors, in their order."""
        fields = (self.lo, self.hi, self.diagonal, self.sequence, self.block_table, self.dense, self.origin)
        return [x for x in fields if x is not None]

    def to(self, device: torch.device | str) -> KeyRanges:
        """The same ranges on another device."""
        device = check_device("device", device)

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return replace(
            self,
            lo=self.lo.to(device),
            hi=self.hi.to(device),
            diagonal=self.diagonal.to(device),
            sequence=moved(self.sequence),
            block_table=moved(self.block_table),
            dense=moved(self.dense),
            origin=moved(self.origin),
        )

    def materialize(self, N: int) -> Tensor:
        """The mask as a bool tensor `[B or 1, M, N]` (with heads behind B where `dense` has them), true = visible.

        Args:
            N: number of keys in memory; for paged keys the number of physical slots.
        """
        check_int("N", N, 0, bits=31)
        logical = N if self.block_table is None else self.block_table.shape[1] * self.page_size
        j = torch.arange(logical, device=self.lo.device)
        visible = ((j >= self.lo[..., None]) & (j < self.hi[..., None])).any(0)
        if self.dense is not None:
            dense = self.dense.reshape((1,) * (4 - self.dense.dim()) + tuple(self.dense.shape))
            visible = visible.reshape(visible.shape[0], *(1,) * (dense.dim() - 3), *visible.shape[1:]) & dense
            visible = visible[:, 0] if visible.dim() == 4 and visible.shape[1] == 1 else visible
        if self.block_table is None or self.sequence is None:
            return visible
        # Two logical keys may share a physical slot, which is visible where either is.
        slot = self.block_table.long()[:, j // self.page_size] * self.page_size + j % self.page_size
        physical = slot.clamp(0, max(N - 1, 0))[self.sequence.long()].expand(visible.shape)
        seen = torch.zeros((*visible.shape[:-1], max(N, 1)), dtype=torch.int32, device=j.device)
        return (seen.scatter_add_(-1, physical, visible.int()) > 0)[..., :N]


def _check(name: str, x: object, dtype: torch.dtype, device: torch.device | None) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, want a tensor of {dtype}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: got {x.dtype}, want {dtype}")
    if x.device != device:
        raise ValueError(f"{name}: got a tensor on {x.device}, want {device}, the device of lo")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: got a tensor of layout {x.layout}, want a strided one")
