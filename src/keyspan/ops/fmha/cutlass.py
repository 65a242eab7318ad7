"""Hints named after xFormers' CUTLASS operators. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "cutlassF"
    VARLEN_LSE_PACKED = False


class BwOp(AttentionBwOpBase):
    NAME = "cutlassB"
    VARLEN_LSE_PACKED = False
