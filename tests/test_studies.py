"""The coreset study: its list of runs, its resume, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "studies"))
import coresets as study  # noqa: E402


def test_every_method_fraction_and_seed_is_on_the_list():
    names = [cell.name for cell in study.cells(3)]
    assert len(names) == len(set(names)) == 3 * (1 + 9 + 4 + 1 + 4)
    for seed in (1, 2, 3):
        assert f"acl-full-1-seed{seed}" in names and f"sat-rcs-0.1-seed{seed}" in names
        for fraction in ("0.05", "0.1", "0.2"):
            assert {f"acl-{m}-{fraction}-seed{seed}" for m in ("random_fixed", "random_refresh", "rcs")} <= set(names)


def test_methods_of_a_fraction_choose_equally_many_images_from_one_pool():
    for size in study.SIZES.values():
        images = size.images or 50000
        chosen = [study.Cell("acl", m, 0.1, 1).coreset(size) for m in ("random_fixed", "random_refresh", "rcs")]
        pools = [len(method.split(images, 1)[0]) for method in chosen]
        assert len(set(pools)) == 1
        assert len({method.budget(pool, size.batch_size) for method, pool in zip(chosen, pools, strict=True)}) == 1


def test_a_cell_of_a_living_process_is_left_alone(tmp_path):
    lock = tmp_path / "cell.lock"
    assert study._claim(lock)
    assert not study._claim(lock)
    lock.write_text("999999999")  # no such process
    assert study._claim(lock)


def test_run_goes_on_where_it_stopped_and_report_tells_what_was_found(tmp_path, capsys):
    flags = ["--size", "smoke", "--seeds", "1", "--dataset_name", "digits", "--output_dir", str(tmp_path)]
    study.main(["run", *flags, "--only", "sat-rcs"])
    (path,) = (tmp_path / "cells").glob("*.json")
    record = json.loads(path.read_text())
    assert record["method"] == "rcs" and record["objective"] == "sat"
    assert 0 < record["selection_cpu_seconds"] < record["cpu_seconds"]
    assert record["environment"] and record["size"]["epochs"] == 2
    written = path.stat().st_mtime_ns
    study.main(["run", *flags, "--only", "sat-rcs"])
    assert path.stat().st_mtime_ns == written
    capsys.readouterr()
    study.main(["report", "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"| SAT | rcs | 0.1 | 46 | 1 | {100 * record['standard_accuracy']:.1f} |" in text
    assert (tmp_path / "time_against_accuracy_sat.png").stat().st_size > 10_000


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no finished cell in .*start with `run`"):
        study.main(["report", "--output_dir", str(tmp_path)])
