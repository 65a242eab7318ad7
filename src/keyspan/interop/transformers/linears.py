"""Linear layers of a model, multiplied by Keyspan's native library."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from keyspan.core.checks import check_type
from keyspan.layers.gemm import Linear

Model = TypeVar("Model", bound=nn.Module)


def replace_linears(model: Model) -> Model:
    """Let Keyspan's native library multiply in a model's linear layers, on a CPU; results are equal but for rounding.

    Every `nn.Linear` (no subclass of it) becomes a `keyspan.layers.Linear`, which has the same parameters, state dict
    and hooks. Inference and training. On other devices, and while torch's compiler traces, nothing changes.

    Args:
        model: any module; it is changed.

    Returns:
        The same model.
    """
    check_type("model", model, nn.Module)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear  # its hooks and whoever holds it stay as they are
    return model
