"""The pictures of an evaluation: values at their places, intervals counted by hand, refusals with a way out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import pytest
from PIL import Image

from hf_robust.evaluation.report import binomial_interval
from hf_robust.evaluation.robustness_pictures import (
    FAMILIES,
    curve_doubtful,
    curve_remark,
    plot_class_bars,
    plot_corruptions,
    plot_robustness_curve,
)

EPS = [0, 4 / 255, 8 / 255, 16 / 255, 32 / 255]
CURVE = dict(zip(EPS, [0.75, 0.6, 0.46, 0.2, 0.02], strict=True))
TABLE = {name: [0.7, 0.65, 0.6, 0.5, 0.4] for family in FAMILIES[:4] for name in family}


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


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible())


def outside(figure: Any) -> list[str]:
    """Texts that leave the page."""
    page, found = figure.bbox.padded(1), []
    hidden = [
        label
        for axis in figure.axes
        for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim()))
        for tick in side.get_major_ticks()
        if not min(limits) <= tick.get_loc() <= max(limits)
        for label in (tick.label1, tick.label2)
    ]
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_text() and text.get_visible() and text not in hidden:
            box = text.get_window_extent()
            if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)):
                found.append(text.get_text())
    return found


def lines(axis: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axis.lines}


def test_a_curve_shows_budgets_in_grey_levels_with_its_interval(tmp_path: Path, figures: list[Any]):
    plot_robustness_curve({"ours": CURVE}, tmp_path / "deep" / "curve.png", n=200, chance=0.1)
    (figure,) = figures
    (axis,) = figure.axes
    line = lines(axis)["ours"]
    assert list(line.get_xdata()) == pytest.approx([0, 4, 8, 16, 32])
    assert list(line.get_ydata()) == [0.75, 0.6, 0.46, 0.2, 0.02]
    band = axis.collections[0].get_paths()[0].vertices
    at_8 = sorted(y for x, y in band if x == pytest.approx(8))
    assert (at_8[0], at_8[-1]) == pytest.approx(binomial_interval(0.46, 200))
    assert list(lines(axis)["guessing"].get_ydata()) == [0.1, 0.1]
    text = words(figure)
    assert "PGD-20" in text and "95 % interval, 200 images" in text and "eps 8/255" in text and "L-inf" in text
    assert {0, 8, 32} <= set(axis.get_xticks()) and not outside(figure)
    with Image.open(tmp_path / "deep" / "curve.png") as image:
        assert image.width == 810  # narrow enough for a phone


def test_models_keep_their_own_counts_and_order(tmp_path: Path, figures: list[Any]):
    plain = dict(zip(reversed(EPS), [0.0, 0.0, 0.0, 0.1, 0.9], strict=True))  # budgets in any order
    counts = {"ours": 200, "plain": 1000}
    plot_robustness_curve({"ours": CURVE, "plain": plain}, tmp_path / "c.png", n=counts)
    (axis,) = figures[0].axes
    assert list(lines(axis)["plain"].get_ydata()) == [0.9, 0.1, 0.0, 0.0, 0.0]
    assert "200 or 1,000 images" in words(figures[0])
    low, high = (max(y for x, y in band.get_paths()[0].vertices if x == 0) for band in axis.collections)
    assert (low, high) == pytest.approx((binomial_interval(0.75, 200)[1], binomial_interval(0.9, 1000)[1]))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ours", "plain"]


def test_a_long_name_stays_on_the_page(tmp_path: Path, figures: list[Any]):
    plot_robustness_curve({"some/folder/" * 12: CURVE}, tmp_path / "c.png", chance=0.5)
    plot_class_bars({"some attack " * 12: [0.5], "clean": [0.5]}, tmp_path / "b.png")
    assert [outside(figure) for figure in figures] == [[], []]


def test_without_counts_there_is_no_band_and_l2_has_its_own_unit(tmp_path: Path, figures: list[Any]):
    plot_robustness_curve({"m": {0.0: 0.8, 0.5: 0.5, 1.0: 0.2}}, tmp_path / "c.png", norm="l2", marked_eps=0.5)
    (axis,) = figures[0].axes
    assert not axis.collections and axis.get_legend() is None
    assert list(lines(axis)["m"].get_xdata()) == [0.0, 0.5, 1.0]
    assert "L2" in axis.get_xlabel() and "eps 0.5" in words(figures[0]) and "interval" not in words(figures[0])


@pytest.mark.parametrize(
    ("curve", "norm", "said"),
    [
        (CURVE, "linf", "falls to 2.0 % at eps 32/255"),
        ({0: 0.8, 8 / 255: 0.3, 16 / 255: 0.6, 32 / 255: 0.0}, "linf", "rises from 30.0 % at eps 8/255 to 60.0 %"),
        ({0: 0.8, 8 / 255: 0.30, 16 / 255: 0.31, 32 / 255: 0.0}, "linf", "falls to 0.0 %"),  # within the intervals
        ({0: 0.8, 32 / 255: 0.6}, "linf", "still 60.0 % at eps 32/255"),
        ({0: 0.8, 8 / 255: 0.6}, "linf", "60.0 % at eps 8/255 (200 images), the largest budget tried"),
        ({0: 0.8, 1.0: 0.6}, "l2", "60.0 % at eps 1 (200 images), the largest budget tried"),
    ],
)
def test_a_remark_reads_the_curve_as_an_expert_would(curve, norm, said):
    remark = curve_remark(curve, 200, norm)
    assert said in remark and "(200 images)" in remark
    assert ("masked gradients" in remark) == ("rises" in said or "still" in said)
    assert curve_doubtful(curve, 200, norm) == ("masked gradients" in remark)


@pytest.mark.parametrize("last", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_a_remark_that_finds_nothing_is_no_warning(last):
    for n in (20, 200, 10_000):
        curve = {0: 0.8, 32 / 255: last}
        assert curve_doubtful(curve, n) == ("falls to" not in curve_remark(curve, n))
    assert curve_doubtful(curve, 10_000) == (last > 0.05)


def test_many_images_make_a_small_rise_count():
    curve = {0: 0.8, 8 / 255: 0.30, 16 / 255: 0.33, 32 / 255: 0.0}
    assert "rises" not in curve_remark(curve, 200) and "rises" in curve_remark(curve, 10_000)


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ({}, "two or more each are needed: attack with"),
        ({"ours": {8 / 255: 0.4}}, r"got curves of \{'ours': 1\} budgets"),
        ({"ours": {0: 75.0, 8 / 255: 46.0}}, r"'ours' has the accuracy 75.0, .*: divide percent by 100"),
        ({"ours": {0: 0.7, 8 / 255: math.nan}}, "accuracy nan"),
    ],
)
def test_impossible_curves_are_refused(tmp_path: Path, accuracies, message):
    with pytest.raises(ValueError, match=message):
        plot_robustness_curve(accuracies, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def cells(axis: Any) -> list[list[str]]:
    """The numbers of a heat map, row by row."""
    texts = sorted((round(t.get_position()[1], 2), t.get_position()[0], t.get_text()) for t in axis.texts)
    rows: dict[float, list[str]] = {}
    for y, _, text in texts:
        rows.setdefault(y, []).append(text)
    return list(rows.values())


def colour_at(axis: Any, column: int, row: int) -> Any:
    return next(
        patch.get_facecolor()
        for patch in axis.patches
        if abs(patch.get_x() + 0.48 - column) < 0.3 and abs(patch.get_y() + 0.46 - row) < 0.3
    )


def test_the_heat_map_has_the_benchmarks_means_without_the_extra_corruptions(tmp_path: Path, figures: list[Any]):
    table = {"saturate": [0.1] * 5, **dict(reversed(TABLE.items())), "fog": [0.6, 0.5, 0.4, 0.3, 0.2]}
    plot_corruptions(table, tmp_path / "k.png", clean=0.75, title="CIFAR-10-C", n=10_000)
    (figure,) = figures
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:3] == ["gaussian noise", "shot noise", "impulse noise"] and names[-2:] == ["saturate", "mean"]
    numbers = cells(axis)
    assert numbers[names.index("fog")] == ["60", "50", "40", "30", "20", "40.0"]
    assert numbers[names.index("saturate")][-1] == "10.0"
    severity_1 = (14 * 0.7 + 0.6) / 15
    overall = (14 * sum(TABLE["snow"]) + 2.0) / 75
    assert numbers[-1][0] == f"{100 * severity_1:.1f}" and numbers[-1][-1] == f"{100 * overall:.1f}"
    assert "lost against 75.0 % (clean); 10,000 images per cell" in " ".join(words(figure).split("\n"))
    assert "CIFAR-10-C" in words(figure) and not outside(figure)


def test_a_darker_cell_lost_more_and_nothing_gained_is_not_darker(tmp_path: Path, figures: list[Any]):
    plot_corruptions({"fog": [0.9, 0.75, 0.5, 0.1]}, tmp_path / "k.png", clean=0.75)
    axis = figures[0].axes[0]
    light = [sum(colour_at(axis, column, 0)[:3]) for column in range(4)]
    assert light[0] == light[1] > light[2] > light[3]
    inks = {text.get_text(): text.get_color() for text in axis.texts}
    assert inks["10"] == "white" != inks["90"]


def test_missing_cells_and_unknown_corruptions_are_shown_as_such(tmp_path: Path, figures: list[Any]):
    plot_corruptions({"my_own": {1: 0.3}, "fog": {1: 0.5, 3: 0.4}}, tmp_path / "k.png")
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "3", "mean"]
    assert cells(axis) == [
        ["50", "40", "45.0"],
        ["30", "\u2013", "30.0"],
        ["40.0", "40.0", "40.0"],
    ]
    assert "against the best cell" in words(figures[0]) and not outside(figures[0])


@pytest.mark.parametrize(
    ("table", "message"),
    [({}, "got 0 corruptions without a cell"), ({"fog": {}}, "got 1 corr"), ({"fog": [60.0]}, "divide percent")],
)
def test_impossible_tables_are_refused(tmp_path: Path, table, message):
    with pytest.raises(ValueError, match=message):
        plot_corruptions(table, tmp_path / "k.png")


def widths(axis: Any) -> list[list[float]]:
    return [[bar.get_width() for bar in container] for container in axis.containers]


def test_bars_stand_at_their_class_with_intervals(tmp_path: Path, figures: list[Any]):
    values = {"clean": [0.9, 0.8, math.nan], "AutoAttack": [0.5, 0.1, math.nan]}
    names = ["cat", "a class whose name never seems to end", "none"]
    plot_class_bars(values, tmp_path / "b.png", label_names=names, counts=[100, 10, 0])
    (figure,) = figures
    (axis,) = figure.axes
    assert widths(axis) == [[0.9, 0.8, 0.0], [0.5, 0.1, 0.0]]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == "cat" and labels[1].endswith("\u2026") and len(labels[1]) <= 22
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "clean, mean 85.0 %",
        "AutoAttack, mean 30.0 %",
    ]
    drawn = [tuple(line.get_xdata()) for line in axis.lines]
    assert len(drawn) == 4 and drawn[0] == pytest.approx(binomial_interval(0.9, 100))
    assert drawn[3] == pytest.approx(binomial_interval(0.1, 10))
    assert axis.get_ylim()[0] > axis.get_ylim()[1] and not outside(figure)  # the first class on top


def test_of_many_classes_the_worst_and_the_best_of_the_attack_are_drawn(tmp_path: Path, figures: list[Any]):
    attacked = [(7 * k % 100) / 100 for k in range(100)]
    plot_class_bars({"clean": [0.9] * 100, "PGD-20": attacked, "AutoAttack": attacked}, tmp_path / "b.png")
    (figure,) = figures
    (axis,) = figure.axes
    assert widths(axis)[2] == pytest.approx([k / 100 for k in (*range(10), *range(90, 100))])
    assert [label.get_text() for label in axis.get_yticklabels()][:2] == ["0", str(attacked.index(0.01))]
    assert "the 10 worst and the 10 best of 100 classes" in words(figure) and not outside(figure)
    assert "clean, mean 90.0 %" in words(figure) and "AutoAttack, mean 49.5 %" in words(figure)  # of all classes
    plot_class_bars({"clean": [*attacked[:15], *[math.nan] * 30]}, tmp_path / "b.png")
    assert "the 15 of 45 classes that have images" in words(figures[1])


@pytest.mark.parametrize(
    ("accuracies", "counts", "message"),
    [
        ({}, None, r"got accuracies of \{\} classes"),
        ({"clean": []}, None, "all must have one per class"),
        ({"clean": [0.5, 0.5], "attacked": [0.5]}, None, r"\{'clean': 2, 'attacked': 1\}"),
        ({"clean": [0.5, 0.5]}, [3], "and 1 counts"),
        ({"clean": [50.0]}, None, "divide percent by 100"),
    ],
)
def test_impossible_classes_are_refused(tmp_path: Path, accuracies, counts, message):
    with pytest.raises(ValueError, match=message):
        plot_class_bars(accuracies, tmp_path / "b.png", counts=counts)


def test_nothing_of_matplotlib_is_left_changed(tmp_path: Path):
    before = dict(matplotlib.rcParams)
    plot_class_bars({"clean": [0.5]}, tmp_path / "b.png")
    plot_corruptions({"fog": [0.5]}, tmp_path / "k.png")
    plot_robustness_curve({"ours": CURVE}, tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before
