"""Stages run, stop, go on and fail: with stand-ins for the commands, and one row for real on the digits."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_robust.checkpoints import latest_complete, write_manifest
from hf_robust.evaluation.environment import redact
from hf_robust.reproduction import running
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.results import collect_row
from hf_robust.reproduction.running import command_of, is_finished, run_rows
from hf_robust.reproduction.stages import Plan, Stage, row_stages, unique_stages
from hf_robust.reproduction.tables import choose_rows, load_dataset, load_table

ROOT = Path(__file__).parents[2]
WRITE = """
import json, pathlib, sys
folder, names, command = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"command": command}))
"""
FAIL, NOTHING = "import sys; sys.exit(3)", ""


class Stand:
    """In the place of the commands: a program per stage, and what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.programs: dict[str, str] = {}

    def command(self, stage: Stage, plan: Plan) -> list[str]:
        told = shlex.join(["hf-robust", stage.command, *stage.words])
        program = self.programs.get(stage.name, WRITE)
        return [sys.executable, "-c", program, stage.folder, ",".join(stage.makes), told]


@pytest.fixture
def stand(monkeypatch):
    found, run = Stand(), running._run
    monkeypatch.setattr(running, "command_of", found.command)
    monkeypatch.setattr(running, "_run", lambda stage, plan: (found.ran.append(stage.name), run(stage, plan))[1])
    monkeypatch.chdir(ROOT)
    return found


@pytest.fixture
def plan(tmp_path):
    return Plan(output_dir=str(tmp_path / "out"))


def rows_of(*only: str):
    return choose_rows(load_table("cifar10"), only)


def run(rows, plan) -> tuple[dict[str, str], str]:
    lines: list[str] = []
    return run_rows(rows, plan, Rate.assumed(), lines.append), "\n".join(lines)


def test_what_rows_share_runs_once_and_what_is_finished_not_again(stand, plan):
    rows = rows_of("dynacl/slf", "dynacl++/slf")
    failed, told = run(rows, plan)
    assert failed == {} and stand.ran == [
        "encoders/dynacl_cifar10",
        "classifiers/dynacl_cifar10-cifar10-slf",
        "classifiers/dynacl_cifar10-cifar10-slf/evaluation",
        "encoders/dynacl_cifar10++",
        "classifiers/dynacl_cifar10++-cifar10-slf",
        "classifiers/dynacl_cifar10++-cifar10-slf/evaluation",
    ]
    assert "[1/6] encoders/dynacl_cifar10: pretrain, predicted 1.8 hours" in told and "finished after" in told
    stand.ran.clear()
    assert run(rows, plan)[1].count("finished before") == 6 and stand.ran == []


def test_a_failure_ends_its_row_and_not_the_next(stand, plan):
    stand.programs["classifiers/acl_cifar10-cifar10-slf"] = FAIL
    rows = rows_of("acl/slf", "acl/alf")
    failed, told = run(rows, plan)
    assert failed == {
        "classifiers/acl_cifar10-cifar10-slf": "failed with exit status 3",
        "classifiers/acl_cifar10-cifar10-slf/evaluation": "waits for classifiers/acl_cifar10-cifar10-slf",
    }
    assert "classifiers/acl_cifar10-cifar10-alf/evaluation" in stand.ran
    assert "row acl/slf was not reproduced: classifiers/acl_cifar10-cifar10-slf (failed with exit status 3)" in told
    assert "row acl/alf was not" not in told
    stand.programs.clear()
    stand.ran.clear()
    assert run(rows, plan)[0] == {} and stand.ran == [
        "classifiers/acl_cifar10-cifar10-slf",
        "classifiers/acl_cifar10-cifar10-slf/evaluation",
    ]


def test_a_stage_that_leaves_nothing_has_failed(stand, plan):
    stand.programs["encoders/acl_cifar10"] = NOTHING
    failed, _ = run(rows_of("acl/slf"), plan)
    assert failed["encoders/acl_cifar10"] == "ended without writing encoder/config.json, report.json"


def test_a_stage_that_failed_after_writing_its_files_is_not_finished(stand, plan):
    stand.programs["encoders/acl_cifar10"] = f"{WRITE}\nsys.exit(1)"
    run(rows_of("acl/slf"), plan)
    stand.ran.clear()
    stand.programs.clear()
    assert run(rows_of("acl/slf"), plan)[0] == {} and stand.ran[0] == "encoders/acl_cifar10"


def test_files_without_an_entry_count_when_their_report_names_this_command(stand, plan):
    (stage, *_) = row_stages(rows_of("acl/slf")[0], plan)
    told = shlex.join(["python", "-m", "x", "pretrain", *stage.words, "--resume_from_checkpoint", "true"])
    for name in stage.makes:
        file = Path(stage.folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"command": told}))
    assert is_finished(stage, plan)
    Path(stage.folder, "report.json").write_text(json.dumps({"command": told.replace("true", "false")}))
    with pytest.raises(
        ValueError, match=r"holds a run of other flags .*\(--bf16 false, now true; .*\): give the flags"
    ):
        is_finished(stage, plan)
    Path(stage.folder, "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read '.*report.json' \(.*\): it is damaged, remove it"):
        is_finished(stage, plan)


def test_a_command_run_by_hand_in_a_home_folder_counts(stand, plan, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # reports do not tell it
    (stage, *_) = row_stages(rows_of("acl/slf")[0], plan)
    for name in stage.makes:
        file = Path(stage.folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"command": redact(shlex.join(["hf-robust", "pretrain", *stage.words]))}))
    assert "~/out" in Path(stage.folder, "report.json").read_text() and is_finished(stage, plan)


def test_a_folder_with_the_run_of_other_flags_is_refused_before_anything_runs(stand, plan):
    run(rows_of("acl/slf"), plan)
    stand.ran.clear()
    other = Plan(output_dir=plan.output_dir, pretrain_args=("--num_train_epochs", "10"))
    with pytest.raises(ValueError, match="acl_cifar10' holds a run of other flags"):
        run(rows_of("dynacl/slf", "acl/slf"), other)
    with pytest.raises(ValueError, match="other flags"):
        run(rows_of("acl/slf"), Plan(output_dir=plan.output_dir, smoke=True))
    assert stand.ran == []
    with pytest.raises(ValueError, match=r"\(--num_train_epochs unset, now 10\): give the flags of that run again"):
        run(rows_of("acl/slf"), other)


def test_the_output_folder_may_be_moved(stand, plan, tmp_path):
    run(rows_of("acl/slf"), plan)
    stand.ran.clear()
    Path(plan.output_dir).rename(tmp_path / "elsewhere")
    assert run(rows_of("acl/slf"), Plan(output_dir=str(tmp_path / "elsewhere")))[0] == {} and stand.ran == []


def test_what_was_made_from_an_earlier_encoder_is_not_taken_for_that_of_a_new_one(stand, plan):
    rows = rows_of("acl/slf")
    run(rows, plan)
    encoder, tuned, _ = row_stages(rows[0], plan)
    shutil.rmtree(encoder.folder)
    stand.ran.clear()
    failed, told = run(rows, plan)
    assert stand.ran == [encoder.name]
    assert f"{tuned.name}: left out, '{tuned.folder}' was made from an earlier run of {encoder.name}: remove" in told
    assert set(failed) == {tuned.name, f"{tuned.name}/evaluation"}
    with pytest.raises(ValueError, match="was made from an earlier run of encoders/acl_cifar10"):
        collect_row(rows[0], plan)
    shutil.rmtree(tuned.folder)
    assert run(rows, plan)[0] == {}


def test_flags_that_failed_at_once_may_be_corrected(stand, plan):
    stand.programs["encoders/acl_cifar10"] = FAIL
    run(rows_of("acl/slf"), Plan(output_dir=plan.output_dir, pretrain_args=("--typo", "1")))
    stand.programs.clear()
    assert run(rows_of("acl/slf"), plan)[0] == {}


def test_a_stage_that_is_running_elsewhere_is_left_alone(stand, plan):
    (stage, *_) = row_stages(rows_of("acl/slf")[0], plan)
    me = psutil.Process()
    state = {"arguments": stage.words, "status": "running", "pid": me.pid, "created": me.create_time()}
    running._write_state(stage, plan, state)
    with pytest.raises(ValueError, match=f"encoders/acl_cifar10 is running as process {os.getpid()}: wait for it"):
        run(rows_of("acl/slf"), plan)
    running._write_state(stage, plan, {**state, "created": 1.0})  # its number was given to another process
    assert run(rows_of("acl/slf"), plan)[0] == {}


def test_a_stage_that_another_process_has_taken_meanwhile_is_left_alone(stand, plan):
    first, second, _ = row_stages(rows_of("acl/slf")[0], plan)
    me = psutil.Process()
    state = {"arguments": [], "status": "running", "pid": me.pid, "created": me.create_time()}
    file = running._state_file(second.name, plan)
    stand.programs[first.name] = f"{WRITE}\npathlib.Path({str(file)!r}).write_text({json.dumps(state)!r})"
    failed, told = run(rows_of("acl/slf", "acl/alf"), plan)
    assert set(failed) == {second.name, f"{second.name}/evaluation"} and second.name not in stand.ran
    assert f"left out, {second.name} is running as process {me.pid}" in told
    assert "row acl/alf was not" not in told


def test_a_damaged_entry_and_a_folder_that_cannot_be_written_to_are_named(stand, plan, tmp_path):
    (stage, *_) = row_stages(rows_of("acl/slf")[0], plan)
    file = running._state_file(stage.name, plan)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(
        ValueError, match=r"cannot read '.*encoders--acl_cifar10.json' \(.*\): it is damaged, remove it"
    ):
        run(rows_of("acl/slf"), plan)
    with pytest.raises(ValueError, match="cannot write to '.*json' .*: give another --output_dir"):
        run(rows_of("acl/slf"), Plan(output_dir=str(file)))
    assert stand.ran == []


def test_a_data_set_that_is_not_there_is_missed_before_anything_runs(stand, plan, tmp_path):
    data = {"stl10": dataclasses.replace(load_dataset("stl10"), name=str(tmp_path / "stl10"))}
    row = choose_rows(load_table("transfer"), ["cifar10-stl10/acl/slf"])
    plan = dataclasses.replace(plan, data=data)
    with pytest.raises(ValueError, match="no data set at '.*stl10': correct --data"):
        run_rows(row, plan, Rate.assumed())
    (tmp_path / "stl10").mkdir()
    assert stand.ran == [] and run_rows(row, plan, Rate.assumed()) == {}


def test_data_sets_that_nobody_named_are_asked_for_before_anything_runs(stand, plan):
    with pytest.raises(ValueError, match=r"the data sets stl10 are not on the Hub: .* --data stl10=PATH"):
        run_rows(choose_rows(load_table("transfer"), ["cifar10-stl10/acl/slf"]), plan, Rate.assumed())
    assert stand.ran == []


# ---------------------------------------------------------------------- going on
def test_a_training_goes_on_from_a_whole_checkpoint_only(plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    pretraining, tuning, evaluation = row_stages(rows_of("acl/aff")[0], plan)
    assert "--resume_from_checkpoint" not in command_of(pretraining, plan)
    checkpoint = Path(pretraining.folder, "checkpoint-98")
    checkpoint.mkdir(parents=True)
    assert "--resume_from_checkpoint" not in command_of(pretraining, plan)
    (checkpoint / "model.safetensors").write_bytes(b"x")
    write_manifest(checkpoint)
    assert command_of(pretraining, plan)[-2:] == ["--resume_from_checkpoint", "true"]
    assert str(checkpoint) in command_of(tuning, plan)  # where fine-tuning starts
    assert command_of(tuning, plan)[:4] == [sys.executable, "-m", "hf_robust.commands", "finetune"]
    Path(evaluation.folder).mkdir(parents=True)
    assert "--resume_from_checkpoint" not in command_of(evaluation, plan)  # it goes on by itself


def test_post_processing_goes_on_after_its_first_stages(plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage = row_stages(rows_of("dynacl++/slf")[0], plan)[1]
    assert "--resume_from_checkpoint" not in command_of(stage, plan)
    Path(stage.folder).mkdir(parents=True)
    Path(stage.folder, "pseudo_labels.json").write_text("{}")
    assert command_of(stage, plan)[-2:] == ["--resume_from_checkpoint", "true"]


def test_configuration_files_are_found_from_elsewhere(plan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = command_of(row_stages(rows_of("acl/slf")[0], plan)[0], plan)
    assert Path(words[words.index("--config") + 1]).is_file()


# ---------------------------------------------------------------------- for real
LONGER = ["--pretrain_args", "--num_train_epochs 30"]  # long enough to be stopped in between
ROW = ["sat", "--only", "standard/alf", "--smoke", *LONGER]


def reproduce(folder: Path, *flags: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "hf_robust.runs.reproduce", *ROW, "--output_dir", str(folder), *flags]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.timeout(600)
def test_a_row_is_run_killed_gone_on_with_and_collected(tmp_path):
    folder = tmp_path / "out"
    (row,) = choose_rows(load_table("sat"), ["standard/alf"])
    plan = Plan(output_dir=str(folder), smoke=True, pretrain_args=("--num_train_epochs", "30"))
    stages = unique_stages([row], plan)
    process = reproduce(folder, "--run")
    try:
        while latest_complete(stages[0].folder) is None:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        (training,) = children(process)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and not training.is_running()
    assert "stopped. What was finished is kept" in told
    assert not Path(stages[0].folder, "report.json").exists()  # ended, not waited for
    state = json.loads((folder / "state" / "encoders--standard_imagenet32.json").read_text())
    assert (state["status"], state["starts"]) == ("stopped", 1) and state["seconds"] > 0
    assert not is_finished(stages[0], plan) and collect_row(row, plan) is None

    process = reproduce(folder, "--run")
    told = process.communicate(timeout=500)[0]
    assert process.returncode == 0, told
    assert "--resume_from_checkpoint true" in told and "1 of 1 rows" in told
    state = json.loads((folder / "state" / "encoders--standard_imagenet32.json").read_text())
    assert (state["status"], state["starts"]) == ("finished", 2)
    report = json.loads(Path(stages[0].folder, "report.json").read_text())
    assert report["training"]["steps"] == 4 * 30 and all(is_finished(stage, plan) for stage in stages)
    found = collect_row(row, plan)
    assert found and found.smoke and found.n == 10 and found.gap == {} and found.epochs == 30
    assert {"accuracy", "pgd20_linf_8_255_accuracy"} <= set(found.metrics) and len(found.commands) == 3
    assert "not run" not in (folder / "sat.md").read_text() and len(json.loads((folder / "sat.json").read_text())) == 1
    assert run_rows([row], plan, Rate.assumed()) == {}  # and nothing more is to be done
