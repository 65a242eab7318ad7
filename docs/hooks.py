"""Build hooks of the documentation: TeX becomes MathML when the site is built; doctests become blocks of code."""

from __future__ import annotations

import html
import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

# What pymdownx.arithmatex writes with `generic: true`.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
DOCTEST = re.compile(r"^>>> .*(?:\n.*\S.*)*", re.M)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula of a page by MathML, which needs no script; one that cannot be converted is an error."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return f'<{found[1]} class="math">{convert(html.unescape(found[3]), display=display)}</{found[1]}>'

    return FORMULA.sub(mathml, content)


class Doctests(Extension):
    """Fences the doctests of docstrings: Markdown would read their prompts as quotations."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
