"""flash-attn's functions over whole sequences, padded to one length or packed; all with gradients."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from keyspan.core.biases import Alibi
from keyspan.core.checks import check_type
from keyspan.core.masks import Causal, Documents, GappyKeys, Mask, PagedKeys, Window
from keyspan.dispatch.api import attention

WindowSize: TypeAlias = tuple[int | None, int | None]
Result: TypeAlias = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention over a batch of sequences of one length.

    Args:
        q: `[B, M, Hq, K]`.
        k: `[B, N, H, K]`, H a divisor of Hq: query head h reads key head `h // (Hq // H)`.
        v: `[B, N, H, V]`.
        dropout_p: applied whenever it is not 0.
        softmax_scale: factor on the scores; `None` means `K ** -0.5`.
        causal: query i sees keys up to `i + N − M` (bottom-right).
        window_size: (left, right), both inclusive, from key `i + N − M`; −1 or None for no bound.
        softcap: `c` replaces a scaled score s by `c · tanh(s / c)`; 0 for none.
        alibi_slopes: `[Hq]` or `[B, Hq]`: adds `−slope · |i + N − M − j|`. With a gradient, which flash-attn has not.
        deterministic: of no effect: results are bitwise the same from run to run.
        return_attn_probs: return `(out, lse, None)`. The probabilities are never made, so their place holds None.
        learnable_sink: `[Hq]`, the logit of one more key per head with value zero (version 4).
        return_lse: return `(out, lse)` (version 4).

    Returns:
        `[B, M, Hq, V]`, with lse `[B, Hq, M]` where asked for, both with gradients. A row that sees no key is 0.
    """
    check_shapes(4, q=q, k=k, v=v)
    batch = _visible(causal, window_size, alibi_slopes is not None, q.shape[1], k.shape[1])
    out, lse = attention(
        q,
        k,
        v,
        mask=batch,
        bias=None if alibi_slopes is None else Alibi(alibi_slopes),
        scale=softmax_scale,
        softcap=softcap or None,
        sinks=learnable_sink,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return _result(out, lse, return_attn_probs, return_lse)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention over packed sequences of different lengths.

    Args:
        q: `[T, Hq, K]`, the sequences one behind the other.
        k: `[Tk, H, K]`; with `block_table` pages `[pages, page_size, H, K]`.
        v: as k with V in place of K.
        cu_seqlens_q: int `[sequences + 1]`: where each sequence begins in q, and where the last ends.
        cu_seqlens_k: the same for k; with `block_table` the differences are the lengths. `None`, with `seqused_k`.
        max_seqlen_q: not needed; accepted.
        max_seqlen_k: not needed; accepted.
        alibi_slopes: `[Hq]`, or `[sequences, Hq]`.
        block_table: int `[sequences, pages]` (version 4: `page_table`). Any page size.
        seqused_k: int `[sequences]`: keys in use of each sequence, from its start (version 3).
        others: as of `flash_attn_func`.

    Returns:
        `[T, Hq, V]`, with lse `[Hq, T]` where asked for.
    """
    table = block_table if page_table is None else page_table
    if cu_seqlens_q is None:
        raise ValueError("cu_seqlens_q: got None, want an int tensor [sequences + 1]; flash_attn_func takes a batch")
    if cu_seqlens_k is None and seqused_k is None:
        raise ValueError("cu_seqlens_k: got None, want an int tensor [sequences + 1], or seqused_k")
    check_shapes(3, q=q)
    check_shapes(3 if table is None else 4, k=k, v=v)
    check_shapes(1, cu_seqlens_q=cu_seqlens_q)
    for name, lengths in (("cu_seqlens_k", cu_seqlens_k), ("seqused_k", seqused_k)):
        if lengths is not None:
            check_shapes(1, **{name: lengths})
    q_lengths = cu_seqlens_q.diff()
    k_lengths = seqused_k if cu_seqlens_k is None or seqused_k is not None else cu_seqlens_k.diff()
    assert k_lengths is not None
    if table is not None:
        layout: Mask = PagedKeys(q_lengths, k_lengths, table, k.shape[1])
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    elif seqused_k is not None:
        if cu_seqlens_k is None:
            raise ValueError(
                "cu_seqlens_k: got None with seqused_k and no block_table, want where each sequence begins"
            )
        layout = GappyKeys(q_lengths, cu_seqlens_k[:-1], k_lengths)
    else:
        layout = Documents(q_lengths, k_lengths)
    visible = _visible(causal, window_size, alibi_slopes is not None)
    slopes = alibi_slopes
    if slopes is not None:
        check_type("alibi_slopes", slopes, Tensor)
        if slopes.dim() not in (1, 2):
            raise ValueError(f"alibi_slopes: got shape {list(slopes.shape)}, want [heads] or [sequences, heads]")
    mask = layout if visible is None else layout & visible

    def packed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            q[None],
            k[None],
            v[None],
            mask=mask,
            bias=None if slopes is None else Alibi(slopes),
            scale=softmax_scale,
            softcap=softcap or None,
            sinks=learnable_sink,
            dropout_p=dropout_p,
            return_lse=True,
        )
        return out[0], lse[0]

    if slopes is None or slopes.dim() == 1:
        out, lse = packed(q, k, v, mask, slopes)
        return _result(out, lse, return_attn_probs, return_lse)
    if table is not None or seqused_k is not None or cu_seqlens_k is None:
        raise ValueError("alibi_slopes: got one row for each sequence with paged or unused keys, want [heads]")
    # Slopes that differ from sequence to sequence: one call for each.
    found = []
    for n, (first, last) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        part = slice(int(cu_seqlens_k[n]), int(cu_seqlens_k[n + 1]))
        alone = Documents([last - first], [part.stop - part.start])
        found.append(packed(q[first:last], k[part], v[part], alone & (visible or Window()), slopes[n]))
    out, lse = torch.cat([x for x, _ in found]), torch.cat([x for _, x in found], -1)
    return _result(out, lse, return_attn_probs, return_lse)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: object, **kwargs: object) -> Result:
    """`flash_attn_func` of `qkv` `[B, M, 3, H, K]`; the other arguments follow."""
    _check_packed("qkv", qkv, 5, 3)
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)  # type: ignore[arg-type]


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: object, **kwargs: object) -> Result:
    """`flash_attn_func` of `q` `[B, M, Hq, K]` and `kv` `[B, N, 2, H, K]`; the other arguments follow."""
    _check_packed("kv", kv, 5, 2)
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)  # type: ignore[arg-type]


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, *args: object, **kwargs: object
) -> Result:
    """`flash_attn_varlen_func` of `qkv` `[T, 3, H, K]`; from `dropout_p` on the other arguments follow."""
    _check_packed("qkv", qkv, 4, 3)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)  # type: ignore[arg-type]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *args: object,
    **kwargs: object,
) -> Result:
    """`flash_attn_varlen_func` of `q` `[T, Hq, K]` and `kv` `[Tk, 2, H, K]`; from `dropout_p` on the others follow."""
    _check_packed("kv", kv, 4, 2)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs)  # type: ignore[arg-type]


def _visible(
    causal: bool, window_size: WindowSize, distances: bool, M: int | None = None, N: int | None = None
) -> Mask | None:
    """What `causal` and `window_size` hide; `distances`: a bias counts from the diagonal, so its alignment matters.

    M, N: sizes of the scores where they are known: in a square both alignments are the same mask.
    """
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size: got {window_size!r}, want (left, right)")
    left, right = (None if size is None or size < 0 else int(size) for size in window_size)
    align = "top_left" if M is not None and M == N else "bottom_right"
    parts: list[Mask] = []
    if causal:
        parts.append(Causal(align))  # type: ignore[arg-type]
        right = None
    if left is not None or right is not None or (distances and not causal and align == "bottom_right"):
        parts.append(Window(left, right, align))  # type: ignore[arg-type]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def _check_packed(name: str, x: Tensor, dims: int, count: int) -> None:
    if not isinstance(x, Tensor) or x.dim() != dims or x.shape[-3] != count:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        want = f"[B, tokens, {count}, heads, K]" if dims == 5 else f"[tokens, {count}, heads, K]"
        raise ValueError(f"{name}: got {got}, want {want}")


def check_shapes(dims: int, **given: Tensor) -> None:
    """Tensors of `dims` dimensions."""
    for name, x in given.items():
        check_type(name, x, Tensor)
        if x.dim() != dims:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want {dims} dimensions")


def _result(out: Tensor, lse: Tensor, with_probs: bool, with_lse: bool) -> Result:
    if with_probs:
        return out, lse, None
    return (out, lse) if with_lse else out
