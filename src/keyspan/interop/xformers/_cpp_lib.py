"""xFormers' loader of compiled operators. Keyspan registers its operator at import."""

from __future__ import annotations


def _register_extensions() -> None:
    """Does nothing."""
