"""Metric names there and back, the interval, and a report that survives its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_robust.evaluation.report import (
    EncoderReport,
    attack_metric_name,
    binomial_interval,
    describe_metric,
    format_eps,
    write_text,
)

LEAST = {"name": "acl", "architecture": "resnet18_cifar", "exported_format": "hf_robust_timm"}


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (1 / 255, "1/255"), (16 / 255, "16/255"), (128 / 255, "128/255"), (0.5, "0.5"), (1.0, "1")]
    + [(0.031, "0.031"), (2.0, "2"), (3.0, "3"), (8.5 / 255, repr(8.5 / 255)), (float(np.float32(8 / 255)), "8/255")],
)
def test_a_budget_is_written_as_papers_do(eps: float, text: str) -> None:
    assert format_eps(eps) == text


def test_metric_names_carry_the_attack_and_read_back() -> None:
    assert attack_metric_name("pgd20", "linf", 8 / 255) == "pgd20_linf_8_255_accuracy"
    assert attack_metric_name("autoattack", "l2", 0.5) == "autoattack_l2_0.5_accuracy"
    words = describe_metric("pgd20_linf_8_255_accuracy")
    assert words == {
        "title": "PGD-20 accuracy (L-inf, eps 8/255)",
        "attack": "pgd20",
        "norm": "linf",
        "eps": "8/255",
    }
    assert describe_metric("autoattack_l2_0.5_accuracy")["title"] == "AutoAttack accuracy (L2, eps 0.5)"
    assert describe_metric("standard_accuracy") == {"title": "Standard accuracy"}


@pytest.mark.parametrize(("attack", "norm"), [("PGD 20", "linf"), ("pgd20", "linfinity"), ("pgd_20", "linf")])
def test_other_names_are_refused(attack: str, norm: str) -> None:
    with pytest.raises(ValueError, match="attack_metric_name"):
        attack_metric_name(attack, norm, 8 / 255)


def test_the_interval_is_wilsons() -> None:
    low, high = binomial_interval(0.5, 200)
    assert (low, high) == (pytest.approx(0.4313, abs=1e-4), pytest.approx(0.5687, abs=1e-4))
    assert binomial_interval(0.0, 10)[0] == 0.0 and binomial_interval(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    assert binomial_interval(1.0, 10)[1] == pytest.approx(1.0)


def full() -> EncoderReport:
    metrics = {"standard_accuracy": 1 / 3, "pgd20_linf_8_255_accuracy": 0.1 + 0.2}
    return EncoderReport(
        **LEAST,
        objective={"name": "ACL", "parameters": {"temperature": 0.5, "views": ("view_1", "view_2")}},
        model_args={"channels": (16, 32)},
        threat_model={"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 5},
        training={"seconds": math.pi * 1e-7, "epochs": 3, "seed": np.int64(2**40), "learning_rate": np.float64(0.1)},
        results=[{"model": "acl", "metrics": metrics, "n_eval": torch.tensor(360)}],
    )


def test_a_report_survives_its_file_bit_for_bit(tmp_path: Path) -> None:
    report = full()
    path = report.save(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "report.json"
    loaded = EncoderReport.load(path)
    assert loaded == report == EncoderReport.load(path.parent)
    assert loaded.training["seconds"] == math.pi * 1e-7
    assert loaded.threat_model is not None and loaded.threat_model["eps"] == 8 / 255
    assert loaded.results[0]["metrics"]["pgd20_linf_8_255_accuracy"] == 0.1 + 0.2
    assert loaded.model_args == {"channels": [16, 32]} and loaded.results[0]["n_eval"] == 360
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_report_of_a_classifier_survives_its_file(tmp_path: Path) -> None:
    encoder = {"name": "acl", "objective": "ACL", "dataset": "digits"}
    report = EncoderReport(**LEAST, task="classifier", encoder=encoder, label_names=("a", np.str_("b")))
    loaded = EncoderReport.load(report.save(tmp_path))
    assert loaded == report and loaded.encoder == encoder and loaded.label_names == ["a", "b"]
    older = {key: value for key, value in full().to_dict().items() if key not in ("task", "encoder", "label_names")}
    assert EncoderReport.from_dict(older) == full()  # a report from before there were classifiers


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "card.md", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_tokens_and_home_folders_never_enter_a_report() -> None:
    report = EncoderReport(
        **LEAST, command="x hf_abcdefghijklmnop", objective={"parameters": {"teacher": "/home/ann/t"}}
    )
    assert report.command == "x REDACTED"
    assert report.objective["parameters"]["teacher"] == "~/t"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"treat_model": {}}, "'treat_model'.*did you mean 'threat_model'"),
        ({"zzzzzz": 1}, "known fields: name, architecture"),
        ({"exported_format": "onnx"}, "one of timm_wrapper, hf_robust_timm, peft, got 'onnx'"),
        ({"task": "detector"}, "task must be one of encoder, classifier, got 'detector'"),
        ({"exported_format": "peft"}, "classifier on an encoder, got task='encoder'.*write task='classifier'"),
        ({"exported_format": "peft", "task": "classifier"}, r"encoder=\{\}: write task='classifier' and encoder="),
        ({"architecture": None}, "no architecture"),
        ({"training": {"loss": [1.0, math.nan]}}, r"training.loss\[1\] is nan.*leave it out"),
        ({"results": [{"model": "a", "metrics": {"standard_accuracy": 87.0}}]}, "got 87.0: divide percent by 100"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderReport.from_dict({**LEAST, **values})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"name": "x"})])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = write_text(tmp_path / "report.json", text)
    with pytest.raises(ValueError, match="restore the file|no architecture"):
        EncoderReport.load(path)
