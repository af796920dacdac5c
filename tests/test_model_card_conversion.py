"""Sections of a card for weights that others trained."""

from __future__ import annotations

import pytest

from hf_robust.evaluation.report import EncoderReport
from hf_robust.model_card import write_model_card
from hf_robust.model_card_conversion import (
    conversion,
    converted_introduction,
    converted_limits,
    converted_threat_model,
)

START = {
    "format": "robustbench",
    "file": "Carmon.pt",
    "sha256": "ab" * 32,
    "branch": "single",
    "source": "RobustBench/robustbench",
    "notes": ["left out: a | b"],
}
METRICS = {"standard_accuracy": 0.8, "pgd20_linf_8_255_accuracy": 0.5}


def report(**changes) -> EncoderReport:
    values = {"name": "x", "architecture": "wide_resnet28_10", "exported_format": "hf_robust_timm"}
    return EncoderReport(**{**values, "converted_from": START, **changes})


def test_the_introduction_gives_file_and_owner():
    text = converted_introduction(report(task="classifier", label_names=["a", "b"]))
    assert text.startswith("# x\n\nImage classifier `wide_resnet28_10` of 2 classes, converted with hf_robust from")
    assert "`Carmon.pt`. The weights" in text and "RobustBench/robustbench." in text and "licence" in text
    assert "(norm branch `adv`)" in converted_introduction(report(norm_branch="adv"))


def test_the_conversion_is_a_table_with_notes():
    text = conversion(report(image_size=32, model_args={"depth": 34}, label_names=list("ab"), task="classifier"))
    assert f"| sha256 | {'ab' * 32} |" in text and "| architecture | wide_resnet28_10 (depth=34) |" in text
    assert "| classes | a, b |" in text and text.endswith("\n\n- left out: a \\| b")
    assert "commit" not in text, "what is unknown has no row"


@pytest.mark.parametrize("measured", [True, False])
def test_what_is_said_of_robustness_was_measured(measured):
    results = [{"model": "x", "metrics": METRICS, "protocol": "evaluation"}] if measured else []
    threat, limits = converted_threat_model(report(results=results)), converted_limits(report(results=results))
    assert ("nothing was measured here" in threat) is not measured
    assert ("upper bound" in limits) is measured and "has to be measured" in limits


def test_the_card_has_these_sections_and_no_claim(tmp_path):
    text = write_model_card(report(), tmp_path).read_text()
    assert "## Conversion" in text and "recipe" not in text and "Not robust" not in text
    assert "self-supervised-learning" not in text and "license" not in text.split("---")[1]
