"""The picture of the selections: numbers counted by hand, images at their places, refusals with a way out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from hf_robust.coresets.base import Coreset
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.coreset_pictures import _expected_times, _figure, plot_coresets
from hf_robust.evaluation.picture_style import picture_style


def coreset(
    indices: list[int], epoch: float = 0.0, size: int = 10, pool: int | None = None, **changes: Any
) -> Coreset:
    pool = pool or size
    values = dict(fraction=0.5, effective_fraction=len(indices) / pool, epoch=epoch, round=int(epoch), seconds=1.25)
    values = {"method": "random(fraction=0.5)", "dataset": "tensors", **values, **changes}
    return Coreset(indices, dataset_size=size, pool_size=pool, **values)


def dataset(size: int = 10, labels: list[int] | None = None, names: list[str] | None = None) -> ImageDataset:
    """Image k is filled with the value k."""
    images = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    return ImageDataset.from_tensors(images, None if labels is None else torch.tensor(labels), names)


def draw(coresets: list[Coreset], data: ImageDataset) -> Any:
    with picture_style():
        figure = _figure(coresets, data)
        figure.draw_without_rendering()
    return figure


def panel(figure: Any, start: str) -> Any:
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left").startswith(start)]
    return axis


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def heights(container: Any) -> list[float]:
    return [bar.get_height() for bar in container]


def tiles(axis: Any, rows: int, columns: int) -> list[int]:
    """Grey values of the tiles of a mosaic of 4 x 4 images with a gap of one pixel; 255 is an empty place."""
    mosaic = axis.images[0].get_array()
    assert mosaic.shape == (5 * rows - 1, 5 * columns - 1, 3)
    return [int(mosaic[5 * row + 1, 5 * column + 1, 0]) for row in range(rows) for column in range(columns)]


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other, and texts that leave the page."""
    page, found = figure.bbox.padded(1), []
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    # Ticks outside the limits of an axis are invisible though they say otherwise; rotated names cover in boxes only.
    hidden = {label for axis in figure.axes for label in _hidden_ticks(axis)}
    boxes = [
        (t.get_text(), t.get_window_extent().padded(-2)) for t in texts if t not in hidden and not t.get_rotation()
    ]
    for number, (text, box) in enumerate(boxes):
        if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)):
            found.append((text, "the page"))
        found += [(text, other) for other, place in boxes[number + 1 :] if box.overlaps(place)]
    return found


def _hidden_ticks(axis: Any) -> list[Any]:
    labels = []
    for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        shown = axis.axison
        for tick in side.get_major_ticks():
            if not shown or not low <= tick.get_loc() <= high:
                labels += [tick.label1, tick.label2]
    return labels


def test_class_shares_and_their_spread() -> None:
    data = dataset(10, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2], ["cat", "dog", "eel"])
    axis = panel(draw([coreset([0, 1, 5, 8])], data), "Classes of the coreset")
    chosen, whole = [c for c in axis.containers if isinstance(c, matplotlib.container.BarContainer)]
    assert heights(chosen) == pytest.approx([2 / 4, 1 / 4, 1 / 4])
    assert heights(whole) == pytest.approx([5 / 10, 3 / 10, 2 / 10])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog", "eel"]
    # Four of ten: the count of a class with share p has variance 4 p (1 - p) 6 / 9.
    (errors,) = [c for c in axis.containers if isinstance(c, matplotlib.container.ErrorbarContainer)]
    ends = [segment[:, 1] for segment in errors.lines[2][0].get_segments()]
    spread = [math.sqrt(4 * p * (1 - p) * 6 / 9) / 4 for p in (0.5, 0.3, 0.2)]
    assert [end[1] for end in ends] == pytest.approx([p + 2 * s for p, s in zip((0.5, 0.3, 0.2), spread, strict=True)])
    assert [end[0] for end in ends] == pytest.approx([max(0, 0.5 - 2 * spread[0]), 0, 0])


def test_spread_is_that_of_random_subsets() -> None:
    data = dataset(100, [0] * 30 + [1] * 70)
    axis = panel(draw([coreset(list(range(40)), size=100)], data), "Classes")
    (errors,) = [c for c in axis.containers if isinstance(c, matplotlib.container.ErrorbarContainer)]
    drawn = np.ptp(errors.lines[2][0].get_segments()[0][:, 1]) / 4
    generator = np.random.default_rng(0)
    shares = [(generator.permutation(100)[:40] < 30).mean() for _ in range(4000)]
    assert drawn == pytest.approx(np.std(shares), rel=0.05)


def test_many_classes_are_sorted_ratios() -> None:
    # Class k has images 4k to 4k + 3; 23 classes give one, class 7 gives all four, class 9 none.
    labels = [k for k in range(25) for _ in range(4)]
    indices = sorted([4 * k for k in range(25) if k not in (7, 9)] + [28, 29, 30, 31])
    figure = draw([coreset(indices, size=100)], dataset(100, labels))
    axis = panel(figure, "Classes of the coreset")
    assert heights(axis.containers[0]) == pytest.approx([(k / 27) / (4 / 100) for k in [4, *[1] * 23, 0]])
    random = axis.get_lines()[0].get_ydata()
    assert len(random) == 25 and all(np.diff(random) <= 0) and random.mean() == pytest.approx(1)
    assert 1.2 < random[0] < 3.0 and random[-1] < 0.5
    assert "first: 7 (\u00d7 3.70)" in axis.get_xlabel() and axis.get_xlabel().endswith("9 (\u00d7 0.00)")
    assert "the 25 classes" in axis.get_xlabel()


def test_classes_without_images_are_left_out() -> None:
    data = dataset(10, [0] * 5 + [3] * 5, [f"class {k}" for k in range(40)])
    axis = panel(draw([coreset([0, 9])], data), "Classes")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["class 0", "class 3"]


def test_examples_are_evenly_spaced() -> None:
    figure = draw([coreset(list(range(20, 148)), size=200)], dataset(200))
    assert titles(figure) == ["Images of the coreset"]
    assert tiles(figure.axes[0], 4, 16) == list(range(20, 148, 2))
    assert tiles(draw([coreset([3, 4, 7])], dataset()).axes[0], 1, 16) == [3, 4, 7] + [255] * 13


def test_times_chosen_and_overlap_counted_by_hand() -> None:
    chosen = [coreset([0, 1, 2, 3], 5), coreset([0, 1, 4, 5], 10), coreset([0, 4, 5, 6], 15.5)]
    figure = draw(chosen, dataset())
    assert titles(figure)[0] == "Images of the last coreset" and len(figure.axes) == 4
    assert tiles(panel(figure, "Images"), 4, 8)[:5] == [0, 4, 5, 6, 255]
    assert tiles(panel(figure, "Never chosen: 3"), 4, 8)[:4] == [7, 8, 9, 255]
    times = panel(figure, "How often")
    # 7 8 9 never; 2 3 6 once; 1 4 5 twice; 0 three times.
    assert heights(times.containers[0]) == pytest.approx([0.3, 0.3, 0.3, 0.1])
    binomial = [math.comb(3, k) * 0.4**k * 0.6 ** (3 - k) for k in range(4)]
    assert times.get_lines()[0].get_ydata() == pytest.approx(binomial)
    overlap, chance = panel(figure, "Overlap").get_lines()
    assert list(overlap.get_xdata()) == [10, 15.5] and list(overlap.get_ydata()) == [0.5, 0.75]
    assert list(chance.get_ydata()) == pytest.approx([0.4, 0.4])


def test_chance_follows_the_sizes() -> None:
    chosen = [coreset([0, 1], 1), coreset([0, 1, 2, 3, 4], 2), coreset([5, 6], 3)]
    assert _expected_times(chosen) == pytest.approx([0.8 * 0.5 * 0.8, 0.48, 0.18, 0.2 * 0.5 * 0.2])
    overlap, chance = panel(draw(chosen, dataset()), "Overlap").get_lines()
    assert list(overlap.get_ydata()) == pytest.approx([0.4, 0.0])
    assert list(chance.get_ydata()) == pytest.approx([0.2, 0.5])


def test_expectation_is_that_of_refreshed_random_subsets() -> None:
    generator = np.random.default_rng(1)
    times = np.zeros(4000, dtype=int)
    for _ in range(5):
        times[generator.permutation(4000)[:1000]] += 1
    expected = _expected_times([coreset(list(range(1000)), k, size=4000) for k in range(5)])
    assert np.bincount(times, minlength=6) / 4000 == pytest.approx(expected, abs=0.02)


def test_validation_images_do_not_count_as_never_chosen() -> None:
    # Two of the ten images cannot be chosen; 0 to 5 were chosen, so two of the pool were not.
    figure = draw([coreset([0, 1, 2, 3], 0, pool=8), coreset([2, 3, 4, 5], 1, pool=8)], dataset())
    assert "Never chosen: 2" in titles(figure)
    times = panel(figure, "How often")
    assert heights(times.containers[0]) == pytest.approx([2 / 8, 4 / 8, 2 / 8])
    assert "4 of 8 images each" in words(figure) and "2 more set apart for validation" in words(figure)
    everything = draw([coreset([0, 1, 2, 3], 0, pool=8), coreset([4, 5, 6, 7], 1, pool=8)], dataset())
    never = panel(everything, "Never chosen: 0")
    assert not never.images and "Every image" in never.texts[0].get_text()


def test_header() -> None:
    one = words(draw([coreset([1, 2, 3], 7, seconds=0.01)], dataset(labels=[0, 1] * 5)))
    assert one.startswith("Coreset of tensors\n") and "unlabelled" not in one
    assert "3 of 10 images: asked for 50 %, effective 30 %" in one
    assert "training epoch 7; less than 0.1 s per selection" in one and "method: random(fraction=0.5)" in one
    two = words(draw([coreset([1, 2], 7, seconds=1.6), coreset([3, 4], 12.5, seconds=1_234)], dataset()))
    assert two.startswith("Coresets of tensors, 2 selections\n") and "unlabelled" in two
    assert "epochs 7 to 12.5; 1.6 to 1,234 s per selection" in two
    long = words(draw([coreset([1], method=", ".join(["word=1"] * 80))], dataset()))
    assert max(map(len, long.splitlines())) <= 100 and long.endswith("\u2026")


CASES = {
    "one": ([coreset([0, 3, 5])], dataset(10, [0, 1] * 5)),
    "long names": ([coreset([0, 3], k) for k in range(3)], dataset(10, [*range(10)], ["very long name"] * 10)),
    "many classes": ([coreset([0, 3], k, size=60) for k in range(9)], dataset(60, list(range(60)))),
    "validation": ([coreset([*range(k, k + 9)], k, 60, 59, method="word " * 80) for k in range(45)], dataset(60)),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_covers_another(case: str) -> None:
    assert overlapping(draw(*CASES[case])) == []


def test_file_is_written_in_the_order_of_the_epochs(tmp_path: Path) -> None:
    before, state = dict(matplotlib.rcParams), torch.get_rng_state()
    chosen = [coreset([0, 1], 5), coreset([1, 2], 10), coreset([7, 8], 15)]
    plot_coresets(chosen, dataset(), tmp_path / "new" / "coreset.png")
    plot_coresets([chosen[k] for k in (2, 0, 1)], dataset(), str(tmp_path / "again.png"))
    with Image.open(tmp_path / "new" / "coreset.png") as first, Image.open(tmp_path / "again.png") as second:
        assert first.size == second.size and first.size[0] == 1350 and 600 < first.size[1] < 1500
        assert first.tobytes() == second.tobytes()
    assert dict(matplotlib.rcParams) == before and torch.equal(torch.get_rng_state(), state)


def test_streamed_images(tmp_path: Path) -> None:
    import datasets

    pictures = [Image.new("RGB", (4, 4), (10 * k,) * 3) for k in range(10)]
    table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    data = load_image_dataset(table, memory_budget=1)
    assert data.images is None
    assert tiles(draw([coreset([2, 5])], data).axes[0], 1, 16)[:3] == [20, 50, 255]
    plot_coresets([coreset([2, 5])], data, tmp_path / "coreset.pdf")
    assert (tmp_path / "coreset.pdf").stat().st_size > 1000


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "coreset.png"
    with pytest.raises(ValueError, match=r"got 0 coresets.*Coreset\.load"):
        plot_coresets([], dataset(), path)
    with pytest.raises(ValueError, match="from 10 images of 'tensors'.* has 12: load the split"):
        plot_coresets([coreset([1])], dataset(12), path)
    with pytest.raises(ValueError, match=r"pools of \[9, 10\] images.*each run on its own"):
        plot_coresets([coreset([1]), coreset([1], pool=9)], dataset(), path)
    assert not path.exists()
