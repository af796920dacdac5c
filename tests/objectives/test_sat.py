"""SAT: cross-entropy and its attack, written down by hand and as the plain loops of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import WIDTH, LinearModel, N, Nudge, labelled, slow_cross_entropy
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.sat import SAT


def test_the_term_is_the_cross_entropy_of_the_adversarial_images():
    model, batch, attack = LinearModel(), labelled(), Nudge()
    terms = SAT()(model, batch, StepContext(attack))
    x_adv = attack.of(batch["padded_crop"])
    logits = model.numpy(x_adv, "adv")
    assert list(terms) == ["adversarial"]
    assert terms["adversarial"].item() == pytest.approx(np.mean(slow_cross_entropy(logits, batch["label"])), rel=1e-5)
    ((branch, images),) = model.passes
    assert branch == "adv" and torch.equal(images, x_adv)
    terms["adversarial"].backward()
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(WIDTH)[batch["label"].numpy()]
    slow = x_adv.flatten(1).double().numpy().T @ odds / N
    np.testing.assert_allclose(model.weight["adv"].grad.numpy(), slow, atol=1e-6)


def test_the_attack_raises_the_cross_entropy_of_the_labels():
    model, batch, attack = LinearModel(), labelled("resized_crop"), Nudge()
    SAT(augmentation="resized_crop")(model, batch, StepContext(attack))
    ((loss, attacked),) = attack.calls
    assert torch.equal(attacked, batch["resized_crop"])
    probe = torch.rand_like(attacked)
    expected = np.mean(slow_cross_entropy(model.numpy(probe, "adv"), batch["label"]))
    assert loss(probe).item() == pytest.approx(expected, rel=1e-5)
    assert model.embedded[-1] == ("adv", N)


def slow_pgd(model, x, y, noise, attack):
    """Madry et al. 2018, equation of section 2.1: network in evaluation mode, last iterate."""
    model.eval()
    x_adv = x + noise
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model.classifier(model.backbone(model.normalize(x_adv)))
        (-logits.log_softmax(1)[range(len(y)), y].sum()).backward()
        x_adv = x_adv.detach() + attack.step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
    model.train()
    return x_adv.detach()


def test_a_step_is_the_plain_loop_of_the_paper():
    attack = PGD(eps=8 / 255, step_size=3 / 255, steps=4)
    batch = labelled(size=8)
    x, y = batch["padded_crop"], batch["label"]
    fast, slow = (tiny_model(SAT(), seed=1).train() for _ in range(2))
    for model in (fast, slow):  # statistics that tell evaluation from training
        with torch.no_grad():
            model([("adv", torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(5)))])
    noise, seen = (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1) * attack.eps, []

    def frozen_attack(loss_fn, images):
        with frozen(fast):
            seen.append(attack(loss_fn, images, start=noise))
        return seen[-1]

    loss = SAT()(fast, batch, StepContext(frozen_attack))["adversarial"]
    loss.backward()
    x_adv = slow_pgd(slow, x, y, noise, attack)
    slow.zero_grad()
    torch.testing.assert_close(seen[0], x_adv)
    logits = slow.classifier(slow.backbone(slow.normalize(x_adv)))
    expected = -logits.log_softmax(1)[range(N), y].mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_candidates_are_scored_by_the_cross_entropy_of_each_image():
    model, batch, attack = LinearModel(), labelled(), Nudge()
    ((branch, x_adv),) = SAT().candidate_passes(model, batch, StepContext(attack))
    assert branch == "adv" and torch.equal(x_adv, attack.of(batch["padded_crop"]))
    losses = SAT().candidate_losses([model.embed(x_adv, "adv")], batch)
    assert losses.tolist() == pytest.approx(slow_cross_entropy(model.numpy(x_adv, "adv"), batch["label"]), rel=1e-5)


def test_the_loss_keeps_its_digits_in_bfloat16():
    batch = labelled()
    logits = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    losses = SAT().candidate_losses([logits], batch)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(slow_cross_entropy(logits.double().numpy(), batch["label"]), rel=1e-5)


def test_a_batch_without_labels_is_refused():
    batch = labelled()
    del batch["label"]
    for call in (SAT().__call__, SAT().candidate_passes):
        with pytest.raises(ValueError, match=r"SAT needs labels, got a batch with padded_crop: name the label column"):
            call(LinearModel(), batch, StepContext(Nudge()))
    with pytest.raises(ValueError, match="SAT needs labels"):
        SAT().candidate_losses([torch.zeros(N, WIDTH)], batch)


def test_declarations_and_refusals():
    assert (SAT().title, SAT().views, SAT().norm_branches, SAT().needs_labels) == (
        "SAT",
        ("padded_crop",),
        ("adv",),
        True,
    )
    assert SAT(augmentation="resized_crop").views == ("resized_crop",)
    assert SAT().attack_in_eval_mode and SAT().teacher_kind is None
    with pytest.raises(ValueError, match="augmentation must be 'padded_crop' or 'resized_crop', got 'view_1'"):
        SAT(augmentation="view_1")
