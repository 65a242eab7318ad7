"""Builds the native library when the package is installed or a wheel is made. Knows no compiler: native/build.py does.

Where it cannot be built the install goes on without it, and the reason is kept for `keyspan info`.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
TARGET = Path("src/keyspan/backends/native")


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the library beside the Python code that loads it: for an editable install too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        sys.path.insert(0, str(ROOT / "native"))
        import build  # native/build.py

        why_not = ROOT / TARGET / "not_built.txt"
        for stale in (*(ROOT / TARGET).glob("libkeyspan.*"), why_not):
            stale.unlink(missing_ok=True)
        try:
            made = build.build(ROOT / TARGET)
        except build.CannotBuildError as reason:
            self.app.display_warning(f"keyspan is installed without its native backend: {reason}")
            why_not.write_text(f"{reason}\n", encoding="utf-8")
            made = why_not
        else:
            # No Python or torch is linked: one wheel serves every version of them on this platform.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["pure_python"] = False
        relative = made.relative_to(ROOT)
        build_data["force_include"][str(made)] = str(relative.relative_to("src"))
