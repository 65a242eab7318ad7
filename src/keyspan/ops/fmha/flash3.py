"""The names of xFormers' FlashAttention-3 operators, hints here. Knows no kernel; keyspan chooses."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa3F@keyspan"


class BwOp(AttentionBwOpBase):
    NAME = "fa3B@keyspan"
