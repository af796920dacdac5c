"""Sentences about what was noticed: said when it matters, silent when it does not."""

from __future__ import annotations

import pytest

from hf_robust.evaluation.autoattack_findings import Findings, explain

HONEST = [("apgd-ce", 0.53), ("apgd-t", 0.50), ("fab-t", 0.50), ("square", 0.50)]


def test_nothing_noticed_nothing_said() -> None:
    assert explain(Findings(examined=100), 0.8, HONEST, 1000) == []
    rare = Findings(examined=100, blind_margin=10, blind_loss=10)
    assert explain(rare, 0.8, HONEST, 1000) == [], "a tenth is not yet masking"


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        (Findings(examined=100, blind_margin=11), "11 of 100 rightly classified images the gradient of the logits"),
        (Findings(examined=100, blind_loss=11, largest_margin=2310.0), "so far apart (by up to 2.31e+03)"),
        (Findings(examined=100, zero_starts=7), "at 7 starting points"),
        (Findings(randomised=True), "different logits twice"),
        (Findings(probabilities=True), "look like probabilities"),
        (Findings(dynamic=True), "computes gradients while it classifies"),
        (Findings(rejected=3), "3 images came back from an attack outside the budget"),
        (Findings(was_training=True), "was in train mode"),
        (Findings(weights={"bfloat16", "float64"}), "type bfloat16, float64 were evaluated in float32"),
        (Findings(outputs={"float16"}), "logits of type float16"),
    ],
)
def test_each_symptom_has_its_sentence(findings: Findings, words: str) -> None:
    (sentence,) = explain(findings, 0.8, HONEST, 1000)
    assert words in sentence and sentence.endswith(".")


def test_gaps_between_attacks_are_said_from_their_limits_on() -> None:
    stages = [("apgd-ce", 0.61), ("apgd-t", 0.50), ("fab-t", 0.50), ("square", 0.497)]
    loss, square = explain(Findings(), 0.8, stages, 1000)
    assert loss.startswith("APGD on the cross-entropy left 61.0%, APGD on logits 50.0%")
    assert "broke 3 more images (50.0% to 49.7%)" in square
    stages = [("apgd-ce", 0.60), ("apgd-dlr", 0.50), ("fab-t", 0.50), ("square", 0.498)]
    assert explain(Findings(), 0.8, stages, 1000) == []
    assert explain(Findings(), 0.8, [("fab-t", 0.50), ("square", 0.49)], 100) == [], "one image of a hundred"
    assert len(explain(Findings(), 0.8, [("fab-t", 0.50), ("square", 0.48)], 100)) == 1
    assert explain(Findings(), 0.8, [("square", 0.5)], 1000) == [], "alone, Square is not compared"


def test_what_several_processes_found_adds_up() -> None:
    one = Findings(was_training=True, weights={"float16"}, examined=3, blind_loss=1, largest_margin=2.0, zero_starts=4)
    two = Findings(dynamic=True, weights={"float64"}, examined=5, blind_margin=2, largest_margin=1.0, zero_starts=1)
    assert Findings.total([one, two]) == Findings(
        was_training=True,
        dynamic=True,
        weights={"float16", "float64"},
        examined=8,
        blind_margin=2,
        blind_loss=1,
        largest_margin=2.0,
        zero_starts=5,
    )
    assert Findings.from_dict(one.to_dict()) == one and one.to_dict()["weights"] == ["float16"]
