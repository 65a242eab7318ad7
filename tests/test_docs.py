"""The documentation is right: its code runs, pictures and tables are what the library gives, links lead somewhere."""

import doctest
import re
from itertools import product
from pathlib import Path

import pytest
import torch

import keyspan
from keyspan.backends import BACKENDS, load, triton
from keyspan.backends.native import binding
from keyspan.cli import COMMANDS
from keyspan.core.problem import Problem, make_problem

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MASKS = [
    name for name in keyspan.__all__
    if isinstance(getattr(keyspan, name), type) and issubclass(getattr(keyspan, name), keyspan.core.masks.Mask)
]  # fmt: skip


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def of_page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=of_page)
def test_code_runs(path, capsys):
    space: dict[str, object] = {}
    for number, block in enumerate(blocks(path)):
        exec(compile(block, f"{of_page(path)}, block {number + 1}", "exec"), space)


@pytest.mark.parametrize(("name", "least"), [("index.md", 6), ("guides/masks.md", 15)])
def test_pictures_of_masks(name, least):
    path = DOCS / name
    # An empty line between pictures would end what doctest expects.
    examples = "\n".join(block.replace("\n\n", "\n<BLANKLINE>\n") for block in blocks(path, "pycon"))
    names = {"keyspan": keyspan, "torch": torch, **{mask: getattr(keyspan, mask) for mask in MASKS}}
    test = doctest.DocTestParser().get_doctest(examples, names, name, str(path), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.failures == 0
    assert runner.tries >= least


def test_every_public_name_has_its_place():
    reference = "".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    guide = (DOCS / "guides" / "masks.md").read_text(encoding="utf-8")
    for name in MASKS:
        assert f"### `{name}`" in guide
    for name in keyspan.__all__:
        assert name in ("BACKENDS", "__version__") or re.search(rf"^::: keyspan\.{name}$", reference, re.M), name


def test_every_command_has_its_place():
    page = (DOCS / "start" / "command_line.md").read_text(encoding="utf-8")
    assert all(f"| `keyspan {command}` |" in page for command in COMMANDS)


@pytest.mark.parametrize("path", PAGES, ids=of_page)
def test_links_lead_somewhere(path):
    """The README is also the page of the package on an index, where a relative link leads nowhere."""
    home = re.search(r'^Source = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    raw = home.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\]\[keyspan", text), "want [name](../reference/page.md#keyspan.name)"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place = link.split("#")[0]
        ours = re.fullmatch(rf"(?:{home}/blob|{raw})/main/(.*)", place)
        if ours:
            assert (ROOT / ours[1]).exists(), link
        elif not place.startswith("https://") and place:
            assert path.name != "README.md", f"{link}: want an absolute link"
            assert (path.parent / place).exists(), link


def example(row: str, dtype: torch.dtype) -> Problem:
    """A problem that has the feature of this row of the table of backends."""
    heads, K, V, M = 2, 16, 16, 8
    given: dict[str, object] = {}
    if row == "head dims above 256":
        K = 257
    if row == "grouped query heads":
        heads = 6
    if row == "value dim other than key dim":
        V = 24
    q, k, v = (torch.zeros(1, M, h, d, dtype=dtype) for h, d in ((heads, K), (2, K), (2, V)))
    stored = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}.get(row.split(maxsplit=1)[0])
    if stored is not None:
        k, given["key_scale"] = keyspan.quantize(k, stored)
        v, given["value_scale"] = keyspan.quantize(v, stored)
    if row == "float8_e4m3fn query":
        q, given["query_scale"] = keyspan.quantize(q, stored)
    terms = {
        "packed, padded, gappy keys": {"mask": keyspan.GappyKeys([3, 5], [0, 2], [4, 6])},
        "paged keys": {"mask": keyspan.PagedKeys([3, 5], [4, 3], [[1], [0]], page_size=4)},
        "window with sinks or a prefix (two spans a row)": {
            "mask": keyspan.Causal() & keyspan.Window(1) & keyspan.Sinks(1)
        },
        "dense bool mask": {"mask": torch.ones(M, M, dtype=torch.bool)},
        "ALiBi": {"bias": keyspan.Alibi(torch.ones(heads))},
        "relative table": {"bias": keyspan.RelativeBias(torch.ones(heads, 5))},
        "dense bias": {"bias": torch.ones(M, M, dtype=dtype)},
        "float64 bias": {"bias": torch.ones(M, M, dtype=torch.float64)},
        "softcap": {"softcap": 5.0},
        "learned sinks": {"sinks": torch.ones(heads)},
        "dropout": {"dropout_p": 0.1},
    }
    return make_problem(q, k, v, **given, **terms.get(row, {}))[0]


def test_table_of_backends(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # triton then takes a problem on the CPU
    monkeypatch.setattr(triton, "_interpreter_fixed", lambda: True)  # and answers for dtypes as on a GPU
    text = (DOCS / "guides" / "backends.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    names = [cell.strip("`") for cell in table[0][1:]]
    assert sorted(names) == sorted(BACKENDS)
    checked = 0
    for row, *cells in table[2:]:
        if row in ("devices", "memory"):
            continue
        dtypes = [getattr(torch, row)] if row in DTYPES else [getattr(torch, name) for name in DTYPES[:3]]
        for dtype, name_and_cell in product(dtypes, zip(names, cells, strict=True)):
            name, cell = name_and_cell
            problem = example(row, dtype)
            reason = load(name).reason_against(problem)
            if name == "native" and reason == binding.WHY_ABSENT is not None:
                continue
            assert (reason is not None) == (cell == "no"), f"{row} in {dtype}, {name}: {cell}, but {reason}"
            assert cell.startswith("forward") == (problem.quantized and cell != "no"), f"{row}, {name}"
            checked += 1
    assert checked >= 160
