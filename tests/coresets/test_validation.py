"""The representational distance of the validation split: what is attacked, how often, and the gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from selection_task import ATTACK, Watched, linear_parameters, make_task, plain_gradient
from torch import Tensor

from hf_robust.attacks import PGD, frozen
from hf_robust.coresets.head import Head
from hf_robust.coresets.validation import ValidationDistance
from hf_robust.losses import DISTANCE_KINDS, representational_distance
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.sat import SAT

STEPS = 3


class Setting:
    """Six validation images in batches of four and two, seen through a watched model."""

    def __init__(self, objective=None, *, kind: str = "kl_softmax", steps: int = STEPS, reattack: bool = True) -> None:
        task = make_task(objective or ACL())
        self.model = task.model.eval()
        self.watched = Watched(self.model)
        self.task = dataclasses.replace(task, model=self.watched)
        self.head = Head(self.model)
        self.clean = self.model.switch.branches[0]
        self.images = self.task.originals(torch.stack([task.dataset[int(k)]["image"] for k in task.validation]))
        with frozen(self.model):
            self.distance = ValidationDistance(self.task, self.head, kind, steps, reattack)

    def gradient(self, weights: dict[str, Tensor] | None = None) -> Tensor:
        with frozen(self.model), torch.no_grad():
            return self.distance.gradient(weights or self.head.weights)

    def adversarial(self) -> Tensor:
        """What was encoded last: the images that came out of the attack on each batch."""
        passes = [x for _, x in self.watched.passes]
        return torch.cat([passes[-STEPS - 2], passes[-1]])

    def between(self, images: Tensor, kind: str = "kl_softmax") -> Tensor:
        model = self.model
        return representational_distance(model.embed(self.images, self.clean), model.embed(images, "adv"), kind)


def test_clean_features_are_computed_once_and_without_augmentation():
    setting = Setting()
    assert [branch for branch, _ in setting.watched.passes] == ["clean", "clean"]
    assert torch.equal(torch.cat([x for _, x in setting.watched.passes]), setting.images)
    for _ in range(3):
        setting.gradient()
    branches = [branch for branch, _ in setting.watched.passes]
    assert branches.count("clean") == 2  # one for each batch of the split
    assert branches.count("adv") == 3 * 2 * (STEPS + 1)  # the attack, and its result


def test_without_reattack_the_backbone_rests_after_the_first_gradient():
    setting = Setting(reattack=False)
    first = setting.gradient()
    passes = len(setting.watched.passes)
    assert passes == 2 + 2 * (STEPS + 1)
    moved = setting.head.step(setting.head.weights, first, 0.3)
    second = setting.gradient(moved)
    assert len(setting.watched.passes) == passes
    assert not torch.allclose(first, second)  # the head alone is evaluated anew
    with torch.no_grad():
        for parameter, value in zip(linear_parameters(setting.model), moved.values(), strict=True):
            parameter.copy_(value)
    expected = plain_gradient(setting.model, setting.between(setting.adversarial()))
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-7)


def test_with_reattack_every_gradient_has_a_start_of_its_own():
    setting = Setting()
    setting.gradient()
    first = setting.adversarial()
    setting.gradient()
    assert not torch.equal(first, setting.adversarial())
    again = Setting()
    again.gradient()
    assert torch.equal(first, again.adversarial())  # and the same in the same selection


@pytest.mark.parametrize("objective", [ACL, SAT])
def test_the_attack_raises_the_distance_within_its_ball(objective):
    setting = Setting(objective())
    setting.gradient()
    found, eps = setting.adversarial(), ATTACK.eps
    with torch.no_grad():
        quiet = setting.between(setting.images)  # the branches differ also without an attack
        rises = []
        for seed in range(4):
            noise = torch.empty_like(found).uniform_(-eps, eps, generator=torch.Generator().manual_seed(seed))
            rises.append((setting.between((setting.images + noise).clamp(0, 1)) - quiet).abs())
        assert setting.between(found) - quiet > 3 * max(rises)
    assert (found - setting.images).abs().max() <= eps + 1e-6
    assert found.min() >= 0 and found.max() <= 1


def test_the_attack_looks_through_the_head_as_it_stands_after_the_picks():
    setting, other = Setting(), Setting()
    setting.gradient()
    other.gradient(other.head.step(other.head.weights, torch.ones(other.head.length), 0.5))
    assert not torch.equal(setting.adversarial(), other.adversarial())


@pytest.mark.parametrize("steps", [1, 3])
def test_all_steps_together_reach_five_quarters_of_eps_and_one_step_the_far_side(steps, monkeypatch):
    attacks, call = [], PGD.__call__

    def spy(self, *args, **kwargs):
        attacks.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PGD, "__call__", spy)
    Setting(steps=steps).gradient()
    assert len(attacks) == 2  # one for each batch
    for attack in attacks:
        assert attack.steps == steps and attack.eps == ATTACK.eps and attack.random_start
        assert attack.step_size * attack.steps == pytest.approx((2.5 if steps == 1 else 1.25) * ATTACK.eps)


def test_a_single_step_as_long_as_the_unit_interval_is_allowed():
    """eps is at most 1; five quarters of it are no step that an L-inf attack takes."""
    task = make_task(ACL(), attack=PGD(eps=1.0, step_size=0.5, steps=1))
    with frozen(task.model):
        gradient = ValidationDistance(task, Head(task.model), "kl_softmax", 1, True).gradient(Head(task.model).weights)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_gradient_is_that_of_the_distance_through_the_model(kind):
    setting = Setting(kind=kind)
    found = setting.gradient()
    assert bool(found.isfinite().all()) and found.norm() > 0
    expected = plain_gradient(setting.model, setting.between(setting.adversarial(), kind))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_a_network_of_one_branch_uses_it_for_both():
    setting = Setting(SAT())
    found = setting.gradient()
    assert {branch for branch, _ in setting.watched.passes} == {"adv"}
    expected = plain_gradient(setting.model, setting.between(setting.adversarial()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
