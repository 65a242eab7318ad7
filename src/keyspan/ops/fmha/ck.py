"""Hints named after xFormers' Composable Kernel operators. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ckF"


class BwOp(AttentionBwOpBase):
    NAME = "ckB"
