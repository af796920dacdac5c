"""How a run went: loss terms, accuracies, loss weights and schedule over epochs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from .picture_style import COLOURS, MUTED, STYLES, picture_style, save_picture
from .report import describe_metric

__all__ = ["plot_curves"]

History = list[dict[str, Any]]
Series = tuple[list[float], list[float]]

# Summaries and the validation loss are no terms of the objective.
_NO_LOSS_TERM = re.compile(r"^(train_|eval_|probe_|validation_)")
_WEIGHT_NAMES = {"lambda_1": "\u03bb\u2081 (clean term)", "lambda_2": "\u03bb\u2082 (divergence)"}


def plot_curves(
    history: History | Mapping[str, History], path: str | os.PathLike[str], *, chance: float | None = None
) -> None:
    """Draw loss terms, accuracies, loss weights, learning rate and strength of one or several runs over epochs.

    Panels without anything to show are left out. Entries without a value, or with one that is not finite, are gaps.

    Args:
        history (`list[dict]` or `Mapping[str, list[dict]]`): `TrainerState.log_history` of one run, or run names to
            histories; keys with `loss` in them are loss terms, `probe_..._accuracy` (pre-training) and
            `validation_..._accuracy` (fine-tuning) are accuracies in [0, 1], `lambda_1` and `lambda_2` loss weights.
        path (`str` or `PathLike`): the picture to write; the ending chooses the format.
        chance (`float`, *optional*): accuracy of guessing, drawn as a line when given.

    Raises:
        ValueError: if there is nothing to draw.
    """
    runs = dict(history) if isinstance(history, Mapping) else {"": history}
    panels = [
        (name, draw)
        for name, draw, keys in (
            ("Loss terms", _draw_losses, _loss_keys(runs)),
            (_accuracy_title(runs), _draw_accuracies, _accuracy_keys(runs)),
            ("Loss weights", _draw_weights, _weight_keys(runs)),
            ("Schedule", _draw_schedule, _schedule_keys(runs)),
        )
        if keys
    ]
    if not panels:
        raise ValueError(
            f"the history of {len(runs)} run(s) has no loss, accuracy or learning rate to draw: hand in "
            "trainer.state.log_history after at least one logged step"
        )
    with picture_style():
        from matplotlib.figure import Figure

        heights = [1.25 if draw is _draw_accuracies else 0.8 if draw is _draw_weights else 1.0 for _, draw in panels]
        figure = Figure(figsize=(9.0, 0.6 + 2.5 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axis, (name, draw) in zip(axes[:, 0], panels, strict=True):
            axis.set_title(name, loc="left")
            draw(axis, runs, chance)
        axes[-1, 0].set_xlabel("epoch" if "epoch" in _keys(runs) else "step")
        axes[-1, 0].margins(x=0.015)
        figure.align_ylabels(axes[:, 0])
        save_picture(figure, path)


def _draw_losses(axis: Any, runs: Mapping[str, History], chance: float | None) -> None:
    keys, low, high = _loss_keys(runs), float("inf"), 0.0
    for number, (run, history) in enumerate(runs.items()):
        for index, key in enumerate(keys):
            x, y = _series(history, key)
            if not y:
                continue
            colour = COLOURS[(number if len(runs) > 1 else index) % len(COLOURS)]
            style = STYLES[index % len(STYLES)] if len(runs) > 1 else "-"
            _draw_noisy(axis, x, y, colour, style, _label(run, _loss_label(key)))
            low, high = min(low, *y, 1e300), max(high, *y)
    if low > 0 and high > 30 * low:
        _logarithmic(axis, high / low)
    axis.set_ylabel("loss")
    _legend(axis)


def _draw_noisy(axis: Any, x: list[float], y: list[float], colour: str, style: Any, label: str) -> None:
    """Draw a series; a long one as its running mean over a pale trace of the values."""
    window = len(y) // 25
    if window >= 3:
        axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
        sums = [0.0]
        for value in y:
            sums.append(sums[-1] + value)
        ends = [(max(0, i - window), min(len(y), i + window + 1)) for i in range(len(y))]
        y = [(sums[end] - sums[start]) / (end - start) for start, end in ends]
    axis.plot(x, y, linestyle=style, color=colour, label=label, marker="o" if len(y) <= 12 else "")


def _draw_accuracies(axis: Any, runs: Mapping[str, History], chance: float | None) -> None:
    keys = _accuracy_keys(runs)
    for number, (run, history) in enumerate(runs.items()):
        for index, key in enumerate(keys):
            x, y = _series(history, key)
            if y:
                colour, style = COLOURS[number % len(COLOURS)], STYLES[index % len(STYLES)]
                label = _label(run, _metric_label(key))
                axis.plot(x, y, linestyle=style, color=colour, label=label, marker="o" if len(y) <= 40 else "")
    if chance is not None:
        axis.axhline(chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="chance", zorder=1)
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.set_ylabel("accuracy")
    _legend(axis)


def _draw_weights(axis: Any, runs: Mapping[str, History], chance: float | None) -> None:
    for number, (run, history) in enumerate(runs.items()):
        for index, key in enumerate(_weight_keys(runs)):
            x, y = _series(history, key)
            if y:
                colour = COLOURS[(number if len(runs) > 1 else index) % len(COLOURS)]
                label = _label(run, _WEIGHT_NAMES[key])
                # a weight holds until the next measurement
                marker = "o" if len(y) <= 12 else ""
                axis.plot(
                    x, y, linestyle=STYLES[index], color=colour, label=label, drawstyle="steps-post", marker=marker
                )
    axis.set_ylim(bottom=0)
    axis.set_ylabel("weight")
    _legend(axis)


def _draw_schedule(axis: Any, runs: Mapping[str, History], chance: float | None) -> None:
    right = None
    for number, (run, history) in enumerate(runs.items()):
        for key, style in (("learning_rate", "-"), ("strength", "--")):
            x, y = _series(history, key)
            if not y:
                continue
            target = axis
            if key == "strength":
                target = right = right or _right_axis(axis)
            colour = COLOURS[(number if len(runs) > 1 else STYLES.index(style)) % len(COLOURS)]
            marker = "o" if len(y) <= 12 else ""
            target.plot(x, y, style, color=colour, marker=marker)
            axis.plot([], [], style, color=colour, marker=marker, label=_label(run, key.replace("_", " ")))
    axis.set_ylabel("learning rate")
    factor = _fall_of_the_rate(runs)
    if factor > 5:
        _logarithmic(axis, factor)
    else:
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=False)
    _legend(axis, room=0.1 if right is None else 0.7)


def _fall_of_the_rate(runs: Mapping[str, History]) -> float:
    """Highest over lowest rate of fine-tuning, which falls by factors; 1 for the smooth rates of pre-training."""
    rates = [value for history in runs.values() for value in _series(history, "learning_rate")[1]]
    fine_tuned = any(key.startswith("validation_") for key in _accuracy_keys(runs))
    return max(rates) / min(rates) if fine_tuned and rates and min(rates) > 0 else 1.0


def _logarithmic(axis: Any, factor: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if factor < 100 else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the stock one writes formulas
    axis.yaxis.set_minor_formatter(NullFormatter())


def _right_axis(axis: Any) -> Any:
    right = axis.twinx()
    right.set_ylim(-0.03, 1.05)
    right.set_ylabel("augmentation strength")
    right.grid(False)
    right.spines["right"].set_visible(True)
    return right


def _legend(axis: Any, room: float = 0.1) -> None:
    """Put the legend to the right of the panel, `room` inches away from it."""
    from matplotlib.transforms import ScaledTranslation

    moved = axis.transAxes + ScaledTranslation(room, 0, axis.figure.dpi_scale_trans)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), bbox_transform=moved, borderaxespad=0.0)


def _label(run: str, what: str) -> str:
    return f"{run}: {what}" if run else what


def _loss_label(key: str) -> str:
    words = re.sub(r"^loss[_/]|[_/]loss$", "", key).replace("_", " ").replace("/", " ")
    return "total" if words == "loss" else words


def _metric_label(key: str) -> str:
    title = describe_metric(re.sub("^(probe|validation)_", "", key))["title"]
    return title.replace(" accuracy", "", 1).replace("Standard", "standard")


def _keys(runs: Mapping[str, History]) -> list[str]:
    return list(dict.fromkeys(key for history in runs.values() for entry in history for key in entry))


def _loss_keys(runs: Mapping[str, History]) -> list[str]:
    keys = [key for key in _keys(runs) if re.match(r"loss($|[_/])|.+[_/]loss$", key) and not _NO_LOSS_TERM.match(key)]
    return sorted(keys, key=lambda key: key != "loss") if len(keys) != 2 else _without_double(keys, runs)


def _without_double(keys: list[str], runs: Mapping[str, History]) -> list[str]:
    """With a single term, the total says the same."""
    first, second = ([value for history in runs.values() for value in _series(history, key)[1]] for key in keys)
    same = len(first) == len(second) and all(map(math.isclose, first, second))
    return keys[:1] if same else sorted(keys, key=lambda key: key != "loss")


def _accuracy_keys(runs: Mapping[str, History]) -> list[str]:
    keys = [key for key in _keys(runs) if re.fullmatch(r"(probe|validation)_\w*accuracy", key.replace(".", "_"))]
    return sorted(keys, key=lambda key: not key.endswith("_standard_accuracy"))


def _accuracy_title(runs: Mapping[str, History]) -> str:
    kinds = {key.partition("_")[0] for key in _accuracy_keys(runs)}
    return {"probe": "Linear probe", "validation": "Validation images"}[min(kinds)] if len(kinds) == 1 else "Accuracy"


def _weight_keys(runs: Mapping[str, History]) -> list[str]:
    return [key for key in _WEIGHT_NAMES if key in _keys(runs)]


def _schedule_keys(runs: Mapping[str, History]) -> list[str]:
    return [key for key in _keys(runs) if key in ("learning_rate", "strength")]


def _series(history: History, key: str) -> Series:
    """Values of one key over epochs (steps without them), in the order of the log."""
    clocks = ("paper_epoch", "epoch", "step")  # with a coreset, "epoch" counts rounds of its size
    points = [(next((e[c] for c in clocks if c in e), None), e[key]) for e in history if e.get(key) is not None]
    kept = [(float(x), float(y)) for x, y in points if x is not None and math.isfinite(float(y))]
    return [x for x, _ in kept], [y for _, y in kept]
