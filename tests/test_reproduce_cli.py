"""The flags of `hf-robust reproduce`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_robust.reproduce_cli import parse_reproduce


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def test_without_a_table_they_are_listed():
    run = parse_reproduce([])
    assert run.table is None and run.rows == () and not run.run and "not measured" in run.rate.told


def test_a_table_and_its_rows():
    run = parse_reproduce(["cifar10", "--only", "dynacl", "acl/slf", "--run"])
    assert run.table and run.table.name == "cifar10" and run.run and not run.collect
    assert [row.name for row in run.rows] == ["acl/slf", "dynacl/slf", "dynacl/alf", "dynacl/aff"]
    assert run.plan.output_dir == "outputs/reproduction" and run.plan.precision == "bf16"


def test_a_smoke_test_has_a_folder_of_its_own():
    assert parse_reproduce(["cifar10", "--smoke"]).plan.output_dir == "outputs/reproduction_smoke"
    assert parse_reproduce(["cifar10", "--smoke", "--output_dir", "mine/"]).plan.output_dir == "mine"


def test_data_sets_with_and_without_columns():
    data = parse_reproduce(["cifar10", "--data", "stl10=data/stl10", "cifar10=data/jpeg:image:cls"]).plan.data
    assert data["stl10"].name == "data/stl10" and data["stl10"].image_column is None
    assert (data["cifar10"].name, data["cifar10"].image_column, data["cifar10"].label_column) == (
        *("data/jpeg", "image"),
        "cls",
    )
    assert data["stl10"].images == {"unlabeled": 100000, "train": 5000, "test": 8000}


def test_flags_for_the_stages():
    plan = parse_reproduce(
        ["sat", "--pretrain_args", "--num_train_epochs 20", "--finetune_args=--seed 3", "--n_examples", "1000"]
    ).plan
    assert plan.pretrain_args == ("--num_train_epochs", "20") and plan.finetune_args == ("--seed", "3")
    assert plan.n_examples == 1000


def test_the_rate(tmp_path):
    assert parse_reproduce(["cifar10", "--seconds_per_epoch", "20"]).rate.epoch_seconds == pytest.approx(20)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"results": [{"name": "acl/bf16/eager", "epoch_seconds": 9.0}], "settings": {}}))
    rate = parse_reproduce(["--benchmark", str(file)]).rate
    assert rate.epoch_seconds == pytest.approx(9) and rate.told.startswith("measured by benchmarks")
    with pytest.raises(FileNotFoundError):  # read when it is needed
        _ = parse_reproduce(["--benchmark", "nowhere.json"]).rate


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cifar"], "unknown table 'cifar': did you mean 'cifar10'?"),
        (["cifar10", "--only", "dynacl-air/afff"], "did you mean 'dynacl-air/aff'?"),
        (["--run"], "--run is for one table, and none is named: known are cifar10"),
        (["--only", "acl/slf"], "--only is for one table"),
        (["cifar10", "--precision", "int8"], "precision must be bf16 or fp32, got 'int8'"),
        (["cifar10", "--data", "stl10"], "--data says NAME=PATH, got 'stl10': write for example stl10=data/stl10"),
        (["cifar10", "--data", "svhn=x"], "unknown data set 'svhn'"),
        (["cifar10", "--n_examples", "0"], "n_examples must be 1 or more, got 0"),
        (["cifar10", "--seconds_per_epoch", "-1"], "seconds_per_epoch must be positive, got -1"),
        (["cifar10", "--seconds_per_epoch", "1", "--benchmark", "x"], "say the same thing: give one of them"),
        (["cifar10", "--pretrain_args", "--output_dir x"], "--pretrain_args must leave --output_dir out"),
        (["cifar10", "--finetune_args=--mode=slf"], "--finetune_args must leave --mode out"),
        (["cifar10", "--finetune_args", "'"], "cannot read --finetune_args"),
        (["cifar10", "--pretrain_args", "--hub_token abc"], "--pretrain_args holds an access token or password"),
        (["cifar10", "--data", "cifar10=https://me:pw@host/x"], "--data of cifar10 holds a login"),
        (["cifar10", "--pretrain_arg", "x"], "unrecognized arguments"),
        (["cifar10", "--run", "--collect"], "not allowed with argument --run"),
    ],
)
def test_slips(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_reproduce(argv, prog="hf-robust reproduce")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("hf-robust reproduce: error: ") and message in error


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse_reproduce(["--help"])
    text = capsys.readouterr().out
    for word in ("cifar10, cifar100", "--smoke --run", "--collect", "the same command goes on", "are predictions"):
        assert word in " ".join(text.split())
    assert all(len(line) <= 119 for line in text.splitlines())
