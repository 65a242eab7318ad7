"""Masks, written as layout & visibility, and their lowering to key ranges.

The layout says where a query's keys live, the visibility which of them it may see:

    visible(i, j) = layout(i, j) and (j < prefix or (causal(i, j) and (window(i, j) or j < sinks)))

with `i` and `j` counted inside the document. `&` combines the parts; a part not given allows everything. `|` sees what
any of its members sees.
In the pictures of the docstrings rows are queries, columns are keys, `■` is visible.
"""

from keyspan.core.masks.base import Combined, Dense, Frame, Layout, Mask, Union, as_mask
from keyspan.core.masks.layouts import Documents, GappyKeys, KeyLengths, PaddedKeys, PagedKeys, SharedPrompt
from keyspan.core.masks.visibility import Causal, Prefix, Sinks, Window

__all__ = [
    "Mask",
    "Layout",
    "Frame",
    "Combined",
    "Union",
    "Dense",
    "as_mask",
    "Documents",
    "PaddedKeys",
    "GappyKeys",
    "PagedKeys",
    "KeyLengths",
    "SharedPrompt",
    "Causal",
    "Window",
    "Prefix",
    "Sinks",
]
