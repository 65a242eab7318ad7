"""The names of xFormers' FlashAttention-2 operators, hints here. Knows no kernel; keyspan chooses."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa2F@keyspan"


class BwOp(AttentionBwOpBase):
    NAME = "fa2B@keyspan"
