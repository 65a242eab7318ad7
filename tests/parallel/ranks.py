"""Runs a function of a test module on several processes that form a gloo group."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(function, ranks: int, folder: Path, *arguments: str, timeout: float = 300) -> list[str]:
    """What `function(*arguments)` of an importable test module prints on each rank; AssertionError where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(function.__code__.co_filename).parent), *sys.path])
    words = [sys.executable, __file__, function.__module__.split(".")[-1], function.__name__, str(folder), *arguments]
    processes = [
        subprocess.Popen(
            words, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(ranks)
    ]
    texts, stop = [], time.monotonic() + timeout
    try:
        for process in processes:
            texts.append(process.communicate(timeout=max(stop - time.monotonic(), 1))[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(texts)
    return texts


def main() -> None:
    module, name, folder, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    getattr(importlib.import_module(module), name)(*arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
