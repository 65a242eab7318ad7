"""A transformer encoder on packed documents: BERT and its kin, from tokens to hidden states.

Post-norm blocks (LayerNorm), a token sees its whole document, positions are learned, feed-forward layers use GELU.
Letters: T packed tokens, D width, H heads, K head dim.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyspan import Documents, KeyRanges, attention
from keyspan.core.checks import as_path, check_fields, check_index, check_int, check_type
from keyspan.core.masks.lengths import check_lengths
from keyspan.files import read_json
from keyspan.layers import Linear
from keyspan.layers.gemm import PackedWeight
from keyspan.models.checkpoints import read_dtype
from keyspan.models.tensors import FolderTensors, Source, check_tensors, fill

Raw = dict[str, Any]
"""A parsed config.json."""

ENCODERS = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}
"""What may stand before the names of tensors, by config.json's `model_type`."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder. Raises ValueError for one that cannot be built."""

    vocab_size: int
    dim: int
    """Width; a multiple of `heads`."""
    layers: int
    heads: int
    hidden: int
    """Width of the feed-forward layers."""
    positions: int
    """Rows of the table of positions."""
    first_position: int = 0
    """Row of a document's first token (RoBERTa: behind that of padding)."""
    types: int = 2
    """Rows of the table of token types, of which the first is used."""
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("vocab_size", "dim", "layers", "heads", "hidden", "positions", "types"):
            check_int(name, getattr(self, name))
        if self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}, want a multiple of heads = {self.heads}")
        if not 0 <= self.first_position < self.positions:
            raise ValueError(f"first_position: got {self.first_position}, want 0 … {self.positions - 1}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps: got {self.norm_eps}, want a positive number")

    @property
    def longest(self) -> int:
        """Most tokens of a document."""
        return self.positions - self.first_position


class EncoderBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + feed-forward(x)): x [T, D] -> [T, D]."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.qkv, self.out = Linear(c.dim, 3 * c.dim), Linear(c.dim, c.dim)
        self.attention_norm, self.norm = nn.LayerNorm(c.dim, c.norm_eps), nn.LayerNorm(c.dim, c.norm_eps)
        self.up, self.down = Linear(c.dim, c.hidden), Linear(c.hidden, c.dim)

    def forward(self, x: Tensor, mask: KeyRanges, backend: str | None) -> Tensor:
        q, k, v = self.qkv(x).view(1, len(x), 3 * self.heads, -1).split(self.heads, dim=2)
        x = self.attention_norm(x + self.out(attention(q, k, v, mask=mask, backend=backend).reshape(x.shape)))
        y: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return y


class Encoder(nn.Module):
    """The whole model, from tokens to hidden states.

    Args:
        config: its shape.
        backend: the attention backend of every layer; None chooses (see `keyspan.attention`). May be set later.
    """

    def __init__(self, config: EncoderConfig, backend: str | None = None) -> None:
        super().__init__()
        check_type("config", config, EncoderConfig)
        self.config, self.backend = config, backend
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.positions, config.dim)
        self.types = nn.Embedding(config.types, config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states [T, D] of packed documents, none of which sees another.

        Args:
            tokens: int64 [T], the documents one after the other, no padding.
            lengths: tokens per document; they add up to T.

        Raises ValueError for lengths that do not add up to T, and for a document longer than the table of positions.
        """
        check_index("tokens", tokens, self.config.vocab_size, self.tokens.weight.device, (torch.int64,))
        check_type("lengths", lengths, list, tuple)
        check_lengths("lengths", lengths)
        if sum(lengths) != len(tokens) or max(lengths, default=0) > self.config.longest:
            raise ValueError(
                f"lengths: got {sum(lengths)} tokens in all and {max(lengths, default=0)} in the longest document, "
                f"want {len(tokens)} in all and at most {self.config.longest} in one"
            )
        first = self.config.first_position
        positions = torch.cat([torch.arange(first, first + n) for n in lengths or [0]]).to(tokens.device)
        x: Tensor = self.norm(self.tokens(tokens) + self.positions(positions) + self.types.weight[0])
        mask = Documents(lengths).lower(1, len(tokens), len(tokens), tokens.device)
        for block in self.blocks:
            x = block(x, mask, self.backend)
        return x

    def pack(self, int8: bool = False) -> None:
        """Copy the weights of all products into the order in which the native library reads them, as `GPT.pack`.

        Raises ValueError where a weight cannot be packed: off the CPU, in fp64, without the native library.
        """
        reason = self.reason_against_packing(int8)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(int8)

    def reason_against_packing(self, int8: bool = False) -> str | None:
        """Why `pack` would refuse, or None."""
        weights = [module.weight for module in self.modules() if isinstance(module, Linear)]
        reasons = (PackedWeight.reason_against(weight, int8) for weight in weights)
        return next((reason for reason in reasons if reason is not None), None)

    def num_parameters(self) -> int:
        """How many numbers are learned. A packed weight counts as before."""
        packed = [m.packed for m in self.modules() if isinstance(m, Linear) and m.packed is not None]
        return sum(p.numel() for p in self.parameters()) + sum(w.inputs * w.outputs for w in packed)


def is_encoder(folder: Path) -> bool:
    """Whether a folder's config.json is that of an encoder that `load_encoder` reads."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in ENCODERS


def load_encoder(folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a folder in Hugging Face's format, in evaluation mode: BERT, RoBERTa, XLM-RoBERTa.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index. Poolers and heads are not read.
        dtype: of the weights; None for that of the config.
        device: where the weights go.

    Raises:
        ValueError: for another kind of model, an option that changes the result, and a missing or misshapen tensor.
        OSError: where a file cannot be read.
    """
    folder = as_path("folder", folder)
    where = folder / "config.json"
    raw = read_json(where)
    config = read_encoder_config(raw, str(where))
    with ExitStack() as stack:
        stored = FolderTensors(folder, stack)
        names = stored.names()
        prefix = ENCODERS[raw["model_type"]]
        prefix = prefix if f"{prefix}embeddings.word_embeddings.weight" in names else ""
        if config.layers > len(names):
            raise ValueError(
                f"{folder}: the weights do not fit {where.name}: fewer tensors than {config.layers} layers"
            )
        sources = list(_sources(config, prefix))
        ours = (f"{prefix}embeddings.", f"{prefix}encoder.")
        ignored = {x for x in names if not x.startswith(ours)} | {f"{prefix}embeddings.position_ids"}
        check_tensors(where, stored, sources, ignored)
        with torch.device("meta"):
            model = Encoder(config)
        wanted = dtype or read_dtype(raw)
        fill(model, stored, sources, lambda name: wanted, device)
    return model.eval()


def read_encoder_config(raw: Raw, where: str = "config.json") -> EncoderConfig:
    """The configuration of an encoder, from what config.json says.

    Raises ValueError for another kind of model, a missing or malformed entry, or an option that changes the result.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise ValueError(f"{where}: got model_type {kind!r}, want one of {', '.join(ENCODERS)}")
    fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for key, want in fixed.items():
        if raw.get(key, want) != want:
            raise ValueError(f"{where}: got {key} = {raw[key]!r}, want {want!r}")
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{where}: quantized weights are not supported, want fp32, bf16 or fp16")
    try:
        return EncoderConfig(
            raw["vocab_size"],
            raw["hidden_size"],
            raw["num_hidden_layers"],
            raw["num_attention_heads"],
            raw["intermediate_size"],
            raw["max_position_embeddings"],
            0 if kind == "bert" else raw.get("pad_token_id", 1) + 1,
            raw.get("type_vocab_size", 2),
            float(raw.get("layer_norm_eps", 1e-12)),
        )
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing") from None
    except TypeError as error:
        raise ValueError(f"{where}: an entry has a wrong type ({error})") from None


def _sources(c: EncoderConfig, prefix: str) -> list[Source]:
    """The tensors of a checkpoint, parameter by parameter."""
    rows = {"tokens": ("word", c.vocab_size), "positions": ("position", c.positions), "types": ("token_type", c.types)}
    found = [
        Source(f"{ours}.weight", (f"{prefix}embeddings.{theirs}_embeddings.weight",), ((count, c.dim),))
        for ours, (theirs, count) in rows.items()
    ]
    layers: list[tuple[str, list[str], tuple[int, ...]]] = [("norm", [f"{prefix}embeddings.LayerNorm"], (c.dim,))]
    for n in range(c.layers):
        ours, theirs = f"blocks.{n}.", f"{prefix}encoder.layer.{n}."
        self_attention = [f"{theirs}attention.self.{part}" for part in ("query", "key", "value")]
        layers += [
            (f"{ours}qkv", self_attention, (c.dim, c.dim)),
            (f"{ours}out", [f"{theirs}attention.output.dense"], (c.dim, c.dim)),
            (f"{ours}attention_norm", [f"{theirs}attention.output.LayerNorm"], (c.dim,)),
            (f"{ours}up", [f"{theirs}intermediate.dense"], (c.hidden, c.dim)),
            (f"{ours}down", [f"{theirs}output.dense"], (c.dim, c.hidden)),
            (f"{ours}norm", [f"{theirs}output.LayerNorm"], (c.dim,)),
        ]
    for ours, parts, shape in layers:
        for end, size in (("weight", shape), ("bias", shape[:1])):
            found.append(Source(f"{ours}.{end}", tuple(f"{part}.{end}" for part in parts), (size,) * len(parts)))
    return found
