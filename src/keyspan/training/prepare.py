"""`keyspan prepare`: text files, JSON lines and Parquet files to token shards that training maps into memory.

    OUT/index.json          what the shards hold, their sizes and checksums; written last
    OUT/tokenizer.json      unless tokens are bytes
    OUT/train-00000.bin     tokens, little-endian uint16 or uint32, document after document, each with an end token
    OUT/train-00000.ends    uint64, where each document ends
    OUT/held-out-00000.*    the same for the documents that training must not see
    OUT/progress.json       while it runs: how far the input has been read

Inputs are streamed. A run that is killed goes on where the last shard ended, and ends with the same bytes: it reads the
input again, but tokenizes only what is not stored.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from keyspan.files import locked, read_json, sha256_of, write_file

BLOCK = 1024
"""Most documents that are tokenized together, in parallel; a shard ends between blocks."""
BLOCK_CHARACTERS = 2**25
"""A block ends with the document that reaches so many characters."""
PIECE = 2**24
"""A plain text file is cut into documents at the first end of a line behind so many characters, at the latest behind
twice as many."""
NAMED = 20
"""Bad records that index.json names."""
SIDES = ("train", "held-out")


@dataclass
class Prepare:
    """Turn text into token shards for `keyspan train --data`."""

    inputs: tuple[Path, ...]
    """Files or folders: .jsonl (.gz, .zst), .parquet, and any other as plain text, a document each."""
    out: Path = Path("data")
    """Folder for the shards."""
    tokenizer: str = "bytes"
    """bytes; train:VOCAB for a byte-level BPE of so many tokens, trained on the input; or a tokenizer.json."""
    text_key: str = "text"
    """Field or column that holds the text, in JSON lines and Parquet."""
    held_out: float = 0.01
    """Share of the documents that is kept from training, chosen by a hash of their text."""
    deduplicate: bool = True
    """Keep one of identical documents."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do with a record that cannot be read; either way it is named."""
    shard_tokens: int = 2**25
    """Tokens of a shard, about."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs: got none, want at least one file or folder")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, want a share in [0, 1)")
        if self.on_error not in ("skip", "stop"):
            raise ValueError(f"on_error: got {self.on_error!r}, want skip or stop")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens: got {self.shard_tokens}, want at least 1")


@dataclass
class Counts:
    """What became of the input."""

    documents: int = 0
    """Stored ones."""
    duplicates: int = 0
    empty: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)
    """The first bad records: file, place, what is wrong."""


class Bad(NamedTuple):
    """A record that cannot be read."""

    place: str
    wrong: str


Record: TypeAlias = "str | Bad"


def _ignore(*_: Any) -> None:
    pass


def prepare(
    options: Prepare, report: Callable[[str], None] = _ignore, read: Callable[[int, int], None] = _ignore
) -> Path:
    """Do it; returns the folder. What is finished already is left as it is.

    Args:
        report: gets a line of text where something is begun or stored.
        read: gets how many bytes of the input have been read, and how many there are, ten times a second; they are
            counted from 0 again where the tokenizer is trained on the input first.

    Raises:
        ValueError: for inputs that are not there or of an unknown form, for another input or options than those of an
            unfinished run in the same folder, for a folder that another process prepares, for inputs without a
            document, and for a bad record where they are to stop it.
    """
    out, files = options.out, _files(options.inputs)
    plan = _plan(options, files)
    index = out / "index.json"
    if index.is_file():
        if read_json(index).get("plan") != plan:
            raise ValueError(
                f"out: {out} holds other data, or the same under other options; want another folder, or remove it"
            )
        return out
    if options.tokenizer != "bytes":
        import_module("tokenizers")  # better missed now than when the folder is there
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "prepares data in this folder"):
        return _prepare(options, _Input(files, options.text_key, read), plan, report)


def _prepare(options: Prepare, source: _Input, plan: dict[str, Any], report: Callable[[str], None]) -> Path:
    out = options.out
    index = out / "index.json"
    state: dict[str, Any] = {"plan": plan, "records": 0, "shards": [], "counts": asdict(Counts())}
    progress, kept = out / "progress.json", out / "tokenizer.json"
    if progress.is_file():
        state = read_json(progress)
        if state.get("plan") != plan:
            raise ValueError(
                f"out: {out} holds an unfinished run over other data or options; want another folder, or remove it"
            )
        report(f"going on behind record {state['records']}")
    else:
        given = Path(options.tokenizer)
        if not (kept.is_file() and given.is_file() and kept.samefile(given)):
            kept.unlink(missing_ok=True)  # left by a run of another plan
    encode = _tokenizer(options, source, report)
    write_file(progress, json.dumps(state).encode())  # from here on the tokenizer is known to be this plan's
    counts = Counts(**state["counts"])
    writer = _Writer(out, encode.dtype, state["shards"])
    seen: set[bytes] = set()
    records = iter(source)
    for record in islice(records, state["records"]):  # stored already; their digests tell duplicates
        if isinstance(record, str) and options.deduplicate:
            seen.add(_digest(record))
    done = state["records"]
    for block in _blocks(records):
        taken = [(record, _take(record, seen, counts, options)) for record in block]
        texts = [record for record, side in taken if isinstance(record, str) and side is not None]
        sides = [side for _, side in taken if side is not None]
        for text, side, tokens in zip(texts, sides, encode(texts), strict=True):
            writer.add(side, tokens, len(text.encode()))
        done += len(block)
        if writer.size >= options.shard_tokens:
            writer.flush()
            state |= {"records": done, "shards": writer.shards, "counts": asdict(counts)}
            write_file(progress, json.dumps(state).encode())
            report(f"{counts.documents} documents, {sum(x['tokens'] for x in writer.shards)} tokens")
    if not counts.documents:
        such = f", such as {counts.named[0]}" if counts.named else ""
        raise ValueError(f"inputs: got no text, but {counts.empty} empty and {counts.bad} bad records{such}")
    writer.flush()
    found = {
        "format": 1, "plan": plan, "tokenizer": encode.name, "vocab_size": encode.vocab_size, "end": encode.end,
        "dtype": encode.dtype.name, "shards": writer.shards, "counts": asdict(counts),
    }  # fmt: skip
    write_file(index, f"{json.dumps(found, indent=1)}\n".encode())
    progress.unlink(missing_ok=True)
    return out


def verify(folder: Path) -> None:
    """Compare every shard of a prepared folder with its checksum. Raises ValueError for one that is not there or was
    altered."""
    for shard in read_json(folder / "index.json")["shards"]:
        for suffix, want in shard["sha256"].items():
            path = folder / f"{shard['stem']}.{suffix}"
            if not path.is_file():
                raise ValueError(f"{path} is not there; prepare the data again")
            if sha256_of(path) != want:
                raise ValueError(f"{path}: its checksum is not that of index.json; prepare the data again")


def _take(record: Record, seen: set[bytes], counts: Counts, options: Prepare) -> str | None:
    """The side that a record goes to; None where it is left out."""
    if isinstance(record, Bad):
        place, wrong = record
        if options.on_error == "stop":
            raise ValueError(f"{place}: {wrong}")
        counts.bad += 1
        if len(counts.named) < NAMED:
            counts.named.append(f"{place}: {wrong}")
        return None
    if not record:
        counts.empty += 1
        return None
    digest = _digest(record)
    if options.deduplicate:
        if digest in seen:
            counts.duplicates += 1
            return None
        seen.add(digest)
    counts.documents += 1
    return SIDES[int.from_bytes(digest[:8], "big") < options.held_out * 2**64]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _plan(options: Prepare, files: Sequence[Path]) -> dict[str, Any]:
    """What the result is a function of, apart from what the files hold."""
    rest = {k: v for k, v in asdict(options).items() if k not in ("inputs", "out", "on_error")}
    return {**rest, "files": [[path.name, path.stat().st_size] for path in files]}


# Input


def _files(inputs: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = (x for x in path.rglob("*") if x.is_file())
            visible = (x for x in inside if not any(part.startswith(".") for part in x.relative_to(path).parts))
            found += sorted(visible)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"inputs: {path} is not there")
    if not found:
        raise ValueError(f"inputs: got {', '.join(map(str, inputs))}, which hold no file")
    return found


class _Input:
    """The records of the files, in order; tells how much has been read."""

    def __init__(self, files: Sequence[Path], key: str, read: Callable[[int, int], None]) -> None:
        self._files, self._key, self._read = files, key, read
        self._sizes = [path.stat().st_size for path in files]

    def __iter__(self) -> Iterator[Record]:
        last, total = 0.0, sum(self._sizes)
        for number, path in enumerate(self._files):
            try:
                file = path.open("rb")
            except OSError as error:
                yield Bad(str(path), str(error))
                continue
            with file:
                for record in _read_file(path, file, self._key):
                    if time.monotonic() > last + 0.1:
                        last = time.monotonic()
                        self._read(sum(self._sizes[:number]) + file.tell(), total)
                    yield record
        self._read(total, total)


def _read_file(path: Path, file: IO[bytes], key: str) -> Iterator[Record]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _json_lines(path, file, key)
    return _parquet(path, file, key) if name.endswith(".parquet") else _plain(path, file)


def _blocks(records: Iterable[Record]) -> Iterator[list[Record]]:
    block: list[Record] = []
    size = 0
    for record in records:
        block.append(record)
        size += len(record) if isinstance(record, str) else 0
        if len(block) == BLOCK or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _unpacked(path: Path, file: IO[bytes]) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    if path.suffix.lower() == ".zst":
        unpacking = import_module("zstandard").ZstdDecompressor()
        return io.BufferedReader(unpacking.stream_reader(file, read_across_frames=True, closefd=False))
    return file


_SURROGATE = re.compile("[\ud800-\udfff]")


def _json_lines(path: Path, file: IO[bytes], key: str) -> Iterator[Record]:
    number = 0
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.suffix.lower() == ".zst":
        damage += (import_module("zstandard").ZstdError,)
    try:
        for number, line in enumerate(_unpacked(path, file), 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Bad(place, f"no JSON ({error})")
                continue
            text = value.get(key) if isinstance(value, dict) else None
            if not isinstance(text, str):
                yield Bad(place, f"holds no text under {key!r}")
            elif _SURROGATE.search(text):
                yield Bad(place, "holds half a surrogate pair, which is no character")
            else:
                yield text
    except damage as error:
        yield Bad(f"{path}, behind line {number}", str(error))


def _parquet(path: Path, opened: IO[bytes], key: str) -> Iterator[Record]:
    parquet: Any = import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(opened)
        if key not in file.schema_arrow.names:
            yield Bad(str(path), f"has no column {key!r}, but {', '.join(file.schema_arrow.names)}")
            return
        row = 0
        for batch in file.iter_batches(batch_size=BLOCK, columns=[key]):
            for value in batch.column(0).to_pylist():
                yield value if isinstance(value, str) else Bad(f"{path}, row {row}", f"holds no text under {key!r}")
                row += 1
    except (OSError, import_module("pyarrow").ArrowException) as error:
        yield Bad(str(path), str(error))


def _plain(path: Path, file: IO[bytes]) -> Iterator[Record]:
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as lines:
        try:
            while text := lines.read(PIECE):
                yield text + (lines.readline(PIECE) if len(text) == PIECE else "")
        except UnicodeDecodeError as error:
            yield Bad(str(path), f"is not UTF-8 text ({error})")


# Tokens


@dataclass
class _Encoder:
    """Texts to tokens, many at once."""

    name: str
    vocab_size: int
    end: int
    batch: Callable[[list[str]], list[Any]]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def __call__(self, texts: list[str]) -> list[NDArray[Any]]:
        return [np.append(np.asarray(tokens, self.dtype), self.dtype.type(self.end)) for tokens in self.batch(texts)]


def _bytes(texts: list[str]) -> list[Any]:
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def _tokenizer(options: Prepare, source: Iterable[Record], report: Callable[[str], None]) -> _Encoder:
    if options.tokenizer == "bytes":
        return _Encoder("bytes", 257, 256, _bytes)
    from tokenizers import Tokenizer

    kept = options.out / "tokenizer.json"
    if not kept.is_file():
        kind, _, size = options.tokenizer.partition(":")
        if kind == "train":
            if not size.isdigit() or not 258 <= int(size) < 2**31:
                raise ValueError(f"tokenizer: got {options.tokenizer!r}, want train:VOCAB, at least 258 tokens")
            report("training the tokenizer on the input")
            made = _train_tokenizer(int(size), (x for x in source if isinstance(x, str)))
        else:
            path = Path(options.tokenizer)
            if not path.is_file():
                raise ValueError(f"tokenizer: got {options.tokenizer!r}, want bytes, train:VOCAB or a tokenizer.json")
            made = _read_tokenizer(path)
        write_file(kept, made.to_str().encode())
    tokenizer: Any = Tokenizer.from_file(str(kept))
    end = end_token(tokenizer)
    if end is None:
        raise ValueError(f"tokenizer: {options.tokenizer} has none of the tokens {', '.join(END_TOKENS)}")

    def batch(texts: list[str]) -> list[Any]:
        return [x.ids for x in tokenizer.encode_batch(texts, add_special_tokens=False)]

    # Numbers of tokens may have gaps.
    return _Encoder(kept.name, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, end, batch)


END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Names that tokenizers give the token behind a document, by preference."""


def end_token(tokenizer: Any) -> int | None:
    """The token that closes a document."""
    found = (tokenizer.token_to_id(name) for name in END_TOKENS)
    return next((token for token in found if token is not None), None)


def _read_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"tokenizer: {path}: {error}") from None


def _train_tokenizer(size: int, texts: Iterable[str]) -> Any:
    """A byte-level BPE (Sennrich et al., 2016; Radford et al., 2019)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_TOKENS[0]], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# Output


class _Writer:
    """Collects documents, and writes them as shards."""

    def __init__(self, out: Path, dtype: np.dtype[Any], shards: list[dict[str, Any]]) -> None:
        self.shards, self._out, self._dtype = list(shards), out, dtype
        self.size = 0
        self._documents: dict[str, list[NDArray[Any]]] = {side: [] for side in SIDES}
        self._bytes = dict.fromkeys(SIDES, 0)

    def add(self, side: str, tokens: NDArray[Any], length: int) -> None:
        """Take a document of so many bytes of text."""
        self._documents[side].append(tokens)
        self._bytes[side] += length
        self.size += len(tokens)

    def flush(self) -> None:
        """Write what has been taken, a shard for each side that has some."""
        for side, documents in self._documents.items():
            if not documents:
                continue
            number = sum(shard["side"] == side for shard in self.shards)
            tokens = np.concatenate(documents).astype(self._dtype)
            ends = np.cumsum([len(x) for x in documents], dtype="<u8")
            stem, sums = f"{side}-{number:05d}", {}
            for suffix, data in (("bin", tokens.tobytes()), ("ends", ends.tobytes())):
                write_file(self._out / f"{stem}.{suffix}", data)
                sums[suffix] = hashlib.sha256(data).hexdigest()
            self.shards.append(
                {"side": side, "stem": stem, "documents": len(documents), "tokens": len(tokens),
                 "bytes": self._bytes[side], "sha256": sums}
            )  # fmt: skip
            self._documents[side], self._bytes[side] = [], 0
        self.size = 0
