"""The names of xFormers' CUTLASS (Blackwell) operators, hints here. Knows no kernel; keyspan chooses."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "cutlassF-blackwell"


class BwOp(AttentionBwOpBase):
    NAME = "cutlassB-blackwell"
