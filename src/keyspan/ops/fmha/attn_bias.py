"""xFormers' attention masks: each class is a layout & visibility of `keyspan.core.masks`.

In the one-line definitions query i and key j count inside their block, which has Nq queries and Nk keys; s = Nk − Nq.
A query sees only keys of its own block. `support.py` generates the table in the docs from these lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from itertools import pairwise
from operator import add, and_
from typing import Any, ClassVar, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from keyspan.core.biases import Bias
from keyspan.core.checks import check_dtype, check_int, check_type
from keyspan.core.masks import Causal, Documents, GappyKeys, Mask, PagedKeys, Window
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.cache import caches_masks, lower
from keyspan.ops.fmha.seq_info import ByValue, Device, _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo, lengths_of

BOTTOM_RIGHT = Causal("bottom_right")


class AttentionBias(ByValue):
    """Base class. A mask defines `product()`; everything else derives from it.

    A user's subclass that overrides `materialize`, as xFormers' base class asks, is used as that dense tensor.
    """

    def product(self) -> Mask:
        """The mask as layout & visibility, as `keyspan.attention(mask=...)` takes it."""
        raise NotImplementedError(f"{type(self).__name__} defines no mask")

    @property
    def terms(self) -> tuple[Tensor | Bias, ...]:
        """The terms that `add_bias` added."""
        return ()

    @property
    def added(self) -> Tensor | Bias | None:
        """The sum of the floating terms, or `None`."""
        floating = [term for term in self.terms if not _is_bool(term)]
        return reduce(add, floating) if floating else None

    @property
    def visible(self) -> Tensor | None:
        """The conjunction of the bool terms, or `None`."""
        return reduce(and_, found) if (found := [term for term in self.terms if _is_bool(term)]) else None

    @property
    def device(self) -> torch.device | None:
        """The device of the lengths; `None` for masks without lengths."""
        return None

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        """The mask as key ranges of M packed queries over N keys in memory."""
        return self.product().lower(batch, M, N, device)

    def lowered(self, batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
        """`lower`, possibly from the cache: the caller may not write to the result."""
        if type(self).lower is not AttentionBias.lower:
            return self.lower(batch, M, N, device)
        return lower(self.product(), batch, M, N, device)

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """A dense tensor of `shape` `[..., M, N]`: 0 where visible, −inf elsewhere; true and false for `torch.bool`."""
        if not isinstance(shape, (tuple, list)) or len(shape) < 2:
            raise ValueError(f"shape: got {shape!r}, want [..., M, N]")
        if dtype != torch.bool:
            check_dtype("dtype", dtype)
        visible = self.lower(1, shape[-2], shape[-1], device).materialize(shape[-1])[0].expand(*shape)
        if self.visible is not None:
            visible = visible & self.visible.to(device)
        added = self.added
        if added is not None and (not isinstance(added, Tensor) or dtype == torch.bool):
            raise ValueError(
                f"materialize: got {type(added).__name__} as {dtype}, want a tensor bias and a float dtype"
            )
        if dtype == torch.bool:
            return visible.clone()
        dense = torch.zeros(*shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
        return dense if added is None else dense + added.to(dense)

    def add_bias(self, bias: Tensor | Bias) -> AttentionBias:
        """This mask plus a bias on the scores: a broadcastable tensor, `keyspan.Alibi` or `keyspan.RelativeBias`.

        A bool tensor masks keys: true = visible.
        """
        return MaskWithBias(self, bias)

    def to(self, device: torch.device | str) -> AttentionBias:
        """The same mask on another device."""
        return self


AttentionMask = AttentionBias


@dataclass(eq=False)
class _Window:
    """Mixin: a two-sided window, aligned bottom-right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            check_int(name, getattr(self, name), 0)

    def visibility(self) -> Mask:
        return Window(self.window_left, self.window_right, "bottom_right")


@dataclass(eq=False)
class _CausalWindow:
    """Mixin: a causal window, aligned bottom-right."""

    _window_size: int

    def __post_init__(self) -> None:
        check_int("window_size", self._window_size)

    def visibility(self) -> Mask:
        return BOTTOM_RIGHT & Window(self._window_size - 1)


@dataclass(eq=False)
class MaskWithBias(AttentionBias):
    """A mask and a bias: the result of `add_bias`. (xFormers has it for `LowerTriangularMask` only.)"""

    mask: AttentionBias
    bias: Tensor | Bias

    def product(self) -> Mask:
        return self.mask.product()

    @property
    def terms(self) -> tuple[Tensor | Bias, ...]:
        return (*self.mask.terms, self.bias)

    @property
    def device(self) -> torch.device | None:
        return self.mask.device

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        return self.mask.lower(batch, M, N, device)

    def lowered(self, batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
        return (self.mask.lowered if _ours(self) else self.lower)(batch, M, N, device)

    def to(self, device: torch.device | str) -> AttentionBias:
        bias = self.bias.to(device) if isinstance(self.bias, Tensor) else self.bias
        return MaskWithBias(self.mask.to(device), bias)


# Masks of one block: each batch entry has its own queries and keys.


@dataclass(eq=False)
class LowerTriangularMask(AttentionBias):
    """j ≤ i"""

    def __init__(self, device: object = None) -> None:
        # The argument exists for compatibility; xFormers does not use it either.
        pass

    def product(self) -> Mask:
        return Causal()

    def add_bias(self, bias: Tensor | Bias) -> AttentionBias:
        return LowerTriangularMaskWithTensorBias(bias)


@dataclass(eq=False)
class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """j ≤ i, and `_bias` is added"""

    _bias: Tensor | Bias

    def __init__(self, bias: Tensor | Bias) -> None:
        check_type("bias", bias, Tensor, Bias)
        self._bias = bias

    @property
    def terms(self) -> tuple[Tensor | Bias, ...]:
        return (self._bias,)

    def add_bias(self, bias: Tensor | Bias) -> AttentionBias:
        return MaskWithBias(self, bias)

    def to(self, device: torch.device | str) -> AttentionBias:
        return type(self)(self._bias.to(device)) if isinstance(self._bias, Tensor) else self


@dataclass(eq=False)
class LowerTriangularFromBottomRightMask(AttentionBias):
    """j ≤ i + s"""

    def product(self) -> Mask:
        return BOTTOM_RIGHT

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass(eq=False)
class LowerTriangularFromBottomRightLocalAttentionMask(_CausalWindow, LowerTriangularFromBottomRightMask):
    """i + s − w < j ≤ i + s"""

    def product(self) -> Mask:
        return self.visibility()


@dataclass(eq=False)
class LocalAttentionFromBottomRightMask(_Window, AttentionBias):
    """i + s − wl ≤ j ≤ i + s + wr"""

    def product(self) -> Mask:
        return self.visibility()


# Masks of many blocks: queries are packed; keys are packed, padded, gappy or paged.


@dataclass(eq=False)
class _Blocks(AttentionBias):
    """Packed queries, and a run of keys for each block; subclasses define which keys of its run a query sees."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    def visibility(self) -> Mask | None:
        return None

    def layout(self) -> Mask:
        return GappyKeys(self.q_seqinfo.runs()[1], *self.k_seqinfo.runs())

    def product(self) -> Mask:
        visibility = self.visibility()
        return self.layout() if visibility is None else self.layout() & visibility

    @property
    def device(self) -> torch.device | None:
        return self.q_seqinfo.seqstart.device

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        _holds("query", self.q_seqinfo, M)
        return super().lower(batch, M, N, device)

    def to(self: B, device: torch.device | str) -> B:
        q = self.q_seqinfo.to(device)
        k = q if self.k_seqinfo is self.q_seqinfo else self.k_seqinfo.to(device)
        return replace(self, q_seqinfo=q, k_seqinfo=k)


@lru_cache(64)
def _documents(q_starts: tuple[int, ...], k_starts: tuple[int, ...]) -> Documents:
    return Documents(*([b - a for a, b in pairwise(starts)] for starts in (q_starts, k_starts)))


B = TypeVar("B", bound=_Blocks)


@dataclass(eq=False)
class BlockDiagonalMask(_Blocks):
    """0 ≤ j < Nk"""

    _batch_sizes: Sequence[int] | None = None

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        _holds("key", self.k_seqinfo, N)
        return super().lower(batch, M, N, device)

    def lowered(self, batch: int, M: int, N: int, device: torch.device) -> KeyRanges:
        q, k = self.q_seqinfo.host, self.k_seqinfo.host
        if not _ours(self) or q is None or k is None or not caches_masks(device):
            return self.lower(batch, M, N, device)
        # The host knows the lengths: the lowered mask is cached and serves all layers of a model.
        _holds("key", self.k_seqinfo, N)
        _holds("query", self.q_seqinfo, M)
        layout, visibility = _documents(tuple(q), tuple(k)), self.visibility()
        return lower(layout if visibility is None else layout & visibility, batch, M, N, device)

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Device = None
    ) -> BlockDiagonalMask:
        """From the lengths of the blocks; `kv_seqlen=None`: as many keys as queries."""
        q_lengths = lengths_of("q_seqlen", q_seqlen)
        k_lengths = q_lengths if kv_seqlen is None else lengths_of("kv_seqlen", kv_seqlen)
        if len(k_lengths) != len(q_lengths):
            raise ValueError(f"kv_seqlen: got {len(k_lengths)} blocks, want {len(q_lengths)} as in q_seqlen")
        q = _SeqLenInfo.from_seqlens(q_lengths, device=device)
        k = q if k_lengths == q_lengths else _SeqLenInfo.from_seqlens(k_lengths, device=device)
        return cls(q_seqinfo=q, k_seqinfo=k)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """Pack tensors `[B_i, M_i, *]` into `[1, ΣB_i·M_i, *]`, each row of a batch a block."""
        mask, packed, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return mask, packed

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        """Pack queries, keys and values: (mask, packed queries, packed keys, packed values or None)."""
        for name, tensors in (
            ("tensors_q", tensors_q),
            ("tensors_k", tensors_k),
            ("tensors_v", tensors_v or tensors_k),
        ):
            check_type(name, tensors, list, tuple)
            if not tensors or not all(isinstance(x, Tensor) and x.dim() >= 2 for x in tensors):
                raise ValueError(f"{name}: got {type(tensors).__name__} of {len(tensors)}, want tensors [B, M, ...]")
        sizes = [len(x) for x in tensors_q]
        for name, tensors in (("tensors_k", tensors_k), ("tensors_v", tensors_v or tensors_k)):
            if [len(x) for x in tensors] != sizes:
                raise ValueError(f"{name}: got batches {[len(x) for x in tensors]}, want {sizes} as in tensors_q")
        q_lengths, k_lengths = ([x.shape[1] for x in tensors for _ in x] for tensors in (tensors_q, tensors_k))
        mask = cls.from_seqlens(q_lengths, k_lengths, device=tensors_q[0].device if tensors_q else None)
        mask._batch_sizes = sizes
        k = _packed(tensors_k)
        return mask, _packed(tensors_q), k, None if tensors_v is None else _packed(tensors_v)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """`[1, ΣNq, *]` back into the tensors it was packed from."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """`[1, ΣNk, *]` back into the tensors it was packed from."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`split_queries`, for masks whose queries and keys have the same lengths."""
        if self.q_seqinfo.starts != self.k_seqinfo.starts:
            raise ValueError("split: got a mask whose queries and keys differ, want split_queries or split_kv")
        return self.split_queries(tensor)

    def _parts(self) -> dict[str, Any]:
        return {"q_seqinfo": self.q_seqinfo, "k_seqinfo": self.k_seqinfo, "_batch_sizes": self._batch_sizes}

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(**self._parts())

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(**self._parts())

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(**self._parts(), _window_size=window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(**self._parts(), _window_size=window_size)

    def _create_block_mask(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The dense mask of one block of Nq × Nk."""
        q, k = (_SeqLenInfo.from_seqlens([n], device=device) for n in shape[-2:])
        return replace(self, q_seqinfo=q, k_seqinfo=k).materialize(shape, dtype, device)


@dataclass(eq=False)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """j ≤ i"""

    def visibility(self) -> Mask | None:
        return Causal()


@dataclass(eq=False)
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """j ≤ i + s"""

    def __post_init__(self) -> None:
        for nq, nk in _known_lengths(self):
            if nk < nq:
                raise ValueError(f"k_seqinfo: got a block of {nk} keys and {nq} queries, want at least as many keys")

    def visibility(self) -> Mask | None:
        return BOTTOM_RIGHT


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """i − w < j ≤ i"""

    _window_size: int = 0

    def __post_init__(self) -> None:
        check_int("window_size", self._window_size)
        for nq, nk in _known_lengths(self):
            if nq - self._window_size >= nk:
                raise RuntimeError(
                    f"window_size: got {self._window_size} for a block of {nq} queries and {nk} keys, in which the "
                    f"last query then sees nothing; want more than {nq - nk}"
                )

    def visibility(self) -> Mask | None:
        return Causal() & Window(self._window_size - 1)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """i + s − w < j ≤ i + s"""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window_size", self._window_size)

    def visibility(self) -> Mask | None:
        return BOTTOM_RIGHT & Window(self._window_size - 1)


@dataclass(eq=False)
class BlockDiagonalPaddedKeysMask(_Blocks):
    """0 ≤ j < Nk, keys in slots of `padding`"""

    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: object = None,
        *,
        device: Device = None,
    ) -> BlockDiagonalPaddedKeysMask:
        """From the lengths and the size of a slot. (As in xFormers, `causal_diagonal` is unused.)"""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(self, block_tables: Tensor, page_size: int, paged_type: type[P]) -> P:
        """A mask of class `paged_type` with the same lengths and the keys in pages."""
        check_type("block_tables", block_tables, Tensor)
        if block_tables.dim() != 2:
            raise ValueError(f"block_tables: got shape {list(block_tables.shape)}, want [sequences, pages]")
        check_int("page_size", page_size, bits=31)
        if not isinstance(paged_type, type) or not issubclass(paged_type, AttentionBias):
            raise ValueError(f"paged_type: got {paged_type!r}, want a class of paged masks")
        padding = block_tables.shape[1] * page_size
        q, k = _padded(self.q_seqinfo.runs()[1], padding, self.k_seqinfo.seqlen, self.q_seqinfo.seqstart.device)
        # A window is copied where the paged class has one.
        shared = {f.name for f in fields(self)} & {f.name for f in fields(paged_type)} - {"q_seqinfo", "k_seqinfo"}
        more = {name: getattr(self, name) for name in shared}
        return paged_type(q_seqinfo=q, k_seqinfo=k, block_tables=block_tables, page_size=page_size, **more)

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """j ≤ i + s, keys in slots of `padding`"""

    causal_diagonal: object = None

    def visibility(self) -> Mask | None:
        return BOTTOM_RIGHT


@dataclass(eq=False)
class BlockDiagonalLocalAttentionPaddedKeysMask(_Window, BlockDiagonalPaddedKeysMask):
    """i + s − wl ≤ j ≤ i + s + wr, keys in slots of `padding`"""

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        *,
        device: Device = None,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device), window_left, window_right)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(_CausalWindow, BlockDiagonalPaddedKeysMask):
    """i + s − w < j ≤ i + s, keys in slots of `padding`"""

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
        *,
        device: Device = None,
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device), window_size)


@dataclass(eq=False)
class BlockDiagonalGappyKeysMask(_Blocks):
    """0 ≤ j < Nk, blocks have keys anywhere and may share them"""

    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqstarts: Sequence[int], kv_seqlen: Sequence[int], *, device: Device = None
    ) -> BlockDiagonalGappyKeysMask:
        """From the lengths and the first key of each block; `kv_seqstarts` ends with the total number of keys."""
        return cls(*_gappy(q_seqlen, kv_seqstarts, kv_seqlen, False, device))

    def make_paged(self, block_tables: Tensor, page_size: int, notional_padding: int, paged_type: type[PG]) -> PG:
        """A mask of class `paged_type` with the keys in pages; block b's start counts from `b · notional_padding`."""
        starts = [start - b * notional_padding for b, start in enumerate(self.k_seqinfo.starts[:-1])]
        space = block_tables.shape[1] * page_size
        if any(not 0 <= start < max(space, 1) for start in starts):
            raise ValueError(f"notional_padding: got {notional_padding}, with which keys begin at {starts} of {space}")
        q, k = _gappy(self.q_seqinfo.runs()[1], starts, self.k_seqinfo.seqlen, True, self.q_seqinfo.seqstart.device)
        return paged_type(q_seqinfo=q, k_seqinfo=k, block_tables=block_tables, page_size=page_size)


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """j ≤ i + s, blocks have keys anywhere and may share them"""

    def visibility(self) -> Mask | None:
        return BOTTOM_RIGHT


@dataclass(eq=False)
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(_Window, BlockDiagonalGappyKeysMask):
    """i + s − wl ≤ j ≤ i + s + wr, blocks have keys anywhere and may share them"""

    @classmethod
    def from_seqlens_local_gappy(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        device: Device = None,
    ) -> BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask:
        return cls(*_gappy(q_seqlen, kv_seqstarts, kv_seqlen, False, device), window_left, window_right)


@dataclass(eq=False)
class _PagedBlocks(_Blocks):
    """Keys in pages: logical key j of block b is at `block_tables[b][j // page_size] · page_size + j % page_size`."""

    block_tables: Tensor
    page_size: int

    def layout(self) -> Mask:
        _, lengths = self.k_seqinfo.runs()
        return PagedKeys(self.q_seqinfo.runs()[1], lengths, self.block_tables, self.page_size)

    def to(self: B, device: torch.device | str) -> B:
        moved = cast(Any, super().to(device))
        return cast(B, replace(moved, block_tables=moved.block_tables.to(device)))


@dataclass(eq=False)
class PagedBlockDiagonalPaddedKeysMask(_PagedBlocks):
    """0 ≤ j < Nk, keys in pages"""

    _UNPAGED_TYPE: ClassVar[type[BlockDiagonalPaddedKeysMask]] = BlockDiagonalPaddedKeysMask
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device = None,
    ) -> PagedBlockDiagonalPaddedKeysMask:
        check_type("block_tables", block_tables, Tensor)
        check_int("page_size", page_size)
        q, k = _padded(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device)
        return cls(q_seqinfo=q, k_seqinfo=k, block_tables=block_tables, page_size=page_size)


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """j ≤ i + s, keys in pages"""

    _UNPAGED_TYPE = BlockDiagonalCausalWithOffsetPaddedKeysMask

    def visibility(self) -> Mask | None:
        return BOTTOM_RIGHT


@dataclass(eq=False)
class PagedBlockDiagonalCausalLocalPaddedKeysMask(_CausalWindow, PagedBlockDiagonalPaddedKeysMask):
    """i + s − w < j ≤ i + s, keys in pages"""

    _UNPAGED_TYPE = BlockDiagonalCausalLocalAttentionPaddedKeysMask

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        window_size: int,
        *,
        device: Device = None,
    ) -> PagedBlockDiagonalCausalLocalPaddedKeysMask:
        check_type("block_tables", block_tables, Tensor)
        check_int("page_size", page_size)
        q, k = _padded(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device)
        return cls(q, k, block_tables, page_size, window_size)


@dataclass(eq=False)
class PagedBlockDiagonalGappyKeysMask(_PagedBlocks):
    """0 ≤ j < Nk, counted from the block's start in its own pages"""

    _UNPAGED_TYPE: ClassVar[type[BlockDiagonalGappyKeysMask]] = BlockDiagonalGappyKeysMask
    k_seqinfo: _GappySeqInfo

    def lower(self, batch: int, M: int, N: int, device: torch.device | str = "cpu") -> KeyRanges:
        # `layout` covers keys 0 … end of the block; this removes those before the block's start.
        ranges = super().lower(batch, M, N, device)
        assert ranges.sequence is not None
        start = self.k_seqinfo.runs()[0].to(ranges.lo.device)
        if len(start) == 0:
            return ranges
        lo = torch.maximum(ranges.lo, start[ranges.sequence.long()])
        return replace(ranges, lo=lo, hi=torch.maximum(ranges.hi, lo))

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device = None,
    ) -> PagedBlockDiagonalGappyKeysMask:
        """`kv_seqstarts`: the first key of each block within its own pages; an extra last entry is ignored."""
        q, k = _gappy(q_seqlen, kv_seqstarts, kv_seqlen, True, device)
        return cls(q_seqinfo=q, k_seqinfo=k, block_tables=block_tables, page_size=page_size)


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """j ≤ i + s, counted from the block's start in its own pages"""

    _UNPAGED_TYPE = BlockDiagonalCausalWithOffsetGappyKeysMask

    def visibility(self) -> Mask | None:
        return BOTTOM_RIGHT


P = TypeVar("P", bound=PagedBlockDiagonalPaddedKeysMask)
PG = TypeVar("PG", bound=PagedBlockDiagonalGappyKeysMask)

MASK_CLASSES: tuple[type[AttentionBias], ...] = tuple(
    found
    for found in list(globals().values())
    if isinstance(found, type)
    and issubclass(found, AttentionBias)
    and found not in (AttentionBias, MaskWithBias, _Blocks, _PagedBlocks)
)
"""The mask classes of xFormers, in the order of their definition."""

VARLEN_BIASES = (
    BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask,
    BlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
)


def _ours(mask: AttentionBias) -> bool:
    """Whether this module defines the class; a user's subclass may override any part of it."""
    return type(mask).__module__ == __name__


def _is_bool(term: Tensor | Bias) -> TypeGuard[Tensor]:
    return isinstance(term, Tensor) and term.dtype == torch.bool


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, 1) for x in tensors])[None]


def _padded(
    q_seqlen: Sequence[int] | Tensor, padding: int, kv_seqlen: Sequence[int] | Tensor, device: Device
) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    q_lengths, k_lengths = _same_count(q_seqlen, kv_seqlen)
    return (
        _SeqLenInfo.from_seqlens(q_lengths, device=device),
        _PaddedSeqLenInfo.from_seqlens_padded(k_lengths, padding, device=device),
    )


def _gappy(
    q_seqlen: Sequence[int] | Tensor,
    starts: Sequence[int],
    kv_seqlen: Sequence[int] | Tensor,
    paged: bool,
    device: Device,
) -> tuple[_SeqLenInfo, _GappySeqInfo]:
    q_lengths, k_lengths = _same_count(q_seqlen, kv_seqlen)
    return (
        _SeqLenInfo.from_seqlens(q_lengths, device=device),
        _GappySeqInfo.from_seqlens_gappy(starts, k_lengths, paged, device=device),
    )


def _same_count(q_seqlen: Any, kv_seqlen: Any) -> tuple[list[int], list[int]]:
    q_lengths, k_lengths = lengths_of("q_seqlen", q_seqlen), lengths_of("kv_seqlen", kv_seqlen)
    if len(q_lengths) != len(k_lengths):
        raise ValueError(f"kv_seqlen: got {len(k_lengths)} blocks, want {len(q_lengths)} as in q_seqlen")
    return q_lengths, k_lengths


def _known_lengths(mask: BlockDiagonalMask) -> list[tuple[int, int]]:
    """(Nq, Nk) of every block; empty where the host does not know them."""
    q, k = mask.q_seqinfo.host, mask.k_seqinfo.host
    if q is None or k is None:
        return []
    return [(b - a, d - c) for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False)]


def _holds(name: str, info: _SeqLenInfo, size: int) -> None:
    """Lengths that the host knows must add up to `size`; device lengths may not (rows behind them see no key)."""
    if info.host is not None and info.host[-1] != size:
        raise ValueError(f"{name}: got {size} packed tokens, want {info.host[-1]} as the mask's lengths add up to")
