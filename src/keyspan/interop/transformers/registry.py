"""Keyspan's name among the attention implementations of transformers."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from keyspan.interop.transformers.attention import attention_forward
from keyspan.interop.transformers.masks import make_mask

NAME = "keyspan"


def register() -> None:
    """Make `attn_implementation="keyspan"` known to transformers; calling it again changes nothing.

    Then `AutoModel.from_pretrained(..., attn_implementation="keyspan")` or `model.set_attn_implementation("keyspan")`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
