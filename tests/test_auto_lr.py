"""The halving rule against traces computed by hand, and against the rule as the released code writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from hf_robust.auto_lr import AutoLearningRate, Decision

LINEAR = list(range(4, 50, 4))
FULL = [16, 24, 28, 36, 40, 42, 44, 46, 48]


def wave(epoch: int) -> float:
    return 20 + 10 * (1 - math.exp(-epoch / 6)) + math.sin(2 * epoch)


def looks(rule: AutoLearningRate, accuracy: Callable[[int], float], epochs: int = 50) -> list[tuple[int, str, float]]:
    """(epoch, what happened, rate) of every look back."""
    found = []
    for epoch in range(1, epochs + 1):
        before = rule.learning_rate
        decision = rule.update(epoch, accuracy(epoch))
        assert decision.restore is (decision.learning_rate < before)
        assert decision.learning_rate == rule.learning_rate
        if decision.reason:
            what = "keep" if not decision.restore else "stale" if "best is still" in decision.reason else "few"
            found.append((epoch, what, decision.learning_rate))
        else:
            assert not decision.restore
    return found


def test_trace_of_the_linear_modes() -> None:
    halvings = [5, 9, 13, 17, 21, 33, 37, 41, 45, 49]
    trace = looks(AutoLearningRate(0.1, LINEAR), wave)
    assert [epoch for epoch, _, _ in trace] == [w + 1 for w in LINEAR]
    assert [epoch for epoch, what, _ in trace if what != "keep"] == halvings
    assert [epoch for epoch, what, _ in trace if what == "stale"] == [45]  # three of four rose, none was the best
    assert trace[1][2] == 0.025 and trace[-1][2] == pytest.approx(0.00009765625)
    assert [rate for epoch, _, rate in trace if epoch in (25, 29)] == [0.003125, 0.003125]


def test_trace_of_full_fine_tuning() -> None:
    assert looks(AutoLearningRate(0.1, FULL), wave) == [
        (17, "few", 0.05),
        (25, "few", 0.025),
        (29, "keep", 0.025),
        (37, "few", 0.0125),
        (41, "few", 0.00625),
        (43, "few", 0.003125),
        (45, "stale", 0.0015625),
        (47, "few", 0.00078125),
        (49, "few", 0.000390625),
    ]


def test_a_rising_accuracy_keeps_the_rate_and_a_plateau_halves_it() -> None:
    assert all(what == "keep" for _, what, _ in looks(AutoLearningRate(0.1, LINEAR), lambda e: 20 + 0.1 * e))
    trace = looks(AutoLearningRate(0.1, LINEAR), lambda e: min(30, 20 + e))
    assert [epoch for epoch, what, _ in trace if what != "keep"] == list(range(13, 50, 4))


def released(accuracies: list[float], milestones: list[int], rate: float) -> list[float]:
    """The released code's bookkeeping: arrays per milestone, both copied forward; rate after each epoch."""
    w, j, best = [0, *milestones], 1, -1.0
    eta, best_at = [rate] + [0.0] * (len(w) + 1), [0.0] * (len(w) + 2)
    rates = []
    for e in range(1, len(accuracies) + 1):
        if accuracies[e - 1] > best:
            best = best_at[j] = accuracies[e - 1]
        if j < len(w) and e - 1 == w[j]:
            c = sum(accuracies[t + 1] > accuracies[t] for t in range(w[j - 1], w[j]))
            if c < 0.75 * (w[j] - w[j - 1]) or (eta[j] == eta[j - 1] and best_at[j] == best_at[j - 1]):
                rate = eta[j] = rate / 2
            j += 1
            best_at[j], eta[j] = best_at[j - 1], eta[j - 1]
        rates.append(rate)
    return rates


@pytest.mark.parametrize("milestones", [LINEAR, FULL, [1, 2, 3, 20, 49]])
def test_the_rule_is_that_of_the_released_code(milestones: list[int]) -> None:
    halved = 0
    for seed in range(40):
        accuracies = [round(30 + 0.3 * e + 4 * math.sin(seed + 1.7 * e * (1 + seed % 7)), 1) for e in range(50)]
        rule = AutoLearningRate(0.1, milestones)
        rates = [rule.update(e, a).learning_rate for e, a in enumerate(accuracies, start=1)]
        assert rates == released(accuracies, milestones, 0.1), seed
        halved += rates[-1] < 0.1
    assert halved > 20


def test_a_stretch_without_a_new_best_halves_the_rate_but_not_the_first_one() -> None:
    climbs = [0.9, 0.1, 0.2, 0.3, 0.4, 0.35, 0.5, 0.6, 0.7]  # three of four rise, all below the first
    assert looks(AutoLearningRate(0.1, [4, 8]), lambda e: climbs[e - 1], 9) == [(5, "keep", 0.1), (9, "stale", 0.05)]
    peak = [0.1, 0.2, 0.3, 0.4, 0.9, 0.2, 0.3, 0.4, 0.5]  # the best is that of the look before, which has seen it
    assert looks(AutoLearningRate(0.1, [4, 8]), lambda e: peak[e - 1], 9) == [(5, "keep", 0.1), (9, "stale", 0.05)]
    for accuracies in (climbs, peak):
        assert released(accuracies, [4, 8], 0.1)[-1] == 0.05


def test_the_best_epoch_is_the_first_of_the_highest_accuracy() -> None:
    rule = AutoLearningRate(0.1, [4])
    decisions = [rule.update(e, a) for e, a in enumerate([0.0, 0.3, 0.3, 0.2, 0.4], start=1)]
    assert [d.is_best for d in decisions] == [True, True, False, False, True]
    assert (rule.best_accuracy, rule.best_epoch) == (0.4, 5)
    assert decisions[-1] == Decision(True, True, 0.05, "accuracy rose in 2 of 4 epochs, fewer than 75%")


def test_without_milestones_the_rate_stays() -> None:
    assert looks(AutoLearningRate(0.1, []), lambda e: 50 - e, epochs=20) == []


def test_share_and_divisor_may_be_chosen() -> None:
    assert looks(AutoLearningRate(1.0, [4, 8], rho=0.5, divisor=10), wave, 9) == [(5, "keep", 1), (9, "keep", 1)]
    assert looks(AutoLearningRate(1.0, [4, 8], rho=1, divisor=10), wave, 9) == [(5, "few", 0.1), (9, "few", 0.01)]


@pytest.mark.parametrize("stop", [0, 1, 16, 17, 44, 45])
def test_a_state_goes_through_json_and_continues_the_trace(stop: int) -> None:
    whole, first, second = (AutoLearningRate(0.1, FULL) for _ in range(3))
    expected = [whole.update(e, wave(e)) for e in range(1, 51)]
    begun = [first.update(e, wave(e)) for e in range(1, stop + 1)]
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert (second.learning_rate, second.best_accuracy, second.best_epoch) == (
        first.learning_rate,
        first.best_accuracy,
        first.best_epoch,
    )
    assert begun + [second.update(e, wave(e)) for e in range(stop + 1, 51)] == expected
    assert second.state_dict() == whole.state_dict()


def test_a_state_is_a_copy() -> None:
    rule = AutoLearningRate(0.1, [4])
    rule.update(1, 0.5)
    state = rule.state_dict()
    rule.update(2, 0.6)
    assert state["accuracies"] == [0.5] and state["best_epoch"] == 1


def test_a_state_of_other_settings_is_refused() -> None:
    state = AutoLearningRate(0.1, LINEAR).state_dict()
    for other in (AutoLearningRate(0.2, LINEAR), AutoLearningRate(0.1, FULL), AutoLearningRate(0.1, LINEAR, rho=0.5)):
        with pytest.raises(ValueError, match=r"the saved learning rate has .*, this one .*: resume with"):
            other.load_state_dict(state)


def test_epochs_come_in_order_and_accuracies_are_numbers() -> None:
    rule = AutoLearningRate(0.1, [4])
    with pytest.raises(ValueError, match="epoch 1 comes next, got 2: report every epoch once"):
        rule.update(2, 0.5)
    rule.update(1, 0.5)
    with pytest.raises(ValueError, match="epoch 2 comes next, got 1"):
        rule.update(1, 0.5)
    for bad in (float("nan"), -0.1, float("inf")):
        with pytest.raises(ValueError, match="accuracy must be a number, 0 or more, got"):
            rule.update(2, bad)
    assert rule.update(2, 0.6).is_best  # what was refused left no trace


def test_impossible_settings_are_refused() -> None:
    for epochs in ([4, 4], [8, 4], [0, 4], [1.5]):
        with pytest.raises(ValueError, match=r"epochs must be rising whole numbers, 1 or more, got \["):
            AutoLearningRate(0.1, epochs)
    with pytest.raises(ValueError, match="base_lr must be positive, got 0"):
        AutoLearningRate(0, [4])
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\], got 1.5"):
        AutoLearningRate(0.1, [4], rho=1.5)
    with pytest.raises(ValueError, match="divisor must be more than 1, got 1"):
        AutoLearningRate(0.1, [4], divisor=1)
