"""Draw masks as text and as PNG. Only a PNG imports matplotlib."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from keyspan.core.checks import check_type

SEEN, HIDDEN = "■", "·"


def mask_text(visible: Tensor) -> str:
    """`visible` `[M, N]`, or with leading dimensions, as text; an empty line separates pictures."""
    if visible.dim() == 2:
        return "\n".join(" ".join(SEEN if seen else HIDDEN for seen in row) for row in visible.tolist())
    return "\n\n".join(mask_text(part) for part in visible)


def mask_picture(visible: Tensor, path: str | Path, title: str = "") -> None:
    """Write `visible` `[..., M, N]` as a PNG, one panel per leading entry.

    Raises:
        ValueError: where matplotlib is not installed, and for no query, no key or no batch.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("path: a picture needs matplotlib: pip install matplotlib") from None
    check_type("path", path, str, Path)
    if not visible.numel():
        raise ValueError(f"path: got a mask of shape {list(visible.shape)}, want at least one key to draw")
    panels = visible.reshape(-1, *visible.shape[-2:])
    M, N = panels.shape[-2:]
    side = min(0.32, 6 / max(M, N, 1))
    width = max(N * side, 2.0)
    figure = Figure(figsize=(len(panels) * (width + 0.6) + 0.4, max(M * side, 1.0) + 1.2), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.imshow(panel.int().tolist(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="equal")
        if max(M, N) <= 64:
            axes.set_xticks([n - 0.5 for n in range(N + 1)], minor=True)
            axes.set_yticks([m - 0.5 for m in range(M + 1)], minor=True)
            axes.grid(which="minor", color="white", linewidth=1)
            axes.tick_params(which="minor", length=0)
        axes.set_xlabel("key")
        axes.set_ylabel("query" if index == 0 else "")
    figure.suptitle(title, fontsize="small", wrap=True)
    figure.savefig(path, dpi=150, format="png")
