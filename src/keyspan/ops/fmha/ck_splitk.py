"""A hint named after xFormers' split-K Composable Kernel operator. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ck_splitKF"
