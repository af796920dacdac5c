"""What a candidate is, its gradient, and that single images and minibatches measure the same thing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from selection_task import ATTACK, Watched, make_task, plain_gradient
from torch import Tensor

from hf_robust.attacks import PGD, frozen
from hf_robust.coresets.candidates import Chunk, Minibatches, Samples, Scorer, minibatches
from hf_robust.coresets.head import Head
from hf_robust.data import collate_images
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.sat import SAT

OBJECTIVES = {"acl": ACL, "dynacl": DynACL, "air": AIR, "a2a": lambda: ACL(mode="a2a"), "sat": SAT}
ROWS = [torch.tensor([3, 1, 7, 5]), torch.tensor([0, 2, 9, 4]), torch.tensor([6, 8])]


class Direction:
    """Stands in for the validation split: a gradient that depends on theta' in a simple way."""

    def __init__(self, head: Head) -> None:
        self.base = torch.randn(head.length, generator=torch.Generator().manual_seed(4))

    def gradient(self, weights: dict[str, Tensor]) -> Tensor:
        return self.base + 10 * torch.cat([v.flatten() for v in weights.values()])


class Setting:
    def __init__(self, objective, kind=Minibatches, *, step_size: float = 0.5, signature: bool = False) -> None:
        task = make_task(objective)
        self.model = task.model.eval()
        self.watched = Watched(self.model)
        self.batches: list[dict[str, Tensor]] = []
        self.ticks = 0

        def draw(inputs, generator):
            self.batches.append(task.views(inputs, generator))
            return self.batches[-1]

        self.task = dataclasses.replace(task, model=self.watched, views=draw)
        self.head = Head(self.model)
        self.direction = Direction(self.head)
        with frozen(self.model), torch.no_grad():
            chunk = Chunk(ROWS, 10, Scorer(self.task, None), self.head, self.direction, self.tick)
            self.candidates = kind(chunk, step_size, self.head.row_means if signature else None)

    def tick(self) -> None:
        self.ticks += 1


def training_loss(setting: Setting, objective, number: int) -> Tensor:
    """What the objective computes in training on the batch and the adversarial images of a candidate."""
    rows = ROWS[number]
    views = len(setting.watched.passes) // len(ROWS)
    passes = setting.watched.passes[number * views : (number + 1) * views]
    x_adv = [x for branch, x in passes if branch == "adv"][-1]
    assert len(x_adv) in (len(rows), 2 * len(rows))
    context = StepContext(lambda loss_fn, x: x_adv, setting.task.progress)
    return torch.stack(list(objective(setting.model, setting.batches[number], context).values())).sum()


@pytest.mark.parametrize("name", ["acl", "a2a", "sat"])
def test_gradient_of_a_minibatch_is_that_of_the_training_loss_in_evaluation_mode(name):
    objective = OBJECTIVES[name]()
    setting = Setting(objective)
    gains = setting.candidates.gains()
    direction = setting.direction.gradient(setting.head.weights)
    for number in range(len(ROWS)):
        expected = plain_gradient(setting.model, training_loss(setting, objective, number))
        # gains against unit vectors would be the gradient itself; against one direction it is their inner product
        torch.testing.assert_close(gains[number], expected @ direction, rtol=1e-3, atol=1e-5)
        found = setting.candidates._gradient(torch.tensor([number]))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["dynacl", "air"])
def test_the_loss_of_a_candidate_is_the_unweighted_contrastive_one(name):
    setting, plain = Setting(OBJECTIVES[name]()), Setting(ACL())
    expected = plain_gradient(setting.model, training_loss(setting, ACL(), 1))
    torch.testing.assert_close(setting.candidates._gradient(torch.tensor([1])), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(setting.candidates.gains(), plain.candidates.gains(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mean_gain_of_the_images_is_the_gain_of_their_minibatch(name):
    objective = OBJECTIVES[name]()
    batch, sample = Setting(objective), Setting(objective, Samples)
    gains, bounds = sample.candidates.gains(), [0, 4, 8, 10]
    assert gains.shape == (10,) and gains.std() > 0
    means = torch.stack([gains[a:b].mean() for a, b in zip(bounds, bounds[1:], strict=False)])
    torch.testing.assert_close(means, batch.candidates.gains(), rtol=1e-4, atol=1e-5)


def test_the_gain_of_an_image_is_the_inner_product_with_its_own_gradient():
    setting = Setting(ACL(), Samples)
    gains, direction = setting.candidates.gains(), setting.direction.gradient(setting.head.weights)
    slow = [setting.candidates._gradient(torch.tensor([k])) @ direction for k in range(10)]
    torch.testing.assert_close(gains, torch.stack(slow), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, picks", [(Minibatches, [1]), (Minibatches, [2, 0]), (Samples, [8, 0, 5])])
def test_taking_candidates_steps_along_their_mean_gradient(kind, picks):
    setting = Setting(ACL(), kind, step_size=0.25)
    candidates, head = setting.candidates, setting.head
    single = torch.stack([candidates._gradient(torch.tensor([k])) for k in picks])
    before = candidates.gains()
    candidates.take(torch.tensor(picks))
    moved = torch.cat([v.flatten() for v in candidates._weights.values()])
    start = torch.cat([v.flatten() for v in head.weights.values()])
    torch.testing.assert_close(start - moved, 0.25 * single.mean(0), rtol=1e-3, atol=1e-6)
    # the next step goes on from there; candidates are compared at theta: only the direction has changed
    shift = candidates.gains() - before
    everyone = torch.stack([candidates._gradient(torch.tensor([k])) for k in range(len(shift))])
    torch.testing.assert_close(shift, everyone @ (-2.5 * single.mean(0)), rtol=2e-3, atol=1e-4)
    candidates.take(torch.tensor(picks))
    torch.testing.assert_close(candidates.gains() - before, 2 * shift, rtol=2e-3, atol=1e-4)


def test_images_and_sizes_in_the_order_of_the_picks():
    batch, sample = Setting(ACL()), Setting(ACL(), Samples)
    assert batch.candidates.sizes.tolist() == [4, 4, 2] and sample.candidates.sizes.tolist() == [1] * 10
    assert batch.candidates.images([2, 0]).tolist() == [6, 8, 3, 1, 7, 5]
    assert sample.candidates.images([9, 0, 4]).tolist() == [8, 3, 0]
    assert batch.ticks == sample.ticks == 3


def test_a_signature_changes_what_is_compared_and_not_what_is_stepped():
    plain, released = Setting(ACL()), Setting(ACL(), signature=True)
    head, direction = plain.head, plain.direction.gradient(plain.head.weights)
    gradients = torch.stack([plain.candidates._gradient(torch.tensor([k])) for k in range(3)])
    expected = head.row_means(gradients) @ head.row_means(direction[None])[0]
    torch.testing.assert_close(released.candidates.gains(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(released.candidates.gains(), plain.candidates.gains())
    for setting in (plain, released):
        setting.candidates.take(torch.tensor([1]))
    for name, value in plain.candidates._weights.items():
        assert torch.equal(value, released.candidates._weights[name])


# ---------------------------------------------------------------------- scorer
def score(task, steps: int | None = None, number: int = 0, rows: Tensor = ROWS[0]):
    with frozen(task.model), torch.no_grad():
        return Scorer(task, steps)(rows, number)


def test_scoring_is_seeded_by_the_number_of_the_minibatch():
    task = make_task(ACL())
    one, again, other = (score(task, number=n).features for n in (0, 0, 1))
    assert all(torch.equal(a, b) and x == y for (x, a), (y, b) in zip(one, again, strict=True))
    assert not torch.equal(one[0][1], other[0][1])


def test_features_are_those_of_fresh_views_without_a_graph():
    task = make_task(ACL())
    features = score(task).features
    assert [(branch, tuple(f.shape)) for branch, f in features] == [("adv", (8, 8)), ("clean", (8, 8))]
    assert not any(f.requires_grad for _, f in features)
    inputs = collate_images([task.dataset[int(k)] for k in ROWS[0]])
    batch = task.views(inputs, task.generator("views 0"))
    with torch.no_grad():
        clean = task.model.eval().features(torch.cat([batch["view_1"], batch["view_2"]]), "clean")
    torch.testing.assert_close(features[1][1], clean)


@pytest.mark.parametrize(
    "attack, steps, expected",
    [
        (PGD(8 / 255, 2 / 255, 5), None, (5, 2 / 255)),
        (PGD(8 / 255, 2 / 255, 5), 5, (5, 2 / 255)),
        (PGD(8 / 255, 2 / 255, 5), 3, (3, 10 / 255 / 3)),
        (PGD(8 / 255, 2 / 255, 5), 1, (1, 10 / 255)),
        (PGD(8 / 255, 2 / 255, 5), 10, (10, 1 / 255)),
        (PGD(8 / 255, 2 / 255, 5), 0, (0, 10 / 255)),
        (PGD(0.9, 0.4, 5), 1, (1, 1.0)),  # the longest step of an L-inf attack
        (PGD(3.0, 1.0, 5, norm="l2"), 2, (2, 2.5)),
    ],
)
def test_fewer_attack_steps_are_longer(attack, steps, expected, monkeypatch):
    attacks, call = [], PGD.__call__

    def spy(self, *args, **kwargs):
        attacks.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PGD, "__call__", spy)
    score(make_task(ACL(), attack=attack), steps)
    assert len(attacks) == 1 and attacks[0].steps == expected[0] and attacks[0].norm == attack.norm
    assert attacks[0].step_size == pytest.approx(expected[1]) and attacks[0].eps == attack.eps


def test_candidates_are_attacked():
    task = make_task(ACL())
    attacked, unattacked = (score(task, steps) for steps in (None, 0))
    outputs = Head(task.model.eval()).outputs(Head(task.model).weights)
    losses = [scored.losses(outputs).mean() for scored in (attacked, unattacked)]
    assert ATTACK.steps > 0 and losses[0] > losses[1]


# ---------------------------------------------------------------------- minibatches
@pytest.mark.parametrize(
    "images, size, lengths",
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),  # the short one is a candidate like any other
        (13, 4, [4, 4, 5]),  # one image has nothing to contrast with
        (5, 4, [5]),
        (4, 8, [4]),
        (1, 8, [1]),
        (49_500, 512, [512] * 96 + [348]),  # CIFAR: 97 candidates
    ],
)
def test_a_pool_is_cut_into_minibatches(images, size, lengths):
    order = torch.arange(images).flip(0)
    parts = minibatches(order, size)
    assert [len(part) for part in parts] == lengths
    assert torch.equal(torch.cat(parts), order)


def test_images_loaded_ahead_are_the_same():
    """With worker processes as in training; the global random state is left alone."""
    here, ahead = Setting(ACL()), Setting(ACL())
    rows = {10 + k: r for k, r in enumerate(ROWS)}
    before = torch.get_rng_state()
    with frozen(ahead.model), torch.no_grad():
        scorer = Scorer(dataclasses.replace(ahead.task, workers=1), None)
        found = list(scorer.stream(rows))
        expected = list(Scorer(here.task, None).stream(rows))
    assert torch.equal(torch.get_rng_state(), before)
    assert [number for number, _ in found] == list(rows)
    for (_, one), (_, other) in zip(found, expected, strict=True):
        for (_, a), (_, b) in zip(one.features, other.features, strict=True):
            assert torch.equal(a, b)
