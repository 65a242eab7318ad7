"""Hints named after xFormers' FlashAttention-2 operators. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa2F@keyspan"


class BwOp(AttentionBwOpBase):
    NAME = "fa2B@keyspan"
