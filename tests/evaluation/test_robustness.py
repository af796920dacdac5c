"""A whole evaluation: the right numbers, the model as it was, nothing lost by a kill, clear errors and warnings."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from attacked import LEVELS, STAYS, Ladder, ladder_images
from golden_cnn import GOLDEN, Variant, images_at
from torch import nn

from hf_robust.data import ImageDataset
from hf_robust.evaluation import corruptions, evaluation_job
from hf_robust.evaluation.evaluation_job import published_row
from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.robustness import evaluate_robustness, plan_metrics

QUIET = {"progress": False, "curve_examples": 0}
EPS = 7 / 255
PGD10, SMOKE = "pgd10_linf_7_255_accuracy", "autoattacksmoke_linf_7_255_accuracy"


def evaluate(model=None, data=None, metrics=("accuracy", "pgd10"), **settings):
    data = ladder_images(LEVELS) if data is None else data
    return evaluate_robustness(model or Ladder(), data, metrics, **{"eps": EPS, **QUIET, **settings})


def same(first: EvaluationReport, second: EvaluationReport) -> bool:
    return first.metrics == second.metrics and all(torch.equal(v, second.flags[k]) for k, v in first.flags.items())


def test_every_metric_on_the_same_images_with_flags_counts_and_intervals():
    report = evaluate(metrics=("pgd10", "autoattack", "accuracy"), preset="smoke", batch_size=4, split="test")
    assert list(report.metrics) == ["accuracy", PGD10, SMOKE]  # the cheap ones first
    share = sum(STAYS) / len(STAYS)
    assert report.metrics == {"accuracy": 1.0, PGD10: share, SMOKE: share}
    assert report.flags["clean"].all() and report.flags["pgd10"].tolist() == STAYS
    assert report.flags["autoattack"].tolist() == STAYS == report.flags["autoattack_after_square"].tolist()
    assert torch.equal(report.flags["label"], report.flags["prediction"])
    assert [stage["name"] for stage in report.stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (
        report.stages[-1]["robust"] == sum(STAYS) and report.intervals[PGD10][0] < share < report.intervals[PGD10][1]
    )
    assert (
        report.counts["pgd10"] == {"forwards": 110, "backwards": 100} and report.counts["autoattack"]["backwards"] > 0
    )
    assert report.classes["counts"] == [1, 5, 2, 2] and report.classes["accuracies"]["pgd10"] == [1.0, 0.6, 0.5, 1.0]
    assert (report.n, report.seed, report.batch_size, report.dtype) == (10, 0, 4, "float32")
    assert (
        report.dataset["split"] == "test" and report.dataset["choice"] == "all" and "pyautoattack" in report.versions
    )
    assert any("smoke" in text for text in report.warnings)


def test_the_budget_is_used_up_and_not_exceeded():
    levels = [46.0, 48.0, 74.0, 72.0]  # 6 and 8 levels from an end; the budget is 7
    report = evaluate(data=ladder_images([*levels, 20.0, 100.0, 140.0]), metrics=["pgd10"])
    assert report.flags["pgd10"].tolist() == [False, True, False, True, True, True, True]
    l2 = evaluate(data=ladder_images([46.0, 20.0]), metrics=["pgd10"], norm="l2", eps=5.9 / 255 * 108**0.5)
    assert l2.metrics["accuracy"] == 1.0 and l2.flags["pgd10"].tolist() == [True, True]
    more = evaluate(data=ladder_images([46.0, 20.0]), metrics=["pgd10"], norm="l2", eps=6.2 / 255 * 108**0.5)
    assert more.flags["pgd10"].tolist() == [False, True]


def test_corruptions_are_called_generated_unless_the_published_arrays_are_given(monkeypatch, tmp_path):
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("brightness", "contrast"))
    calls = []
    original = corruptions.corruption_accuracy

    def two(logits, source, **settings):
        calls.append(settings["state_file"])
        return original(logits, source, names=("brightness", "contrast"), severities=(1, 5), **settings)

    monkeypatch.setattr(corruptions, "corruption_accuracy", two)
    images, labels = ladder_images(LEVELS, size=32)
    report = evaluate(data=(images, labels), metrics=["corruptions"], output_dir=tmp_path)
    (name,) = [m for m in report.metrics if m != "accuracy"]
    assert name == "generated_corruptions_partial_mean_accuracy" and report.corruptions["published"] is False
    assert set(report.corruptions["table"]["contrast"]) == {"1", "5"} and calls[0].parent == tmp_path / "state"
    assert report.metrics[name] == pytest.approx(report.corruptions["mean"])
    assert report.intervals[name][0] < report.metrics[name] < report.intervals[name][1]
    assert (tmp_path / "corruptions.png").is_file() and "hf_robust" in report.corruptions["name"]
    grey = evaluate(data=(images[:, :1], labels), metrics=["corruptions"])
    assert grey.corruptions["table"] == report.corruptions["table"]

    class Grey(Ladder):
        def forward(self, images):
            assert images.shape[1] == 1  # as it was trained
            return super().forward(images)

    assert evaluate(Grey(), (images[:, :1], labels), ["corruptions"]).metrics == grey.metrics


def test_published_corruptions_are_judged_on_as_many_images(monkeypatch):
    seen = {}

    def fake(logits, source, **settings):
        seen.update(source=source, **settings)
        result = corruptions.CorruptionResult({"brightness": {1: 0.5}}, "cifar10c", 6)
        return result

    labels = torch.arange(10) % 4
    monkeypatch.setattr(corruptions, "load_published_corruptions", lambda *_: (torch.zeros(10, 3, 6, 6), labels))
    monkeypatch.setattr(corruptions, "corruption_accuracy", fake)
    report = evaluate(metrics=["corruptions"], corruptions="somewhere", n_examples=6)
    assert seen["source"] == "somewhere" and len(seen["indices"]) == 6
    assert report.metrics["cifar10c_partial_mean_accuracy"] == 0.5 and report.corruptions["published"] is True
    evaluate(metrics=["corruptions"], corruptions="somewhere")
    assert seen["indices"] is None


def test_the_model_and_the_random_state_stay_as_they_were():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    model.train()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones(4, 4)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    report = evaluate(model, metrics=("pgd2", "autoattack"), preset="smoke", curve_examples=4)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert model.training and model[4].weight.requires_grad and not model[0].weight.requires_grad
    assert torch.equal(model[4].weight.grad, torch.ones(4, 4)) and model[4].bias.grad is None
    assert torch.equal(torch.random.get_rng_state(), state) and (np.random.get_state()[1] == numbers).all()
    assert "came in training mode" in report.warnings[0]
    half = evaluate(nn.Sequential(Ladder()).to(torch.bfloat16))
    assert half.metrics[PGD10] == sum(STAYS) / 10 and "bfloat16" in half.warnings[0]


def test_a_folder_with_everything_and_a_second_call_that_computes_nothing(tmp_path):
    calls = []

    class Counting(Ladder):
        def forward(self, images):
            calls.append(len(images))
            return super().forward(images)

    settings = {"metrics": ("pgd10", "autoattack"), "preset": "smoke", "output_dir": tmp_path, "curve_examples": 8}
    first = evaluate(Counting(), **settings)
    names = {"report.json", "report.html", "flags.npz", "robustness_curve.png", "classes.png", "examples.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"state"}
    assert same(first, EvaluationReport.load(tmp_path))
    points = dict(first.curve["points"])
    assert points[0.0] == 1.0 and points[EPS] < 1 and points[32 / 255] == 0.0 and len(points) == 10
    assert first.curve["n"] == 8 and "falls to 0" in first.curve["remark"]
    html = (tmp_path / "report.html").read_text()
    assert "Ladder" in html or "Counting" in html
    calls.clear()
    again = evaluate(Counting(), **settings)
    assert same(first, again) and again.stages == first.stages and sum(calls) < 300  # a fit check, the drawn examples
    with pytest.raises(ValueError, match=r"differs in model .*give another output_dir, or throw that one away"):
        evaluate(Ladder(scale=2.0), **settings)
    with pytest.raises(ValueError, match="differs in seed"):
        evaluate(Counting(), **settings, seed=1)
    with pytest.raises(ValueError, match="what the model answers to the first image"):  # no weight tells it
        evaluate(nn.Sequential(Ladder(), nn.Hardtanh(-1, 1)), **settings)
    evaluate(Ladder(scale=2.0), metrics=["accuracy"], output_dir=tmp_path, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "report.html",
        "flags.npz",
        "classes.png",
        "state",
    }


def test_a_kill_in_any_part_costs_nothing_of_the_parts_before(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    settings = {"metrics": ("pgd10", "autoattack"), "preset": "smoke", "output_dir": tmp_path, "batch_size": 3}
    with monkeypatch.context() as patch:
        patch.setattr("hf_robust.evaluation.autoattack.autoattack", die)
        with pytest.raises(Killed):
            evaluate(**settings)
    noted = {path: path.stat().st_mtime_ns for path in (tmp_path / "state" / "pgd10_linf_7_255").iterdir()}
    assert len(noted) == 4 and not (tmp_path / "report.json").exists()
    resumed = evaluate(**settings)
    assert all(path.stat().st_mtime_ns == time for path, time in noted.items())
    assert same(resumed, evaluate(**{**settings, "output_dir": None}))


def test_a_model_that_hides_its_gradient_gets_a_warning_from_the_curve():
    data = images_at(GOLDEN["rows"][:10])
    hidden = evaluate(Variant("quantised").eval(), data, metrics=["pgd1"], curve_examples=10)
    assert dict(hidden.curve["points"])[32 / 255] > 0.1
    assert any("masked gradients" in text for text in hidden.warnings)
    assert not evaluate(Variant("plain").eval(), data, metrics=["pgd1"], curve_examples=10).warnings


def test_what_pgd_breaks_and_autoattack_does_not_is_said(monkeypatch):
    job = object.__new__(evaluation_job.EvaluationJob)
    job.flags = {"autoattack": torch.tensor([True, True, False]), "pgd20": torch.tensor([True, False, False])}
    job.warnings, job.preset = [], "fast"
    job._compare_attacks()
    assert job.warnings[0].startswith(
        "PGD20 broke 1 of 3 images that AutoAttack (fast) left right; together they leave 33.3%"
    )


def test_the_published_row_of_the_same_method_and_of_no_other():
    facts = {"method": "DynACL", "mode": "SLF", "pretrained_on": "uoft-cs/cifar10"}
    row = published_row(facts, "cifar10")
    assert row["method"] == "DynACL" and row["metrics"]["autoattack_linf_8_255_accuracy"] == 0.4509
    assert published_row({**facts, "coreset": "RCS"}, "cifar10")["method"] == "DynACL-RCS"
    assert published_row({**facts, "method": "SimCLR"}, "cifar10") is None
    assert published_row({**facts, "mode": "LoRA"}, "cifar10") is None
    assert published_row(facts, "digits") is None and published_row({}, "cifar10") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["acuracy"]}, r"unknown metric 'acuracy': did you mean 'accuracy'\?"),
        ({"metrics": ["pgd0"]}, "PGD takes one step or more"),
        ({"metrics": ["pgd20"], "norm": "l1"}, "norm 'l1'.*for l1 leave it out"),
        ({"metrics": []}, "metrics is empty"),
        ({"data": (ladder_images(LEVELS)[0] * 4 - 2, ladder_images(LEVELS)[1])}, "put Normalize inside the model"),
        ({"data": (ladder_images(LEVELS)[0], torch.arange(10))}, r"go up to 9 and the model has 4 outputs.*0\.\.3"),
        ({"model": nn.Sequential(Ladder(), nn.Softmax(1), nn.Threshold(2.0, torch.nan))}, "not finite"),
        ({"device": "meta"}, "device is 'meta' and the model is on 'cpu'"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"n_examples": 2}, "stratified subset needs 4"),
        ({"eps": 8.0}, "write 8/255"),
        ({"eps": 0.0, "norm": "l1", "metrics": ["accuracy"]}, "eps must be positive, got 0"),
        ({"preset": "quick"}, "preset must be one of standard, fast, smoke, got 'quick'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0: leave it out for the default"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"curve_examples": -3}, "curve_examples must be 0 or more, got -3"),
        ({"corruptions": "no/such/folder"}, "add it to metrics, or leave them out"),
        ({"corruptions": "/no/such/folder", "metrics": ["pgd10", "corruptions"]}, "/no/such/folder"),
        (
            {"model": nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten())},
            r"cannot classify an image of the shape \(3, 6, 6\)",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_attacked(settings, message, monkeypatch, tmp_path):
    if "not finite" not in message:
        monkeypatch.setattr(evaluation_job, "predict", lambda *_, **__: pytest.fail("images were classified"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(**settings)


def test_a_missing_extra_is_named_before_anything_is_attacked(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr(evaluation_job, "predict", lambda *_, **__: pytest.fail("images were classified"))
    with pytest.raises(ImportError, match=r"hf_robust\[eval\]"):
        evaluate(metrics=("pgd10", "autoattack"))


def test_a_call_that_failed_leaves_nothing_that_stands_in_the_way_of_the_next(tmp_path):
    broken = nn.Sequential(Ladder(scale=2.0), nn.Threshold(100.0, torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        evaluate(broken, output_dir=tmp_path)
    assert evaluate(output_dir=tmp_path).metrics[PGD10] == sum(STAYS) / 10


def test_classes_are_numbered_as_the_model_does_and_other_names_noted():
    images, labels = ladder_images(LEVELS)
    names = ("a", "b", "c", "d")
    data = ImageDataset.from_tensors((images * 255).to(torch.uint8), labels, names)
    assert not evaluate(data=data, metrics=["accuracy"], label_names=names).warnings
    stored = (images * 255).to(torch.uint8)
    turned = ImageDataset.from_tensors(stored, torch.tensor([1, 0, 2, 3])[labels], ("b", "a", "c", "d"))
    without = ImageDataset.from_tensors(stored[1:], labels[1:] - 1, ("b", "c", "d"))  # a split that lacks a class
    for other in (turned, without):
        report = evaluate(data=other, metrics=["accuracy"], label_names=names)
        assert report.metrics["accuracy"] == 1.0 and not report.warnings and report.classes["names"] == list(names)
        assert torch.equal(report.flags["label"], labels[-len(other) :])
    with pytest.raises(ValueError, match="class 'b' is number 2 of the model and number 1 of 'tensors'"):
        evaluate(data=data, metrics=["accuracy"], label_names=("x", "c", "b", "d"))
    warnings = evaluate(data=data, metrics=["accuracy"], label_names=("w", "x", "y", "z")).warnings
    assert warnings == [
        "The classes of the model are called w, x, y ..., those of the data set a, b, c ...: they are "
        "compared by their numbers."
    ]


@pytest.mark.parametrize(
    ("norm", "eps", "noted"), [("l2", 8 / 255, 1), ("l2", 0.5, 0), ("l1", 1.0, 1), ("linf", EPS, 0)]
)
def test_a_budget_of_another_norm_is_noted(norm, eps, noted):
    report = evaluate(metrics=["accuracy"], norm=norm, eps=eps)
    assert ["attacks can hardly change anything" in text for text in report.warnings] == [True] * noted


def test_metrics_are_put_in_order():
    assert plan_metrics(["autoattack", "pgd50", "accuracy", "pgd50"]) == ["accuracy", "pgd50", "autoattack"]
    assert plan_metrics("pgd20") == ["pgd20"]
