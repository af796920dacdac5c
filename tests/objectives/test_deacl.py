"""DeACL: the terms by hand, and one whole step against the plain loops of the released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, cosine, labelled
from training import tiny_model, tiny_teacher

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.deacl import DeACL


class Teacher(LinearModel):
    """Answers and counts."""

    def forward(self, images):
        self.embedded.append(("teacher", len(images)))
        assert not torch.is_grad_enabled()
        return images.flatten(1) @ self.weight["adv"]


def rows(model, images):
    return model.numpy(images, "adv")


@pytest.mark.parametrize("weight", [2.0, 3.0])
def test_the_terms_by_hand(weight):
    model, teacher, batch, attack = LinearModel(), Teacher(seed=9), labelled(), Nudge()
    x = batch["padded_crop"]
    terms = DeACL(adversarial_weight=weight)(model, batch, StepContext(attack, teacher=teacher))
    x_adv = attack.of(x)
    clean = -np.mean([cosine(u, v) for u, v in zip(rows(model, x), rows(teacher, x), strict=True)])
    adversarial = -weight * np.mean([cosine(u, v) for u, v in zip(rows(model, x_adv), rows(model, x), strict=True)])
    found = {name: term.item() for name, term in terms.items()}
    assert found == pytest.approx({"clean": clean, "adversarial": adversarial}, rel=1e-5)
    ((branch, images),) = model.passes  # one pass: running statistics mix
    assert branch == "adv" and torch.equal(images, torch.cat([x, x_adv]))
    assert teacher.embedded == [("teacher", N)]  # once, for attack and loss


def test_the_attack_raises_minus_the_sum_of_cosines_to_the_teacher():
    model, teacher, batch, attack = LinearModel(), Teacher(seed=9), labelled(), Nudge()
    DeACL()(model, batch, StepContext(attack, teacher=teacher))
    ((loss, attacked),) = attack.calls
    assert torch.equal(attacked, batch["padded_crop"])
    probe, before = torch.rand_like(attacked), len(teacher.embedded)
    expected = -sum(cosine(u, v) for u, v in zip(rows(model, probe), rows(teacher, attacked), strict=True))
    assert loss(probe).item() == pytest.approx(expected, rel=1e-5)
    assert model.embedded[-1] == ("adv", N) and len(teacher.embedded) == before


def slow_cosine(u, v):
    return (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))


def slow_attack(model, x, target, noise, attack):
    """`generate_training_AE`: evaluation mode, ball before box, last iterate."""
    model.eval()
    x_adv = x + noise
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        (-256 * slow_cosine(model.backbone(model.normalize(x_adv)), target).sum()).backward()
        x_adv = x_adv.detach() + attack.step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
    model.train()
    return x_adv.detach()


def test_a_step_is_the_plain_loop_of_the_released_code():
    attack, method = PGD(steps=4), DeACL()
    x = labelled(size=8)["padded_crop"]
    fast, slow = (tiny_model(method, seed=1).train() for _ in range(2))
    for model in (fast, slow):  # statistics that tell evaluation from training
        with torch.no_grad():
            model([("adv", torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(5)))])
    teacher = tiny_teacher(method)
    noise, seen = (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1) * attack.eps, []

    def frozen_attack(loss_fn, images):
        with frozen(fast):
            seen.append(attack(loss_fn, images, start=noise))
        return seen[-1]

    terms = method(fast, {"padded_crop": x}, StepContext(frozen_attack, teacher=teacher))
    sum(terms.values()).backward()
    target = teacher.network.eval().features(x, "adv")
    x_adv = slow_attack(slow, x, target, noise, attack)
    slow.zero_grad()
    torch.testing.assert_close(seen[0], x_adv)
    f, f_adv = slow.backbone(slow.normalize(torch.cat([x, x_adv]))).chunk(2)
    expected = -slow_cosine(f, target).mean() - 2 * slow_cosine(f_adv, f).mean()
    expected.backward()
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, atol=1e-5, rtol=1e-2)
    for (name, one), other in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_declarations_and_refusals():
    method = DeACL()
    assert (method.title, method.views, method.norm_branches) == ("DeACL", ("padded_crop",), ("adv",))
    assert (method.head, method.teacher_kind, method.attack_in_eval_mode) == ("none", "frozen", True)
    assert method.starts_from_teacher and not DeACL(student_scratch=True).starts_from_teacher
    assert method.training_attack == PGD(eps=8 / 255, step_size=2 / 255, steps=5)
    assert method.recipe["learning_rate"] == 0.5 and method.recipe["weight_decay"] == 5e-4
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"adversarial_weight must be positive, got {weight}: .* is 2"):
            DeACL(adversarial_weight=weight)
