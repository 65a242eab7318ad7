"""GGUF files, llama.cpp's format: configuration and weights in Hugging Face's terms, for `keyspan.models.load`.

The `gguf` package reads the file, memory-mapped, and knows its number formats. Quantized weights (Q8_0, Q4_K, …) are
widened to the dtype that is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
"""Hugging Face's name by `general.architecture`; Mistral's files say llama."""
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}  # fmt: skip
_ATTENTION_SCALE_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and layers of the models whose scores are scaled by (dim / heads) ** -0.5, which no entry says."""


class GgufFile:
    """An open GGUF file. Raises ValueError for one that is damaged, OSError where there is none."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ValueError(
                f"{path}: reading GGUF files takes the package gguf: pip install 'keyspan[gguf]'"
            ) from None
        self.path, self._gguf = path, gguf
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path}: is no GGUF file")
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # what a damaged file makes of the reader's arithmetic
            raise ValueError(f"{path}: {type(error).__name__}: {error}; the file is damaged or cut off") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.entry("general.architecture", ""))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: got architecture {self.architecture!r}, want one of {', '.join(ARCHITECTURES)}")
        gemma = self.architecture.startswith("gemma")
        layer = _LAYER | (
            {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
             "post_feedforward_layernorm": "post_ffw_norm"}
            if gemma else {"post_attention_layernorm": "ffn_norm"}
        )  # fmt: skip
        names = dict(_TOP)
        for n in range(int(self.entry(f"{self.architecture}.block_count", 0))):
            names |= {f"model.layers.{n}.{theirs}": f"blk.{n}.{ours}" for theirs, ours in layer.items()}
        suffixed = {f"{k}.{s}": f"{v}.{s}" for k, v in names.items() for s in ("weight", "bias")}
        self._stored_as = {name: stored for name, stored in suffixed.items() if stored in self._tensors}

    def entry(self, key: str, default: Any = None) -> Any:
        """A metadata entry."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        a = self.architecture

        def want(key: str) -> Any:
            found = self.entry(f"{a}.{key}")
            if found is None:
                raise ValueError(f"{self.path}: {a}.{key} is missing")
            return found

        if self.entry(f"{a}.expert_count"):
            raise ValueError(f"{self.path}: a mixture of experts is not supported, want a dense model")
        dim, heads, layers = want("embedding_length"), want("attention.head_count"), want("block_count")
        head_dim = self.entry(f"{a}.attention.key_length", dim // heads)
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path}: token_embd.weight is missing")
        if self.entry(f"{a}.rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{self.path}: RoPE of a part of each head is not supported")
        gemma = a.startswith("gemma")
        raw = {
            "architectures": [ARCHITECTURES[a]],
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.entry(f"{a}.attention.head_count_kv", heads),
            "intermediate_size": want("feed_forward_length"),
            "head_dim": head_dim,
            "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
            "max_position_embeddings": self.entry(f"{a}.context_length"),
            "rms_norm_eps": want("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": a == "llama" and "blk.0.attn_q.bias" in self._tensors,
            "rope_parameters": {**self._scaling(head_dim), "rope_theta": self.entry(f"{a}.rope.freq_base", 10_000.0)},
            "sliding_window": self.entry(f"{a}.attention.sliding_window") if gemma else None,
            "attn_logit_softcapping": self.entry(f"{a}.attn_logit_softcapping"),
            "final_logit_softcapping": self.entry(f"{a}.final_logit_softcapping"),
            "query_pre_attn_scalar": dim // heads if (a, layers) in _ATTENTION_SCALE_BY_WIDTH else head_dim,
        }
        if a == "gemma3":
            raw["sliding_window_pattern"] = 6
            full = raw["rope_parameters"]
            raw["rope_parameters"] = {
                "full_attention": full,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        return raw

    def _scaling(self, head_dim: int) -> dict[str, Any]:
        """Llama 3's scaling is stored as a divisor of each frequency, from which its one free number is read."""
        a = self.architecture
        kind = self.entry(f"{a}.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.path}: got RoPE scaling {kind!r}, want none or linear")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self.entry(f"{a}.rope.scaling.factor")}
        if "rope_freqs.weight" not in self._tensors:
            return {"rope_type": "default"}
        from keyspan.models.gpt import RopeScaling

        divisors = self._read("rope_freqs.weight").double()
        theta = float(self.entry(f"{a}.rope.freq_base", 10_000.0))
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        scaling = RopeScaling("llama3", float(divisors.max()), 8192, 1.0, 4.0)
        if not torch.allclose(scaling.frequencies(frequencies, theta), frequencies / divisors, rtol=1e-4):
            raise ValueError(f"{self.path}: the scaling in rope_freqs.weight is not Llama 3's")
        return {
            "rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }  # fmt: skip

    # The tensors, by Hugging Face's names

    def names(self) -> set[str]:
        known = set(self._stored_as.values())
        return set(self._stored_as) | {name for name in self._tensors if name not in known | {"rope_freqs.weight"}}

    def shape(self, name: str) -> list[int]:
        return [int(n) for n in reversed(self._tensors[self._stored_as[name]].shape)]

    def tensor(self, name: str) -> Tensor:
        """fp32, or the stored dtype where that is fp16."""
        found = self._read(self._stored_as[name])
        part = name.split(".")[-2]
        if self.architecture == "llama" and part in ("q_proj", "k_proj"):
            found = self._unpermuted(found, part)
        return found

    def _read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            numbers = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = self._gguf.GGMLQuantizationType(tensor.tensor_type).name
            raise ValueError(f"{self.path}: {name}: numbers of the format {kind} are not supported") from None
        shape = [int(n) for n in reversed(tensor.shape)]
        return torch.from_numpy(numbers.copy()).reshape(shape)

    def _unpermuted(self, x: Tensor, part: str) -> Tensor:
        """llama.cpp turns neighbours of a head, Hugging Face halves: rows of a head are stored in another order."""
        kind = "head_count" if part == "q_proj" else "head_count_kv"
        every = self.entry("llama.attention.head_count")
        heads = int(self.entry(f"llama.attention.{kind}", every))
        return x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
