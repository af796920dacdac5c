"""The published tables: figures as printed, from the leaderboard where it has them, rows by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_robust.evaluation.leaderboard import AUTOATTACK, closest_row
from hf_robust.reproduction.tables import DATA, choose_rows, load_dataset, load_network, load_table, table_names

PGD20 = "pgd20_linf_8_255_accuracy"
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def figures(table: str, row: str) -> list[tuple[str, float, float]]:
    (found,) = choose_rows(load_table(table), [row])
    return [(p.origin, *(round(100 * p.metrics[name], 2) for name in found.columns)) for p in found.published]


@pytest.mark.parametrize(
    ("table", "row", "expected"),
    [
        ("cifar10", "dynacl-air++/slf", [("leaderboard", 81.80, 46.99)]),
        ("cifar100", "dynacl++/alf", [("leaderboard", 49.92, 22.24)]),
        ("stl10", "acl/aff", [("leaderboard", 72.55, 43.21)]),
        (
            "transfer",
            "cifar10-cifar100/acl-air/slf",
            [("talk", 39.45, 11.04)],
        ),  # of the talk, by the leaderboard's file
        ("transfer", "cifar10-stl10/dynacl/slf", [("talk", 52.45, 28.52), ("leaderboard", 52.41, 29.17)]),
        ("transfer", "cifar100-stl10/dynacl-air/aff", [("talk", 58.59, 31.42), ("leaderboard", 58.59, 31.42)]),
        ("autolora", "cifar10-stl10/dynacl-air/slf", [("talk", 56.56, 30.48), ("leaderboard", 60.53, 29.75)]),
        ("imagenet32-cifar10", "acl-rcs-0.05/slf", [("talk", 70.02, 22.45)]),
        ("imagenet32-cifar100", "standard-cl/alf", [("talk", 9.32, 0.06)]),
        ("imagenet32-cifar10", "acl-entire/slf", []),
        ("sat", "random-0.2/alf", [("talk", 75.46, 39.62)]),
        ("sat", "rcs-0.2/aff", [("talk", 89.54, 58.13)]),
        ("rcs", "dynacl-rcs-0.05/aff", []),
    ],
)
def test_figures_as_printed(table, row, expected):
    assert figures(table, row) == expected


# Sums over the rows of the talk's tables, added up from another transcription: a slip in any figure moves one.
SUMS = {
    "transfer": {"slf": (794.72, 336.14), "alf": (761.70, 383.27), "aff": (1014.76, 538.92)},
    "autolora": {"slf": (210.00, 107.37), "alf": (212.28, 116.95), "aff": (245.62, 134.21)},
    "imagenet32-cifar10": {"slf": (223.13, 38.35), "alf": (133.51, 68.27), "aff": (256.61, 152.04)},
    "imagenet32-cifar100": {"slf": (136.15, 25.06), "alf": (70.91, 26.88), "aff": (181.21, 78.81)},
    "sat": {"alf": (559.93, 302.41), "aff": (699.45, 449.22)},
}


@pytest.mark.parametrize("table", SUMS)
def test_every_figure_of_the_talk(table):
    rows = load_table(table).rows
    for mode, sums in SUMS[table].items():
        metrics = [p.metrics for row in rows if row.mode == mode for p in row.published if p.origin == "talk"]
        found = tuple(round(100 * sum(values[name] for values in metrics), 2) for name in load_table(table).columns)
        assert found == sums, (table, mode)


def test_the_boards_are_read_and_not_copied():
    tables = {table["name"]: table for table in json.loads(DATA.read_text())["tables"]}
    for name in ("cifar10", "cifar100", "stl10"):
        assert all("talk" not in row for row in tables[name]["rows"])
        for row in load_table(name).rows:
            board = closest_row(row.method, row.mode, name, name)
            assert board and row.figures == {key: board.metrics[key] for key in row.columns}


def test_every_table_is_whole():
    sizes = {name: len(load_table(name).rows) for name in table_names()}
    assert sizes == {
        **{"cifar10": 18, "cifar100": 18, "stl10": 18, "transfer": 48, "autolora": 12, "rcs": 42},
        **{"imagenet32-cifar10": 12, "imagenet32-cifar100": 12, "sat": 16},
    }
    for name in table_names():
        table = load_table(name)
        assert len({row.name for row in table.rows}) == len(table.rows) and table.notes
        assert table.columns[0] == "accuracy" and table.columns[1] in (AUTOATTACK, PGD20)
        for row in table.rows:
            assert all(0 < value < 0.9 for p in row.published for value in p.metrics.values()), row.name
            assert all(set(p.metrics) == set(row.columns) for p in row.published)


def test_hours_of_the_pre_training_are_published_for_imagenet():
    hours = {row.method: row.published_hours for row in load_table("sat").rows}
    assert hours["SAT, RCS 0.2"] == 121.9 and hours["SAT, entire set"] == 341.7
    assert {row.published_hours for row in load_table("imagenet32-cifar10").rows} == {147.4, 650.2, 94.3, 111.8}


def test_networks_name_files_that_exist():
    networks = json.loads(DATA.read_text())["networks"]
    used = {row.network.name for name in table_names() for row in load_table(name).rows}
    assert set(networks) == used | {load_network(name).post_of for name in used} - {None}
    for name in networks:
        network = load_network(name)
        assert network.config is None or (CONFIGS / network.config).is_file(), network
        assert load_dataset(network.dataset).images, network


def test_rows_are_chosen_by_name_beginning_and_pattern():
    table = load_table("cifar10")
    names = [row.name for row in choose_rows(table, ["dynacl"])]
    assert names == ["dynacl/slf", "dynacl/alf", "dynacl/aff"]  # neither DynACL-AIR nor DynACL++
    assert [row.name for row in choose_rows(table, ["acl/aff", "ACL/slf"])] == ["acl/slf", "acl/aff"]
    assert len(choose_rows(table, ["*/slf"])) == 6 and choose_rows(table) == table.rows


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: load_table("cifar-10"),
            "unknown table 'cifar-10': did you mean 'cifar10'? known are cifar10, cifar100",
        ),
        (
            lambda: choose_rows(load_table("sat"), ["rcs-0.5/aff"]),
            "unknown row 'rcs-0.5/aff' of table sat: did you mean 'rcs-0.05/aff'? known are standard, ",
        ),
        (lambda: load_dataset("svhn"), "unknown data set 'svhn': known are cifar10, cifar100, stl10, imagenet32"),
    ],
)
def test_slips(ask, message):
    with pytest.raises(ValueError) as error:
        ask()
    assert message in str(error.value)
