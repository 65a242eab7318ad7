"""Installed third-party packages with the stand-in, each in its own process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from test_xformers_shim import installed, run

pytest.importorskip("hatchling", reason="the stand-in is built with hatchling, which the dev extra brings")
__all__ = ["installed"]

# Other imports of the packages, with their pip names where they differ.
NEEDED = {
    "diffusers": (),
    "mistral_inference": ("simple_parsing", "docstring_parser"),
    "toto": ("einops", "jaxtyping", "rotary_embedding_torch"),
    "lgatr": ("einops",),
}


@pytest.mark.parametrize("package", NEEDED)
def test_their_xformers_path_equals_their_other_path(package, installed):
    missing = [name for name in (package, *NEEDED[package]) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (pip install --no-deps, without torch and xformers)")
    done = run([str(Path(__file__).parent / "third_party.py"), package], installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
