"""The pictures: what is drawn, the size on paper, and nothing left behind in matplotlib or the random state."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_robust.attacks import PGD
from hf_robust.evaluation.curves import plot_curves
from hf_robust.evaluation.pictures import RIGHT, WRONG, plot_examples


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


def history(robust: bool = True, steps: int = 20) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        place = {"epoch": step / 2, "step": step}
        terms = (
            {"loss": 5 / step, "loss_clean": 2 / step, "loss_adversarial": 3 / step} if robust else {"loss": 4 / step}
        )
        entries.append({**terms, "learning_rate": 0.1, "strength": 1 - step / steps, "grad_norm": 1.0, **place})
        if step % 5 == 0:
            probes = {"probe_standard_accuracy": 0.9, "probe_pgd20_linf_8_255_accuracy": 0.5 if robust else 0.0}
            entries.append({**probes, **place})
    return [*entries, {"train_loss": 1.0, "train_runtime": 2.0, "epoch": steps / 2, "step": steps}]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def labels_of(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def inside(figure: Any) -> bool:
    """Whether every text lies on the page."""
    page = figure.bbox.padded(1)
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    return all(page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1) for box in boxes)


def test_curves_of_one_run(tmp_path: Path, figures: list[Any]) -> None:
    plot_curves(history(), tmp_path / "new" / "curves.png", chance=0.1)
    width, height = size_of(tmp_path / "new" / "curves.png")
    assert 1000 <= width <= 2000 and 800 <= height <= 2000
    losses, probes, schedule = figures[0].axes[:3]
    assert labels_of(losses) == ["total", "clean", "adversarial"]
    assert labels_of(probes) == ["standard", "PGD-20 (L-inf, eps 8/255)", "chance"]
    assert labels_of(schedule) == ["learning rate", "strength"]
    standard, attacked = probes.get_lines()[:2]
    assert (standard.get_linestyle(), attacked.get_linestyle()) == ("-", "--")
    assert standard.get_color() == attacked.get_color()
    assert list(standard.get_xdata()) == [2.5, 5.0, 7.5, 10.0] and list(attacked.get_ydata()) == [0.5] * 4
    assert losses.get_shared_x_axes().joined(losses, schedule)
    assert inside(figures[0])


def test_every_run_has_its_own_colour(tmp_path: Path, figures: list[Any]) -> None:
    plot_curves({"ACL": history(), "SimCLR": history(False)}, tmp_path / "curves.png")
    losses, probes = figures[0].axes[:2]
    assert labels_of(losses) == ["ACL: total", "ACL: clean", "ACL: adversarial", "SimCLR: total"]
    colours = [line.get_color() for line in probes.get_lines()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert "chance" not in " ".join(labels_of(probes))
    assert inside(figures[0])


def test_empty_panels_gaps_and_a_doubled_single_term_are_left_out(tmp_path: Path, figures: list[Any]) -> None:
    entries = [{"loss": 3.0, "loss_clean": 3.0, "step": 1}, {"loss": math.nan, "loss_clean": math.nan, "step": 2}]
    plot_curves([*entries, {"loss": 2.0, "loss_clean": 2.0, "step": 3}], tmp_path / "curves.png")
    (losses,) = figures[0].axes
    assert labels_of(losses) == ["total"] and losses.get_xlabel() == "step"
    assert list(losses.get_lines()[0].get_xdata()) == [1.0, 3.0]


def test_a_long_run_is_drawn_as_its_running_mean(tmp_path: Path, figures: list[Any]) -> None:
    noisy = [{"loss": 4.0 + (-1) ** step, "epoch": step / 100} for step in range(400)]
    plot_curves(noisy, tmp_path / "curves.png")
    trace, mean = figures[0].axes[0].get_lines()
    assert trace.get_alpha() < 0.5 and max(trace.get_ydata()) == 5.0
    assert all(abs(value - 4.0) < 0.1 for value in mean.get_ydata())


def test_with_a_coreset_the_published_clock_is_drawn(tmp_path: Path, figures: list[Any]) -> None:
    rounds = [{"loss": 3.0 - k, "epoch": 4.0 + k, "paper_epoch": 2.0 + k, "step": 9 * k} for k in range(3)]
    full = [{"loss": 4.0 - k, "epoch": 2.0 + k, "step": 20 * k} for k in range(3)]
    plot_curves({"RCS": rounds, "full": full}, tmp_path / "curves.png")
    first, second = figures[0].axes[0].get_lines()[:2]
    assert list(first.get_xdata()) == list(second.get_xdata()) == [2.0, 3.0, 4.0]
    assert figures[0].axes[-1].get_xlabel() == "epoch"


@pytest.mark.parametrize("nothing", [[], {}, [{"grad_norm": 1.0, "step": 1}]])
def test_an_empty_history_is_refused(tmp_path: Path, nothing: Any) -> None:
    with pytest.raises(ValueError, match="log_history"):
        plot_curves(nothing, tmp_path / "curves.png")


def dark_or_light(x: Tensor) -> Tensor:
    light = 40 * (x.mean((1, 2, 3)) - 0.5)
    return torch.stack([-light, light], 1)


def never(x: Tensor) -> Tensor:
    return torch.stack([x.sum((1, 2, 3)), x.sum((1, 2, 3)) + 1], 1)


LEVELS = torch.tensor([0.2, 0.51, 0.8]).view(3, 1, 1, 1).expand(3, 3, 8, 8).contiguous()


def captions(axis: Any) -> list[tuple[str, str]]:
    return [(text.get_text(), text.get_color()) for text in axis.texts]


def test_examples_show_every_prediction_in_its_colour(tmp_path: Path, figures: list[Any]) -> None:
    random, path = torch.get_rng_state(), tmp_path / "examples.png"
    classifiers = {"ACL": dark_or_light, "SimCLR": never}
    plot_examples(
        classifiers, LEVELS, torch.tensor([0, 1, 1]), path, attack=PGD(steps=5), label_names=["dark", "light"]
    )
    assert torch.equal(torch.get_rng_state(), random)
    width, height = size_of(path)
    assert 600 <= width <= 2000 and 600 <= height <= 2000
    axes = figures[0].axes
    assert len(axes) == 3 * 5
    texts = [text.get_text() for text in figures[0].texts]
    assert "PGD-5, L-inf, eps 8/255" in texts and "ACL" in texts and "SimCLR" in texts
    assert axes[1].get_title() == "change \u00d7 10"
    assert captions(axes[0]) == [("ACL: dark  100 %", RIGHT), ("SimCLR: light  73 %", WRONG)]
    assert [axes[row * 5].get_ylabel() for row in range(3)] == ["dark", "light", "light"]
    # 0.51 lies within 8/255 of the border: right before the attack, wrong after it.
    assert captions(axes[5])[0][1] == RIGHT and captions(axes[7])[0][1] == WRONG
    assert captions(axes[12])[0][1] == RIGHT
    assert axes[0].images[0].get_interpolation() == "nearest"
    assert inside(figures[0])


def test_the_amplified_change_is_drawn_about_grey(tmp_path: Path, figures: list[Any]) -> None:
    attack = PGD(eps=8 / 255, step_size=8 / 255, steps=3, random_start=False)
    arguments = {"attack": attack, "amplification": 5.0}
    plot_examples({"one": dark_or_light}, LEVELS[:1], torch.tensor([0]), tmp_path / "e.png", **arguments)
    change = figures[0].axes[1].images[0].get_array()
    assert float(change.min()) == pytest.approx(0.5 + 5 * 8 / 255, abs=1e-6) == float(change.max())
    assert captions(figures[0].axes[0]) == [("0  100 %", RIGHT)]


def test_names_with_dollars_and_long_names_do_no_harm(tmp_path: Path, figures: list[Any]) -> None:
    names = ["a$b_$", "a name that goes on and on"]
    labels = torch.tensor([0, 1, 1])
    plot_examples({"x$": dark_or_light}, LEVELS, labels, tmp_path / "e.png", attack=PGD(steps=1), label_names=names)
    assert captions(figures[0].axes[0])[0][0].startswith("a$b_$")
    assert figures[0].axes[6].get_ylabel() == "a name that g\u2026"
    assert inside(figures[0])


@pytest.mark.parametrize(
    ("classifiers", "images", "labels"),
    [
        ({}, LEVELS, [0, 1, 1]),
        ({"a": never}, LEVELS[:0], []),
        ({"a": never}, LEVELS, [0]),
        ({"a": never}, LEVELS[0], [0]),
    ],
)
def test_nothing_to_show_is_refused(tmp_path: Path, classifiers: dict, images: Tensor, labels: list[int]) -> None:
    with pytest.raises(ValueError, match="cut a batch"):
        plot_examples(classifiers, images, torch.tensor(labels), tmp_path / "e.png", attack=PGD(steps=1))


def test_no_figure_state_and_no_setting_is_left_behind(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    plot_curves(history(), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded
