"""Curves of fine-tuning: accuracies on validation images, the weights of AutoLoRa, rates that fall by factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from hf_robust.evaluation.curves import plot_curves


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures saved during a test."""
    saved: list[Any] = []
    original = matplotlib.figure.Figure.savefig

    def savefig(figure: Any, *arguments: Any, **options: Any) -> None:
        original(figure, *arguments, **options)
        saved.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def history(weights: bool = True, divisor: float = 2.0) -> list[dict[str, float]]:
    """Four epochs of two steps, the rate falls after each."""
    entries: list[dict[str, float]] = []
    for epoch in range(4):
        if weights:
            share = 0.2 * (epoch + 1)
            place = {"epoch": float(epoch), "step": 2 * epoch}
            entries.append({"path_standard_accuracy": share, "lambda_1": 1 - share, "lambda_2": 6 * share, **place})
        for step in (1, 2):
            place = {"epoch": epoch + step / 2, "step": 2 * epoch + step}
            entries.append({"loss": 2.0, "loss_kl": 1.0, "learning_rate": 0.1 / divisor**epoch, **place})
        found = {"validation_standard_accuracy": 0.8, "validation_pgd20_linf_8_255_accuracy": 0.1 * epoch}
        entries.append({**found, **place})
    return entries


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def labels_of(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def ticks(axis: Any) -> list[str]:
    low, high = axis.get_ylim()
    return [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]


def test_panels_of_a_fine_tuning_run(tmp_path: Path, figures: list[Any]) -> None:
    plot_curves(history(), tmp_path / "curves.png", chance=0.1)
    assert titles(figures[0]) == ["Loss terms", "Validation images", "Loss weights", "Schedule"]
    losses, accuracies, weights, schedule = figures[0].axes
    assert labels_of(losses) == ["total", "kl"]
    assert labels_of(accuracies) == ["standard", "PGD-20 (L-inf, eps 8/255)", "chance"]
    assert labels_of(weights) == ["\u03bb\u2081 (clean term)", "\u03bb\u2082 (divergence)"]
    standard, attacked, _ = accuracies.get_lines()
    assert list(attacked.get_xdata()) == [1.0, 2.0, 3.0, 4.0] and list(attacked.get_ydata()) == [0, 0.1, 0.2, 0.1 * 3]
    first, second = weights.get_lines()
    assert list(first.get_xdata()) == [0.0, 1.0, 2.0, 3.0] and first.get_drawstyle() == "steps-post"
    assert list(first.get_ydata()) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert list(second.get_ydata()) == pytest.approx([1.2, 2.4, 3.6, 4.8])
    assert list(schedule.get_lines()[0].get_ydata()) == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
    assert schedule.get_xlabel() == "epoch"


def test_methods_without_weights_have_no_such_panel_and_runs_have_their_colours(
    tmp_path: Path, figures: list[Any]
) -> None:
    plot_curves({"SLF": history(False)}, tmp_path / "one.png")
    assert titles(figures[0]) == ["Loss terms", "Validation images", "Schedule"]
    plot_curves({"AutoLoRa": history(), "SLF": history(False)}, tmp_path / "two.png")
    weights = figures[1].axes[2]
    assert labels_of(weights) == ["AutoLoRa: \u03bb\u2081 (clean term)", "AutoLoRa: \u03bb\u2082 (divergence)"]
    assert len({line.get_color() for line in weights.get_lines()}) == 1
    assert len({line.get_color() for line in figures[1].axes[1].get_lines()}) == 2


def test_probe_and_validation_share_a_panel(tmp_path: Path, figures: list[Any]) -> None:
    probes = [{"probe_standard_accuracy": 0.5, "epoch": 1.0}]
    plot_curves({"ACL": probes, "SLF": history(False)}, tmp_path / "curves.png")
    assert titles(figures[0])[1] == "Accuracy"
    plot_curves({"ACL": probes}, tmp_path / "curves.png")
    assert titles(figures[1]) == ["Linear probe"]


@pytest.mark.parametrize(
    ("divisor", "scale", "shown"), [(2.0, "log", "0.05"), (10.0, "log", "0.001"), (1.0, "linear", "0.10")]
)
def test_rates_that_fall_by_factors_are_drawn_on_a_scale_of_factors(
    tmp_path: Path, figures: list[Any], divisor: float, scale: str, shown: str
) -> None:
    plot_curves(history(divisor=divisor), tmp_path / "curves.png")
    schedule = figures[0].axes[-1]
    assert schedule.get_yscale() == scale and shown in ticks(schedule)
    assert not any("$" in text for text in ticks(schedule))


def test_pre_training_keeps_its_linear_scale(tmp_path: Path, figures: list[Any]) -> None:
    entries = [{"learning_rate": rate, "epoch": float(i)} for i, rate in enumerate((1.0, 0.1, 0.001))]
    plot_curves(entries, tmp_path / "curves.png")
    assert figures[0].axes[0].get_yscale() == "linear" and figures[0].axes[0].get_ylim()[0] == 0


def test_ticks_of_a_loss_that_falls_far_are_numbers(tmp_path: Path, figures: list[Any]) -> None:
    plot_curves([{"loss": 10.0**-i, "epoch": float(i)} for i in range(4)], tmp_path / "curves.png")
    axis = figures[0].axes[0]
    assert axis.get_yscale() == "log" and {"1", "0.1", "0.01", "0.001"} <= set(ticks(axis))


def test_five_loss_terms_of_two_runs_are_told_apart(tmp_path: Path, figures: list[Any]) -> None:
    """ACL-AIR has so many; the colour says whose they are."""
    terms = {f"loss_{name}": 1.0 for name in ("clean", "adversarial", "standard_invariance", "robust_invariance")}
    runs = {name: [{"loss": 2.0, **terms, "epoch": e, "step": e} for e in (1.0, 2.0)] for name in ("a", "b")}
    plot_curves(runs, tmp_path / "curves.png")
    lines = figures[0].axes[0].get_lines()
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(lines) == 10
