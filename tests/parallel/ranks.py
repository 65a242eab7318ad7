"""Runs a function of a test module on several processes, which are a gloo group."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["pytest", "torch.distributed.tensor", "keyspan.training.loop", "keyspan.parallel", "keyspan.testing.cases"]
"""Imported once, by the server that ranks are forked from: each would take seconds over it."""


def run_ranks(function: Callable[..., None], ranks: int, *arguments: str, timeout: float = 300) -> list[str]:
    """What `function(*arguments)` of an importable test module prints on each rank; AssertionError where one fails."""
    server = get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    called = (function.__module__.split(".")[-1], function.__name__, arguments)
    with TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        port, stop = free_port(), time.monotonic() + timeout
        processes = [
            server.Process(target=_rank, args=(rank, ranks, port, str(files[rank]), *called)) for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(stop - time.monotonic(), 0))
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [file.read_text() for file in files]
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(texts)
    return texts


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _rank(rank: int, ranks: int, port: int, file: str, module: str, name: str, arguments: tuple[Any, ...]) -> None:
    written = os.open(file, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    getattr(importlib.import_module(module), name)(*arguments)
    dist.destroy_process_group()
    # DTensor's caches keep gloo's threads alive. One that still frees a tensor while Python ends aborts the process
    # (pytorch/pytorch#179291).
    sys.stdout.flush()
    os._exit(0)
