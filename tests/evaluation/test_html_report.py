"""The page of an evaluation: every figure where a reader looks for it, nothing from elsewhere, nothing unescaped."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.html_report import PICTURES, render_html, write_html_report
from hf_robust.evaluation.leaderboard import closest_row

PGD, AUTOATTACK = "pgd20_linf_8_255_accuracy", "autoattack_linf_8_255_accuracy"
NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """A page as a reader sees it: headings to lines of text, tables to rows of cells, and all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "table":
            self.rows = self.tables[str(values["aria-label"])] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.words.append(data.replace("\u00a0", " "))
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += (
                data.replace("\u00a0", " ") if not self.rows[-1][-1] else f" {data}".replace("\u00a0", " ")
            )

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(**changes: Any) -> EvaluationReport:
    stages = [
        {
            "name": name,
            "robust": robust,
            "accuracy": robust / 1000,
            "seconds": seconds,
            "forwards": 74100,
            "backwards": 7,
        }
        for name, robust, seconds in (("apgd-ce", 470, 82.31), ("apgd-t", 434, 640.0), ("square", 433, 9000.0))
    ]
    values: dict[str, Any] = {
        "metrics": {"accuracy": 0.741, PGD: 0.471, AUTOATTACK: 0.433},
        "n": 1000,
        "seed": 7,
        "stages": stages,
        "counts": {"autoattack": {"forwards": 222_300, "backwards": 21}},
        "seconds": {"clean": 1.5, "autoattack": 9722.3},
        "model": {"name": "thin", "parameters": 702_346, "method": "DynACL"},
        "dataset": {"name": "cifar10", "split": "test", "n": 1000, "n_total": 10_000, "image_size": 32},
        "versions": {"torch": "2.15.0"},
        "date": "2026-11-23",
        "library_version": "0.1.0",
    }
    return EvaluationReport(**{**values, **changes})


def read(**changes: Any) -> Page:
    return Page(render_html(report(**changes)))


def test_the_summary_comes_first_and_every_metric_has_interval_images_and_seed():
    page = read()
    assert page.text.index("thin classifies 74.1 % of 1,000 images") < page.text.index("Results")
    head, clean, pgd, autoattack = page.tables["Metrics of the evaluation"]
    assert head == ["metric", "accuracy", "95 % interval", "images", "seed"]
    assert clean == ["Accuracy on clean images accuracy", "74.1 %", "71.3 to 76.7 %", "1,000", "7"]
    assert pgd[0] == f"PGD-20 accuracy (L-inf, eps 8/255) {PGD}" and pgd[1] == "47.1 %"
    assert autoattack[1:] == ["43.3 %", "40.3 to 46.4 %", "1,000", "7"]
    assert "on cifar10, split test, 2026-11-23" in page.text and "hf_robust 0.1.0" in page.text


def test_the_threat_model_is_in_words():
    page = read()
    assert "eps 8/255 of pixels in [0, 1]" in page.text and "no pixel changes by more than eps (L-inf)" in page.text
    assert "standard: the benchmark's setting" in page.text
    assert "Threat model" not in read(metrics={"accuracy": 0.7}).text


def test_warnings_stand_before_the_figures_and_only_where_there_are_some():
    page = read(warnings=["Square broke more.", NASTY])
    assert page.text.index("Read this before") < page.text.index("Results") and "Square broke more." in page.text
    assert "Read this before" not in read().text


def test_the_published_row_stands_beside_ours():
    row = closest_row("DynACL", "slf").to_dict()
    page = read(leaderboard=row)
    head, clean, autoattack, corruptions = page.tables["Comparison with the leaderboard"]
    assert head == ["metric", "this model", "published", "difference"]
    assert clean[1:] == ["74.1 %", "75.41 %", "\u22121.3 points published is inside our interval"]
    assert autoattack[1:] == ["43.3 %", "45.09 %", "\u22121.8 points published is inside our interval"]
    assert corruptions[1:] == ["not measured", "68.67 %", ""]
    assert "DynACL, SLF, cifar10, as published by: RobustSSL leaderboard" in page.text
    assert "0.7 million parameters" in page.text and "Ours are of 1,000 images" in page.text
    better = read(leaderboard=row, metrics={"accuracy": 0.85})
    outside = better.tables["Comparison with the leaderboard"][1]
    assert outside[3] == "+9.6 points published is outside our interval"
    assert "Comparison with the leaderboard" not in read().tables
    transfer = closest_row("DynACL", "aff", "cifar10", "stl10", "autolora").to_dict()
    assert "DynACL, AFF with AutoLoRa, cifar10 to stl10" in read(leaderboard=transfer).text


def test_stages_say_what_each_attack_added():
    _, first, second, third = read().tables["Stages of AutoAttack"]
    assert first[0].startswith("apgd-ce") and first[1:] == ["470 of 1,000 271 fooled", "82.3 s", "74,100", "7"]
    assert second[1:3] == ["434 of 1,000 36 fooled", "10.7 min"] and third[1:3] == ["433 of 1,000 1 fooled", "2.5 h"]
    assert "Stages of AutoAttack" not in read(stages=[]).tables


@pytest.mark.parametrize("stage", [{"robust": torch.arange(1000) < 470}, {"accuracy": 0.47}])
def test_stages_may_hold_flags_or_accuracies(stage):
    page = Page(render_html({"metrics": {AUTOATTACK: 0.47}, "n": 1000, "stages": [{"name": "apgd-ce", **stage}]}))
    assert page.tables["Stages of AutoAttack"][1][1] == "470 of 1,000"


def test_corruptions_and_classes_are_there_in_numbers():
    found = {
        "name": "generated corruptions (hf_robust 0.1.0)",
        "table": {"elastic_transform": {"1": 0.6, "3": 0.5}, "fog": {"1": 0.7}},
        "notes": ["Frost is drawn."],
    }
    classes = {"names": ["cat", NASTY], "counts": [10, 0], "accuracies": {"clean": [0.9, None], "pgd20": [0.2, None]}}
    page = read(corruptions=found, classes=classes)
    assert page.tables["Accuracy under corruptions"] == [
        ["corruption", "severity 1", "severity 3"],
        ["elastic transform", "60.0 %", "50.0 %"],
        ["fog", "70.0 %", ""],
    ]
    assert "Frost is drawn." in page.text and "Generated corruptions (hf_robust 0.1.0) in numbers" in page.text
    rows = read(preset="smoke", classes={"accuracies": {"autoattack": [0.5]}}).tables["Accuracy by class"]
    assert rows == [["class", "images", "AutoAttack cut short"], ["0", "", "50.0 %"]]
    assert page.tables["Accuracy by class"][0] == ["class", "images", "clean", "PGD-20"]
    assert page.tables["Accuracy by class"][1:] == [["cat", "10", "90.0 %", "20.0 %"], [NASTY, "0", "", ""]]


def test_provenance_is_folded_away():
    page = read(command="hf-robust evaluate --model x")
    assert [tag for tag, _ in page.tags].count("details") == 3  # the model, the data, how it was measured
    for text in ("702,346", "n total 10,000", "torch 2.15.0", "hf-robust evaluate --model x", "backwards 21"):
        assert text in page.text
    assert not [a for tag, a in page.tags if tag == "details" and "open" in a]


def test_nothing_of_others_is_markup(tmp_path: Path):
    row = {**closest_row("DynACL", "slf").to_dict(), "method": NASTY, "note": NASTY, "origin_title": NASTY}
    facts = {"name": NASTY, NASTY: NASTY}
    page = read(
        model=facts,
        dataset={**facts, "split": NASTY},
        warnings=[NASTY],
        leaderboard=row,
        stages=[{"name": NASTY, "robust": 1}],
        corruptions={"name": NASTY, "table": {NASTY: {"1": 0.5}}, "notes": [NASTY]},
        classes={"names": [NASTY], "counts": [1], "accuracies": {NASTY: [0.5]}},
        versions={NASTY: NASTY},
        preset=NASTY,
        norm=NASTY,
        command=NASTY,
        date=NASTY,
        library_version=NASTY,
        metrics={"accuracy": 0.7, AUTOATTACK: 0.4, f"{NASTY}_accuracy": 0.5},
    )
    assert not {"script", "img", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if any(name.startswith("on") or name in ("href", "src") for name in a)]
    assert page.text.count("<script>alert(1)</script>") > 15


def picture(path: Path) -> Path:
    Image.new("RGB", (4, 3), "red").save(path)
    return path


def test_the_pictures_of_the_folder_are_inside_in_their_order(tmp_path: Path):
    for name in reversed(list(PICTURES)):
        picture(tmp_path / name)
    picture(tmp_path / "other.png")
    curve = {"points": [[0, 0.7], [0.1, 0.0]], "n": 10, "steps": 20, "remark": "The accuracy falls to 0.0 %."}
    file = write_html_report(report(curve=curve), tmp_path)
    page = Page(file.read_text(encoding="utf-8"))
    images = [values for tag, values in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [alternative for alternative, _ in PICTURES.values()]
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    data = base64.b64decode(str(images[0]["src"]).partition(",")[2])
    assert data == (tmp_path / "robustness_curve.png").read_bytes()
    assert page.text.count("The accuracy falls to 0.0 %.") == 1
    assert "://" not in re.sub(r"data:image/png;base64,[^\"]*", "", file.read_text(encoding="utf-8"))


def test_pictures_can_be_chosen_or_be_none(tmp_path: Path):
    chosen = picture(tmp_path / "my_own.jpg")
    picture(tmp_path / "classes.png")
    page = Page(write_html_report(report(), tmp_path / "deep", pictures=[chosen]).read_text(encoding="utf-8"))
    (image,) = [values for tag, values in page.tags if tag == "img"]
    assert image["alt"] == "Picture: my own." and str(image["src"]).startswith("data:image/jpeg")
    assert "Pictures" not in Page(write_html_report(report(), tmp_path, pictures=[]).read_text(encoding="utf-8")).text


def test_a_mapping_with_nothing_but_a_metric_is_enough(tmp_path: Path):
    page = Page(write_html_report({"metrics": {"accuracy": 0.5}}, tmp_path).read_text(encoding="utf-8"))
    assert page.tables["Metrics of the evaluation"][1] == ["Accuracy on clean images accuracy", "50.0 %", "", "", ""]
    assert "The model classifies 50.0 % of the images of the data set correctly." in page.text


def test_the_page_of_a_stored_report_is_the_same(tmp_path: Path):
    given = report(leaderboard=closest_row("DynACL", "slf").to_dict(), warnings=["Only few images."])
    given.save(tmp_path)
    assert render_html(EvaluationReport.load(tmp_path)) == render_html(given)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"metrics": {}}, ValueError, "no metrics: measure one first"),
        ({}, ValueError, "no metrics"),
        ({"metrics": {"accuracy": 74.1}}, ValueError, r"accuracy is 74\.1, .*: divide percent by 100"),
        (3, TypeError, "got a int; a report is an EvaluationReport or a mapping"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, values, error, message):
    with pytest.raises(error, match=message):
        write_html_report(values, tmp_path)
    assert not list(tmp_path.iterdir())
