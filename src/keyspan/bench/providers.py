"""Attention by Keyspan's backends and by everything that a user would pick instead, by name.

Whatever depends on the mask or the positions alone (lowered ranges, a dense mask or bias, flex's block mask) is made
before the timing, for all alike: a model makes it once per step, not per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import keyspan
from keyspan.bench.works import Inputs, Work

Provider = Callable[[Inputs], Tensor]

DETERMINISTIC = " deterministic"
OTHERS = ("flash_attn", "flash_attn.cute", "flash_attn.cute" + DETERMINISTIC, "xformers")
"""Attention libraries that are measured where they are installed; `flash_attn.cute` is FlashAttention 4, whose backward
pass adds in no fixed order unless told otherwise."""


def make(name: str, work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
    """The provider of that name for a work; its result is `[B, M, heads, V]`."""
    if name.startswith("keyspan"):
        return _keyspan(work, device, backend=name.partition(":")[2] or None)
    return _OTHERS[name](work, dtype, device)


def gpu_peers(work: Work) -> list[str]:
    """Everything beside Keyspan that computes this work on a GPU in linear memory and is installed.

    flex_attention, which compiles for half a minute, counts only where torch's own kernels cannot.
    """
    found = ["cudnn", "flash", "efficient"] if work.sequence else ["flex"]
    return found + installed(work)


def installed(work: Work) -> list[str]:
    """Other attention libraries, where they are installed and can do the work (they need a GPU)."""
    flash = not work.alibi and work.reach is None and work.queries is None
    able = {
        "flash_attn": flash,
        "flash_attn.cute": flash,
        "flash_attn.cute" + DETERMINISTIC: flash and work.backward,
        "xformers": work.sequence and work.shape.heads == work.shape.kv_heads,
    }
    return [name for name in OTHERS if able[name] and is_installed(name)]


def is_installed(name: str) -> bool:
    """Whether one of `OTHERS` is."""
    module = name.removesuffix(DETERMINISTIC)
    try:
        spec = find_spec(module)
    except ImportError:  # of its parent
        return False
    return spec is not None and spec.origin is not None  # FlashAttention 4 alone leaves an empty `flash_attn`


def laid_out(name: str, x: Inputs) -> Inputs:
    """The inputs as a provider's user keeps them: a cache for torch's kernel has heads before keys in memory."""
    if not name.endswith("heads first"):
        return x
    query, key, value = (y.contiguous().transpose(1, 2) for y in _heads_first(x))
    return Inputs(query, key, value, x.table)


def _keyspan(work: Work, device: torch.device, backend: str | None) -> Provider:
    positions = work.mask() is not None or work.reach is not None
    ranges = work.ranges(device) if positions else None
    alibi = keyspan.Alibi(work.slopes(device)) if work.alibi else None

    def run(x: Inputs) -> Tensor:
        bias = alibi if x.table is None else keyspan.RelativeBias(x.table)
        return keyspan.attention(x.query, x.key, x.value, mask=ranges, bias=bias, backend=backend)

    return run


def _dense_term(work: Work, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Visibility as a bool tensor, with ALiBi as values to add; None where a causal flag says it all."""
    if work.sequence or work.reach is not None:
        return None
    visible = work.ranges(device).materialize(work.N)[0]
    if not work.alibi:
        return visible
    row = torch.arange(work.N, device=device)
    bias = -work.slopes(device)[:, None, None] * (row - row[:, None]).abs()
    return bias.masked_fill_(~visible, -torch.inf).to(dtype)[None]  # in four dimensions: else torch is not fused


def _distances(work: Work, device: torch.device) -> Tensor:
    """Which entry of a relative table each pair of query and key takes, `[M, N]`."""
    row, reach = torch.arange(work.N, device=device), work.reach or 0
    return (row - row[:, None]).clamp(-reach, reach) + reach


def _heads_first(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x.query.transpose(1, 2), x.key.transpose(1, 2), x.value.transpose(1, 2)


def _is_grouped(work: Work) -> bool:
    return work.shape.heads != work.shape.kv_heads


def _sdpa(work: Work, dtype: torch.dtype, device: torch.device, embedded: bool = False) -> Provider:
    dense = _dense_term(work, dtype, device)
    index = None if work.reach is None else _distances(work, device)
    plain = work.causal and work.sequence
    gqa = _is_grouped(work)

    def run(x: Inputs) -> Tensor:
        q, k, v = _heads_first(x)
        added = dense
        if x.table is not None and index is not None:  # gathered in every call, since its gradient is asked for
            added = F.embedding(index, x.table.T).permute(2, 0, 1) if embedded else x.table[:, index]
            added = added[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=plain, enable_gqa=gqa)
        return out.transpose(1, 2)

    return run


def _sdpa_kernel(name: str) -> Callable[[Work, torch.dtype, torch.device], Provider]:
    """SDPA by one kernel, which torch names `name`_ATTENTION."""

    def make_provider(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel, run = getattr(SDPBackend, f"{name}_ATTENTION"), _sdpa(work, dtype, device)

        def forced(x: Inputs) -> Tensor:
            with sdpa_kernel(kernel):
                return run(x)

        return forced

    return make_provider


def _dense_softmax(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
    dense = _dense_term(work, dtype, device)
    hidden = ~torch.ones(work.M, work.N, dtype=torch.bool, device=device).tril() if work.causal else None
    copies = work.shape.heads // work.shape.kv_heads

    def run(x: Inputs) -> Tensor:
        q, k, v = _heads_first(x)
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        score = (q @ k.transpose(-1, -2)).float() * work.shape.dim**-0.5
        if dense is not None:
            score = score.masked_fill(~dense, -torch.inf) if dense.dtype == torch.bool else score + dense
        elif hidden is not None:
            score = score.masked_fill(hidden, -torch.inf)
        out: Tensor = score.softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2)

    return run


def _per_document(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
    """What users without packing do: one call per document."""
    lengths, gqa = list(work.lengths), _is_grouped(work)

    def run(x: Inputs) -> Tensor:
        parts = zip(*(y.split(lengths, 2) for y in _heads_first(x)), strict=True)
        attend = F.scaled_dot_product_attention
        outs = [attend(q, k, v, is_causal=work.causal, enable_gqa=gqa).transpose(1, 2) for q, k, v in parts]
        return torch.cat(outs, 1)

    return run


def _padded(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
    """What users without packing do: a batch padded to the longest document."""
    lengths, gqa = list(work.lengths), _is_grouped(work)
    # Padding stands behind the keys, so causality hides it from every real query.
    keys = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    hidden = None if work.causal else keys[:, None, None]

    def run(x: Inputs) -> Tensor:
        q, k, v = (
            torch.nn.utils.rnn.pad_sequence(list(y[0].split(lengths)), batch_first=True).transpose(1, 2)
            for y in (x.query, x.key, x.value)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, is_causal=work.causal, enable_gqa=gqa)
        return out.transpose(1, 2)[keys].unsqueeze(0)

    return run


_FLEX_TABLE = {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 16, "bwd_num_stages": 1,
               "bwd_num_warps": 4, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}  # fmt: skip
"""flex's tiles for a relative table: by itself it asks for more shared memory than there is where the table takes a
gradient. The fastest of three that were tried on an H100, forward and backward."""


def _flex(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # backward is called more than once
    document = torch.repeat_interleave(torch.arange(len(work.lengths)), torch.tensor(work.lengths)).to(device)
    slopes, reach = work.slopes(device), work.reach or 0

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ok = document[i] == document[j] if len(work.lengths) > 1 else i == i  # noqa: PLR0124
        if work.causal:
            ok = ok & (j <= i)
        return ok & (j > i - work.window) if work.window is not None else ok

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j if work.causal else (i - j).abs())

    block = None if work.mask() is None else create_block_mask(seen, None, None, work.M, work.N, device=str(device))
    torch.compiler.reset()  # every work is compiled anew, and torch limits how often one function may be
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options: Any = _FLEX_TABLE if work.reach is not None and device.type == "cuda" else None

    def run(x: Inputs) -> Tensor:
        q, k, v = (y if device.type == "cuda" else y.contiguous() for y in _heads_first(x))
        table = x.table

        def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert table is not None
            return score + table[h, torch.clamp(j - i, -reach, reach) + reach]

        change = alibi if work.alibi else relative if table is not None else None
        out = compiled(
            q, k, v, score_mod=change, block_mask=block, enable_gqa=_is_grouped(work), kernel_options=options
        )
        return out.transpose(1, 2)

    return run


def _flash_attn(module: str, deterministic: bool = False) -> Callable[[Work, torch.dtype, torch.device], Provider]:
    """FlashAttention 2 (`flash_attn`) or 4 (`flash_attn.cute`); packed documents through its varlen form."""

    def make_provider(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
        library = import_module(module)
        ends = torch.tensor([0, *accumulate(work.lengths)], device=device, dtype=torch.int32)
        options: dict[str, Any] = {"causal": work.causal}
        if deterministic:
            options["deterministic"] = True
        if work.window is not None:
            options["window_size"] = (work.window - 1, 0)

        def run(x: Inputs) -> Tensor:
            if len(work.lengths) > 1:
                packed = (y[0] for y in (x.query, x.key, x.value))
                most = max(work.lengths)
                found = library.flash_attn_varlen_func(
                    *packed, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=most, max_seqlen_k=most, **options
                )
            else:
                found = library.flash_attn_func(x.query, x.key, x.value, **options)
            out: Tensor = found[0] if isinstance(found, tuple) else found  # some versions return lse too
            return out[None] if len(work.lengths) > 1 else out

        return run

    return make_provider


def _xformers(work: Work, dtype: torch.dtype, device: torch.device) -> Provider:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if work.causal else None
    return lambda x: memory_efficient_attention(x.query, x.key, x.value, attn_bias=bias)


_OTHERS: dict[str, Callable[[Work, torch.dtype, torch.device], Provider]] = {
    "sdpa": _sdpa,
    "sdpa embedding": lambda work, dtype, device: _sdpa(work, dtype, device, embedded=True),
    "sdpa heads first": _sdpa,
    "sdpa per document": _per_document,
    "sdpa padded": _padded,
    "cudnn": _sdpa_kernel("CUDNN"),
    "flash": _sdpa_kernel("FLASH"),
    "efficient": _sdpa_kernel("EFFICIENT"),
    "dense softmax": _dense_softmax,
    "flex": _flex,
    "flash_attn": _flash_attn("flash_attn"),
    "flash_attn.cute": _flash_attn("flash_attn.cute"),
    "flash_attn.cute" + DETERMINISTIC: _flash_attn("flash_attn.cute", deterministic=True),
    "xformers": _xformers,
}
