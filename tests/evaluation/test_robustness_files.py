"""The files of an evaluation: what there is something to draw for, and nothing of an earlier one."""

from __future__ import annotations

import pytest
import torch
from attacked import LEVELS, Ladder, ladder_images

from hf_robust.evaluation import robustness_files
from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.judged_images import JudgedImages
from hf_robust.evaluation.pixel_classifier import PixelClassifier
from hf_robust.evaluation.robustness_files import write_evaluation


def found(channels: int = 3, **changes):
    images = JudgedImages.of(ladder_images(LEVELS, channels))
    classifier = PixelClassifier(Ladder(), num_classes=4, name="ladder")
    accuracies = {"clean": [1.0, 0.6, 0.5, None]}
    values = {
        "metrics": {"accuracy": 0.7, "pgd20_linf_8_255_accuracy": 0.5},
        "n": 10,
        "classes": {"names": None, "counts": [1, 5, 4, 0], "accuracies": accuracies},
        "model": {"name": "ladder"},
    }
    return EvaluationReport(**{**values, **changes}), classifier, images


def write(folder, *args, **changes) -> set[str]:
    report, classifier, images = found(*args, **changes)
    with classifier.held():
        names = write_evaluation(report, folder, classifier, images)
    assert {path.name for path in folder.iterdir()} == set(names)
    return set(names)


def test_each_picture_is_drawn_when_there_is_something_to_draw(tmp_path):
    curve = {"points": [[0.0, 0.7], [8 / 255, 0.5], [32 / 255, 0.0]], "n": 10, "steps": 20, "remark": ""}
    table = {"brightness": {"1": 0.5, "2": 0.4}}
    noisy = {"name": "generated corruptions", "published": False, "mean": 0.45, "n": 10, "table": table, "notes": []}
    flags = {"clean": torch.ones(10, dtype=torch.bool)}
    everything = write(tmp_path, curve=curve, corruptions=noisy, flags=flags)
    pictures = {"robustness_curve.png", "corruptions.png", "classes.png", "examples.png"}
    assert everything == pictures | {"report.json", "report.html", "flags.npz"}
    assert write(tmp_path, flags=flags) == everything - {"robustness_curve.png", "corruptions.png"}


@pytest.mark.parametrize(("channels", "changes"), [(1, {}), (3, {"norm": "l1"}), (3, {"metrics": {"accuracy": 0.7}})])
def test_examples_are_left_out_where_they_cannot_be_drawn(tmp_path, channels, changes):
    assert "examples.png" not in write(tmp_path, channels, **changes)


def test_the_shown_images_are_of_different_classes(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(robustness_files, "plot_examples", lambda models, x, labels, *_, **__: shown.append(labels))
    write(tmp_path)
    assert sorted(shown[0].tolist()) == [0, 1, 1, 2, 3]
