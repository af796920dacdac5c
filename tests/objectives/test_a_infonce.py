"""A-InfoNCE: each host's loss by hand, the share that follows the attack, what it keeps over a resume, refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, cosine, random_views
from torch import Tensor
from training import tiny_model, tiny_trainer

from hf_robust.attacks import PGD, frozen
from hf_robust.multiview_losses import HardNegatives, adversarial_anchors, inferior_positives, supcon
from hf_robust.objectives.a_infonce import AInfoNCE
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.rocl import RoCL
from hf_robust.objectives.simclr import SimCLR


def pairs(views: list[np.ndarray], temperature: float) -> np.ndarray:
    """`(V, V)` means over the images of -log softmax, by view of the anchor and of the positive."""
    rows, n, count = np.concatenate(views), len(views[0]), len(views)
    found = np.zeros((count, count))
    for i in range(len(rows)):
        others = sum(math.exp(cosine(rows[i], rows[k]) / temperature) for k in range(len(rows)) if k != i)
        for j in range(i % n, len(rows), n):
            if j != i:
                found[i // n, j // n] -= math.log(math.exp(cosine(rows[i], rows[j]) / temperature) / others) / n
    return found


def run(objective: AInfoNCE, **context: Any) -> tuple[LinearModel, dict[str, Tensor], Nudge, dict[str, Tensor]]:
    model, views, attack = LinearModel(branches=objective.norm_branches), random_views(), Nudge()
    return model, views, attack, objective(model, views, StepContext(attack, **context))


# ---------------------------------------------------------------------- RoCL
def test_inferior_positives_on_rocl_are_the_released_sum():
    """1/3N sum of l12 + l21 + w (sigma (l1a + l2a) + (1 - sigma) (la1 + la2)), with w = 2 pair_weight."""
    objective = AInfoNCE(RoCL(), "ip", sigma=0.2, pair_weight=0.5)
    model, views, attack, terms = run(objective)
    z = [model.numpy(x, "adv") for x in (views["view_1"], views["view_2"], attack.of(views["view_1"]))]
    m = pairs(z, 0.5)
    expected = (m[0, 1] + m[1, 0] + 1.0 * (0.2 * (m[0, 2] + m[1, 2]) + 0.8 * (m[2, 0] + m[2, 1]))) / 3
    assert terms["contrastive"].item() == pytest.approx(expected, rel=1e-5)
    plain = RoCL()(model, views, StepContext(attack))
    assert terms["regularizer"].item() == plain["regularizer"].item()
    assert terms.keys() == plain.keys()


def test_neutral_inferior_positives_on_rocl_are_rocl():
    objective = AInfoNCE(RoCL(), "ip", sigma=0.5)
    model, views, attack, terms = run(objective)
    expected = RoCL()(model, views, StepContext(attack))
    assert terms["contrastive"].item() == pytest.approx(expected["contrastive"].item(), rel=1e-6)


@pytest.mark.parametrize("variant", ["hn", "iphn"])
@pytest.mark.parametrize(("formulation", "form"), [("fixed", "fixed"), ("released", "released_rocl")])
def test_hard_negatives_on_rocl(variant, formulation, form):
    objective = AInfoNCE(RoCL(), variant, beta=1.0, tau_plus=0.12, infonce_formulation=formulation)
    model, views, attack, terms = run(objective)
    z = [model.embed(x, "adv") for x in (views["view_1"], views["view_2"], attack.of(views["view_1"]))]
    rule = inferior_positives(3, (2,), 0.2) if variant == "iphn" else None
    hard = HardNegatives(1.0, 0.12, form)
    expected = supcon(z, positives="sum", detach_keys=True, pairs=rule, hard_negatives=hard)
    assert terms["contrastive"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["contrastive"].item() != pytest.approx(RoCL().contrast(z).item(), rel=1e-3)
    ((loss, x),) = attack.calls  # the host's own
    RoCL()(model, views, StepContext(again := Nudge()))
    assert loss(x).item() == again.calls[0][0](x).item()


# ---------------------------------------------------------------------- ACL
def test_inferior_positives_on_acl_add_the_mean_over_the_cross_pairs():
    objective = AInfoNCE(ACL(), "ip", sigma=0.3, pair_weight=0.7)
    model, views, attack, terms = run(objective)
    x = torch.cat([views["view_1"], views["view_2"]])
    z = [*np.split(model.numpy(x, "clean"), 2), *np.split(model.numpy(attack.of(x), "adv"), 2)]
    m = pairs(z, 0.5)
    expected = 0.7 * np.mean([0.3 * m[c, a] + 0.7 * m[a, c] for c in (0, 1) for a in (2, 3)])
    assert terms["inferior_positives"].item() == pytest.approx(expected, rel=1e-5)
    host = ACL()(model, views, StepContext(attack))
    assert {name: terms[name].item() for name in host} == pytest.approx({k: v.item() for k, v in host.items()})


def test_without_share_the_added_term_leaves_clean_embeddings_alone():
    model, _, _, terms = run(AInfoNCE(ACL(), "ip", sigma=0.0))
    gradients = torch.autograd.grad(terms["inferior_positives"], list(model.weight.parameters()), allow_unused=True)
    clean, adversarial = (dict(zip(model.weight.keys(), gradients, strict=True))[name] for name in ("clean", "adv"))
    assert (clean is None or clean.abs().max() < 1e-7) and adversarial.abs().max() > 1e-3


@pytest.mark.parametrize("base", [ACL(0.2), DynACL()], ids=["acl", "dynacl"])
def test_hard_negatives_weigh_within_each_stream_of_acl(base):
    progress = 0.7
    model, views, attack, terms = run(AInfoNCE(base, "hn"), progress=progress)
    x = torch.cat([views["view_1"], views["view_2"]])
    expected = {}
    for name, weight, z in zip(
        ("clean", "adversarial"),
        base.weights(progress),
        (model.embed(x, "clean"), model.embed(attack.of(x), "adv")),
        strict=True,
    ):
        loss = supcon(z.chunk(2), temperature=base.temperature, hard_negatives=HardNegatives())
        expected[name] = (weight * loss).item()
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-6)
    assert AInfoNCE(base, "hn").strength(progress) == base.strength(progress)


# ---------------------------------------------------------------------- AdvCL
def advcl_step(objective: Any) -> tuple[dict[str, Tensor], list[Any], Any, dict[str, Tensor]]:
    """Terms, attacked losses, model and batch of one step in evaluation mode, where embeddings can be repeated."""
    model = tiny_model(objective).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.rand(6, 3, 8, 8, generator=generator) for name in objective.views}
    batch |= {f"pseudo_label_{k}": torch.arange(6) % k for k in objective.pseudo_classes}
    attack = Nudge()
    terms = objective(model, batch, StepContext(attack))
    return terms, attack.calls, model, batch


@pytest.mark.parametrize("variant", ["ip", "hn", "iphn"])
@pytest.mark.parametrize("formulation", ["fixed", "released"])
def test_on_advcl(variant, formulation):
    base = AdvCL(clusters=[2, 3], formulation="fixed")
    objective = AInfoNCE(base, variant, sigma=0.3, pair_weight=1.2, infonce_formulation=formulation)
    terms, attacked, model, batch = advcl_step(objective)
    ((loss, x),) = attacked
    x_cl, x_ce = Nudge.of(x).chunk(2)
    views = [
        model.embed(x_cl, "adv"),
        *(model.embed(batch[name], "clean") for name in ("view_1", "view_2", "high_frequency")),
    ]
    released = formulation == "released"
    symmetric = adversarial_anchors(4, (0,), 1.2) if released else None
    rule = symmetric if variant == "hn" else inferior_positives(4, (0,), 0.3, 1.2)
    hard = None if variant == "ip" else HardNegatives(1.0, 0.1, "released_advcl" if released else "fixed")
    expected = supcon(views, base_temperature=0.07, pairs=rule, hard_negatives=hard)
    assert terms["contrastive"].item() == pytest.approx(expected.item(), rel=1e-5)
    ce = 0.2 * base.pseudo_label_loss(model.embed(x_ce, "adv_ce"), batch)
    assert terms["pseudo_labels"].item() == pytest.approx(ce.item(), rel=1e-5)
    contrast = supcon(views, base_temperature=0.07, pairs=symmetric)  # the attack weighs no negatives
    expected = contrast + base.pseudo_label_loss(model.embed(x_ce, "adv_ce"), batch)
    assert loss(Nudge.of(x)).item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------- the share that follows the attack
@pytest.mark.parametrize(
    ("distance", "expected"),
    [(1.01, 0.2), (1.0, 0.2), (0.4, 0.5), (0.39, 0.5), (0.7, 0.35), (0.85, 0.275)],
)
def test_share_between_the_distances(distance, expected):
    assert AInfoNCE(sigma_warmup=0.1).adapted_sigma(distance, 1.0) == pytest.approx(expected)


def test_share_where_the_mean_is_the_minimum():
    assert AInfoNCE(sigma_warmup=0.1).adapted_sigma(0.4, 0.4) == 0.2


class Measured(LinearModel):
    """Features are the pixels, so that the distance is known."""

    def features(self, images: Tensor, branch: str) -> Tensor:
        self.embedded.append((f"features {branch}", len(images)))
        return images.flatten(1)


@pytest.mark.parametrize("base", [RoCL(), ACL()], ids=["rocl", "acl"])
def test_distances_are_remembered_and_then_used(base):
    objective = AInfoNCE(base, sigma_warmup=0.5, minimal_distance=0.01)
    model, views = Measured(branches=objective.norm_branches), random_views()
    first = [name for name in objective.views if name.startswith("view")][0]
    memory: dict[str, float] = {}

    def step(progress: float, factor: float = 1.0) -> dict[str, Tensor]:
        def attack(loss: Any, x: Tensor) -> Tensor:
            return x + factor * (Nudge.of(x) - x)

        return objective(model, views, StepContext(attack, progress, memory=memory))

    branch = "adv" if isinstance(base, RoCL) else "clean"
    whole = torch.cat([views["view_1"], views["view_2"]]) if isinstance(base, ACL) else views[first]
    moved = (Nudge.of(whole) - whole)[:N].flatten(1).double()
    distance = (moved + 1e-6).norm(dim=1).mean().item()  # torch's pairwise_distance adds 1e-6
    step(0.0)
    assert model.embedded.count((f"features {branch}", N)) == 2
    assert memory == pytest.approx({"distance_sum": N * distance, "distance_images": N}, rel=1e-4)
    step(0.4, 2.0)
    mean = memory["distance_sum"] / memory["distance_images"]
    assert mean == pytest.approx(1.5 * distance, rel=1e-3)
    kept = dict(memory)
    terms = step(0.5)
    assert memory == kept  # the mean stands still after the warm-up
    share = objective.adapted_sigma(distance, mean)
    assert 0.2 < share < 0.5
    fixed = AInfoNCE(base, sigma=share)(model, views, StepContext(Nudge()))
    for name, value in fixed.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_a_run_whose_warm_up_was_not_seen_keeps_its_share():
    objective = AInfoNCE(RoCL(), sigma_warmup=0.1)
    model, views = Measured(branches=("adv",)), random_views()
    memory: dict[str, float] = {}
    objective(model, views, StepContext(Nudge(), 0.9, memory=memory))
    assert memory == {}


def test_nothing_is_measured_where_sigma_has_no_part():
    objective = AInfoNCE(RoCL(), "hn", sigma_warmup=0.5)
    model, memory = LinearModel(branches=("adv",)), {}  # which has no features
    objective(model, random_views(), StepContext(Nudge(), memory=memory))
    assert memory == {}


def test_measuring_moves_no_running_statistic():
    objective = AInfoNCE(ACL(), sigma_warmup=0.5)
    found = []
    for method in (objective, ACL()):
        model = tiny_model(method).train()
        generator = torch.Generator().manual_seed(0)
        batch = {name: torch.rand(6, 3, 8, 8, generator=generator) for name in method.views}

        def attack(loss: Any, x: Tensor, model: Any = model) -> Tensor:
            with frozen(model):
                return PGD(steps=1, random_start=False)(loss, x)

        method(model, batch, StepContext(attack))
        assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
        found.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_it_remembers_survives_a_resume(tmp_path):
    objective = AInfoNCE(RoCL(), "iphn", sigma_warmup=0.5, minimal_distance=0.0)
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 10}
    straight = tiny_trainer(tmp_path, objective, **settings)
    straight.train()
    early, late = (
        json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["stateful_callbacks"][
            "method_memory"
        ]
        for step in (3, 12)
    )
    assert early["distance_images"] == 3 * 4 and late["distance_images"] == 6 * 4  # half of twelve steps
    for step in (3, 9):
        resumed = tiny_trainer(tmp_path, objective, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.stateful_callbacks["method_memory"] == late
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
    straight.args.output_dir = str(tmp_path / "another")
    straight.train()
    assert straight.state.stateful_callbacks["method_memory"]["distance_images"] == 24  # and a new run forgets


# ---------------------------------------------------------------------- the object
@pytest.mark.parametrize(
    ("base", "variant", "title"), [(RoCL(), "ip", "RoCL-IP"), (ACL(), "hn", "ACL-HN"), (AdvCL(), "iphn", "AdvCL-IPHN")]
)
def test_it_declares_what_its_host_declares(base, variant, title):
    objective = AInfoNCE(base, variant)
    assert objective.title == title
    declared = ("views", "norm_branches", "network", "view_options", "pseudo_classes", "attack_in_eval_mode")
    for name in (*declared, "training_attack"):
        assert getattr(objective, name) == getattr(base, name), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": SimCLR()}, "A-InfoNCE stands on RoCL, AdvCL, or ACL and DynACL in mode 'ds', got SimCLR"),
        ({"base": ACL(mode="a2a")}, "in mode 'ds', got ACL"),
        ({"base": DynACL(ema_decay=0.99)}, "without a momentum encoder"),
        ({"variant": "both"}, "variant must be one of ip, hn, iphn, got 'both'"),
        ({"sigma": -0.1}, r"sigma must be in \[0, 1\], got -0.1"),
        ({"pair_weight": -1}, "weight must be 0 or more, got -1"),
        ({"sigma_warmup": 30}, r"sigma_warmup must be in \[0, 1\], got 30: published are 30/400"),
        ({"minimal_distance": -1}, "minimal_distance must be 0 or more, got -1"),
        ({"beta": -1}, "beta must be 0 or more, got -1"),
        ({"tau_plus": 1}, r"tau_plus must be in \[0, 1\), got 1"),
        ({"infonce_formulation": "paper"}, "infonce_formulation must be 'fixed' or 'released', got 'paper'"),
        ({"infonce_formulation": "released"}, "there is no released code on ACL: write infonce_formulation='fixed'"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AInfoNCE(**values)
