"""xFormers outside of ops: selective checkpointing, random masks and references, version and info."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import nn
from xformers_definitions import KINDS, random

from keyspan.interop import xformers
from keyspan.interop.xformers import info
from keyspan.interop.xformers._cpp_lib import _register_extensions
from keyspan.interop.xformers.attn_bias_utils import create_attn_bias, pack_kv_cache, ref_attention, ref_attention_bmhk
from keyspan.interop.xformers.checkpoint import (
    _knapsack,
    _optimize_runtime_with_given_memory,
    checkpoint,
    get_optimal_checkpoint_policy,
    list_operators,
    selective_checkpoint_wrapper,
)
from keyspan.ops import fmha
from keyspan.ops.fmha import attn_bias as masks

exact = {"rtol": 1e-11, "atol": 1e-12}


class Block(nn.Module):
    """A layer with attention, matrix products and a random operator."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        attended = fmha.memory_efficient_attention(q, k, v, masks.LowerTriangularMask())
        return torch.dropout(self.out(attended.flatten(2)).tanh(), 0.5, True)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


ATTENTION, PRODUCT = "keyspan.attention_forward.default", "aten.addmm.default"


def gradients(run, block, x):
    block.zero_grad()
    torch.manual_seed(1)
    loss = run(x).square().sum()
    with Counted() as counted:
        loss.backward()
    return [p.grad.clone() for p in block.parameters()], counted.calls


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (None, {ATTENTION, PRODUCT}),
        ([ATTENTION], {ATTENTION}),
        ([torch.ops.aten.addmm.default], {PRODUCT}),
        (lambda ctx, op, *args, **kwargs: False, set()),
    ],
)
def test_checkpoint_stores_what_the_policy_selects(policy, kept):
    block, x = Block(), random(2, 5, 8, dtype=torch.float32).requires_grad_()
    want, _ = gradients(block, block, x)
    got, calls = gradients(lambda x: checkpoint(block, x, policy_fn=policy), block, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for op in (ATTENTION, PRODUCT):
        assert (calls.get(op, 0) == 0) == (op in kept), op


def test_list_operators():
    names = [str(op) for op in list_operators(Block(), random(1, 3, 8, dtype=torch.float32))]
    assert names.count(PRODUCT) == 2
    assert names.count(ATTENTION) == 1
    assert names.index(PRODUCT) < names.index(ATTENTION)


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_optimal_policy_stays_within_its_budget(budget):
    block, x = Block(), random(4, 16, 8, dtype=torch.float32).requires_grad_()
    policy = get_optimal_checkpoint_policy(block, x, memory_budget=budget)
    want, _ = gradients(block, block, x)
    for _ in range(2):  # a policy counts its calls, and serves again
        got, calls = gradients(lambda x: checkpoint(block, x, policy_fn=policy), block, x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        again = calls.get(ATTENTION, 0) + calls.get(PRODUCT, 0)
        assert {0.0: again >= 2, 0.5: again >= 1, 1.0: again == 0}[budget], calls


@pytest.mark.parametrize("how", [{"memory_budget": 0.3}, {"policy_fn": [ATTENTION]}])
def test_wrapped_module(how):
    block, x = Block(), random(2, 5, 8, dtype=torch.float32).requires_grad_()
    wrapped = selective_checkpoint_wrapper(block, **how)
    assert set(wrapped.state_dict()) == set(block.state_dict())
    want, _ = gradients(block, block, x)
    got, _ = gradients(wrapped, block, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        assert wrapped(x).shape == x.shape


def test_bad_budgets_and_policies_raise():
    with pytest.raises(ValueError, match="memory_budget: got 2"):
        get_optimal_checkpoint_policy(Block(), memory_budget=2)
    with pytest.raises(ValueError, match="not both"):
        selective_checkpoint_wrapper(Block())


@pytest.mark.parametrize("largest", [100, 10_000], ids=["to the byte", "in grains"])
def test_the_knapsack_is_optimal(largest):
    """Compared with all subsets."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        seconds = torch.rand(7, generator=generator).tolist()
        memory = [
            None if i == 3 else m for i, m in enumerate(torch.randint(0, largest, (7,), generator=generator).tolist())
        ]
        total = sum(m for m in memory if m is not None)
        grain, room = max(1, total // 1000), total * 2 // 5
        needed = [-(-m // grain) if m is not None else 10**9 for m in memory]

        def value(chosen, needed=needed, seconds=seconds, most=room // grain):
            inside = sum(n for n, c in zip(needed, chosen, strict=True) if c) <= most
            return sum(s for s, c in zip(seconds, chosen, strict=True) if c) if inside else -1.0

        best = max(value([bool(code >> i & 1) for i in range(7)]) for code in range(2**7))
        assert value(_knapsack(seconds, memory, room)) == pytest.approx(best)


@pytest.mark.parametrize("force_store_random", [False, True])
@pytest.mark.parametrize("room", [60, 150, 300, 1000])
def test_the_private_solver(room, force_store_random):
    """Compared with all subsets that keep its rules: 0 is written in place first, 5 writes to 2, 3 is a view."""
    memory, runtimes = (torch.tensor(x, dtype=torch.float64) for x in ([0, 90, 70, 0, 50, 0], [5, 8, 9, 1, 15, 4]))

    def value(chosen):
        kept = torch.tensor(chosen, dtype=torch.float64)
        rules = chosen[0] and not chosen[3] and chosen[5] == chosen[2] and chosen[4] == force_store_random
        return float(kept @ runtimes) if rules and float(kept @ memory) <= room else -1.0

    best = max(value([bool(code >> i & 1) for i in range(6)]) for code in range(2**6))
    found = _optimize_runtime_with_given_memory(memory, runtimes, room, [3], [(0, 0), (5, 2)], [4], force_store_random)
    assert found.dtype == torch.float64
    assert value([bool(x) for x in found]) == best >= 0
    with pytest.raises(ValueError, match="max_memory: got 40"):
        _optimize_runtime_with_given_memory(memory, runtimes, 40, [], [(1, 1)], [], False)


@pytest.mark.parametrize("fmt", ["BMHK", "BMGHK"])
@pytest.mark.parametrize(("M", "N"), [(3, 5), (5, 3)])
@pytest.mark.parametrize("bias_type", [None, type(None), torch.Tensor, *KINDS], ids=lambda c: getattr(c, "__name__", c))
def test_random_masks_and_the_reference(bias_type, M, N, fmt):
    heads = {"BMHK": (2,), "BMGHK": (3, 2)}[fmt]
    arguments = (bias_type, 2, 2, 3, M, N, "cpu", torch.float64, True, fmt, None)
    if M > N and isinstance(bias_type, type) and issubclass(bias_type, masks.BlockDiagonalCausalFromBottomRightMask):
        with pytest.raises(ValueError, match="kv_len: got 3, want at least q_len = 5"):
            create_attn_bias(*arguments)
        return
    bias, again = (create_attn_bias(*arguments, page_size=2) for _ in range(2))
    packed = isinstance(bias, masks.VARLEN_BIASES)
    keys = 4 * -(-N // 2) if isinstance(bias, masks._PagedBlocks) else 2 * N if packed else N
    batch, queries = (1, 2 * M) if packed else (2, M)
    if packed:
        assert type(bias) is bias_type
        assert bias == again
    q, k, v = random(batch, queries, *heads, 4), random(batch, keys, *heads, 4), random(batch, keys, *heads, 6)
    want = ref_attention(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(fmha.memory_efficient_attention(q, k, v, bias, 0.0, 0.3), want, **exact)
    if fmt == "BMHK":
        assert torch.equal(ref_attention_bmhk(q, k, v, bias, scale=0.3), want)


def test_reference_of_one_head_and_dropped_weights():
    q, k, v, bias = random(2, 3, 4), random(2, 5, 4), random(2, 5, 4), random(2, 3, 5)
    torch.testing.assert_close(ref_attention(q, k, v, bias), fmha.memory_efficient_attention(q, k, v, bias), **exact)
    dropped = ref_attention(q, k, v, drop_mask=torch.zeros(2, 3, 5), p=0.5)
    assert torch.equal(dropped, torch.zeros_like(dropped))
    assert isinstance(create_attn_bias(torch.Tensor, 2, 3, 1, 3, 5, "cpu", torch.float64, False, "BMK"), torch.Tensor)
    with pytest.raises(ValueError, match="page_size"):
        create_attn_bias(masks.PagedBlockDiagonalPaddedKeysMask, 2, 3, 1, 3, 5, "cpu", torch.float64, False, "BMHK")


def test_a_paged_cache_equals_the_padded_one():
    k, v, lengths = random(3, 6, 2, 4), random(3, 6, 2, 4), [5, 0, 3]
    table, paged_k, paged_v = pack_kv_cache(k, v, lengths, 2)
    assert paged_k.shape == (1, 10, 2, 4)
    q = random(1, 3, 2, 4)
    padded = masks.BlockDiagonalPaddedKeysMask.from_seqlens([1, 1, 1], 6, lengths)
    paged = masks.PagedBlockDiagonalPaddedKeysMask.from_seqlens([1, 1, 1], lengths, table, 2)
    want = fmha.memory_efficient_attention(q, k.flatten(0, 1)[None], v.flatten(0, 1)[None], padded)
    torch.testing.assert_close(fmha.memory_efficient_attention(q, paged_k, paged_v, paged), want, **exact)


def test_version_and_info(capsys):
    assert Version(xformers.__version__) >= Version("0.0.35")
    assert xformers._has_cpp_library
    assert not xformers._is_triton_available()  # there is no GPU in these tests
    _register_extensions()
    info.print_info()
    printed = capsys.readouterr().out
    assert "memory_efficient_attention.chunked:" in printed
    assert "memory_efficient_attention.fa2F@keyspan:" in printed
    assert set(masks.MASK_CLASSES) == set(KINDS)
