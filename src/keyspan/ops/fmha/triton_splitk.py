"""A hint named after xFormers' split-K Triton operator. Keyspan chooses its backend itself."""

from __future__ import annotations

from keyspan.ops.fmha.common import AttentionFwOpBase
from keyspan.ops.left_out import refuse


class FwOp(AttentionFwOpBase):
    NAME = "triton_splitKF"
    PARTIAL_IN_FLOAT32 = True


__getattr__ = refuse(__name__)
