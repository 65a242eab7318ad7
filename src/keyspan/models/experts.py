"""A mixture of experts as a feed-forward layer, as GPT-OSS has it: a router chooses a few of them for each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keyspan.layers import Linear, linear


class Experts(nn.Module):
    """The weighted sum of the outputs of a token's experts, each a gated layer with clamped halves: x [T, D] -> [T, D].

    An expert computes `w3(min(x1, limit) · sigmoid(alpha · min(x1, limit)) · (clamp(x2, −limit, limit) + 1))` with
    `x1, x2 = w12(x).chunk(2)`. The router's largest logits choose the experts, their softmax gives the weights.
    Experts without a token are not read. A row's result does not depend on the other rows; on a GPU bit by bit where
    `invariant` is set.

    Args:
        dim: D; hidden: width of each half.
        count: how many experts there are; per_token: how many a token uses.
        limit, alpha: as above.
    """

    invariant: bool = False
    """As of `keyspan.layers.linear`; the router has its own."""

    def __init__(self, dim: int, hidden: int, count: int, per_token: int, limit: float, alpha: float) -> None:
        super().__init__()
        self.per_token, self.limit, self.alpha = per_token, limit, alpha
        self.router = Linear(dim, count)
        self.w12 = nn.Parameter(torch.empty(count, 2 * hidden, dim))
        self.w12_bias = nn.Parameter(torch.empty(count, 2 * hidden))
        self.w3 = nn.Parameter(torch.empty(count, dim, hidden))
        self.w3_bias = nn.Parameter(torch.empty(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        logits, chosen = self.router(x).topk(self.per_token, dim=-1)
        # (token, choice) pairs, those of one expert side by side.
        order = chosen.flatten().argsort(stable=True)
        rows = x[order // self.per_token].split(chosen.flatten().bincount(minlength=len(self.w12)).tolist())
        parts = [self._expert(n, part) for n, part in enumerate(rows) if len(part)]
        # Summed by choice, not by expert: in an order that is the token's own.
        found = torch.cat([x[:0], *parts])[order.argsort()].unflatten(0, (-1, self.per_token))
        total: Tensor = (found * logits.softmax(-1)[..., None]).sum(1)
        return total

    def _expert(self, n: int, x: Tensor) -> Tensor:
        x1, x2 = linear(x, self.w12[n], self.w12_bias[n], self.invariant).chunk(2, dim=-1)
        gate = x1.clamp(max=self.limit)
        gated = gate * _sigmoid(self.alpha * gate) * (x2.clamp(-self.limit, self.limit) + 1)
        return linear(gated, self.w3[n], self.w3_bias[n], self.invariant)


def _sigmoid(x: Tensor) -> Tensor:
    """Torch's, without what makes a row's bits depend on how many rows there are on a CPU, where torch rounds the last
    numbers of a tensor otherwise than those before them. Its softmax goes row by row.
    """
    if x.device.type != "cpu":
        return torch.sigmoid(x)
    return torch.stack((x, torch.zeros_like(x)), -1).softmax(-1)[..., 0]
