"""Selective activation checkpointing under xFormers' names, with torch's implementation.

Chen et al. 2016 (checkpointing). The choice of the results to store is a knapsack problem.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import SAC_IGNORED_OPS, create_selective_checkpoint_contexts

Policy: TypeAlias = Callable[..., bool]
"""(ctx, op, *args, **kwargs) -> whether forward stores the op's result."""

STORED_OPS = ("keyspan.attention_forward.default", "aten.addmm.default", "aten.mm.default")
"""Operators whose results the default policy stores: the expensive ones."""

GRAINS = 1000
"""Resolution of memory: a policy is optimal to 1 / GRAINS of the total."""


def _policy(policy_fn: Sequence[Any] | Policy | None) -> Policy:
    if callable(policy_fn):
        return copy.deepcopy(policy_fn)  # a policy with a counter restarts in every checkpoint
    names = {str(op) for op in (STORED_OPS if policy_fn is None else policy_fn)}
    return lambda ctx, op, *args, **kwargs: str(op) in names


def selective_checkpoint_context_fn(policy_fn: Sequence[Any] | Policy | None = None) -> tuple[Any, Any]:
    """The `context_fn` of torch.utils.checkpoint for a policy: a function, operators or names, or the default."""
    policy = _policy(policy_fn)
    if not torch.is_grad_enabled():
        return nullcontext(), nullcontext()
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=True)
    return contexts


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    preserve_rng_state: bool = True,
    policy_fn: Sequence[Any] | Policy | None = None,
    **kwargs: Any,
) -> Any:
    """`function(*args, **kwargs)`; backward recomputes the results that `policy_fn` does not store.

    Args:
        policy_fn: operators whose results are stored, as `list_operators` gives them or by name; or a function
            (ctx, op, *args, **kwargs) -> bool; `None` stores attention and matrix products.
    """
    return torch.utils.checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=preserve_rng_state,
        context_fn=partial(selective_checkpoint_context_fn, policy_fn),
        **kwargs,
    )


class _Record(TorchDispatchMode):
    """Records every operator, its duration, its inputs and its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, float, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.calls.append((func, seconds, _tensors((args, kwargs)), _tensors(out)))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def list_operators(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The operators that `function(*args, **kwargs)` calls, in order."""
    with _Record() as record:
        function(*args, **kwargs)
    return [call[0] for call in record.calls]


class _OptimalPolicy:
    """Stores the results of the calls in `keep`, by call number. Forward and recomputation have separate counters."""

    def __init__(self, keep: Sequence[bool]) -> None:
        self.keep = list(keep)
        self.count = {False: 0, True: 0}

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        index = self.count[ctx.is_recompute]
        self.count[ctx.is_recompute] += 1
        return index < len(self.keep) and self.keep[index]


def get_optimal_checkpoint_policy(function: Callable[..., Any], *args: Any, memory_budget: float) -> Policy:
    """The policy that saves the most recomputation time within a share of the memory of all results.

    Runs `function(*args)` twice and measures the second run.

    Args:
        memory_budget: 0 (store nothing) to 1 (store everything).
    """
    if not 0 <= memory_budget <= 1:
        raise ValueError(f"memory_budget: got {memory_budget}, want a share between 0 and 1")
    with torch.random.fork_rng():
        function(*args)
        with _Record() as record:
            out = function(*args)
    calls = [call for call in record.calls if call[0] not in SAC_IGNORED_OPS]
    memory, outputs_of_all = [], {_storage(x) for x in _tensors(out)}
    written = {_storage(x) for op, _, inputs, _ in calls if op._schema.is_mutable for x in inputs}
    for _, _, inputs, outputs in calls:
        old = {_storage(x) for x in inputs}
        fresh = [x for x in outputs if _storage(x) not in old]
        # Views cost nothing to recompute. A result that is written to later cannot be stored.
        usable = bool(fresh) and not any(_storage(x) in written for x in outputs)
        nbytes = sum(x.untyped_storage().nbytes() for x in fresh if _storage(x) not in outputs_of_all)
        memory.append(nbytes if usable else None)
    room = int(memory_budget * sum(m for m in memory if m is not None))
    return _OptimalPolicy(_knapsack([call[1] for call in calls], memory, room))


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _knapsack(seconds: Sequence[float], memory: Sequence[int | None], room: int) -> list[bool]:
    """Which items to store for the most seconds in `room` bytes; `None` in `memory`: cannot be stored."""
    total = sum(m for m in memory if m is not None)
    fits, unit = room >= total, max(1, total // GRAINS)
    capacity = 0 if fits else room // unit
    # Rounded up, so that they hold; where everything fits, nothing is rounded.
    weights = [None if m is None else 0 if fits else -(-m // unit) for m in memory]
    best, chosen = [0.0] * (capacity + 1), []
    for value, weight in zip(seconds, weights, strict=True):
        before = best
        if weight is None or weight > capacity:
            chosen.append([False] * (capacity + 1))
            continue
        best = before[:weight] + [
            max(before[room], before[room - weight] + value) for room in range(weight, capacity + 1)
        ]
        chosen.append([after > was for after, was in zip(best, before, strict=True)])
    keep, room = [False] * len(memory), capacity
    for index in range(len(memory) - 1, -1, -1):
        weight = weights[index]
        if weight is not None and chosen[index][room]:
            keep[index], room = True, room - weight
    return keep


def _optimize_runtime_with_given_memory(
    memory: Tensor,
    runtimes: Tensor,
    max_memory: float,
    view_like_ops: Sequence[int],
    inplace_ops: Sequence[tuple[int, int]],
    random_ops: Sequence[int],
    force_store_random: bool,
) -> Tensor:
    """xFormers' private solver: 1 for each operator that is stored, 0 for each that is recomputed, fp64 `[operators]`.

    Args:
        memory: bytes of each operator's result.
        runtimes: seconds of each operator.
        max_memory: bytes that may be stored.
        view_like_ops: operators that are recomputed.
        inplace_ops: (operator, operator whose result it writes to): both are stored or none; stored, where equal.
        random_ops: operators that are recomputed, or with `force_store_random` stored.
    """
    first = list(range(len(memory)))  # of the operators that are stored together
    forced, never = set(random_ops) if force_store_random else set(), set(view_like_ops)
    if not force_store_random:
        never |= set(random_ops)
    for op, parent in inplace_ops:
        first[op] = first[parent]
        if op == parent:
            forced.add(op)
    groups: dict[int, list[int]] = {}
    for op, of in enumerate(first):
        groups.setdefault(of, []).append(op)
    needed = {of: int(sum(memory[op] for op in ops)) for of, ops in groups.items()}
    always = {of for of, ops in groups.items() if forced & set(ops)}
    room = int(max_memory) - sum(needed[of] for of in always)
    if room < 0:
        raise ValueError(f"max_memory: got {max_memory}, want what the operators need that are always stored")
    free = [of for of in groups if of not in always]
    seconds = [float(sum(runtimes[op] for op in groups[of])) for of in free]
    keep = _knapsack(seconds, [None if never & set(groups[of]) else needed[of] for of in free], room)
    stored = always | {of for of, chosen in zip(free, keep, strict=True) if chosen}
    return torch.tensor([float(of in stored) for of in first], dtype=torch.float64)


class SelectiveCheckpointWrapper(ActivationWrapper):
    """A module under `checkpoint`; its state dict has the inner module's names."""

    def __init__(
        self, mod: nn.Module, memory_budget: float | None = None, policy_fn: Sequence[Any] | Policy | None = None
    ) -> None:
        super().__init__(mod)  # type: ignore[no-untyped-call]
        if (memory_budget is None) == (policy_fn is None):
            raise ValueError("memory_budget: want either it or policy_fn, and not both")
        self.memory_budget = memory_budget
        self.policy_fn = policy_fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = self._checkpoint_wrapped_module
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        if self.policy_fn is None:
            assert self.memory_budget is not None
            # Later inputs use the policy of the first ones.
            self.policy_fn = get_optimal_checkpoint_policy(
                partial(inner, **kwargs), *args, memory_budget=self.memory_budget
            )
        return checkpoint(inner, *args, policy_fn=self.policy_fn, **kwargs)


def selective_checkpoint_wrapper(
    module: nn.Module, memory_budget: float | None = None, policy_fn: Sequence[Any] | Policy | None = None
) -> SelectiveCheckpointWrapper:
    """Checkpoint a module by `policy_fn`, or by the best policy within `memory_budget`."""
    return SelectiveCheckpointWrapper(module, memory_budget, policy_fn)
