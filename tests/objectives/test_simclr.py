"""SimCLR: NT-Xent of two clean views, and nothing else."""

from __future__ import annotations

import pytest
from linear_model import LinearModel, N, Nudge, random_views, slow_nt_xent

from hf_robust.objectives.base import StepContext
from hf_robust.objectives.simclr import SimCLR


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_the_term_is_nt_xent_of_the_two_views(temperature):
    model, views, attack = LinearModel(), random_views(), Nudge()
    terms = SimCLR(temperature)(model, views, StepContext(attack))
    expected = slow_nt_xent(*(model.numpy(views[v], "clean") for v in ("view_1", "view_2")), temperature)
    assert list(terms) == ["clean"]
    assert terms["clean"].item() == pytest.approx(expected, rel=1e-5)
    assert attack.calls == []
    assert [(branch, len(images)) for branch, images in model.passes] == [("clean", 2 * N)]


def test_one_branch_full_augmentation_and_no_second_network():
    objective = SimCLR()
    assert objective.norm_branches == ("clean",)
    assert objective.views == ("view_1", "view_2")
    assert [objective.strength(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert objective.teacher_kind is None
    assert objective.title == "SimCLR"


def test_the_published_temperature_is_the_default_and_an_impossible_one_is_refused():
    assert SimCLR().temperature == 0.5
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0: the published value is 0\.5"):
        SimCLR(0)(LinearModel(), random_views(), StepContext(Nudge()))
