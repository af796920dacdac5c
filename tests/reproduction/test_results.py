"""What reports say beside the published figures: gap, budget, and "not run"."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.results import (
    collect_row,
    collected_table,
    markdown_table,
    read_collection,
    row_hours,
    run_command,
    write_collection,
)
from hf_robust.reproduction.stages import Plan, row_stages
from hf_robust.reproduction.tables import choose_rows, load_table

ROOT = Path(__file__).parents[2]
AUTOATTACK = "autoattack_linf_8_255_accuracy"
GPU = {"gpu": "Some GPU", "gpus": 8, "cpu": "Some CPU", "cores": 16}  # seven of which had nothing to do
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


def row_of(name: str = "acl/slf", table: str = "cifar10"):
    (row,) = choose_rows(load_table(table), [name])
    return row


def finish(row, plan: Plan, *, commit: str = COMMIT, metrics=None) -> None:
    """Reports as the stages of a row write them, made up."""
    for stage in row_stages(row, plan):
        facts = {"command": shlex.join(["hf-robust", stage.command, *stage.words]), "hardware": GPU, "commit": commit}
        if stage.command == "evaluate":
            facts |= {"metrics": metrics or {"accuracy": 0.75, "pgd20_linf_8_255_accuracy": 0.44, AUTOATTACK: 0.40}}
            facts |= {"intervals": {AUTOATTACK: [0.39, 0.41]}, "n": 10_000, "seed": 0, "date": "2026-12-01"}
            facts |= {"seconds": {"clean": 100.0, "autoattack": 260.0}}
        else:
            epochs = {"pretrain": 1000.0, "finetune": 25.0}[stage.command]
            facts |= {"training": {"epochs": epochs, "seconds": 3600.0, "seed": 1}}
        for name in stage.makes:
            file = Path(stage.folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(facts))


def test_a_finished_row_has_its_gap_and_its_budget(tmp_path):
    plan, row = Plan(output_dir=str(tmp_path)), row_of()
    assert collect_row(row, plan) is None
    finish(row, plan)
    found = collect_row(row, plan)
    assert found is not None and found.gap == pytest.approx({"accuracy": -0.0322, AUTOATTACK: 0.0083})
    assert (found.n, found.epochs, found.hardware, found.commit) == (10_000, 1000, "1 x Some GPU", COMMIT)
    assert found.hours == pytest.approx(2.1) and found.date == "2026-12-01" and not found.smoke
    assert found.seeds == {
        "encoders/acl_cifar10": 1,
        "classifiers/acl_cifar10-cifar10-slf": 1,
        "classifiers/acl_cifar10-cifar10-slf/evaluation": 0,
    }
    assert [command.split()[1] for command in found.commands] == ["pretrain", "finetune", "evaluate"]


def test_a_row_that_did_not_reach_its_end_is_not_run(tmp_path):
    plan, row = Plan(output_dir=str(tmp_path)), row_of()
    finish(row, plan)
    Path(row_stages(row, plan)[-1].folder, "report.json").unlink()
    assert collect_row(row, plan) is None


def test_a_smoke_test_has_no_gap(tmp_path):
    plan, row = Plan(output_dir=str(tmp_path), smoke=True), row_of()
    finish(row, plan)
    found = collect_row(row, plan)
    assert found is not None and found.smoke and found.gap == {}
    lines, _ = collected_table(load_table("cifar10"), [row], plan, Rate.assumed())
    assert "smoke test, 1000 epochs" in "\n".join(lines) and "its figures mean nothing" in lines[-1]


def test_the_gap_is_to_the_talk_where_the_leaderboard_has_another_number(tmp_path):
    plan, row = Plan(output_dir=str(tmp_path)), row_of("cifar10-stl10/dynacl/slf", "transfer")
    finish(row, plan)
    found = collect_row(row, plan)
    assert found is not None and found.gap[AUTOATTACK] == pytest.approx(0.40 - 0.2852)


def test_lines_of_the_table(tmp_path):
    plan, table = Plan(output_dir=str(tmp_path)), load_table("cifar10")
    rows = choose_rows(table, ["acl/slf", "acl/alf"])
    finish(rows[0], plan, commit=f"{COMMIT}-dirty")
    lines, results = collected_table(table, rows, plan, Rate.assumed())
    assert lines[0] == "## CIFAR-10, pre-trained and fine-tuned there (RobustSSL leaderboard)" and len(results) == 1
    assert lines[4] == (
        "| `acl/slf` | 78.22 / 39.17 | 75.00 / 40.00 [39.0, 41.0] | -3.22 / +0.83 | 1000 epochs, 2.1 h, 1 x Some GPU, "
        "commit 0123456-dirty, n = 10000, seeds 1, 0 | 2.1 + 0.10 |"
    )
    assert lines[5] == "| `acl/alf` | 75.53 / 40.60 | not run |  |  | 2.1 + 0.14 |"
    assert "not measured" in "\n".join(lines)
    files = write_collection(table, lines, results, tmp_path / "tables")
    assert files[0].read_text().splitlines() == lines
    (entry,) = json.loads(files[1].read_text())
    assert entry["row"] == "acl/slf" and entry["commit"] == f"{COMMIT}-dirty" and len(entry["commands"]) == 3


def test_rows_collected_before_stay_beside_those_asked_for(tmp_path):
    plan, table, rate = Plan(output_dir=str(tmp_path)), load_table("cifar10"), Rate.assumed()
    for name in ("dynacl/slf", "acl/slf"):
        finish(row_of(name), plan)
        lines, results = collected_table(table, [row_of(name)], plan, rate)
        write_collection(table, lines, results, tmp_path)
    assert [result.row for result in results] == ["acl/slf", "dynacl/slf"] and "| `dynacl/slf` | 75.41" in "\n".join(
        lines
    )
    _, results = collected_table(table, [row_of("acl/slf")], plan, rate, broken=["acl/slf"])
    assert [result.row for result in results] == ["dynacl/slf"]
    _, results = collected_table(table, [], Plan(output_dir=str(tmp_path), smoke=True), rate)
    assert results == []  # a smoke test does not take in real results
    (tmp_path / "cifar10.json").write_text('[{"row": 1}]')
    with pytest.raises(ValueError, match="is not a file of results .*: remove it, and collect again"):
        read_collection(tmp_path, table)


def test_several_processes_are_that_many_gpus(tmp_path):
    plan, row = Plan(output_dir=str(tmp_path)), row_of()
    finish(row, plan)
    file = Path(row_stages(row, plan)[0].folder, "report.json")
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "training": {**report["training"], "processes": 4}}))
    found = collect_row(row, plan)
    assert found and found.hardware == "4 x Some GPU, 1 x Some GPU"


def test_rows_without_numbers_and_with_two_origins_and_hours():
    plan, rate = Plan(), Rate.assumed()

    def line(table: str, name: str) -> str:
        return markdown_table(load_table(table), [row_of(name, table)], {}, plan, rate, commands=True)[-1]

    assert "| no numbers | not run |" in line("rcs", "acl-rcs-0.1/slf")
    assert "| no numbers; 650.2 h | not run |" in line("imagenet32-cifar10", "acl-entire/slf")
    assert "| 52.45 / 28.52 (talk), 52.41 / 29.17 (leaderboard) |" in line("transfer", "cifar10-stl10/dynacl/slf")
    assert "| 79.72 / 44.44; 68.6 h |" in line("sat", "rcs-0.05/alf")
    assert line("rcs", "acl-entire/alf").endswith("| `hf-robust reproduce rcs --only acl-entire/alf --run` |")
    assert line("sat", "rcs-0.05/alf").endswith("--only rcs-0.05/alf --run --data imagenet32=PATH` |")
    assert run_command(load_table("transfer")) == "hf-robust reproduce transfer --run --data stl10=PATH"


def test_hours_of_a_row_that_is_run_alone():
    rate = Rate.of_epoch(36.0)
    encoder, rest = row_hours(row_of("acl/slf"), Plan(), rate)
    assert encoder == pytest.approx(10.0, rel=1e-3) and 0 < rest < 1
    assert row_hours(row_of("dynacl++/slf"), Plan(), rate)[0] > row_hours(row_of("dynacl/slf"), Plan(), rate)[0]
