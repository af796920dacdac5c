"""The study of all pre-training methods in equal time: its list, its budget, its table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parent.parent / "examples" / "studies"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_of_methods", STUDIES / "methods.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    sys.path.insert(0, str(STUDIES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(STUDIES))
    return module


def record(folder, name, **values):
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "cells" / f"{name}.json").write_text(json.dumps({"name": name, **values}))


def test_every_seed_has_every_method_and_teachers_come_first(study):
    names = [cell.name for cell in study.cells(2)]
    assert len(names) == len(set(names)) == 2 * len(study.METHODS)
    for cell in study.cells(2):
        if cell.needs:
            assert names.index(cell.needs) < names.index(cell.name)
    methods = {type(m.objective(study.SIZES["smoke"])).__name__ for m in study.METHODS.values()}
    assert methods == {"SimCLR", "ACL", "DynACL", "AIR", "RoCL", "AdvCL", "AInfoNCE", "DeACL", "FARE"}


def test_an_encoder_is_paid_for_unless_it_is_given(study, tmp_path):
    record(tmp_path, "teacher-seed1", cpu_seconds=100.0)
    record(tmp_path, "simclr-seed1", cpu_seconds=200.0)
    shared = study.Study(study.SIZES["smoke"], tmp_path, 360.0, None, None, None)
    paid = {name: shared.paid(study.Cell(name, 1)) for name in ("acl", "deacl", "fare", "advcl", "deacl_given")}
    assert paid == {"acl": 0.0, "deacl": 100.0, "fare": 100.0, "advcl": 100.0, "deacl_given": 0.0}


def test_the_steps_are_those_that_fit(study, tmp_path, monkeypatch):
    """The first quarter of the timed steps does not count; a step of 2 seconds fits 50 times into 100."""

    class Trainer:
        def add_callback(self, clock):
            self.clock = clock

        def train(self):
            self.clock.times = [9.0, 11.0, 13.0, 15.0]

    monkeypatch.setattr(study, "build", lambda *args: Trainer())
    shared = study.Study(study.SIZES["smoke"], tmp_path, 100.0, None, None, None)
    cell = study.Cell("acl", 1)
    assert study.steps_within(cell, shared, None, 100.0, tmp_path) == 50
    assert study.steps_within(cell, shared, None, 1.0, tmp_path) == 4  # never nothing


def test_a_student_goes_through_after_its_teacher_and_once(study, tmp_path, capsys):
    common = ["--dataset_name", "digits", "--size", "smoke", "--minutes", "0.01", "--seeds", "1"]
    common += ["--output_dir", str(tmp_path)]
    study.main(["run", *common, "--only", "deacl-seed1"])
    assert "deacl-seed1 waits for teacher-seed1" in capsys.readouterr().out
    study.main(["run", *common, "--only", "teacher"])
    study.main(["run", *common, "--only", "deacl-seed1"])
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")}
    teacher, student = found["teacher-seed1"], found["deacl-seed1"]
    assert student["paid_seconds"] >= teacher["cpu_seconds"] > 0 == teacher["paid_seconds"]
    assert student["budget_seconds"] == pytest.approx(0.6) and student["n_eval"] == 16
    assert (tmp_path / "encoders" / "deacl-seed1" / "model.safetensors").is_file()
    assert str(tmp_path) not in json.dumps(found)
    assert all(0 <= student[f"{mode}_standard_accuracy"] <= 1 for mode in ("slf", "alf"))
    before = (tmp_path / "cells" / "deacl-seed1.json").stat().st_mtime_ns
    study.main(["run", *common, "--only", "deacl-seed1"])
    assert (tmp_path / "cells" / "deacl-seed1.json").stat().st_mtime_ns == before
    study.main(["report", "--output_dir", str(tmp_path)])
    assert "| `deacl` DeACL | 1 |" in capsys.readouterr().out
    assert (tmp_path / "methods.png").stat().st_size > 10_000 and "DeACL" in (tmp_path / "table.md").read_text()


def test_the_table_puts_the_published_ranking_beside_ours(study, tmp_path):
    robust = "pgd20_linf_8_255_accuracy"
    for name, seed, accuracy in (("acl", 1, 0.2), ("acl", 2, 0.3), ("dynacl", 1, 0.1), ("simclr", 1, 0.0)):
        accuracies = {f"{m}_{key}": accuracy for m in ("slf", "alf") for key in ("standard_accuracy", robust)}
        times = {"epochs": 3.0, "cpu_seconds": 300.0, "paid_seconds": 60.0}
        record(tmp_path, f"{name}-seed{seed}", method=name, seed=seed, title=name.upper(), **accuracies, **times)
    rows = {line.split("`")[1]: line for line in study.table(study.load_groups(tmp_path))[2:]}
    assert "| 25.0 ± 7.1 |" in rows["acl"] and rows["acl"].endswith("| 360 ± 0 | 60 ± 0 | 1 | 39.17 (2) |")
    assert rows["dynacl"].endswith("| 2 | 45.09 (1) |") and rows["simclr"].endswith("| 60 |  |  |")


def test_ranks(study):
    assert study.ranks({"a": 0.1, "b": 0.3, "c": 0.2}) == {"b": 1, "c": 2, "a": 3}
