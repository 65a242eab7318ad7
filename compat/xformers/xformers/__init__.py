"""A stand-in for xFormers: its modules are those of `keyspan` under xFormers' names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from keyspan.interop.xformers import _has_cpp_library, _is_triton_available
from keyspan.ops.left_out import LEFT_OUT, refuse

from .version import __version__

_MOVED = {
    "xformers._cpp_lib": "keyspan.interop.xformers._cpp_lib",
    "xformers.attn_bias_utils": "keyspan.interop.xformers.attn_bias_utils",
    "xformers.checkpoint": "keyspan.interop.xformers.checkpoint",
    "xformers.utils": "keyspan.interop.xformers.utils",
    "xformers.ops.modpar_layers": "keyspan.ops.parallel",
    "xformers.ops.seqpar": "keyspan.ops.parallel",
    "xformers.ops.sequence_parallel_fused_ops": "keyspan.ops.parallel",
    "xformers.ops.differentiable_collectives": "keyspan.ops.parallel",
}


def _real_xformers() -> Iterator[str]:
    """Other packages of this name on sys.path, except copies of this one."""
    here = Path(__file__).resolve()
    for entry in sys.path:
        spec = PathFinder.find_spec("xformers", [entry])
        if spec is not None and spec.origin is not None:
            other = Path(spec.origin).resolve()
            if other != here and other.read_bytes() != here.read_bytes():
                yield str(other.parent)


class _Alias(MetaPathFinder, Loader):
    """Imports `xformers.ops...` as `keyspan.ops...`: the same module object, and so the same classes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._why_not(fullname) is not None:
            return ModuleSpec(fullname, self)
        name = self._name(fullname)
        return ModuleSpec(fullname, self) if name is not None and find_spec(name) is not None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        why = self._why_not(spec.name)
        if why is not None:
            raise ModuleNotFoundError(f"{spec.name} is left out of keyspan: {why}", name=spec.name)
        name = self._name(spec.name)
        assert name is not None
        self._spec = find_spec(name)
        return import_module(name)

    def exec_module(self, module: ModuleType) -> None:
        # The import system has set the alias's spec on the module: restore its own.
        module.__spec__ = self._spec

    @staticmethod
    def _why_not(fullname: str) -> str | None:
        package, _, name = fullname.rpartition(".")
        return LEFT_OUT.get(name) if package in ("xformers", "xformers.ops", "xformers.ops.fmha") else None

    @staticmethod
    def _name(fullname: str) -> str | None:
        if fullname in _MOVED:
            return _MOVED[fullname]
        inside = fullname == "xformers.ops" or fullname.startswith("xformers.ops.")
        return "keyspan" + fullname.removeprefix("xformers") if inside else None


for _other in _real_xformers():
    raise ImportError(
        f"this is keyspan's stand-in for xformers, and there is a real one in {_other}: "
        "it does not shadow it; uninstall one of the two (pip uninstall xformers)"
    )
if not any(type(finder).__name__ == _Alias.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Alias())

# These need the finder. As in xFormers, `xformers.checkpoint` is the function, not the module.
from . import _cpp_lib  # noqa: E402
from .checkpoint import (  # noqa: E402
    checkpoint,
    get_optimal_checkpoint_policy,
    list_operators,
    selective_checkpoint_wrapper,
)

__getattr__ = refuse(__name__)

__all__ = [
    "__version__",
    "_cpp_lib",
    "_has_cpp_library",
    "_is_triton_available",
    "checkpoint",
    "get_optimal_checkpoint_policy",
    "list_operators",
    "selective_checkpoint_wrapper",
]
