"""Counter-based dropout: which weights are dropped is a pure function of (seed, batch, head, query, key).

The generator is Philox 4x32-10 (Salmon et al. 2011). Every backend drops the same weights, whatever its tiles, and none
is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits (in int64) for counters and keys of 32-bit words (in int64) that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps all 64 bits of a 32×32-bit product.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def kept(seed: Tensor, p: float, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which weights are kept, bool `[b, h, m, n]`.

    Args:
        seed: int64 `[1]`.
        p: probability that a weight is dropped, in [0, 1).
        batch, head, query, key: 1-D int tensors of absolute indices, of lengths b, h, m, n. `head` is the query head.

    The counter is (key // 4, query, head, batch); word `key % 4` decides.
    """
    block, column = torch.unique(key >> 2, return_inverse=True)
    counter = (
        block.long(),
        query.long()[:, None],
        head.long()[:, None, None],
        batch.long()[:, None, None, None],
    )
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack([w.expand(len(batch), len(head), len(query), len(block)) for w in words], -1).flatten(-2)
    return bits.index_select(-1, column * 4 + (key & 3)) >= round(p * 2**32)
