"""One HTML file that needs nothing else: page, tables and pictures, every text of other people escaped.

No script, no font and no picture comes from elsewhere; a content security policy in the page forbids it, too.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .environment import redact

__all__ = ["bar", "escape", "facts", "figure", "page", "paragraph", "section", "table"]

_MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_UNIT = re.compile(r"(?<=\d) (?=(?:%|s|min|h|points|of)(?!\w))")  # a number stays on the line of its unit

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1f2933; --muted: #5a6572; --line: #dde2e8;
  --blue: #0072b2; --bar: #cfe3f0; --warn: #b54708; --warn-card: #fff4e8; --warn-line: #f3c9a0; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1b2128; --ink: #e6eaee; --muted: #a0abb7;
  --line: #323b45; --blue: #6db9e8; --bar: #24506d; --warn: #ffb877; --warn-card: #33240f; --warn-line: #6b4a22;
  --good: #6fd08c; } }
@media print { :root { color-scheme: light; } main > section { break-inside: avoid; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h1, h2, p, li, th, dd, figcaption { overflow-wrap: anywhere; }
td { white-space: nowrap; }
td small { white-space: normal; }
header p, .note, figcaption { color: var(--muted); }
header p { margin: 0; }
.note { font-size: .9rem; margin: .6rem 0 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem;
  margin-top: 1rem; }
section > :first-child { margin-top: 0; }
section > :last-child { margin-bottom: 0; }
.summary { border-left: .3rem solid var(--blue); font-size: 1.08rem; }
.warning { background: var(--warn-card); border-color: var(--warn-line); border-left: .3rem solid var(--warn); }
.warning h2 { color: var(--warn); }
ul { margin: 0; padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { overflow-wrap: normal; color: var(--muted); font-size: .85rem; font-weight: 600;
  border-bottom-color: var(--muted); }
tbody th { font-weight: 600; }
td small, th small { display: block; color: var(--muted); font-weight: 400; }
.bar { display: block; height: .4rem; min-width: 5rem; margin-top: .3rem; background: var(--bar); border-radius: .2rem;
  overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--blue); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; min-width: 0; }
figure { margin: 0 0 1.2rem; }
figure div { overflow-x: auto; background: #ffffff; border-radius: .4rem; border: 1px solid var(--line); }
figure img { display: block; width: 100%; max-width: 42rem; min-width: 17rem; height: auto; margin: 0 auto; }
figcaption { font-size: .92rem; margin-top: .4rem; }
summary { cursor: pointer; font-weight: 600; }
summary + * { margin-top: .7rem; }
footer { color: var(--muted); font-size: .85rem; margin-top: 1.5rem; }
a { color: var(--blue); }
@media (max-width: 40rem) {
  main { padding: 1rem .7rem 2rem; }
  h1 { font-size: 1.35rem; }
  section { padding: .9rem .85rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  table, tbody, tr, tbody th, td { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  tr:last-child { border-bottom: 0; }
  tbody th, td { border: 0; padding: .1rem 0; }
  td { white-space: normal; overflow-wrap: anywhere; }
  td { display: grid; grid-template-columns: 8.5rem 1fr; column-gap: .6rem; }
  td:has(div:empty) { display: none; }
  td::before { content: attr(data-label); color: var(--muted); font-size: .88rem; }
}
"""


def escape(text: object) -> str:
    """Make a text safe inside HTML, in content and in attributes, without secrets and invisible characters.

    Args:
        text (`object`): anything; what it prints as is used.
    """
    return html.escape(_UNIT.sub("\u00a0", _CONTROL.sub("\ufffd", redact(str(text)))), quote=True)


def paragraph(text: object, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style sheet."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def section(title: str, *parts: str, kind: str = "") -> str:
    """A card with a heading.

    Args:
        title (`str`): plain text; empty for no heading.
        parts (`str`): HTML of this module.
        kind (`str`): a class of the style sheet.

    Returns:
        `str`: empty when there is nothing in it.
    """
    body = "\n".join(part for part in parts if part)
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f"<section{_class(kind)}>\n{heading}{body}\n</section>" if body else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table that becomes a list of cards on a narrow screen.

    Args:
        headings (`Sequence[str]`): plain text of the columns.
        rows (`Iterable[Sequence[str]]`): HTML of the cells; the first of a row is its heading.
        label (`str`): plain text that says what the table shows, for those who do not see it.
    """
    head = "".join(f'<th scope="col" role="columnheader">{escape(text)}</th>' for text in headings)
    lines = []
    for first, *cells in rows:
        named = zip(headings[1:], cells, strict=True)
        body = "".join(f'<td role="cell" data-label="{escape(name)}"><div>{cell}</div></td>' for name, cell in named)
        lines.append(f'<tr role="row"><th scope="row" role="rowheader">{first}</th>{body}</tr>')
    # The roles survive "display: block", which would take the table away from a screen reader.
    return (
        f'<table role="table" aria-label="{escape(label)}">\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n<tbody role="rowgroup">\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table>"
    )


def bar(share: float) -> str:
    """A bar that is filled to `share` in [0, 1]; the number stands beside it."""
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def facts(entries: Iterable[tuple[str, object]]) -> str:
    """A list of names and values; entries without a value are left out."""
    shown = [(name, value) for name, value in entries if value not in (None, "", [], {})]
    lines = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in shown)
    return f"<dl>\n{lines}\n</dl>" if lines else ""


def figure(path: Path, alternative: str, caption: str) -> str:
    """A picture, embedded.

    Args:
        path (`Path`): a `.png`, `.jpg` or `.webp` file.
        alternative (`str`): what it shows, for those who do not see it.
        caption (`str`): plain text below it.

    Raises:
        ValueError: for another kind of file.
    """
    media = _MEDIA_TYPES.get(path.suffix.lower())
    if media is None:
        raise ValueError(
            f"got the picture {path.name!r}; a report embeds {', '.join(_MEDIA_TYPES)} files: save the figure as .png"
        )
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img src="data:{media};base64,{data}" alt="{escape(alternative)}">'
    # A wide picture scrolls on a narrow screen, so it must be reachable with the keyboard.
    return f'<figure>\n<div tabindex="0">{image}</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>'


def page(title: str, subtitle: str, sections: Iterable[str], footer: str) -> str:
    """The whole file.

    Args:
        title, subtitle, footer (`str`): plain text.
        sections (`Iterable[str]`): HTML of [`section`].
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    body = "\n".join(part for part in sections if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{paragraph(subtitle)}
</header>
{body}
<footer>{paragraph(footer)}</footer>
</main>
</body>
</html>
"""


def _class(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
