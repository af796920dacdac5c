"""Figures in words: the sentence people quote, names of metrics, and what limits a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from hf_robust.evaluation.leaderboard import closest_row
from hf_robust.evaluation.report import binomial_interval
from hf_robust.evaluation.report_texts import (
    attack_metrics,
    images_of,
    interval_of,
    kind_title,
    metric_title,
    report_fields,
    reservations,
    summary_sentence,
    title_of,
    written,
)

METRICS = {
    "accuracy": 0.741,
    "pgd20_linf_8_255_accuracy": 0.471,
    "autoattack_linf_8_255_accuracy": 0.433,
    "generated_corruptions_mean_accuracy": 0.652,
}


def report(**changes: Any) -> dict[str, Any]:
    values = {"metrics": METRICS, "n": 1000, "preset": "standard", "model": {"name": "thin"}, "dataset": "cifar10"}
    return {**values, **changes}


def only(*names: str) -> dict[str, float]:
    return {name: METRICS[name] for name in names}


def test_the_sentence_says_clean_attacked_and_corrupted():
    low, high = binomial_interval(0.433, 1000)
    assert summary_sentence(report()) == (
        "thin classifies 74.1 % of 1,000 images of cifar10 correctly. It classifies 43.3 % correctly (95 % interval "
        f"{100 * low:.1f} % to {100 * high:.1f} %) when AutoAttack may make changes of at most eps 8/255 (L-inf). "
        "It classifies 65.2 % of images with generated corruptions correctly, in the mean."
    )


def test_a_weaker_attack_is_called_an_upper_bound():
    pgd = summary_sentence(report(metrics=only("accuracy", "pgd20_linf_8_255_accuracy")))
    assert "47.1 % correctly" in pgd and "PGD-20 may" in pgd and "not run, so this is an upper bound" in pgd
    fast = summary_sentence(report(metrics={"autoattackfast_linf_8_255_accuracy": 0.44}, preset="fast"))
    assert "thin classifies 44.0 %" in fast and "two APGD attacks may make" in fast and "upper bound" in fast
    assert "preset 'fast', so this is an upper bound" in summary_sentence(report(preset="fast"))
    assert "upper bound" not in summary_sentence(report())


def test_published_corruptions_have_their_name():
    text = summary_sentence(report(metrics={"accuracy": 0.7, "cifar10c_mean_accuracy": 0.6}))
    assert text.endswith("It classifies 60.0 % of CIFAR-10-C correctly, in the mean.")


def test_autoattack_counts_first_even_when_pgd_is_lower_by_chance():
    metrics = {"pgd20_linf_8_255_accuracy": 0.40, "autoattack_linf_8_255_accuracy": 0.41, "pgd10_l2_0.5_accuracy": 0.3}
    assert attack_metrics(metrics) == [
        "autoattack_linf_8_255_accuracy",
        "pgd10_l2_0.5_accuracy",
        "pgd20_linf_8_255_accuracy",
    ]
    assert attack_metrics({"accuracy": 0.5, "cifar10c_mean_accuracy": 0.4}) == []


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("accuracy", "Accuracy on clean images"),
        ("standard_accuracy", "Accuracy on clean images"),
        ("pgd20_linf_8_255_accuracy", "PGD-20 accuracy (L-inf, eps 8/255)"),
        ("autoattack_l2_0.5_accuracy", "AutoAttack accuracy (L2, eps 0.5)"),
        ("cifar100c_mean_accuracy", "CIFAR-100-C, mean accuracy"),
        ("generated_corruptions_partial_mean_accuracy", "Generated corruptions partial mean accuracy"),
    ],
)
def test_metrics_have_names_for_people(name, title):
    assert metric_title(name) == title


def test_kinds_have_names_for_people():
    assert [kind_title(kind) for kind in ("clean", "pgd20", "autoattack")] == ["clean", "PGD-20", "AutoAttack"]
    assert kind_title("autoattack", "fast") == "AutoAttack's two APGD attacks"  # a part has not the name of the whole
    assert (
        kind_title("autoattack", None) == "AutoAttack" and kind_title("autoattack", "smoke") == "AutoAttack cut short"
    )


def test_intervals_are_those_of_the_report_or_of_the_count():
    values = report(intervals={"accuracy": [0.7, 0.8]}, n={"pgd20_linf_8_255_accuracy": 100})
    assert interval_of(values, "accuracy") == (0.7, 0.8)
    assert interval_of(values, "pgd20_linf_8_255_accuracy") == binomial_interval(0.471, 100)
    assert interval_of(values, "autoattack_linf_8_255_accuracy") is None  # nobody said how many images
    assert interval_of(report(), "generated_corruptions_mean_accuracy") is None
    assert images_of(report(corruptions={"n": 10_000}), "cifar10c_mean_accuracy") == 10_000  # of the arrays
    assert images_of(report(corruptions={"n": 10_000}), "accuracy") == report()["n"]


def test_reservations_name_what_differs_and_nothing_else():
    row = closest_row("DynACL", "slf").to_dict()
    same = report(n=10_000, model={"name": "m", "parameters": 11_173_962}, dataset={"name": "c", "image_size": 32})
    assert len(reservations(same, row)) == 1 and "ResNet-18" in reservations(same, row)[0]
    other = report(
        n=200, preset="smoke", model={"name": "m", "parameters": 702_346}, dataset={"name": "c", "image_size": 64}
    )
    said = " ".join(reservations(other, closest_row("DeACL", "slf").to_dict()))
    assert "of 200 images" in said and "preset 'smoke'" in said and "0.7 million parameters" in said
    tiny = report(model={"name": "m", "parameters": 4_482})
    assert "Ours has 4,482 parameters" in " ".join(reservations(tiny, row))
    assert "64 pixels, published are 32" in said and "46.14 / 80.82" in said


def test_values_are_written_for_people():
    assert written({"clean": {"forwards": 12_345, "backwards": 0}, "pgd20": {"forwards": 1}}) == (
        "clean forwards 12,345, backwards 0; pgd20 forwards 1"
    )
    assert written([0.123456, True, None, "x"]) == "0.1235, yes, None, x"
    assert written(list(range(15))).endswith("11 and 3 more") and written(21420.34) == "21,420"


def test_reports_are_mappings_or_dataclasses():
    @dataclass
    class Given:
        metrics: dict[str, float] = field(default_factory=lambda: METRICS)
        n: int = 1000

    assert report_fields(Given())["n"] == 1000 and report_fields(None) == report_fields("cifar10") == {}
    assert summary_sentence(Given()).startswith("The model classifies 74.1 % of 1,000 images of the data set")
    assert title_of({"name": None}, "the model") == "the model"
    for wrong in (3, Given):
        with pytest.raises(TypeError, match="a report is an EvaluationReport or a mapping"):
            report_fields(wrong)
