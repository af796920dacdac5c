"""AFF: TRADES and its attack, written down by hand and as the plain loop, through one norm branch and through two."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, labelled, slow_cross_entropy, slow_kl, softmax
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.base import StepContext

DUAL, SINGLE, POST = {}, {"clean_branch": "adv", "reference_branch": "adv"}, {"clean_branch": "adv"}


@pytest.mark.parametrize(("fields", "clean_branch"), [(DUAL, "clean"), (SINGLE, "adv"), (POST, "adv")])
@pytest.mark.parametrize("beta", [6.0, 0.5])
def test_the_terms_are_those_of_trades(fields, clean_branch, beta):
    model, batch, attack = LinearModel(), labelled(), Nudge()
    terms = AFF(beta=beta, **fields)(model, batch, StepContext(attack))
    x, y = batch["padded_crop"], batch["label"]
    x_adv = attack.of(x)
    clean, adv = model.numpy(x, clean_branch), model.numpy(x_adv, "adv")
    assert {name: term.item() for name, term in terms.items()} == {
        "clean": pytest.approx(np.mean(slow_cross_entropy(clean, y)), rel=1e-5),
        "kl": pytest.approx(beta * slow_kl(clean, adv), rel=1e-4),
    }
    assert [branch for branch, _ in model.passes] == [clean_branch, "adv"]  # clean images first
    assert model.passes[0][1] is x and torch.equal(model.passes[1][1], x_adv)


def test_gradient_flows_through_both_arguments_of_the_divergence():
    model, batch, attack = LinearModel(), labelled(), Nudge()
    AFF()(model, batch, StepContext(attack))["kl"].backward()
    images, images_adv = batch["padded_crop"], attack.of(batch["padded_crop"])
    p, q = softmax(model.numpy(images, "clean")), softmax(model.numpy(images_adv, "adv"))
    x, x_adv = (pixels.flatten(1).double().numpy() for pixels in (images, images_adv))
    np.testing.assert_allclose(model.weight["adv"].grad.numpy(), 6 * x_adv.T @ (q - p) / N, atol=1e-5)
    log_ratio = np.log(p / q)
    slow = p * (log_ratio - (p * log_ratio).sum(1, keepdims=True))
    np.testing.assert_allclose(model.weight["clean"].grad.numpy(), 6 * x.T @ slow / N, atol=1e-5)


@pytest.mark.parametrize(("fields", "reference"), [(DUAL, "clean"), (SINGLE, "adv"), (POST, "clean")])
def test_the_attack_raises_the_divergence_from_a_constant_computed_once(fields, reference):
    model, batch, attack = LinearModel(), labelled("resized_crop"), Nudge()
    AFF(augmentation="resized_crop", **fields)(model, batch, StepContext(attack))
    ((loss, attacked),) = attack.calls
    assert attacked is batch["resized_crop"]
    model.embedded.clear()
    for seed in (0, 1, 2):
        probe = torch.rand(attacked.shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        value = loss(probe)
        expected = slow_kl(model.numpy(attacked, reference), model.numpy(probe.detach(), "adv"))
        assert value.item() == pytest.approx(expected, rel=1e-4)
        model.zero_grad()
        value.backward()
        assert probe.grad is not None and model.weight["adv"].grad is not None
        assert model.weight["clean"].grad is None or not model.weight["clean"].grad.any()  # a constant
    assert model.embedded == [(reference, N), ("adv", N), ("adv", N), ("adv", N)]


def slow_divergence(clean, adv):
    p = clean.softmax(1)
    return (p * (clean.log_softmax(1) - adv.log_softmax(1))).sum() / len(clean)


def one_branch(model, images):
    return model.classifier(model.backbone(model.normalize(images)))


def test_a_step_with_one_branch_is_the_plain_loop():
    """Attack in evaluation mode against the statistics of before, losses in train mode, clean images first."""
    attack, batch = PGD(eps=8 / 255, step_size=3 / 255, steps=4), labelled(size=8)
    x, y = batch["padded_crop"], batch["label"]
    objective = AFF(beta=2.5, **SINGLE)
    fast = tiny_model(objective, seed=1).train()
    with torch.no_grad():  # statistics that tell evaluation from training
        fast([("adv", torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(5)))])
    slow = copy.deepcopy(fast)
    noise = 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))

    def frozen_attack(loss_fn, images):
        with frozen(fast):
            return attack(loss_fn, images, start=noise)

    terms = objective(fast, batch, StepContext(frozen_attack))
    sum(terms.values()).backward()

    slow.eval()
    x_adv = x + noise
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = slow_divergence(one_branch(slow, x).detach(), one_branch(slow, x_adv))
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + attack.step_size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
    slow.train()
    clean, adv = one_branch(slow, x), one_branch(slow, x_adv.detach())
    expected = -clean.log_softmax(1)[range(N), y].mean() + 2.5 * slow_divergence(clean, adv)
    expected.backward()
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, atol=1e-5, rtol=1e-3)
    for (name, one), other in zip(fast.named_buffers(), slow.buffers(), strict=True):  # 0.09 clean, 0.1 adversarial
        torch.testing.assert_close(one, other, msg=name)


def test_the_post_processing_leaves_the_clean_branch_alone():
    objective, batch = AFF(**POST), labelled(size=8)
    model = tiny_model(objective).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def attack(loss_fn, images):
        with frozen(model):
            return PGD(steps=1)(loss_fn, images)

    sum(objective(model, batch, StepContext(attack)).values()).backward()
    idle = {name: p for name, p in model.named_parameters() if "clean" in name.split(".")}
    assert idle and all(p.grad is None for p in idle.values())
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if "clean" in name.split(".")} <= same
    assert not {name for name in before if name.endswith("adv.running_mean")} & same


def test_branches_declare_what_the_model_must_have():
    assert (AFF().norm_branches, AFF().idle_branches) == (("clean", "adv"), ())
    assert (AFF(**SINGLE).norm_branches, AFF(**SINGLE).idle_branches) == (("adv",), ())
    assert (AFF(**POST).norm_branches, AFF(**POST).idle_branches) == (("clean", "adv"), ("clean",))
    other = AFF(reference_branch="adv")
    assert (other.norm_branches, other.idle_branches) == (("clean", "adv"), ())


def test_declarations_and_refusals():
    assert (AFF().title, AFF().views, AFF().beta) == ("AFF", ("padded_crop",), 6.0)
    assert AFF().needs_labels and AFF().trains == "all" and AFF().adversarial and AFF().attack_in_eval_mode
    assert AFF().training_attack == PGD(8 / 255, 2 / 255, 10, start_std=0.001)
    recipe = AFF().recipe
    assert (recipe["per_device_train_batch_size"], recipe["learning_rate"]) == (128, 0.1)
    assert (recipe["lr_milestones"], recipe["num_train_epochs"]) == ([15, 20], 25)
    for name in ("clean_branch", "reference_branch"):
        with pytest.raises(ValueError, match=f"{name} must be 'clean' or 'adv', got 'nor'"):
            AFF(**{name: "nor"})
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"beta must be positive, got {beta}: the published value is 6"):
            AFF(beta=beta)
    with pytest.raises(ValueError, match="augmentation must be"):
        AFF(augmentation="none")
    with pytest.raises(ValueError, match=r"AFF needs labels, got a batch with padded_crop"):
        AFF()(LinearModel(), {"padded_crop": torch.zeros(N, 3, 2, 2)}, StepContext(Nudge()))
