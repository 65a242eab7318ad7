"""The stand-in distribution, built, installed into its own folder, and used from fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the stand-in is built with hatchling, which the dev extra brings")

UNCHANGED = """
import importlib.util
from importlib.metadata import version
from packaging.version import Version

# As diffusers, transformers and unsloth check for it.
assert importlib.util.find_spec("xformers") is not None
assert Version(version("xformers")) >= Version("0.0.35")

import torch
import xformers
import xformers.ops as xops
import xformers.ops.fmha as fmha
from xformers import __version__, checkpoint, get_optimal_checkpoint_policy, list_operators
from xformers import selective_checkpoint_wrapper
xformers._cpp_lib._register_extensions()
import xformers.checkpoint
assert xformers.checkpoint is checkpoint and callable(checkpoint)  # the function, as there
from xformers.ops import LowerTriangularMask, SwiGLU, fmha as again, memory_efficient_attention, unbind
from xformers.ops.fmha import BlockDiagonalMask
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, _SeqLenInfo
from xformers.ops.fmha.flash import FwOp
from xformers.ops.seqpar import sequence_parallel_leading_matmul
from xformers.attn_bias_utils import ref_attention
from xformers.checkpoint import checkpoint as same_checkpoint
import xformers._cpp_lib
import xformers.info
import xformers.version
import keyspan.ops

assert __version__ == xformers.version.__version__ == version("xformers")
assert same_checkpoint is checkpoint
assert xformers._has_cpp_library
assert torch.cuda.is_available() or not xformers._is_triton_available()
# One module under two names: one class, so isinstance holds across both.
assert xops is keyspan.ops and fmha is again is keyspan.ops.fmha
assert xops.fmha.attn_bias.BlockDiagonalMask is BlockDiagonalMask is keyspan.ops.fmha.BlockDiagonalMask
assert keyspan.ops.__spec__.name == "keyspan.ops"

torch.manual_seed(0)
q, k, v = (torch.randn(1, 7, 2, 8) for _ in range(3))
bias = BlockDiagonalMask.from_seqlens([3, 4])
out = memory_efficient_attention(q, k, v, attn_bias=bias, op=xops.MemoryEfficientAttentionFlashAttentionOp)
torch.testing.assert_close(out, ref_attention(q, k, v, bias))

for left_out in (
    "import xformers.profiler",
    "from xformers import profiler",
    "from xformers.profiler import profiler",  # audiocraft, which then does without
    "from xformers.ops import sparsify24",
    "from xformers.ops.sp24 import Sparse24Tensor",
    "import xformers.ops.fmha.small_k",
):
    try:
        exec(left_out)
    except ImportError as error:
        assert "is left out of keyspan: " in str(error), (left_out, error)
    else:
        raise AssertionError(left_out)
try:
    import xformers.checkpoint_fairinternal
except ModuleNotFoundError as error:
    assert "No module named 'xformers.checkpoint_fairinternal'" in str(error)
assert not hasattr(xops, "sparsify24")
assert not hasattr(xformers, "profiler")
print("done")
"""


def run(code: list[str], *path: Path) -> subprocess.CompletedProcess[str]:
    # The keyspan of this checkout comes before an installed one.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, Path(__file__).parents[2] / "src")))}
    return subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    source, target = Path(__file__).parents[2] / "compat" / "xformers", tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = run(["-m", "pip", "install", *options, str(source)])
    assert done.returncode == 0, done.stderr
    return target


def test_code_written_for_xformers_runs_unchanged(installed):
    done = run(["-c", UNCHANGED], installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_info_as_a_module(installed):
    done = run(["-W", "error", "-m", "xformers.info"], installed)
    assert done.returncode == 0, done.stderr
    assert "memory_efficient_attention.chunked:" in done.stdout


def test_it_does_not_shadow_a_real_one(installed, tmp_path):
    real = tmp_path / "xformers"
    real.mkdir()
    (real / "__init__.py").write_text("__version__ = '0.0.35'\n")
    done = run(["-c", "import xformers"], installed, tmp_path)
    assert done.returncode == 1
    assert f"there is a real one in {real}" in done.stderr
    assert "does not shadow it" in done.stderr
    # The real one comes first on the path: it is imported.
    done = run(["-c", "import xformers; print(xformers.__file__)"], tmp_path, installed)
    assert done.stdout.strip() == str(real / "__init__.py")
    # Another copy of the stand-in does not count as a real one.
    done = run(["-c", "import xformers"], installed, Path(__file__).parents[2] / "compat" / "xformers")
    assert done.returncode == 0, done.stderr
