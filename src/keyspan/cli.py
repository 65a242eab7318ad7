"""The command `keyspan`: dispatches each command to its function and turns every expected error into one line.

tyro turns a configuration or a function's parameters into options. It and the other parts of the extra `train` are
imported only by the commands that use them; `info` and `explain` need torch alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from keyspan import __version__
from keyspan.training.config import TaskName, TrainConfig, preset

if TYPE_CHECKING:
    from keyspan.training.loop import Result

EXTRAS = {
    "train": ("matplotlib", "numpy", "rich", "safetensors", "tyro"),
    "tensorboard": ("tensorboard",),
    "data": ("pyarrow", "zstandard"),
    "serve": ("fastapi", "jinja2", "prometheus_client", "tokenizers", "uvicorn"),
}
"""The packages that each extra brings, to name the extra where one is missing."""


def program() -> NoReturn:
    """The program `keyspan`: runs `main`, and ends the process with its status."""
    status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # DTensor's caches keep gloo's threads alive beyond the process group. One that still frees a tensor while
        # Python finalizes aborts the process (pytorch/pytorch#179291), and torchrun takes that for a failed rank.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` are those after the program's name. Returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    known = [command for command in COMMANDS if words[: len(command.split())] == command.split()]
    if words == ["--version"]:
        print(f"keyspan {__version__}")
        return 0
    if not known:
        group = words[0] if words[:1] == ["bench"] else ""
        asked_for_help = words[bool(group) :][:1] in (["-h"], ["--help"])
        print(_usage(group), file=sys.stdout if asked_for_help else sys.stderr)
        if words and not asked_for_help:
            _fail(f"command: got {' '.join(words[: 1 + bool(group)])!r}, want one of those above")
        return 0 if asked_for_help else 2
    run, _ = COMMANDS[known[0]]
    try:
        status = run(words[len(known[0].split()) :])
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        extra = next((extra for extra, packages in EXTRAS.items() if error.name in packages), None)
        if extra is None:
            raise
        extra = "data" if known[0] == "prepare" else extra  # it shares tokenizers with serve
        return _fail(f"{known[0]} needs {error.name}: pip install 'keyspan[{extra}]'")
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 128 + 13  # as a program that SIGPIPE ends
    except (ValueError, FloatingPointError, NotImplementedError, OSError, MemoryError) as error:
        return _fail(str(error) or "out of memory")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return _fail(f"out of memory: {error}")
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    print(f"keyspan: {message.splitlines()[0]}", file=sys.stderr)
    return 1


def _usage(group: str = "") -> str:
    """The commands that begin with `group`, with their lines of help."""
    width = max(map(len, COMMANDS))
    rows = [f"  {command:<{width}}  {help}" for command, (_, help) in COMMANDS.items() if command.startswith(group)]
    return "\n".join(
        [
            "usage: keyspan COMMAND [OPTIONS]",
            "       keyspan --version",
            "",
            *rows,
            "",
            "keyspan COMMAND --help shows a command's options.",
        ]
    )


def _parse(function: Callable[..., Any], words: list[str], command: str) -> Any:
    """Call the function, or make the dataclass, with arguments from the command line; required ones have no name."""
    import tyro

    return tyro.cli(
        function,
        args=words,
        prog=f"keyspan {command}",
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes),
    )


@dataclass(frozen=True)
class _Choice:
    """The options that choose the defaults of all others."""

    task: TaskName = "stdlib"
    data: tuple[str, ...] = ()
    resume: Path | None = None


def parse_train(words: list[str], command: str = "train") -> TrainConfig:
    """The configuration that `keyspan train` reads from its options.

    The defaults are those of the preset of `--task` or `--data`, or those of the run to `--resume`.
    """
    import tyro

    from keyspan.training.loop import read_config

    choice, _ = tyro.cli(_Choice, args=words, prog=f"keyspan {command}", return_unknown_args=True, add_help=False)
    default = preset(choice.task, choice.data) if choice.resume is None else read_config(choice.resume)
    shown = choice.resume or " ".join(choice.data) or choice.task
    more = ", then generate from it" if command == "demo" else ""
    config: TrainConfig = tyro.cli(
        TrainConfig,
        default=default,
        args=words,
        prog=f"keyspan {command}",
        description=f"Train a GPT{more}. The defaults shown are those of {shown}.",
    )
    return config


def _train(words: list[str]) -> int:
    from keyspan.training.loop import train

    result = train(parse_train(words))
    if os.environ.get("RANK", "0") != "0":  # torchrun started others, of which the first one speaks
        return 130 if result.interrupted else 0
    return _show(result)


def _show(result: Result) -> int:
    """Print how a run ended; its exit status is that of an interrupted program if it was."""
    if result.interrupted:
        print(f"interrupted after step {result.step}; go on with: keyspan train --resume {result.run}")
        return 130
    print(f"\n{result.metric.replace('_', ' ')} on held-out data after {result.step} steps, {result.seconds:.0f} s")
    figures = {"this model": result.held_out, **result.baselines}
    for name, figure in figures.items():
        print(f"  {name:<{max(map(len, figures))}}  {figure:.4f}")
    print(f"run folder: {result.run}")
    return 0


def _generate(words: list[str]) -> int:
    _parse(generate, words, "generate")
    return 0


def generate(
    model: Path,
    prompt: str = "",
    chat: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int = 0,
    draft: int = 0,
    dtype: str | None = None,
    weights: str | None = None,
    cache_dtype: str | None = None,
    max_model_len: int | None = None,
    device: str = "auto",
) -> None:
    """Continue a prompt with a model; print both, the answer as it is written.

    Args:
        model: Folder of a training run, or of a model in Hugging Face's format; or a .gguf file.
        prompt: Text to continue: source code (stdlib), a problem such as "banana=" (synthetic tasks), any text.
        chat: Take the prompt as a user's message, in the model's chat template; print the answer alone.
        max_tokens: Most tokens to generate; of a training run a token is a byte or a character. By default 256, or as
            many as max_model_len leaves.
        temperature: 0 takes the likeliest token each time; higher is wilder. By default 0.8 for stdlib, else 0.
        top_p: Draw only from the likeliest tokens whose probabilities sum to this. By default from all.
        top_k: Draw only from so many of the likeliest tokens. By default from all.
        min_p: Draw only from tokens at least so many times as likely as the likeliest.
        seed: Fixes the draws.
        draft: Most tokens guessed in a step from what stood in the text before. It changes the speed alone.
        dtype: fp32, bf16 or fp16. By default as the folder says.
        weights: int8 rounds the weights to 8 bits. By default as dtype says.
        cache_dtype: int8 or fp8 stores keys and values in 8 bits. By default as dtype says.
        max_model_len: Most tokens of prompt and answer. By default as many as the model was trained to read, of a
            training run with rotary positions too.
        device: auto (an accelerator where there is one, else the CPU), or a torch device.
    """
    from keyspan.inference.engine import Engine
    from keyspan.inference.pages import PagedCache
    from keyspan.inference.sampling import Sampling
    from keyspan.inference.serve import TaskTokenizer, find_cache_dtype, load_model
    from keyspan.inference.tokenizer import ChatTokenizer

    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, want 0 … 2⁶³ − 1")
    net, tokenizer = load_model(model, dtype, device, weights)
    if temperature is None:
        temperature = tokenizer.temperature if isinstance(tokenizer, TaskTokenizer) else 0.0
    if chat:
        if not isinstance(tokenizer, ChatTokenizer):
            raise ValueError(f"chat: {model} has no chat template")
        tokens = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    else:
        tokens = tokenizer.encode(prompt)
        print(prompt, end="", flush=True)
    if max_tokens is None:
        most = max_model_len or net.config.max_positions
        max_tokens = 256 if most is None else max(1, min(256, most - len(tokens)))
    sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, seed=seed)
    pages = -(-(len(tokens) + max_tokens) // 16) + 1
    stored = find_cache_dtype(cache_dtype)
    memory = pages * PagedCache.bytes_per_page(net.config, 16, stored or net.embedding.weight.dtype)
    engine = Engine(net, tokenizer, memory=memory, draft=draft, cache_dtype=stored, max_model_len=max_model_len)
    for event in engine.stream(tokens, sampling):
        print(event.text, end="", flush=True)
        if event.error:
            raise ValueError(event.error)
    print()


def _prepare(words: list[str]) -> int:
    from keyspan.training.prepare import Prepare, verify
    from keyspan.training.report import prepare_with_bar

    options: Prepare = _parse(Prepare, words, "prepare")
    finished = (options.out / "index.json").is_file()
    out = prepare_with_bar(options)
    if finished:
        verify(out)
        print("prepared already, and every checksum is right")
    index = loads((out / "index.json").read_text(encoding="utf-8"))
    counts = index["counts"]
    for side in ("train", "held-out"):
        of = [shard for shard in index["shards"] if shard["side"] == side]
        print(f"{side}: {sum(x['documents'] for x in of):,} documents, {sum(x['tokens'] for x in of):,} tokens")
    print(f"left out: {counts['duplicates']:,} duplicates, {counts['empty']:,} empty, {counts['bad']:,} bad records")
    print("".join(f"  {text}\n" for text in counts["named"]), end="")
    print(f"written: {out}; train on it with: keyspan train --data {out}")
    return 0


def _serve(words: list[str]) -> int:
    from keyspan.inference.serve import Serve, serve

    serve(_parse(Serve, words, "serve"))
    return 0


def export(run: Path, to: Path | None = None) -> None:
    """Write the model of a training run as a folder that transformers loads, with equal logits.

    Args:
        run: Folder of a training run.
        to: Folder for config.json, model.safetensors and, for stdlib and data, tokenizer.json. By default `export` in
            the run's.
    """
    from keyspan.inference.tokenizer import write_byte_tokenizer, write_text_tokenizer
    from keyspan.models import save
    from keyspan.training.data import START, StandardLibrary
    from keyspan.training.loop import load_run
    from keyspan.training.tasks import SyntheticTask

    _, task, model = load_run(run, "cpu")
    to = to or run / "export"
    if not isinstance(task, SyntheticTask):
        import_module("tokenizers")  # better missed now than when the weights are written
    save(model, to)
    if isinstance(task, StandardLibrary):
        write_byte_tokenizer(to, START)
    elif not isinstance(task, SyntheticTask):
        if task.tokenizer_file is None:
            write_byte_tokenizer(to, task.stop, ends=True)
        else:
            write_text_tokenizer(to, task.tokenizer_file, task.stop)
    print(f"written: {to}")


def _export(words: list[str]) -> int:
    _parse(export, words, "export")
    return 0


def report(
    runs: tuple[Path, ...], out: Path = Path("report.html"), samples: tuple[str, ...] = (), sample_tokens: int = 120
) -> None:
    """Write one HTML page, without scripts and network, that shows and compares training runs.

    Args:
        runs: Folders of training runs, finished or not.
        out: File to write.
        samples: Prompts that each run's model continues, taking the likeliest token each time.
        sample_tokens: Most tokens of a continuation.
    """
    from keyspan.training.html import report as write

    print(f"written: {write(runs, out, samples, sample_tokens)}")


def _report(words: list[str]) -> int:
    _parse(report, words, "report")
    return 0


def _demo(words: list[str]) -> int:
    from keyspan.training.loop import train

    result = train(parse_train(words, "demo"))
    status = _show(result)
    if status == 0:
        for prompt in ("import ", "class ", "def "):
            print(f"\n--- generated from {prompt!r}")
            generate(Path(result.run), prompt)
    return status


def _info(words: list[str]) -> int:
    import_module("keyspan.info").info_command(words)
    return 0


def _explain(words: list[str]) -> int:
    import_module("keyspan.info").explain_command(words)
    return 0


def _bench(name: str, words: list[str]) -> int:
    benchmark = import_module(f"keyspan.bench.{name}")
    benchmark.main(_parse(benchmark.Bench, words, f"bench {name}"))
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a GPT on a synthetic task or on this Python's standard library"),
    "prepare": (_prepare, "turn text, JSON lines or Parquet into token shards to train on"),
    "generate": (_generate, "continue a prompt with a trained model, or one in Hugging Face's format or GGUF"),
    "demo": (_demo, "train on the standard library for some minutes, then generate"),
    "report": (_report, "write a page that shows and compares training runs"),
    "export": (_export, "write a trained model as a folder that transformers loads"),
    "serve": (_serve, "serve a model over HTTP with OpenAI's interface, and a chat page"),
    "info": (_info, "show versions, devices and attention backends"),
    "explain": (_explain, "show which backend computes an attention, and why no other"),
    "bench attention": (partial(_bench, "attention"), "time attention against what torch offers"),
    "bench curves": (partial(_bench, "curves"), "compare the losses of a training step in every form"),
    "bench inference": (partial(_bench, "inference"), "time mixed requests through the engine against transformers"),
    "bench training": (partial(_bench, "training"), "time a training step against plain torch and transformers"),
}
"""Each command: what runs it with the words after it, and its line of help."""
