"""AdvCL: both terms by hand, the two attacks, the modes of the network meanwhile, refusals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from linear_model import PIXELS, LinearModel, N, Nudge, cosine, random_views, slow_cross_entropy
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.model_fit import check_fit
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.base import StepContext

CLUSTERS = [2, 3]
RELEASED, FIXED = AdvCL(clusters=CLUSTERS), AdvCL(clusters=CLUSTERS, formulation="fixed")


class HeadedModel(LinearModel):
    """The linear model with two classifiers, side by side, at the end of the branch `adv_ce`."""

    def __init__(self) -> None:
        super().__init__(branches=("clean", "adv", "adv_ce"))
        generator = torch.Generator().manual_seed(7)
        self.weight["adv_ce"] = torch.nn.Parameter(torch.randn(PIXELS, sum(CLUSTERS), generator=generator))


def batch_of(seed: int = 3) -> dict[str, torch.Tensor]:
    views = random_views(seed)
    views["padded_crop"] = views.pop("original")
    views["high_frequency"] = torch.randn(N, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return {**views, "pseudo_label_2": torch.tensor([0, 1, 1, 0, 1]), "pseudo_label_3": torch.tensor([2, 0, 1, 1, 2])}


def slow_supcon(views: list[np.ndarray], temperature: float, base_temperature: float) -> float:
    """-(T / T0) / M times the sum over anchors of the mean over their positives of log softmax over all others."""
    rows = [(image, row) for view in views for image, row in enumerate(view)]
    total = 0.0
    for k, (image, u) in enumerate(rows):
        similar = {j: cosine(u, v) / temperature for j, (_, v) in enumerate(rows) if j != k}
        normaliser = math.log(sum(math.exp(s) for s in similar.values()))
        positives = [similar[j] - normaliser for j in similar if rows[j][0] == image]
        assert len(positives) == len(views) - 1
        total += sum(positives) / len(positives)
    return -temperature / base_temperature * total / len(rows)


def slow_heads(logits: np.ndarray, batch: dict[str, torch.Tensor]) -> float:
    """Mean over the heads of the mean cross-entropy."""
    parts = {2: logits[:, :2], 3: logits[:, 2:]}
    losses = [np.mean(slow_cross_entropy(part, batch[f"pseudo_label_{k}"])) for k, part in parts.items()]
    return float(np.mean(losses))


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize("values", [{}, {"temperature": 0.2, "base_temperature": 0.2, "pseudo_label_weight": 0.7}])
def test_both_terms_by_hand(values):
    objective = dataclasses.replace(RELEASED, **values)
    model, batch, attack = HeadedModel(), batch_of(), Nudge()
    terms = objective(model, batch, StepContext(attack))
    x_cl, x_ce = attack.of(torch.cat([batch["padded_crop"]] * 2)).chunk(2)
    clean = [model.numpy(batch[name], "clean") for name in ("view_1", "view_2", "high_frequency")]
    contrast = slow_supcon([model.numpy(x_cl, "adv"), *clean], objective.temperature, objective.base_temperature)
    weight = objective.pseudo_label_weight
    assert {name: term.item() for name, term in terms.items()} == {
        "contrastive": pytest.approx(contrast, rel=1e-5),
        "pseudo_labels": pytest.approx(weight * slow_heads(model.numpy(x_ce, "adv_ce"), batch), rel=1e-5),
    }


def test_the_contrast_has_the_known_value():
    """Rows sin(0.7 (i + 1)) of 3 images, 4 views and 5 dimensions: computed apart from this code, in float64."""
    z = torch.sin(0.7 * torch.arange(1, 61, dtype=torch.float64)).view(3, 4, 5)
    assert AdvCL().contrast(list(z.unbind(1))).item() == pytest.approx(25.922006640248, abs=1e-10)
    plain = AdvCL(base_temperature=0.5).contrast(list(z.unbind(1)))
    assert plain.item() == pytest.approx(3.629080929635, abs=1e-10)


def test_gradients_are_those_of_the_equations():
    """Central differences of the transcription, through every weight of the model."""
    model, batch, attack = HeadedModel().double(), batch_of(), Nudge()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    terms = RELEASED(model, batch, StepContext(attack))
    torch.stack(list(terms.values())).sum().backward()
    x_cl, x_ce = attack.of(torch.cat([batch["padded_crop"]] * 2)).chunk(2)

    def value() -> float:
        clean = [model.numpy(batch[name], "clean") for name in ("view_1", "view_2", "high_frequency")]
        contrast = slow_supcon([model.numpy(x_cl, "adv"), *clean], 0.5, 0.07)
        return contrast + 0.2 * slow_heads(model.numpy(x_ce, "adv_ce"), batch)

    for branch in ("clean", "adv", "adv_ce"):
        weight = model.weight[branch]
        for place in ((0, 0), (5, 1), (11, 3)):
            with torch.no_grad():
                weight[place] += 1e-5
                above = value()
                weight[place] -= 2e-5
                below = value()
                weight[place] += 1e-5
            assert weight.grad[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------- passes and attacks
def test_passes_stand_in_the_released_order_each_on_its_own():
    model, batch, attack = HeadedModel(), batch_of(), Nudge()
    RELEASED(model, batch, StepContext(attack))
    x_cl, x_ce = attack.of(torch.cat([batch["padded_crop"]] * 2)).chunk(2)
    expected = [("adv", x_cl), ("adv_ce", x_ce)]
    expected += [("clean", batch[name]) for name in ("view_1", "view_2", "high_frequency")]
    assert [branch for branch, _ in model.passes] == [branch for branch, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.passes, expected, strict=True))


@pytest.mark.parametrize("objective", [RELEASED, FIXED], ids=["released", "fixed"])
def test_two_separate_attacks_start_from_the_shifted_image(objective):
    model, batch, attack = HeadedModel(), batch_of(), Nudge()
    objective(model, batch, StepContext(attack))
    ((loss, x),) = attack.calls
    assert torch.equal(x, torch.cat([batch["padded_crop"]] * 2))
    images = torch.rand(2 * N, 3, 2, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(images), images)
    for_contrast, for_labels = (part.detach().requires_grad_() for part in images.chunk(2))
    clean = [model.embed(batch[name], "clean").detach() for name in ("view_1", "view_2", "high_frequency")]
    objective.contrast([model.embed(for_contrast, "adv"), *clean]).backward()
    objective.pseudo_label_loss(model.embed(for_labels, "adv_ce"), batch).backward()
    torch.testing.assert_close(gradient, torch.cat([for_contrast.grad, for_labels.grad]))


def test_clean_views_are_embedded_once_where_nothing_moves():
    for objective, times in ((FIXED, 1), (RELEASED, 3)):
        model, attack = HeadedModel(), Nudge()
        objective(model, batch_of(), StepContext(attack))
        ((loss, x),) = attack.calls
        model.embedded.clear()
        assert len({loss(x).item() for _ in range(3)}) == 1
        assert model.embedded.count(("clean", N)) == 3 * times
        assert model.embedded.count(("adv", N)) == model.embedded.count(("adv_ce", N)) == 3


@pytest.mark.parametrize(("objective", "during_attack"), [(RELEASED, 3), (FIXED, 0)], ids=["released", "fixed"])
def test_running_statistics_move_during_the_attack_only_as_released(objective, during_attack):
    model = tiny_model(objective).train()

    def attack(loss_fn, x):
        with frozen(model, eval_mode=objective.attack_in_eval_mode):
            return PGD(steps=3)(loss_fn, x)

    batch = {name: torch.rand(5, 3, 8, 8) for name in objective.views} | {
        k: v for k, v in batch_of().items() if k.startswith("pseudo")
    }
    objective(model, batch, StepContext(attack))
    counts = {
        name: {int(b) for n, b in model.named_buffers() if n.endswith(f".{name}.num_batches_tracked")}
        for name in ("clean", "adv", "adv_ce")
    }
    steps = 1 + during_attack
    assert counts == {"clean": {3 * steps}, "adv": {steps}, "adv_ce": {steps}}
    assert int(model.projector.bn1.num_batches_tracked) == 4 * steps  # one norm for all; adv_ce ends elsewhere


def test_the_attack_raises_the_contrast_asked_for():
    """A method that stands on this one may attack another loss than it learns."""
    model, batch, attack = HeadedModel(), batch_of(), Nudge()
    terms = RELEASED.terms(
        model, batch, StepContext(attack), lambda z: 2 * RELEASED.contrast(z), attack_contrast=lambda z: z[0].sum()
    )
    ((loss, x),) = attack.calls
    part = RELEASED.pseudo_label_loss(model.embed(x.chunk(2)[1], "adv_ce"), batch)
    assert loss(x).item() == pytest.approx((model.embed(x.chunk(2)[0], "adv").sum() + part).item(), rel=1e-4)
    plain = RELEASED(HeadedModel(), batch, StepContext(Nudge()))
    assert terms["contrastive"].item() == pytest.approx(2 * plain["contrastive"].item(), rel=1e-6)
    assert terms["pseudo_labels"].item() == plain["pseudo_labels"].item()


# ---------------------------------------------------------------------- the network and declarations
def test_the_network_is_the_published_one():
    model = tiny_model(AdvCL())
    assert [name for name, _ in model.projector.named_children()] == ["fc1", "bn1", "act1", "fc2"]
    assert isinstance(model.projector.bn1, torch.nn.BatchNorm1d)  # one for all branches
    assert model.projector.fc2.out_features == 128 and model.projector.fc2.bias is not None
    assert [head.out_features for head in model.branch_heads["adv_ce"]] == [2, 10, 50, 100, 500]
    assert isinstance(model.normalize, torch.nn.Identity)
    assert model.default_branch == "adv"
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model.eval()
        assert model.embed(x, "adv").shape == (2, 128) and model.embed(x, "adv_ce").shape == (2, 662)


def test_published_values():
    objective = AdvCL()
    assert (objective.temperature, objective.base_temperature, objective.pseudo_label_weight) == (0.5, 0.07, 0.2)
    assert objective.clusters == [2, 10, 50, 100, 500] and objective.formulation == "released"
    assert objective.views == ("view_1", "view_2", "padded_crop", "high_frequency")
    assert dict(objective.recipe) == {
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "nesterov": False,
        "weight_decay": 1e-4,
        "min_learning_rate": 5e-4,
    }
    assert objective.view_options == {"minimal_area": 0.2} and objective.training_attack == PGD()
    assert objective.teacher_kind is None and objective.strength(0.7) == 1.0
    assert AdvCL().clusters is not AdvCL().clusters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0: the published value is 0\.5"),
        ({"base_temperature": -1.0}, r"base_temperature must be positive, got -1\.0: published is 0\.07"),
        (
            {"pseudo_label_weight": 0.0},
            r"pseudo_label_weight must be positive, got 0\.0: published is 0\.2; train ACL",
        ),
        ({"formulation": "paper"}, r"formulation must be 'released' or 'fixed', got 'paper'"),
        ({"clusters": []}, r"clusters must be rising numbers, 2 or more each, got \[\]"),
        ({"clusters": [10, 2]}, r"got \[10, 2\]: published are 2 10 50 100 500"),
        ({"clusters": [1, 2]}, r"got \[1, 2\]"),
        ({"clusters": [2, 2]}, r"got \[2, 2\]"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdvCL(**values)


def test_a_batch_without_pseudo_labels_is_refused():
    batch = batch_of()
    del batch["pseudo_label_3"]
    with pytest.raises(ValueError, match=r"AdvCL needs pseudo_label_3, got a batch with view_1.*RobustPretrainer"):
        RELEASED(HeadedModel(), batch, StepContext(Nudge()))


def test_a_model_without_its_heads_is_refused():
    plain = tiny_model(ACL(), norm_branches=RELEASED.norm_branches)
    with pytest.raises(ValueError, match=r"AdvCL ends .* \{'adv_ce': \[2, 3\]\}, the model has \{\}: build .*network"):
        check_fit(RELEASED, plain)
    with pytest.raises(ValueError, match=r"\[2, 3\]\}, the model has \{'adv_ce': \[2, 10, 50, 100, 500\]\}"):
        check_fit(RELEASED, tiny_model(AdvCL()))
    check_fit(RELEASED, tiny_model(RELEASED))
