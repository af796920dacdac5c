"""A report keeps its figures, its flags and its sentences, and nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.report import EncoderReport, binomial_interval

PGD20, AUTO = "pgd20_linf_8_255_accuracy", "autoattack_linf_8_255_accuracy"


def report(**changes) -> EvaluationReport:
    board = {"method": "ACL", "mode": "slf", "source": "cifar10", "target": "cifar10", "origin_title": "the board"}
    values = {
        "metrics": {"accuracy": 0.75, PGD20: 0.5, AUTO: 0.45},
        "n": 200,
        "seconds": {"clean": 1.0, "pgd20": 2.5},
        "warnings": ["Mind the gap."],
        "model": {"name": "SLF thin", "source": str(Path.home() / "runs" / "x")},
        "dataset": {"name": "cifar10", "split": "test", "n": 200},
        "leaderboard": {**board, "metrics": {"accuracy": 0.7822, AUTO: 0.3917}},
        "command": "python evaluate.py --token hf_abcdefghijklmnopqrstuvwxyz",
        "flags": {"clean": torch.arange(200) % 4 > 0, "index": torch.arange(200)},
    }
    return EvaluationReport(**{**values, **changes})


def test_what_is_saved_reads_back(tmp_path):
    first = report()
    assert first.save(tmp_path / "new") == tmp_path / "new" / "report.json"
    again = EvaluationReport.load(tmp_path / "new")
    assert again.to_dict() == json.loads((tmp_path / "new" / "report.json").read_text()) and again.n == 200
    assert all(torch.equal(again.flags[name], value) for name, value in first.flags.items())
    assert again.flags["clean"].dtype == torch.bool and again.metrics == first.metrics
    text = (tmp_path / "new" / "report.json").read_text()
    assert "abcdefghijklm" not in text and str(Path.home()) + "/" not in text


def test_intervals_are_those_of_wilson():
    assert report().intervals[PGD20] == list(binomial_interval(0.5, 200))
    assert report(intervals={PGD20: [0.1, 0.9]}).intervals[PGD20] == [0.1, 0.9]


def test_the_table_names_everything_a_reader_needs():
    text = report().table()
    for part in ("Standard accuracy", "75.0%", "PGD-20 accuracy (L-inf, eps 8/255)", "AutoAttack accuracy"):
        assert part in text
    for part in (
        "43.1% to 56.9%",
        "39.2%",
        "n = 200, seed 0, float32, 4 s",
        "published: ACL, cifar10 -> cifar10, SLF",
    ):
        assert part in text, text
    assert "Warning: Mind the gap." in text
    assert "published" not in report(leaderboard=None).table()
    noisy = {"name": "generated corruptions", "n": 200, "notes": ["frost is generated ice"]}
    line = "corruptions: generated corruptions, 200 images per cell; frost is generated ice"
    assert line in report(corruptions=noisy).table().splitlines()


def test_it_becomes_an_entry_of_a_model_card():
    entry = report().to_result("mine", "fine-tuned by SLF")
    assert entry["metrics"] == {"standard_accuracy": 0.75, PGD20: 0.5, AUTO: 0.45}
    assert (
        entry["model"] == "mine"
        and entry["n_eval"] == 200
        and entry["dataset"] == {"name": "cifar10", "split": "test"}
    )
    card = EncoderReport("mine", "resnet18", "timm_wrapper", results=[entry, report().to_result()])
    assert [row["model"] for row in card.results] == ["mine", "SLF thin"]


def test_other_files_and_impossible_figures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no evaluation in"):
        EvaluationReport.load(tmp_path)
    EncoderReport("mine", "resnet18", "timm_wrapper").save(tmp_path)
    with pytest.raises(ValueError, match="not the report of an evaluation"):
        EvaluationReport.load(tmp_path)
    with pytest.raises(ValueError, match="divide percent by 100"):
        report(metrics={"accuracy": 75.0})
