"""Merge attention results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keyspan.core.checks import check_tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over disjoint sets of them: exact, and differentiable in all inputs.

    `lse = log Σᵢ exp(lseᵢ)` and `out = Σᵢ exp(lseᵢ − lse) · outᵢ`. A part with lse −inf is ignored, whatever its output
    holds; where all are −inf the output is 0. NaN in any other part gives NaN.

    Args:
        parts: pairs (out, lse) as `attention(..., return_lse=True)` gives them: `[B, M, Hq, V]` with `[B, Hq, M]`,
            `[B, M, G, H, V]` with `[B, G, H, M]`, or `[B, M, V]` with `[B, M]`, all of one shape. Learned `sinks` may
            be given to one of the parts only.

    Returns:
        (out, lse) of the same shapes; out in the dtype of the first part, lse in that of its lse.

    Raises:
        ValueError: for no parts, or parts that differ in shape.
    """
    try:
        parts = list(parts)
    except TypeError:
        raise ValueError(f"parts: got {type(parts).__name__}, want a sequence of pairs (out, lse)") from None
    if not parts:
        raise ValueError("parts: got none, want at least one (out, lse)")
    for index, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise ValueError(f"parts[{index}]: got {type(part).__name__}, want a pair (out, lse)")
        for name, x in zip(("out", "lse"), part, strict=True):
            check_tensor(f"parts[{index}] {name}", x)
    out, lse = parts[0]
    want = (out.shape[0], *out.shape[2:-1], out.shape[1]) if out.dim() >= 3 else None
    for index, (o, s) in enumerate(parts):
        if o.shape != out.shape or tuple(s.shape) != want:
            raise ValueError(
                f"parts[{index}]: got out {list(o.shape)} and lse {list(s.shape)}, "
                f"want {list(out.shape)} and {None if want is None else list(want)}"
            )
    scores = torch.stack([s for _, s in parts])
    peak = scores.detach().amax(0)
    peak = torch.where(peak == -torch.inf, 0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1, total)
    shares = (weights / total).movedim(-1, 2).unsqueeze(-1)  # [parts, B, M, heads…, 1]
    values = torch.stack([o.to(shares.dtype) for o, _ in parts])
    # The output of an empty part may be anything, NaN too: 0 keeps it out of the sum and of the gradients of lse. Any
    # other part counts, even with a share of 0, so that its NaN is not lost.
    seen = (scores > -torch.inf).movedim(-1, 2).unsqueeze(-1)
    merged = (torch.where(seen, values, 0) * shares).sum(0)
    return merged.to(out.dtype), torch.where(empty, -torch.inf, peak + total.log()).to(lse.dtype)
