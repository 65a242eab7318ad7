"""Compiles the native library with the C++ compiler of this machine ($CXX, c++, g++ or clang++).

    python native/build.py FOLDER [--flags='-fsanitize=address -g'] [--std-threads]

PLANNERS become one object file each; KERNELS become one for each instruction set of this machine's architecture.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
PLANNERS = ("plan", "linear", "product", "layers", "program")
KERNELS = ("kernels", "linear_kernels", "product_kernels", "layer_kernels")
FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wno-psabi"
FLAGS += " -Wno-maybe-uninitialized"  # GCC 12 warns of its own intrinsics
X86 = {
    "AVX2": "-mavx2 -mfma -mf16c",
    "AVX512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512",
}
X86["AVX512BF16"] = X86["AVX512"] + " -mavx512bf16 -mavx512vbmi"


class CannotBuildError(Exception):
    """The reason why the library cannot be built."""


def find_compiler() -> list[str]:
    """The command of the compiler: $CXX, or the first one found in PATH."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CannotBuildError(
        "no C++ compiler was found when keyspan was installed (looked for $CXX, c++, g++ and clang++)"
    )


def library_name() -> str:
    return {"Darwin": "libkeyspan.dylib", "Windows": "libkeyspan.dll"}.get(platform.system(), "libkeyspan.so")


def stamp() -> str:
    """A hash of what the library is compiled from. The library tells its own, `keyspan_stamp`."""
    found = hashlib.sha256()
    for path in sorted((*HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__))):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def build(folder: Path, flags: str = "", std_threads: bool = False) -> Path:
    """Compiles and links the library into `folder` and returns its path.

    Raises:
        CannotBuildError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    common = [*shlex.split(FLAGS), *shlex.split(flags)]
    threads = ["-pthread", "-DKEYSPAN_STD_THREADS"] if std_threads else ["-fopenmp", "-pthread"]
    if not std_threads and not _accepts(compiler, threads):
        threads = ["-pthread", "-DKEYSPAN_STD_THREADS"]  # a compiler without OpenMP, e.g. Apple's
    isas = {"portable": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        isas |= {isa: f"-DKEYSPAN_{isa} {options}" for isa, options in X86.items()}
    units = [(f"{name}.cpp", name, [*threads, f'-DKEYSPAN_STAMP="{stamp()}"']) for name in PLANNERS]
    units += [(f"{name}.cpp", f"{name}_{isa}", flags.split()) for name in KERNELS for isa, flags in isas.items()]
    with tempfile.TemporaryDirectory() as scratch:

        def compile_one(unit: tuple[str, str, list[str]]) -> str:
            source, name, options = unit
            target = str(Path(scratch) / f"{name}.o")
            _run([*compiler, *common, *options, "-c", str(HERE / source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, units))
        linked = Path(scratch) / library_name()
        _run([*compiler, *common, *threads, "-shared", *objects, "-o", str(linked)])
        folder.mkdir(parents=True, exist_ok=True)
        # Moved into place, because a library that a process has loaded must not be overwritten.
        target = folder / library_name()
        shutil.copy2(linked, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)
    return target


def _accepts(compiler: list[str], options: list[str]) -> bool:
    command = [*compiler, *options, "-x", "c++", "-E", "-", "-o", os.devnull]
    return _call(command, "#include <omp.h>\n").returncode == 0


def _run(command: list[str]) -> None:
    done = _call(command)
    if done.returncode:
        raise CannotBuildError(
            f"the C++ compiler failed when keyspan was installed: {shlex.join(command)}\n{done.stderr}"
        )
    sys.stderr.write(done.stderr)


def _call(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuildError(f"the C++ compiler could not be run when keyspan was installed: {error}") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flags", default="")
    parser.add_argument("--std-threads", action="store_true")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.flags, arguments.std_threads))
