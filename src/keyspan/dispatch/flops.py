"""FLOPs of a problem, and the registration of formulas with torch's FLOP counter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from keyspan.core.problem import Problem

COUNTER = "torch.utils.flop_counter"


def forward_flops(problem: Problem) -> int:
    """FLOPs of the forward pass over the visible area: two products."""
    return 2 * visible_area(problem) * (problem.query.shape[-1] + problem.value.shape[-1])


def backward_flops(problem: Problem) -> int:
    """FLOPs of the backward pass over the visible area: five products, the recomputed scores among them."""
    return 2 * visible_area(problem) * (3 * problem.query.shape[-1] + 2 * problem.value.shape[-1])


def visible_area(problem: Problem) -> int:
    """Visible (query, key) pairs over batch and heads; all pairs where the ranges hold no values (while tracing).

    With `XFORMERS_FLOP_FORMULA_WORST_CASE=1`, xFormers' switch for ranks that must agree, what a row of any lengths may
    have: all pairs, or those of a causal mask where no query sees a key behind its own.
    """
    known = problem.lo is None or type(problem.lo) is Tensor
    if known and os.environ.get("XFORMERS_FLOP_FORMULA_WORST_CASE") != "1":
        return problem.visible_pairs()
    everything = problem._replace(lo=None, hi=None, diagonal=None, dense=None)
    if known and problem.hi is not None and problem.diagonal is not None:
        M, N = problem.query.shape[1], problem.N
        if bool((problem.hi <= problem.diagonal + 1).all()):
            pairs = sum(min(max(i + 1 + N - M, 0), N) for i in range(M))
            return everything.visible_pairs() // max(M * N, 1) * pairs
    return everything.visible_pairs()


def register(counter: ModuleType) -> None:
    """Tell torch's counter, a module, what the registered ops cost."""

    def count_forward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return forward_flops(Problem(*args[: len(Problem._fields)]))

    def count_backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return backward_flops(Problem(*args[4 : 4 + len(Problem._fields)]))

    counter.register_flop_formula(torch.ops.keyspan.attention_forward, get_raw=True)(count_forward)
    counter.register_flop_formula(torch.ops.keyspan.attention_backward, get_raw=True)(count_backward)


def register_when_imported(register: Callable[[ModuleType], None]) -> None:
    """Call `register` with torch's counter now or, where nobody has imported it yet, as soon as somebody does.

    Importing it here would import Triton where there is one, which takes longer than all of keyspan does; and a counter
    copies what is registered when it is made, so that the first call of an op would be too late.
    """
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder(register))


class _Finder(MetaPathFinder):
    """Finds the counter alone, once, and by what finds every other module."""

    def __init__(self, register: Callable[[ModuleType], None]) -> None:
        self.register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.register)
        return spec


class _Loader(Loader):
    """Loads a module as another loader does, then registers."""

    def __init__(self, loader: Loader, register: Callable[[ModuleType], None]) -> None:
        self.loader, self.register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.register(module)
