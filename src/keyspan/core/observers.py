"""Who would notice what is done past torch's dispatch, or change what it makes. Knows nothing of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that are memory and nothing else."""

# Asked before every call: looked up once.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.maybe_current_level
_profiled = torch._C._autograd._profiler_enabled
_traced = torch._C._get_tracing_state


def untouched() -> bool:
    """Whether torch's functions make what they say: no compiler, trace, mode or transform makes something else."""
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _traced() is not None
    )


def unwatched() -> bool:
    """Whether nobody, a profiler or forward-mode differentiation included, would notice the op."""
    return untouched() and forward_ad._current_level < 0 and not _profiled()


def plain(x: Tensor) -> bool:
    """Whether a tensor is what its address, strides and dtype say: of no subclass, not to be negated when read, and not
    zeros that have no memory."""
    return type(x) in PLAIN and not x.is_neg() and not x._is_zerotensor()
