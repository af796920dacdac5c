"""The bricks of a page: everything escaped, nothing loaded, pictures inside."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_robust.evaluation.html_page import STYLE, bar, escape, facts, figure, page, paragraph, section, table

NASTY = "<script>alert('1')</script> & \"quoted\" \x00\x1b[31m \ud800 \u202e"


class Reader(HTMLParser):
    """Tags with their attributes in order, and whether every one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_texts_of_others_become_text():
    safe = escape(NASTY)
    assert "<" not in safe and '"' not in safe and "'" not in safe and "&amp;" in safe
    assert "\x00" not in safe and "\x1b" not in safe and "\u202e" not in safe and safe.encode("utf-8")
    assert escape("hf_abcdefghijklmnopqrstuvwxyz") == "REDACTED"
    assert escape(8) == "8" and escape("line\nline\ttab") == "line\nline\ttab"


def test_a_number_stays_with_its_unit():
    assert escape("43.3 % of 1,000 images in 2.5 h") == "43.3\u00a0% of 1,000 images in 2.5\u00a0h"
    assert escape("in 3 hours") == "in 3 hours"


@pytest.mark.parametrize(
    "html",
    [
        paragraph(NASTY, NASTY),
        section(NASTY, paragraph(NASTY), kind=NASTY),
        table((NASTY, NASTY), [(escape(NASTY), escape(NASTY))], NASTY),
        facts([(NASTY, NASTY)]),
        page(NASTY, NASTY, [section("", paragraph(NASTY))], NASTY),
    ],
)
def test_no_brick_lets_a_tag_through(html):
    reader = Reader(html)
    assert "script" not in {tag for tag, _ in reader.tags} and not reader.open
    assert all(not name.startswith("on") for _, attributes in reader.tags for name in attributes)


def test_empty_bricks_leave_nothing_behind():
    assert section("Title") == section("Title", "", "") == "" and facts([("seed", None), ("notes", "")]) == ""
    assert "seed" in facts([("seed", 0)])  # zero is a value
    assert "<section" not in page("t", "s", ["", ""], "f")


def test_a_bar_stays_in_its_frame():
    assert 'width:43.3%"' in bar(0.433) and 'width:100.0%"' in bar(1.2) and 'width:0.0%"' in bar(-1.0)


def test_cells_know_their_column_where_the_table_becomes_cards():
    reader = Reader(table(("metric", "accuracy", "n"), [("clean", "74 %", "200"), ("PGD", "47 %", "100")], "Metrics"))
    cells = [attributes for tag, attributes in reader.tags if tag == "td"]
    assert [cell["data-label"] for cell in cells] == ["accuracy", "n"] * 2
    assert [a["role"] for tag, a in reader.tags if tag in ("table", "th", "td", "tr")].count("rowheader") == 2
    with pytest.raises(ValueError):
        table(("metric", "accuracy"), [("clean", "74 %", "200")], "Metrics")


def test_a_picture_is_embedded_byte_by_byte(tmp_path: Path):
    path = tmp_path / "curve.PNG"
    path.write_bytes(bytes(range(256)))
    (image,) = [attributes for tag, attributes in Reader(figure(path, "a <curve>", "falls")).tags if tag == "img"]
    kind, _, data = str(image["src"]).partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == bytes(range(256))
    assert image["alt"] == "a <curve>"
    with pytest.raises(ValueError, match=r"got the picture 'a\.svg'; a report embeds \.png, \.jpg"):
        figure(tmp_path / "a.svg", "", "")


def test_a_page_forbids_everything_from_elsewhere():
    reader = Reader(page("Title", "on data", [section("Results", paragraph("good"))], "made here"))
    metas = [attributes for tag, attributes in reader.tags if tag == "meta"]
    (policy,) = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy and "script-src" not in policy and "img-src data:;" in policy
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert ("html", {"lang": "en"}) in reader.tags and reader.words.count("Title") == 2
    assert not [a for _, a in reader.tags if "href" in a or "src" in a]
    assert "url(" not in STYLE and "@import" not in STYLE
    assert "prefers-color-scheme: dark" in STYLE and "max-width: 40rem" in STYLE
