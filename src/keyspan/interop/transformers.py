"""Attention for Hugging Face transformers: `register()`, then `attn_implementation="keyspan"`.

Two functions are registered: one makes a mask once per forward pass and layer type, one computes attention once per
layer. No model is named here: what a model wants is in the arguments of these two calls. A mask travels through the
model as its key ranges, in one plain int32 tensor, so caches, checkpointing and compilers treat it as any tensor.

Needs `transformers` 5 (`pip install keyspan[transformers]`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import CodeType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from keyspan.core.masks import Causal, Documents, Mask, Window
from keyspan.core.ranges import KeyRanges
from keyspan.dispatch.api import attention
from keyspan.interop.torch import runs
from keyspan.layers.gemm import Linear

NAME = "keyspan"
_UNPADDED = "_keyspan_unpadded"
"""Attribute of modules that `unpadded` has put hooks on."""
_PAIRS = 1 << 22
"""Most (query, key) pairs of which a mask is held at a time while its ranges are looked for."""
Model = TypeVar("Model", bound=nn.Module)


def register() -> None:
    """Make `attn_implementation="keyspan"` known to transformers; calling it again changes nothing.

    Then `AutoModel.from_pretrained(..., attn_implementation="keyspan")` or `model.set_attn_implementation("keyspan")`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


class Packing(NamedTuple):
    """Which tokens of a padded batch are real."""

    rows: Tensor
    """Indices of the real tokens in the batch laid out as one row, int64 `[T]`."""
    shift: Tensor
    """What takes a key's number in its own row to its number among the real tokens, int32 `[T]`."""
    shape: tuple[int, int]
    """(B, M) of the batch."""


_packings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask tensor -> Packing, where the mask hides padding."""
_ranges: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask tensor -> its KeyRanges: all layers get the same tensor."""
_starts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""position_ids -> (version, first token of each token's document, or None where a row is one document)."""
_packed_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""cu_seq_lens_q -> (versions and numbers that the mask depends on, KeyRanges)."""


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that `register` registers; arguments as of `transformers.masking_utils.sdpa_mask`.

    Returns:
        `None` where `is_causal` says all (as for `sdpa`). Otherwise the key ranges as int32 `[B, 1, M, 2·S]`,
        `lo, hi` of each range, S = 1 or 2, with one more column where the caller gave a padding mask. A bool mask
        `[B, 1, M, N]` where a row needs more than two ranges, and while torch's compiler traces.
    """
    whole: dict[str, Any] = {
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    if torch.compiler.is_compiling():
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            q_offset=q_offset,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **whole,
        )
    real = None if attention_mask is None else _real_keys(attention_mask, kv_length, kv_offset)
    query = (torch.arange(q_length, device=device) + q_offset)[None]
    bounds = None if use_vmap else _bounds(mask_function, query)
    span = None if real is None else _one_run(real)
    if bounds is None or (real is not None and span is None):
        found = _search(batch_size, q_length, q_offset, whole)
        if found is None:
            return sdpa_mask(  # type: ignore[no-any-return]
                batch_size=batch_size, q_length=q_length, q_offset=q_offset, allow_is_causal_skip=False, **whole
            )
        lo, hi = found
    else:
        lo = torch.zeros_like(query) if bounds.lo is None else bounds.lo - kv_offset
        hi = torch.full_like(query, kv_length) if bounds.hi is None else bounds.hi - kv_offset
        if span is not None:
            lo, hi = torch.maximum(lo, span[0][:, None]), torch.minimum(hi, span[1][:, None])
        lo = lo.clamp(0, kv_length)
        lo, hi = lo[None].expand(1, batch_size, -1), torch.maximum(hi.clamp(max=kv_length), lo)[None]
        hi = hi.expand_as(lo)
    if len(lo) == 1 and _says_all(lo, hi, kv_length, allow_is_causal_skip, allow_is_bidirectional_skip):
        return None
    columns = [x[..., None] for pair in zip(lo, hi, strict=True) for x in pair]
    if real is not None:
        columns.append(torch.zeros_like(columns[0]))
    mask = torch.cat(columns, -1).int()[:, None]
    _ranges[mask] = _key_ranges(lo.int(), hi.int(), kv_length)
    if span is not None and attention_mask is not None and q_length == kv_length == attention_mask.shape[1]:
        _packings[mask] = _packing(attention_mask)
    return mask


def _real_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The keys that are no padding, bool `[B, N]`; what a static cache has room for and no token yet is none."""
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    return F.pad(attention_mask.bool(), (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]


def _one_run(visible: Tensor) -> tuple[Tensor, Tensor] | None:
    """(first, one past the last) visible key per row of `[B, N]`; None where some row has holes."""
    if not visible.shape[1]:
        return None
    lo, hi, count = runs(visible)
    return None if bool((count > 1).any()) else (lo[0].long(), hi[0].long())


def _says_all(lo: Tensor, hi: Tensor, kv_length: int, causal: bool, bidirectional: bool) -> bool:
    """Whether `is_causal` alone says what the ranges say; one query with `is_causal` sees every key."""
    M = lo.shape[-1]
    if bidirectional or (causal and M == 1):
        wanted = torch.full_like(hi, kv_length)
    elif causal:
        wanted = torch.arange(1, M + 1, device=hi.device).clamp(max=kv_length)
    else:
        return False
    return bool(((lo == 0) & (hi == wanted)).all())


def _packing(attention_mask: Tensor) -> Packing:
    real = attention_mask.bool()
    rows = real.flatten().nonzero()[:, 0]
    before = real.flatten().cumsum(0) - 1  # a real token's number among the real ones
    shift = (before - torch.arange(real.shape[1], device=real.device).repeat(len(real)))[rows]
    return Packing(rows, shift.int(), (real.shape[0], real.shape[1]))


def _search(
    batch_size: int, q_length: int, q_offset: int | Tensor, whole: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Ranges of a mask function that is not one of transformers' own; None where two a row do not do."""
    if not whole["kv_length"]:
        nothing = torch.zeros(1, batch_size, q_length, dtype=torch.int32, device=whole["device"])
        return nothing, nothing
    rows = max(1, _PAIRS // (batch_size * whole["kv_length"]))
    found = []
    for first in range(0, q_length, rows):
        block = sdpa_mask(
            batch_size=batch_size,
            q_length=min(rows, q_length - first),
            q_offset=q_offset + first,
            allow_is_causal_skip=False,
            **whole,
        )
        if block.shape[1] != 1:  # differs by head
            return None
        found.append(runs(block[:, 0]))
    lo, hi, count = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    most = int(count.max()) if count.numel() else 0
    return None if most > 2 else (lo[: max(most, 1)], hi[: max(most, 1)])


class Bounds(NamedTuple):
    """Keys `lo ≤ j < hi`, int64 `[B or 1, M]`; None where there is no bound."""

    lo: Tensor | None = None
    hi: Tensor | None = None


def _bounds(function: Callable[..., Tensor], query: Tensor) -> Bounds | None:
    """What a mask function of transformers lets the queries at positions `query` see; None for any other function.

    The functions that transformers makes have no attributes, so they are told apart by their code, and their numbers
    are read from their closures. Code that is not known is never guessed at: its mask is evaluated.
    """
    reader = _READERS.get(getattr(function, "__code__", None))
    if reader is None:
        return None
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return reader(query, **{name: cell.cell_contents for name, cell in zip(names, cells, strict=True)})


def _read_window(query: Tensor, sliding_window: int) -> Bounds:
    return Bounds(query - sliding_window + 1)


def _read_window_both_sides(query: Tensor, sliding_window: int) -> Bounds:
    return Bounds(query - sliding_window, query + sliding_window + 1)


def _read_chunks(query: Tensor, chunk_size: int, left_padding: Tensor) -> Bounds:
    left = left_padding.to(query.device)[:, None]
    start = left + (query - left).div(chunk_size, rounding_mode="floor") * chunk_size
    return Bounds(start, start + chunk_size)


def _read_documents(query: Tensor, packed_sequence_mask: Tensor) -> Bounds:
    numbers = packed_sequence_mask.contiguous()  # never decreasing along a row
    found = [torch.searchsorted(numbers, numbers, right=right) for right in (False, True)]
    start, stop = (x.gather(1, query.expand(len(numbers), -1)) for x in found)
    return Bounds(start, stop)


def _read_positions(query: Tensor, mask_function: Callable[..., Tensor], position_ids: Tensor) -> Bounds | None:
    # Combined by transformers with _read_documents, in whose documents positions grow by one.
    position = position_ids.gather(1, query.expand(len(position_ids), -1))
    inner = _bounds(mask_function, position)
    return None if inner is None else Bounds(*(None if x is None else x + query - position for x in inner))


def _read_all_of(query: Tensor, mask_functions: tuple[Callable[..., Tensor], ...]) -> Bounds | None:
    lo = hi = None
    for function in mask_functions:
        bounds = _bounds(function, query)
        if bounds is None:
            return None
        lo = bounds.lo if lo is None else lo if bounds.lo is None else torch.maximum(lo, bounds.lo)
        hi = bounds.hi if hi is None else hi if bounds.hi is None else torch.minimum(hi, bounds.hi)
    return Bounds(lo, hi)


_ANY = torch.zeros(1, 1, dtype=torch.int64)
_READERS: dict[CodeType | None, Callable[..., Bounds | None]] = {
    masking_utils.causal_mask_function.__code__: lambda query: Bounds(None, query + 1),
    masking_utils.bidirectional_mask_function.__code__: lambda query: Bounds(),
    masking_utils.sliding_window_overlay(1).__code__: _read_window,
    masking_utils.sliding_window_bidirectional_overlay(1).__code__: _read_window_both_sides,
    masking_utils.chunked_overlay(1, _ANY).__code__: _read_chunks,
    masking_utils.packed_sequence_mask_function(_ANY).__code__: _read_documents,
    masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, _ANY).__code__: (
        _read_positions
    ),
    masking_utils.and_masks().__code__: _read_all_of,
}


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    output_attentions: bool | None = False,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register` registers.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: `[B, Hq, M, K]`.
        key: `[B, H, N, K]`, heads not repeated.
        value: `[B, H, N, V]`.
        attention_mask: what `make_mask` returned; or a user's 4-D mask, bool (true = visible) or floating (added).
        dropout: 0 outside training.
        scaling: factor on the scores; `None` means `K ** -0.5`.
        is_causal: what holds where `attention_mask` is None.
        sliding_window: keys that a query sees, its own included; read where documents are given by `cu_seq_lens_q`
            and there is no mask.
        softcap: as of `keyspan.attention` (Gemma 2).
        s_aux: learned sinks `[Hq]` (GPT-OSS).
        position_bias: added to the scores, with a gradient (T5).
        position_ids: `[B or 1, M]`. Where they begin anew in a causal layer without padding, a new document begins,
            with a cache too; transformers' own functions let documents see one another then.
        output_attentions: must not be True: the weights are never made.
        indices: must be None: attention to chosen keys only is refused.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, int32 `[documents + 1]`: documents packed in one row.

    Returns:
        `[B, M, Hq, V]`, and `None` for the weights.

    Raises:
        ValueError: for `output_attentions=True`, for `indices`, and for a mask that a model has changed.
    """
    if output_attentions:
        raise ValueError(
            'output_attentions: got True, want False: the weights are never made; use attn_implementation="eager"'
        )
    if indices is not None:
        raise ValueError('indices: got a tensor, want None: keys chosen one by one need attn_implementation="sdpa"')
    if query.shape[0] != key.shape[0]:  # learned queries, one for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))

    mask: Mask | KeyRanges | Tensor | None
    bias = position_bias
    if attention_mask is None or attention_mask.dtype == torch.int32:
        mask = _of_documents(q, k, attention_mask, causal, sliding_window, position_ids, kwargs)
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask.is_floating_point():
        mask, bias = None, attention_mask if bias is None else bias + attention_mask
    else:
        raise ValueError(f"attention_mask: got {attention_mask.dtype}, want what Keyspan's mask function made, or bool")
    if isinstance(bias, Tensor) and bias.shape[-1] > k.shape[1]:
        bias = bias[..., : k.shape[1]]
    out = attention(q, k, v, mask=mask, bias=bias, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout)
    return out, None


def _of_documents(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> Mask | KeyRanges | None:
    """The mask of a layer that was given ranges or nothing, with documents packed in one row kept apart."""
    M, N = q.shape[1], k.shape[1]
    ranges = None if mask is None else _decoded(mask, N)
    padded = mask is not None and mask.shape[-1] % 2 == 1
    q_starts, k_starts = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if q_starts is not None and q.shape[0] == 1 and (ranges is None or M == N):
        packed = _packed_mask(q_starts, q_starts if k_starts is None else k_starts, M, N, causal, sliding_window)
        if ranges is None:
            return packed
        lo = torch.maximum(ranges.lo, packed.lo)
        return replace(ranges, lo=lo, hi=torch.maximum(torch.minimum(ranges.hi, packed.hi), lo))
    start = None
    if (
        position_ids is not None
        and causal
        and not padded
        and M == N
        and M > 1
        and tuple(position_ids.shape[1:]) == (M,)
    ):
        start = _document_starts(position_ids)
    if start is None:
        return ranges if ranges is not None else Causal() if causal and M > 1 else None
    if ranges is None:
        row = torch.arange(1, M + 1, device=q.device, dtype=torch.int32)
        return _key_ranges(start[None], row.expand_as(start)[None].contiguous(), N)
    lo = torch.maximum(ranges.lo, start)
    return replace(ranges, lo=lo, hi=torch.maximum(ranges.hi, lo))


def _key_ranges(lo: Tensor, hi: Tensor, N: int) -> KeyRanges:
    """Ranges `[S, B or 1, M]`; no bias here counts positions, so any numbers do for the diagonal."""
    lo = lo.contiguous()
    return KeyRanges(lo, hi.contiguous(), lo, keys=N)


def _decoded(mask: Tensor, N: int) -> KeyRanges:
    """The ranges that `make_mask` put into a tensor."""
    compiling = torch.compiler.is_compiling()
    found = None if compiling else _ranges.get(mask)
    if found is not None and found.keys == N:
        return found  # type: ignore[no-any-return]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] not in (2, 3, 4, 5):
        raise ValueError(
            f"attention_mask: got ranges of shape {list(mask.shape)}, want [B, 1, M, 2 … 5] as Keyspan's mask function "
            'makes them: the model changes its mask; pass a 4-D bool mask, or use attn_implementation="sdpa"'
        )
    lo, hi = (mask[:, 0, :, s : mask.shape[3] // 2 * 2 : 2].permute(2, 0, 1).clone() for s in (0, 1))
    ranges = _key_ranges(lo, hi, N)
    if not compiling:
        _ranges[mask] = ranges
    return ranges


def _packed_mask(
    q_starts: Tensor, k_starts: Tensor, M: int, N: int, causal: bool, sliding_window: int | None
) -> KeyRanges:
    """Documents packed in one row, lowered once for all layers of a kind."""
    compiling = torch.compiler.is_compiling()
    form = None if compiling else (q_starts._version, id(k_starts), k_starts._version, M, N, causal, sliding_window)
    known = None if compiling else _packed_masks.get(q_starts)
    if known is not None and known[0] == form:
        return known[2]  # type: ignore[no-any-return]
    mask: Mask = Documents.from_cu_seqlens(q_starts, k_starts)
    if causal:
        mask = mask & Causal("bottom_right")
    if sliding_window is not None:
        reach = sliding_window - 1
        mask = mask & Window(reach, None if causal else reach, "bottom_right")
    ranges = mask.lower(1, M, N, q_starts.device)
    if not compiling:
        _packed_masks[q_starts] = (form, None if k_starts is q_starts else k_starts, ranges)
    return ranges


def _document_starts(position_ids: Tensor) -> Tensor | None:
    """The first token of each token's document, int32 `[B or 1, M]`; None where each row is one document."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        known = _starts.get(position_ids)
        if known is not None and known[0] == position_ids._version:
            return known[1]  # type: ignore[no-any-return]
    row = torch.arange(position_ids.shape[1], device=position_ids.device)
    new = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    start = torch.where(new, row, 0).cummax(-1).values.int()
    if compiling:
        return start
    found = start if bool(new.any()) else None
    _starts[position_ids] = (position_ids._version, found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers


def replace_linears(model: Model) -> Model:
    """Let Keyspan's native library multiply in a model's linear layers, on a CPU; results are equal but for rounding.

    Every `nn.Linear` (no subclass of it) becomes a `keyspan.layers.Linear`, which has the same parameters, state dict
    and hooks. Inference and training. On other devices, and while torch's compiler traces, nothing changes.

    Args:
        model: any module; it is changed.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear  # its hooks and whoever holds it stay as they are
    return model


# ---------------------------------------------------------------------------------------------------------------------
# A key-value cache that grows in place


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """transformers' `DynamicCache` that appends in place: a new token is written, the cached ones are not copied.

    `DynamicCache` concatenates, so that a step of decoding reads and writes the whole cache once more. Here keys and
    values are the first tokens of larger tensors, which are replaced by ones a quarter larger when they are full.
    Layers with a sliding window are those of `DynamicCache`. Where gradients are computed, and while torch's compiler
    traces, tokens are concatenated.

        model.generate(**inputs, past_key_values=keyspan.interop.transformers.GrowingCache(config=model.config))

    Keys and values that were read from the cache before a `crop` change when tokens are appended after it: clone them.

    Args:
        config: the model's, which says which layers have a sliding window; `None` for a model without.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig | None = None):
        super().__init__(config=config)
        if config is None:
            self.layer_class_to_replicate = _GrowingLayer
        self.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    keys: Tensor
    values: Tensor
    _LEAST = 256
    """Fewest tokens that a tensor is made larger by."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}
        """The tensors whose first tokens `keys` and `values` are."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._rooms.clear()

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """`held` and `new` tokens, `[B, H, N, K]`."""
        tracked = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
        if torch.compiler.is_compiling() or tracked or (held.numel() and held.shape[:2] != new.shape[:2]):
            return torch.cat([held, new], -2)
        used = held.shape[-2] if held.numel() else 0
        wanted = used + new.shape[-2]
        room = self._rooms.get(name)
        # Reordering, selecting and offloading replace what is held.
        fits = (
            room is not None
            and wanted <= room.shape[-2]
            and (not used or (held.data_ptr() == room.data_ptr() and held.stride() == room.stride()))
            and (room.shape[:2], room.shape[-1], room.dtype) == (new.shape[:2], new.shape[-1], new.dtype)
            and room.is_inference() == torch.is_inference_mode_enabled()
        )
        if not fits:
            larger = wanted + max(wanted // 4, self._LEAST)
            room = self._rooms[name] = new.new_empty(*new.shape[:2], larger, new.shape[-1])
            if used:
                room[:, :, :used] = held
        assert room is not None
        room[:, :, used:wanted] = new
        return room[:, :, :wanted]


# ---------------------------------------------------------------------------------------------------------------------
# Padded batches, computed without their padding


def unpadded(model: Model) -> Model:
    """Let a model compute its layers on the real tokens of a padded batch only; results at these tokens are equal.

    The model is called as before, with `input_ids` and `attention_mask` padded left or right. Before its first layer
    the real tokens are packed into one row; behind its last layer they are put back, with zeros at the padding.
    Embeddings, poolers and heads see the padded batch. Inference and training. For encoders (BERT, RoBERTa,
    ModernBERT, …), and for decoders without a cache (`use_cache=False`); where a layer is given a cache, the batch
    stays padded. So does a batch whose mask has holes.

        model = keyspan.interop.transformers.unpadded(AutoModel.from_pretrained(name))
        states = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state

    Args:
        model: a model of transformers, or a module that holds some (sentence-transformers). It is changed: attention is
            set to `"keyspan"`, hooks are put on its layers, and their linear layers are those of `replace_linears`.

    Returns:
        The same model.

    Raises:
        ValueError: where the model has no stack of layers; in a call, for `output_hidden_states=True`.
    """
    register()
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    inner = {id(child) for m in models for child in m.modules() if child is not m}
    stacks = [
        stack
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and stack and all(isinstance(x, GradientCheckpointingLayer) for x in stack)
    ]
    if not stacks:
        raise ValueError(f"model: got {type(model).__name__}, want a transformers model with a stack of layers")
    for outer in models:
        if id(outer) not in inner:
            outer.set_attn_implementation(NAME)
    for stack in stacks:
        if hasattr(stack[0], _UNPADDED):
            continue
        replace_linears(stack)
        for layer in stack:
            setattr(layer, _UNPADDED, True)
            layer.register_forward_pre_hook(_pack_all if layer is stack[0] else _pack_rest, with_kwargs=True)
        stack[-1].register_forward_hook(_unpack, with_kwargs=True)
    for outer in models:
        if not hasattr(outer, _UNPADDED):
            setattr(outer, _UNPADDED, True)
            outer.register_forward_pre_hook(_refuse_hidden_states, with_kwargs=True)
    return model


_packed_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tensor that layers are given beside the hidden states -> (rows of the packing, its packed form for all layers)."""
_unpackings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Mask of packed tokens -> the Packing that it was made with."""


def _refuse_hidden_states(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(model.config, "output_hidden_states", False)
    if wanted:
        raise ValueError(
            "output_hidden_states: got True, want False: between layers an unpadded model has packed states"
        )


def _pack_all(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the first layer: pack the hidden states and what comes with them."""
    packing = _packing_of(args, kwargs)
    if packing is None:
        return None
    states = args[0] if args else kwargs["hidden_states"]
    args, kwargs = _packed_arguments(args, kwargs, packing)
    states = _rows(states, packing)
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})


def _pack_rest(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the other layers, whose hidden states are packed already."""
    packing = _packing_of(args, kwargs)
    return None if packing is None else _packed_arguments(args, kwargs, packing)


def _packing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packing | None:
    """The packing that a layer's mask belongs to; None where the layer must see the batch as it is."""
    if kwargs.get("past_key_values") is not None:
        return None
    found = (_packings.get(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.int32)
    return next((packing for packing in found if packing is not None), None)


def _packed_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], packing: Packing
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments but for the hidden states, which come first."""
    others = {name: x if name == "hidden_states" else _packed(x, packing) for name, x in kwargs.items()}
    return (*args[:1], *(_packed(x, packing) for x in args[1:])), others


def _packed(x: Any, packing: Packing) -> Any:
    """The mask, positions or rotary tables with the real tokens packed; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(_packed(part, packing) for part in x)
    if not isinstance(x, Tensor):
        return x
    is_mask = _packings.get(x) is not None
    B, M = packing.shape
    if not is_mask and (x.dim() < 2 or x.shape[1] != M or x.shape[0] not in (1, B)):
        return x
    known = None if x.requires_grad else _packed_forms.get(x)
    if known is not None and known[0] is packing.rows:
        return known[1]
    packed = _packed_ranges(x, packing) if is_mask else _rows(x, packing)
    if not x.requires_grad:
        _packed_forms[x] = (packing.rows, packed)
    return packed


def _rows(x: Tensor, packing: Packing) -> Tensor:
    """`[B or 1, M, …]` to `[1, T, …]`."""
    B, M = packing.shape
    if x.shape[0] == B:
        return x.flatten(0, 1)[packing.rows][None]
    return x[:, packing.rows % M]


def _packed_ranges(mask: Tensor, packing: Packing) -> Tensor:
    """The real tokens' ranges, counted among the real tokens: one row's keys stay side by side."""
    rows = mask[:, 0].flatten(0, 1)[packing.rows]
    S = mask.shape[-1] // 2 * 2
    packed = torch.cat([rows[:, :S] + packing.shift[:, None], rows[:, S:]], -1)[None, None]
    _unpackings[packed] = packing
    return packed


def _unpack(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the last layer: put the real tokens back to where they were, zeros elsewhere."""
    found = (_unpackings.get(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    packing = next((packing for packing in found if packing is not None), None)
    if packing is None:
        return None
    states = output[0] if isinstance(output, tuple) else output
    B, M = packing.shape
    padded = states.new_zeros(B * M, *states.shape[2:]).index_copy(0, packing.rows, states[0]).unflatten(0, (B, M))
    return (padded, *output[1:]) if isinstance(output, tuple) else padded
