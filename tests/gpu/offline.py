"""Compiles what the launcher launches for an architecture that is not there, and reads what came out. Knows no test.

Needs only the triton wheel (its ptxas, cuobjdump and nvdisasm), no GPU and no driver. Must not run in a process whose
kernels are decorated for the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": None}


class Compiled(NamedTuple):
    """One compiled kernel."""

    kernel: str
    shared: int
    registers: int
    spills: int
    """Local loads and stores in the machine code."""
    wgmma: int
    mma: int
    tma: int
    serialised: list[str]
    """ptxas's C75xx notes: wgmma that waits for itself."""


class _Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(name: str) -> Any:
    """Launches become compilations for `name`; yields the list of results."""
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cache hit prints no log
        import triton
        from triton.backends.compiler import GPUTarget

        from saccade.backends.triton import config, launch

        capability = TARGETS[name]
        if capability is None:
            found = GPUTarget("hip", name, 64)
        else:
            found = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        triton.runtime.driver.set_active(_Driver(found))
        family = config.family(capability or (9, 4), amd=capability is None)
        launch._family = lambda device: family
        launch._processors = lambda device: 132
        launch._descriptors_allowed = lambda x: x.element_size() == 2 and family in ("hopper", "blackwell")
        results: list[Compiled] = []

        def run(kernel: Any, grid: Any, *args: Any, tile: Any) -> None:
            # Triton prints ptxas's log.
            with redirect_stdout(StringIO()) as log:
                made = kernel.warmup(*args, grid=grid, num_warps=tile.warps, num_stages=tile.stages)
            results.append(_read(kernel.fn.__name__, made, log.getvalue()))

        launch.run = run
        yield results


def _read(name: str, made: Any, log: str) -> Compiled:
    registers = spills = wgmma = mma = tma = 0
    if "cubin" in made.asm:
        import triton

        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
            ).stdout
            code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
        registers = int((re.search(r"REG:(\d+)", usage) or [0, "0"])[1])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        wgmma = len(re.findall(r"\bHGMMA", code))
        mma = len(re.findall(r"\bHMMA", code)) + len(re.findall(r"tcgen05\.mma", made.asm["ptx"]))
        tma = len(re.findall(r"\bUTMALDG", code))
    elif "amdgcn" in made.asm:
        mma = len(re.findall(r"v_mfma", made.asm["amdgcn"]))
        spills = int((re.search(r"\.vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"]) or [0, "0"])[1])
        registers = int((re.search(r"\.vgpr_count:\s+(\d+)", made.asm["amdgcn"]) or [0, "0"])[1])
    return Compiled(name, made.metadata.shared, registers, spills, wgmma, mma, tma, re.findall(r"(C75\d\d)", log))
