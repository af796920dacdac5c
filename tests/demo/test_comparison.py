"""One image under attack: budgets, who is attacked, and the sentence about it."""

from __future__ import annotations

import pytest
import torch
from exhibits import brightness

from hf_robust.demo.comparison import Disturbance, Outcome, compare, sentence

GREY = torch.full((3, 8, 8), 0.49)


def both(disturbance: Disturbance, image: torch.Tensor = GREY, **settings) -> dict[str, Outcome]:
    """A robust model that is far from changing its mind, and a plain one that is near."""
    models = {"robust": brightness(at=0.7), "plain": brightness(at=0.5)}
    return compare(models, dict.fromkeys(models, image), disturbance, **settings)


def test_the_attack_changes_the_near_model_only_and_the_sentence_says_so():
    outcomes = both(Disturbance(levels=8))
    assert not outcomes["robust"].changed and outcomes["plain"].changed
    text = sentence(outcomes, Disturbance(levels=8), truth="dark")
    assert text == "The plain model changed its answer from dark to bright; the robust one did not."
    assert both(Disturbance(levels=60))["robust"].changed
    assert not both(Disturbance(levels=1, steps=1))["plain"].changed  # 1/255 is not enough for 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["pgd", "noise", "none"])
def test_the_budget_holds_and_is_used(kind, norm):
    disturbance = Disturbance(kind, norm, levels=8 if norm == "linf" else 100, steps=5)
    change = both(disturbance)["plain"].disturbed - GREY
    size = float(change.abs().max() if norm == "linf" else change.norm())
    assert size == pytest.approx(0 if kind == "none" else disturbance.eps, abs=1e-6)


def test_pixels_stay_in_range_and_noise_is_the_same_for_all():
    outcomes = both(Disturbance("noise", levels=64), torch.rand(3, 8, 8, generator=torch.manual_seed(0)))
    assert torch.equal(outcomes["robust"].disturbed, outcomes["plain"].disturbed)
    assert 0 <= float(outcomes["plain"].disturbed.min()) and float(outcomes["plain"].disturbed.max()) <= 1


def test_two_presses_give_the_same_and_the_models_stay_as_they_are():
    model = brightness()
    before = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    first, second = (compare({"robust": model}, {"robust": GREY}, Disturbance(steps=3))["robust"] for _ in range(2))
    assert torch.equal(first.disturbed, second.disturbed) and torch.equal(state, torch.get_rng_state())
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cw"}, "attack must be one of pgd, noise, none, got 'cw'"),
        ({"norm": "l7"}, "norm must be one of linf, l2, got 'l7'"),
        ({"levels": 0}, "more than 0 and at most 64 levels of 1/255, got 0: move the slider"),
        ({"levels": 65}, "at most 64 levels"),
        ({"steps": 0}, "steps must be a whole number from 1 to 200, got 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        Disturbance(**changes)


def outcome(before: int, after: int, names: tuple[str, ...] | None = None) -> Outcome:
    one_hot = torch.eye(4) * 0.96 + 0.01
    return Outcome(GREY, GREY, one_hot[before], one_hot[after], names)


@pytest.mark.parametrize(
    ("robust", "plain", "truth", "text"),
    [
        ((3, 3), (3, 1), None, "The plain model changed its answer from 3 to 1; the robust one did not."),
        ((3, 2), (3, 3), None, "The robust model changed its answer from 3 to 2; the plain one did not."),
        ((3, 2), (3, 2), None, "Both models changed their answer from 3 to 2."),
        (
            (3, 2),
            (3, 1),
            None,
            "Both models changed their answer: the robust one from 3 to 2, the plain one from 3 to 1.",
        ),
        ((3, 3), (3, 3), "3", "Neither model changed its answer, 3."),
        ((3, 3), (1, 1), None, "Neither model changed its answer, 3 (robust) and 1 (plain)."),
        (
            (3, 3),
            (1, 2),
            "3",
            "The plain model changed its answer from 1 to 2; the robust one did not. The image shows 3, so the plain "
            "model was wrong from the start.",
        ),
        (
            (1, 1),
            (1, 1),
            "3",
            "Neither model changed its answer, 1. The image shows 3, so both models were wrong from the start.",
        ),
    ],
)
def test_sentences_about_two_models(robust, plain, truth, text):
    assert sentence({"robust": outcome(*robust), "plain": outcome(*plain)}, Disturbance(), truth) == text


def test_sentences_about_one_model_and_about_no_attack():
    attack, none = Disturbance(), Disturbance("none")
    assert sentence({"robust": outcome(3, 1)}, attack) == "The model changed its answer from 3 to 1."
    assert sentence({"robust": outcome(3, 3)}, attack, "3") == "The model did not change its answer, 3."
    assert sentence({"robust": outcome(3, 3)}, none) == "Without an attack the model says 3 (97 %)."
    same, other = outcome(3, 3), outcome(1, 1)
    assert sentence({"robust": same, "plain": same}, none) == "Without an attack both models say 3."
    text = "Without an attack the robust model says 3, and the plain one says 1."
    assert sentence({"robust": same, "plain": other}, none) == text


def test_classes_are_called_by_their_names():
    models = {"robust": brightness(names=None)}
    named = compare(models, {"robust": GREY}, Disturbance("none"), label_names=["night", "day"])
    assert named["robust"].first_answer == "night"
    assert compare(models, {"robust": GREY}, Disturbance("none"))["robust"].first_answer == "0"
    assert str(Disturbance(levels=8)) == "PGD-20, L-inf, eps 8/255" and str(Disturbance("none")) == "No attack"
