"""Attention for Hugging Face transformers: `register()`, then `attn_implementation="keyspan"`; or `use_keyspan(model)`.

Two functions are registered: one makes a mask once per forward pass and layer type, one computes attention once per
layer. Needs `transformers` 5 (`pip install keyspan[transformers]`).
"""

from keyspan.interop.transformers.batching import continuous_batching
from keyspan.interop.transformers.cache import GrowingCache
from keyspan.interop.transformers.linears import replace_linears
from keyspan.interop.transformers.model import use_keyspan
from keyspan.interop.transformers.packing import unpadded
from keyspan.interop.transformers.registry import register

__all__ = ["GrowingCache", "continuous_batching", "register", "replace_linears", "unpadded", "use_keyspan"]
