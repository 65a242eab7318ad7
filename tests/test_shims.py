"""Private names of torch and Triton: each is in `core/shims.py`, and the library works without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keyspan

HIDDEN = [
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._get_function_stack_at",
    "_C.DisableTorchFunction",
    "_C._functorch.maybe_current_level",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._autograd._profiler_enabled",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._get_tracing_state",
    "_C._is_any_autocast_enabled",
    "_C._get_float32_matmul_precision",
    "autograd.forward_ad._current_level",
]


@pytest.mark.parametrize("path", HIDDEN)
def test_a_torch_without_a_private_name(path):
    """Keyspan imports, computes the same, and `keyspan info` says what is missing."""
    code = f"""
import operator, torch

class Without:
    def __init__(self, module, name):
        self.__dict__.update(module=module, name=name)
    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.module, name)

path = {path!r}.split(".")
holder = operator.attrgetter(".".join(path[:-2]))(torch) if len(path) > 2 else torch
module = getattr(holder, path[-2])
setattr(holder, path[-2], Without(module, path[-1]))
from keyspan.core import shims  # which looks the names up
setattr(holder, path[-2], module)
import keyspan
from keyspan import info
assert list(shims.MISSING) == ["torch." + {path!r}], shims.MISSING
assert info.collect()["private names missing"] == shims.MISSING

q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in "qkv")
want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
want = want.transpose(1, 2)
grads = torch.autograd.grad(want.sin().sum(), (q, k, v))
for _ in range(4):
    out = keyspan.attention(q, k, v, mask=keyspan.Causal())
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), (q, k, v)), grads)
    with torch.no_grad(), torch.device("meta"):
        torch.testing.assert_close(keyspan.attention(q, k, v, mask=keyspan.Causal()), want.detach())
    with torch.autocast("cpu"):
        assert keyspan.attention(q, k, v).dtype == torch.bfloat16
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_no_private_name_is_used_elsewhere():
    """In the way of a call only `core/shims.py` uses private names of torch, and all of them are in the list above."""
    package = Path(keyspan.__file__).parent
    private = re.compile(r"torch\.(?:\w+\.)*_[a-zA-Z]\w*|forward_ad\._\w+")
    for path in (x for name in ("core", "dispatch", "backends") for x in (package / name).rglob("*.py")):
        if path != package / "core" / "shims.py":
            found = [x for x in private.findall(path.read_text()) if "torch.ops" not in x and "__" not in x]
            assert not found, f"{path.relative_to(package)}: {found}"
    shims = (package / "core" / "shims.py").read_text()
    looked_up = set(re.findall(r'_private\(\s*"([\w.]+)"', shims))
    assert looked_up == set(HIDDEN)
