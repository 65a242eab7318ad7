"""Hints named after xFormers' FlashAttention-3 operators. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.core.masks import Window
from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa3F@keyspan"


class BwOp(AttentionBwOpBase):
    NAME = "fa3B@keyspan"


class FwOp_KVSplit(FwOp):  # noqa: N801
    NAME = "fa3F_splitKV@keyspan"


def mask_non_zeros(s_q: int, s_k: int, window_left: int, window_right: int) -> int:
    """Visible pairs of s_q queries and s_k keys in a window aligned bottom-right; −1 is unbounded."""
    left, right = (None if side < 0 else side for side in (window_left, window_right))
    return int(Window(left, right, "bottom_right").materialize(s_q, s_k).sum())
