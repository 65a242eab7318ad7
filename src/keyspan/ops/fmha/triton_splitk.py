"""A hint named after xFormers' split-K Triton operator. Keyspan chooses its backend itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from keyspan.ops.fmha.common import NO_PACKED_KEYS, AttentionFwOpBase, Inputs


class FwOp(AttentionFwOpBase):
    NAME = "triton_splitKF"
    PARTIAL_IN_FLOAT32 = True
    SPLIT_K: ClassVar[int | None] = None
    NUM_GROUPS: ClassVar[int] = 1

    @classmethod
    @lru_cache
    def get_operator(cls, splitk: int, **tuning: object) -> type[FwOp]:
        """A hint with a number of splits. Tuning arguments (`block_m`, …) become attributes in upper case."""
        attributes = {name.upper(): value for name, value in tuning.items() if value is not None}
        return type(f"FwOp_S{splitk}", (cls,), {"NAME": f"triton_splitK{splitk}", "SPLIT_K": splitk, **attributes})


FwOp_Map = {splits: FwOp.get_operator(splits) for splits in (1, 2, 4, 8, 16, 32, 48, 64, 72, 80, 96, 112, 128)}
FwOp_S1, FwOp_S2, FwOp_S4, FwOp_S8 = (FwOp_Map[splits] for splits in (1, 2, 4, 8))
FwOp_S16, FwOp_S32, FwOp_S64, FwOp_S128 = (FwOp_Map[splits] for splits in (16, 32, 64, 128))


@dataclass
class InputsFp8(Inputs):
    """Keys and values packed as int4 or fp8 in int32. Left out: every use raises ValueError."""

    k_fp8_scale_shift: Tensor | None = None
    v_fp8_scale_shift: Tensor | None = None

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        raise ValueError(f"inp: got InputsFp8, want Inputs: {NO_PACKED_KEYS}")
