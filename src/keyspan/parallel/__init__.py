"""Attention over sequences that are cut across ranks (context parallelism).

`Partition` says which rows of a sequence each rank holds, `ContextMask` is a mask cut along it, and
`context_attention` is `keyspan.attention` on such pieces.
"""

from keyspan.parallel.context import context_attention
from keyspan.parallel.masks import ContextMask
from keyspan.parallel.partition import Partition

__all__ = ["ContextMask", "Partition", "context_attention"]
