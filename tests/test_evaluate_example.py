"""`examples/evaluate.py` as a stranger runs it: a classifier, an encoder by protocols, a second call, mistakes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from released import OURS, trained_model
from torch import nn

from hf_robust.classifiers import build_classifier, save_classifier
from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub import save_encoder
from hf_robust.model_card import write_model_card
from hf_robust.runs import evaluate

EXAMPLE = Path(__file__).parents[1] / "examples" / "evaluate.py"
COLOURS = ("blue", "green", "red")  # in the order of their numbers
QUICK = ["--metrics", "accuracy", "pgd2", "--curve_examples", "0", "--use_cpu", "true"]
TUNE = "--num_train_epochs 1 --per_device_train_batch_size 8 --steps 1 --validation_steps 1 --report_to none "
TUNE += "--validation_fraction 0.2 --disable_tqdm true --save_strategy epoch"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("evaluate_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("test", 4)):
        for name in COLOURS:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (16, 16), name).point(lambda v, k=k: max(0, v - 9 * k)).save(folder / f"{k}.png")
    return root


def report_of(task: str, **more) -> EncoderReport:
    return EncoderReport("mine", "resnet10_cifar", "hf_robust_timm", task=task, dataset={"name": "images"}, **more)


@pytest.fixture
def model(tmp_path):
    """The output folder of a fine-tuning, with the encoder beside it."""
    encoder = save_encoder(trained_model(**OURS["thin"]), tmp_path / "run" / "encoder")
    network = build_classifier(encoder, 3)
    torch.manual_seed(5)
    nn.init.normal_(network.classifier.weight)
    folder = save_classifier(network, tmp_path / "tuned" / "classifier", label_names=COLOURS)
    start = {"name": "ACL", "objective": "ACL", "dataset": "cifar10"}
    for target, report in (
        (folder, report_of("classifier", objective={"name": "SLF"}, encoder=start)),
        (encoder, report_of("encoder", objective={"name": "ACL"})),
    ):
        report.save(target)
        write_model_card(report, target)
    return tmp_path


def test_a_classifier_gets_its_report_beside_it_and_into_its_card(example, model, images, capsys):
    command = ["--model", str(model / "tuned"), "--dataset_name", str(images), *QUICK]
    example.main(command)
    folder = model / "tuned" / "evaluation" / images.name
    text = capsys.readouterr().out
    assert "tuned/classifier: 12 of 12 images" in text and "Standard accuracy" in text and "n = 12, seed 0" in text
    assert f"Output folder: {folder}  (report.html, report.json, flags.npz, classes.png, examples.png)" in text
    report = EvaluationReport.load(folder)
    assert set(report.metrics) == {"accuracy", "pgd2_linf_8_255_accuracy"} and report.dataset["split"] == "test"
    assert report.model["method"] == "ACL" and report.model["mode"] == "SLF" and report.command
    card = model / "tuned" / "classifier" / "README.md"
    before = card.read_text()
    noted = {path: path.stat().st_mtime_ns for path in (folder / "state").rglob("0*.json")}
    example.main([*command, "--update_card", "true"])
    assert all(path.stat().st_mtime_ns == time for path, time in noted.items()) and len(noted) == 2
    assert "PGD-2 accuracy" in card.read_text() and "PGD-2 accuracy" not in before
    example.main([*command, "--update_card", "true"])
    rows = EncoderReport.load(card.parent).results
    assert [row["protocol"] for row in rows] == ["evaluation"]  # once, however often it is measured
    assert rows[0]["metrics"]["standard_accuracy"] == report.metrics["accuracy"]
    capsys.readouterr()
    example.main([*command, "--update_card", "true", "--metrics", "pgd3"])
    assert "The report replaces one with pgd2_linf_8_255_accuracy" in capsys.readouterr().out
    (row,) = EncoderReport.load(card.parent).results
    assert {"pgd2_linf_8_255_accuracy", "pgd3_linf_8_255_accuracy"} <= set(row["metrics"])  # the card keeps both


def test_an_encoder_is_fine_tuned_by_each_protocol_and_evaluated(example, model, images, capsys, monkeypatch):
    encoder = model / "run" / "encoder"
    command = ["--model", str(encoder), "--dataset_name", str(images), "--protocol", "slf", "alf", *QUICK]
    command += ["--update_card", "true", "--finetune_args", TUNE]
    example.main(command)
    text = capsys.readouterr().out
    folder = model / "run" / "encoder-protocols" / images.name
    for mode in ("slf", "alf"):
        assert (folder / mode / "classifier" / "model.safetensors").is_file()
        assert EvaluationReport.load(folder / mode / "evaluation").n == 12
    assert re.search(r"\n +SLF +ALF\naccuracy .*%.*%\npgd2_linf_8_255_accuracy", text), text
    rows = {row["protocol"]: row for row in EncoderReport.load(encoder).results}
    assert set(rows) == {"fine-tuned by SLF", "fine-tuned by ALF"}
    assert all(row["pictures"] and (encoder / name).is_file() for row in rows.values() for name in row["pictures"])
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("classifier/model.safetensors")}
    monkeypatch.setattr(evaluate.finetune, "main", lambda *_, **__: pytest.fail("trained again"))
    example.main(command)
    assert "SLF: fine-tuned already" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in weights.items())
    other = [*command[:-1], f"{TUNE} --learning_rate 0.5"]
    with pytest.raises(SystemExit, match="fine-tuned with other flags: give another --output_dir, or --resume false"):
        example.run_or_exit(other)
    checkpoints = list(folder.rglob("checkpoint-*"))
    monkeypatch.undo()
    other[other.index("alf") : other.index("alf") + 1] = []
    example.main([*other, "--resume", "false"])
    assert checkpoints and weights[folder / "slf/classifier/model.safetensors"] < max(
        path.stat().st_mtime_ns for path in (folder / "slf").rglob("model.safetensors")
    )
    assert "0.5" in (folder / "slf" / evaluate._DONE).read_text()


def test_what_a_metric_needs_is_looked_for_before_an_encoder_is_fine_tuned(example, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr(evaluate.finetune, "main", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=r"hf_robust\[eval\]"):
        example.run_or_exit(["--model", str(model / "run" / "encoder"), "--protocol", "slf", "--use_cpu", "true"])


def test_a_slip_in_the_flags_of_the_last_protocol_is_found_before_the_first_one_trains(
    example, model, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate.finetune, "main", lambda *_, **__: pytest.fail("trained"))
    command = ["--model", str(model / "run" / "encoder"), "--protocol", "slf", "alf", *QUICK]
    with pytest.raises(SystemExit) as stop:
        example.run_or_exit([*command, "--finetune_args", "--num_trian_epochs 1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("hf-robust finetune: error:") and "'num_train_epochs'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "no/such/model"),
        (["--model", "run/encoder"], r"encoder without classifier: fine-tune it first, with --protocol slf"),
        (["--split", "validation"], "validation"),
        (["--metrics", "pgd2000x"], "unknown metric 'pgd2000x'"),
        (["--corruptions", "nowhere", "--metrics", "corruptions"], "nowhere"),
        (["--model", "/no/folder"], "no folder '/no/folder': name the folder of a classifier"),
        (["--image_column", "picture"], "picture"),
    ],
)
def test_mistakes_end_in_one_message(example, model, images, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(model)
    with pytest.raises(SystemExit) as stop:
        example.run_or_exit(["--model", "tuned", "--dataset_name", str(images), *QUICK, *arguments])
    text = f"{stop.value.code} {capsys.readouterr().err}"
    assert stop.value.code not in (0, None) and re.search(message, text, re.DOTALL), text
    assert "Traceback" not in text


def test_strict_turns_a_warning_into_an_exit_status(example, model, images):
    command = ["--model", str(model / "tuned"), "--dataset_name", str(images), *QUICK, "--strict", "true"]
    example.run_or_exit(command)
    with pytest.raises(SystemExit) as stop:
        example.run_or_exit([*command, "--metrics", "autoattack", "--preset", "smoke", "--n_examples", "3"])
    assert stop.value.code == evaluate.WARNED
    report = EvaluationReport.load(model / "tuned" / "evaluation" / f"{images.name}-n3")
    assert "autoattacksmoke_linf_8_255_accuracy" in report.metrics and report.n == 3


def test_a_model_without_a_card_is_left_alone(model, tmp_path):
    folder = model / "tuned" / "classifier"
    (folder / "report.json").unlink()
    report = EvaluationReport({"accuracy": 0.5}, 4, dataset={"name": "x"})
    assert evaluate.update_card(model / "tuned", report) is False
    assert json.loads((model / "run" / "encoder" / "report.json").read_text())["results"] == []
