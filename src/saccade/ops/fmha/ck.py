"""The names of xFormers' Composable Kernel operators, hints here. Knows no kernel; saccade chooses."""

from __future__ import annotations

from saccade.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ckF"


class BwOp(AttentionBwOpBase):
    NAME = "ckB"
