"""The cascade believes no attack blindly, and its bar never promises less than is left."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pyautoattack
import pytest
import torch
from attacked import Ladder, ladder_images
from torch import Tensor

from hf_robust.evaluation.autoattack import autoattack
from hf_robust.evaluation.autoattack_cascade import CascadeBar
from hf_robust.evaluation.autoattack_plan import PRESETS, PlannedAttack

IMAGES, LABELS = ladder_images([20.0, 42.0, 60.0, 100.0])


@pytest.mark.parametrize(
    ("cheat", "robust", "rejected"),
    [
        (lambda x: x + 3 / 255, [True, True, True, True], 0),
        (lambda x: x - 3 / 255, [True, False, True, True], 0),
        (lambda x: x - 30 / 255, [True, True, True, True], 3),  # the darkest stays in its class
        (lambda x: x - 0.3, [True, True, True, True], 3),
        (lambda x: x * float("nan"), [True, True, True, True], 3),
    ],
)
def test_images_beyond_the_budget_or_the_box_are_not_believed(
    cheat: Any, robust: list[bool], rejected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cheat(pyautoattack.AutoAttack):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.square = SimpleNamespace(perturb=lambda x, y: cheat(x))

    monkeypatch.setattr(pyautoattack, "AutoAttack", Cheat)
    monkeypatch.setitem(PRESETS, "smoke", ("square",))
    assert importlib.metadata.version("pyautoattack")
    found = autoattack(Ladder(), IMAGES, LABELS, preset="smoke", progress=False)
    assert (found.robust.tolist(), found.findings.rejected) == (robust, rejected)


def test_the_bar_counts_what_is_left_at_most() -> None:
    first, second = PlannedAttack("apgd-ce", 100), PlannedAttack("square", 5000)
    with CascadeBar(True) as bar:
        bar._bar.delay = 1e9
        bar.stands(first, [second], 10, 10, 12)
        assert bar._bar.total == 10 * 300 + 10 * 5000
        bar.work(2500)
        bar.stands(second, [], 4, 4, 12)
        assert bar._bar.total == 2500 + 4 * 5000
        assert bar._bar.postfix == "square, 4 of 12 images robust so far"


def test_a_bar_appears_only_when_asked_for_and_slow(capfd: pytest.CaptureFixture[str]) -> None:
    autoattack(Ladder(), IMAGES, LABELS, preset="smoke", progress=True)
    assert capfd.readouterr() == ("", "")


def test_batches_are_those_of_the_images_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return Ladder()(images)

    monkeypatch.setitem(PRESETS, "smoke", ("apgd-ce", "square"))
    found = autoattack(noted, IMAGES, LABELS, preset="smoke", batch_size=2, progress=False)
    assert found.robust.tolist() == [True, False, True, True]
    first, second = found.stages
    # 5 steps and 3 more passes for each of the images in the attack; 50 queries and 4.
    assert (first.forwards, second.forwards) == (4 * 8, 3 * 54) and set(sizes) <= {1, 2}
    assert torch.equal(first.robust, found.robust)


@pytest.mark.parametrize(("norm", "inside"), [("l2", 0.25), ("l1", 3.0)])
def test_other_norms(norm: str, inside: float) -> None:
    # 42 is 2 levels from its end on 108 pixels: 2 / 255 * sqrt(108) = 0.08 in L2, 0.85 in L1; 60 ends after 20 levels.
    images, labels = ladder_images([42.0, 60.0])
    for eps, robust in ((inside, [False, True]), (inside / 10, [True, True])):
        found = autoattack(Ladder(), images, labels, norm=norm, eps=eps, preset="smoke", progress=False)
        assert found.robust.tolist() == robust


def test_the_bar_ends_full_when_an_attack_takes_more_passes_than_planned():
    with CascadeBar(True) as bar:
        bar.work(5)
        assert str(bar._bar).startswith("AutoAttack: 100%")
