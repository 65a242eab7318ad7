"""`attn_implementation="keyspan"` against transformers' own eager attention, on tiny models with random weights."""

import copy
import itertools

import pytest
import torch
import transformers as hf
from tiny_models import DECODERS, ENCODERS, MODELS, SMALL, V, batch, build, padded, result
from transformers import masking_utils

import keyspan
from keyspan.interop import transformers as door
from keyspan.interop.transformers import attention, masks
from keyspan.interop.transformers.cache import GrowingLayer

door.register()


@pytest.fixture(autouse=True)
def quiet_memory():
    """transformers builds weights by in-place initialisation of torch.empty, in which NaN would stay."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def run(name, model, implementation, inputs, backward=True, **kwargs):
    """Output at real tokens and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = result(name, model, {**inputs, **kwargs})
    if backward:
        torch.manual_seed(2)
        out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} if backward else {}
    return out.detach(), grads


def differences(got, want):
    """Largest difference of the outputs, by the largest output, and of each gradient, by the largest of all gradients:
    some gradients are zero but for noise."""
    (out, grads), (wanted, wanted_grads) = got, want
    assert torch.isfinite(wanted).all()
    assert grads.keys() == wanted_grads.keys()
    largest = max((g.abs().max() for g in wanted_grads.values()), default=0)
    found = {n: float((g - wanted_grads[n]).abs().max() / largest) for n, g in grads.items()}
    return {"output": float((out - wanted).abs().max() / wanted.abs().max()), **found}


def close(got, want, tolerance=1e-5):
    found = differences(got, want)
    assert max(found.values()) <= tolerance, found


def tolerance(name, model, inputs):
    """1e-5; for T5, whose scores are not scaled, twice eager's own error if that is more."""
    if name != "t5":
        return 1e-5
    exact = run(name, copy.deepcopy(model).double(), "eager", inputs)
    return max(1e-5, 2 * max(differences(run(name, model, "eager", inputs), exact).values()))


@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients(name):
    model, inputs = build(name), batch(name)
    close(run(name, model, "keyspan", inputs), run(name, model, "eager", inputs), tolerance(name, model, inputs))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("lengths", [(8, 8), (12, 5, 9)], ids=["full", "right padded"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_decoders(name, lengths, use_cache):
    model, inputs = build(name), padded("right", lengths)
    ours = run(name, model, "keyspan", inputs, backward=False, use_cache=use_cache)
    close(ours, run(name, model, "eager", inputs, backward=False, use_cache=use_cache))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_exact_as_eager(name):
    """Both against the same weights in fp32, over a few batches: the error of ours is not above that of eager."""
    model, exact = build(name, torch.bfloat16), build(name, torch.bfloat16).float()
    exact.set_attn_implementation("eager")
    error = {"keyspan": 0.0, "eager": 0.0}
    for seed in range(4):
        inputs = {k: x.bfloat16() if x.is_floating_point() else x for k, x in batch(name, seed).items()}
        want = result(name, exact, {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()})
        for implementation in error:
            model.set_attn_implementation(implementation)
            error[implementation] += float((result(name, model, inputs) - want).square().mean())
    assert error["keyspan"] <= 1.3**2 * error["eager"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "bert", "t5"])
def test_a_training_step(name):
    weights = []
    for implementation in ("eager", "keyspan"):
        model, inputs = build(name).train(), batch(name)
        model.set_attn_implementation(implementation)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        result(name, model, inputs).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() <= 1e-5 * weights[0].abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5"])
def test_gradient_checkpointing(name):
    model, inputs = build(name), batch(name)
    want, allowed = run(name, model, "eager", inputs), tolerance(name, model, inputs)
    model.activation_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    close(run(name, model, "keyspan", inputs), want, allowed)


class TestGeneration:
    def generate(self, name, implementation, inputs, **options):
        model = build(name)
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | options
        return model.generate(**inputs, **options)

    @pytest.mark.parametrize("name", DECODERS)
    @pytest.mark.parametrize("cache", ["dynamic", "none", "static"])
    def test_greedy_token_by_token(self, name, cache):
        inputs = padded("left")
        options = {
            "dynamic": {},
            "none": {"use_cache": False},
            "static": {"cache_implementation": "static", "disable_compile": True},
        }[cache]
        ours = self.generate(name, "keyspan", inputs, **options)
        assert torch.equal(ours, self.generate(name, "eager", inputs, **options))

    @pytest.mark.parametrize("name", ["t5", "whisper"])
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_encoder_decoders(self, name, use_cache):
        inputs = {k: x for k, x in batch(name).items() if k != "decoder_input_ids"}
        ours = self.generate(name, "keyspan", inputs, use_cache=use_cache)
        assert torch.equal(ours, self.generate(name, "eager", inputs, use_cache=use_cache))

    def test_beams(self):
        inputs = padded("left")
        found = [self.generate("llama", name, inputs, num_beams=3) for name in ("keyspan", "eager")]
        assert torch.equal(*found)

    @pytest.mark.parametrize("name", DECODERS)
    @pytest.mark.parametrize("beams", [1, 3])
    def test_growing_cache(self, name, beams):
        model = build(name)
        cache = door.GrowingCache(config=model.config)
        ours = self.generate(name, "keyspan", batch(name), num_beams=beams, past_key_values=cache)
        assert torch.equal(ours, self.generate(name, "keyspan", batch(name), num_beams=beams))

    @pytest.mark.parametrize("name", [*DECODERS, "t5"])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_use_keyspan(self, name, beams):
        """One call: the cache that `generate` makes appends in place, and the tokens are eager's."""
        model = door.use_keyspan(door.use_keyspan(build(name)))
        inputs = batch(name) if name != "t5" else {k: x for k, x in batch(name).items() if k != "decoder_input_ids"}
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
        ours = model.generate(**inputs, **options, return_dict_in_generate=True)
        assert torch.equal(ours.sequences, self.generate(name, "eager", inputs, num_beams=beams))
        cache = getattr(ours.past_key_values, "self_attention_cache", ours.past_key_values)
        kinds = [type(layer) for layer in cache.layers]
        assert hf.cache_utils.DynamicLayer not in kinds
        assert GrowingLayer in kinds or name == "mistral"  # whose layers all have a window

    @pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
    def test_continuous_batching(self, name):
        """Requests of mixed lengths, a prompt longer than a batch among them, give eager's tokens of each alone."""
        model = build(name)
        prompts = [torch.randint(3, V, (n,)).tolist() for n in (5, 40, 9, 1)]
        greedy = hf.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        model.set_attn_implementation("eager")
        want = [model.generate(torch.tensor([p]), generation_config=greedy)[0, len(p) :].tolist() for p in prompts]
        sizes = hf.ContinuousBatchingConfig(num_blocks=16, block_size=16, max_batch_tokens=32)
        with door.continuous_batching(model):
            found = model.generate_batch(
                prompts, generation_config=greedy, continuous_batching_config=sizes, progress_bar=False
            )
        assert [output.generated_tokens for output in found.values()] == want
        assert model.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="model: got Linear"), door.continuous_batching(torch.nn.Linear(2, 2)):
            pass

    def test_prefill_in_two_parts(self):
        """Queries in the middle of their keys: neither square nor a single one."""
        model, ids = build("gemma3"), torch.randint(3, V, (2, 14))
        model.set_attn_implementation("keyspan")
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :6], use_cache=True)
        second = model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
        parts = torch.cat([first.logits, second.logits], 1)
        assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()


class TestLinears:
    @pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5"])
    def test_output_and_gradients(self, name):
        model, inputs = build(name), batch(name)
        want, allowed = run(name, model, "eager", inputs), tolerance(name, model, inputs)
        state, heard = list(model.state_dict()), []
        model.get_submodule(next(n for n, m in model.named_modules() if type(m) is torch.nn.Linear)) \
            .register_forward_hook(lambda *_: heard.append(1))  # fmt: skip
        assert door.replace_linears(model) is model
        assert not any(type(m) is torch.nn.Linear for m in model.modules())
        close(run(name, model, "keyspan", inputs), want, allowed)
        assert heard
        assert list(model.state_dict()) == state

    def test_subclasses_are_left_alone(self):
        class Quantized(torch.nn.Linear):
            pass

        assert type(door.replace_linears(torch.nn.Sequential(Quantized(2, 2)))[0]) is Quantized

    def test_bf16_is_as_exact_as_torch(self):
        model, inputs = build("llama"), batch("llama")
        exact, _ = run("llama", model, "keyspan", inputs, backward=False)
        model.bfloat16()
        errors = []
        for _ in range(2):
            out, _ = run("llama", model, "keyspan", inputs, backward=False)
            errors.append(float((out.float() - exact).square().mean().sqrt()))
            door.replace_linears(model)
        assert errors[1] <= 1.5 * errors[0]


class TestGrowingCache:
    def caches(self, config=None):
        return door.GrowingCache(config), hf.DynamicCache(config=config)

    def append(self, caches, tokens, layer=0, rows=2, **options):
        states = [torch.randn(rows, 3, tokens, 4, **options) for _ in range(2)]
        for got, want in zip(*(cache.update(*states, layer) for cache in caches), strict=True):
            assert torch.equal(got, want)
        return states

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_does_what_a_dynamic_cache_does(self, mode, monkeypatch):
        monkeypatch.setattr(GrowingLayer, "_LEAST", 2)
        caches = self.caches()
        with mode():
            for tokens in (5, 1, 1, 1, 7, 1):
                self.append(caches, tokens)
                self.append(caches, tokens, layer=1)
            for name, value, rows in (
                ("crop", -3, 2), ("reorder_cache", torch.tensor([1, 0]), 2), ("batch_repeat_interleave", 2, 4),
                ("batch_select_indices", torch.tensor([0, 3]), 2),
            ):  # fmt: skip
                for cache in caches:
                    getattr(cache, name)(value)
                for layer, tokens in ((0, 1), (0, 3), (1, 1)):
                    self.append(caches, tokens, layer, rows)
            for cache in caches:
                cache.reset()
            self.append(caches, 4)
            assert caches[0].get_seq_length() == caches[1].get_seq_length() == 4

    def test_writes_in_place(self):
        caches = self.caches()
        with torch.no_grad():
            self.append(caches, 5)
            before = caches[0].layers[0].keys.data_ptr()
            self.append(caches, 1)
        assert caches[0].layers[0].keys.data_ptr() == before

    def test_in_and_out_of_inference_mode(self):
        caches = self.caches()
        with torch.inference_mode():
            self.append(caches, 5)
        with torch.no_grad():
            self.append(caches, 1)
        with torch.inference_mode():
            self.append(caches, 1)

    def test_gradients_reach_all_tokens(self):
        caches = self.caches()
        states = [*self.append(caches, 5, requires_grad=True), *self.append(caches, 1, requires_grad=True)]
        ours, theirs = (torch.autograd.grad(c.layers[0].keys.cos().sum(), [states[0], states[2]]) for c in caches)
        assert all(map(torch.equal, ours, theirs))

    def test_layers_with_a_window(self):
        config = build("gemma3").config
        kinds = [[type(layer) for layer in cache.layers] for cache in self.caches(config)]
        assert GrowingLayer in kinds[0]
        assert all(a is (GrowingLayer if b is hf.cache_utils.DynamicLayer else b)
                   for a, b in zip(*kinds, strict=True))  # fmt: skip


class TestPacking:
    """Documents packed in one row equal each document alone."""

    LENGTHS = (3, 9, 1, 6)

    def alone(self, model, ids):
        model.set_attn_implementation("eager")
        return torch.cat([model(part[None], use_cache=False).logits[0] for part in ids.split(self.LENGTHS)])

    @pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
    @pytest.mark.parametrize("said", ["position_ids", "position_ids and cache", "cu_seq_lens", "cu_seq_lens and cache"])
    def test_equals_documents_alone(self, name, said):
        model, ids = build(name), torch.randint(3, V, (sum(self.LENGTHS),))
        want = self.alone(model, ids)
        positions = torch.cat([torch.arange(n) for n in self.LENGTHS])[None]
        kwargs = {"position_ids": positions, "use_cache": "cache" in said}
        if "cu_seq_lens" in said:
            starts = torch.tensor([0, *itertools.accumulate(self.LENGTHS)], dtype=torch.int32)
            longest = max(self.LENGTHS)
            kwargs |= dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest)
        model.set_attn_implementation("keyspan")
        got = model(ids[None], **kwargs).logits[0]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()

    def test_rows_packed_differently(self):
        model = build("mistral")
        ids = torch.randint(3, V, (2, 12))
        lengths = ((5, 7), (8, 4))
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        model.set_attn_implementation("keyspan")
        got = model(ids, position_ids=positions).logits
        model.set_attn_implementation("eager")
        for row, parts in enumerate(lengths):
            want = torch.cat([model(x[None], use_cache=False).logits[0] for x in ids[row].split(parts)])
            assert (got[row] - want).abs().max() <= 1e-5 * want.abs().max()

    def test_positions_of_a_padded_batch_are_no_documents(self):
        """Left padding counts positions from the first real token; a hole in the mask repeats one."""
        model = build("llama")
        ids = torch.randint(3, V, (2, 8))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = []
        for name in ("keyspan", "eager"):
            model.set_attn_implementation(name)
            found.append(model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()])
        assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()

    def test_positions_changed_in_place_are_read_again(self):
        model, ids = build("llama"), torch.randint(3, V, (1, 6))
        model.set_attn_implementation("keyspan")
        positions = torch.arange(6)[None]
        model(ids, position_ids=positions)
        positions.copy_(torch.tensor([[0, 1, 2, 0, 1, 2]]))
        got = model(ids, position_ids=positions).logits[0, 3:]
        want = model(ids[:, 3:]).logits[0]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


PADDINGS = {
    "none": None,
    "full": [[1] * 10, [1] * 10],
    "left": [[0] * 4 + [1] * 6, [1] * 10],
    "right": [[1] * 7 + [0] * 3, [1] * 10],
    "a hole": [[1] * 4 + [0] + [1] * 5, [1] * 10],
    "holes": [[1, 0] * 5, [1] * 10],
    "nothing real": [[0] * 10, [1] * 10],
    "short": [[1] * 6, [1] * 6],  # as with a static cache
}
NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [0] * 10])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2], list(range(10))])
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window, both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([1, 0])),
    "packed": masking_utils.packed_sequence_compatibility_function(
        masking_utils.causal_mask_function, POSITIONS, NUMBERS
    ),
    "packed window": masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(2), POSITIONS, NUMBERS
    ),
    "or": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q < 4) & (k < 4)),
    "every other": lambda b, h, q, k: (q - k) % 2 == 0,
}


class TestMasks:
    def visible(self, made, M, N):
        """What a layer that is given this mask sees, bool `[2, M, N]`."""
        if made is None or made.dtype == torch.bool:
            return made if made is None else made[:, 0]
        return attention._decoded(made.clone(), N).materialize(N).expand(2, M, N)

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("pairs", [1, 1 << 22], ids=["row by row", "at once"])
    def test_as_sdpa_has_it(self, function, padding, pairs, monkeypatch):
        monkeypatch.setattr(masks, "_PAIRS", pairs)
        given = None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
        for M, N, q_offset, kv_offset in [(10, 10, 0, 0), (3, 10, 7, 0), (1, 10, 9, 0), (2, 4, 8, 6)]:
            arguments = dict(
                batch_size=2,
                q_length=M,
                kv_length=N,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=FUNCTIONS[function],
                attention_mask=given,
            )
            want = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
            made = masks.make_mask(**arguments, allow_is_causal_skip=False)
            got = self.visible(made, M, N)
            assert torch.equal(got, want), (M, N)
            at_most_two = masks.runs(want)[2].max() <= 2
            assert (made.dtype == torch.int32) == at_most_two
            skipped = masks.make_mask(**arguments, allow_is_causal_skip=True)
            if skipped is None:
                assert torch.equal(want, keyspan.Causal().materialize(M, N).expand_as(want) if M > 1 else want | True)
            skipped = masks.make_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
            assert skipped is not None or want.all()

    def test_known_functions_are_not_evaluated(self, monkeypatch):
        monkeypatch.setattr(masks, "sdpa_mask", None)
        for name in set(FUNCTIONS) - {"or", "every other"}:
            made = masks.make_mask(2, 10, 10, mask_function=FUNCTIONS[name], allow_is_causal_skip=False)
            assert made.shape == (2, 1, 10, 2)
        with pytest.raises(TypeError):
            masks.make_mask(2, 10, 10, mask_function=FUNCTIONS["or"])

    def test_a_plain_batch_has_no_mask(self):
        assert masks.make_mask(2, 10, 10) is None
        assert masks.make_mask(2, 1, 10, q_offset=9) is None
        assert masks.make_mask(2, 10, 10, attention_mask=torch.ones(2, 10, dtype=torch.bool)) is None
        bidirectional = {"mask_function": FUNCTIONS["bidirectional"], "allow_is_bidirectional_skip": True}
        assert masks.make_mask(2, 10, 10, **bidirectional, allow_is_causal_skip=False) is None

    @pytest.mark.parametrize("floating", [False, True])
    def test_a_mask_of_the_user(self, floating):
        model, ids = build("llama"), torch.randint(3, V, (2, 8))
        mask = (torch.rand(2, 1, 8, 8) < 0.6) | torch.eye(8, dtype=torch.bool)
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        found = []
        for name, given in (("keyspan", added if floating else mask), ("eager", added)):
            model.set_attn_implementation(name)
            found.append(model(ids, attention_mask=given).logits)
        assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()

    def test_a_mask_that_a_model_has_changed_is_refused(self):
        model = build("llama")
        layer = model.model.layers[0].self_attn
        q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
        made = masks.make_mask(1, 6, 6, allow_is_causal_skip=False)
        with pytest.raises(ValueError, match=r"attention_mask: got ranges of shape \[1, 1, 6, 1\]"):
            attention.attention_forward(layer, q, k, k, made[..., :1])
        with pytest.raises(ValueError, match=r"attention_mask: got torch\.int64"):
            attention.attention_forward(layer, q, k, k, made.long())

    @pytest.mark.parametrize("wrong", ["output_attentions", "indices"])
    def test_what_is_refused(self, wrong):
        x = torch.randn(1, 4, 6, 8)
        with pytest.raises(ValueError, match=f"{wrong}: got"):
            attention.attention_forward(torch.nn.Module(), x, x, x, None, **{wrong: torch.ones(1, dtype=torch.bool)})


class TestCompile:
    @pytest.mark.parametrize(("name", "side"), [("llama", None), ("gemma3", "left"), ("bert", "left")])
    def test_whole_graph(self, name, side):
        model = build(name)
        model.set_attn_implementation("keyspan")
        inputs = padded(side) if side else {"input_ids": torch.randint(3, V, (2, 8))}
        options = {} if name == "bert" else {"use_cache": False}
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                want, got = (m(**inputs, **options)[0][real] for m in (model, compiled))
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()

    def test_decoding_with_a_static_cache(self):
        found = []
        for implementation in ("keyspan", "eager"):
            model = build("llama")
            model.set_attn_implementation(implementation)
            if implementation == "keyspan":
                model.forward = torch.compile(model.forward, backend="aot_eager")
            options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation="static")
            found.append(model.generate(**padded("left"), disable_compile=True, **options))
        assert torch.equal(*found)


def small_config(kind):
    """A config of a family by its model_type, made small by the names most families share."""
    config_class = type(hf.AutoConfig.for_model(kind))
    sizes = SMALL | {
        "num_key_value_heads": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "dim": 32,
        "hidden_dim": 48,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "embedding_size": 32,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_local_experts": 2,
        "sliding_window": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dropout": 0.0,
    }
    known = config_class().to_dict().keys() | set(getattr(config_class, "attribute_map", {}))
    return config_class(**{name: size for name, size in sizes.items() if name in known})


@pytest.mark.parametrize(
    "kind",
    [
        *("gpt2", "opt", "gpt_neox", "phi", "phi3", "olmo2", "cohere2", "granite", "smollm3", "starcoder2", "stablelm"),
        *("mixtral", "qwen2", "electra", "distilbert", "xlm-roberta", "bart", "mbart"),
    ],
)
def test_families_that_nobody_named(kind):
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(small_config(kind)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    try:
        model.set_attn_implementation("keyspan")
    except ValueError as error:  # the family has its attention in itself
        pytest.fail(str(error))
    inputs = padded("right")
    found = []
    for name in ("keyspan", "eager"):
        model.set_attn_implementation(name)
        found.append(model(**inputs)[0][inputs["attention_mask"].bool()])
    assert (found[0] - found[1]).abs().max() <= 2e-5 * found[1].abs().max()


class TestUnpadded:
    @pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_equals_padded(self, name, side):
        model, inputs = build(name), padded(side)
        options = {} if name in ENCODERS else {"use_cache": False}
        want = run(name, model, "eager", inputs, **options)
        assert door.unpadded(model) is model
        seen = self.count_tokens(model)
        close(run(name, model, "keyspan", inputs, **options), want)
        assert set(seen) == {int(inputs["attention_mask"].sum())}

    @staticmethod
    def count_tokens(model):
        """Tokens that each linear layer inside the stack computes."""
        seen = []
        for stack in model.modules():
            if isinstance(stack, torch.nn.ModuleList) and hasattr(stack[0], "_keyspan_unpadded"):
                for linear in stack.modules():
                    if isinstance(linear, torch.nn.Linear) and linear.out_features in (32, 48):
                        linear.register_forward_hook(lambda m, args, out: seen.append(args[0][..., 0].numel()))
        return seen

    def test_as_many_real_tokens_as_a_row_has(self):
        """Packed states then have the shape of a row: they must not be packed twice."""
        model, inputs = build("bert"), padded("right", (8, 3, 5))
        inputs = {k: x[1:] for k, x in inputs.items()}
        want = run("bert", model, "eager", inputs)
        close(run("bert", door.unpadded(model), "keyspan", inputs), want)

    @pytest.mark.parametrize("mask", [[[1] * 8, [1] * 8], [[1, 0] * 4, [1] * 8]], ids=["no padding", "holes"])
    def test_batches_that_stay_as_they_are(self, mask):
        model = build("bert")
        inputs = {"input_ids": torch.randint(3, V, (2, 8)), "attention_mask": torch.tensor(mask)}
        want = run("bert", model, "eager", inputs)
        close(run("bert", door.unpadded(model), "keyspan", inputs), want)

    def test_generation_keeps_its_cache(self):
        inputs, found = padded("left"), []
        for prepare in (door.unpadded, lambda model: model):
            options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
            found.append(prepare(build("llama")).generate(**inputs, **options))
        assert torch.equal(*found)

    def test_heads_and_poolers(self):
        torch.manual_seed(0)
        model = hf.BertForSequenceClassification(hf.BertConfig(**SMALL)).eval()
        inputs = padded("right")
        model.set_attn_implementation("eager")
        want = model(**inputs).logits
        got = door.unpadded(model)(**inputs).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()

    def test_with_gradient_checkpointing(self):
        model, inputs = build("modernbert"), padded("right")
        want = run("modernbert", model, "eager", inputs)
        door.unpadded(model).train()
        model.activation_checkpointing_enable()
        close(run("modernbert", model, "keyspan", inputs), want)

    def test_a_module_that_holds_a_model(self):
        """As sentence-transformers does."""

        class Pooled(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = build("bert")

            def forward(self, **inputs):
                states, real = self.model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
                return (states * real).sum(1) / real.sum(1)

        inputs, pooled = padded("right"), Pooled()
        want = pooled(**inputs)
        assert door.unpadded(pooled) is pooled
        assert pooled.model.config._attn_implementation == "keyspan"
        got = pooled(**inputs)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()

    def test_asked_for_twice(self):
        model, inputs = build("bert"), padded("right")
        want = run("bert", model, "eager", inputs)
        close(run("bert", door.unpadded(door.unpadded(model)), "keyspan", inputs), want)

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match="model: got Linear, want a transformers model"):
            door.unpadded(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="output_hidden_states: got True, want False"):
            door.unpadded(build("bert"))(**padded("right"), output_hidden_states=True)
