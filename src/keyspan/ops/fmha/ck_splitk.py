"""A hint named after xFormers' split-K Composable Kernel operator. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "ck_splitKF"


class FwOp_S1(FwOp):  # noqa: N801
    NAME = "ck_splitK1"


class FwOp_S2(FwOp):  # noqa: N801
    NAME = "ck_splitK2"


class FwOp_S4(FwOp):  # noqa: N801
    NAME = "ck_splitK4"
