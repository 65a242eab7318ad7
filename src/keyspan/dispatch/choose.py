"""The choice of a backend."""

from __future__ import annotations

from keyspan.backends import AUTOMATIC, BACKENDS, load
from keyspan.core.problem import Problem


def choose(problem: Problem, backend: str | None) -> str:
    """The name of the backend that computes this problem.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: where the backend asked for by name cannot; it is never replaced by another. Also where
            results are to be invariant and no backend has them.
    """
    if backend is None:
        reasons = {}
        for name in AUTOMATIC:
            if name != "triton" or problem.query.is_cuda:
                reason = load(name).reason_against(problem)
                if reason is None:
                    return name
                reasons[name] = reason
        raise NotImplementedError("no backend can: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, want one of {', '.join(BACKENDS)} or None")
    reason = load(backend).reason_against(problem)
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot compute this: {reason}")
    return backend
