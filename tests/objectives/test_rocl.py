"""RoCL: the released loss by hand, its attack, its one branch, what it asks of network and views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, cosine, random_views
from torch import Tensor
from training import tiny_images, tiny_model, tiny_trainer

from hf_robust.attacks import PGD, frozen
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.rocl import RoCL
from hf_robust.views import Views


def slow_ntx(views: list[np.ndarray], temperature: float = 0.5) -> float:
    """Sum over the ordered pairs of views of -log(e^(c / t) / sum over all other rows), over the number of rows."""
    rows, n = np.concatenate(views), len(views[0])
    total = 0.0
    for i in range(len(rows)):
        others = sum(math.exp(cosine(rows[i], rows[k]) / temperature) for k in range(len(rows)) if k != i)
        for j in range(i % n, len(rows), n):
            if j != i:
                total += -math.log(math.exp(cosine(rows[i], rows[j]) / temperature) / others)
    return total / len(rows)


@pytest.mark.parametrize(("temperature", "weight"), [(0.5, 1 / 256), (0.2, 3.0)])
def test_terms_by_hand(temperature, weight):
    model, views, attack = LinearModel(branches=("adv",)), random_views(), Nudge()
    terms = RoCL(temperature, weight)(model, views, StepContext(attack))
    z_1, z_2, z_adv = (model.numpy(x, "adv") for x in (views["view_1"], views["view_2"], attack.of(views["view_1"])))
    assert list(terms) == ["contrastive", "regularizer"]
    assert terms["contrastive"].item() == pytest.approx(slow_ntx([z_1, z_2, z_adv], temperature), rel=1e-5)
    assert terms["regularizer"].item() == pytest.approx(weight * slow_ntx([z_adv, z_2], temperature), rel=1e-5)


def test_passes_are_those_of_the_release():
    """First the pair of the regulariser, then all three views as one batch, whose statistics mix."""
    model, views, attack = LinearModel(branches=("adv",)), random_views(), Nudge()
    RoCL()(model, views, StepContext(attack))
    x_adv = attack.of(views["view_1"])
    (first, pair), (second, three) = model.passes
    assert (first, second) == ("adv", "adv")
    assert torch.equal(pair, torch.cat([x_adv, views["view_2"]]))
    assert torch.equal(three, torch.cat([views["view_1"], views["view_2"], x_adv]))


def test_the_attack_raises_the_contrast_with_view_2_and_embeds_it_once():
    model, views, attack = LinearModel(branches=("adv",)), random_views(), Nudge()
    RoCL()(model, views, StepContext(attack))
    ((loss, x),) = attack.calls
    assert x is views["view_1"]
    expected = slow_ntx([model.numpy(attack.of(x), "adv"), model.numpy(views["view_2"], "adv")])
    model.embedded.clear()
    assert loss(attack.of(x)).item() == pytest.approx(expected, rel=1e-5)
    loss(x)
    assert model.embedded == [("adv", N)] * 3


def test_the_attack_follows_the_anchors_gradient_alone():
    """Keys are constants in the release, in the attack, too: half of the gradient of a symmetric loss is missing."""
    model, views, attack = LinearModel(branches=("adv",)), random_views(), Nudge()
    RoCL()(model, views, StepContext(attack))
    x = views["view_1"].clone().requires_grad_(True)
    (found,) = torch.autograd.grad(attack.calls[0][0](x), x)

    def normalised(images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(model.embed(images, "adv"), dim=1)

    u, partner = normalised(x), normalised(views["view_2"])
    keys = torch.cat([u, partner]).detach()
    scores = (u @ keys.T / 0.5)[:, :]
    scores = scores.masked_fill(torch.eye(N, 2 * N, dtype=torch.bool), float("-inf"))
    slow = (scores.logsumexp(1) - (u * partner).sum(1) / 0.5).sum() / (2 * N)
    (expected,) = torch.autograd.grad(slow, x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_embedding_of_the_contrast_comes_from_the_published_head():
    objective = RoCL()
    config = RobustPretrainingConfig(norm_branches=objective.norm_branches, **objective.network)
    model = RobustModelForPreTraining(config)
    shapes = {name: tuple(p.shape) for name, p in model.projector.named_parameters()}
    assert shapes == {"fc1.weight": (2048, 512), "fc1.bias": (2048,), "fc2.weight": (128, 2048), "fc2.bias": (128,)}
    assert isinstance(model.normalize, torch.nn.Identity)


def test_views_are_the_published_ones(tmp_path):
    trainer = tiny_trainer(tmp_path, RoCL())
    assert trainer.views == Views(8, minimal_area=0.08, colors_first=True)
    assert trainer.describe_run()["views"] == repr(trainer.views)


def test_published_attack_and_training():
    attack = RoCL.training_attack
    assert (attack.eps, attack.step_size, attack.steps, attack.clip_start) == (0.0314, 0.007, 7, True)
    assert RoCL.recipe["learning_rate"] == pytest.approx(0.1 * 15)


def test_a_step_lowers_the_loss_on_the_same_images(tmp_path):
    objective = RoCL()
    model = tiny_model(objective).train()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.rand(6, 3, 8, 8, generator=generator) for name in objective.views}

    def attack(loss, x):
        with frozen(model):
            return PGD(steps=2, random_start=False)(loss, x)

    def loss() -> Tensor:
        return sum(objective(model, batch, StepContext(attack)).values())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = loss()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < before - 0.01


def test_training_resumes_exactly_and_exports(tmp_path):
    straight = tiny_trainer(tmp_path, RoCL(), save_strategy="steps", save_steps=4, save_total_limit=10)
    straight.train()
    resumed = tiny_trainer(tmp_path, RoCL(), save_strategy="steps", save_steps=4, save_total_limit=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert straight.save_encoder(tmp_path / "encoder").is_dir()
    assert straight.encoder_branch == "adv" and len(tiny_images()) == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [((0.0,), "temperature must be positive"), ((0.5, -1.0), "regularizer_weight must be 0 or more, got -1")],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RoCL(*values)
