"""DynACL: the published strengths and weights over 1000 epochs, and the momentum encoder of the official release."""

from __future__ import annotations

import copy

import pytest
import torch
from linear_model import LinearModel, N, Nudge, random_views, slow_nt_xent
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.dynacl import DynACL

EPOCHS = range(1, 1001)


def published_strength(epoch: int) -> float:
    """s(e) = 1 - floor((e - 1) / K) K / E with K = 50, E = 1000, in whole hundredths."""
    return (100 - (epoch - 1) // 50 * 5) / 100


# ---------------------------------------------------------------------- schedule
def test_strength_of_every_published_epoch():
    objective = DynACL()
    assert [objective.strength((e - 1) / 1000) for e in EPOCHS] == pytest.approx(
        [published_strength(e) for e in EPOCHS], abs=1e-12
    )
    levels = sorted({round(objective.strength((e - 1) / 1000), 9) for e in EPOCHS}, reverse=True)
    assert levels == [round(1 - 0.05 * k, 9) for k in range(20)]


def test_weights_of_every_published_epoch():
    objective = DynACL()
    for epoch in EPOCHS:
        shift = 2 / 3 * (1 - published_strength(epoch))
        assert objective.weights((epoch - 1) / 1000) == pytest.approx(((1 - shift) / 2, (1 + shift) / 2), abs=1e-12)
    clean, adversarial = objective.weights(0.999)
    assert adversarial - clean == pytest.approx(0.6333, abs=5e-5)  # w of the last period


@pytest.mark.parametrize("steps_per_epoch", [98, 97, 7])
def test_strength_falls_between_two_epochs_and_never_within_one(steps_per_epoch):
    objective = DynACL()
    total = 1000 * steps_per_epoch
    for epoch in range(50, 1000, 50):
        last, first = (objective.strength(s / total) for s in (epoch * steps_per_epoch - 1, epoch * steps_per_epoch))
        assert (last, first) == pytest.approx((published_strength(epoch), published_strength(epoch + 1)), abs=1e-12)


@pytest.mark.parametrize(
    ("period", "end"), [(0.05, 0.05), (0.5, 0.5), (1.0, 1.0), (0.3, 0.1), (1 / 3, 1 / 3), (0.1, 0.1)]
)
def test_strength_stays_above_zero_to_the_very_end(period, end):
    objective = DynACL(period=period)
    assert objective.strength(0.0) == 1.0
    assert objective.strength(1.0) == pytest.approx(end, abs=1e-9)
    assert objective.strength(0.99999) == pytest.approx(end, abs=1e-9)


# ---------------------------------------------------------------------- loss
@pytest.mark.parametrize(("progress", "shift"), [(0.0, 0.0), (0.5, 1 / 3), (0.95, 0.6333333)])
def test_terms_are_reweighted_and_the_attack_is_not(progress, shift):
    model, views, attack = LinearModel(), random_views(), Nudge()
    terms = DynACL()(model, views, StepContext(attack, progress))
    x = torch.cat([views["view_1"], views["view_2"]])
    clean = slow_nt_xent(*(model.numpy(part, "clean") for part in x.chunk(2)))
    adversarial = slow_nt_xent(*(model.numpy(part, "adv") for part in attack.of(x).chunk(2)))
    assert {k: v.item() for k, v in terms.items()} == {
        "clean": pytest.approx((1 - shift) / 2 * clean, rel=1e-5),
        "adversarial": pytest.approx((1 + shift) / 2 * adversarial, rel=1e-5),
    }
    ((loss, _),) = attack.calls
    assert loss(x).item() == pytest.approx(slow_nt_xent(*(model.numpy(part, "adv") for part in x.chunk(2))), rel=1e-5)


def test_weight_scale_zero_is_acl_under_weaker_augmentation():
    assert DynACL(weight_scale=0.0).weights(0.9) == (0.5, 0.5)
    assert DynACL(weight_scale=0.0).strength(0.9) == pytest.approx(0.1)


def test_candidates_of_a_coreset_are_scored_without_weights_and_without_the_momentum_encoder():
    """As the released `RCS.py` does."""
    for objective, teacher in ((DynACL(), None), (DynACL(ema_decay=0.99), LinearModel(1))):
        model, views, attack = LinearModel(), random_views(), Nudge()
        passes = objective.candidate_passes(model, views, StepContext(attack, 0.95, teacher))
        losses = objective.candidate_losses([model.embed(images, branch) for branch, images in passes], views)
        streams = [slow_nt_xent(*(model.numpy(x, branch) for x in images.chunk(2))) for branch, images in passes]
        assert losses.mean().item() == pytest.approx(sum(streams) / 2, rel=1e-5)
        ((loss, x),) = attack.calls
        expected = slow_nt_xent(*(model.numpy(part, "adv") for part in x.chunk(2)))
        assert loss(x).item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------- momentum encoder
def test_second_views_pass_the_teacher_in_loss_and_attack():
    model, teacher, views, attack = LinearModel(0), LinearModel(1), random_views(), Nudge()
    terms = DynACL(ema_decay=0.99)(model, views, StepContext(attack, 0.5, teacher))
    x = torch.cat([views["view_1"], views["view_2"]])
    x_adv = attack.of(x)

    def contrast(images, branch):
        first, second = images.chunk(2)
        return slow_nt_xent(model.numpy(first, branch), teacher.numpy(second, branch))

    assert {k: v.item() for k, v in terms.items()} == {
        "clean": pytest.approx(1 / 3 * contrast(x, "clean"), rel=1e-5),
        "adversarial": pytest.approx(2 / 3 * contrast(x_adv, "adv"), rel=1e-5),
    }
    for network, half in ((model, 0), (teacher, 1)):
        assert [branch for branch, _ in network.passes] == ["adv", "clean"]
        for (_, images), source in zip(network.passes, (x_adv, x), strict=True):
            assert torch.equal(images, source.chunk(2)[half])
    ((loss, _),) = attack.calls
    assert loss(x).item() == pytest.approx(contrast(x, "adv"), rel=1e-5)
    assert model.embedded[-1] == teacher.embedded[-1] == ("adv", N)


def test_the_teacher_runs_in_the_precision_of_the_training():
    model, teacher, seen = LinearModel(0), LinearModel(1), []
    teacher.register_forward_hook(lambda *call: seen.extend(z.dtype for z in call[2]))
    terms = DynACL(ema_decay=0.99)(
        model, random_views(), StepContext(Nudge(), 0.5, teacher, lambda: torch.autocast("cpu", torch.bfloat16))
    )
    assert seen == [torch.bfloat16] * 2
    exact = DynACL(ema_decay=0.99)(LinearModel(0), random_views(), StepContext(Nudge(), 0.5, LinearModel(1)))
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(exact[name].item(), rel=0.02)


def test_the_attack_moves_both_views():
    """The gradient with respect to second views runs through the teacher."""
    model, teacher, views, attack = LinearModel(0), LinearModel(1), random_views(), Nudge()
    DynACL(ema_decay=0.99)(model, views, StepContext(attack, 0.0, teacher))
    ((loss, x),) = attack.calls
    x = x.clone().requires_grad_()
    loss(x).backward()
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())


def test_the_teacher_gets_no_gradient_and_its_statistics_move():
    objective = DynACL(ema_decay=0.99)
    model = tiny_model(objective).train()
    teacher = copy.deepcopy(model).train()  # requires_grad on: the objective must not rely on the trainer
    networks = torch.nn.ModuleList([model, teacher])

    def attack(loss_fn, x):
        with frozen(networks):
            return PGD(steps=1)(loss_fn, x)

    weights = [p.clone() for p in teacher.parameters()]
    buffers = {name: b.clone() for name, b in teacher.named_buffers()}
    batch = {name: torch.rand(6, 3, 8, 8) for name in objective.views}
    sum(objective(model, batch, StepContext(attack, 0.5, teacher)).values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(p, w) for p, w in zip(teacher.parameters(), weights, strict=True))
    moved = {name for name, b in teacher.named_buffers() if not torch.equal(b, buffers[name])}
    assert moved == {name for name in buffers if "running" in name or "num_batches" in name}
    assert {int(b) for name, b in teacher.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_teacher_kind_follows_ema_decay():
    assert DynACL().teacher_kind is None
    assert DynACL(ema_decay=0.99).teacher_kind == DynACL(ema_decay=0.0).teacher_kind == "ema"
    assert DynACL().title == "DynACL"


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"period": 0.0}, r"period must be in \(0, 1\], got 0\.0: published runs use 50/1000 epochs = 0\.05"),
        ({"period": 50}, r"period must be in \(0, 1\], got 50: published runs use 50/1000 epochs"),
        ({"weight_scale": 1.5}, r"weight_scale must be in \[0, 1\], got 1\.5: published is 2/3"),
        ({"weight_scale": float("nan")}, r"weight_scale must be in \[0, 1\], got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1\.0: the official release uses 0\.99"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\), got -0\.1"),
        ({"mode": "a2a"}, r"DynACL re-weights two streams and needs mode 'ds', got 'a2a'"),
        ({"mode": "s2s"}, r"mode must be 'ds', 'a2a' or 'a2s', got 's2s'"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DynACL(**values)
