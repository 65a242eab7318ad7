"""Makes the Triton backend run on the CPU: kernels are decorated for the interpreter, tiles are small."""

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Read by triton when a kernel is decorated, its own among them; taken back, so that other tests do not choose this
    # backend for the CPU.
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
    """The interpreter takes as long for a small tile as for a large one, and several tiles are wanted."""

    def tile(kernel, itemsize, head_dim, family, terms="plain"):
        # Products in 8 bits are made of 64 rows and more.
        rows = 64 if itemsize == 1 and kernel == "forward" else 16
        return config.Tile(rows, 16 if kernel == "keys" else 32, 1, 1)

    monkeypatch.setattr(config, "tile", tile)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request, monkeypatch):
    """Runs a test with plain loads and with TMA."""
    monkeypatch.setattr(launch, "_descriptors_allowed", lambda x: request.param)
    return request.param
