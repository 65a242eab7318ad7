"""The command line: options become a configuration, mistakes become one line, and a run goes from end to end."""

import json
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import keyspan
from keyspan import cli
from keyspan.training.config import PRESETS, TrainConfig
from keyspan.training.loop import load_run, read_config

pytestmark = pytest.mark.usefixtures("few_held_out_problems")
TINY = "--task sort --max-length 4 --dim 16 --tokens 128 --steps 4 --warmup 1 --device cpu"


@pytest.mark.parametrize("task", PRESETS)
def test_a_task_chooses_its_preset(task):
    assert cli.parse_train(["--task", task]) == PRESETS[task]
    assert cli.parse_train([f"--task={task}"]) == PRESETS[task]


def test_the_default_task_is_the_standard_library():
    assert cli.parse_train([]) == PRESETS["stdlib"]


def test_options_override_the_preset():
    words = (
        "--steps 7 --lr 0.5 --task sort --no-tie-embeddings --stop-at None --positions alibi --out runs/x --hidden 40"
    )
    assert cli.parse_train(words.split()) == replace(
        PRESETS["sort"],
        steps=7,
        lr=0.5,
        tie_embeddings=False,
        stop_at=None,
        positions="alibi",
        out=Path("runs/x"),
        hidden=40,
    )


def test_help_names_every_option_and_the_preset(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--task", "addition", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    plain = re.sub(r"[\s│]+", " ", text)
    assert "those of addition." in plain
    assert f"the learning rate's schedule spans them. (default: {PRESETS['addition'].steps})" in plain


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_says_what_each_option_is_for(capsys, command):
    """An option without a description would show its default alone."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out).partition("options")[2]
    options = re.findall(r" (--[a-z][\w-]*)(.*?)\(default: ", text)
    assert options
    for name, shown in options:
        # Less its other name, the values it may take and their types.
        assert re.sub(r"--[\w-]+|\{[^}]*\}|\b[A-Z]+\b|\W", "", shown), name


@pytest.mark.parametrize(
    ("words", "status", "stream"),
    [
        ([], 2, "err"), (["-h"], 0, "out"), (["--help"], 0, "out"), (["fly"], 2, "err"),
        (["bench"], 2, "err"), (["bench", "fly"], 2, "err"), (["bench", "--help"], 0, "out"),
    ],
)  # fmt: skip
def test_usage(capsys, words, status, stream):
    assert cli.main(words) == status
    found = capsys.readouterr()
    shown = getattr(found, stream)
    if words and status:
        assert f"keyspan: command: got {' '.join(words)!r}" in found.err
    benches = {command for command in cli.COMMANDS if command.startswith("bench ")}
    assert shown.startswith("usage: keyspan COMMAND")
    for command in cli.COMMANDS:
        assert (f"\n  {command} " in shown) == (words[:1] != ["bench"] or command in benches)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --task copy --heads 3", "dim: got"),
        ("train --task copy --device toaster", "device: got 'toaster'"),
        ("train --resume nowhere", "nowhere: holds no config.json"),
        ("generate nowhere", "nowhere: holds no config.json"),
        ("generate nowhere --seed -1", "seed: got -1"),
        ("generate nowhere --device meta", "nowhere: holds no config.json"),
        ("explain --dtype fp12", "dtype: got 'fp12', want fp32, bf16"),
        ("explain --device meta", "device: got 'meta'"),
        ("train --task copy --device meta", "device: got 'meta'"),
        ("explain --queries -1", "queries: got -1"),
        ("explain --heads 0", "heads: got 0"),
        ("explain --device toaster", "device: got 'toaster'"),
        ("bench attention --lengths 4 -4", "lengths: got -4"),
        ("bench attention --device toaster", "device: got 'toaster'"),
        ("bench attention --out /dev/null/run", "[Errno"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"keyspan: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "train --task divide",
        "train --steps many",
        "train --steps 0",
        "train --tokens 9223372036854775808",
        "train --stepz 3",
        "generate",
    ],
)
def test_unknown_options(capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        *((f"train {TINY}", package, "train") for package in ("tyro", "rich", "safetensors", "matplotlib")),
        ("prepare text.txt --tokenizer train:300", "tokenizers", "data"),
        ("serve run", "uvicorn", "serve"),
    ],
)
def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path, command, missing, extra):
    monkeypatch.chdir(tmp_path)
    # The module that needs uvicorn too: another test may have imported it.
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name == "keyspan.inference.http"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(missing), *sys.meta_path])
    if "text.txt" in command:
        (tmp_path / "text.txt").write_text("text")
    assert cli.main(command.split()) == 1
    wanted = f"keyspan: {command.split()[0]} needs {missing}: pip install 'keyspan[{extra}]'\n"
    assert capsys.readouterr().err == wanted
    assert [path.name for path in tmp_path.iterdir()] in ([], ["text.txt"])  # said before the work, not after


class Blocker:
    """An import hook for which some packages are not installed."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_module_of_keyspan_is_not_called_an_extra(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Blocker("keyspan"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "keyspan.training.loop")
    with pytest.raises(ModuleNotFoundError, match=r"keyspan\.training\.loop"):
        cli.main(["train", *TINY.split()])


def test_commands_import_their_module_when_run(monkeypatch, capsys):
    """bench takes its options from the dataclass of the module that it calls."""
    called = []
    monkeypatch.setitem(sys.modules, "keyspan.bench.attention", ModuleType("keyspan.bench.attention"))

    sys.modules["keyspan.bench.attention"].Bench = make_dataclass("Bench", [("length", int, 3)])
    sys.modules["keyspan.bench.attention"].main = called.append
    assert cli.main(["bench", "attention", "--length", "8"]) == 0
    assert called[0].length == 8


@pytest.mark.parametrize(
    "words", ["info", "info --json", "explain --causal --dtype bf16 --documents 3 4 5", "explain --json", "--version"]
)
def test_info_and_explain_need_no_extra(capsys, monkeypatch, words):
    packages = [package for packages in cli.EXTRAS.values() for package in packages]
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(*packages), *sys.meta_path])
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    if "--json" in words:
        assert isinstance(json.loads(shown), dict)
    if "--documents" in words:
        assert "M 12, N 12, G 8, H 1, K 64, V 64, bfloat16" in shown
    if words == "--version":
        assert shown == f"keyspan {keyspan.__version__}\n"


def test_subpackages_are_attributes():
    code = "import sys, keyspan; assert 'keyspan.layers' not in sys.modules; print(keyspan.layers.rms_norm.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "rms_norm\n"
    packages = {module.name for module in pkgutil.iter_modules(keyspan.__path__) if module.ispkg}
    assert packages | {"attention"} <= set(dir(keyspan))
    # Each in a process of its own, as the import of one may bring another; forked, as torch takes seconds to import.
    code = """
import os, sys, keyspan
for name in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
    else:
        getattr(keyspan, name)
        os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code, *packages], check=True)
    with pytest.raises(AttributeError, match="module 'keyspan' has no attribute 'lairs'"):
        keyspan.lairs  # noqa: B018


def test_a_reader_that_ends_early_prints_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "keyspan", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process.stderr as error:
        assert error.read() == ""
    assert process.wait(120) == 141


def test_ctrl_c_while_importing_prints_no_traceback(tmp_path):
    # Under nohup, and behind `&` in a script, SIGINT is ignored from the start.
    handled = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    (tmp_path / "torch.py").write_text(f"{handled}; os.kill(os.getpid(), signal.SIGINT)")
    path = [str(tmp_path), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}; from keyspan_command import main; sys.exit(main())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "")


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_disk_that_is_full_names_the_file(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from keyspan.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "train", *TINY.split(), "--steps", "2", "--out", str(tmp_path / "run")]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert re.search(r"^keyspan: \[Errno 27\] File too large: '.*model\.safetensors'$", found.stderr, re.MULTILINE)
    assert "Traceback" not in found.stderr


def test_a_backend_without_its_device_is_one_line(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY.split(), "--backend", "triton"]) == 1
    error = capsys.readouterr().err
    assert error == "keyspan: backend 'triton' cannot compute this: query is on cpu, want a GPU\n"
    assert list(tmp_path.iterdir()) == []


def test_generate_stops_where_the_training_did(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY.replace("sort", "copy").split(), "--positions", "rope"]) == 0
    capsys.readouterr()
    words = ["generate", "runs/copy", "--prompt", "abc="]
    assert load_run(Path("runs/copy"), "cpu")[2].config.max_positions == 10  # 4 symbols twice, = and the stop sign
    assert cli.main(words) == 0
    assert len(capsys.readouterr().out) <= 10
    assert cli.main([*words, "--max-tokens", "6"]) == 1
    assert "got 5 tokens and max_tokens = 6, want at most 10 in all, the most" in capsys.readouterr().err
    assert cli.main([*words, "--max-tokens", "6", "--max-model-len", "11"]) == 0


def test_train_resume_and_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY.split()]) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "runs" / "sort"
    result = json.loads((run / "result.json").read_text())
    assert "exact match on held-out data after 4 steps" in shown
    assert f"this model  {result['held_out']:.4f}" in shown
    config = read_config(run)
    assert (config.task, config.steps, config.dim) == ("sort", 4, 16)

    assert cli.main(["train", "--resume", str(run), "--steps", "6"]) == 0
    assert "after 6 steps" in capsys.readouterr().out
    assert read_config(run) == replace(config, steps=6)

    assert cli.main(["generate", str(run), "--prompt", "hello=", "--max-tokens", "5"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("hello=")
    assert len(greedy) <= len("hello=") + 5 + 1
    assert cli.main(["generate", str(run), "--prompt", "hello=", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == greedy

    assert cli.main(["generate", str(run), "--prompt", "hello=", "--max-tokens", "5", "--cache-dtype", "int8"]) == 0
    assert capsys.readouterr().out.startswith("hello=")
    assert cli.main(["generate", str(run), "--cache-dtype", "int4"]) == 1
    assert capsys.readouterr().err == "keyspan: cache_dtype: got 'int4', want one of int8, fp8\n"

    drawn = set()
    for seed in range(3):
        words = ["--prompt", "a=", "--max-tokens", "9", "--temperature", "2.0", "--top-p", "0.9", "--seed", str(seed)]
        assert cli.main(["generate", str(run), *words]) == 0
        drawn.add(capsys.readouterr().out)
    assert len(drawn) == 3

    cold = ["generate", str(run), "--prompt", "hello=", "--max-tokens", "5", "--temperature"]
    assert cli.main([*cold, "1e-300"]) == 0
    assert capsys.readouterr().out == greedy
    assert cli.main([*cold, "inf"]) == 1
    assert capsys.readouterr().err == "keyspan: temperature: got inf, want 0 or a positive number\n"
    assert cli.main(["generate", str(run), "--device", "meta"]) == 1
    assert capsys.readouterr().err.startswith("keyspan: device: got 'meta'")

    assert cli.main(["train", "--resume", str(run), "--task", "copy"]) == 1
    assert capsys.readouterr().err.startswith("keyspan: task: got copy, but ")

    assert cli.main(["generate", str(run), "--prompt", "Ä"]) == 1
    assert capsys.readouterr().err.startswith("keyspan: prompt: got 'Ä'")


def test_demo_shows_the_baselines_and_writes_source_code(tmp_path, monkeypatch, capsys):
    library = tmp_path / "library"
    library.mkdir()
    for i in range(40):
        (library / f"m{i}.py").write_bytes(b"def f(x):\n    return x\n" * (1 + i % 5))
    monkeypatch.setattr("keyspan.training.data.sysconfig.get_path", lambda name: str(library))
    from keyspan.training.data import _documents, _split

    _split.cache_clear()
    _documents.cache_clear()
    monkeypatch.chdir(tmp_path)
    options = "--max-length 64 --dim 16 --layers 1 --tokens 256 --steps 3 --device cpu"
    assert cli.main(["demo", *options.split()]) == 0
    _split.cache_clear()
    _documents.cache_clear()
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "stdlib" / "result.json").read_text())
    for name, figure in {"this model": result["held_out"], **result["baselines"]}.items():
        assert re.search(rf"^  {re.escape(name)} +{figure:.4f}$", shown, re.MULTILINE)
    for prompt in ("import ", "class ", "def "):
        assert f"--- generated from {prompt!r}\n{prompt}" in shown
    assert load_run(tmp_path / "runs" / "stdlib", "cpu")[0].precision == "bf16"


@pytest.mark.parametrize(("ranks", "ends"), [("1", SystemExit), ("2", InterruptedError)])
def test_one_of_several_ranks_ends_without_finalizing_python(monkeypatch, capsys, ranks, ends):
    """Python's finalization may abort a process whose gloo threads are alive."""

    def leave(status):
        raise InterruptedError(status)

    monkeypatch.setattr(cli.os, "_exit", leave)
    monkeypatch.setattr(cli.sys, "argv", ["keyspan", "--version"])
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(ends) as caught:
        cli.program()
    assert caught.value.args == (0,)
    assert keyspan.__version__ in capsys.readouterr().out
