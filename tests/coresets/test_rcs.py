"""Whole selections: against the algorithm written down slowly, within the budget, and without a trace."""

from __future__ import annotations

import dataclasses
import logging
import random

import numpy as np
import pytest
import torch
from selection_task import choose, make_task
from slow_rcs import image_losses, shuffled, slow_rcs
from torch import nn
from training import tiny_images

from hf_robust.coresets import RCS, load_coreset_method
from hf_robust.coresets import rcs as rcs_module
from hf_robust.data import collate_images
from hf_robust.losses import DISTANCE_KINDS
from hf_robust.models.folded import FoldedNetwork
from hf_robust.objectives import Objective
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.sat import SAT
from hf_robust.objectives.simclr import SimCLR

OBJECTIVES = {
    "acl": ACL,
    "acl_a2a": lambda: ACL(mode="a2a"),
    "acl_a2s": lambda: ACL(mode="a2s"),
    "dynacl": DynACL,
    "dynacl_momentum": lambda: DynACL(ema_decay=0.99),
    "air": AIR,
    "sat": SAT,
}
STEP = 0.5  # large enough to change the order of the candidates


def agrees(method: RCS, task, monkeypatch, **slow) -> tuple[list[int], list[float]]:
    """Compare with the slow selection; unfolded, so that both attacks see the same rounding."""
    monkeypatch.setattr(rcs_module, "FoldedNetwork", lambda model: model)
    found = choose(method, task)
    images, gains = slow_rcs(task, head_step_size=method.head_step_size, **slow)
    assert found.indices.tolist() == images
    np.testing.assert_allclose(found.gains, gains, rtol=2e-3, atol=1e-3 * max(map(abs, gains)))
    return images, gains


# ---------------------------------------------------------------------- the algorithm
@pytest.mark.parametrize("objective", [ACL, SAT])
@pytest.mark.parametrize("reattack", [True, False])
def test_equals_the_algorithm(objective, reattack, monkeypatch):
    task = make_task(objective(), images=29, budget=14)  # 23 to choose from: five minibatches and three images
    method = RCS(head_step_size=STEP, reattack=reattack)
    images, gains = agrees(method, task, monkeypatch, reattack=reattack)
    assert len(gains) == 4 and len(images) == 14
    # theta' has moved: without the step, later gains are others
    still = choose(RCS(head_step_size=0.0, reattack=reattack), task).gains
    assert abs(gains[-1] - still[-1]) > 0.02 * abs(still[-1])


def test_equals_the_algorithm_chunk_by_chunk(monkeypatch):
    task = make_task(ACL(), images=29, budget=17)
    method = RCS(head_step_size=STEP, chunk_size=2)
    images, gains = agrees(method, task, monkeypatch, chunk_size=2)
    assert len(gains) == 6  # two of each chunk
    chunks = [torch.cat(shuffled(task)[k : k + 2]).tolist() for k in (0, 2, 4)]
    assert [len(set(images) & set(chunk)) for chunk in chunks] == [6, 6, 5]
    assert set(images) != set(choose(RCS(head_step_size=STEP), task).indices.tolist())


def test_equals_the_algorithm_image_by_image(monkeypatch):
    task = make_task(ACL(), images=18, budget=10)
    images, gains = agrees(RCS(head_step_size=STEP, candidates="sample"), task, monkeypatch, by_sample=True)
    assert len(images) == len(gains) == 10
    assert gains[:4] == sorted(gains[:4], reverse=True)  # four at once, then theta' moves


@pytest.mark.parametrize("distance, step", [("kl_minmax", STEP), ("js_released", 8 * STEP)])
def test_the_released_variant_equals_its_description(distance, step, monkeypatch):
    """Gradients averaged over outputs, the step made twice."""
    method = RCS(variant="released", fraction=0.55, head_step_size=step, distance=distance, validation_steps=2)
    task = make_task(ACL(), images=29, budget=method.budget(23, 4))
    assert task.budget == 12
    images, gains = agrees(method, task, monkeypatch, released=True, distance=distance, validation_steps=2)
    assert len(gains) >= 3 and len(images) == 12
    once = choose(dataclasses.replace(method, head_step_size=step / 2), task).gains
    assert abs(gains[2] - once[2]) > 0.02 * abs(once[2])  # or twice and once are the same here


@pytest.mark.parametrize("candidates", ["batch", "sample"])
def test_without_a_step_and_a_new_attack_the_best_are_taken(candidates):
    task = make_task(ACL(), budget=8)
    method = RCS(head_step_size=0.0, reattack=False, candidates=candidates)
    nearly = 19 if candidates == "sample" else 17  # everything would need no search
    everything = choose(method, dataclasses.replace(task, budget=nearly))
    some = choose(method, task)
    assert everything.gains == sorted(everything.gains, reverse=True)
    assert some.indices.tolist() == everything.indices.tolist()[:8]
    assert len(everything.gains) == (19 if candidates == "sample" else 5)


def test_everything_is_chosen_without_a_search():
    task = make_task(ACL(), budget=20)
    found = choose(RCS(), dataclasses.replace(task, views=None))  # would fail on the first candidate
    assert found.indices.tolist() == task.pool.tolist() and found.gains == []


def test_chosen_images_serve_the_validation_split():
    """The gain is what one step on the candidate takes off the distance, to first order."""
    task = make_task(ACL(), budget=19)
    found = choose(RCS(head_step_size=0.0, reattack=False), task)
    assert len(found.gains) == 5 and found.gains[0] > found.gains[-1]
    images, gains = slow_rcs(task, head_step_size=0.0, reattack=False)
    assert found.indices.tolist()[:4] == images[:4]
    np.testing.assert_allclose(found.gains, gains, rtol=0.05, atol=0.05 * max(map(abs, gains)))  # folded, here


@pytest.mark.parametrize("objective", [ACL, SAT])
def test_the_loss_of_the_slow_selection_is_the_one_that_is_trained(objective):
    """Guards the yardstick."""
    task = make_task(objective())
    model, rows, generator = task.model.eval(), shuffled(task)[0], task.generator("attack 0")
    batch = task.views(collate_images([task.dataset[int(k)] for k in rows]), task.generator("views 0"))
    context = StepContext(lambda loss_fn, x: task.attack(loss_fn, x, generator=generator))
    expected = torch.stack(list(task.objective(model, batch, context).values())).sum()
    losses = image_losses(model, task, rows, 0)
    torch.testing.assert_close(losses.mean(), expected)
    assert losses.shape == (4,) and losses.std() > 0


# ---------------------------------------------------------------------- what comes out
@pytest.mark.parametrize("candidates", ["batch", "sample"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_exactly_the_budget_of_distinct_images_of_the_pool(name, candidates):
    objective: Objective = OBJECTIVES[name]()
    task = make_task(objective, images=30, held_out=7, budget=9)
    method = RCS(candidates=candidates, fraction=0.4, validation_steps=1, attack_steps=1)
    method.check(objective, task.model, task.dataset)
    found = choose(method, task)
    assert found.indices.shape == (9,) and found.indices.dtype == torch.int64
    assert set(found.indices.tolist()) <= set(task.pool.tolist()) and len(found.indices.unique()) == 9
    assert not set(found.indices.tolist()) & set(task.validation.tolist())
    assert len(found.gains) == (3 if candidates == "batch" else 9) and all(np.isfinite(found.gains))


@pytest.mark.parametrize("candidates", ["batch", "sample"])
@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("budget", [1, 9, 23])
def test_chunks_share_the_budget_exactly(candidates, chunk_size, budget):
    task = make_task(ACL(), images=29, budget=budget)  # six minibatches, the last of three
    method = RCS(candidates=candidates, chunk_size=chunk_size, reattack=False, validation_steps=1, attack_steps=1)
    found = choose(method, task)
    assert len(found.indices) == budget == len(found.indices.unique())
    assert set(found.indices.tolist()) <= set(range(23))


@pytest.mark.parametrize("candidates", ["batch", "sample"])
def test_the_pool_need_not_be_the_first_images(candidates):
    method = RCS(candidates=candidates, validation_fraction=0.3)
    pool, validation = method.split(26, seed=8)
    task = make_task(ACL(), pool=pool, validation=validation, budget=7)
    found = choose(method, task)
    assert len(found.indices.unique()) == 7 and bool(torch.isin(found.indices, pool).all())
    assert not bool(torch.isin(found.indices, validation).any())


def test_equal_seeds_give_the_same_coreset_and_other_seeds_another():
    task = make_task(ACL())
    torch.manual_seed(1)
    one = choose(RCS(), task)
    torch.manual_seed(2)
    again = choose(RCS(), task)
    assert torch.equal(one.indices, again.indices) and one.gains == again.gains
    other = dataclasses.replace(task, generator=lambda name: torch.Generator().manual_seed(len(name)))
    assert choose(RCS(), other).gains != one.gains


@pytest.mark.parametrize("distance", DISTANCE_KINDS)
def test_every_distance_selects(distance):
    found = choose(RCS(distance=distance), make_task(ACL()))
    assert len(found.indices) == 9 and any(gain != 0 for gain in found.gains)


# ---------------------------------------------------------------------- what stays
def snapshot(model: nn.Module) -> dict[str, object]:
    state = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    pointers = {f"{name} storage": t.data_ptr() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {f"{name} requires_grad": p.requires_grad for name, p in model.named_parameters()}
    grads = {f"{name} grad": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = {f"{name} training": m.training for name, m in model.named_modules()}
    hooks = {f"{name} forward": "forward" in vars(m) for name, m in model.named_modules()}
    numpy_state = np.random.get_state()
    rng = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy_state[1].copy()), "at": numpy_state[2]}
    return {**state, **pointers, **flags, **grads, **modes, **hooks, **rng, "python": random.getstate()}


@pytest.mark.parametrize("name", ["acl", "dynacl", "air", "sat", "acl_a2s"])
@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"candidates": "sample"}], ids=["batch", "sample"])
def test_a_selection_leaves_no_trace(name, options):
    objective = OBJECTIVES[name]()
    task = make_task(objective, images=20, budget=6)
    model = task.model.train()
    parameters = list(model.parameters())
    for k, parameter in enumerate(parameters):
        parameter.requires_grad_(k % 5 != 1)
        parameter.grad = torch.full_like(parameter, float(k)) if k % 3 == 0 else None
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    model.switch.branch = model.switch.branches[-1]
    before, branch = snapshot(model), model.switch.branch
    choose(RCS(head_step_size=STEP, **options), task)
    after = snapshot(model)
    assert list(before) == list(after) and model.switch.branch == branch

    def same(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    assert [key for key in before if not same(before[key], after[key])] == []


def test_the_released_variant_leaves_no_trace_either():
    task = make_task(ACL(), budget=8)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    choose(RCS(variant="released", head_step_size=STEP), task)
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())


def test_the_backbone_is_folded(monkeypatch):
    made = []
    monkeypatch.setattr(rcs_module, "FoldedNetwork", lambda model: made.append(FoldedNetwork(model)) or made[-1])
    choose(RCS(), make_task(ACL()))
    assert len(made) == 1


# ---------------------------------------------------------------------- settings
def test_budgets_on_cifar():
    for fraction, images in ((0.05, 2475), (0.1, 4950), (0.2, 9900)):
        assert RCS(fraction=fraction).budget(49_500, 512) == images
    for fraction, picks in ((0.05, 4), (0.1, 9), (0.2, 19)):
        assert RCS(fraction=fraction, variant="released").budget(49_500, 512) == picks * 512
    for fraction, picks in ((0.05, 9), (0.1, 19), (0.2, 38)):  # STL-10
        assert RCS(fraction=fraction, variant="released").budget(99_000, 512) == picks * 512


def test_the_published_settings_are_the_defaults():
    method = RCS()
    assert (method.fraction, method.warmup_epochs, method.interval) == (0.2, 100, 20)
    assert (method.validation_fraction, method.head_step_size, method.validation_steps) == (0.01, 0.01, 3)
    assert load_coreset_method("rcs") is RCS


@pytest.mark.parametrize(
    "field, value",
    [
        ("candidates", "images"),
        ("variant", "paper"),
        ("distance", "cosine"),
        ("validation_fraction", 0.0),
        ("validation_fraction", float("nan")),
        ("validation_fraction", 1.0),
        ("head_step_size", -0.1),
        ("head_step_size", float("nan")),
        ("attack_steps", -1),
        ("validation_steps", 0),
        ("chunk_size", 0),
        ("fraction", 0.0),
        ("interval", 0),
    ],
)
def test_values_outside_their_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        RCS(**{field: value})


def test_the_released_variant_scores_minibatches():
    with pytest.raises(ValueError, match="candidates='batch'"):
        RCS(variant="released", candidates="sample")


def test_the_released_variant_is_refused_where_its_signature_vanishes():
    task = make_task(SAT())
    with pytest.raises(ValueError, match="rounding noise. Leave variant='fixed'"):
        RCS(variant="released").check(task.objective, task.model, task.dataset)
    RCS().check(task.objective, task.model, task.dataset)
    contrastive = make_task(ACL())
    RCS(variant="released").check(contrastive.objective, contrastive.model, contrastive.dataset)


def test_a_method_without_a_candidate_loss_is_refused():
    with pytest.raises(ValueError, match="SimCLR has no loss .* --coreset random"):
        RCS().check(SimCLR(), None, tiny_images())


def test_a_diverged_network_is_named():
    task = make_task(ACL())
    with torch.no_grad():
        task.model.projector.fc1.weight.fill_(float("nan"))
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(FloatingPointError, match="diverged"):
            choose(RCS(), task)
    finally:
        logging.disable(logging.NOTSET)
