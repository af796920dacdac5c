"""The plan of the cascade: published lengths, counted at the model, and what changes with few classes."""

from __future__ import annotations

import pytest
from attacked import Ladder, ladder_images

from hf_robust.evaluation.autoattack import autoattack
from hf_robust.evaluation.autoattack_plan import PRESETS, PlannedAttack, plan_attacks

SQUARE = (3, 32, 32)


def test_the_standard_attacks_have_their_published_length() -> None:
    image, label = ladder_images([180.0], size=2)
    found = autoattack(Ladder(12).eval(), image, label, progress=False)
    assert [(s.name, s.forwards, s.backwards) for s in found.stages] == [
        ("apgd-ce", 2 + 101, 101),
        ("apgd-t", 2 + 9 * 102, 9 * 101),
        ("fab-t", 2 + 9 * 203, 9 * 100),
        ("square", 4 + 5000, 0),
    ]
    assert found.accuracy == 1.0 and found.warnings == []
    fast = autoattack(Ladder(12).eval(), image, label, preset="fast", progress=False)
    assert [s.forwards for s in fast.stages] == [103, 920] and "must not be called AutoAttack" in fast.warnings[0]


def test_fewer_targets_than_the_standard_are_run_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "standard", ("apgd-t", "fab-t"))
    image, label = ladder_images([100.0], size=2)
    found = autoattack(Ladder(5), image, label, progress=False)
    assert [stage.backwards for stage in found.stages] == [4 * 101, 4 * 100]
    assert "With 5 classes the targeted attacks had all 4 wrong classes" in found.warnings[-1]


@pytest.mark.parametrize(
    ("classes", "norm", "preset", "expected"),
    [
        (2, "linf", "standard", [("apgd-ce", 100, 1), ("fab-t", 100, 1), ("square", 5000, 1)]),
        (3, "linf", "standard", [("apgd-ce", 100, 1), ("apgd-dlr", 100, 1), ("fab-t", 100, 2), ("square", 5000, 1)]),
        (4, "l2", "standard", [("apgd-ce", 100, 1), ("apgd-t", 100, 3), ("fab-t", 100, 3), ("square", 5000, 1)]),
        (9, "linf", "fast", [("apgd-ce", 100, 1), ("apgd-t", 100, 8)]),
        (1000, "linf", "standard", [("apgd-ce", 100, 1), ("apgd-t", 100, 9), ("fab-t", 100, 9), ("square", 5000, 1)]),
        (10, "l1", "standard", [("apgd-ce", 100, 5), ("apgd-t", 100, 5), ("fab-t", 100, 9), ("square", 5000, 1)]),
        (2, "linf", "fast", [("apgd-ce", 100, 1)]),
        (3, "linf", "fast", [("apgd-ce", 100, 1), ("apgd-dlr", 100, 1)]),
    ],
)
def test_the_plan(classes: int, norm: str, preset: str, expected: list[tuple[str, int, int]]) -> None:
    plan, said = plan_attacks(classes, preset, norm, SQUARE)
    assert [(a.name, a.steps, a.runs) for a in plan] == expected
    assert len(said) == (preset == "fast") + (classes < 10)
    if preset == "fast":
        assert not any("FAB had" in sentence for sentence in said), "it did not run"


def test_the_authors_object_agrees_with_the_plan() -> None:
    """Under every norm: what `prepare` sets is what the package's own standard version sets."""
    from pyautoattack import AutoAttack

    for norm in ("linf", "l2", "l1"):
        tool = AutoAttack(Ladder(), norm={"linf": "Linf"}.get(norm, norm.upper()), eps=0.1, seed=0, version="standard")
        plan = {a.name: a for a in plan_attacks(10, "standard", norm, SQUARE)[0]}
        found = [
            PlannedAttack("apgd-ce", tool.apgd.n_iter, tool.apgd.n_restarts),
            PlannedAttack("apgd-t", tool.apgd_targeted.n_iter, tool.apgd_targeted.n_target_classes),
            PlannedAttack("fab-t", tool.fab.n_iter, tool.fab.n_target_classes),
            PlannedAttack("square", tool.square.n_queries, tool.square.n_restarts),
        ]
        assert found == list(plan.values())
        assert list(plan) == tool.attacks_to_run and tool.apgd_targeted.n_restarts == tool.fab.n_restarts == 1


def test_the_work_ahead_is_an_upper_bound_of_the_work_done() -> None:
    work = {a.name: a.work for a in plan_attacks(10, "standard", "linf", SQUARE)[0]}
    assert work == {"apgd-ce": 300, "apgd-t": 2700, "fab-t": 3600, "square": 5000}
