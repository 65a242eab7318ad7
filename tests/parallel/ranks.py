"""Runs a function of a test module on several processes, which are a gloo group."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(function, ranks: int, *arguments: str, timeout: float = 300) -> list[str]:
    """What `function(*arguments)` of an importable test module prints on each rank; AssertionError where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(function.__code__.co_filename).parent), *sys.path])
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    words = [sys.executable, __file__, function.__module__.split(".")[-1], function.__name__, *arguments]
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
            process.communicate()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(texts)
    return texts


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def main() -> None:
    module, name, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    getattr(importlib.import_module(module), name)(*arguments)
    dist.destroy_process_group()
    # DTensor's caches keep gloo's threads alive. One that still frees a tensor while Python ends aborts the process
    # (pytorch/pytorch#179291).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
