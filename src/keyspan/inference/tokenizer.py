"""Text and tokens: Hugging Face's and GGUF's tokenizers, bytes, and the text of an answer while it grows."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from keyspan.core.checks import as_path, check_type
from keyspan.files import read_json, write_file
from keyspan.models.gguf import GgufFile


class Tokenizer(Protocol):
    """What an engine asks of a tokenizer."""

    end_tokens: tuple[int, ...]
    """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; a character that is not complete is U+FFFD."""


class ByteTokenizer:
    """Each byte of the text in UTF-8 is a token.

    Args:
        end_tokens: tokens that end an answer, beyond the 256 bytes.
    """

    def __init__(self, end_tokens: tuple[int, ...] = ()) -> None:
        self.end_tokens = end_tokens

    def encode(self, text: str) -> list[int]:
        check_type("text", text, str)
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        try:
            return bytes(token for token in tokens if token < 256).decode(errors="replace")
        except (TypeError, ValueError):
            raise ValueError(f"tokens: got {tokens!r}, want a sequence of int ≥ 0") from None


class ChatTokenizer:
    """A tokenizer of the `tokenizers` library with special tokens, end tokens and a chat template.

    Args:
        loaded: the library's `Tokenizer`.
        special: the texts of special tokens by their names (`bos_token`, …), which a template may use.
        end_tokens: tokens that end an answer.
        chat_template: in jinja's language, or None.
    """

    def __init__(
        self, loaded: Any, special: dict[str, str], end_tokens: tuple[int, ...], chat_template: str | None
    ) -> None:
        self._loaded, self.special, self.end_tokens, self.chat_template = loaded, special, end_tokens, chat_template

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with what the tokenizer puts around it (a first token, where the model has one)."""
        found: list[int] = self._loaded.encode(text).ids
        return found

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of a chat, up to where the assistant speaks; see `render`.

        What looks like a special token inside a message is tokenized as the text that it is: a message cannot end
        itself or speak for another role.
        """
        special = self._literal.special
        everything = "".join(str(value) for message in messages for value in message.values())
        # Unicode's noncharacters, reserved for such marks; a message that holds some is marked with others.
        marks = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in everything]
        if len(marks) < 2:
            raise ValueError(f"messages: got {32 - len(marks)} of Unicode's noncharacters U+FDD0 …, want at most 30")
        start, end = marks[:2]

        def mark(content: Any) -> Any:
            if not isinstance(content, str) or special is None:
                return content
            return special.sub(lambda found: f"{start}{found[0]}{end}", content)

        text = self.render([{**message, "content": mark(message.get("content"))} for message in messages])
        tokens: list[int] = []
        for n, part in enumerate(re.split(f"{start}(.*?){end}", text, flags=re.DOTALL)):
            loaded = self._literal.loaded if n % 2 else self._loaded
            tokens += loaded.encode(part, add_special_tokens=False).ids
        return tokens

    @functools.cached_property
    def _literal(self) -> _Literal:
        return _Literal(self._loaded)

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._loaded.decode(list(tokens), skip_special_tokens=True)
        return text

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a chat, up to where the assistant speaks. The template runs in jinja's sandbox, with what
        `transformers` adds to jinja: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `break`.

        Raises ValueError where the model has no template, or the template refuses the messages.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ValueError("messages: the model has no chat template; use completions with a prompt")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def to_json(
            value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False,
        ) -> str:  # fmt: skip
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = to_json
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=True, **self.special
            )
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from None
        except Exception as error:  # a template's expressions raise what Python's do
            raise ValueError(f"messages: the chat template fails: {type(error).__name__}: {error}") from None


class _Literal:
    """A copy of a tokenizer that knows no special tokens in a text, and what finds their texts (None: it has none)."""

    def __init__(self, loaded: Any) -> None:
        texts = [token.content for token in loaded.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile(any_of(texts)) if texts else None
        self.loaded = type(loaded).from_str(loaded.to_str())
        self.loaded.encode_special_tokens = True


def any_of(texts: Sequence[str]) -> str:
    """A regular expression for the longest of some texts that begins at a place.

    It is a tree of their beginnings: one that tried each of them at each `<` of a long message would take seconds.
    """
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False))
    start = "".join(c for c, _ in same)  # what the first and the last in order share, all share
    rest = {text[len(start) :] for text in texts}
    ways = [any_of([text for text in rest if text[:1] == c]) for c in sorted({text[0] for text in rest if text})]
    if not ways:
        return re.escape(start)
    return f"{re.escape(start)}(?:{'|'.join(ways)}){'?' if '' in rest else ''}"


class FolderTokenizer(ChatTokenizer):
    """The tokenizer of a model's folder: tokenizer.json, its end tokens and its chat template.

    End tokens are those of generation_config.json and config.json, and the one of tokenizer_config.json.

    Raises ValueError where the folder has no tokenizer.json, or one that cannot be read.
    """

    def __init__(self, folder: Path | str) -> None:
        from tokenizers import Tokenizer as Loaded

        folder = as_path("folder", folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: holds no tokenizer.json")
        try:
            loaded: Any = Loaded.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{path}: {error}") from None
        loaded.no_truncation()  # as the folder may say for another use
        loaded.no_padding()
        settings = _optional(folder / "tokenizer_config.json")
        names = {name: value for name, value in settings.items() if name.endswith("_token")}
        names = {name: value["content"] if isinstance(value, dict) else value for name, value in names.items()}
        special = {name: value for name, value in names.items() if isinstance(value, str)}
        ends = {loaded.token_to_id(special["eos_token"])} if "eos_token" in special else set()
        for file in ("generation_config.json", "config.json"):
            found = _optional(folder / file).get("eos_token_id")
            ends |= set(found if isinstance(found, list) else [found])
        template = folder / "chat_template.jinja"
        given = settings.get("chat_template")
        if isinstance(given, list):  # several by name
            given = next((x.get("template") for x in given if isinstance(x, dict) and x.get("name") == "default"), None)
        if template.is_file():
            given = template.read_text(encoding="utf-8")
        ends.discard(None)
        super().__init__(loaded, special, tuple(sorted(ends)), given if isinstance(given, str) else None)


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _CONTRACTIONS + _WORDS % r"\p{N}{1,3}",
    "qwen2": _CONTRACTIONS + _WORDS % r"\p{N}",
}
"""How a text is cut before merges, by `tokenizer.ggml.pre`; None: GPT-2's own expression."""


class GgufTokenizer(ChatTokenizer):
    """The tokenizer in a GGUF file: byte-level BPE as of GPT-2, SmolLM, Llama 3 and Qwen 2 and 3.

    Raises ValueError for another kind; then a folder with a tokenizer.json is needed.
    """

    def __init__(self, path: Path | str) -> None:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
        from tokenizers import Tokenizer as Loaded

        file = GgufFile(as_path("path", path))

        def entry(key: str, default: Any = None) -> Any:
            return file.entry(f"tokenizer.ggml.{key}", default)

        kind, cut = entry("model"), entry("pre", "gpt-2")
        if kind != "gpt2" or cut not in _SPLITS:
            raise ValueError(
                f"{path}: got a tokenizer of the kind {kind!r}, {cut!r}, want 'gpt2' with one of {', '.join(_SPLITS)}; "
                "use a folder with a tokenizer.json"
            )
        texts, kinds = list(entry("tokens")), list(entry("token_type", []))
        merges = [tuple(merge.split(" ", 1)) for merge in entry("merges", [])]
        loaded: Any = Loaded(models.BPE(vocab={text: n for n, text in enumerate(texts)}, merges=merges))
        expression = _SPLITS[cut]
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
        steps: list[Any] = [bytes_of]
        if cut == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        elif expression is not None:
            steps.insert(0, pre_tokenizers.Split(Regex(expression), "isolated"))
        loaded.pre_tokenizer = pre_tokenizers.Sequence(steps)
        loaded.decoder = decoders.ByteLevel()
        control, own = 3, 4  # `TokenType` of llama.cpp
        for text, token_type in zip(texts, kinds, strict=False):
            if token_type in (control, own):
                loaded.add_tokens([AddedToken(text, special=token_type == control, normalized=False)])
        special = {
            f"{name}_token": texts[entry(f"{key}_token_id")]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if entry(f"{key}_token_id") is not None
        }
        if entry("add_bos_token", cut == "llama-bpe") and "bos_token" in special:
            first = special["bos_token"]
            loaded.post_processor = processors.TemplateProcessing(
                single=f"{first}:0 $A:0", special_tokens=[(first, entry("bos_token_id"))]
            )
        ends = {entry("eos_token_id"), entry("eot_token_id")} - {None}
        super().__init__(loaded, special, tuple(sorted(ends)), file.entry("tokenizer.chat_template"))


def write_byte_tokenizer(folder: Path, start: int, ends: bool = False) -> None:
    """A tokenizer.json whose tokens are the bytes of the text, behind a first token `start`, written to a folder.

    Args:
        ends: whether that token ends an answer, too.
    """
    from tokenizers import Tokenizer as Loaded
    from tokenizers import decoders, models, pre_tokenizers, processors

    # The library writes each byte as a character: printable ones as themselves, the others as those from U+0100 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    vocab = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    made = Loaded(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<start>"])
    if made.token_to_id("<start>") != start:
        raise ValueError(f"start: got {start}, want {made.token_to_id('<start>')}, behind the bytes")
    made.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", start)])
    write_file(folder / "tokenizer.json", made.to_str().encode())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<start>"}
    settings |= {"eos_token": "<start>"} if ends else {}
    write_file(folder / "tokenizer_config.json", f"{json.dumps(settings)}\n".encode())


def write_text_tokenizer(folder: Path, prepared: Path, end: int) -> None:
    """The tokenizer.json of prepared data, written to a folder: it puts `end`, which stands before and behind every
    document of the training, before a text; answers end with it."""
    from tokenizers import Tokenizer as Loaded
    from tokenizers import processors

    made: Any = Loaded.from_file(str(prepared))
    name = made.id_to_token(end)
    made.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, end)])
    write_file(folder / "tokenizer.json", made.to_str().encode())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name, "eos_token": name}
    write_file(folder / "tokenizer_config.json", f"{json.dumps(settings)}\n".encode())


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


class Detokenizer:
    """The text of an answer, token by token: complete characters only, and nothing of a stop text.

    Args:
        tokenizer: decodes.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._start = 0
        """First token of the window that is decoded: a tokenizer may join a token with the one before it."""
        self._read = 0
        """Tokens whose text has been taken."""
        self._pending = ""
        """Text that may be the beginning of a stop text."""

    def add(self, token: int) -> tuple[str, bool]:
        """(the text that the answer grew by, whether a stop text has ended it)."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        text = self._tokenizer.decode(self._tokens[self._start :])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            self._start, self._read = self._read, len(self._tokens)
            self._pending += text[len(before) :]
        stopped = self._cut()
        kept = 0 if stopped else self._held_back()
        cut = len(self._pending) - kept
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text, stopped

    def finish(self) -> tuple[str, bool]:
        """(what is left when the answer ends: text held back for a stop text, and what an incomplete character held
        back; whether a stop text has ended it after all)."""
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        self._pending += self._tokenizer.decode(self._tokens[self._start :])[len(before) :]
        stopped = self._cut()
        text, self._pending = self._pending, ""
        return text, stopped

    def _held_back(self) -> int:
        """How many characters of the pending text may be the beginning of a stop text."""
        text = self._pending
        starts = ((stop, n) for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)))
        return max((n for stop, n in starts if text.endswith(stop[:n])), default=0)

    def _cut(self) -> bool:
        """End the pending text at the first stop text, and take no more; False where there is none."""
        found = [at for at in map(self._pending.find, self._stop) if at >= 0]
        if found:
            self._pending = self._pending[: min(found)]
            self._start = self._read = len(self._tokens)
        return bool(found)
