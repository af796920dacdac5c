"""LoRA: TRADES through one branch, of which the adapters and the classifier learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, labelled, slow_cross_entropy, slow_kl
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.lora import LoRA


def test_the_terms_and_the_attack_are_those_of_trades_with_one_branch():
    batch = labelled()
    models, attacks = [LinearModel(), LinearModel()], [Nudge(), Nudge()]
    methods = [LoRA(beta=3.0), AFF(beta=3.0, clean_branch="adv", reference_branch="adv")]
    terms, expected = (
        method(model, batch, StepContext(attack))
        for method, model, attack in zip(methods, models, attacks, strict=True)
    )
    x, x_adv = batch["padded_crop"], Nudge.of(batch["padded_crop"])
    clean, adv = models[0].numpy(x, "adv"), models[0].numpy(x_adv, "adv")
    assert terms["clean"].item() == pytest.approx(np.mean(slow_cross_entropy(clean, batch["label"])), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(3 * slow_kl(clean, adv), rel=1e-4)
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in expected.items()}
    assert [branch for branch, _ in models[0].passes] == ["adv", "adv"]
    probe = torch.rand_like(x)
    losses = [attack.calls[0][0](probe).item() for attack in attacks]
    assert losses[0] == losses[1] == pytest.approx(slow_kl(clean, models[0].numpy(probe, "adv")), rel=1e-4)


def test_a_run_moves_adapters_and_classifier_and_lowers_the_loss():
    objective, batch = LoRA(rank=2), labelled(size=8)
    model = tiny_model(objective)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []

    def attack(loss_fn, images):
        with frozen(model):
            start = 0.001 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
            return PGD(steps=2)(loss_fn, images, start)

    for _ in range(20):
        model.train()
        optimizer.zero_grad()
        loss = sum(objective(model, batch, StepContext(attack)).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {name for name in before if "lora_" in name or name.startswith("classifier.")}
    assert moved == expected and any("lora_A" in name for name in moved)
    assert losses[-1] < 0.7 * losses[0]


def test_declarations_and_refusals():
    assert (LoRA().title, LoRA().views, LoRA().norm_branches, LoRA().paths) == (
        "LoRA",
        ("padded_crop",),
        ("adv",),
        ("adv",),
    )
    assert LoRA().needs_labels and LoRA().trains == "adapter" and LoRA().adversarial
    assert (LoRA().beta, LoRA().rank, LoRA().alpha) == (6.0, 8, None)
    assert LoRA().training_attack == PGD(8 / 255, 2 / 255, 10, start_std=0.001)
    for rank in (0, -8, 1.5):
        with pytest.raises(ValueError, match=f"rank must be a whole number, 1 or more, got {rank}: the published"):
            LoRA(rank=rank)
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"alpha must be positive, got {alpha}: leave it out"):
            LoRA(alpha=alpha)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        LoRA(beta=0)
    with pytest.raises(ValueError, match=r"LoRA needs labels, got a batch with padded_crop"):
        LoRA()(LinearModel(), {"padded_crop": torch.zeros(N, 3, 2, 2)}, StepContext(Nudge()))
