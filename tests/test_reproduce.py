"""`hf-robust reproduce`: what it prints, what it collects, how it ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from hf_robust.reproduction.tables import load_table, table_names
from hf_robust.runs import reproduce


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def said(capsys, *argv: str) -> str:
    reproduce.main(list(argv))
    return capsys.readouterr().out


def test_the_tables_are_listed(capsys):
    text = said(capsys)
    for name in table_names():
        assert f"  {name} " in text and load_table(name).title in text
    assert "predicted" in text and "not measured" in text


def test_a_row_is_printed_with_its_commands(capsys):
    text = said(capsys, "cifar10", "--only", "dynacl-air++/aff")
    assert "| `dynacl-air++/aff` | 82.36 / 50.79 | not run |" in text
    commands = [line.split()[1] for line in text.splitlines() if line.startswith("hf-robust ")]
    assert commands == ["pretrain", "finetune", "finetune", "evaluate"]
    assert "# the 19 epochs stand in a misspelt field of the released code" in text  # what preset and code differ in
    assert "# The post-processing script released with AIR cannot run" in text
    assert "# 4 commands, predicted 2.5 hours (assumed, not measured" in text


def test_what_the_user_has_to_fill_in_is_said(capsys):
    assert "# path/to/stl10, also where a configuration says so, is for you" in said(
        capsys, "stl10", "--only", "acl/slf"
    )
    told = said(capsys, "stl10", "--only", "acl/slf", "--data", "stl10=my/stl10")
    assert "path/to" not in told and "--dataset_name my/stl10" in told


def test_what_rows_share_is_printed_once(capsys):
    text = said(capsys, "cifar10", "--only", "acl")
    commands = [line.split()[1] for line in text.splitlines() if line.startswith("hf-robust ")]
    assert commands == ["pretrain", *["finetune", "evaluate"] * 3]


def test_hours_follow_a_measured_rate(capsys):
    text = said(capsys, "cifar10", "--only", "acl/slf", "--seconds_per_epoch", "36")
    assert "# acl/slf: predicted 10 hours for the encoder" in text and "as given by --seconds_per_epoch" in text


def test_collecting_says_not_run(capsys, tmp_path):
    text = said(capsys, "cifar10", "--only", "acl/slf", "--collect", "--output_dir", str(tmp_path))
    assert "| `acl/slf` | 78.22 / 39.17 | not run |" in text and "0 of 1 rows" in text
    assert json.loads((tmp_path / "cifar10.json").read_text()) == []
    assert "not run" in (tmp_path / "cifar10.md").read_text()


def test_failures_end_in_a_message_after_the_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "run_rows", lambda *given: {"encoders/acl_cifar10": "failed with exit status 1"})
    with pytest.raises(SystemExit) as stopped:
        said(capsys, "cifar10", "--only", "acl/slf", "--run", "--output_dir", str(tmp_path))
    assert str(stopped.value) == "error: 1 stages failed or wait for one that did: encoders/acl_cifar10"
    assert "not run" in capsys.readouterr().out


def test_printed_commands_are_for_a_shell(capsys):
    text = said(capsys, "sat", "--only", "standard/alf", "--smoke").replace("\\\n", "")
    (first, *_) = [line for line in text.splitlines() if line.startswith("hf-robust ")]
    words = shlex.split(first)
    assert json.loads(words[words.index("--model_args") + 1])["stem_stride"] == 2
