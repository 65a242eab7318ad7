"""Build hook: compiles the native library (native/build.py) when the package is installed or a wheel is made.

Where it cannot be built, the installation continues without it, and `keyspan info` shows the reason.
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
    """Puts the library beside the Python module that loads it, for editable installs too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        sys.path.insert(0, str(ROOT / "native"))
        import build  # native/build.py

        reason_file = ROOT / TARGET / "not_built.txt"
        for stale in (*(ROOT / TARGET).glob("libkeyspan.*"), reason_file):
            stale.unlink(missing_ok=True)
        try:
            artifact = build.build(ROOT / TARGET)
        except build.CannotBuildError as error:
            self.app.display_warning(f"keyspan is installed without its native backend: {error}")
            reason_file.write_text(f"{error}\n", encoding="utf-8")
            artifact = reason_file
        else:
            # The library links neither Python nor torch: one wheel serves all their versions on this platform.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["pure_python"] = False
        relative = artifact.relative_to(ROOT)
        build_data["force_include"][str(artifact)] = str(relative.relative_to("src"))
