"""Hints named after xFormers' CUTLASS operators for Blackwell. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "cutlassF-blackwell"


class BwOp(AttentionBwOpBase):
    NAME = "cutlassB-blackwell"
