"""The published table: figures as printed, placeholders left out, and the row of the same method or none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import hf_robust
from hf_robust.evaluation.leaderboard import (
    AUTOATTACK,
    MODES,
    TABLE,
    LeaderboardRow,
    _all_rows,
    closest_method,
    closest_row,
    leaderboard_dataset,
    leaderboard_methods,
    leaderboard_rows,
    leaderboard_sources,
)
from hf_robust.presets import METHODS

PROJECT = Path(hf_robust.__file__).parent.parent


def cell(method: str, mode: str, source: str, target: str, fine_tuning: str = "vanilla") -> tuple[float | None, ...]:
    """AutoAttack, corruptions and standard accuracy in percent."""
    (row,) = leaderboard_rows(method, source, target, mode=mode, fine_tuning=fine_tuning)
    names = (AUTOATTACK, f"{row.target}c_mean_accuracy", "accuracy")
    return tuple(None if name not in row.metrics else round(100 * row.metrics[name], 2) for name in names)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("DynACL-AIR++", "slf", "cifar10", "cifar10"), (46.99, 72.11, 81.80)),
        (("DynACL", "alf", "cifar10", "cifar10"), (45.67, 66.69, 72.97)),
        (("DynACL-RCS", "aff", "cifar10", "cifar10"), (49.63, 72.39, 80.70)),
        (("RoCL", "aff", "cifar10", "cifar10"), (45.02, None, 78.51)),
        (("TARO", "slf", "cifar10", "cifar10"), (35.81, None, 78.45)),
        (("ACL", "slf", "cifar100", "cifar100"), (17.30, 38.59, 45.82)),
        (("A-InfoNCE", "alf", "cifar100", "cifar100"), (19.53, 43.58, 44.78)),
        (("DynACL++", "aff", "stl10", "stl10"), (41.84, None, 72.36)),
        (("DeACL", "slf", "cifar10", "stl10"), (11.04, None, 38.49)),
        (("DeACL", "slf", "cifar10", "stl10", "autolora"), (27.40, None, 63.92)),
        (("AdvCL", "aff", "cifar100", "stl10", "autolora"), (32.51, None, 60.91)),
        (("ACL-AIR", "alf", "cifar10", "cifar100"), (13.30, None, 36.10)),
        (("DynACL", "aff", "cifar100", "cifar10"), (47.40, None, 77.92)),
    ],
)
def test_the_figures_are_those_that_were_published(where, expected):
    assert cell(*where) == expected


def test_every_figure_is_the_published_one_as_far_as_sums_tell():
    """AutoAttack, corruptions and standard accuracy, added up over each board as it was printed."""
    sums = {}
    for row in _all_rows():
        total = sums.setdefault((row.source, row.target, row.fine_tuning, row.origin), [0.0, 0.0, 0.0])
        for k, name in enumerate((AUTOATTACK, f"{row.target}c_mean_accuracy", "accuracy")):
            total[k] += 100 * row.metrics.get(name, 0.0)
    assert {board: tuple(round(value, 2) for value in total) for board, total in sums.items()} == {
        ("cifar10", "cifar10", "vanilla", "website"): (1382.51, 1929.61, 2459.36),
        ("cifar100", "cifar100", "vanilla", "website"): (531.1, 998.2, 1246.09),
        ("stl10", "stl10", "vanilla", "website"): (836.67, 0, 1350.12),
        ("cifar10", "stl10", "vanilla", "website"): (596.43, 0, 1203.19),
        ("cifar10", "stl10", "autolora", "website"): (646.27, 0, 1226.89),
        ("cifar100", "stl10", "vanilla", "website"): (452.0, 0, 931.31),
        ("cifar100", "stl10", "autolora", "website"): (465.49, 0, 965.83),
        ("cifar10", "cifar100", "vanilla", "talk"): (188.35, 0, 473.54),
        ("cifar10", "stl10", "vanilla", "talk"): (92.32, 0, 186.52),
        ("cifar100", "cifar10", "vanilla", "talk"): (386.52, 0, 782.84),
        ("cifar100", "stl10", "vanilla", "talk"): (79.39, 0, 163.21),
    }


def test_no_cell_of_a_board_is_missing_or_doubled():
    counted = {}
    for row in _all_rows():
        counted[(row.source, row.target, row.fine_tuning)] = (
            counted.get((row.source, row.target, row.fine_tuning), 0) + 1
        )
    assert counted == {
        ("cifar10", "cifar10", "vanilla"): 31,  # eleven methods, one of them (TARO) with SLF only
        ("cifar100", "cifar100", "vanilla"): 25,
        ("stl10", "stl10", "vanilla"): 19,
        ("cifar10", "stl10", "vanilla"): 24,  # seven methods of the page, ACL-AIR of the talk
        ("cifar10", "stl10", "autolora"): 21,
        ("cifar100", "stl10", "vanilla"): 21,
        ("cifar100", "stl10", "autolora"): 18,
        ("cifar10", "cifar100", "vanilla"): 12,
        ("cifar100", "cifar10", "vanilla"): 12,
    }
    places = [(row.method, row.mode, row.source, row.target, row.fine_tuning) for row in _all_rows()]
    assert len(places) == len(set(places))
    for row in _all_rows():
        assert {"accuracy", AUTOATTACK} >= set(row.metrics) - {f"{row.target}c_mean_accuracy"}
        assert all(0.05 < value < 0.9 for value in row.metrics.values()), row
        assert row.metrics.get("accuracy", 1.0) > row.metrics[AUTOATTACK], row


def test_placeholders_of_the_page_are_left_out():
    copied = {"accuracy": 0.8065, AUTOATTACK: 0.3792}
    assert not [row for row in _all_rows() if row.metrics.items() >= copied.items()]
    with pytest.raises(ValueError, match="no autolora results from 'cifar10' to 'cifar10': known are cifar10->stl10"):
        leaderboard_rows(fine_tuning="autolora")
    (row,) = leaderboard_rows("DynACL-RCS", "cifar10", "stl10", mode="aff", fine_tuning="autolora")
    assert dict(row.metrics) == {AUTOATTACK: 0.3257} and "60.22" in row.note


def test_notes_say_what_a_comparison_must_know():
    notes = {(row.method, row.mode, row.target): row.note for row in leaderboard_rows()}
    assert "ImageNet" in notes["AdvCL", "slf", "cifar10"]
    assert "46.14 / 80.82" in notes["DeACL", "slf", "cifar10"] and "50.75" not in notes["DeACL", "slf", "cifar10"]
    assert "100 epochs" in notes["ACL", "aff", "cifar10"] and notes["ACL", "slf", "cifar10"] == ""
    assert "unverified" in leaderboard_rows("RoCL", "stl10", "stl10")[0].note
    assert notes["DynACL", "slf", "cifar10"] == ""


def test_rows_come_by_mode_and_in_the_order_of_the_page():
    rows = leaderboard_rows()
    assert [row.mode for row in rows] == sorted((row.mode for row in rows), key=MODES.index)
    slf = [row.metrics[AUTOATTACK] for row in leaderboard_rows(mode="SLF")]
    assert slf == sorted(slf, reverse=True) and len(slf) == 11
    assert {row.origin for row in leaderboard_rows(source="cifar10", target="cifar100")} == {"talk"}
    assert leaderboard_rows("TARO", mode="aff") == []


def test_a_caller_cannot_change_the_table():
    (row,) = leaderboard_rows("DynACL", mode="slf")
    with pytest.raises(TypeError):
        row.metrics["accuracy"] = 1.0  # type: ignore[index]
    values = row.to_dict()
    values["metrics"]["accuracy"] = 1.0
    leaderboard_sources()["website"]["title"] = "changed"
    assert leaderboard_rows("DynACL", mode="slf")[0].metrics["accuracy"] == 0.7541
    assert values["origin_title"] == "RobustSSL leaderboard" == leaderboard_sources()["website"]["title"]
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("DynACL", "DynACL"),
        ("dynacl_air++", "DynACL-AIR++"),
        ("AIR-DynACL", "DynACL-AIR"),
        ("ainfonce", "A-InfoNCE"),
        ("DynACLRCS", "DynACL-RCS"),
        ("DynACL-AIRR", "DynACL-AIR"),
        ("ACL-AIR", "ACL-AIR"),
        ("ACL-RCS", None),
        ("ACL++", None),
        ("ACL-AIR++", None),
        ("DynACL-AIR-RCS", None),
        ("SimCLR", None),
        ("AdvCLIP", None),
        ("FACL", None),
        ("DynACL2", None),
        ("AdvACL", None),
        ("FARE", None),
        ("", None),
    ],
)
def test_a_name_is_read_in_any_spelling_but_never_as_another_method(name, method):
    assert closest_method(name) == method


def test_the_presets_name_the_same_methods():
    assert set(METHODS) <= set(leaderboard_methods())
    assert all(closest_method(method) == method for method in leaderboard_methods())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("uoft-cs/cifar10", "cifar10"),
        ("CIFAR-100", "cifar100"),
        ("/data/cifar10-jpeg/", "cifar10"),
        ("STL10", "stl10"),
        ("stl10-32", "stl10"),
        ("cifar10-c", "cifar10-c"),
        ("randall-lab/cifar10_corrupted", "randall-lab/cifar10_corrupted"),
        ("mnist", "mnist"),
        ("32", "32"),
    ],
)
def test_a_data_set_is_read_from_its_id_or_folder(name, known):
    assert leaderboard_dataset(name) == known


def test_the_row_beside_ours_is_of_the_same_method_mode_and_data_or_none():
    row = closest_row("dynacl", "SLF", "uoft-cs/cifar10", "uoft-cs/cifar10")
    assert isinstance(row, LeaderboardRow) and (row.method, row.mode, row.target) == ("DynACL", "slf", "cifar10")
    assert row.image_size == 32 and closest_row("dynacl", "slf", "stl10", "stl10").image_size == 96
    assert closest_row("SimCLR", "slf") is None
    assert closest_row("DynACL", "slf", "mnist", "mnist") is None
    assert closest_row("DynACL", "lp_aff") is None
    assert closest_row("DynACL-AIR++", "slf", "cifar10", "stl10") is None  # a known method, not on that board
    assert closest_row("DynACL", "aff", "cifar10", "stl10", "autolora").metrics[AUTOATTACK] == 0.3551


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "DynACL+++"}, None),
        ({"method": "DynAFL"}, r"no method 'DynAFL': did you mean 'DynACL'\? known are DynACL-AIR\+\+"),
        ({"mode": "sfl"}, r"no mode 'sfl': did you mean 'slf'\? known are slf, alf, aff"),
        ({"fine_tuning": "lora"}, r"no fine_tuning 'lora': did you mean 'autolora'\?"),
        ({"target": "mnist"}, r"no vanilla results from 'cifar10' to 'mnist': known are cifar10->cifar10"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, message):
    if message is None:
        assert [row.method for row in leaderboard_rows(**arguments)] == ["DynACL++"] * 3
        return
    with pytest.raises(ValueError, match=message):
        leaderboard_rows(**arguments)


def test_the_table_travels_with_the_package():
    listed = re.search(r"hf_robust = \[(.*)\]", (PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    assert listed and f'"{TABLE.relative_to(PROJECT / "hf_robust").as_posix()}"' in listed[1]
    origins = leaderboard_sources()
    assert {row.origin for row in _all_rows()} == set(origins) and "@7a45d66" in origins["website"]["source"]
