"""The names of xFormers' FlashAttention-2 operators, hints here. Knows no kernel; saccade chooses."""

from __future__ import annotations

from saccade.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    NAME = "fa2F@saccade"


class BwOp(AttentionBwOpBase):
    NAME = "fa2B@saccade"
