"""Hints named after xFormers' FlashAttention-3 operators. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa3F@keyspan"


class BwOp(AttentionBwOpBase):
    NAME = "fa3B@keyspan"
