"""What an AutoAttack evaluation noticed about the model, and the sentences a reader gets about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["Findings", "explain"]

LOSS_GAP = 0.10  # ours: honest models lose less between the two APGD attacks, saturated ones far more
SQUARE_GAIN = 0.002  # the authors' own limit
BLIND_SHARE = 0.10  # ours: a rare exact zero happens, at a pixel on the edge of [0, 1] with dead units


@dataclass
class Findings:
    """Symptoms counted during the evaluation; those of several processes add up.

    Args:
        was_training (`bool`): some layer was in train mode when the model was handed over.
        weights (`set[str]`): types of the weights, where they are not float32.
        outputs (`set[str]`): types of the logits, where they are not float32.
        randomised (`bool`): the same images gave different logits.
        probabilities (`bool`): the outputs of each image are positive and add up to 1.
        dynamic (`bool`): the model computes gradients of its own while it classifies.
        examined (`int`): rightly classified images whose gradients were looked at.
        blind_margin (`int`): of these, images where the gradient of the logits is zero or not finite at every pixel.
        blind_loss (`int`): of these, images where that of the cross-entropy is, but not that of the logits.
        largest_margin (`float`): largest distance seen between the logit of the label and the best other.
        zero_starts (`int`): starting points of an APGD attack on logits with a gradient that is zero everywhere.
        rejected (`int`): images an attack gave back outside the budget, outside [0, 1] or not finite.
    """

    was_training: bool = False
    weights: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    randomised: bool = False
    probabilities: bool = False
    dynamic: bool = False
    examined: int = 0
    blind_margin: int = 0
    blind_loss: int = 0
    largest_margin: float = 0.0
    zero_starts: int = 0
    rejected: int = 0

    @classmethod
    def total(cls, parts: Iterable[Findings]) -> Findings:
        """Put together what several processes found.

        Args:
            parts (`Iterable[Findings]`): one of each process.

        Returns:
            [`Findings`]: sums of the counts, "or" of the flags, the largest margin.
        """
        joined = cls()
        for part in parts:
            for entry in fields(cls):
                mine, other = getattr(joined, entry.name), getattr(part, entry.name)
                if entry.name == "largest_margin":
                    value: Any = max(mine, other)
                else:
                    value = mine | other if isinstance(mine, bool | set) else mine + other
                setattr(joined, entry.name, value)
        return joined

    def to_dict(self) -> dict[str, Any]:
        """Give the counts as plain Python, ready for JSON.

        Returns:
            `dict`: every field, sets as sorted lists.
        """
        return {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Findings:
        """Read back what `to_dict` gave.

        Args:
            values (`dict`): the fields.

        Returns:
            [`Findings`]: the same counts.
        """
        plain: dict[str, Any] = {k: set(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def explain(findings: Findings, clean: float, stages: Sequence[tuple[str, float]], n: int) -> list[str]:
    """Turn what was noticed into sentences: the symptom, what it means for the number, the way out.

    Args:
        findings ([`Findings`]): of all processes.
        clean (`float`): share of rightly classified clean images, in [0, 1].
        stages (`Sequence[tuple[str, float]]`): attacks in order, each with the share of images left after it.
        n (`int`): images.

    Returns:
        `list[str]`: the gravest first; empty when nothing was noticed.
    """
    return [*_masked(findings, clean, stages, n), *_unsuitable(findings), *_changed(findings)]


def _masked(findings: Findings, clean: float, stages: Sequence[tuple[str, float]], n: int) -> list[str]:
    found = []
    many = BLIND_SHARE * findings.examined
    if findings.examined and findings.blind_margin > many:
        found.append(
            f"Gradient masking: for {findings.blind_margin} of {findings.examined} rightly classified images the "
            "gradient of the logits is zero (or not a number) at every pixel, as behind rounding, quantisation or a "
            "threshold. Attacks by gradient (PGD, APGD, FAB) see nothing there and leave the accuracy too high; only "
            "Square, which needs no gradient, counts: take the non-differentiable step out of the model or write an "
            "attack that goes around it."
        )
    if findings.examined and findings.blind_loss > many:
        found.append(
            f"Gradient masking: for {findings.blind_loss} of {findings.examined} rightly classified images the "
            "gradient of the cross-entropy is exactly zero, because the logits are so far apart (by up to "
            f"{findings.largest_margin:.3g}) that the softmax saturates. PGD and APGD on the cross-entropy are blind "
            "there and overstate the robustness of this model; go by the attacks on logits: the targeted APGD, FAB."
        )
    if findings.zero_starts and not found:
        found.append(
            f"Gradient masking is possible: at {findings.zero_starts} starting points of APGD on logits the gradient "
            "was zero at every pixel, so that the attack could not leave them: compare with Square, which needs none."
        )
    return [*found, *_gaps(clean, stages, n)]


def _gaps(clean: float, stages: Sequence[tuple[str, float]], n: int) -> list[str]:
    found, before, left = [], clean, dict(stages)
    logits = next((name for name in ("apgd-t", "apgd-dlr") if name in left), None)
    if logits and left.get("apgd-ce", 0.0) - left[logits] > LOSS_GAP:
        found.append(
            f"APGD on the cross-entropy left {left['apgd-ce']:.1%}, APGD on logits {left[logits]:.1%} of the images "
            "right: the cross-entropy misleads attacks on this model (saturated or masked gradients), and its "
            "accuracy under PGD overstates its robustness."
        )
    for name, after in stages:
        broken = round((before - after) * n)
        # A single image more says nothing, however few there are.
        if name == "square" and broken > max(1, SQUARE_GAIN * n) and len(stages) > 1:
            found.append(
                f"Square, which uses no gradient, broke {broken} more images ({before:.1%} to {after:.1%}) after the "
                "attacks by gradient had given up: the gradients mislead (gradient masking), and the true robust "
                "accuracy may be lower still. Write an attack for this very model."
            )
        before = after
    return found


def _unsuitable(findings: Findings) -> list[str]:
    found = []
    if findings.randomised:
        found.append(
            "The same images gave different logits twice: the model is random (dropout, added noise). These attacks "
            "assume it is not, and their number is too high: switch the randomness off, or average the logits over "
            "many draws inside the model."
        )
    if findings.probabilities:
        found.append(
            "The outputs look like probabilities (each row positive and adding up to 1). A softmax at the end hides "
            "gradients: evaluate the model without it, on its logits."
        )
    if findings.dynamic:
        found.append(
            "The model computes gradients while it classifies (it adapts or purifies at test time). AutoAttack is not "
            "enough for such a defence: its number is an upper bound only."
        )
    if findings.rejected:
        found.append(
            f"{findings.rejected} images came back from an attack outside the budget, outside [0, 1] or not finite. "
            "They were counted as not broken: look for square roots, divisions or logarithms in the model, whose "
            "gradient is infinite or undefined at zero."
        )
    return found


def _changed(findings: Findings) -> list[str]:
    found = []
    if findings.was_training:
        found.append(
            "The model was in train mode; it was attacked in evaluation mode, and put back as it was afterwards."
        )
    if findings.weights:
        found.append(
            f"Weights of type {', '.join(sorted(findings.weights))} were evaluated in float32 (and put back as they "
            "were): at the stored precision the accuracy may differ a little."
        )
    if findings.outputs:
        found.append(
            f"The model gives logits of type {', '.join(sorted(findings.outputs))}: it computes at that precision "
            "inside, which rounds gradients to zero where differences are small. Switch its own autocast off."
        )
    return found
