"""What machines read of a card: metadata that the Hub takes, figures with their circumstances, files of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from card_reports import CLASSIFIER, CORESET, report, validate_card
from huggingface_hub import EvalResultEntry, ModelCard

from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.report import EncoderReport
from hf_robust.model_card import write_model_card
from hf_robust.model_card_metadata import eval_result_files, model_card_data

PGD20, AUTO = "pgd20_linf_8_255_accuracy", "autoattack_linf_8_255_accuracy"
CIFAR = {"name": "CIFAR-10", "hub_id": "uoft-cs/cifar10", "split": "train", "n_images": 50000}


def on_cifar(**changes: Any) -> EncoderReport:
    """An encoder of CIFAR-10, measured twice on it and once elsewhere."""
    probe = {"model": "acl", "protocol": "linear probe", "n_eval": 10000, "seed": 0, "dataset": {"name": "CIFAR-10"}}
    tuned = {**probe, "protocol": "fine-tuned by SLF", "date": "2026-11-22"}
    tuned["dataset"] = {"name": "CIFAR-10", "split": "test", "hub_id": "uoft-cs/cifar10"}
    results = [
        {**probe, "metrics": {"standard_accuracy": 0.8, PGD20: None}},
        {**tuned, "metrics": {"standard_accuracy": 0.85, AUTO: 0.375}},
        {**probe, "metrics": {"standard_accuracy": 0.99}, "dataset": {"name": "digits", "split": "test"}},
        {**probe, "model": "SimCLR", "metrics": {"standard_accuracy": 0.9, PGD20: 0.0}},
    ]
    return EncoderReport.from_dict(report(name="acl", dataset=CIFAR, results=results, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"license": "apache-2.0", "hub_id": "ann/acl", "coreset": CORESET},
        {"results": []},
        {"threat_model": None, "objective": {"name": "SimCLR"}},
        CLASSIFIER,
        {**CLASSIFIER, "exported_format": "peft", "encoder": {"name": "ann/acl", "hub_id": "ann/acl"}},
        {"name": "a: 'b' \u2013 {c}", "exported_format": "timm_wrapper"},
    ],
)
def test_every_card_passes_the_validation_of_the_hub(tmp_path, monkeypatch, changes):
    validate_card(write_model_card(report(**changes), tmp_path).read_text(encoding="utf-8"), monkeypatch)


def test_a_card_that_the_hub_would_refuse_does_not_pass(tmp_path, monkeypatch):
    text = write_model_card(report(), tmp_path).read_text(encoding="utf-8")
    with pytest.raises(AssertionError):
        validate_card(text.replace("image-feature-extraction", "feature-making"), monkeypatch)
    with pytest.raises(ValueError, match="name"):  # a figure without its data set
        validate_card(text.replace("      name: digits\n", ""), monkeypatch)


def test_figures_of_several_protocols_and_data_sets_stand_apart(tmp_path):
    card = ModelCard.load(write_model_card(on_cifar(), tmp_path)).data
    found = {(r.metric_name, r.dataset_type, r.dataset_split, r.metric_value) for r in card.eval_results}
    assert found == {
        ("Standard accuracy, linear probe", "uoft-cs/cifar10", None, 0.8),
        ("Standard accuracy, fine-tuned by SLF", "uoft-cs/cifar10", "test", 0.85),
        ("AutoAttack accuracy (L-inf, eps 8/255), fine-tuned by SLF", "uoft-cs/cifar10", "test", 0.375),
        ("Standard accuracy, linear probe", "digits", "test", 0.99),
    }
    auto = next(r for r in card.eval_results if "AutoAttack" in r.metric_name)
    assert auto.metric_args == {
        "attack": "autoattack",
        "norm": "linf",
        "eps": "8/255",
        "n_eval": 10000,
        "seed": 0,
    }


def test_the_files_of_results_hold_what_was_measured_on_data_of_the_hub(tmp_path):
    write_model_card(on_cifar(), tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    assert file.name == "uoft-cs--cifar10.yaml"
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    dataset = {"id": "uoft-cs/cifar10", "task_id": "standard_accuracy"}
    assert entries[0] == {
        "dataset": dataset,
        "value": 0.8,
        "notes": "Standard accuracy, linear probe, n 10000, seed 0",
    }
    assert len(entries) == 3 and entries[2]["value"] == 0.375 and entries[2]["date"] == "2026-11-22"
    assert entries[2]["dataset"]["task_id"] == AUTO
    assert "AutoAttack accuracy (L-inf, eps 8/255), fine-tuned by SLF, split test" in entries[2]["notes"]
    for entry in entries:  # the client's own type takes them
        EvalResultEntry(entry["dataset"]["id"], entry["dataset"]["task_id"], entry["value"], notes=entry["notes"])
    huggingface_hub = pytest.importorskip("huggingface_hub._eval_results")
    assert len(huggingface_hub.parse_eval_result_entries(entries)) == 3


def test_files_of_results_that_no_longer_hold_go_and_foreign_ones_stay(tmp_path):
    write_model_card(on_cifar(), tmp_path)
    foreign = tmp_path / ".eval_results" / "mine.yaml"
    foreign.write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    write_model_card(report(), tmp_path)  # digits: no data set of the Hub
    assert [path.name for path in (tmp_path / ".eval_results").iterdir()] == ["mine.yaml"]
    assert eval_result_files(EncoderReport.from_dict(report())) == {}


def test_an_encoder_it_came_from_is_its_base_model(tmp_path):
    tuned = ModelCard(write_model_card(report(**CLASSIFIER), tmp_path).read_text()).data.to_dict()
    assert (tuned["base_model"], tuned["base_model_relation"]) == ("ann/acl", "finetune")
    adapter = ModelCard(write_model_card(report(**CLASSIFIER, exported_format="peft"), tmp_path).read_text()).data
    assert adapter.to_dict()["base_model_relation"] == "adapter"
    local = ModelCard(write_model_card(report(), tmp_path).read_text()).data.to_dict()
    assert "base_model" not in local and "base_model_relation" not in local


def test_an_evaluation_brings_its_circumstances(tmp_path):
    evaluation = EvaluationReport(
        metrics={"accuracy": 0.75, PGD20: 0.5, AUTO: 0.45, "cifar10c_mean_accuracy": 0.6},
        n=200,
        intervals={"cifar10c_mean_accuracy": [0.55, 0.65]},
        stages=[{"name": "apgd-ce"}, {"name": "square"}],
        corruptions={"name": "CIFAR-10-C", "n": 100, "notes": ["all 15 at 5 severities"]},
        dataset={"name": "uoft-cs/cifar10", "hub_id": "uoft-cs/cifar10", "split": "test"},
        warnings=["PGD20 broke 3 images."],
        commit="abc",
        command="hf-robust evaluate",
        hardware={"cpu": "AMD EPYC", "cores": 2},
        date="2026-11-23",
    )
    result = evaluation.to_result("acl-digits", "fine-tuned by SLF")
    text = write_model_card(report(results=[result]), tmp_path).read_text(encoding="utf-8")
    figures = {r.metric_name: r for r in ModelCard(text).data.eval_results}
    assert figures["CIFAR-10-C mean accuracy, fine-tuned by SLF"].metric_args == {"n_eval": 100, "seed": 0}
    pgd = figures["PGD-20 accuracy (L-inf, eps 8/255), fine-tuned by SLF"].metric_args
    assert pgd["step_size"] == "2/255" and pgd["random_start"] and pgd["n_eval"] == 200
    table = text.split("## Results")[1].split("\n## ")[0]
    assert "**Fine-tuned by SLF**, on uoft-cs/cifar10 (split test), judged on 200 images, seed 0." in table
    assert "| CIFAR-10-C mean accuracy, n = 100 | 60.0 % (55.0\u201365.0) |" in table
    assert "PGD: step 2/255, random start, cross-entropy, last iterate." in table
    assert "AutoAttack's attacks, one after the other: APGD-CE, SQUARE." in table
    assert "Corruptions: CIFAR-10-C; all 15 at 5 severities." in table
    assert "Measured at commit abc, on cpu AMD EPYC, cores 2, on 2026-11-23.\n\n```bash\nhf-robust eval" in table
    assert "**Warning.** PGD20 broke 3 images." in table
    limits = text.split("## Limits")[1]
    assert "AutoAttack was not measured" not in limits and "rotations and patches are another matter" in limits
    assert Path(tmp_path / ".eval_results" / "uoft-cs--cifar10.yaml").is_file()


def test_only_pgd_is_described_by_the_settings_of_pgd():
    attack = {"step_size": 2 / 255, "random_start": True, "loss": "cross-entropy", "iterate": "last"}
    own = {**report()["results"][1], "metrics": {PGD20: 0.5, AUTO: 0.25, "standard_accuracy": 0.9}, "attack": attack}
    own["autoattack"] = ["apgd-ce", "square"]
    values = EncoderReport.from_dict(report(results=[{**own, "model": report()["name"]}]))
    found = {result.metric_name.split(" ")[0]: result.metric_args for result in model_card_data(values).eval_results}
    assert found["PGD-20"]["step_size"] == "2/255" and found["PGD-20"]["iterate"] == "last"
    assert found["AutoAttack"]["attacks"] == ["apgd-ce", "square"]
    assert not {*attack, "steps"} & (found["AutoAttack"].keys() | found["Standard"].keys())
    assert "attacks" not in found["PGD-20"]
