"""ALF: the cross-entropy of attacked images, on an encoder that stands still."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, labelled, slow_cross_entropy
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.slf import SLF


def test_the_only_term_is_the_cross_entropy_of_the_attacked_images():
    model, batch, attack = LinearModel(), labelled(), Nudge()
    terms = ALF()(model, batch, StepContext(attack))
    x_adv = attack.of(batch["padded_crop"])
    expected = np.mean(slow_cross_entropy(model.numpy(x_adv, "adv"), batch["label"]))
    assert {name: term.item() for name, term in terms.items()} == {"adversarial": pytest.approx(expected, rel=1e-5)}
    ((branch, images),) = model.passes
    assert branch == "adv" and torch.equal(images, x_adv)


def test_the_attack_raises_the_cross_entropy_of_the_labels():
    model, batch, attack = LinearModel(), labelled("resized_crop"), Nudge()
    ALF(augmentation="resized_crop")(model, batch, StepContext(attack))
    ((loss, attacked),) = attack.calls
    assert attacked is batch["resized_crop"]
    probe = torch.rand_like(attacked)
    expected = np.mean(slow_cross_entropy(model.numpy(probe, "adv"), batch["label"]))
    assert loss(probe).item() == pytest.approx(expected, rel=1e-5)


def test_a_run_is_the_plain_loop_on_the_features_of_a_network_that_stands_still():
    """Attack and update see one network, in evaluation mode; every step attacks the head of that step."""
    attack = PGD(eps=8 / 255, step_size=4 / 255, steps=2)
    batch = labelled(size=8)
    x, y = batch["padded_crop"], batch["label"]
    fast, slow = (tiny_model(ALF(), seed=1) for _ in range(2))
    for model in (fast, slow):  # statistics that tell evaluation from training
        model.train()
        with torch.no_grad():
            model([("adv", torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(5)))])
    fast.freeze_backbone()
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    noise = (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1) * attack.eps

    def frozen_attack(loss_fn, images):
        with frozen(fast):
            return attack(loss_fn, images, start=noise)

    slow.eval()
    optimizers = [torch.optim.SGD(m.classifier.parameters(), lr=0.3, momentum=0.9) for m in (fast, slow)]
    for _ in range(5):
        fast.train()
        optimizers[0].zero_grad()
        ALF()(fast, batch, StepContext(frozen_attack))["adversarial"].backward()
        optimizers[0].step()

        x_adv = x + noise
        for _ in range(attack.steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = -slow.classifier(slow.backbone(slow.normalize(x_adv))).log_softmax(1)[range(N), y].mean()
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + attack.step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
        optimizers[1].zero_grad()
        features = slow.backbone(slow.normalize(x_adv.detach())).detach()
        (-slow.classifier(features).log_softmax(1)[range(N), y].mean()).backward()
        optimizers[1].step()
    torch.testing.assert_close(fast.classifier.weight, slow.classifier.weight, atol=1e-5, rtol=1e-4)
    moved = {name for name, tensor in fast.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_declarations_and_refusals():
    assert (ALF().title, ALF().views, ALF().norm_branches) == ("ALF", ("padded_crop",), ("adv",))
    assert ALF().needs_labels and ALF().trains == "classifier" and ALF().adversarial and ALF().attack_in_eval_mode
    assert ALF().training_attack == PGD(8 / 255, 2 / 255, 10)
    assert ALF().recipe == SLF().recipe
    with pytest.raises(ValueError, match=r"ALF needs labels, got a batch with padded_crop: name the label column"):
        ALF()(LinearModel(), {"padded_crop": labelled()["padded_crop"]}, StepContext(Nudge()))
