"""The registered operator under torch: compile, checkpointing, autograd, FLOP counts, shapes without values."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import keyspan
from keyspan.backends import load
from keyspan.core.problem import make_problem
from keyspan.dispatch import op
from keyspan.dispatch.op import attend
from keyspan.testing import differentiable, results, with_inputs
from keyspan.testing.cases import CASES
from test_attention import qkv


@pytest.mark.parametrize("setting", [{"activation_memory_budget": 0.0}, {"aggressive_recomputation": True}])
def test_dropout_that_would_be_drawn_again_in_backward_is_refused(setting):
    import torch._functorch.config

    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in qkv(M=7))

    def f(q, dropout_p):
        return keyspan.attention(q, k, v, dropout_p=dropout_p).sin().sum()

    with torch._functorch.config.patch(setting):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")
        (got,) = torch.autograd.grad(compiled(q, 0.0), q)
        torch.testing.assert_close(got, torch.autograd.grad(f(q, 0.0), q)[0])
        with pytest.raises(Exception, match="draw another dropout pattern in backward"):
            compiled(q, 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")
    grads = []
    for run in (f, compiled):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(q, 0.3), q)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="torch has no regions")
def test_dropout_in_a_region_with_a_memory_budget_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(M=7))

    def within(budget, dropout_p):
        torch._dynamo.reset()  # otherwise the budget becomes a symbol, which torch does not take

        def f(q):
            with torch.autograd.graph.region_activation_memory_budget(budget):
                return keyspan.attention(q, k, v, dropout_p=dropout_p).sin().sum()

        return torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")(q)

    (got,) = torch.autograd.grad(within(0.0, 0.0), q)
    torch.testing.assert_close(got, torch.autograd.grad(keyspan.attention(q, k, v).sin().sum(), q)[0])
    within(1.0, 0.3)
    with pytest.raises(Exception, match="draw another dropout pattern in backward"):
        within(0.0, 0.3)
    torch._dynamo.reset()


def test_activation_checkpointing_with_dropout():
    q, k, v = (x.requires_grad_() for x in qkv(M=7, dtype=torch.float64))

    def f(q, k, v):
        return keyspan.attention(q, k, v, mask=keyspan.Causal(), dropout_p=0.3)

    grads = []
    for run in (f, lambda *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(q, k, v).sin().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_of_calls_that_are_replayed():
    """Checkpointing runs a call twice and compares what the two save: both must take the same path."""
    q, k, v = (x.requires_grad_() for x in qkv(M=29))  # of a signature that no call had before

    def f(q, k, v):
        return keyspan.attention(q, k, v, mask=keyspan.Causal()).sin().sum()

    found = [torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False), (q, k, v)) for _ in range(3)]
    for _ in range(3):
        want = torch.autograd.grad(f(q, k, v), (q, k, v))
    found.append(torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False), (q, k, v)))
    for got in found:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("terms", ["plain", "all", "paged"])
@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
def test_opcheck(backend, terms):
    q, k, v = qkv(M=6, N=8, B=1)
    if terms == "plain":  # of another order in memory, which that of the results does not follow
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kw = dict(mask=keyspan.Causal("bottom_right"))
    if terms == "all":
        tensors = [torch.randn(s, requires_grad=True) for s in ((4,), (4, 5), (4, 1, 8), (6, 1), (4,))]
        bias = keyspan.Alibi(tensors[0]) + keyspan.RelativeBias(tensors[1]) + tensors[2] + tensors[3]
        kw |= dict(bias=bias, sinks=tensors[4], softcap=2.0, dropout_p=0.2)
    elif terms == "paged":
        kw = dict(mask=keyspan.PagedKeys([2, 4], [3, 4], [[1, 0], [3, 2]], 2) & keyspan.Causal("bottom_right"))
    else:
        kw = {}
    problem, _ = make_problem(q, k, v, **kw)
    if (reason := load(backend).reason_against(problem)) is not None:
        pytest.skip(reason)
    # Leaves: opcheck reads `.grad` of what it is given.
    leaves = {name: x.detach().requires_grad_() for name, x in differentiable(problem).items()}
    problem = with_inputs(problem, leaves)
    torch.library.opcheck(torch.ops.keyspan.attention_forward.default, (*problem, backend))
    out, lse = torch.ops.keyspan.attention_forward(*problem, backend)
    needs = [
        True,
        True,
        True,
        terms == "all",
        terms == "all",
        terms == "all",
        *(terms == "all" for _ in problem.biases),
    ]
    plain = problem._make(x.detach() if isinstance(x, torch.Tensor) else x for x in problem)
    plain = plain._replace(biases=[x.detach() for x in problem.biases])
    args = (torch.randn_like(out), torch.randn_like(lse), out.detach(), lse.detach(), *plain, needs, backend)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.keyspan.attention_backward.default, args, test_utils=utils)


def test_compile_fullgraph_without_recompiling_for_new_lengths():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(q, k, v, lengths, slopes):
        mask = keyspan.Documents(lengths) & keyspan.Causal() & keyspan.Window(5) & keyspan.Sinks(1)
        return keyspan.attention(q, k, v, mask=mask, bias=keyspan.Alibi(slopes), return_lse=True)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    slopes = torch.rand(4, requires_grad=True)
    for lengths in ([5, 4], [1, 8], [9, 0]):
        q, k, v = (x.requires_grad_() for x in qkv(M=9, N=9, B=1))
        got, want = (g(q, k, v, torch.tensor(lengths), slopes) for g in (compiled, f))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(o.sin().sum() + s.sum(), (q, k, v, slopes)) for o, s in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_a_compiled_function_tells_backends_how_many_keys_rows_see(monkeypatch):
    """As data: other numbers compile nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    seen = []

    class Spy:
        def __init__(self, name):
            self.module = load(name)

        def forward(self, problem):
            seen.append((problem.row_keys, problem.host_row_keys))
            return self.module.forward(problem)

        def backward(self, problem, *rest):
            seen.append((problem.row_keys, problem.host_row_keys))
            return self.module.backward(problem, *rest)

    monkeypatch.setattr(op, "load", Spy)

    def f(q, k, v, lo, hi, diagonal, row_keys):
        ranges = keyspan.KeyRanges(lo, hi, diagonal, row_keys=row_keys)
        return keyspan.attention(q, k, v, mask=ranges, backend="chunked")

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    q, k, v = (x.requires_grad_() for x in qkv(M=9, N=9, B=1))
    ranges = keyspan.Causal().lower(1, 9, 9)
    want = torch.autograd.grad(keyspan.attention(q, k, v, mask=ranges, backend="chunked").sin().sum(), (q, k, v))
    seen.clear()
    for count in (1024, 64):
        out = compiled(q, k, v, ranges.lo, ranges.hi, ranges.diagonal, torch.tensor(count))
        for a, b in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), want, strict=True):
            torch.testing.assert_close(a, b)
        assert seen == [(count, None)] * 2
        seen.clear()
    assert counter.frame_count == 1
    f(q, k, v, ranges.lo, ranges.hi, ranges.diagonal, torch.tensor(256))
    assert seen == [(256, None)]
    with pytest.raises(
        ValueError, match=r"row_keys: got torch.int32 of shape \[\] on cpu, want an int, or torch.int64"
    ):
        keyspan.KeyRanges(ranges.lo, ranges.hi, ranges.diagonal, row_keys=torch.tensor(3, dtype=torch.int32))


def test_masks_made_inside_a_compiled_function_take_lengths_as_numbers():
    """Once torch's compiler has symbols for the lengths, other lengths compile nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    q, k, v = qkv(M=9, N=9, B=1)

    def f(a, b):
        return keyspan.attention(q, k, v, mask=keyspan.Documents([a, b]) & keyspan.Causal())

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for lengths in ((4, 5), (3, 6), (2, 7), (7, 2)):
        assert torch.equal(compiled(*lengths), f(*lengths))
    assert counter.frame_count == 2


def test_compiled_with_symbols_for_all_sizes_and_a_bias_made_inside():
    """The heads are a symbol in the query and a number in the slopes."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    q, k, v = qkv(M=9, N=9, B=1)

    def f(q, k, v):
        return keyspan.attention(q, k, v, bias=keyspan.Alibi(torch.full((4,), 0.5)))

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))


def test_masks_and_biases_meet_tensors_inside_a_compiled_function():
    """`&` and `+` with a tensor on either side; no recompile for other values."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    q, k, v = qkv(M=9, N=9, B=1)

    def f(lengths, holes, slopes, dense):
        masks = (keyspan.Documents(lengths) & keyspan.Causal() & holes, holes & keyspan.Window(3))
        biases = (keyspan.Alibi(slopes) + dense, dense + keyspan.Alibi(slopes), sum([keyspan.Alibi(slopes), dense]))
        return [keyspan.attention(q, k, v, mask=mask, bias=bias) for mask in masks for bias in biases]

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for lengths in ([5, 4], [1, 8]):
        given = torch.tensor(lengths), torch.rand(9, 9) < 0.7, torch.rand(4), torch.randn(4, 9, 9)
        for got, want in zip(compiled(*given), f(*given), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1
    exported = torch.export.export(Calls(f), given, strict=True).module()
    for got, want in zip(exported(*given), f(*given), strict=True):
        assert torch.equal(got, want)


def test_the_choice_of_a_backend_is_not_traced(monkeypatch):
    """On CUDA it asks whether Triton is installed and what the device can do, which torch's compiler cannot trace."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from keyspan.backends import triton

    def untraceable(*given):
        with Path(__file__).open():
            return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", untraceable)
    monkeypatch.setattr(triton, "find_spec", untraceable)
    graphs = []

    def log(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    caches = triton._cached_device_reason, triton._cached_float8_reason
    try:
        with FakeTensorMode():
            q = torch.empty(1, 16, 2, 32, device="cuda:0")
            stored = q.to(torch.float8_e4m3fn)
            for k in (q, stored):
                for cached in caches:
                    cached.cache_clear()
                compiled = torch.compile(lambda q, k: keyspan.attention(q, k, k), fullgraph=True, backend=log)
                out = compiled(q, k)
                assert (out.device, out.shape) == (q.device, q.shape)
    finally:
        for cached in caches:
            cached.cache_clear()
    called = [node for graph in graphs for node in graph.graph.nodes if "attention_forward" in str(node.target)]
    assert [node.args[-1] for node in called] == ["triton", "triton"]


class Calls(torch.nn.Module):
    """A function as the module that `torch.export` asks for."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_flop_counter_counts_the_visible_area():
    q, k, v = (x.requires_grad_() for x in qkv(M=64, N=64, B=1))
    for mask, area in ((None, 64 * 64), (keyspan.Causal(), 64 * 65 // 2), (keyspan.Documents([32, 32]), 2 * 32 * 32)):
        with FlopCounterMode(display=False) as counter:
            out = keyspan.attention(q, k, v, mask=mask)
        assert counter.get_total_flops() == 2 * 4 * area * (8 + 6)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 4 * area * (3 * 8 + 2 * 6)


@pytest.mark.parametrize("order", [("keyspan", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "keyspan")])
def test_flops_are_counted_whichever_is_imported_first(order):
    """In a fresh process, with the counter made before the first call."""
    code = f"""
import sys, torch, {order[0]}
assert ("torch.utils.flop_counter" in sys.modules) == (sys.argv[1] == "torch.utils.flop_counter")
import {order[1]}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    keyspan.attention(*(torch.zeros(1, 3, 1, 4) for _ in "qkv"))
assert counter.get_total_flops() == 2 * 3 * 3 * (4 + 4)
loader = torch.utils.flop_counter.__spec__.loader
assert loader.get_source("torch.utils.flop_counter").startswith("# mypy")  # torch's own, as if nobody had looked
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, order[0]], check=True)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradients_past_the_op_are_its_own(backend):
    problem = next(case for case in CASES if case.name == "everything").problem(torch.float32)

    def grads(call, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(lambda p: call(p), problem, torch.float32)

    def by_op(p):
        return torch.ops.keyspan.attention_forward(*p, backend)

    def direct(p):
        out, lse = attend(p, backend)
        assert "Direct" in type(out.grad_fn).__name__
        return out, lse

    for autocast in (False, True):
        want, got = grads(by_op, autocast), grads(direct, autocast)
        assert all(torch.equal(got[name], x) for name, x in want.items())


def test_differentiable_once_whichever_way():
    q, k, v = (x.requires_grad_() for x in qkv())
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with mode:
            out = keyspan.attention(q, k, v)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


def test_saved_tensors_are_asked_for_once():
    seen = []
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: seen.append(x) or x):
        out = keyspan.attention(q, k, v, bias=torch.zeros(1, k.shape[1]).requires_grad_())
    out.sum().backward()
    assert seen
    assert len({id(x) for x in seen}) == len(seen)


@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (1, 4, 1, 9), (7, 1), (7, 9)])
def test_what_a_dense_mask_hides_is_not_counted(shape):
    q, k, v = (torch.randn(2, n, h, 4) for n, h in ((7, 4), (9, 2), (9, 2)))
    holes = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    causal = torch.ones(7, 9, dtype=torch.bool).tril()
    visible = int((causal & holes).expand(2, 4, 7, 9).sum())
    assert keyspan.explain(q, k, v, mask=keyspan.Causal() & holes).visible == visible
    with FlopCounterMode(display=False) as counter:
        keyspan.attention(q, k, v, mask=keyspan.Causal() & holes)
    assert counter.get_total_flops() == 2 * visible * (4 + 4)


def test_shapes_without_values():
    """On the meta device, which has neither values nor autocast, a call gives the shapes and dtypes of its results."""
    shapes = []
    for device in ("cpu", "meta"):
        q, k, v = (x.to(device).requires_grad_() for x in qkv())
        mask = keyspan.KeyLengths(torch.tensor([5, 7], device=device)) & keyspan.Window(3)
        out, lse = keyspan.attention(q, k, v, mask=mask, return_lse=True)
        (out.sum() + lse.sum()).backward()
        shapes.append([(x.shape, x.dtype) for x in (out, lse, q.grad, k.grad, v.grad)])
        with torch.no_grad():
            assert keyspan.attention(q, k, v, mask=mask).device.type == device
    assert shapes[0] == shapes[1]
