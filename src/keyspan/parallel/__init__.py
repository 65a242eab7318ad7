"""Attention over sequences that are cut across ranks (context parallelism).

`Partition` says which rows of a sequence each rank holds, `ContextMask` is a mask cut along it, and
`context_attention` is `keyspan.attention` on such pieces. `Context` goes to a model, which cuts its own masks.
"""

from keyspan.parallel.context import context_attention
from keyspan.parallel.masks import Context, ContextMask
from keyspan.parallel.partition import Partition

__all__ = ["Context", "ContextMask", "Partition", "context_attention"]
