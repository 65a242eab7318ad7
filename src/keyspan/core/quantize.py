"""Quantize keys, values and queries to 8 bits with scales, as `attention` reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from keyspan.core.problem import DTYPES, STORED, names


def quantize(x: Tensor, dtype: torch.dtype, run: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to 8 bits: `stored * scale` is `x`, rounded.

    Each run of rows of a head has a scale, which maps its largest magnitude to the largest number of `dtype`. The
    mapping is symmetric, without an offset, and deterministic.
    No value is read on the host. Formats: Micikevicius et al. 2022 (e4m3); scales by blocks of keys: Shah et al. 2024
    (FlashAttention-3).

    Args:
        x: keys, values or a query as `attention` takes them, `[B, N, heads, dim]`, `[B, N, G, H, dim]` or
            `[B, N, dim]`; fp32, fp64, bf16 or fp16.
        dtype: `torch.float8_e4m3fn` (a relative error of up to 1/16) or `torch.int8` (an absolute error of up to 1/254
            of the run's largest magnitude).
        run: rows that share a scale; it divides N. `None`: all N. For paged keys the page size gives one per page.

    Returns:
        `stored`, in `dtype` with the shape of `x`, and `scale`, fp32 (fp64 for fp64) `[B, N / run, heads]`: arguments
        of `attention`. A run of zeros has scale 1. A run that holds NaN or inf has scale NaN: all of it becomes NaN.

    Raises:
        ValueError: for a wrong argument, and for `x` that requires a gradient while grad mode is on.
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {got}, want a tensor of {names(*DTYPES)}")
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x: got shape {list(x.shape)}, want [B, N, dim], [B, N, heads, dim] or [B, N, G, H, dim]")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: got a tensor that requires a gradient, want none, or torch.no_grad(): rounding has none")
    if dtype not in STORED:
        raise ValueError(f"dtype: got {dtype}, want one of {names(*STORED)}")
    N = x.shape[1]
    run = max(N, 1) if run is None else run
    if isinstance(run, bool) or not isinstance(run, int) or run < 1 or N % run:
        raise ValueError(f"run: got {run!r}, want a divisor of the {N} rows of x, or None")
    # Without rows there is one run, which is empty.
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (max(N // run, 1), min(run, N)))
    peak = rows.abs().amax((2, -1)) if rows.numel() else rows.new_zeros((*rows.shape[:2], *rows.shape[3:-1]))
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = peak / largest
    scale = torch.where(scale == 0, 1, scale)
    scale = torch.where(torch.isfinite(peak), scale, torch.nan)
    stored = (rows / scale[:, :, None, ..., None]).nan_to_num(0).clamp(-largest, largest)
    stored = stored.round() if dtype == torch.int8 else stored
    return stored.to(dtype).flatten(1, 2), scale
