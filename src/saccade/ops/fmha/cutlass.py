"""The names of xFormers' CUTLASS operators, hints here. Knows no kernel; saccade chooses."""

from __future__ import annotations

from saccade.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "cutlassF"
    VARLEN_LSE_PACKED = False


class BwOp(AttentionBwOpBase):
    NAME = "cutlassB"
    VARLEN_LSE_PACKED = False
