"""A step as one native call has the bits of `GPT.forward`; an answer has the same bits whatever else an engine does."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyspan.backends.native import binding
from keyspan.inference import Engine, Sampling, sampling
from keyspan.inference.pages import PagedCache
from keyspan.inference.program import DecoderProgram, EncoderProgram, _Numbers, _parts, _Program
from keyspan.layers import Linear, linear_cross_entropy, log_softmax
from keyspan.layers.gemm import _LargePages, multiplies
from keyspan.models import GPT, Encoder, EncoderConfig, GPTConfig, RopeScaling

pytestmark = pytest.mark.skipif(binding.LIBRARY is None, reason="the native library is not built")

BASE = {"vocab_size": 97, "dim": 96, "layers": 3, "heads": 6, "kv_heads": 2, "hidden": 160, "embedding_std": 0.15}
CONFIGS = {
    "plain": GPTConfig(**BASE),
    "windows": GPTConfig(**BASE, windows=(6, None, 6), local_rope_theta=100.0),
    "all windows": GPTConfig(**BASE, windows=(5, 9, 5)),
    "sinks, biases": GPTConfig(**BASE, sinks=True, qkv_bias=True, out_bias=True, mlp_bias=True),
    "softcaps, wide heads": GPTConfig(
        **{**BASE, "heads": 4}, head_dim=40, attention_softcap=20.0, logit_softcap=30.0, tie_embeddings=False
    ),
    "scaled rope": GPTConfig(**BASE, rope_scaling=RopeScaling("linear", 2.0), attention_scale=0.2),
    "alibi": GPTConfig(**BASE, positions="alibi"),
    "norms of heads": GPTConfig(**BASE, qk_norm=True),
    "norms of heads, no positions": GPTConfig(**BASE, qk_norm=True, positions="none"),
    "norms behind layers, scaled embeddings": GPTConfig(
        **BASE,
        qk_norm=True,
        post_norms=True,
        embedding_scale=9.8,
        windows=(None, 7, None),
        attention_softcap=15.0,
        activation="gelu_tanh",
        local_rope_theta=100.0,
    ),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(name: str, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def draw(seed: int, *lengths: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(97) for _ in range(n)] for n in lengths]


def engine(model: GPT, pages: int = 64, **options) -> Engine:
    memory = pages * PagedCache.bytes_per_page(model.config, 4, model.embedding.weight.dtype)
    return Engine(model, memory=memory, page_size=4, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_has_the_bits_of_the_model(name, dtype):
    model = make(name, dtype)
    prompts = draw(0, 3, 17, 1, 9)
    sampling = Sampling(max_tokens=6, logprobs=3)
    one, other = engine(model, step_tokens=7), engine(model, step_tokens=7)
    assert one._program is not None
    other._program = None
    assert one.generate(prompts, sampling) == other.generate(prompts, sampling)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_8_bits_has_the_bits_of_the_model_too(dtype, stored):
    model = make("norms behind layers, scaled embeddings", dtype)
    prompts = draw(3, 3, 17, 1, 9)
    sampling = Sampling(max_tokens=6, logprobs=3)
    one, other = (engine(model, step_tokens=7, cache_dtype=stored) for _ in range(2))
    other._program = None
    got = one.generate(prompts, sampling)
    assert got == other.generate(prompts, sampling)
    assert got == [engine(model, cache_dtype=stored).generate([x], sampling)[0] for x in prompts]
    for layer in range(3):
        for x, y in zip(one.cache.storage(layer), other.cache.storage(layer), strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    exact = engine(model).generate(prompts, sampling)
    assert got != exact
    for x, y in zip(got, exact, strict=True):
        assert abs(x.logprobs[0] - y.logprobs[0]) < 0.2
    per_token = [PagedCache.bytes_per_page(model.config, 1, x) for x in (stored, dtype)]
    assert per_token == [3 * 2 * 2 * (16 + 4), 3 * 2 * 2 * 16 * dtype.itemsize]


def test_other_cache_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"cache_dtype: got torch.float16, want float8_e4m3fn, int8, or None"):
        engine(make("plain", torch.bfloat16), cache_dtype=torch.float16)


def test_packing_changes_no_bit_but_for_int8():
    model, prompts, sampling = make("plain", torch.bfloat16), draw(1, 5, 9), Sampling(max_tokens=6, logprobs=0)
    want, count = engine(model).generate(prompts, sampling), model.num_parameters()
    tokens = torch.tensor([*prompts[0], *prompts[1]])
    with torch.inference_mode():
        logits = model.logits(model(tokens, [5, 9]))
        model.pack()
        assert torch.equal(model.logits(model(tokens, [5, 9])), logits)
    assert model.num_parameters() == count
    packed = engine(model)
    assert packed._program is not None
    assert packed.generate(prompts, sampling) == want
    rounded = make("plain", torch.bfloat16)
    rounded.pack(int8=True)
    plain, program = engine(rounded), engine(rounded)
    plain._program = None
    got = program.generate(prompts, sampling)
    assert got == plain.generate(prompts, sampling)
    for x, y in zip(got, want, strict=True):
        assert x.logprobs != y.logprobs
        assert abs(x.logprobs[0] - y.logprobs[0]) < 0.1


def test_packed_weights_share_memory_that_ends_with_them():
    pages = _LargePages()
    first, second = pages.empty(1000), pages.empty(3)
    assert second.data_ptr() - first.data_ptr() == 4032  # the next multiple of a cache line
    large = pages.empty(pages.REGION // 4 + 1)
    assert len({x.fill_(n).sum().item() for n, x in enumerate((first, second, large), 1)}) == 3
    assert torch.equal(first, torch.ones(1000, dtype=torch.int32))
    region = pages._region
    del first, second, large
    assert region() is None
    assert pages.empty(0).numel() == 0


def test_a_packed_model_says_what_it_refuses():
    model = make("plain", torch.float32)
    model.pack()
    with pytest.raises(ValueError, match="model: it is packed already"):
        model.pack()
    with pytest.raises(ValueError, match=r"x: got torch.bfloat16 of shape \[3, 96\] on cpu, want torch.float32"):
        model.logits(torch.zeros(3, 96, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="model: the native library multiplies fp32, bf16 and fp16"):
        make("plain", torch.float64).pack()


def test_other_models_have_a_reason():
    model = GPT(GPTConfig(**BASE, experts=4, experts_per_token=2))
    reason = DecoderProgram.reason_against(model)
    assert reason is not None
    assert "experts" in reason
    with pytest.raises(ValueError, match="model: mixtures of experts"):
        DecoderProgram(model, PagedCache(model.config, 4), 8)
    assert "fp32, bf16 and fp16" in (DecoderProgram.reason_against(make("plain", torch.float64)) or "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_bits_of_an_answer_do_not_depend_on_anything_else(dtype, data):
    """Batching, chunks, preemption, shared prefixes, guesses, threads: tokens and log-probabilities are equal."""
    model = make(data.draw(st.sampled_from(sorted(CONFIGS))), dtype)
    start = draw(6, 12)[0]
    prompts = [
        start[: data.draw(st.integers(0, 12))] + draw(n, data.draw(st.integers(1, 40)))[0]
        for n in range(data.draw(st.integers(1, 5)))
    ]
    each = [
        Sampling(data.draw(st.integers(1, 12)), temperature=data.draw(st.sampled_from([0.0, 3.0])), seed=n, logprobs=2)
        for n in range(len(prompts))
    ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        together = engine(
            model, pages=data.draw(st.integers(16, 40)), step_tokens=data.draw(st.integers(2, 64)),
            running=data.draw(st.integers(1, 5)), share=data.draw(st.booleans()),
            draft=data.draw(st.sampled_from([0, 3])), ngram=1,
        ).generate(prompts, each)  # fmt: skip
        torch.set_num_threads(1)
        alone = [engine(model).generate([prompt], one)[0] for prompt, one in zip(prompts, each, strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert together == alone


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_are_those_of_a_training_step(dtype, autocast):
    """Of packed documents with gradients, token by token: what reinforcement learning compares. In mixed precision
    weights are fp32, and `dtype` is what both sides multiply in."""
    if autocast and dtype == torch.float32:
        pytest.skip("mixed precision has 16 bits")
    model, prompts = make("plain", torch.float32 if autocast else dtype), draw(2, 5, 19, 1, 8)
    precision = torch.autocast("cpu", dtype, enabled=autocast)
    with precision:
        answers = engine(model, step_tokens=6).generate(prompts, Sampling(9, temperature=1.0, seed=3, logprobs=0))
    documents = [prompt + answer.tokens for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = torch.tensor([token for document in documents for token in document])
    model.train()
    with precision:
        hidden = model(tokens, list(map(len, documents)))
        logprobs = log_softmax(model.logits(hidden)).gather(1, tokens.roll(-1)[:, None])[:, 0]
        losses = linear_cross_entropy(hidden, model.head_weight, tokens.roll(-1), reduction="none", chunk=7)
    assert logprobs.requires_grad
    assert losses.requires_grad
    start = 0
    for prompt, answer, document in zip(prompts, answers, documents, strict=True):
        rows = slice(start + len(prompt) - 1, start + len(document) - 1)
        # A CPU without instructions for fp16 does not round the logits of losses.
        for got in (logprobs, -losses) if multiplies("cpu", dtype) else (logprobs,):
            assert torch.equal(got[rows], torch.tensor(answer.logprobs))
        start += len(document)


@pytest.mark.parametrize("program", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_are_of_the_logits_as_the_model_rounds_them(dtype, program, monkeypatch):
    """On a GPU a sum over the same numbers in fp32 has another order: log-probabilities then differ from the trainer's,
    which on a CPU they do not."""
    given = []

    def recorded(logits):
        given.append(logits.dtype)
        return log_softmax(logits)

    monkeypatch.setattr(sampling, "log_softmax", recorded)
    one = engine(make("plain", dtype), draft=3, ngram=1)
    if not program:
        one._program = None
    one.generate(draw(2, 5, 19), [Sampling(4, temperature=t, seed=3, logprobs=1) for t in (0.0, 1.0)])
    assert set(given) == {dtype}


# Encoders


def encoder(dtype: torch.dtype) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(vocab_size=97, dim=72, layers=3, heads=3, hidden=168, positions=40, first_position=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[5, 1, 38, 7], [1], [2], [30, 30, 30]])
def test_an_encoder_is_as_near_to_fp64_as_its_forward_pass(dtype, lengths):
    model = encoder(dtype)
    tokens = torch.randint(0, 97, (sum(lengths),))
    with torch.no_grad():
        want = copy.deepcopy(model).double()(tokens, lengths)
        plain = model(tokens, lengths)
    model.pack()
    program = EncoderProgram(model, 100)
    got = program.hidden(tokens.tolist(), lengths).clone()
    assert torch.equal(program.hidden(tokens.tolist(), lengths), got)
    error, bound = (got.double() - want).abs().max(), (plain.double() - want).abs().max()
    assert error <= 1.5 * bound
    means = program.means(tokens.tolist(), lengths)
    want = torch.stack([part.double().mean(0) for part in got.split(lengths)])
    assert means.dtype == torch.float32
    assert torch.allclose(means.double(), want, rtol=0, atol=float(want.abs().max()) * 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_has_the_same_bits_whatever_it_is_packed_with(dtype):
    model = encoder(dtype)
    model.pack()
    documents = [torch.randint(0, 97, (n,)) for n in (3, 38, 1, 17, 30)]
    program = EncoderProgram(model, 100)
    alone = [program.hidden(tokens.tolist(), [len(tokens)]).clone() for tokens in documents]
    means = [program.means(tokens.tolist(), [len(tokens)]).clone() for tokens in documents]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        packed = torch.cat(documents).tolist(), [*map(len, documents)]
        together, pooled = program.hidden(*packed).clone(), program.means(*packed)
        torch.set_num_threads(1)
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(pooled, torch.cat(means))
    assert torch.equal(program.hidden(documents[1].tolist(), [38]), alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_that_threads_compute_in_parts_have_the_bits_of_each_alone(dtype):
    model = encoder(dtype)
    model.pack()
    lengths = [3, 8, 1, 12, 5, 2, 9, 7, 4, 11, 6, 10, 1, 3, 14]
    documents = [torch.randint(0, 97, (n,)).tolist() for n in lengths]
    program = EncoderProgram(model, 100)
    alone = torch.cat([program.hidden(tokens, [len(tokens)]).clone() for tokens in documents])
    means = torch.cat([program.means(tokens, [len(tokens)]).clone() for tokens in documents])
    packed = [token for tokens in documents for token in tokens]
    before = torch.get_num_threads()
    for threads in (1, 3, 2, 3):
        torch.set_num_threads(threads)
        try:
            together, pooled = program.hidden(packed, lengths).clone(), program.means(packed, lengths)
        finally:
            torch.set_num_threads(before)
        assert program._threads == threads  # parts were computed
        assert torch.equal(together, alone)
        assert torch.equal(pooled, means)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 4))
def test_parts_hold_all_documents_in_their_order_and_keep_threads_busy(lengths, threads):
    parts = _parts(lengths, threads)
    row = document = 0
    for first, rows, n, count in parts:
        assert (first, n) == (row, document)
        assert rows == sum(lengths[n : n + count])
        row, document = row + rows, document + count
    assert (row, document) == (sum(lengths), len(lengths))
    if len(parts) > 1:
        assert max(rows for _, rows, _, _ in parts) <= sum(lengths) // (2 * threads)


def test_encoders_that_run_otherwise_and_wrong_lengths():
    model = encoder(torch.float32)
    assert EncoderProgram.reason_against(model) == "its weights are not packed"
    with pytest.raises(ValueError, match="model: its weights are not packed"):
        EncoderProgram(model, 10)
    model.pack()
    program = EncoderProgram(model, 50)
    for count, lengths in ((6, [5]), (60, [30, 30]), (39, [39])):
        with pytest.raises(ValueError, match="lengths: got"):
            program.hidden([0] * count, lengths)
    model.backend = "reference"
    assert "another backend" in EncoderProgram.reason_against(model)


@pytest.mark.parametrize("isa", binding.SUPPORTED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_every_instruction_set(isa, dtype):
    """x · Φ(x) of a product: as near to it as torch's."""
    program = _Program()
    layer = Linear(2, 150).to(dtype)
    x = torch.stack([torch.linspace(-12, 12, 400), torch.ones(400)], 1).to(dtype)
    with torch.no_grad(), binding.use_isa(isa):
        layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
        layer.bias.zero_()
        out = torch.empty(400, 150, dtype=dtype)
        program._linear(x, layer, out, applied=1)
        program._finish()
        program._run(tokens=400)
    want = torch.nn.functional.gelu(x[:, :1].double()).expand(400, 150)
    assert ((out.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 2e-7 * x[:, :1].abs()).all()


@pytest.mark.parametrize("isa", binding.SUPPORTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 15, 16, 150])
def test_the_likeliest_token_is_torchs(isa, dtype, C):
    z = torch.randint(-40, -20, (40, C)).to(dtype)  # below the zeros that pad a vector; the largest comes several times
    z[1, C // 2] = torch.nan
    z[2] = -torch.inf
    z[3, -1] = torch.inf
    program, best = _Program(), _Numbers("i", 40)
    with binding.use_isa(isa):
        kind = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
        program._call("largest", z=z, best=best.address, dtype=kind, C=C)
        program._finish()
        program._run(tokens=40)
    want = z.float().argmax(-1).tolist()
    for row in (1, 2, 3):  # those whose largest number is not finite
        want[row] = -1 - want[row]
    assert best.read(40) == want


def test_likeliest_tokens_of_a_step_are_those_of_its_logits():
    model = make("plain", torch.bfloat16)
    engine = Engine(model, memory=2**22)
    program = engine._program
    calls = []
    original = program.likeliest

    def likeliest(tokens):
        best, logits = original(tokens), program.answers(len(tokens))
        calls.append(len(tokens))
        assert best == logits.float().argmax(-1).tolist()
        assert torch.equal(logits, program.logits(program._h[: len(tokens)]))
        return best

    program.likeliest = likeliest
    prompts = draw(3, *range(1, 71))
    answers = engine.generate(prompts, Sampling(max_tokens=4))
    assert calls
    assert max(calls) <= program.most_answers == 64
    plain = Engine(model, memory=2**22)
    plain._program = None
    assert plain.generate(prompts, Sampling(max_tokens=4)) == answers
