"""Refuses optimizer steps whose loss or gradient is not finite, or whose loss jumps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keyspan.training.config import TrainConfig

IN_A_ROW = 20
"""So many skipped steps in a row end a run: the loss has risen for good, and more steps would be skipped for ever."""


class Guard:
    """Judges each step on the device, so that nothing waits for it; all ranks have the same figures and judge alike.

    A loss is a spike where it is more than `spike` standard deviations above the mean of the last `spike_window` losses
    of steps that were taken; until there are so many none is. Where the run is to stop, all steps behind one that is
    refused are refused too, since the host reads of it later.

    Args:
        recent: losses of the steps before, of a resumed run.
    """

    def __init__(self, config: TrainConfig, device: torch.device, recent: Sequence[float] = ()) -> None:
        self._config = config
        self._taken = torch.full((config.spike_window,), torch.nan, device=device)  # the last losses, the newest last
        kept = torch.tensor(list(recent)[-config.spike_window :], dtype=torch.float32)
        self._taken[len(self._taken) - len(kept) :] = kept.to(device)
        self.refused = torch.zeros((), device=device)
        """1 where the last step judged must not be taken, else 0."""
        self.limit = torch.full((), torch.inf, device=device)
        """The loss beyond which that one was a spike."""

    def judge(self, loss: Tensor, norm: Tensor | None) -> Tensor:
        """`refused` for a step of this loss and gradient norm; None for a norm that may overflow."""
        bad = ~loss.isfinite()
        if norm is not None:
            bad = bad | ~norm.isfinite()
        if self._config.spike is not None:
            found = self._taken.mean() + self._config.spike * self._taken.std()
            self.limit = torch.where(found.isnan(), torch.inf, found)  # NaN where there are too few
            bad = bad | (loss > self.limit)
        if self._config.on_spike == "stop":
            bad = bad | self.refused.bool()
        self._taken = torch.where(bad, self._taken, torch.cat([self._taken[1:], loss.detach().float().view(1)]))
        self.refused = bad.float()
        return self.refused

    def words(self, loss: float, limit: float) -> str:
        """What a spike is called."""
        count = f"{self._config.spike:g} standard deviations above the mean of the last {self._config.spike_window}"
        return f"the loss is {loss:.4f}, a spike: {count} is {limit:.4f}"
