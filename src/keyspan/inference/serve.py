"""An engine for a model on disk: a Hugging Face folder, or a run of `keyspan train`; and the server's command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keyspan.inference.engine import Engine
from keyspan.inference.tokenizer import FolderTokenizer, GgufTokenizer, Tokenizer
from keyspan.info import find_device
from keyspan.models import load
from keyspan.models.gpt import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def find_cache_dtype(name: str | None) -> torch.dtype | None:
    """`cache_dtype` of an engine, by a name of CACHE_DTYPES or None. Raises ValueError for another name."""
    if name is not None and name not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype: got {name!r}, want one of {', '.join(CACHE_DTYPES)}")
    return None if name is None else CACHE_DTYPES[name]


class TaskTokenizer:
    """The alphabet of a training run's task.

    Attributes:
        temperature: at which to draw by default: answers of synthetic tasks are right or wrong, texts are not.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self.temperature = 0.8 if task.name == "stdlib" else 0.0
        self.end_tokens: tuple[int, ...] = () if task.stop is None else (task.stop,)

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._task.encode(text)
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._task.decode(tokens)
        return text


def load_model(
    path: Path, dtype: str | None = None, device: str = "auto", weights: str | None = None
) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a folder, for inference: on a CPU its weights are packed where they can be.

    Args:
        path: a folder in Hugging Face's format with a tokenizer.json, a .gguf file, or a run of `keyspan train`.
        dtype: fp32, bf16 or fp16; None for that of the folder's config.
        device: auto, or a torch device.
        weights: int8 rounds them to 8 bits, with a scale for each output (`GPT.pack`); None keeps them in `dtype`.

    Raises ValueError for a folder that is neither, for what `keyspan.models.load` refuses, and for int8 off the CPU.
    """
    if weights not in (None, "int8"):
        raise ValueError(f"weights: got {weights!r}, want int8")
    model, tokenizer = _load(path, dtype, device)
    if weights == "int8" or model.reason_against_packing() is None:
        model.pack(int8=weights == "int8")
    return model, tokenizer


def _load(path: Path, dtype: str | None, device: str) -> tuple[GPT, Tokenizer]:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, want one of {', '.join(DTYPES)}")
    is_gguf = path.suffix == ".gguf" and path.is_file()
    if not is_gguf and not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: holds no config.json; want a training run, a model in Hugging Face's format, or a .gguf file"
        )
    where = find_device(device)
    if is_gguf:
        return load(path, None if dtype is None else DTYPES[dtype], where), GgufTokenizer(path)
    if (path / "checkpoints").is_dir():
        from keyspan.training.loop import load_run

        _, task, model = load_run(path, str(where))
        return model if dtype is None else model.to(DTYPES[dtype]), TaskTokenizer(task)
    return load(path, None if dtype is None else DTYPES[dtype], where), FolderTokenizer(path)


@dataclass
class Serve:
    """Serve a model over HTTP with OpenAI's interface: a decoder, with a chat page at /, or an encoder's embeddings."""

    model: Path
    """A folder in Hugging Face's format, of an encoder too (BERT and its kin), a .gguf file, or a run of keyspan train.
    For encoders memory, page_size, running and draft mean nothing."""
    name: str | None = None
    """Of the model in requests. Default: the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine."""
    port: int = 8000
    """Port to listen on; 0 for one that is free."""
    dtype: str | None = None
    """fp32, bf16 or fp16. Default: as the folder says."""
    weights: str | None = None
    """int8: round the weights to 8 bits; answers are faster, and differ. Default: as dtype says."""
    cache_dtype: str | None = None
    """int8 or fp8: store keys and values in 8 bits, so that memory holds about twice as many tokens; answers differ.
    Default: as dtype says."""
    device: str = "auto"
    """auto (an accelerator where there is one, else the CPU), or a torch device."""
    invariant: bool = False
    """On a GPU, too, log-probabilities of an answer do not depend on what else is running; slower there. Not for
    encoders."""
    memory: float = 1.0
    """GiB for keys and values."""
    max_model_len: int | None = None
    """Most tokens of a prompt and its answer, or of a text to embed. Default: as many as the model was trained to read;
    a decoder reads more where this says so. Longer requests are answered 400."""
    page_size: int = 16
    """Tokens a page of the cache."""
    step_tokens: int = 512
    """Most tokens of one forward pass."""
    running: int = 64
    """Most requests that run together."""
    waiting: int = 1024
    """Most requests that wait; more are answered 429. Of an encoder: those that are worked on."""
    draft: int = 0
    """Most tokens guessed for each answer in a step, from what stood in the text before."""
    connections: int = 2048
    """Most connections; more are answered 503."""
    api_key_file: Path | None = None
    """A file with API keys, one a line, of which requests must bring one."""


def serve(options: Serve) -> None:
    """Load the model, then serve until SIGINT or SIGTERM; running answers end then."""
    import gc

    from keyspan.inference.http import Limits, Server, listen, make_config

    keys: tuple[str, ...] = ()
    if options.api_key_file is not None:
        keys = tuple(options.api_key_file.read_text(encoding="utf-8").split())
        if not keys:
            raise ValueError(f"api_key_file: {options.api_key_file} holds no key, want one a line")
    limits = Limits()
    sockets = listen(options.host, options.port)
    app = _app(options, f"http://{options.host}:{sockets[0].getsockname()[1]}", limits, keys)
    allow_files(options.connections + 100)
    gc.collect()
    gc.freeze()  # what is loaded stays: the collector would look through it again and again while bodies are parsed
    Server(make_config(app, limits, options.connections, log_level="warning")).run(sockets)


def _app(options: Serve, where: str, limits: Any, keys: tuple[str, ...]) -> Any:
    """The application for the model that the options name."""
    from keyspan.models.encoder import is_encoder

    name = options.name or options.model.resolve().name
    if is_encoder(options.model):
        from keyspan.inference.embedding import load_embedder
        from keyspan.inference.embedding_server import make_embedding_app

        if options.invariant:
            raise ValueError("invariant: got True for an encoder, want False: only decoders have it")
        embedder = load_embedder(
            options.model, options.dtype, options.device, options.weights, longest=options.max_model_len
        )
        embedder.step_tokens = options.step_tokens
        print(f"{name}: {embedder.model.num_parameters():,} parameters, embeddings of {embedder.dim}, {where}")
        return make_embedding_app(embedder, name, limits, keys, options.waiting)
    from keyspan.inference.server import make_app

    model, tokenizer = load_model(options.model, options.dtype, options.device, options.weights)
    model.invariant = options.invariant
    engine = Engine(
        model,
        tokenizer,
        memory=int(options.memory * 2**30),
        page_size=options.page_size,
        step_tokens=options.step_tokens,
        running=options.running,
        waiting=options.waiting,
        draft=options.draft,
        cache_dtype=find_cache_dtype(options.cache_dtype),
        max_model_len=options.max_model_len,
    )
    room = engine.cache.pages * options.page_size
    longest = f"{engine.max_model_len:,} in a request"
    print(f"{name}: {model.num_parameters():,} parameters, room for {room:,} tokens, {longest}, {where}")
    return make_app(engine, name, limits, keys)


def allow_files(count: int) -> None:
    """Let the process have so many open files, as far as the system allows: each connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
