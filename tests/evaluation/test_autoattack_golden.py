"""AutoAttack and PGD-20 against stored results of the authors' code: every tenth of 200 images, three classifiers.

The stored flags are of batches of 200, which draw other random numbers: one flag may move. The whole standard cascade
takes minutes: HF_ROBUST_SLOW=1 runs it.
"""

from __future__ import annotations

import os

import pytest
import torch
from golden_cnn import GOLDEN, Variant, images_at
from torch.nn.functional import cross_entropy

from hf_robust.attacks import PGD, frozen
from hf_robust.evaluation.autoattack import AutoAttackResult, autoattack

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def compare(found: AutoAttackResult, variant: str, moved: int = 1) -> None:
    assert torch.equal(found.clean, torch.from_numpy(GOLDEN[f"{variant}_clean"]))
    for stage in found.stages:
        expected = torch.from_numpy(GOLDEN[f"{variant}_{stage.name}"])
        assert int((stage.robust != expected).sum()) <= moved, stage.name


def evaluate(variant: str, preset: str) -> AutoAttackResult:
    images, labels = images_at(GOLDEN["subset"])
    return autoattack(Variant(variant).eval(), images, labels, preset=preset, batch_size=20, progress=False)


def test_apgd_agrees_on_a_plain_classifier() -> None:
    found = evaluate("plain", "fast")
    compare(found, "plain")
    assert len(found.warnings) == 1 and "preset" in found.warnings[0], "an honest classifier is not suspected"


def test_a_saturated_classifier_misleads_the_cross_entropy_only_and_is_named() -> None:
    found = evaluate("masked", "fast")
    compare(found, "masked")
    first, second, *_ = found.warnings
    assert "the gradient of the cross-entropy is exactly zero" in first and "logits are so far apart" in first
    assert second.startswith("APGD on the cross-entropy left 40.0%, APGD on logits 25.0%")


def test_a_quantised_classifier_is_named() -> None:
    found = evaluate("quantised", "smoke")
    assert torch.equal(found.clean, torch.from_numpy(GOLDEN["quantised_clean"]))
    assert "for 10 of 10 rightly classified images the gradient of the logits is zero" in found.warnings[0]
    assert found.stages[-2].accuracy > found.accuracy, "Square needs no gradient"
    assert found.findings.zero_starts >= 10, "the targeted APGD says it too, in its own log"


@pytest.mark.skipif(not os.environ.get("HF_ROBUST_SLOW"), reason="takes minutes: HF_ROBUST_SLOW=1 runs it")
@pytest.mark.parametrize("variant", ["plain", "masked", "quantised"])
def test_the_whole_cascade(variant: str) -> None:
    found = evaluate(variant, "standard")
    assert tuple(stage.name for stage in found.stages) == STANDARD
    # Where no attack has a gradient, Square's draws decide.
    compare(found, variant, moved=2 if variant == "quantised" else 1)


def test_pgd20_from_the_stored_starts() -> None:
    model, eps = Variant("plain"), 8 / 255
    images, labels = images_at(torch.arange(32).numpy())
    # The starts are those of the whole set of 200 images.
    start = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))[:32] * 2 * eps - eps
    torch.testing.assert_close(start[:, :, :2, :2], torch.from_numpy(GOLDEN["pgd20_delta0_corner"]))
    with frozen(model):
        x_adv = PGD(eps, 2 / 255, 20)(lambda x: cross_entropy(model(x), labels, reduction="sum"), images, start)
        logits = model(x_adv)
    right = logits.gather(1, labels[:, None])[:, 0]
    margin = right - logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    assert torch.equal(margin > 0, torch.from_numpy(GOLDEN["pgd20_robust"]))
    assert float((margin - torch.from_numpy(GOLDEN["pgd20_margin"])).abs().max()) < 1e-4
