"""Continuous batching: transformers' paged cache, with attention by Keyspan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from keyspan.interop.transformers.attention import attention_forward
from keyspan.interop.transformers.model import outermost

_NAME = "keyspan_flash"
"""transformers takes no other implementations than its own and those with "flash" in their names, which get no mask."""


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let transformers' continuous batching compute attention with Keyspan, on any device.

    For `generate_batch`, or a manager that is started and stopped inside:

        with keyspan.interop.transformers.continuous_batching(model):
            outputs = model.generate_batch(prompts, generation_config=config)

    Args:
        model: a model with `generate_batch`. Its attention implementation is as before after the block.

    Raises:
        ValueError: where it is no model of transformers.
    """
    outermost(model)
    AttentionInterface.register(_NAME, attention_forward)
    AttentionMaskInterface.register(_NAME, _no_mask)
    before = [(m.config, m.config._attn_implementation) for m in model.modules() if isinstance(m, PreTrainedModel)]
    try:
        for config, _ in before:  # `set_attn_implementation` would look for a flash-attn of this name
            config._attn_implementation = _NAME
        yield model
    finally:
        for config, name in before:
            config._attn_implementation = name


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Sequences are told apart by `cu_seq_lens_q` and `cu_seq_lens_k`."""
