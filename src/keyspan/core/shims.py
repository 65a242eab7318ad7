"""Private names of torch and Triton, each with a plain way for a version that lacks it.

Only this module uses names with a leading underscore of either package. A name is looked up once, at import; where it
is missing the fallback is slower or more careful, never wrong. `keyspan info` lists what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")
MISSING: dict[str, str] = {}
"""Private names that the installed torch or Triton lacks, and what is done without each."""

_ALL_BY_OP = "every call runs through the registered op"


def _private(path: str, otherwise: Any, consequence: str) -> Any:
    """What torch has under a dotted path, or `otherwise`."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            MISSING[f"torch.{path}"] = consequence
            return otherwise
    return found


# Observers. Without a name we assume that somebody observes.
_dispatch_modes = _private("_C._len_torch_dispatch_stack", lambda: 1, _ALL_BY_OP)
function_modes: Callable[[], int] = _private("_C._len_torch_function_stack", lambda: 1, _ALL_BY_OP)
_function_mode_at = _private(
    "_C._get_function_stack_at", lambda index: None, "calls under a default device run through the registered op"
)
_transform = _private("_C._functorch.maybe_current_level", lambda: 0, _ALL_BY_OP)
_is_transformed = _private(
    "_C._functorch.is_functorch_wrapped_tensor", lambda x: False, "torch.func fails in torch's own words"
)
_is_batched = _private(
    "_C._functorch.is_legacy_batchedtensor", lambda x: False, "batched gradients fail in torch's own words"
)
profiled: Callable[[], bool] = _private("_C._autograd._profiler_enabled", lambda: True, _ALL_BY_OP)
_traced = _private("_C._get_tracing_state", lambda: 1, _ALL_BY_OP)
_has_dual_level = _private("autograd.forward_ad._current_level", None, _ALL_BY_OP) is not None
_saved_tensors_hooks = _private(
    "_C._autograd._top_saved_tensors_default_hooks", lambda _: True, "calls with gradients are not replayed"
)
_without_torch_function = _private("_C.DisableTorchFunction", nullcontext, "a default device makes calls slower")


def saved_tensors_hooked() -> bool:
    """Whether hooks are active on the tensors that autograd saves, as inside activation checkpointing."""
    return _saved_tensors_hooks(True) is not None


def default_device() -> bool:
    """Whether function modes are active, all of them default devices: `torch.set_default_device`, `with device:`."""
    return "torch._C._len_torch_function_stack" not in MISSING and all(
        (type(mode).__module__, type(mode).__name__) == ("torch.utils._device", "DeviceContext")
        for mode in map(_function_mode_at, range(function_modes()))
    )


def without_default_device(function: Callable[..., T], *args: Any) -> T:
    """Call a function that makes no tensor without naming its device: function modes make each access slower."""
    with _without_torch_function():
        return function(*args)


def eager() -> bool:
    """Whether torch's functions compute what they say now: no compiler, trace, mode or transform intercepts them.

    A default device (`torch.set_default_device`, `with torch.device(...)`) is a function mode, but no observer.
    """
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or (function_modes() and not default_device())
        or _transform() is not None
        or _traced() is not None
    )


def unobserved() -> bool:
    """Whether nothing, a profiler or forward-mode differentiation included, would notice that the op is bypassed."""
    return eager() and not profiled() and not dual_level()


def dual_level() -> bool:
    """Whether forward-mode differentiation may be active."""
    return not _has_dual_level or forward_ad._current_level >= 0


def transformed(x: Tensor) -> bool:
    """Whether a transform of `torch.func`, or a batch of gradients, wraps the tensor."""
    return bool(_is_transformed(x) or _is_batched(x))


def plain(x: Tensor) -> bool:
    """Whether pointer, strides and dtype say all about a tensor: no subclass, no negative bit, and it has memory."""
    try:
        return type(x) in PLAIN and not x.is_neg() and (x.data_ptr() != 0 or not x.numel())
    except RuntimeError:  # it has no storage
        return False


PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that are memory and nothing else."""

any_autocast: Callable[[], bool] = _private(
    "_C._is_any_autocast_enabled",
    lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda", "xpu", "mps"))),
    "each device type is asked",
)

# CUDA. torch's public functions ask the same and take longer; a torch without CUDA has neither.
_HAS_CUDA = torch.version.cuda is not None or torch.version.hip is not None


def _cuda(path: str, otherwise: Callable[..., Any]) -> Any:
    return _private(path, otherwise, "a public function, some µs slower") if _HAS_CUDA else otherwise


cuda_stream: Callable[[int], int] = _cuda(
    "_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
cuda_device: Callable[[], int] = _cuda("_C._cuda_getDevice", torch.cuda.current_device)
cuda_capturing: Callable[[], bool] = _cuda("_C._cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)
float32_precision: Callable[[], str] = _private(
    "_C._get_float32_matmul_precision", torch.get_float32_matmul_precision, "a public function, slower"
)


def recomputes_in_backward() -> bool:
    """Whether torch's compiler may compute parts of the forward, random ones included, again in backward."""
    config = getattr(torch._functorch, "config", None)
    if getattr(config, "activation_memory_budget", 1.0) < 1 or getattr(config, "aggressive_recomputation", False):
        return True
    # torch.autograd.graph.region_activation_memory_budget annotates the nodes that are traced.
    annotations = getattr(sys.modules.get("torch.fx.traceback"), "current_meta", {}).get("custom")
    return isinstance(annotations, dict) and annotations.get("_region_activation_memory_budget", 1.0) < 1


def triton_hooked() -> bool:
    """Whether a profiler has asked Triton to report every launch; true where Triton does not say."""
    import triton

    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    if runtime is None or not hasattr(runtime, "launch_enter_hook"):
        MISSING["triton.knobs.runtime.launch_enter_hook"] = "kernels are launched by Triton alone"
        return True
    hook = runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def _arguments_of(make: Callable[[Any, Any], list[Any]], metadata: Any, descriptor: Any) -> list[Any]:
    return make(descriptor, metadata)


def triton_launcher(kernel: Any) -> tuple[Callable[..., Any], tuple[Any, ...], list[Callable[[Any], list[Any]]]] | None:
    """How to launch a compiled kernel without Triton's Python code, which takes longer than the launch.

    Returns:
        The C function; its arguments between the stream and the kernel's own; for each descriptor what makes the
        function's arguments of it. None for a Triton whose internals are not known: then `kernel[grid](...)` launches.
    """
    import triton

    if torch.version.hip is not None or not triton.__version__.startswith("3.6."):
        MISSING["triton 3.6's launcher"] = "kernels are launched through Triton's Python code"
        return None
    try:
        run = kernel.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        from triton.backends.nvidia.driver import make_tensordesc_arg

        launch, metadata = run.launch, []
        if isinstance(launch, FunctionType):  # around the C function where there are descriptors
            cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
            launch, metadata = (cells[name].cell_contents for name in ("launcher", "tensordesc_meta"))
        # No scratch memory, no metadata and no hooks of the launch.
        before = (kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata)
    except (AttributeError, ImportError, KeyError):
        MISSING["triton 3.6's launcher"] = "kernels are launched through Triton's Python code"
        return None
    return launch, (*before, None, None, None), [partial(_arguments_of, make_tensordesc_arg, of) for of in metadata]
