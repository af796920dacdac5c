"""PGD flags equal the stored ones, survive a kill batch by batch, and belong to one evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from attacked import LEVELS, STAYS, Ladder, ladder_images
from golden_cnn import GOLDEN, Variant, images_at
from torch.nn.functional import cross_entropy

from hf_robust.attacks import PGD
from hf_robust.evaluation.evaluation_parts import EvaluationParts, predict
from hf_robust.evaluation.judged_images import JudgedImages
from hf_robust.evaluation.pixel_classifier import PixelClassifier

NOWHERE = EvaluationParts(None, {})


def judged() -> JudgedImages:
    return JudgedImages.of(ladder_images(LEVELS))


def run(parts=NOWHERE, model=None, attack=None, **settings):
    classifier = PixelClassifier(model or Ladder())
    with classifier.held():
        return predict(classifier, judged(), "part", parts, size=None, attack=attack, batch_size=4, **settings)


def test_pgd20_from_the_stored_start_leaves_the_stored_flags():
    """The authors' flags for their start values: `PGD` through the classifier that evaluations use."""
    images, labels = images_at(GOLDEN["rows"][:32])
    eps = 8 / 255
    start = torch.rand((200, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 * eps - eps
    corner = torch.from_numpy(GOLDEN["pgd20_delta0_corner"])
    assert torch.equal(start[:32, :, :2, :2], corner[:, :, :2, :2])
    classifier = PixelClassifier(Variant("plain"))
    with classifier.held():
        x_adv = PGD(eps, 2 / 255, 20)(
            lambda x: cross_entropy(classifier(x), labels, reduction="sum"), images, start=start[:32]
        )
        with torch.no_grad():
            logits = classifier(x_adv)
    true = logits.gather(1, labels[:, None])[:, 0]
    margin = true - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    assert torch.equal(margin > 0, torch.from_numpy(GOLDEN["pgd20_robust"]))
    torch.testing.assert_close(margin, torch.from_numpy(GOLDEN["pgd20_margin"]), rtol=0, atol=2e-3)
    assert float((x_adv - images).abs().max()) <= eps + 1e-6 and 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1


def test_the_attack_breaks_what_it_can_and_its_passes_are_counted():
    clean, attacked = run(), run(attack=PGD(7 / 255, 2 / 255, 10))
    labels = judged().labels
    assert torch.equal(clean.classes, labels) and (clean.forwards, clean.backwards) == (10, 0)
    assert (attacked.classes == labels).tolist() == STAYS
    assert (attacked.forwards, attacked.backwards) == (110, 100)


def test_starts_depend_on_seed_and_batch_alone():
    torch.manual_seed(1)
    attack, state = PGD(8 / 255, 1 / 255, 1), torch.random.get_rng_state()
    seen = []

    class Recording(Ladder):
        def forward(self, images):
            seen.append(images.detach().clone())
            return super().forward(images)

    for seed in (0, 0, 1):
        run(model=Recording(), attack=attack, seed=seed)
    first, second, third = (
        seen[: len(seen) // 3],
        seen[len(seen) // 3 : 2 * len(seen) // 3],
        seen[2 * len(seen) // 3 :],
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0]) and torch.equal(torch.random.get_rng_state(), state)


def test_a_kill_costs_one_batch(tmp_path):
    calls = []

    class Dying(Ladder):
        def __init__(self, last):
            super().__init__()
            self.last = last

        def forward(self, images):
            calls.append(len(images))
            if len(calls) > self.last:
                raise KeyboardInterrupt
            return super().forward(images)

    attack = PGD(7 / 255, 2 / 255, 3)  # 4 passes per batch
    with pytest.raises(KeyboardInterrupt):
        run(EvaluationParts(tmp_path / "state", {"a": 1}), Dying(9), attack)
    assert len(calls) == 10 and len(list((tmp_path / "state" / "part").iterdir())) == 2
    calls.clear()
    resumed = run(EvaluationParts(tmp_path / "state", {"a": 1}), Dying(99), attack)
    assert calls == [2] * 4
    whole = run(attack=attack)
    assert torch.equal(resumed.classes, whole.classes) and resumed.forwards == whole.forwards
    calls.clear()
    run(EvaluationParts(tmp_path / "state", {"a": 1}), Dying(99), attack)
    assert calls == []
    run(EvaluationParts(tmp_path / "state", {"a": 1}, resume=False), Dying(99), attack)
    assert len(calls) == 12


def test_notes_of_another_evaluation_are_refused(tmp_path):
    EvaluationParts(tmp_path / "state", {"model": "y"})
    noted = EvaluationParts(tmp_path / "state", {"model": "x", "seed": 0})  # of y nothing is noted yet
    noted.save("part", 1, {"classes": [1]})
    with pytest.raises(ValueError, match=r"differs in seed \(there 0, here 1\): give another output_dir, or throw"):
        EvaluationParts(tmp_path / "state", {"model": "x", "seed": 1})
    (tmp_path / "state" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="differs in model"):
        EvaluationParts(tmp_path / "state", {"model": "x"})
    parts = EvaluationParts(tmp_path / "state", {"model": "x"}, resume=False)
    assert parts.load("part", 0) is None
    parts.save("part", 0, {"classes": [1]})
    assert parts.load("part", 0) == {"classes": [1]} and json.loads((tmp_path / "state/part/00000.json").read_text())
    (tmp_path / "state" / "part" / "00000.json").write_text("{")
    assert parts.load("part", 0) is None
    assert NOWHERE.file("x") is None and parts.file("x.npz") == tmp_path / "state" / "x.npz"


@pytest.mark.parametrize(
    ("there", "here", "same"),
    [
        ([1.0, -3.0], [1.001, -3.001], True),  # another machine rounds
        ([1.0, -3.0], [1.1, -3.0], False),
        ([1.0, -3.0], [1.0, -3.0, 0.0], False),
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([float("nan"), 1.0], [0.5, 1.0], False),
    ],
)
def test_a_model_that_answers_otherwise_is_another_one(tmp_path, there, here, same):
    EvaluationParts(tmp_path, {"model": "x", "logits": there}).save("part", 0, {})
    if same:
        EvaluationParts(tmp_path, {"model": "x", "logits": here})
    else:
        with pytest.raises(ValueError, match="differs in what the model answers to the first image"):
            EvaluationParts(tmp_path, {"model": "x", "logits": here})


def test_logits_that_are_not_finite_and_models_without_gradient_say_so():
    class Broken(Ladder):
        def forward(self, images):
            return super().forward(images).log()

    class Detached(Ladder):
        def forward(self, images):
            return super().forward(images.detach())

    with pytest.raises(ValueError, match=r"not finite \(NaN or infinite\) for \d of 4 images.*overflow"):
        run(model=Broken())
    with pytest.raises(ValueError, match="do not depend on the images differentiably.*no_grad"):
        run(model=Detached(), attack=PGD())
    assert torch.equal(run(model=Detached()).classes, judged().labels)
