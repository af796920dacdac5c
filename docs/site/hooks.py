"""What the site does beyond mkdocs: equations become MathML, CONTRIBUTING.md becomes a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', flags=re.DOTALL)
_MARKS = {"span": (r"\(", r"\)"), "div": (r"\[", r"\]")}


def on_files(files: Any, config: Any) -> Any:
    """Add CONTRIBUTING.md, which stands at the root of the repository where others look for it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contributing.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the root's CONTRIBUTING.md to its page: the source is read on the site and in the repository."""
    return markdown.replace("../CONTRIBUTING.md", "contributing.md")


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Turn the equations into MathML, which browsers draw without scripts, fonts or a network."""

    def drawn(match: re.Match[str]) -> str:
        begin, end = _MARKS[match[1]]
        latex = html.unescape(match[2]).strip().removeprefix(begin).removesuffix(end).strip()
        drawing = convert(latex, display="block" if match[1] == "div" else "inline")
        if "\\" in drawing:
            raise PluginError(f"{page.file.src_path}: a command in {latex!r} has no MathML: write it in other words")
        return drawing

    return _EQUATION.sub(drawn, content)
