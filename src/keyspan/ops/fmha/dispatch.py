"""xFormers' choice of an operator. Operators are hints, so it always returns the same one."""

from __future__ import annotations

from keyspan.ops.fmha import cutlass, flash
from keyspan.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase, Inputs


def _get_use_fa3() -> bool:
    """Keyspan does not use FlashAttention-3."""
    return False


def _set_use_fa3(use_flash_attention3: bool) -> None:
    """Does nothing: operators are hints."""


def fa3_available() -> bool:
    return False


def _dispatch_fw_priority_list(inp: Inputs, needs_gradient: bool) -> list[type[AttentionFwOpBase]]:
    return [flash.FwOp]


def _dispatch_fw(inp: Inputs, needs_gradient: bool) -> type[AttentionFwOpBase]:
    """The forward operator.

    Raises:
        NotImplementedError: with the reasons, where keyspan cannot compute `inp`.
    """
    return _checked(inp, flash.FwOp)


def _dispatch_bw(inp: Inputs, varlen_lse_packed: bool | None = None) -> type[AttentionBwOpBase]:
    """The backward operator; `varlen_lse_packed=False` gives one with CUTLASS's padded lse."""
    _checked(inp, flash.FwOp)
    return cutlass.BwOp if varlen_lse_packed is False else flash.BwOp


def _checked(inp: Inputs, op: type[AttentionFwOpBase]) -> type[AttentionFwOpBase]:
    reasons = op.not_supported_reasons(inp)
    if reasons:
        raise NotImplementedError("No operator found for `memory_efficient_attention`:\n" + "\n".join(reasons))
    return op
