"""Hugging Face folders: every family has transformers' logits, and what does not fit is refused before it is loaded."""

import gc
import json
import pickle
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keyspan.inference import Engine, KVCache, Sampling
from keyspan.models import GPT, GPTConfig, RopeScaling, checkpoints, load, save
from keyspan.models.checkpoints import read_config
from keyspan.models.tensors import FolderTensors
from keyspan.training.loop import load_run

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 50.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False,
    "original_max_position_embeddings": 64, "rope_theta": 50.0,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied, scaled rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, biases, wide heads": ("Llama", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24,
                          "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "sliding_window": 5, "num_local_experts": 6, "num_experts_per_tok": 2,
                           "swiglu_limit": 1.5, "rope_parameters": YARN}),
    "gpt-oss, one layer's tokens": ("GptOss", {"head_dim": 8, "sliding_window": 3, "num_local_experts": 3,
                                               "num_experts_per_tok": 3, "attention_bias": False,
                                               "rope_parameters": {**YARN, "truncate": True, "mscale": 0.7,
                                                                   "mscale_all_dim": 0.3}}),
    "llama, yarn": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.2, "beta_fast": 4.0}}),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def theirs(request, tmp_path):
    """A tiny random model of transformers; its folder is `tmp_path`."""
    family, more = FAMILIES[request.param]
    torch.manual_seed(0)
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**SIZES, **more}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path)
    return model


@torch.inference_mode()
def test_logits_are_those_of_transformers(theirs, tmp_path):
    ours = load(tmp_path)
    assert not ours.training
    documents = [torch.randint(61, (n,)) for n in (11, 1, 17)]
    want = torch.cat([theirs(tokens[None]).logits[0] for tokens in documents])
    got = ours.logits(ours(torch.cat(documents), [len(x) for x in documents]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))

    cache = KVCache(3)
    first = [ours(torch.cat([x[:-1] for x in documents]), [len(x) - 1 for x in documents], cache=cache)]
    last = ours.logits(ours(torch.stack([x[-1] for x in documents]), [1, 1, 1], cache=cache))
    ends = torch.tensor([len(x) for x in documents]).cumsum(0) - 1
    torch.testing.assert_close(last, want[ends], rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert first[0].shape == (26, 32)


def test_the_loss_is_that_of_the_logits(theirs, tmp_path):
    ours = load(tmp_path)
    tokens = torch.randint(61, (9,))
    want = torch.nn.functional.cross_entropy(theirs(tokens[None]).logits[0], tokens.roll(1))
    torch.testing.assert_close(ours.loss(tokens, tokens.roll(1), [9]), want, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_engine_answers_as_transformers(theirs, tmp_path):
    prompts = [torch.randint(3, 61, (n,)).tolist() for n in (9, 3)]  # generate() takes token 0 for padding
    want = [
        theirs.generate(torch.tensor([x]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(x) :].tolist()
        for x in prompts
    ]
    engine = Engine(load(tmp_path), memory=2**20, page_size=4, step_tokens=5)
    assert [answer.tokens for answer in engine.generate(prompts, Sampling(max_tokens=8))] == want


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab_size": 61, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, **changes}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "head_dim": 12, "rope_scaling": RopeScaling("linear", 4.0)},
     {"rope_scaling": RopeScaling("llama3", 8.0, 64), "max_positions": 512},
     {"rope_scaling": RopeScaling("linear", 4.0), "max_positions": 64},
     {"rope_scaling": RopeScaling("yarn", 4.0, 16, 1.0, 32.0, magnitude=1.2), "max_positions": 64}],
)  # fmt: skip
@torch.inference_mode()
def test_what_is_saved_is_loaded_by_transformers_and_by_us(changes, tmp_path):
    model = small(**changes)
    save(model, tmp_path)
    tokens = torch.randint(61, (13,))
    want = model.logits(model(tokens, [13]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(tokens[None]).logits[0], want, rtol=1e-4, atol=1e-5)
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.config == model.config


@pytest.mark.parametrize(
    ("architecture", "scaling", "want"),
    [
        ("Llama", None, 4096),
        ("Llama", {"rope_type": "linear", "factor": 2.5}, 10_240),
        ("Llama", {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 4096),
        ("Qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16_384),
        ("Gemma3", {"rope_type": "linear", "factor": 8.0}, 4096),
    ],
)  # fmt: skip
def test_a_models_longest_text_is_read_with_its_scaling(architecture, scaling, want):
    raw = {"architectures": [f"{architecture}ForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
           "vocab_size": 7, "num_hidden_layers": 2, "intermediate_size": 40, "query_pre_attn_scalar": 16,
           "rope_scaling": scaling, "max_position_embeddings": 4096}  # fmt: skip
    assert read_config(raw)[1].max_positions == want
    del raw["max_position_embeddings"]
    assert read_config(raw)[1].max_positions == (want if architecture == "Qwen2" else None)
    for wrong in (0, True, "4096"):
        with pytest.raises(ValueError, match=r"max_positions: got|wrong type"):
            read_config({**raw, "rope_scaling": None, "max_position_embeddings": wrong})


def test_shards_and_another_dtype(tmp_path):
    model = small()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(tmp_path, torch.bfloat16)
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert loaded.norm.weight.dtype == torch.float32
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.bfloat16())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no b.safetensors"):
        load(tmp_path)


def mapped(file):
    """Addresses at which this process has a file mapped, as (first, behind the last)."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_tensors_are_mapped_and_not_read_into_memory(tmp_path, shard):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard is not None)
    with ExitStack() as stack:
        stored = FolderTensors(tmp_path, stack)
        ranges = [found for file in files for found in mapped(file)]
        for name in stored.names():
            assert stored.shape(name)
            at = stored.tensor(name).data_ptr()
            assert any(first <= at < end for first, end in ranges), name
    del stored
    gc.collect()
    load(tmp_path)
    assert not any(map(mapped, files))  # what is loaded is a copy, and the files may be replaced


def test_weights_that_are_saved_replace_shards(tmp_path):
    save(small(), tmp_path)
    tmp_path.joinpath("model.safetensors").rename(tmp_path / "a.safetensors")
    names = load_file(tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    torch.manual_seed(1)
    other = GPT(small().config)
    save(other, tmp_path)
    assert torch.equal(load(tmp_path).embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(
    ("shards", "message"),
    [({"a": 5}, "got weight_map {'a': 5}, want the file"), (["a"], r"got weight_map \['a'\], want the file"),
     ({"a": "../model.safetensors"}, "holds no ../model.safetensors")],
)  # fmt: skip
def test_a_malformed_index_is_refused(shards, message, tmp_path):
    folder = tmp_path / "inside"
    save(small(), folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"got architectures \['MambaForCausalLM'\], want one of LlamaFor"),
        ({"hidden_act": "relu"}, "got activation 'relu', want one of silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "got rope_type .dynamic., want default"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing; .*\(and 4 more\)"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not part of this architecture"),
        ({"intermediate_size": 50}, r"model.layers.0.mlp.gate_proj.weight: got shape \[128, 32\], want \[50, 32\]"),
        ({"num_local_experts": 4}, "a mixture of experts is not supported"),
        ({"dtype": "int4"}, "dtype: got 'int4', want one of float32"),
        ({"dtype": ["float32"]}, r"dtype: got \['float32'\], want one of float32"),
        ({"num_hidden_layers": 10**9}, "fewer tensors than 1000000000 layers"),
        ({"vocab_size": 10**15}, "model.embed_tokens.weight: got shape"),
        ({"architectures": 5}, "got architectures 5, want one of"),
        ({"hidden_act": ["silu"]}, "config.json: an entry has a wrong type"),
        ({"rms_norm_eps": None}, "config.json: an entry has a wrong type"),
        ({"rope_parameters": "linear"}, "config.json: an entry has a wrong type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json: factor is missing"),
        ({"layer_types": [["a"], ["b"]], "sliding_window": 3}, "config.json: an entry has a wrong type"),
        ({"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 0},
         "config.json: an entry has a wrong type"),
        ({"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 4, "attn_logit_softcapping": -1.0},
         "attention_softcap: got -1.0, want a positive number or None"),
        ({"quantization_config": {"bits": 8}}, "quantized weights are not supported"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
    save(small(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token: got 5, want 1 … experts = 4"),
        ({"expert_limit": 0.0}, "expert_limit: got 0.0, want a positive number"),
        ({"rope_theta": 1.0, "rope_scaling": RopeScaling("yarn", 4.0)}, "rope_theta: got 1.0, want more than 1"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**{"experts": 4, "experts_per_token": 2, **changes})


def test_experts_learn_and_a_row_is_that_of_the_token_alone():
    model = small(experts=4, experts_per_token=2)
    tokens = torch.randint(61, (30,))
    model.loss(tokens, tokens.roll(1), [30]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].mlp.router.weight.grad.abs().max() > 0
    mlp, x = model.blocks[0].mlp, torch.randn(40, 32)
    with torch.inference_mode():
        assert torch.equal(mlp(x)[7:9], mlp(x[7:9]))
        assert mlp(x[:0]).shape == (0, 32)


def test_nothing_is_filled_before_all_is_checked_and_no_code_runs(tmp_path, monkeypatch):
    """Neither code of the folder nor pickles are looked at, and tensors are copied only where everything fits."""
    save(small(), tmp_path)
    evil = f"raise SystemExit(open({str(tmp_path / 'ran')!r}, 'w'))"
    (tmp_path / "modeling_evil.py").write_text(evil)
    edit(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})

    class Pickled:
        def __reduce__(self):
            return exec, (evil,)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
    load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    filled = []
    monkeypatch.setattr(checkpoints, "fill", lambda *_: filled.append(1))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: filled.append(1))
    for change in ({"more": torch.zeros(1)}, {"lm_head.bias": torch.zeros(61)}, {"model.norm.weight": torch.zeros(31)}):
        save_file({**tensors, **change}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{next(iter(change))}.*(not part of this|got shape)"):
            load(tmp_path)
    save_file({name: x for name, x in tensors.items() if name != "model.norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is missing"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):  # the pickle is no choice
        load(tmp_path)
    assert not filled
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_refused(tmp_path):
    save(small(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the file is damaged or cut off"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="got list, want a JSON object"):
        load(tmp_path)


def test_what_llama_cannot_hold_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="got positions = 'alibi', which Llama's format has no place for"):
        save(small(positions="alibi"), tmp_path)


def test_old_configs_are_read():
    """config.json as transformers 4 wrote it."""
    raw = {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4,
           "vocab_size": 7, "intermediate_size": 40, "query_pre_attn_scalar": 16, "sliding_window": 8,
           "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "torch_dtype": "bfloat16",
           "rope_scaling": {"rope_type": "linear", "factor": 8.0},
           "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
    _, config = read_config(raw)
    assert config.windows == (8, None, 8, None)
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    raw = {"architectures": ["MistralForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 7,
           "num_hidden_layers": 2, "intermediate_size": 40, "sliding_window": 8, "rope_theta": 1e4}  # fmt: skip
    assert read_config(raw)[1].windows == (8, 8)


def test_a_run_is_exported_with_its_tokenizer(tmp_path, monkeypatch, capsys):
    from keyspan import cli

    library = tmp_path / "library"
    library.mkdir()
    for i in range(40):
        (library / f"m{i}.py").write_bytes(b"def f(x):\n    return x\n" * (1 + i % 5))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    run, folder = tmp_path / "run", tmp_path / "hf"
    words = f"train --task stdlib --steps 2 --dim 16 --layers 1 --heads 2 --tokens 64 --max-length 32 --out {run}"
    assert cli.main(words.split()) == 0
    assert cli.main(["export", str(run), "--to", str(folder)]) == 0
    with torch.inference_mode():
        tokens, net = torch.randint(257, (23,)), load_run(run, "cpu")[2].eval()
        want = net.logits(net(tokens, [23]))
        found = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens[None]).logits[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def naïve(): €\n"
    assert tokenizer.encode(text) == [256, *text.encode()]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    capsys.readouterr()
    assert cli.main(["export", str(folder)]) == 1
    assert f"{folder}: holds no checkpoint; want a run folder" in capsys.readouterr().err
    assert cli.main(["generate", str(run), "--prompt", "def ", "--max-tokens", "8", "--temperature", "0"]) == 0
    ours = capsys.readouterr().out
    assert cli.main(["generate", str(folder), "--prompt", "def ", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == ours
    inputs = torch.tensor([tokenizer.encode("def ")])
    out = theirs.generate(inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokenizer.decode(out[0], skip_special_tokens=True) + "\n" == ours
