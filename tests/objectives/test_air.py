"""AIR: the released total by hand and against the released code's numbers; passes, attack, refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, cosine, random_views, slow_nt_xent
from torch import nn
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.simclr import SimCLR

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "released_objectives.npz")


def profile(u: np.ndarray, v: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax over the batch of the similarities of row k with row k."""
    e = [math.exp(cosine(u[k], v[k]) / temperature) for k in range(len(u))]
    return np.array(e) / sum(e)


def slow_terms(model: LinearModel, views: dict, attack: Nudge, temperature: float, formulation: str) -> list[float]:
    """Un-weighted: NT-Xent clean, NT-Xent adversarial, standard and robust invariance."""
    x_adv = attack.of(torch.cat([views["view_1"], views["view_2"]]))
    i, j, o = (model.numpy(views[name], "clean") for name in ("view_1", "view_2", "original"))
    i_adv, j_adv = (model.numpy(part, "adv") for part in x_adv.chunk(2))
    a, b = profile(i, o, temperature), profile(j, o, temperature)
    a_adv = profile(i_adv, o, temperature) * profile(i_adv, i, temperature)
    b_adv = profile(j_adv, o, temperature) * profile(j_adv, j, temperature)
    if formulation == "released":
        invariance = [
            sum(q * (math.log(q) - p) for p, q in zip(*pair, strict=True)) for pair in ((a, b), (a_adv, b_adv))
        ]
    else:
        invariance = [
            sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in ((a, b), (a_adv, b_adv))
        ]
    return [slow_nt_xent(i, j, temperature), slow_nt_xent(i_adv, j_adv, temperature), *invariance]


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize("formulation", ["released", "paper"])
@pytest.mark.parametrize(
    ("base", "progress", "shift"),
    [(ACL(), 0.9, 0.0), (ACL(0.2), 0.0, 0.0), (DynACL(), 0.0, 0.0), (DynACL(), 0.95, 0.6333333)],
    ids=["acl", "acl_cold", "dynacl_start", "dynacl_end"],
)
def test_total_has_no_factor_one_half(base, progress, shift, formulation):
    """(1 - w) clean + (1 + w) adversarial + lambda1 standard + lambda2 robust."""
    model, views, attack = LinearModel(), random_views(), Nudge()
    terms = AIR(base, 0.25, 0.75, formulation)(model, views, StepContext(attack, progress))
    clean, adversarial, standard, robust = slow_terms(model, views, attack, base.temperature, formulation)
    assert {k: v.item() for k, v in terms.items()} == {
        "clean": pytest.approx((1 - shift) * clean, rel=1e-5),
        "adversarial": pytest.approx((1 + shift) * adversarial, rel=1e-5),
        "standard_invariance": pytest.approx(0.25 * standard, rel=1e-4, abs=1e-6),
        "robust_invariance": pytest.approx(0.75 * robust, rel=1e-4, abs=1e-6),
    }


class Replay(nn.Module):
    """Answers with the stored embeddings, whatever the images."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.z = {
            k: torch.tensor(GOLDEN[f"{case}/{k}"]).requires_grad_() for k in ("zi", "zj", "zo", "zi_adv", "zj_adv")
        }

    def forward(self, passes):
        z = self.z
        assert [branch for branch, _ in passes] == ["adv", "clean", "clean"]
        return [torch.cat([z["zi_adv"], z["zj_adv"]]), torch.cat([z["zi"], z["zj"]]), z["zo"]]


@dataclass
class Shifted(ACL):
    """ACL with the stored weight shift."""

    shift: float = 0.0

    def weights(self, progress):
        return ((1 - self.shift) / 2, (1 + self.shift) / 2)


@pytest.mark.parametrize("case", ["s0", "s1", "s2"])
def test_total_and_gradients_equal_the_released_code(case):
    model = Replay(case)
    shift, lambda1, lambda2 = (float(GOLDEN[f"{case}/{k}"]) for k in ("weight", "lambda1", "lambda2"))
    views = {name: torch.rand(len(model.z["zi"]), 3, 2, 2) for name in AIR().views}
    terms = AIR(Shifted(shift=shift), lambda1, lambda2)(model, views, StepContext(Nudge()))
    loss = torch.stack(list(terms.values())).sum()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{case}/loss"]), abs=1e-4)
    loss.backward()
    for name, z in model.z.items():
        torch.testing.assert_close(z.grad, torch.tensor(GOLDEN[f"{case}/grad_{name}"]), atol=1e-5, rtol=1e-3)


def test_zero_lambdas_leave_twice_the_base():
    """The same-code baseline of the released runs."""
    base = DynACL()
    air, plain = (
        objective(LinearModel(), random_views(), StepContext(Nudge(), 0.5)) for objective in (AIR(base, 0, 0), base)
    )
    assert air["standard_invariance"].item() == air["robust_invariance"].item() == 0.0
    assert [air[k].item() for k in plain] == pytest.approx([2 * v.item() for v in plain.values()])


# ---------------------------------------------------------------------- passes and attack
def test_three_passes_of_their_own_in_the_released_order():
    model, views, attack = LinearModel(), random_views(), Nudge()
    AIR()(model, views, StepContext(attack))
    x = torch.cat([views["view_1"], views["view_2"]])
    expected = [("adv", attack.of(x)), ("clean", x), ("clean", views["original"])]
    assert [branch for branch, _ in model.passes] == [branch for branch, _ in expected]
    for (_, images), (_, source) in zip(model.passes, expected, strict=True):
        assert torch.equal(images, source)


@pytest.mark.parametrize("base", [ACL(0.2), DynACL(0.2)], ids=["acl", "dynacl"])
def test_the_attack_maximises_nt_xent_alone(base):
    model, views, attack = LinearModel(), random_views(), Nudge()
    AIR(base)(model, views, StepContext(attack, 0.9))
    ((loss, x),) = attack.calls
    assert torch.equal(x, torch.cat([views["view_1"], views["view_2"]]))
    probe = torch.rand_like(x)
    expected = slow_nt_xent(*(model.numpy(part, "adv") for part in probe.chunk(2)), 0.2)
    assert loss(probe).item() == pytest.approx(expected, rel=1e-5)
    assert model.embedded[-1] == ("adv", 2 * N)


def test_originals_carry_a_gradient():
    """The released code does not detach them: the invariance terms alone reach the originals' pass."""
    model = LinearModel()
    views = {name: x.requires_grad_(name == "original") for name, x in random_views().items()}
    terms = AIR()(model, views, StepContext(Nudge()))
    (terms["standard_invariance"] + terms["robust_invariance"]).backward()
    assert bool((views["original"].grad.flatten(1).abs().sum(1) > 0).all())


def test_clean_statistics_move_twice_and_adversarial_ones_once_per_step():
    objective = AIR()
    model = tiny_model(objective).train()

    def attack(loss_fn, x):
        with frozen(model):
            return PGD(steps=2)(loss_fn, x)

    objective(model, {name: torch.rand(4, 3, 8, 8) for name in objective.views}, StepContext(attack))
    counts = {"clean": set(), "adv": set()}
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            counts[name.split(".")[-2]].add(int(buffer))
    assert counts == {"clean": {2}, "adv": {1}}


# ---------------------------------------------------------------------- declarations and refusals
def test_published_defaults_titles_and_strength():
    assert (AIR().base, AIR().lambda1, AIR().lambda2, AIR().formulation) == (ACL(), 0.5, 0.5, "released")
    assert (AIR().title, AIR(DynACL()).title) == ("ACL-AIR", "DynACL-AIR")
    assert AIR().views == ("view_1", "view_2", "original")
    assert AIR().strength(0.9) == 1.0
    assert AIR(DynACL()).strength(0.9) == DynACL().strength(0.9) == pytest.approx(0.1)
    assert AIR(DynACL()).teacher_kind is None
    assert AIR().base is not AIR().base  # no base shared between two objectives


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": SimCLR()}, r"AIR needs a base .*\(ACL or DynACL\), got SimCLR\(temperature=0\.5\)"),
        ({"base": "dynacl"}, r"AIR needs a base .*\(ACL or DynACL\), got dynacl"),
        ({"base": ACL(mode="a2a")}, r"AIR needs a base with a clean and an adversarial stream .* mode='a2a'"),
        ({"base": DynACL(ema_decay=0.99)}, r"without a momentum encoder: leave ema_decay of its base unset"),
        ({"formulation": "fixed"}, r"formulation must be 'released' or 'paper', got 'fixed'"),
        ({"lambda1": -0.5}, r"lambda1 must be 0 or more, got -0\.5: published is 0\.5"),
        ({"lambda2": float("nan")}, r"lambda2 must be 0 or more, got nan: published is 0\.5"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AIR(**values)
