"""The names of xFormers' FlashAttention-3 operators, hints here. Knows no kernel; saccade chooses."""

from __future__ import annotations

from saccade.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa3F@saccade"


class BwOp(AttentionBwOpBase):
    NAME = "fa3B@saccade"
