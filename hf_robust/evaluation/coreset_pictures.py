"""One picture of the selections of a run: which classes, which images, how often, and how much they change.

Blue is what was chosen, grey the whole set, black what a random choice would give. Matplotlib is used through its
object API with the Agg backend: no window, no global figure state.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .picture_style import INK, MUTED, picture_style

if TYPE_CHECKING:
    from ..coresets.base import Coreset
    from ..data import ImageDataset

__all__ = ["plot_coresets"]

# Okabe and Ito's blue, and a grey of another lightness: also told apart without colours.
CHOSEN, WHOLE = "#0072b2", "#b9c1ca"
WIDTH = 9.0  # inches
GRID_ROWS, GRID_COLUMNS = 4, 8
MOST_BARS = 20  # classes; with more, a pair of bars for each is too narrow to read
RANDOM_DRAWS = 50


def plot_coresets(coresets: Sequence[Coreset], dataset: ImageDataset, path: str | os.PathLike[str]) -> None:
    """Draw the selections of one run.

    Panels: the classes of the last coreset beside those of the data set (labelled sets); examples of the last
    coreset; and with two selections or more, images that were never chosen, how often images were chosen, and
    how much of each coreset was in the one before. Every comparison with chance is with subsets of the same size that
    are drawn anew, uniformly, at every selection.

    The examples are evenly spaced in the order of the data set, so that a set sorted by class shows all of them; they
    say nothing about the order of the picks. Labels are drawn, never used for choosing.

    Args:
        coresets (`Sequence[Coreset]`): the selections, one or more; drawn in the order of their epochs.
        dataset ([`ImageDataset`]): the training set they were chosen from; images may be decoded at access.
        path (`str` or `PathLike`): the picture to write; the ending chooses the format.

    Raises:
        ValueError: without a coreset, for one of a data set of another size, or for selections of several runs.
    """
    _check(coresets, dataset)
    with picture_style():
        figure = _figure(sorted(coresets, key=lambda coreset: (coreset.epoch, coreset.round)), dataset)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _check(coresets: Sequence[Coreset], dataset: ImageDataset) -> None:
    if not coresets:
        raise ValueError(
            "got 0 coresets, at least one selection is needed: train past the warm-up of the coreset method, or read "
            "a coreset-NNNN.json with Coreset.load"
        )
    for coreset in coresets:
        if coreset.dataset_size != len(dataset):
            raise ValueError(
                f"a coreset was chosen from {coreset.dataset_size} images of {coreset.dataset!r}, and the data set "
                f"has {len(dataset)}: load the split (and max_examples) that the run was trained on"
            )
    pools = sorted({coreset.pool_size for coreset in coresets})
    if len(pools) > 1:
        raise ValueError(
            f"the coresets were chosen from pools of {pools} images; one picture is one run: draw each run on its own"
        )


def _figure(coresets: Sequence[Coreset], dataset: ImageDataset) -> Any:
    """Lay out and draw the panels of coresets that are checked and in order."""
    from matplotlib.figure import Figure

    several, labels = len(coresets) > 1, dataset.labels
    height, width = dataset.image_size
    columns = GRID_COLUMNS if several else 2 * GRID_COLUMNS
    rows = math.ceil(min(GRID_ROWS * columns, len(coresets[-1].indices)) / columns)
    rows = GRID_ROWS if several else rows
    title, lines = _header(coresets, dataset)
    # Inches: what the margins, and the axis between two grids, leave for an image of one or two grids in a row.
    images = 0.4 + min(6.0, rows * (0.44 if several else 0.5) * height / width)
    heights = [*([] if labels is None else [2.8]), images, *([2.7] if several else [])]
    header = 0.5 + 0.19 * len(lines)
    figure = Figure(figsize=(WIDTH, header + sum(heights)), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, sum(heights) / (header + sum(heights))))
    _write_header(figure, title, lines)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    last = "the last coreset" if several else "the coreset"
    row = 0
    if labels is not None:
        axis = figure.add_subplot(grid[row, :])
        _draw_classes(axis, f"Classes of {last}", coresets[-1], dataset, labels.numpy())
        row += 1
    axis = figure.add_subplot(grid[row, 0] if several else grid[row, :])
    indices = np.asarray(coresets[-1].indices)
    _draw_images(axis, f"Images of {last}", dataset, indices, (rows, columns))
    if several:
        times = _times_chosen(coresets)
        _draw_never(figure.add_subplot(grid[row, 1]), coresets, dataset, times)
        _draw_times(figure.add_subplot(grid[row + 1, 0]), coresets, times)
        _draw_overlap(figure.add_subplot(grid[row + 1, 1]), coresets)
    return figure


def _header(coresets: Sequence[Coreset], dataset: ImageDataset) -> tuple[str, list[str]]:
    """Title and the lines under it: how many images, of how many, when, by which method."""
    last, several = coresets[-1], len(coresets) > 1
    outside = last.dataset_size - last.pool_size
    size = f"{len(last.indices):,} of {last.pool_size:,} images" + (" each" if several else "")
    share = f"{size}: asked for {100 * last.fraction:.4g} %, effective {100 * last.effective_fraction:.4g} %"
    facts = [share + (f"; {outside:,} more set apart for validation" if outside else "")]
    when = f"{coresets[0].epoch:g} to {last.epoch:g}" if several else f"{last.epoch:g}"
    timing = f"chosen at training epoch{'s' if several else ''} {when}"
    facts.append(f"{timing}; {_seconds([coreset.seconds for coreset in coresets])}")
    if dataset.labels is None:
        facts[-1] += "; unlabelled, so no classes are drawn"
    method = textwrap.wrap(f"method: {last.method}", 100, max_lines=2, placeholder=" \u2026")
    name = _shortened(last.dataset, 50)
    title = f"Coresets of {name}, {len(coresets)} selections" if several else f"Coreset of {name}"
    return title, [*facts, *method]


def _seconds(values: Sequence[float]) -> str:
    """Time of a selection, in words; the range if the values differ when rounded."""
    low, high = (f"{value:.1f}" if value < 10 else f"{value:,.0f}" for value in (min(values), max(values)))
    if high == "0.0":
        return "less than 0.1 s per selection"
    if low == "0.0":
        return f"up to {high} s per selection"
    return f"{low if low == high else f'{low} to {high}'} s per selection"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"


def _write_header(figure: Any, title: str, lines: Sequence[str]) -> None:
    height, left = figure.get_figheight(), 0.12 / WIDTH
    figure.text(left, 1 - 0.14 / height, title, ha="left", va="top", fontsize=13, weight="bold")
    for number, line in enumerate(lines):
        figure.text(left, 1 - (0.42 + 0.19 * number) / height, line, ha="left", va="top", fontsize=9.5, color=MUTED)


def _draw_classes(axis: Any, title: str, coreset: Coreset, dataset: ImageDataset, labels: np.ndarray) -> None:
    available = np.bincount(labels, minlength=dataset.num_classes or 0)
    chosen = np.bincount(labels[coreset.indices], minlength=len(available))
    classes = np.flatnonzero(available)
    names = [_class_name(int(label), dataset.label_names) for label in classes]
    if len(classes) > MOST_BARS:
        _draw_ratios(axis, available[classes], chosen[classes], names)
    else:
        _draw_shares(axis, available[classes], chosen[classes], names)
    axis.set_title(title, loc="left")


def _class_name(label: int, names: Sequence[str] | None) -> str:
    return _shortened(str(names[label]), 14) if names and label < len(names) else str(label)


def _draw_shares(axis: Any, available: np.ndarray, chosen: np.ndarray, names: Sequence[str]) -> None:
    """Draw a pair of bars per class, with the spread that a random choice of that size has."""
    total, budget = int(available.sum()), int(chosen.sum())
    places, share = np.arange(len(names)), available / total
    # Standard deviation of a hypergeometric count, as a share.
    spread = np.sqrt(share * (1 - share) * (total - budget) / (max(1, total - 1) * budget))
    bars = axis.bar(places - 0.2, chosen / budget, 0.38, color=CHOSEN, label="coreset")
    whole = axis.bar(places + 0.2, share, 0.38, color=WHOLE, label="whole set")
    errors = np.stack([np.minimum(2 * spread, share), 2 * spread])
    axis.errorbar(places + 0.2, share, errors, fmt="none", ecolor=INK, elinewidth=1.1)
    (line,) = axis.plot([], [], "|", color=INK, markersize=10, label="\u00b1 2 std. of a random choice")
    # A letter is 0.08 inch wide; the bars of all classes together have 8 inches.
    long = 0.08 * (max(map(len, names)) + 1) > 8 / len(names)
    axis.set_xticks(places, names, rotation=30 if long else 0, ha="right" if long else "center")
    axis.tick_params(axis="x", length=0)
    if long:
        axis.tick_params(axis="x", labelsize=9.5, pad=2)
    axis.grid(False, axis="x")
    axis.margins(x=0.015)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axis.set_ylabel("share of images")
    _legend_above(axis, [bars, whole, line])


def _draw_ratios(axis: Any, available: np.ndarray, chosen: np.ndarray, names: Sequence[str]) -> None:
    """Draw all classes from over- to under-represented, beside the same for random choices."""
    total, budget = int(available.sum()), int(chosen.sum())
    ratio = (chosen / budget) / (available / total)
    order = np.argsort(-ratio, kind="stable")
    draws = np.random.default_rng(0).multivariate_hypergeometric(available, budget, RANDOM_DRAWS, method="marginals")
    random = -np.sort(-(draws / budget) / (available / total), axis=1).mean(axis=0)
    places = np.arange(1, len(names) + 1)
    bars = axis.bar(places, ratio[order], 0.9 if len(names) <= 200 else 1.0, color=CHOSEN, label="coreset")
    (line,) = axis.plot(places, random, color=INK, linewidth=1.6, label="random choice, also sorted")
    axis.axhline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.grid(False, axis="x")
    axis.yaxis.set_major_formatter(lambda value, _: f"\u00d7 {value:g}")
    axis.set_ylabel("share in coreset /\nshare in whole set")
    most, least = (", ".join(f"{names[k]} (\u00d7 {ratio[k]:.2f})" for k in ks) for ks in (order[:3], order[-3:]))
    axis.set_xlabel(f"the {len(names):,} classes, sorted\nfirst: {most}\nlast: {least}", fontsize=9.5)
    _legend_above(axis, [bars, line])


def _legend_above(axis: Any, handles: list[Any]) -> None:
    """Put the legend beside the title, where nothing is drawn."""
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    axis.legend(handles=handles, ncols=len(handles), columnspacing=1.4, **place)


def _times_chosen(coresets: Sequence[Coreset]) -> np.ndarray:
    """How often each image of the training set was chosen: integers of shape `(dataset_size,)`."""
    times = np.zeros(coresets[0].dataset_size, dtype=np.int64)
    for coreset in coresets:
        times[coreset.indices] += 1
    return times


def _expected_times(coresets: Sequence[Coreset]) -> np.ndarray:
    """Expected share of the pool that is chosen 0, 1, ... times by independent random subsets of the same sizes."""
    shares = np.ones(1)
    for coreset in coresets:
        probability = len(coreset.indices) / coreset.pool_size
        shares = np.convolve(shares, [1 - probability, probability])
    return shares


def _draw_images(axis: Any, title: str, dataset: ImageDataset, indices: np.ndarray, shape: tuple[int, int]) -> None:
    """Draw evenly spaced ones of some images as one mosaic; `shape` is its rows and columns."""
    rows, columns = shape
    count = min(rows * columns, len(indices))
    shown = [int(indices[k * len(indices) // count]) for k in range(count)]
    height, width = dataset.image_size
    gap = max(1, round(width / 16))
    mosaic = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for place, index in enumerate(shown):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        mosaic[top : top + height, left : left + width] = dataset[index]["image"].permute(1, 2, 0).numpy()
    axis.imshow(mosaic, interpolation="antialiased")
    axis.set_anchor("NW")
    axis.set_axis_off()
    axis.set_title(title, loc="left")


def _draw_never(axis: Any, coresets: Sequence[Coreset], dataset: ImageDataset, times: np.ndarray) -> None:
    never = np.flatnonzero(times == 0)
    outside = coresets[0].dataset_size - coresets[0].pool_size
    # Which images the validation split has is not stored, only how many.
    title = f"Never chosen: {len(never) - outside:,}"
    if len(never) > outside:
        _draw_images(axis, title, dataset, never, (GRID_ROWS, GRID_COLUMNS))
        return
    axis.set_axis_off()
    axis.set_title(title, loc="left")
    text = "Every image of the pool was chosen\nat least once."
    axis.text(0, 0.95, text, ha="left", va="top", color=MUTED, transform=axis.transAxes)


def _draw_times(axis: Any, coresets: Sequence[Coreset], times: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    pool = coresets[0].pool_size
    shares = np.bincount(times, minlength=len(coresets) + 1).astype(float)
    shares[0] -= coresets[0].dataset_size - pool
    shares /= pool
    expected = _expected_times(coresets)
    # Counts that neither reaches in as much as half an image are left out on the right.
    end = int(np.flatnonzero((shares > 0) | (expected * pool >= 0.5))[-1]) + 1
    bars = axis.bar(np.arange(end), shares[:end], 0.8, color=CHOSEN, label="coresets")
    style = "o-" if end <= 25 else "-"
    (line,) = axis.plot(np.arange(end), expected[:end], style, color=INK, linewidth=1.3, label="random choices")
    axis.xaxis.set_major_locator(MaxNLocator(11, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axis.set_ylim(0, 1.3 * max(shares.max(), expected.max()))
    axis.grid(False, axis="x")
    axis.set_xlabel(f"times chosen in {len(coresets)} selections")
    axis.set_ylabel("share of the pool")
    axis.set_title("How often images were chosen", loc="left")
    axis.legend(handles=[bars, line], loc="upper right", ncols=2)


def _draw_overlap(axis: Any, coresets: Sequence[Coreset]) -> None:
    pairs = list(zip(coresets[:-1], coresets[1:], strict=True))
    epochs = [current.epoch for _, current in pairs]
    marker = "o" if len(pairs) <= 40 else ""
    overlaps = [current.overlap(previous) for previous, current in pairs]
    axis.plot(epochs, overlaps, color=CHOSEN, marker=marker, label="coresets", zorder=3)
    chance = [previous.effective_fraction for previous, _ in pairs]
    dashed: dict[str, Any] = {"color": INK, "linewidth": 1.3, "linestyle": (0, (4, 2)), "label": "random choices"}
    if max(chance) - min(chance) < 1e-9:
        axis.axhline(chance[0], **dashed)
    else:
        axis.plot(epochs, chance, **dashed)
    axis.set_ylim(0, 1.3)
    axis.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if len(set(epochs)) <= 8:
        axis.set_xticks(sorted(set(epochs)), [f"{epoch:g}" for epoch in sorted(set(epochs))])
    axis.set_xlabel("training epoch of the selection")
    axis.set_ylabel("share of images")
    axis.set_title("Overlap with the coreset before", loc="left")
    axis.legend(loc="upper right", ncols=2)
