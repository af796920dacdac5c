"""Pictures of a run: how it went (curves, see `curves`) and what its robustness looks like (examples)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from ..attacks import PGD
from .picture_style import COLOURS, GRID, INK, MUTED, picture_style, save_picture
from .report import format_eps

__all__ = ["plot_examples"]

Classifier = Callable[[Tensor], Tensor]

RIGHT, WRONG = "#1a7f37", "#cf222e"


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
        save_picture(figure, path)


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
