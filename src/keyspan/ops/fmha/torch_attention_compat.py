"""xFormers' checks of torch's own attention kernels. Keyspan does not use those."""

from __future__ import annotations


def is_pt_cutlass_compatible(force: bool = False) -> bool:
    return False


def is_pt_flash_old(force: bool = False) -> bool | None:
    return None


def ensure_pt_flash_ok() -> None:
    """Does nothing."""
