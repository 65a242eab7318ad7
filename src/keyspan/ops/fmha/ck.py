"""The names of xFormers' Composable Kernel operators, hints here. Knows no kernel; keyspan chooses."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ckF"


class BwOp(AttentionBwOpBase):
    NAME = "ckB"
