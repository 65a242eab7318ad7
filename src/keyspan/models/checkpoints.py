"""Models on disk, read into a GPT and written from one: Hugging Face folders (config.json and safetensors), GGUF files.

Weights are memory-mapped and copied tensor by tensor; no pickle is read and no code of the folder is run. Everything is
checked before memory for the weights is taken: the architecture, options that change the result, and the name and shape
of every tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyspan.core.checks import as_path, check_device, check_dtype, check_type
from keyspan.files import read_json, write_file
from keyspan.models.gguf import GgufFile
from keyspan.models.gpt import GPT, GPTConfig, RopeScaling
from keyspan.models.tensors import FolderTensors, Source, Tensors, check_tensors, fill

Raw = dict[str, Any]
"""A parsed config.json."""


def load(path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> GPT:
    """The model of a folder in Hugging Face's format, or of a GGUF file, in evaluation mode.

    Args:
        path: a folder with config.json and model.safetensors, or shards with model.safetensors.index.json; or a file
            whose name ends in .gguf, which takes the package `gguf`. Architectures: Llama 2 and 3 (SmolLM among them),
            Mistral, Qwen 2 and 3, Gemma 2, Gemma 3 (text), GPT-OSS.
        dtype: of the weights; None for that of the config (fp32 where it names none, as GGUF files do). Norms stay in
            fp32. Quantized weights of a GGUF file are widened.
        device: where the weights go.

    Raises:
        ValueError: for an unknown architecture, an option that is not supported, and a missing, extra or misshapen
            tensor; the message names it.
        OSError: where a file cannot be read.
    """
    check_dtype("dtype", dtype)
    path, device = as_path("path", path), check_device("device", device)
    with ExitStack() as stack:
        stored: Tensors
        if path.suffix == ".gguf":
            stored = gguf = GgufFile(path)
            raw, where = gguf.config(), path
        else:
            raw, where = read_json(path / "config.json"), path / "config.json"
        family, config = read_config(raw, str(where))
        if path.suffix == ".gguf":
            family = replace(family, norms_less_one=False)
        else:
            stored = FolderTensors(path, stack)
        if config.layers > len(stored.names()):
            raise ValueError(f"{path}: the weights do not fit {where.name}: fewer tensors than {config.layers} layers")
        sources = list(_sources(config, family))
        # Old checkpoints store what follows from the configuration, and a tied head beside the embedding.
        ignored = {name for name in stored.names() if name.endswith("rotary_emb.inv_freq")}
        check_tensors(where, stored, sources, ignored | ({"lm_head.weight"} if config.tie_embeddings else set()))
        with torch.device("meta"):  # of sizes that the files are known to hold
            model = GPT(config)
        wanted = dtype or read_dtype(raw)
        fill(model, stored, sources, lambda name: torch.float32 if _stays_fp32(name) else wanted, device)
    return model.eval()


# Configurations


@dataclass(frozen=True)
class Family:
    """What tells the architectures apart."""

    windowed: bool = False
    """Whether `sliding_window` alone means all layers; else `layer_types` or `use_sliding_window` say which."""
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    """Embeddings are scaled by sqrt(dim), blocks have four norms."""
    norms_less_one: bool = False
    """Whether norms' weights are stored less 1."""
    gpt_oss: bool = False
    """Heads have sinks, feed-forward layers are mixtures of experts."""


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(windowed=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Gemma2ForCausalLM": Family(gemma=True, norms_less_one=True),
    "Gemma3ForCausalLM": Family(gemma=True, norms_less_one=True, qk_norm=True),
    "GptOssForCausalLM": Family(gpt_oss=True),
}
"""By the name in config.json's `architectures`."""


def read_config(raw: Raw, where: str = "config.json") -> tuple[Family, GPTConfig]:
    """The configuration of a model, from what config.json says in transformers 4 or 5.

    Raises ValueError for an unknown architecture, a missing or malformed entry, or an option that would change the
    result.
    """
    try:
        return _read_config(raw, where)
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError, ArithmeticError) as error:  # entries are used as what they ought to be
        raise ValueError(f"{where}: an entry has a wrong type or size ({error})") from None


def _read_config(raw: Raw, where: str) -> tuple[Family, GPTConfig]:
    names = raw.get("architectures") or []
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name not in FAMILIES:
        raise ValueError(f"{where}: got architectures {names}, want one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]

    def get(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{where}: {key} is missing")
        return raw[key]

    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if activation not in known:
        raise ValueError(f"{where}: got activation {activation!r}, want one of {', '.join(known)}")
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{where}: quantized weights are not supported, want fp32, bf16 or fp16")
    if not family.gpt_oss and (raw.get("num_experts") or raw.get("num_local_experts")):
        raise ValueError(f"{where}: a mixture of experts is not supported, want a dense model")
    if family.gemma and raw.get("use_bidirectional_attention"):
        raise ValueError(f"{where}: use_bidirectional_attention is not supported")
    dim, heads, layers = get("hidden_size"), get("num_attention_heads"), get("num_hidden_layers")
    rope, local = _rope(raw, where)
    bias = bool(raw.get("attention_bias"))
    config = GPTConfig(
        vocab_size=get("vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        hidden=get("intermediate_size"),
        head_dim=raw.get("head_dim") or dim // heads,
        rope_theta=rope[0],
        rope_scaling=rope[1],
        max_positions=_max_positions(raw, name, rope[1]),
        local_rope_theta=local,
        windows=_windows(raw, family, layers, where),
        activation=known[activation],  # type: ignore[arg-type]
        qkv_bias=bias or family.qkv_bias,
        out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias")),
        qk_norm=family.qk_norm,
        post_norms=family.gemma,
        attention_scale=get("query_pre_attn_scalar") ** -0.5 if family.gemma else None,
        attention_softcap=raw.get("attn_logit_softcapping") if family.gemma else None,
        logit_softcap=raw.get("final_logit_softcapping") if family.gemma else None,
        embedding_scale=math.sqrt(dim) if family.gemma else 1.0,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", family.gemma)),
        sinks=family.gpt_oss,
        experts=get("num_local_experts") if family.gpt_oss else 0,
        experts_per_token=get("num_experts_per_tok") if family.gpt_oss else 0,
        expert_limit=float(raw.get("swiglu_limit", 7.0)),
        expert_alpha=float(raw.get("swiglu_alpha", 1.702)),
    )
    return family, config


def _rope(raw: Raw, where: str) -> tuple[tuple[float, RopeScaling | None], float | None]:
    """(theta and scaling, theta of windowed layers): `rope_parameters` of transformers 5, or the entries of 4."""
    found: Raw | None = raw.get("rope_parameters")
    local: float | None = None
    if found is None:
        found = {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta", 10_000.0)}
        local = raw.get("rope_local_base_freq")
    elif "full_attention" in found:
        local = found["sliding_attention"]["rope_theta"]
        found = found["full_attention"]
    kind = found.get("rope_type", found.get("type", "default"))
    theta = float(found.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor {found['partial_rotary_factor']} is not supported, want 1")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", float(found["factor"]))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            float(found["factor"]),
            int(found["original_max_position_embeddings"]),
            float(found["low_freq_factor"]),
            float(found["high_freq_factor"]),
        )
    elif kind == "yarn":
        scaling = _yarn(found, raw)
    else:
        raise ValueError(f"{where}: got rope_type {kind!r}, want default, linear, llama3 or yarn")
    if local is not None and float(local) == theta and scaling is None:
        local = None
    return (theta, scaling), None if local is None else float(local)


def _max_positions(raw: Raw, architecture: str, scaling: RopeScaling | None) -> int | None:
    """`max_position_embeddings` with what RoPE's scaling adds to it; Llama 3's and Gemma 3's have it already."""
    if scaling is not None and scaling.kind == "yarn":
        return int(scaling.original_length * scaling.factor)
    found: int | None = raw.get("max_position_embeddings")
    if found is not None and scaling is not None and scaling.kind == "linear" and not architecture.startswith("Gemma3"):
        return int(found * scaling.factor)
    return found


def _yarn(found: Raw, raw: Raw) -> RopeScaling:
    original = int(found["original_max_position_embeddings"])
    factor = float(found.get("factor") or raw["max_position_embeddings"] / original)
    magnitude = found.get("attention_factor")
    if magnitude is None:
        more, all_of = found.get("mscale"), found.get("mscale_all_dim")
        scales = (more, all_of) if more and all_of else (1.0, 0.0)
        above, below = (0.1 * scale * math.log(max(factor, 1.0)) + 1 for scale in scales)
        magnitude = above / below
    slow, fast = float(found.get("beta_slow") or 1), float(found.get("beta_fast") or 32)
    return RopeScaling(
        "yarn", factor, original, slow, fast, whole=found.get("truncate", True), magnitude=float(magnitude)
    )


def _windows(raw: Raw, family: Family, layers: int, where: str) -> tuple[int | None, ...] | None:
    window, types = raw.get("sliding_window"), raw.get("layer_types")
    if window is None:
        return None
    if types is None:
        if family.gemma and "sliding_window_pattern" in raw:
            pattern = raw["sliding_window_pattern"]
            types = ["sliding_attention" if (n + 1) % pattern else "full_attention" for n in range(layers)]
        elif family.gemma or family.gpt_oss:
            types = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
        elif family.windowed:
            types = ["sliding_attention"] * layers
        elif raw.get("use_sliding_window"):
            first = raw.get("max_window_layers", 0)
            types = ["sliding_attention" if n >= first else "full_attention" for n in range(layers)]
        else:
            return None
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{where}: got layer_types {types}, want {layers} of sliding_attention and full_attention")
    found = tuple(window if kind == "sliding_attention" else None for kind in types)
    return found if any(found) else None


def read_dtype(raw: Raw) -> torch.dtype:
    """The dtype that a config.json names; fp32 where it names none."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if not isinstance(name, str) or name not in dtypes:
        raise ValueError(f"dtype: got {name!r}, want one of {', '.join(dtypes)}")
    return dtypes[name]


# Tensors


def _sources(config: GPTConfig, family: Family) -> Iterator[Source]:
    """The tensors of a checkpoint, parameter by parameter."""
    c = config
    norm = _plus_one if family.norms_less_one else None
    yield Source("embedding.weight", ("model.embed_tokens.weight",), ((c.vocab_size, c.dim),))
    yield Source("norm.weight", ("model.norm.weight",), ((c.dim,),), norm)
    if not c.tie_embeddings:
        yield Source("head.weight", ("lm_head.weight",), ((c.vocab_size, c.dim),))
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for n in range(c.layers):
        ours, theirs = f"blocks.{n}.", f"model.layers.{n}."
        linears = [
            ("attention.qkv", [f"self_attn.{x}_proj" for x in "qkv"], (query, key, key), c.dim, c.qkv_bias),
            ("attention.out", ["self_attn.o_proj"], (c.dim,), query, c.out_bias),
        ]
        if c.experts:
            linears.append(("mlp.router", ["mlp.router"], (c.experts,), c.dim, True))
            yield from _expert_sources(c, f"{ours}mlp.", f"{theirs}mlp.experts.")
        else:
            linears.append(("mlp.w12", ["mlp.gate_proj", "mlp.up_proj"], (c.hidden, c.hidden), c.dim, c.mlp_bias))
            linears.append(("mlp.w3", ["mlp.down_proj"], (c.dim,), c.hidden, c.mlp_bias))
        for name, parts, rows, columns, bias in linears:
            shapes = tuple((count, columns) for count in rows)
            yield Source(f"{ours}{name}.weight", tuple(f"{theirs}{x}.weight" for x in parts), shapes)
            if bias:
                shapes_of_bias = tuple((count,) for count in rows)
                yield Source(f"{ours}{name}.bias", tuple(f"{theirs}{x}.bias" for x in parts), shapes_of_bias)
        if c.sinks:
            yield Source(f"{ours}attention.sinks", (f"{theirs}self_attn.sinks",), ((c.heads,),))
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        norms = [("attention_norm", "input_layernorm", c.dim), ("mlp_norm", before_mlp, c.dim)]
        if c.post_norms:
            norms += [("attention_post_norm", "post_attention_layernorm", c.dim)]
            norms += [("mlp_post_norm", "post_feedforward_layernorm", c.dim)]
        if c.qk_norm:
            norms += [(f"attention.{x}_norm", f"self_attn.{x}_norm", c.head_dim) for x in "qk"]
        for name, part, size in norms:
            yield Source(f"{ours}{name}.weight", (f"{theirs}{part}.weight",), ((size,),), norm)


def _expert_sources(c: GPTConfig, ours: str, theirs: str) -> Iterator[Source]:
    """GPT-OSS stores an expert's matrices as [inputs, outputs], gate and up in turns."""

    def halves(x: Tensor) -> Tensor:
        y: Tensor = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return y

    E = c.experts
    yield Source(f"{ours}w12", (f"{theirs}gate_up_proj",), ((E, c.dim, 2 * c.hidden),), lambda x: halves(x).mT)
    yield Source(f"{ours}w12_bias", (f"{theirs}gate_up_proj_bias",), ((E, 2 * c.hidden),), halves)
    yield Source(f"{ours}w3", (f"{theirs}down_proj",), ((E, c.hidden, c.dim),), lambda x: x.mT)
    yield Source(f"{ours}w3_bias", (f"{theirs}down_proj_bias",), ((E, c.dim),))


def _plus_one(x: Tensor) -> Tensor:
    return x.float() + 1


def _stays_fp32(name: str) -> bool:
    return name.endswith(("norm.weight", "sinks"))


# Writing


def save(model: GPT, folder: Path | str) -> None:
    """Write a model as a Llama folder that `transformers` loads: config.json and model.safetensors.

    Raises ValueError for a model that is no Llama: of other positions than RoPE, with norms of heads, and so on.
    """
    from safetensors.torch import save_file

    check_type("model", model, GPT)
    config = model.config
    plain = GPTConfig(
        config.vocab_size, config.dim, config.layers, config.heads, config.kv_heads, config.hidden, config.head_dim,
        rope_theta=config.rope_theta, rope_scaling=config.rope_scaling, max_positions=config.max_positions,
        norm_eps=config.norm_eps, tie_embeddings=config.tie_embeddings, embedding_std=config.embedding_std,
        dropout=config.dropout,
    )  # fmt: skip
    if plain != config:
        differing = [x for x in vars(plain) if getattr(plain, x) != getattr(config, x)]
        values = ", ".join(f"{x} = {getattr(config, x)!r}" for x in differing)
        raise ValueError(f"model: got {values}, which Llama's format has no place for")
    folder = as_path("folder", folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    scaling: Raw = {"rope_type": "default"}
    if config.rope_scaling is not None:
        r = config.rope_scaling
        scaling = {"rope_type": r.kind, "factor": r.factor}
        if r.kind != "linear":
            scaling |= {"original_max_position_embeddings": r.original_length}
        if r.kind == "llama3":
            scaling |= {"low_freq_factor": r.low_turns, "high_freq_factor": r.high_turns}
        elif r.kind == "yarn":
            scaling |= {"beta_slow": r.low_turns, "beta_fast": r.high_turns}
            scaling |= {"truncate": r.whole, "attention_factor": r.magnitude}
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
    }
    if config.max_positions is not None:
        scaled = config.rope_scaling is not None and config.rope_scaling.kind == "linear"
        raw["max_position_embeddings"] = round(config.max_positions / (scaling["factor"] if scaled else 1))
    tensors: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for source in _sources(config, FAMILIES["LlamaForCausalLM"]):
        parts = parameters[source.ours].detach().split([shape[0] for shape in source.shapes])
        tensors |= {name: part.contiguous() for name, part in zip(source.names, parts, strict=True)}
    # The weights first: a folder with a config.json is whole.
    temporary = folder / "model.safetensors.new"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_file(folder / "config.json", f"{json.dumps(raw, indent=2)}\n".encode())
