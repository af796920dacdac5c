"""`hf-robust card`: cards written anew from their reports; a mistake is one message and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from card_reports import report

from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.report import EncoderReport
from hf_robust.model_card import write_model_card
from hf_robust.runs.card import main, read_report, stale_files
from hf_robust.runs.console import run_or_exit

CIFAR = {"name": "uoft-cs/cifar10", "hub_id": "uoft-cs/cifar10"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An encoder's folder with its card."""
    values = EncoderReport.from_dict(report(dataset=CIFAR, results=[]))
    values.results = [{"model": "acl-digits", "metrics": {"standard_accuracy": 0.5}, "dataset": CIFAR, "n_eval": 9}]
    values.save(tmp_path / "encoder")
    write_model_card(values, tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_card_comes_back_byte_for_byte(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(before) == 3  # report, card, figures
    for path in before:
        if path.name != "report.json":
            path.write_text("something else")
    main([str(folder)])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "README.md written from report.json" in capsys.readouterr().out


def test_check_changes_nothing_and_says_what_is_stale(folder, tmp_path, capsys):
    main([str(folder), "--check"])
    assert "up to date" in capsys.readouterr().out
    (folder / "README.md").write_text("edited by hand")
    (folder / ".eval_results" / "uoft-cs--cifar10.yaml").unlink()
    with pytest.raises(SystemExit, match=r"README.md, .*uoft-cs--cifar10.yaml: run the command without --check"):
        main([str(folder), "--check"])
    assert (folder / "README.md").read_text() == "edited by hand"
    assert stale_files(read_report(folder), folder) == ["README.md", ".eval_results/uoft-cs--cifar10.yaml"]


def test_line_ends_count(folder):
    text = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(text.replace(b"\n", b"\r\n"))
    assert stale_files(read_report(folder), folder) == ["README.md"]


def test_licence_and_repository_are_kept_in_the_report(folder):
    main([str(folder), "--license", "apache-2.0", "--hub-id", "ann/acl"])
    text = (folder / "README.md").read_text()
    assert "license: apache-2.0" in text and 'from_pretrained("ann/acl"' in text
    main([str(folder)])
    assert (folder / "README.md").read_text() == text
    assert read_report(folder).license == "apache-2.0" and read_report(folder).results


def test_a_token_given_by_mistake_does_not_reach_a_file(folder):
    token = "hf_" + "aB3" * 11 + "Z"
    main([str(folder), "--license", token])
    assert all(token not in path.read_text() for path in folder.rglob("*") if path.is_file())


def test_mistakes_end_in_one_message_and_change_nothing(folder, tmp_path):
    before = (folder / "report.json").read_bytes()
    evaluation = tmp_path / "evaluation"
    EvaluationReport({"accuracy": 0.5}, 4).save(evaluation)
    cases = {
        (str(tmp_path / "none"),): "no report.json in .*pass the folder of an encoder",
        (str(folder.parent),): f"no report.json in .*pass '{folder}'",
        (str(evaluation),): "report of an evaluation: pass the folder of the model",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run_or_exit(main, list(arguments))
    (folder / "report.json").write_text("{")
    with pytest.raises(SystemExit, match="^error: "):
        run_or_exit(main, [str(folder)])
    (folder / "report.json").write_bytes(before)
    assert stale_files(read_report(folder), folder) == []


def test_what_cannot_be_published_is_refused_before_anything_is_written(folder):
    values = json.loads((folder / "report.json").read_text())
    values["dataset"]["hub_id"] = "/data/mine"
    (folder / "report.json").write_text(json.dumps(values))
    card = (folder / "README.md").read_bytes()
    with pytest.raises(SystemExit, match="^error: hub_id must be an id"):
        run_or_exit(main, [str(folder), "--license", "mit"])
    assert (folder / "README.md").read_bytes() == card
    assert json.loads((folder / "report.json").read_text())["license"] is None


def test_checking_and_changing_at_once_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(folder), "--check", "--license", "mit"])
    assert stop.value.code == 2 and "--check changes nothing, got --license" in capsys.readouterr().err


def test_without_a_folder_there_is_nothing_to_do(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "DIR" in capsys.readouterr().err
