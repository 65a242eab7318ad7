"""The name of xFormers' split-K Composable Kernel operator, a hint here. Knows no kernel; saccade chooses."""

from __future__ import annotations

from saccade.ops.fmha.common import AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ck_splitKF"
