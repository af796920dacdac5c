"""Pictures of an evaluation: accuracy over the size of the attack, under corruptions, and class by class.

Matplotlib is used through its object API with the Agg backend: no window, no global figure state. The pictures are
narrow, so that they can also be read on a phone.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .picture_style import COLOURS, INK, MUTED, STYLES, picture_style, save_picture
from .report import binomial_interval, format_eps

__all__ = ["curve_doubtful", "curve_remark", "plot_class_bars", "plot_corruptions", "plot_robustness_curve"]

WIDTH = 5.4  # inches
GAP = 0.12  # cells between the heat map and its means
MOST_CLASSES = 20  # with more, the worst and the best ten
# The order of the benchmark's families; the last line are those outside its mean.
FAMILIES = (
    ("gaussian_noise", "shot_noise", "impulse_noise"),
    ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    ("snow", "frost", "fog", "brightness"),
    ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
_FALLEN = 0.05  # accuracy below which a curve counts as fallen
_LARGE_EPS = 24 / 255  # an attack of this size leaves little of a small natural image's class

Curve = Mapping[float, float]


def plot_robustness_curve(
    accuracies: Mapping[str, Curve],
    path: str | os.PathLike[str],
    *,
    n: int | Mapping[str, int] | None = None,
    chance: float | None = None,
    attack: str = "PGD-20",
    norm: str = "linf",
    marked_eps: float | None = 8 / 255,
) -> None:
    """Draw accuracy over the size of the attack: the check that an attack with a large budget still wins.

    A curve that stays up, or rises, says that the attack fails and not that the model is robust (masked gradients).

    Args:
        accuracies (`Mapping[str, Mapping[float, float]]`): names of models to budgets (pixels of [0, 1]) to
            accuracies in [0, 1]; budget 0 is clean accuracy.
        path (`str` or `PathLike`): the picture to write; the ending chooses the format.
        n (`int` or `Mapping[str, int]`, *optional*): images behind the accuracies, of all models or by name; gives
            the 95 % band.
        chance (`float`, *optional*): accuracy of guessing, drawn as a line.
        attack (`str`, defaults to `"PGD-20"`): name of the attack for the title.
        norm (`str`, defaults to `"linf"`): `"linf"`, or `"l2"` for budgets of one whole image.
        marked_eps (`float`, *optional*, defaults to 8/255): the budget of the threat model, drawn as a line.

    Raises:
        ValueError: without a curve of two budgets, or for an accuracy outside [0, 1].
    """
    if not accuracies or min(len(curve) for curve in accuracies.values()) < 2:
        sizes = {name: len(curve) for name, curve in accuracies.items()}
        raise ValueError(f"got curves of {sizes} budgets, two or more each are needed: attack with 0, 8/255, 16/255")
    for name, curve in accuracies.items():
        _check_accuracies(f"the curve of {name!r}", curve.values())
    counts = {name: n.get(name) if isinstance(n, Mapping) else n for name in accuracies}
    with picture_style():
        figure, axis = _page(f"Accuracy over the size of the attack, {attack}", _band_note(counts), 3.8)
        scale = 255.0 if norm == "linf" else 1.0
        ends = []
        for number, (name, curve) in enumerate(accuracies.items()):
            _draw_curve(axis, name, curve, counts[name], number, scale)
            ends.append(max(curve) * scale)
        if marked_eps is not None and marked_eps * scale <= max(ends):
            axis.axvline(marked_eps * scale, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            note = f"eps {format_eps(marked_eps)}"
            axis.annotate(note, (marked_eps * scale, 1.0), (4, -2), ("data", "axes fraction"), "offset points")
            axis.texts[-1].set(color=MUTED, va="top", fontsize=9.5)
        if chance is not None:
            axis.axhline(chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="guessing", zorder=1)
        _finish_curve(axis, max(ends), norm, len(accuracies) > 1 or chance is not None)
        save_picture(figure, path)


def curve_remark(curve: Curve, n: int, norm: str = "linf") -> str:
    """Say in a sentence what a curve of accuracy over budget shows about the attack.

    Args:
        curve (`Mapping[float, float]`): budgets to accuracies in [0, 1].
        n (`int`): images behind each accuracy.
        norm (`str`, defaults to `"linf"`): norm of the budgets.

    Returns:
        `str`: one sentence or two. Whether the curve rises by more than its intervals or has not fallen at the
            largest budget is judged; a set of easy images may stay up honestly, which the sentence says.
    """
    rise = _rise(curve, n)
    if rise is not None:
        (eps, before), (next_eps, after) = rise
        return (
            f"The accuracy rises from {_percent(before)} at eps {format_eps(eps)} to {_percent(after)} at eps "
            f"{format_eps(next_eps)} ({n} images). A larger budget can only help an attack: the attack fails here, so "
            "do not trust these accuracies (masked gradients)."
        )
    eps, last = max(curve.items())
    end = f"{_percent(last)} at eps {format_eps(eps)} ({n} images)"
    if _fallen(last, n):
        return f"The accuracy falls to {end}, as it does where the attack works."
    if norm != "linf" or eps < _LARGE_EPS:
        return f"The accuracy is {end}, the largest budget tried; whether a larger one brings it to zero is open."
    return (
        f"The accuracy is still {end}. On natural images that is a mark of masked "
        "gradients: the attack fails rather than the model holding. On simple images, such as digits, it can be real; "
        "AutoAttack's last stage, which needs no gradients, tells the two apart."
    )


def curve_doubtful(curve: Curve, n: int, norm: str = "linf") -> bool:
    """Whether a curve speaks against the attack, so that its remark is a warning.

    Args:
        curve, n, norm: as in [`curve_remark`].
    """
    eps, last = max(curve.items())
    return _rise(curve, n) is not None or (norm == "linf" and eps >= _LARGE_EPS and not _fallen(last, n))


def _rise(curve: Curve, n: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The first two neighbours of which the larger budget leaves more, beyond their intervals."""
    points = sorted(curve.items())
    for before, after in zip(points, points[1:], strict=False):
        if binomial_interval(after[1], n)[0] > binomial_interval(before[1], n)[1]:
            return before, after
    return None


def _fallen(accuracy: float, n: int) -> bool:
    return binomial_interval(accuracy, n)[0] <= _FALLEN


def _draw_curve(axis: Any, name: str, curve: Curve, n: int | None, number: int, scale: float) -> None:
    x, y = [eps * scale for eps in sorted(curve)], [curve[eps] for eps in sorted(curve)]
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
    if n:
        low, high = zip(*(binomial_interval(value, n) for value in y), strict=True)
        axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(x, y, linestyle=style, marker="o", color=colour, label=_shortened(name, 34))


def _finish_curve(axis: Any, end: float, norm: str, legend: bool) -> None:
    axis.set_ylim(-0.02, 1.02)
    axis.margins(x=0.02)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.set_ylabel("accuracy")
    if norm == "linf":
        step = next((step for step in (1, 2, 4, 8, 16) if end / step <= 9), 32)
        axis.set_xticks([step * k for k in range(int(end / step + 1e-6) + 1)])
        axis.set_xlabel("eps, largest change of a pixel in 1/255 (L-inf)")
    else:
        axis.set_xlabel("eps, length of the change of an image (L2)" if norm == "l2" else f"eps ({norm})")
    if legend:
        axis.legend(loc="best")


def _band_note(counts: Mapping[str, int | None]) -> str:
    known = sorted({count for count in counts.values() if count})
    if not known:
        return ""
    images = " or ".join(f"{count:,}" for count in known)
    return f"band: 95 % interval, {images} images"


def plot_corruptions(
    table: Mapping[str, Mapping[int, float] | Sequence[float]],
    path: str | os.PathLike[str],
    *,
    clean: float | None = None,
    title: str = "Accuracy under corruptions",
    n: int | None = None,
) -> None:
    """Draw accuracy for each corruption and severity; the darker a cell, the more was lost.

    The means at the bottom are the benchmark's: over all severities and the 15 main corruptions.

    Args:
        table (`Mapping`): corruptions to accuracies in [0, 1] by severity: a mapping from the severity, or a
            sequence from severity 1 on. A cell that is missing is left empty.
        path (`str` or `PathLike`): the picture to write.
        clean (`float`, *optional*): accuracy on clean images; colours then show the points lost against it,
            otherwise against the best cell.
        title (`str`): must say whether images are the published ones or generated.
        n (`int`, *optional*): images of each cell, for the subtitle.

    Raises:
        ValueError: for an empty table or an accuracy outside [0, 1].
    """
    rows = {
        name: dict(cells) if isinstance(cells, Mapping) else dict(enumerate(cells, 1)) for name, cells in table.items()
    }
    rows = {name: {int(severity): float(value) for severity, value in cells.items()} for name, cells in rows.items()}
    values = [value for cells in rows.values() for value in cells.values()]
    if not values:
        raise ValueError(f"got {len(table)} corruptions without a cell, one is needed: run the metric 'corruptions'")
    _check_accuracies("the table of corruptions", values)
    names = _in_order(rows)
    severities = sorted({severity for cells in rows.values() for severity in cells})
    reference = max(values) if clean is None else clean
    against = "the best cell" if clean is None else f"{_percent(clean)} (clean)"
    subtitle = f"accuracy in %; colour: points lost against {against}{f'; {n:,} images per cell' if n else ''}"
    with picture_style():
        figure, axis = _page(title, subtitle, 0.7 + 0.3 * (len(names) + 1))
        _draw_cells(figure, axis, {name: rows[name] for name in names}, severities, reference)
        axis.set_yticks([*range(len(names)), len(names) + GAP], [*(name.replace("_", " ") for name in names), "mean"])
        axis.set_xticks([*range(len(severities)), len(severities) + GAP], [*map(str, severities), "mean"])
        axis.set_xlabel("severity", loc="center")
        axis.tick_params(length=0, labelcolor=INK)
        save_picture(figure, path)


def _in_order(rows: Mapping[str, Any]) -> list[str]:
    known = [name for family in FAMILIES for name in family]
    return [name for name in known if name in rows] + [name for name in rows if name not in known]


def _draw_cells(
    figure: Any, axis: Any, rows: Mapping[str, Mapping[int, float]], severities: list[int], reference: float
) -> None:
    """The heat map with its means at the right and at the bottom, set off by a gap, and a colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("lost", ["#fff7ef", "#f3b27a", "#d55e00", "#6b2b00"])
    grid: list[list[float | None]] = [[*map(row.get, severities), _mean(row.values())] for row in rows.values()]
    # The benchmark's means: of all cells, and without the extra corruptions unless there are no others.
    main = [row for name, row in rows.items() if name not in FAMILIES[-1]] or list(rows.values())
    columns = [[row[s] for row in main if s in row] for s in severities]
    grid.append([*map(_mean, columns), _mean(value for row in main for value in row.values())])
    lost = [100 * (reference - value) for line in grid for value in line if value is not None]
    scale = Normalize(0.0, max(1.0, *lost))
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            mean = y == len(rows) or x == len(severities)
            place = x + GAP * (x == len(severities)), y + GAP * (y == len(rows))
            shade = "#ffffff" if value is None else colours(scale(max(0.0, 100 * (reference - value))))
            axis.add_patch(_cell(*place, shade))
            text = "\u2013" if value is None else f"{100 * value:.1f}" if mean else f"{100 * value:.0f}"
            ink = INK if value is None or scale(100 * (reference - value)) < 0.66 else "white"
            weight = "bold" if mean else "normal"
            axis.text(*place, text, ha="center", va="center", color=ink, fontsize=9.5, weight=weight)
    axis.set_xlim(-0.52, len(severities) + 0.62)
    axis.set_ylim(len(rows) + 0.66, -0.52)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axis, fraction=0.045, pad=0.02, aspect=30)
    bar.set_label("points lost")
    bar.outline.set_visible(False)


def _cell(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="none")


def plot_class_bars(
    accuracies: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    title: str = "Accuracy by class",
) -> None:
    """Draw the accuracy of each class, clean and attacked: a mean hides that a model gave some classes up.

    With more than 20 classes the ten worst and the ten best of the last kind (of those that have images) are drawn.

    Args:
        accuracies (`Mapping[str, Sequence[float]]`): kinds (`"clean"`, `"AutoAttack"`) to one accuracy in [0, 1] per
            class; NaN for a class without images.
        path (`str` or `PathLike`): the picture to write.
        label_names (`Sequence[str]`, *optional*): names of the classes; default: their numbers.
        counts (`Sequence[int]`, *optional*): images of each class; gives the 95 % intervals.
        title (`str`): title of the picture.

    Raises:
        ValueError: if the kinds have different numbers of classes, or for an accuracy outside [0, 1].
    """
    sizes = {len(values) for values in accuracies.values()}
    if len(sizes) != 1 or 0 in sizes or (counts is not None and len(counts) not in sizes):
        found = {name: len(values) for name, values in accuracies.items()}
        hint = "" if counts is None else f" and {len(counts)} counts"
        raise ValueError(f"got accuracies of {found} classes{hint}; all must have one per class: count all classes")
    for name, values in accuracies.items():
        _check_accuracies(f"the classes of {name!r}", [value for value in values if not math.isnan(value)])
    chosen, note = _chosen_classes(list(accuracies.values())[-1])
    kinds, intervals = len(accuracies), "" if counts is None else "lines: 95 % intervals"
    columns = kinds if sum(len(name) + 20 for name in accuracies) < 60 else 1
    subtitle = "; ".join(text for text in (note, intervals) if text)
    with picture_style():
        from matplotlib.transforms import blended_transform_factory

        legend = 0.2 * (1 if columns > 1 else kinds)
        figure, axis = _page(title, subtitle, 0.6 + legend + len(chosen) * (0.16 + 0.15 * kinds))
        for number, (name, values) in enumerate(accuracies.items()):
            mean = _mean(value for value in values if not math.isnan(value))
            name = _shortened(name, 34)
            label = name if mean is None else f"{name}, mean {_percent(mean)}"
            _draw_bars(axis, label, [values[k] for k in chosen], number, kinds)
            if counts is not None:
                _draw_whiskers(axis, [values[k] for k in chosen], [counts[k] for k in chosen], number, kinds)
        axis.set_yticks(range(len(chosen)), [_class_name(k, label_names) for k in chosen])
        axis.set_ylim(len(chosen) - 0.4, -0.6)
        axis.set_xlim(0, 1.0)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        # From the left edge of the page: beside long names of classes there is no room for it.
        edge = blended_transform_factory(figure.transFigure, axis.transAxes)
        axis.legend(
            loc="lower left", bbox_to_anchor=(0.015, 1.0), bbox_transform=edge, ncols=columns, borderaxespad=0.2
        )
        save_picture(figure, path)


def _chosen_classes(values: Sequence[float]) -> tuple[list[int], str]:
    if len(values) <= MOST_CLASSES:
        return list(range(len(values))), ""
    half = MOST_CLASSES // 2
    order = sorted((k for k in range(len(values)) if not math.isnan(values[k])), key=lambda k: values[k])
    if len(order) <= MOST_CLASSES:
        return order, f"the {len(order)} of {len(values)} classes that have images"
    return [*order[:half], *order[-half:]], f"the {half} worst and the {half} best of {len(values)} classes"


def _draw_bars(axis: Any, label: str, values: list[float], number: int, kinds: int) -> None:
    height = 0.76 / kinds
    places = [k - 0.38 + height * (number + 0.5) for k in range(len(values))]
    widths = [0.0 if math.isnan(value) else value for value in values]
    axis.barh(places, widths, height * 0.92, color=COLOURS[number % len(COLOURS)], label=label)


def _draw_whiskers(axis: Any, values: list[float], counts: list[int], number: int, kinds: int) -> None:
    height = 0.76 / kinds
    for k, (value, count) in enumerate(zip(values, counts, strict=True)):
        if count and not math.isnan(value):
            place = k - 0.38 + height * (number + 0.5)
            axis.plot(binomial_interval(value, count), [place, place], color=INK, linewidth=1.1)


def _class_name(number: int, label_names: Sequence[str] | None) -> str:
    name = str(label_names[number]) if label_names and number < len(label_names) else str(number)
    return _shortened(name, 22)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"


def _page(title: str, subtitle: str, height: float) -> tuple[Any, Any]:
    """A figure with its heading at the left edge, and one panel of `height` inches below."""
    from matplotlib.figure import Figure

    lines = [*textwrap.wrap(title, 52), *(wrapped := textwrap.wrap(subtitle, 70))]
    heading = 0.18 + 0.22 * len(lines)
    figure = Figure(figsize=(WIDTH, heading + height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, height / (heading + height)))
    for number, line in enumerate(lines):
        bold = number < len(lines) - len(wrapped)
        look: dict[str, Any] = (
            {"fontsize": 12, "weight": "bold", "color": INK} if bold else {"fontsize": 9.5, "color": MUTED}
        )
        place = 1 - (0.16 + 0.22 * number) / (heading + height)
        figure.text(0.14 / WIDTH, place, line, ha="left", va="top", **look)
    return figure, figure.subplots()


def _check_accuracies(where: str, values: Any) -> None:
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"{where} has the accuracy {value}, accuracies are in [0, 1]: divide percent by 100")


def _mean(values: Any) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
