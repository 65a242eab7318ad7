"""Build hook of the documentation: turns TeX into MathML when the site is built; pages need no script for it."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex writes with `generic: true`.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula of a page by MathML; a formula that cannot be converted stops the build."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return f'<{found[1]} class="math">{convert(html.unescape(found[3]), display=display)}</{found[1]}>'

    return FORMULA.sub(mathml, content)
