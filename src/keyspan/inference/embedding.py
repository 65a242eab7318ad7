"""Embeddings of texts: an encoder on packed texts, without padding, and what sentence-transformers does around it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from keyspan.core.checks import as_path, check_int, check_type, is_a
from keyspan.files import read_json
from keyspan.inference.program import EncoderProgram
from keyspan.inference.serve import DTYPES
from keyspan.info import find_device
from keyspan.models.encoder import Encoder, load_encoder

Pooling = Literal["mean", "cls", "max", "lasttoken"]
"""What a text's embedding is of its tokens' hidden states; cls is the first token's."""


class Embedder:
    """Texts or tokens to embeddings.

    Args:
        model: an encoder in evaluation mode.
        tokenizer: of the `tokenizers` library; its truncation and padding are not used.
        pooling: mean, cls (the first token), max or lasttoken.
        normalize: whether embeddings have length 1.
        longest: most tokens of a text, its special tokens included; None for as many as the model has positions.
        prefix: put before every text.
        lower: whether texts are put in lower case first.
        step_tokens: most tokens of one forward pass, if they are of more than one text.

    The embedding of a text does not depend on what it is packed with.
    """

    def __init__(
        self,
        model: Encoder,
        tokenizer: Any,
        pooling: Pooling = "mean",
        normalize: bool = True,
        longest: int | None = None,
        *,
        prefix: str = "",
        lower: bool = False,
        step_tokens: int = 4096,
    ) -> None:
        check_type("model", model, Encoder)
        check_int("step_tokens", step_tokens)
        if longest is not None:
            check_int("longest", longest)
        if not hasattr(tokenizer, "num_special_tokens_to_add"):
            raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, want a tokenizers.Tokenizer")
        most = model.config.longest
        self.special_tokens = tokenizer.num_special_tokens_to_add(False)
        self.longest = most if longest is None else min(longest, most)
        if self.longest <= self.special_tokens:
            raise ValueError(f"longest: got {longest}, want more than the {self.special_tokens} special tokens")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling: got {pooling!r}, want one of {', '.join(get_args(Pooling))}")
        self.model, self.tokenizer, self.pooling, self.normalize = model.eval(), tokenizer, pooling, normalize
        self.prefix, self.lower, self.step_tokens = prefix, lower, step_tokens
        self._program: EncoderProgram | None = None
        self._lock = threading.Lock()
        """For the program, whose results the next call overwrites."""
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self.model.config.dim

    def tokenize(self, texts: Sequence[str], truncate: int | None = None) -> list[list[int]]:
        """Tokens of texts with their special tokens.

        Args:
            texts: any.
            truncate: most tokens of a text: longer ones lose their end. None: a text longer than `longest` is an error.

        Raises ValueError for a text that is too long, or a `truncate` that is out of range.
        """
        self.check_truncation(truncate)
        check_type("texts", texts, list, tuple)
        for n, text in enumerate(texts):
            check_type(f"texts[{n}]", text, str)
        texts = [self.prefix + (text.lower() if self.lower else text) for text in texts]
        found = []
        for n, encoding in enumerate(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
            if truncate is not None:
                encoding.truncate(truncate - self.special_tokens)
            elif len(encoding) + self.special_tokens > self.longest:
                length = len(encoding) + self.special_tokens
                raise ValueError(f"input: text {n} has {length} tokens, want at most {self.longest}")
            found.append(self.tokenizer.post_process(encoding).ids)
        return found

    def check_truncation(self, truncate: int | None) -> None:
        """Raise ValueError for a number of tokens that leaves nothing of a text, or is more than the model reads."""
        if truncate is not None and not self.special_tokens < truncate <= self.longest:
            raise ValueError(
                f"truncate: got {truncate}, want {self.special_tokens + 1} … {self.longest}, special tokens included"
            )

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise ValueError for more dimensions than the model has, or none."""
        if dimensions is not None and not (is_a(dimensions, int) and 1 <= dimensions <= self.dim):
            raise ValueError(f"dimensions: got {dimensions}, want 1 … {self.dim}")

    def check(self, sequences: Sequence[Sequence[int]]) -> None:
        """Raise ValueError unless these are tokens of texts that the model can read."""
        C = self.model.config.vocab_size
        for n, tokens in enumerate(sequences):
            if not 1 <= len(tokens) <= self.longest:
                raise ValueError(f"input: text {n} has {len(tokens)} tokens, want 1 … {self.longest}")
            if not 0 <= min(tokens) <= max(tokens) < C:
                raise ValueError(f"input: text {n} has tokens {min(tokens)} … {max(tokens)}, want 0 … {C - 1}")

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings, fp32 [sequences, dim] on the CPU, of tokens, in their order.

        Raises ValueError for a sequence that is empty, too long or has tokens that are none.
        """
        self.check(sequences)
        parts = [self._pooled(part) for part in packs(sequences, self.step_tokens)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def encode(self, texts: Sequence[str], dimensions: int | None = None) -> Tensor:
        """Embeddings, fp32 [texts, dimensions or dim], of texts, in their order; long texts lose their end.

        Raises ValueError for dimensions that the model does not have.
        """
        return self.cut(self.embed(self.tokenize(texts, self.longest)), dimensions)

    def cut(self, embeddings: Tensor, dimensions: int | None) -> Tensor:
        """The first numbers of embeddings, brought to length 1 again where embeddings have it; None: all."""
        self.check_dimensions(dimensions)
        if dimensions is None:
            return embeddings
        first = embeddings[:, :dimensions]
        return F.normalize(first, dim=-1) if self.normalize else first

    @torch.inference_mode()
    def _pooled(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(tokens) for tokens in sequences]
        tokens = [token for part in sequences for token in part]
        if EncoderProgram.reason_against(self.model) is not None:
            device = self.model.tokens.weight.device
            pooled = self._pool(self.model(torch.tensor(tokens, device=device), lengths), lengths)
            return self._finished(pooled)
        with self._lock:
            if self._program is None or self._program.tokens < len(tokens):
                self._program = EncoderProgram(self.model, max(len(tokens), self.step_tokens))
            if self.pooling == "mean":
                return self._finished(self._program.means(tokens, lengths).clone())
            return self._finished(self._pool(self._program.hidden(tokens, lengths), lengths))

    def _pool(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        sizes = torch.tensor(lengths, device=hidden.device)
        if self.pooling in ("mean", "max"):
            return torch.segment_reduce(hidden.float(), self.pooling, lengths=sizes)
        ends = sizes.cumsum(0)
        return hidden[ends - sizes if self.pooling == "cls" else ends - 1].float()

    def _finished(self, pooled: Tensor) -> Tensor:
        return (F.normalize(pooled, dim=-1) if self.normalize else pooled).cpu()


def packs(sequences: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Sequences in their order, as many at a time as have at most so many tokens, at least one."""
    part: list[Sequence[int]] = []
    total = 0
    for tokens in sequences:
        if part and total + len(tokens) > most:
            yield part
            part, total = [], 0
        part.append(tokens)
        total += len(tokens)
    if part:
        yield part


def load_embedder(
    folder: Path | str,
    dtype: str | None = None,
    device: str = "auto",
    weights: str | None = None,
    longest: int | None = None,
) -> Embedder:
    """The encoder of a folder with what sentence-transformers' files in it say; on a CPU its weights are packed.

    modules.json names the pooling and whether embeddings are normalized; without it they are means, not normalized.
    sentence_bert_config.json says how long a text may be, config_sentence_transformers.json what is put before it.

    Args:
        folder: in Hugging Face's format, with a tokenizer.json; as `keyspan.models.load_encoder`.
        dtype: fp32, bf16 or fp16; None for that of the config.
        device: auto, or a torch device.
        weights: int8 rounds them to 8 bits, as `GPT.pack`; None keeps them in `dtype`.
        longest: most tokens of a text, in place of what sentence_bert_config.json says.

    Raises ValueError for a `longest` beyond the model's positions, a folder whose modules or pooling are not supported,
    and as `load_encoder`.
    """
    from tokenizers import Tokenizer

    folder = as_path("folder", folder)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, want one of {', '.join(DTYPES)}")
    if weights not in (None, "int8"):
        raise ValueError(f"weights: got {weights!r}, want int8")
    model = load_encoder(folder, None if dtype is None else DTYPES[dtype], find_device(device))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: holds no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"{path}: {error}") from None
    pooling, normalize = _modules(folder)
    reading = read_json(folder / name) if (folder / (name := "sentence_bert_config.json")).is_file() else {}
    about = read_json(folder / name) if (folder / (name := "config_sentence_transformers.json")).is_file() else {}
    prefix = (about.get("prompts") or {}).get(about.get("default_prompt_name"), "")
    if weights == "int8" or model.reason_against_packing() is None:
        model.pack(int8=weights == "int8")
    if longest is not None and longest > model.config.longest:
        raise ValueError(
            f"longest: got {longest}, want at most {model.config.longest}: the model has no more positions"
        )
    longest, lower = longest or reading.get("max_seq_length"), bool(reading.get("do_lower_case"))
    return Embedder(model, tokenizer, pooling, normalize, longest, prefix=prefix, lower=lower)


def _modules(folder: Path) -> tuple[Pooling, bool]:
    """Pooling, and whether embeddings are normalized, by sentence-transformers' files."""
    path = folder / "modules.json"
    if not path.is_file():
        return "mean", False
    modules = _read_list(path)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{path}: got modules {', '.join(kinds)}, want Transformer, Pooling and, or not, Normalize")
    where = folder / str(modules[1].get("path")) / "config.json"
    raw = read_json(where)
    names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
    modes = raw.get("pooling_mode")
    if modes is None:
        on = [
            key.removeprefix("pooling_mode_") for key, value in raw.items() if key.startswith("pooling_mode_") and value
        ]
        modes = [names.get(mode, mode) for mode in on] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in get_args(Pooling):
        raise ValueError(f"{where}: got pooling {modes}, want one of {', '.join(get_args(Pooling))}")
    return modes[0], kinds[-1] == "Normalize"


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; want JSON") from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: got {found!s:.100}, want a list of modules")
    return found
