"""Which attacks run on a classifier, how long, and what has to be said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["PRESETS", "PlannedAttack", "plan_attacks", "prepare"]

# Published lengths: 100 steps per APGD and FAB run, 9 target classes (5 for APGD under L1), 5000 queries of Square.
# "smoke" is ours and measures nothing.
PRESETS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "fast": ("apgd-ce", "apgd-t"),
    "smoke": ("apgd-ce", "apgd-t", "fab-t", "square"),
}
_STEPS, _TARGETS, _QUERIES = 100, 9, 5000
_SMOKE_STEPS, _SMOKE_TARGETS, _SMOKE_QUERIES = 5, 2, 50
_L1_TARGETS, _L1_RESTARTS = 5, 5


@dataclass(frozen=True)
class PlannedAttack:
    """One attack and its length.

    Args:
        name (`str`): `"apgd-ce"`, `"apgd-dlr"`, `"apgd-t"`, `"fab-t"` or `"square"`.
        steps (`int`): gradient steps of one run, or queries of Square.
        runs (`int`): target classes one after the other, or restarts of an attack without targets.
    """

    name: str
    steps: int
    runs: int = 1

    @property
    def work(self) -> int:
        """Most work on one image, in forward passes; a backward pass counts as two."""
        per_step = {"square": 1, "fab-t": 4}.get(self.name, 3)
        return self.steps * self.runs * per_step


def plan_attacks(
    num_classes: int, preset: str, norm: str, shape: tuple[int, ...]
) -> tuple[list[PlannedAttack], list[str]]:
    """Choose the attacks a classifier with this many classes can be given.

    The difference-of-logits loss needs 3 logits, its targeted form 4, and there are only K - 1 wrong classes.

    Args:
        num_classes (`int`): logits K, 2 or more.
        preset (`str`): a key of `PRESETS`.
        norm (`str`): `"linf"`, `"l2"` or `"l1"`.
        shape (`tuple[int, ...]`): `(C, H, W)` of an image.

    Returns:
        `tuple[list[PlannedAttack], list[str]]`: the attacks in order, and a sentence on each departure from the
        standard.
    """
    smoke, l1 = preset == "smoke", norm == "l1"
    steps, queries = (_SMOKE_STEPS, _SMOKE_QUERIES) if smoke else (_STEPS, _QUERIES)
    wrong = num_classes - 1
    targets = min(_SMOKE_TARGETS if smoke else _TARGETS, wrong)
    restarts = _L1_RESTARTS if l1 and not smoke else 1
    lengths = {
        "apgd-ce": PlannedAttack("apgd-ce", steps, restarts),
        "apgd-t": PlannedAttack("apgd-t", steps, min(targets, _L1_TARGETS) if l1 else targets),
        "fab-t": PlannedAttack("fab-t", steps, targets),
        "square": PlannedAttack("square", queries),
    }
    if num_classes == 3:
        lengths["apgd-t"] = PlannedAttack("apgd-dlr", steps, restarts)
    names = [name for name in PRESETS[preset] if name != "apgd-t" or num_classes > 2]
    return [lengths[name] for name in names], _departures(num_classes, preset, shape)


def _departures(num_classes: int, preset: str, shape: tuple[int, ...]) -> list[str]:
    said = []
    if preset == "smoke":
        said.append(
            'preset="smoke" cuts every attack short: it shows that the evaluation runs, its accuracy means nothing. '
            'Measure with preset="standard".'
        )
    if preset == "fast":
        said.append(
            'preset="fast" runs the APGD attacks only (no FAB, no Square): its accuracy is an upper bound of '
            'AutoAttack\'s and must not be called AutoAttack; measure with preset="standard".'
        )
    if num_classes == 2:
        fab = ", and FAB had the one wrong class as its target" if "fab-t" in PRESETS[preset] else ""
        said.append(f"With 2 classes the loss of the targeted APGD is not defined: that attack was left out{fab}.")
    elif num_classes == 3:
        fab = ", and FAB had 2 target classes" if "fab-t" in PRESETS[preset] else ""
        said.append(
            "With 3 classes the loss of the targeted APGD is not defined: APGD on the untargeted difference of logits "
            f"ran in its place{fab}."
        )
    elif num_classes <= _TARGETS and preset != "smoke":
        said.append(
            f"With {num_classes} classes the targeted attacks had all {num_classes - 1} wrong classes as targets, "
            f"where the standard has {_TARGETS}."
        )
    if shape[1] != shape[2]:
        said.append(
            f"The images are {shape[1]} high and {shape[2]} wide: Square was made for square images and may find less "
            "on these."
        )
    return said


def prepare(tool: Any, attack: PlannedAttack, seed: int, listener: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Set one attack of the package up as planned.

    Args:
        tool (`pyautoattack.AutoAttack`): made with `version="standard"`.
        attack ([`PlannedAttack`]): which, and how long.
        seed (`int`): it starts from on every batch.
        listener (`Any`): whose method `warning` hears what the attack reports.

    Returns:
        `Callable`: images `(N, C, H, W)` and labels `(N,)` to attacked images.
    """
    tool.verbose = False
    chosen = {"apgd-t": tool.apgd_targeted, "fab-t": tool.fab, "square": tool.square}.get(attack.name, tool.apgd)
    chosen.seed, chosen.logger = seed, listener
    if attack.name == "square":
        chosen.n_queries = attack.steps
    else:
        chosen.n_iter = chosen.n_iter_orig = attack.steps
    if attack.name in ("apgd-t", "fab-t"):
        chosen.n_target_classes, chosen.n_restarts, chosen.targeted = attack.runs, 1, True
    elif attack.name != "square":
        chosen.loss, chosen.n_restarts = attack.name.removeprefix("apgd-"), attack.runs
    return chosen.perturb
