"""ACL in its three modes, by hand from the embeddings of a linear network."""

from __future__ import annotations

import pytest
import torch
from linear_model import LinearModel, N, Nudge, random_views, slow_nt_xent, slow_nt_xent_per_image

from hf_robust.objectives.acl import ACL
from hf_robust.objectives.base import StepContext


def run(objective, progress=0.0):
    model, views, attack = LinearModel(), random_views(), Nudge()
    terms = objective(model, views, StepContext(attack, progress))
    return model, views, attack, {name: value.item() for name, value in terms.items()}


def both(views):
    return torch.cat([views["view_1"], views["view_2"]])


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_dual_stream_is_the_mean_of_clean_and_adversarial(temperature):
    model, views, attack, terms = run(ACL(temperature))
    x = both(views)
    clean = slow_nt_xent(*(model.numpy(part, "clean") for part in x.chunk(2)), temperature)
    adversarial = slow_nt_xent(*(model.numpy(part, "adv") for part in attack.of(x).chunk(2)), temperature)
    assert terms == {
        "clean": pytest.approx(clean / 2, rel=1e-5),
        "adversarial": pytest.approx(adversarial / 2, rel=1e-5),
    }


def test_dual_stream_passes_adversarial_images_first():
    """Running statistics do not care; the order is the released one, so that a log can be compared line by line."""
    model, views, attack, _ = run(ACL())
    assert [branch for branch, _ in model.passes] == ["adv", "clean"]
    assert torch.equal(model.passes[0][1], attack.of(both(views)))
    assert torch.equal(model.passes[1][1], both(views))


@pytest.mark.parametrize("mode", ["ds", "a2a"])
def test_the_attack_raises_nt_xent_of_both_views_through_the_adversarial_branch(mode):
    model, views, attack, _ = run(ACL(0.2, mode))
    ((loss, attacked),) = attack.calls
    assert torch.equal(attacked, both(views))
    probe = torch.rand_like(attacked)
    expected = slow_nt_xent(*(model.numpy(part, "adv") for part in probe.chunk(2)), 0.2)
    assert loss(probe).item() == pytest.approx(expected, rel=1e-5)  # un-weighted: no 1/2
    assert model.embedded[-1] == ("adv", 2 * N)


def test_adversarial_to_adversarial_is_the_adversarial_stream_alone():
    model, views, attack, terms = run(ACL(mode="a2a"))
    x_adv = attack.of(both(views))
    expected = slow_nt_xent(*(model.numpy(part, "adv") for part in x_adv.chunk(2)))
    assert terms == {"adversarial": pytest.approx(expected, rel=1e-5)}
    assert [branch for branch, _ in model.passes] == ["adv"]
    assert ACL(mode="a2a").norm_branches == ("adv",)


def test_adversarial_to_standard_attacks_view_1_and_contrasts_it_with_the_clean_view_2():
    model, views, attack, terms = run(ACL(0.2, "a2s"))
    ((loss, attacked),) = attack.calls
    assert torch.equal(attacked, views["view_1"])
    clean = model.numpy(views["view_2"], "clean")
    expected = slow_nt_xent(model.numpy(attack.of(views["view_1"]), "adv"), clean, 0.2)
    assert terms == {"adversarial": pytest.approx(expected, rel=1e-5)}
    assert [branch for branch, _ in model.passes] == ["adv", "clean"]
    assert torch.equal(model.passes[1][1], views["view_2"])
    probe = torch.rand_like(attacked)
    assert loss(probe).item() == pytest.approx(slow_nt_xent(model.numpy(probe, "adv"), clean, 0.2), rel=1e-5)
    before = len(model.embedded)
    loss(probe)
    assert model.embedded[before:] == [("adv", N)]  # the clean partner is encoded once, not in every attack step


# ---------------------------------------------------------------------- candidates of a coreset
def candidate(objective, progress=0.0, teacher=None):
    model, views, attack = LinearModel(), random_views(), Nudge()
    passes = objective.candidate_passes(model, views, StepContext(attack, progress, teacher))
    losses = objective.candidate_losses([model.embed(images, branch) for branch, images in passes], views)
    return model, views, attack, passes, losses


@pytest.mark.parametrize("mode", ["ds", "a2a"])
def test_candidates_of_two_views_are_scored_per_image(mode):
    model, views, attack, passes, losses = candidate(ACL(0.2, mode))
    x = both(views)
    assert [branch for branch, _ in passes] == ["adv", "clean"][: len(passes)]
    assert len(passes) == (2 if mode == "ds" else 1)
    assert torch.equal(passes[0][1], attack.of(x))
    assert mode == "a2a" or torch.equal(passes[1][1], x)
    streams = [
        slow_nt_xent_per_image(*(model.numpy(part, branch) for part in images.chunk(2)), 0.2)
        for branch, images in passes
    ]
    assert losses.tolist() == pytest.approx(
        [sum(image) / len(image) for image in zip(*streams, strict=True)], rel=1e-5
    )
    ((loss, attacked),) = attack.calls
    assert torch.equal(attacked, x)
    expected = slow_nt_xent(*(model.numpy(part, "adv") for part in x.chunk(2)), 0.2)
    assert loss(x).item() == pytest.approx(expected, rel=1e-5)


def test_candidates_of_adversarial_to_standard_pair_an_attacked_and_a_clean_view():
    model, views, attack, passes, losses = candidate(ACL(0.2, "a2s"))
    x_adv = attack.of(views["view_1"])
    assert [branch for branch, _ in passes] == ["adv", "clean"]
    assert torch.equal(passes[0][1], x_adv) and torch.equal(passes[1][1], views["view_2"])
    expected = slow_nt_xent_per_image(model.numpy(x_adv, "adv"), model.numpy(views["view_2"], "clean"), 0.2)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    ((_, attacked),) = attack.calls
    assert torch.equal(attacked, views["view_1"])


def test_progress_changes_nothing():
    assert run(ACL(), 0.0)[3] == run(ACL(), 0.9)[3]
    assert [ACL().strength(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert ACL().weights(0.7) == (0.5, 0.5)


def test_declarations_and_refusals():
    assert ACL().norm_branches == ACL(mode="a2s").norm_branches == ("clean", "adv")
    assert (ACL().views, ACL().teacher_kind, ACL().title) == (("view_1", "view_2"), None, "ACL")
    with pytest.raises(ValueError, match="mode must be 'ds', 'a2a' or 'a2s', got 's2s'"):
        ACL(mode="s2s")
    with pytest.raises(ValueError, match=r"temperature must be positive, got -1: the published value is 0\.5"):
        ACL(-1)(LinearModel(), random_views(), StepContext(Nudge()))
