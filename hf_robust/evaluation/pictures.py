"""Two pictures of a run: how it went (curves) and what its robustness looks like (examples).

Matplotlib is used through its object API with the Agg backend: no window, no global figure state.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from ..attacks import PGD
from .report import describe_metric, format_eps

__all__ = ["plot_curves", "plot_examples"]

History = list[dict[str, Any]]
Series = tuple[list[float], list[float]]
Classifier = Callable[[Tensor], Tensor]

INK, MUTED, GRID = "#1f2933", "#67727e", "#e3e7ec"
RIGHT, WRONG = "#1a7f37", "#cf222e"
# Okabe and Ito's colours: also told apart by colour-blind readers; yellow is left out, it vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
STYLES = ("-", "--", "-.", ":")
# Summaries and the validation loss are no terms of the objective.
_NO_LOSS_TERM = re.compile(r"^(train_|eval_|probe_)")


def plot_curves(
    history: History | Mapping[str, History], path: str | os.PathLike[str], *, chance: float | None = None
) -> None:
    """Draw loss terms, probe accuracies, learning rate and strength of one or several runs over epochs.

    Panels without anything to show are left out. Entries without a value, or with one that is not finite, are gaps.

    Args:
        history (`list[dict]` or `Mapping[str, list[dict]]`): `TrainerState.log_history` of one run, or run names to
            histories; keys with `loss` in them are loss terms, `probe_..._accuracy` are accuracies in [0, 1].
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
            ("Linear probe", _draw_probes, _probe_keys(runs)),
            ("Schedule", _draw_schedule, _schedule_keys(runs)),
        )
        if keys
    ]
    if not panels:
        raise ValueError(
            f"the history of {len(runs)} run(s) has no loss, probe accuracy or learning rate to draw: hand in "
            "trainer.state.log_history after at least one logged step"
        )
    with picture_style():
        from matplotlib.figure import Figure

        heights = [1.25 if name == "Linear probe" else 1.0 for name, _ in panels]
        figure = Figure(figsize=(9.0, 0.6 + 2.5 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axis, (name, draw) in zip(axes[:, 0], panels, strict=True):
            axis.set_title(name, loc="left")
            draw(axis, runs, chance)
        axes[-1, 0].set_xlabel("epoch" if "epoch" in _keys(runs) else "step")
        axes[-1, 0].margins(x=0.015)
        figure.align_ylabels(axes[:, 0])
        _save(figure, path)


def plot_examples(
    classifiers: Mapping[str, Classifier],
    images: Tensor,
    labels: Tensor,
    path: str | os.PathLike[str],
    *,
    attack: PGD,
    label_names: Sequence[str] | None = None,
    amplification: float | None = None,
    seed: int = 0,
) -> None:
    """Draw images, what the attack adds to them, and what each classifier then sees.

    Every classifier is attacked for itself (cross-entropy, last iterate). Rows are images; the columns are the clean
    image with every classifier's prediction, then per classifier the amplified perturbation (grey is zero) and the
    attacked image with its prediction: green when right, red when wrong.

    Args:
        classifiers (`Mapping[str, Callable]`): names to images `(N, 3, H, W)` in [0, 1] -> logits `(N, C)`.
        images (`torch.Tensor` of shape `(N, 3, H, W)`): pixels in [0, 1], on the classifiers' device; a handful.
        labels (`torch.Tensor` of shape `(N,)`): true classes.
        path (`str` or `PathLike`): the picture to write.
        attack (`PGD`): the attack.
        label_names (`Sequence[str]`, *optional*): names of the classes; default: their numbers.
        amplification (`float`, *optional*): factor of the drawn perturbation; default: the whole number that
            brings the largest change close to a third of the grey range (10 for 8/255).
        seed (`int`, defaults to 0): of the attack's random start; the global random state is not used.

    Raises:
        ValueError: without a classifier or an image, or if `labels` has another length.
    """
    if not classifiers or images.dim() != 4 or len(images) == 0 or labels.shape != (len(images),):
        raise ValueError(
            f"got {len(classifiers)} classifiers, images {tuple(images.shape)} and labels {tuple(labels.shape)}; one "
            "classifier, images (N, 3, H, W) and labels (N,) are needed: cut a batch out of the data set"
        )
    columns = {name: _attacked(model, images, labels, attack, seed) for name, model in classifiers.items()}
    if amplification is None:
        largest = max(float((x_adv - images).abs().max()) for x_adv, _, _ in columns.values())
        amplification = max(1.0, float(round(0.32 / largest))) if largest > 0 else 1.0
    with picture_style():
        truths = [_label_name(int(label), label_names) for label in labels]
        figure, axes = _grid(truths, len(classifiers), images.shape[-1] / images.shape[-2])
        _write_titles(figure, axes[0], list(classifiers), attack, amplification)
        for row, truth in enumerate(labels.tolist()):
            _show(axes[row][0], images[row])
            axes[row][0].set_ylabel(truths[row], rotation=0, ha="right", va="center", labelpad=8)
            verdicts = []
            for group, (name, (x_adv, before, after)) in enumerate(columns.items()):
                _show(axes[row][2 * group + 1], 0.5 + amplification * (x_adv[row] - images[row]))
                _show(axes[row][2 * group + 2], x_adv[row])
                verdicts.append(_verdict(before[row], truth, label_names, name if len(columns) > 1 else ""))
                _caption(axes[row][2 * group + 2], [_verdict(after[row], truth, label_names)])
            _caption(axes[row][0], verdicts)
        _save(figure, path)


def _attacked(
    model: Classifier, images: Tensor, labels: Tensor, attack: PGD, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(images.device).manual_seed(seed)
    y = labels.to(images.device)
    x_adv = attack(lambda x: cross_entropy(model(x), y, reduction="sum"), images, generator=generator)
    with torch.no_grad():
        return x_adv, softmax(model(images).float(), dim=1).cpu(), softmax(model(x_adv).float(), dim=1).cpu()


def _grid(truths: list[str], groups: int, aspect: float) -> tuple[Any, list[list[Any]]]:
    """Lay the images out in inches by hand: captions need the same room whatever the image size."""
    from matplotlib.figure import Figure

    side, gap, group_gap = 1.3, 0.12, 0.42
    left, right, top, bottom = max(0.85, 0.3 + 0.1 * max(map(len, truths))), 0.35, 1.30, 0.12
    caption = 0.34 + 0.19 * (groups - 1)
    width = min(max(side * aspect, 1.0), 2.6)
    starts = [left]
    for _ in range(groups):
        starts += [starts[-1] + width + group_gap, starts[-1] + 2 * width + group_gap + gap]
    total_width, total_height = starts[-1] + width + right, top + bottom + len(truths) * (side + caption)
    figure = Figure(figsize=(total_width, total_height))
    axes = []
    for row in range(len(truths)):
        y = total_height - top - side - row * (side + caption)
        boxes = [(x / total_width, y / total_height, width / total_width, side / total_height) for x in starts]
        axes.append([figure.add_axes(box) for box in boxes])
    return figure, axes


def _write_titles(figure: Any, axes: list[Any], names: list[str], attack: PGD, amplification: float) -> None:
    from matplotlib.lines import Line2D

    height, width = figure.get_figheight(), figure.get_figwidth()
    plain = {"fontsize": 10.5, "fontweight": "normal"}
    norm = {"linf": "L-inf", "l2": "L2"}[attack.norm]
    title = f"PGD-{attack.steps}, {norm}, eps {format_eps(attack.eps)}"
    figure.text(0.16 / width, 1 - 0.16 / height, title, ha="left", va="top", fontsize=12, weight="bold", color=INK)
    legend = "left: true class; below: prediction and confidence, green right, red wrong"
    figure.text(0.16 / width, 1 - 0.41 / height, legend, ha="left", va="top", fontsize=9, color=MUTED)
    axes[0].set_title("clean image", pad=6, **plain)
    for group, name in enumerate(names):
        first, second = axes[2 * group + 1], axes[2 * group + 2]
        first.set_title(f"change \u00d7 {amplification:g}", pad=6, **plain)
        second.set_title("attacked", pad=6, **plain)
        start, end = first.get_position().x0, second.get_position().x1
        top = first.get_position().y1 + 0.30 / height
        colour = COLOURS[group % len(COLOURS)]
        figure.add_artist(Line2D([start, end], [top, top], color=colour, transform=figure.transFigure))
        figure.text((start + end) / 2, top + 0.05 / height, name, ha="center", va="bottom", fontsize=12, weight="bold")


def _show(axis: Any, image: Tensor) -> None:
    # Nearest keeps the pixels of small images visible; large ones are only ever made smaller.
    interpolation = "nearest" if max(image.shape[-2:]) <= 128 else "antialiased"
    pixels = image.detach().float().clamp(0, 1).cpu().permute(1, 2, 0).numpy()
    axis.imshow(pixels, interpolation=interpolation)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(visible=True, color=GRID, linewidth=1.0)


def _verdict(probabilities: Tensor, truth: int, label_names: Sequence[str] | None, name: str = "") -> tuple[str, str]:
    """Text and colour of one prediction."""
    predicted = int(probabilities.argmax())
    text = f"{_label_name(predicted, label_names)}  {100 * float(probabilities[predicted]):.0f} %"
    return (f"{_shortened(name, 12)}: {text}" if name else text), RIGHT if predicted == truth else WRONG


def _caption(axis: Any, verdicts: list[tuple[str, str]]) -> None:
    for line, (text, colour) in enumerate(verdicts):
        offset = (0, -5 - 13.5 * line)
        axis.annotate(
            text, (0.5, 0), offset, "axes fraction", "offset points", color=colour, ha="center", va="top", fontsize=9.5
        )


def _label_name(label: int, label_names: Sequence[str] | None) -> str:
    return _shortened(str(label_names[label]), 14) if label_names and label < len(label_names) else str(label)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"


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
        axis.set_yscale("log")
    axis.set_ylabel("loss")
    _legend(axis)


def _draw_noisy(axis: Any, x: list[float], y: list[float], colour: str, style: str, label: str) -> None:
    """Draw a series; a long one as its running mean over a pale trace of the values."""
    window = len(y) // 25
    if window >= 3:
        axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
        sums = [0.0]
        for value in y:
            sums.append(sums[-1] + value)
        ends = [(max(0, i - window), min(len(y), i + window + 1)) for i in range(len(y))]
        y = [(sums[end] - sums[start]) / (end - start) for start, end in ends]
    axis.plot(x, y, style, color=colour, label=label, marker="o" if len(y) <= 12 else "")


def _draw_probes(axis: Any, runs: Mapping[str, History], chance: float | None) -> None:
    keys = _probe_keys(runs)
    for number, (run, history) in enumerate(runs.items()):
        for index, key in enumerate(keys):
            x, y = _series(history, key)
            if y:
                colour, style = COLOURS[number % len(COLOURS)], STYLES[index % len(STYLES)]
                label = _label(run, _metric_label(key))
                axis.plot(x, y, style, color=colour, label=label, marker="o" if len(y) <= 40 else "")
    if chance is not None:
        axis.axhline(chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="chance", zorder=1)
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.set_ylabel("accuracy")
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
    axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=False)
    _legend(axis, room=0.1 if right is None else 0.7)


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
    title = describe_metric(key.removeprefix("probe_"))["title"]
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


def _probe_keys(runs: Mapping[str, History]) -> list[str]:
    keys = [key for key in _keys(runs) if re.fullmatch(r"probe_\w*accuracy", key.replace(".", "_"))]
    return sorted(keys, key=lambda key: key != "probe_standard_accuracy")


def _schedule_keys(runs: Mapping[str, History]) -> list[str]:
    return [key for key in _keys(runs) if key in ("learning_rate", "strength")]


def _series(history: History, key: str) -> Series:
    """Values of one key over epochs (steps without them), in the order of the log."""
    clocks = ("paper_epoch", "epoch", "step")  # with a coreset, "epoch" counts rounds of its size
    points = [(next((e[c] for c in clocks if c in e), None), e[key]) for e in history if e.get(key) is not None]
    kept = [(float(x), float(y)) for x, y in points if x is not None and math.isfinite(float(y))]
    return [x for x, _ in kept], [y for _, y in kept]


@contextlib.contextmanager
def picture_style() -> Iterator[None]:
    """Our look, independent of the user's settings, which come back afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.dpi": 150,
                "savefig.dpi": 150,
                "figure.facecolor": "white",
                "figure.constrained_layout.w_pad": 0.12,
                "figure.constrained_layout.h_pad": 0.10,
                "font.size": 10.5,
                "axes.titlesize": 11.5,
                "axes.titleweight": "bold",
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": GRID,
                "text.color": INK,
                "text.parse_math": False,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "lines.linewidth": 1.9,
                "lines.markersize": 4.0,
                "legend.frameon": False,
                "legend.fontsize": 9.5,
            }
        )
        yield


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
