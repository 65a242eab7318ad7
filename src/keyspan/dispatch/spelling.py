"""Names that other libraries give to the arguments of `attention`, and Keyspan's."""

from __future__ import annotations

ARGUMENTS = {
    "is_causal": "mask=keyspan.Causal()",
    "causal": 'mask=keyspan.Causal("bottom_right"), the alignment of flash-attn',
    "attn_mask": "mask= for a bool tensor (true = visible), bias= for a floating one",
    "attention_mask": "mask=keyspan.KeyLengths.from_padding_mask(attention_mask) for padding [B, N]",
    "key_padding_mask": "mask=keyspan.KeyLengths.from_padding_mask(~key_padding_mask)",
    "attn_bias": "mask= for a mask of keyspan, bias= for a floating tensor; keyspan.ops takes xFormers' masks",
    "window_size": 'mask=keyspan.Window(left, right, "bottom_right")',
    "cu_seqlens": "mask=keyspan.Documents.from_cu_seqlens(cu_seqlens)",
    "cu_seqlens_q": "mask=keyspan.Documents.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k)",
    "block_mask": "mask=, from keyspan.interop.torch.find_ranges",
    "alibi_slopes": "bias=keyspan.Alibi(slopes)",
    "score_mod": "bias= for what is added to the scores, softcap=; no other function of them is taken",
    "softmax_scale": "scale=",
    "dropout": "dropout_p=",
    "p": "dropout_p=",
    "training": "dropout_p=0.0 outside training: dropout is applied whenever it is not 0",
    "enable_gqa": "nothing: key heads may be a divisor of query heads",
    "need_weights": "nothing: the weights are never made",
    "return_softmax_lse": "return_lse=True",
}


def refuse(positional: tuple[object, ...], unknown: dict[str, object]) -> TypeError:
    """The error for arguments that `attention` does not have, with the right spelling."""
    if positional:
        kinds = ", ".join(type(x).__name__ for x in positional)
        return TypeError(
            f"attention: got {kinds} after query, key and value, want all others by name: mask=, bias=, scale=, …"
        )
    name = next(iter(unknown))
    want = f"want {ARGUMENTS[name]}" if name in ARGUMENTS else "which is no argument of keyspan.attention"
    return TypeError(f"{name}: got {type(unknown[name]).__name__}, {want}")
