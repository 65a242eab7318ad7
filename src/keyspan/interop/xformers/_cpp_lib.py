"""xFormers loads its compiled operators here. Keyspan registers its own when it is imported."""

from __future__ import annotations


def _register_extensions() -> None:
    """Nothing to register."""
