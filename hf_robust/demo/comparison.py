"""One image, one disturbance, several classifiers: what each of them says before and after, and that in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from hf_robust.attacks import PGD
from hf_robust.evaluation.pixel_classifier import PixelClassifier

__all__ = ["LEVELS", "Disturbance", "Outcome", "compare", "sentence"]

Kind = Literal["pgd", "noise", "none"]
Norm = Literal["linf", "l2"]
LEVELS: dict[str, float] = {"linf": 64, "l2": 2550}  # largest budget on offer, in levels of 1/255
_NORMS = {"linf": "L-inf", "l2": "L2"}
_MOST_STEPS = 200


@dataclass(frozen=True)
class Disturbance:
    """What is done to an image.

    Args:
        kind (`str`, defaults to `"pgd"`): `"pgd"`, an attack that sees the classifier; `"noise"`, random noise of the
            same size; `"none"`.
        norm (`str`, defaults to `"linf"`): how the size is measured, `"linf"` or `"l2"`.
        levels (`float`, defaults to 8): the budget in units of 1/255; of `"l2"` the Euclidean norm over all pixels.
        steps (`int`, defaults to 20): gradient steps of `"pgd"`, from 1 to 200. Each is `2.5 eps / steps` long, but
            never longer than the budget.

    Raises:
        ValueError: for an unknown kind or norm, and for budgets or steps out of range.

    Source: Madry et al. 2018 for the attack and the length of a step; the noise is ours: in `linf` every value moves
        by the whole budget up or down, in `l2` the direction is uniform.
    """

    kind: Kind = "pgd"
    norm: Norm = "linf"
    levels: float = 8
    steps: int = 20

    def __post_init__(self) -> None:
        for name, value, known in (("attack", self.kind, get_args(Kind)), ("norm", self.norm, get_args(Norm))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}: choose one of these")
        if not 0 < self.levels <= LEVELS[self.norm]:
            raise ValueError(
                f"eps must be more than 0 and at most {LEVELS[self.norm]:g} levels of 1/255, got {self.levels:g}: "
                "move the slider, or choose no attack"
            )
        if not 1 <= self.steps <= _MOST_STEPS or self.steps != int(self.steps):
            raise ValueError(f"steps must be a whole number from 1 to {_MOST_STEPS}, got {self.steps}: 20 is common")

    @property
    def eps(self) -> float:
        """The budget in pixels of [0, 1]."""
        return self.levels / 255

    def __str__(self) -> str:
        size = f"{_NORMS[self.norm]}, eps {self.levels:g}/255"
        return {"pgd": f"PGD-{self.steps}, {size}", "noise": f"Random noise, {size}", "none": "No attack"}[self.kind]

    def apply(self, classifier: PixelClassifier, image: Tensor, label: int, seed: int = 0) -> Tensor:
        """Disturb one image.

        Args:
            classifier ([`PixelClassifier`]): what `"pgd"` attacks; held still by the caller.
            image (`torch.Tensor` of shape `(1, 3, H, W)`): pixels in [0, 1].
            label (`int`): the answer that `"pgd"` leads away from.
            seed (`int`, defaults to 0): of the random start and of the noise.

        Returns:
            `torch.Tensor` of shape `(1, 3, H, W)`: pixels in [0, 1], inside the budget.
        """
        generator = torch.Generator(image.device).manual_seed(seed)
        if self.kind == "none":
            return image.clone()
        if self.kind == "noise":
            noise = torch.empty_like(image).normal_(generator=generator)
            noise = noise.sign() if self.norm == "linf" else noise / noise.norm().clamp_min(1e-12)
            return (image + self.eps * noise).clamp(0, 1)
        step = min(2.5 * self.eps / self.steps, self.eps)
        attack = PGD(eps=self.eps, step_size=step, steps=int(self.steps), norm=self.norm)
        target = torch.tensor([label], device=image.device)
        return attack(lambda x: cross_entropy(classifier(x), target), image, generator=generator)


@dataclass(frozen=True)
class Outcome:
    """What one classifier made of an image and of its disturbed copy.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`): pixels in [0, 1], on the CPU like all that follow.
        disturbed (`torch.Tensor` of shape `(3, H, W)`): likewise.
        before (`torch.Tensor` of shape `(C,)`): class probabilities of the image.
        after (`torch.Tensor` of shape `(C,)`): class probabilities of the disturbed image.
        label_names (`tuple[str, ...]`, *optional*): names of the classes; default: their numbers.
    """

    image: Tensor
    disturbed: Tensor
    before: Tensor
    after: Tensor
    label_names: tuple[str, ...] | None = None

    def name_of(self, label: int) -> str:
        """Name of a class."""
        names = self.label_names
        return names[label] if names and label < len(names) else str(label)

    @property
    def first_answer(self) -> str:
        """The most probable class of the image."""
        return self.name_of(int(self.before.argmax()))

    @property
    def last_answer(self) -> str:
        """The most probable class of the disturbed image."""
        return self.name_of(int(self.after.argmax()))

    @property
    def changed(self) -> bool:
        """Whether the most probable class is another one."""
        return int(self.before.argmax()) != int(self.after.argmax())


def compare(
    classifiers: Mapping[str, PixelClassifier],
    images: Mapping[str, Tensor],
    disturbance: Disturbance,
    *,
    label_names: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Outcome]:
    """Disturb an image for each classifier and ask it before and after.

    An attack sees the classifier that it is meant for, and leads away from the answer which that one gives to the
    clean image: of an uploaded image nobody knows the true class. Noise is the same for all.

    Args:
        classifiers (`Mapping[str, PixelClassifier]`): by the names that sentences use, such as `"robust"`.
        images (`Mapping[str, torch.Tensor]`): the same image `(3, H, W)` for each, pixels in [0, 1], at its own size.
        disturbance ([`Disturbance`]): what is done.
        label_names (`Sequence[str]`, *optional*): for classifiers that do not name their classes.
        seed (`int`, defaults to 0): of random start and noise.

    Returns:
        `dict[str, Outcome]`: one for each classifier.
    """
    outcomes = {}
    for name, classifier in classifiers.items():
        x = images[name].to(classifier.device)[None]
        with classifier.held():
            with torch.no_grad():
                before = softmax(classifier(x)[0], dim=0)
            disturbed = disturbance.apply(classifier, x, int(before.argmax()), seed)
            with torch.no_grad():
                after = softmax(classifier(disturbed)[0], dim=0)
        names = classifier.label_names or (tuple(map(str, label_names)) if label_names else None)
        clean, changed, first, last = (t.detach().float().cpu() for t in (x[0], disturbed[0], before, after))
        outcomes[name] = Outcome(clean, changed, first, last, names)
    return outcomes


def sentence(outcomes: Mapping[str, Outcome], disturbance: Disturbance, truth: str | None = None) -> str:
    """Say what happened.

    Args:
        outcomes (`Mapping[str, Outcome]`): of [`compare`], one or two.
        disturbance ([`Disturbance`]): what was done.
        truth (`str`, *optional*): name of the true class where it is known; who had it wrong from the start is named.

    Returns:
        `str`: one or two sentences, such as "The plain model changed its answer from 3 to 8; the robust one did not."
    """
    if disturbance.kind == "none":
        text = _answers(outcomes)
    else:
        text = _changes(outcomes)
    wrong = [name for name, outcome in outcomes.items() if truth is not None and outcome.first_answer != truth]
    if not wrong:
        return text
    who = "both models were" if len(wrong) == 2 else f"{_model(wrong[0], outcomes)} was"
    return f"{text} The image shows {truth}, so {who} wrong from the start."


def _model(name: str, outcomes: Mapping[str, Outcome]) -> str:
    return f"the {name} model" if len(outcomes) > 1 else "the model"


def _answers(outcomes: Mapping[str, Outcome]) -> str:
    if len(outcomes) == 1:
        only = next(iter(outcomes.values()))
        return f"Without an attack the model says {only.first_answer} ({100 * float(only.before.max()):.0f} %)."
    (first, one), (second, other) = outcomes.items()
    if one.first_answer == other.first_answer:
        return f"Without an attack both models say {one.first_answer}."
    return (
        f"Without an attack the {first} model says {one.first_answer}, and the {second} one says {other.first_answer}."
    )


def _changes(outcomes: Mapping[str, Outcome]) -> str:
    moved = {name: o for name, o in outcomes.items() if o.changed}
    told = {name: f"from {o.first_answer} to {o.last_answer}" for name, o in moved.items()}
    if len(outcomes) == 1:
        only = next(iter(outcomes.values()))
        if moved:
            return f"The model changed its answer {next(iter(told.values()))}."
        return f"The model did not change its answer, {only.first_answer}."
    first, second = outcomes
    if len(moved) == 2:
        if told[first] == told[second]:
            return f"Both models changed their answer {told[first]}."
        return f"Both models changed their answer: the {first} one {told[first]}, the {second} one {told[second]}."
    if not moved:
        one, other = (outcomes[name].first_answer for name in (first, second))
        still = one if one == other else f"{one} ({first}) and {other} ({second})"
        return f"Neither model changed its answer, {still}."
    name = next(iter(moved))
    other_name = second if name == first else first
    return f"The {name} model changed its answer {told[name]}; the {other_name} one did not."
