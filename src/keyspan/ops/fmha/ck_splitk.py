"""The name of xFormers' split-K Composable Kernel operator, a hint here. Knows no kernel; keyspan chooses."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ck_splitKF"
