"""Runs the Triton backend on the CPU: kernels are decorated for Triton's interpreter, tiles are small."""

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Triton reads it when it decorates a kernel, its own included. Unset again: other tests must not get this backend on
    # the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    from keyspan.backends.triton import config, launch

    del os.environ["TRITON_INTERPRET"]

    import interpreter

    interpreter.repair()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles per test; the interpreter takes as long for a small tile as for a large one."""

    def tile(kernel, itemsize, head_dim, family, terms="plain"):
        # Products of 8-bit operands need at least 64 rows.
        rows = 64 if itemsize == 1 and kernel in ("forward", "invariant") else 16
        return config.TileConfig(rows, 16 if kernel == "keys" else 32, 1, 1)

    monkeypatch.setattr(config, "tile", tile)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request, monkeypatch):
    """Runs a test once with plain loads and once with TMA."""
    monkeypatch.setattr(launch, "_descriptors_allowed", lambda x: request.param)
    return request.param
