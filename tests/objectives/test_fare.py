"""FARE: the squared distance by hand, one whole step against plain loops, and adapters in place of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, labelled
from training import tiny_model, tiny_teacher

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.fare import FARE


class Original(LinearModel):
    """Answers and counts."""

    def forward(self, images):
        self.embedded.append(("original", len(images)))
        assert not torch.is_grad_enabled()
        return images.flatten(1) @ self.weight["adv"]


def slow_distance(model, images, original, x):
    """Schlarmann et al. 2024: mean over the images of the squared Euclidean distance."""
    difference = model.numpy(images, "adv") - original.numpy(x, "adv")
    return float(np.mean([sum(d * d for d in row) for row in difference]))


@pytest.mark.parametrize("view", ["original", "padded_crop", "resized_crop"])
def test_the_term_and_the_attacked_loss_by_hand(view):
    model, original, batch, attack = LinearModel(), Original(seed=9), labelled(view), Nudge()
    terms = FARE(augmentation=view)(model, batch, StepContext(attack, teacher=original))
    x_adv = attack.of(batch[view])
    assert list(terms) == ["adversarial"]
    expected = slow_distance(model, x_adv, original, batch[view])
    assert terms["adversarial"].item() == pytest.approx(expected, rel=1e-5)
    ((branch, images),) = model.passes  # no clean image passes the trained network
    assert branch == "adv" and torch.equal(images, x_adv)
    assert original.embedded == [("original", N)]  # once, for attack and loss
    ((loss, attacked),) = attack.calls
    probe = torch.rand_like(attacked)
    assert loss(probe).item() == pytest.approx(slow_distance(model, probe, original, batch[view]), rel=1e-5)
    assert len(original.embedded) == 1


def slow_attack(model, x, target, noise, attack):
    model.eval()
    x_adv = x + noise
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        (model.backbone(model.normalize(x_adv)) - target).square().sum().backward()
        x_adv = x_adv.detach() + attack.step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
    model.train()
    return x_adv.detach()


@pytest.mark.parametrize("rank", [None, 2])
def test_a_step_is_the_plain_loop_of_the_paper(rank):
    method, attack = FARE(adapter_rank=rank), PGD(eps=4 / 255, step_size=1 / 255, steps=4)
    x = labelled("original", size=8)["original"]
    fast, slow = (tiny_model(method, seed=1).train() for _ in range(2))
    for model in (fast, slow):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # adapters that have left their start
                    parameter.normal_(std=0.1, generator=generator)
    teacher = tiny_teacher(method)
    noise, seen = (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1) * attack.eps, []

    def frozen_attack(loss_fn, images):
        with frozen(fast):
            seen.append(attack(loss_fn, images, start=noise))
        return seen[-1]

    loss = method(fast, {"original": x}, StepContext(frozen_attack, teacher=teacher))["adversarial"]
    loss.backward()
    target = teacher.network.features(x, "adv")
    x_adv = slow_attack(slow, x, target, noise, attack)
    slow.zero_grad()
    torch.testing.assert_close(seen[0], x_adv)
    expected = (slow.backbone(slow.normalize(x_adv)) - target).square().sum(1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [name for name, p in fast.named_parameters() if p.grad is not None]
    assert all(("lora_" in name) is (rank is not None) for name in trained) and trained
    others = dict(slow.named_parameters())
    for name in trained:
        one = dict(fast.named_parameters())[name]
        torch.testing.assert_close(one.grad, others[name].grad, msg=name, atol=5e-5, rtol=1e-2)


def test_declarations_and_refusals():
    method = FARE()
    assert (method.title, method.views, method.norm_branches) == ("FARE", ("original",), ("adv",))
    assert (method.head, method.teacher_kind, method.starts_from_teacher) == ("none", "frozen", True)
    assert (method.trains, FARE(adapter_rank=8).trains) == ("all", "adapter")
    assert method.training_attack == PGD(eps=4 / 255, step_size=1 / 255, steps=10)
    assert (method.recipe["optimizer"], method.recipe["learning_rate"]) == ("adamw", 1e-5)
    with pytest.raises(ValueError, match="augmentation must be 'original', .* got 'view_1'"):
        FARE(augmentation="view_1")
    with pytest.raises(ValueError, match="rank must be a whole number, 1 or more, got 0"):
        FARE(adapter_rank=0)
