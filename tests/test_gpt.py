"""The GPT: packed = alone, backends agree, positions as the papers define them, gradients, errors, compilation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from keyspan import Alibi, Causal, Documents, KeyRanges
from keyspan.backends.native import binding
from keyspan.core.masks import lowering
from keyspan.core.problem import Problem
from keyspan.layers import Linear, gated, gemm, linear_cross_entropy, rms_norm, rotary, swiglu
from keyspan.models import GPT, GPTConfig, alibi_slopes
from keyspan.models.experts import Experts
from keyspan.models.gpt import Step
from keyspan.testing import check_invariance

needs_library = pytest.mark.skipif(binding.LIBRARY is None, reason="products are then torch's, which are not invariant")
POSITIONS = ["rope", "alibi", "none"]
LENGTHS = [5, 1, 9, 3]


def small(positions="rope", backend=None, seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    options = {"vocab_size": 23, "dim": 24, "layers": 2, "heads": 6, "kv_heads": 2, "hidden": 20, **changes}
    return GPT(GPTConfig(positions=positions, **options), backend)


def draw(lengths=LENGTHS, seed=0) -> Tensor:
    return torch.randint(0, 23, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def dense_forward(model: GPT, tokens: Tensor) -> Tensor:
    """Hidden states of one document, written out with a dense softmax: what the model is meant to compute."""
    c, T = model.config, len(tokens)
    x = model.embedding.weight[tokens]
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    for block in model.blocks:
        h = rms_norm(x, block.attention_norm.weight, c.norm_eps)
        qkv = (h @ block.attention.qkv.weight.t()).view(T, -1, c.head_dim)
        q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        if c.positions == "rope":
            q, k = (rotary(t[None], torch.arange(T), c.rope_theta)[0] for t in (q, k))
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("mhk,nhk->hmn", q, k) / c.head_dim**0.5
        if c.positions == "alibi":
            scores = scores - alibi_slopes(c.heads).to(scores)[:, None, None] * distance
        p = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        out = torch.einsum("hmn,nhk->mhk", p, v).reshape(T, c.dim)
        x = x + out @ block.attention.out.weight.t()
        h = rms_norm(x, block.mlp_norm.weight, c.norm_eps)
        x = x + swiglu(h, block.mlp.w12.weight, None, block.mlp.w3.weight, None)
    return rms_norm(x, model.norm.weight, c.norm_eps)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_documents_equal_each_alone_and_the_dense_formula(positions, as_tensor):
    model, tokens = small(positions).double(), draw()
    lengths = torch.tensor(LENGTHS) if as_tensor else LENGTHS
    packed = model(tokens, lengths)
    alone = torch.cat([model(t, [len(t)]) for t in tokens.split(LENGTHS)])
    dense = torch.cat([dense_forward(model, t) for t in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-11)
    merged = model(tokens, [sum(LENGTHS)])
    assert (merged - packed)[LENGTHS[0] :].abs().max() > 1e-3  # the boundaries do matter


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_document_does_not_see_others_or_its_future(positions):
    model, tokens = small(positions), draw()
    before = model(tokens, LENGTHS)
    changed = tokens.clone()
    changed[10] = (changed[10] + 1) % 23  # inside the third document, rows 6 … 14
    differs = (model(changed, LENGTHS) != before).any(-1)
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


def test_only_positions_distinguish_order():
    """Without positions the last row of a document is the same for every order of the tokens before it."""
    for positions in POSITIONS:
        model = small(positions, layers=1).double()
        rows = [model(torch.tensor(t), [4])[-1] for t in ([1, 2, 3, 4], [3, 1, 2, 4])]
        same = torch.allclose(*rows, rtol=0, atol=1e-12)
        assert same == (positions == "none"), positions


@pytest.mark.parametrize("tie", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(tie):
    model, tokens = small(tie_embeddings=tie).double(), draw()
    targets = draw(seed=1)
    targets[[0, 7]] = -100
    logits = model.logits(model(tokens, LENGTHS))
    assert logits.shape == (18, 23)
    want = F.cross_entropy(logits, targets)
    got = model.loss(tokens, targets, LENGTHS)
    torch.testing.assert_close(got, want)
    targets[targets == -100] = 3
    torch.testing.assert_close(
        model.loss(tokens, targets, LENGTHS, ignore_index=3), F.cross_entropy(logits, targets, ignore_index=3)
    )
    assert abs(float(got.detach()) - torch.tensor(23.0).log().item()) < 0.2  # at first, near a uniform guess


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tie", [False, True])
def test_gradients_reach_every_parameter_and_agree_between_backends(positions, tie):
    tokens, targets = draw(), draw(seed=1)
    grads = {}
    for backend in ("chunked", "reference"):
        model = small(positions, backend, tie_embeddings=tie)
        model.loss(tokens, targets, LENGTHS).backward()
        grads[backend] = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in grads["chunked"].items():
        assert grad is not None, name
        assert (grad != 0).any(), name
        torch.testing.assert_close(grad, grads["reference"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("positions", POSITIONS)
def test_training_with_chunked_and_reference_gives_the_same_losses(positions):
    def train(backend: str) -> Tensor:
        model = small(positions, backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(10):
            loss = model.loss(draw(seed=step), draw(seed=step).roll(-1), LENGTHS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    chunked, reference = train("chunked"), train("reference")
    torch.testing.assert_close(chunked, reference, rtol=0, atol=1e-5)
    assert torch.equal(chunked, train("chunked"))
    assert (chunked[0] - chunked[-1]).abs() > 1e-3


def test_bf16_autocast_stays_near_fp32():
    model, tokens = small(), draw()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, loss = model(tokens, LENGTHS), model.loss(tokens, tokens, LENGTHS)
        assert model.logits(hidden).dtype == torch.bfloat16
    exact = model(tokens, LENGTHS)
    assert hidden.dtype == loss.dtype == torch.float32
    error = (hidden - exact).abs().max()
    assert 0 < error < 16 * torch.finfo(torch.bfloat16).eps  # rows have a root mean square of 1
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_hidden_states_in_a_dtype_are_rounded_once():
    model, tokens = small(), draw()
    assert torch.equal(model(tokens, LENGTHS, dtype=torch.bfloat16), model(tokens, LENGTHS).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens, LENGTHS)
        want = linear_cross_entropy(hidden, model.head_weight, tokens)
        assert torch.equal(model.loss(tokens, tokens, LENGTHS), want)
    assert hidden.dtype == torch.float32


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model, tokens = small(dropout=0.3), draw()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(tokens, LENGTHS)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    model.eval()
    assert torch.equal(run(0), run(1))
    torch.testing.assert_close(run(0), small()(tokens, LENGTHS))


@pytest.mark.parametrize("embedding", [0.02, 0.5])
def test_initial_values(embedding):
    model = small(layers=8, dim=96, tie_embeddings=False, vocab_size=200, hidden=0, embedding_std=embedding)
    std = (2 / (5 * 96)) ** 0.5
    want = {"embedding.weight": embedding, "head.weight": 0.02, "qkv.weight": std, "w12.weight": std}
    want |= {"out.weight": std / 4, "w3.weight": std / 4}  # sqrt(2 * 8) = 4
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            expected = want[next(end for end in want if name.endswith(end))]
            # the standard deviation of a sample of n normal values has a relative error of 1 / sqrt(2 n)
            assert abs(p.std().item() / expected - 1) < 5 / (2 * p.numel()) ** 0.5, name
            assert abs(p.mean().item()) < 5 * expected / p.numel() ** 0.5, name


def test_num_parameters_counts_shared_weights_once():
    c = small().config
    block = c.dim * (c.heads + 2 * c.kv_heads) * c.head_dim + c.dim**2 + 3 * c.dim * c.hidden + 2 * c.dim
    want = c.layers * block + c.dim + c.vocab_size * c.dim
    assert small().num_parameters() == want
    assert small(tie_embeddings=False).num_parameters() == want + c.vocab_size * c.dim
    assert small("alibi").num_parameters() == want


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2 ** (-h / 2) for h in range(1, 17)]))
    twelve = [2.0**-h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(twelve))


def test_config_fills_in_its_defaults():
    config = GPTConfig(vocab_size=10, dim=128, layers=1, heads=4)
    assert (config.kv_heads, config.hidden, config.head_dim) == (4, 384, 32)  # 8/3 * 128 = 341.3
    assert GPTConfig(vocab_size=10, dim=96, layers=1, heads=4).hidden == 256  # 8/3 * 96 is 256 exactly


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0, want an int ≥ 1"),
        ({"layers": 1.5}, r"layers: got 1\.5"),
        ({"heads": True}, "heads: got True"),
        ({"hidden": -1}, "hidden: got -1"),
        ({"dim": 25}, "dim: got 25, want a multiple of heads = 6"),
        ({"kv_heads": 4}, "kv_heads: got 4, want a divisor of heads = 6"),
        ({"kv_heads": 12}, "kv_heads: got 12"),
        ({"positions": "learned"}, "positions: got 'learned', want one of rope, alibi, none"),
        ({"dim": 18, "positions": "rope"}, "dim: got 18 / heads = 3 per head, want an even number for rope"),
        ({"dropout": 1.0}, r"dropout: got 1\.0"),
        ({"dropout": float("nan")}, "dropout: got nan"),
        ({"rope_theta": 0.0}, r"rope_theta: got 0\.0"),
        ({"norm_eps": float("inf")}, "norm_eps: got inf"),
        ({"embedding_std": 0.0}, r"embedding_std: got 0\.0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), [4], r"tokens: got torch.int64 of shape \[1, 4\]"),
        (torch.zeros(4), [4], "tokens: got torch.float32"),
        (torch.zeros(4, dtype=torch.int64), [3], "lengths: got 3"),
        (torch.zeros(4, dtype=torch.int64), [5, -1], "lengths: got -1"),
    ],
)
def test_forward_errors(tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        small()(tokens, lengths)


def test_rows_after_the_last_document_change_nothing():
    model, tokens = small(), draw()
    want = model(tokens, LENGTHS)
    padded = model(F.pad(tokens, (0, 4)), torch.tensor(LENGTHS))
    torch.testing.assert_close(padded[:18], want)
    assert padded.isfinite().all()


# torch's tracer makes an instance of torch.autograd.Function, against torch's own advice
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_compiled_model_equals_the_eager_model_for_all_lengths(positions):
    torch._dynamo.reset()
    model, tokens = small(positions), draw()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model.loss, fullgraph=True, backend=count)
    for lengths in ([5, 1, 9, 3], [9, 9, 0, 0], [1, 1, 1, 15]):
        want = torch.autograd.grad(model.loss(tokens, tokens, lengths), list(model.parameters()))
        got = torch.autograd.grad(compiled(tokens, tokens, torch.tensor(lengths)), list(model.parameters()))
        torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def saved_bytes(model: GPT, T: int, compiled: bool) -> int:
    """Bytes that backward of a step of T tokens keeps, each storage once, parameters not counted."""
    # They import Triton, which the tests of kernels must do first.
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    storages: dict[int, int] = {}

    def see(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def partitioned(graph, inputs):
        return aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
        )(graph, inputs)

    torch._dynamo.reset()
    loss = torch.compile(model.loss, fullgraph=True, backend=partitioned, dynamic=False) if compiled else model.loss
    tokens, lengths = torch.randint(23, (T,)), torch.tensor([T - 9, 5, 4])
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        loss(tokens, tokens, lengths).backward()
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@needs_library
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("activation", "compiled"), [("silu", False), ("gelu_tanh", False), ("silu", True)])
def test_backward_keeps_each_tensor_of_a_layer_once(compiled, activation, monkeypatch):
    """What is kept for a token and a layer: no norm, no gate, and one of the two sums, the other as what was added."""
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: True)
    monkeypatch.setattr(gated, "native", lambda *x: False)  # as on a GPU, where products of a layer do not share caches
    options = {"dim": 32, "heads": 4, "kv_heads": 2, "hidden": 80, "activation": activation}
    few, more = ([saved_bytes(small(layers=layers, **options), T, compiled) for T in (64, 128)] for layers in (2, 3))
    found = ((more[1] - few[1]) - (more[0] - few[0])) / 64
    dim, qkv, hidden, heads = 32, 64, 80, 4
    residual, added, inverse = 4 * dim, 2 * dim, 2 * 4
    assert found == residual + added + inverse + 2 * qkv + (2 * dim + 4 * heads) + 2 * 2 * hidden


@needs_library
def test_hooks_of_a_blocks_modules_see_their_inputs_and_change_no_bit(monkeypatch):
    """Products with the norm before them would call neither module."""
    monkeypatch.setattr(gated, "native", lambda *x: False)
    model, tokens, seen = small(), draw(), []

    def run():
        loss = model.loss(tokens, tokens.roll(1), LENGTHS)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    want = run()
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    got = run()
    assert [x.shape for x in seen] == [(len(tokens), model.config.dim)] * 2 * model.config.layers
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def fake_gpu(model: GPT) -> GPT:
    """The model with fake parameters on a GPU that need not exist; without gradients, which would need torch's own."""
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(torch.empty(p.shape, device="cuda"), requires_grad=False))
        for name, x in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(x.shape, device="cuda"))
    return model


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_model_compiles_for_a_gpu_without_a_graph_break(positions, monkeypatch):
    """The choice of a backend, and what asks for devices and packages, are not traced."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    model = small(positions, dim=96)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_gpu(model)

        def loss(tokens, lengths, lo, hi, diagonal, *turn):
            # Lowered outside: torch indexes a GPU's tensors with its own code.
            row_keys = lowering._row_keys(
                (Documents(lengths), Causal()), "top_left", len(tokens), len(tokens), lo.device
            )
            masks = {None: KeyRanges(lo, hi, diagonal, row_keys=row_keys)}
            bias = Alibi(model.slopes) if positions == "alibi" else None
            x, more = model.embedding(tokens), None
            step = Step(masks, {None: turn} if positions == "rope" else None, bias, None, None, False)
            for block in model.blocks:
                x, more = block(x, more, step)
            return linear_cross_entropy(model.norm.add(x, more)[0], model.head_weight, tokens)

        compiled = torch.compile(loss, fullgraph=True, backend=count)
        for T, documents in ((64, 3), (96, 5), (33, 2)):
            ranges = [torch.empty(1, 1, T, dtype=torch.int32, device="cuda") for _ in range(3)]
            turn = [torch.empty(T, model.config.head_dim // 2, device="cuda") for _ in range(2)]
            lengths = torch.empty(documents, dtype=torch.int64)
            found = compiled(torch.empty(T, dtype=torch.int64, device="cuda"), lengths, *ranges, *turn)
            assert (found.device.type, found.shape) == ("cuda", ())
    assert len(graphs) == 2
    row_keys = [node for node in graphs[-1].graph.nodes if node.target is torch.ops.keyspan.row_keys]
    calls = [node for node in graphs[-1].graph.nodes if node.target is torch.ops.keyspan.attention_forward]
    calls += [n for n in graphs[-1].graph.nodes if n.target is torch.ops.keyspan.attention_forward.default]
    assert [node.args[-1] for node in calls] == ["triton"] * model.config.layers
    assert [node.args[Problem._fields.index("host_row_keys")] for node in calls] == row_keys * model.config.layers


@needs_library
@pytest.mark.parametrize("changes", [{}, {"experts": 4, "experts_per_token": 2}])
def test_invariant_changes_nothing_on_a_cpu(changes):
    model, tokens = small(**changes), draw()
    want = model.loss(tokens, tokens.roll(1), LENGTHS)
    model.invariant = True
    assert torch.equal(model.loss(tokens, tokens.roll(1), LENGTHS), want)
    assert torch.equal(model.logits(model(tokens, LENGTHS)), model.logits(GPT.forward(model, tokens, LENGTHS)))
    layers = [x for x in model.modules() if isinstance(x, (Linear, Experts))]
    assert len(layers) > 4
    assert all(x.invariant for x in layers)
    model.invariant = False
    assert not any(x.invariant for x in layers)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"experts": 4, "experts_per_token": 2, "hidden": 100},
        {"activation": "gelu_tanh", "logit_softcap": 30.0, "attention_softcap": 20.0, "post_norms": True},
        {"positions": "alibi", "qkv_bias": True, "mlp_bias": True, "sinks": True, "windows": (6, None)},
    ],
    ids=["experts", "softcaps", "biases"],
)
def test_logits_depend_on_the_document_alone(changes, dtype):
    model = small(**{"dim": 130, "kv_heads": 3, "head_dim": 24, **changes}).to(dtype)
    documents = draw([130, 1, 2, 33, 5]).split([130, 1, 2, 33, 5])

    def packed(documents):
        lengths = [*map(len, documents)]
        return model.logits(model(torch.cat(list(documents)), lengths)).split(lengths)

    with torch.no_grad():
        check_invariance(packed, documents, batched=lambda x: torch.stack(packed(x)), threads=(1, 3))


@needs_library
def test_invariant_is_kept_or_refused():
    model, tokens = small(), draw()
    model.invariant = True
    with pytest.raises(ValueError, match=r"invariant: got True, want False: torch.float64"):
        GPT(model.config, invariant=True).double()(tokens, LENGTHS)
    with pytest.raises(ValueError, match="context: got one with invariant = True, want None"):
        model(tokens, LENGTHS, context=object())
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        assert torch.equal(compiled(tokens, LENGTHS), model(tokens, LENGTHS))
    assert not graphs
