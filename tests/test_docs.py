"""The code in README and docs runs, and the pictures of masks are right."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import keyspan

ROOT = Path(__file__).parents[1]


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/tutorial.md"])
def test_code_runs(name, capsys):
    found = blocks(ROOT / name)
    assert found
    space: dict[str, object] = {}
    for number, block in enumerate(found):
        exec(compile(block, f"{name}, block {number + 1}", "exec"), space)


def test_pictures_of_masks():
    path = ROOT / "docs" / "masks.md"
    # An empty line between pictures would end what doctest expects.
    examples = "\n".join(block.replace("\n\n", "\n<BLANKLINE>\n") for block in blocks(path, "pycon"))
    names = {"keyspan": keyspan, "torch": torch}
    test = doctest.DocTestParser().get_doctest(examples, names, "masks.md", str(path), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.failures == 0
    assert runner.tries >= 15
    text = path.read_text(encoding="utf-8")
    for name in keyspan.__all__:
        if isinstance(getattr(keyspan, name), type) and issubclass(getattr(keyspan, name), keyspan.core.masks.Mask):
            assert f"### `{name}`" in text
