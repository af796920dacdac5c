"""The record of a coreset and its file, the split, budgets and schedules, and finding a method by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from selection_task import make_task

from hf_robust.coresets import (
    RCS,
    ChosenCoreset,
    Coreset,
    CoresetMethod,
    FullData,
    RandomCoreset,
    StoredCoreset,
    coreset_names,
    load_coreset_method,
)
from hf_robust.objectives.acl import ACL

CORESET = Coreset(
    indices=[0, 3, 4, 7],
    method="RCS(fraction=0.4)",
    dataset="tiny",
    dataset_size=12,
    pool_size=10,
    fraction=0.4,
    effective_fraction=0.4,
    epoch=20.0,
    round=31,
    seconds=1.5,
    gains=[0.25, -0.125],
)


def written(folder, **changes):
    """A coreset file with some entries changed; `None` removes one."""
    entries = {**dataclasses.asdict(CORESET), **changes}
    path = folder / "coreset-0020.json"
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    return path


# ---------------------------------------------------------------------- files
def test_a_saved_coreset_comes_back(tmp_path):
    CORESET.save(tmp_path / "coreset.json")
    assert Coreset.load(tmp_path / "coreset.json") == CORESET
    assert json.loads((tmp_path / "coreset.json").read_text())["indices"] == [0, 3, 4, 7]


def test_entries_of_later_versions_are_no_obstacle(tmp_path):
    assert Coreset.load(written(tmp_path, host="elsewhere")) == CORESET
    assert Coreset.load(written(tmp_path, gains=None)).gains == []


@pytest.mark.parametrize(
    "changes",
    [
        {"indices": [0, 3, 3, 7]},
        {"indices": [3, 0]},
        {"indices": []},
        {"indices": [-1, 2]},
        {"indices": [0, 12]},
        {"indices": [0.0, 3.0]},
        {"indices": [0.5]},
        {"indices": [False, True]},
        {"indices": ["0", "3"]},
        {"indices": [[0], [3]]},
        {"indices": "0347"},
        {"indices": 3},
        {"indices": {"0": 1}},
        {"indices": [float("nan")]},
        {"indices": [0, float("inf")]},
        {"indices": None},
        {"dataset_size": None},
        {"dataset_size": "12"},
        {"method": None},
    ],
    ids=str,
)
def test_a_damaged_entry_is_refused_with_the_name_of_the_file(changes, tmp_path):
    with pytest.raises(ValueError, match=r"coreset-0020.json' is no coreset file .*that a selection wrote"):
        Coreset.load(written(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"', "null", "[1, 2, 3]", "{}", "\x00", '{"indices": [1'])
def test_a_damaged_file_is_refused_with_its_name(text, tmp_path):
    path = tmp_path / "coreset-0007.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="coreset-0007.json"):
        Coreset.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "coreset.json"
    path.write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(ValueError, match="coreset.json"):
        Coreset.load(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json.*No such file"):
        Coreset.load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="cannot read the coreset"):
        Coreset.load(tmp_path)


def test_overlap_is_the_share_of_the_images():
    other = dataclasses.replace(CORESET, indices=[3, 7])
    assert CORESET.overlap(CORESET) == 1 and CORESET.overlap(other) == 0.5 and other.overlap(CORESET) == 1
    assert CORESET.overlap(dataclasses.replace(CORESET, indices=[1, 2])) == 0


# ---------------------------------------------------------------------- the split
@pytest.mark.parametrize(
    "images, fraction, pool",
    [
        (500, 0.01, 495),
        (50_000, 0.01, 49_500),  # CIFAR
        (100_000, 0.01, 99_000),  # STL-10
        (1_281_167, 0.005, 1_274_761),  # ImageNet: 6,406 validation images
        (150, 0.01, 148),  # the pool is rounded down
        (40, 0.3, 28),
        (10, 0.0, 10),
    ],
)
def test_sizes_of_the_split(images, fraction, pool):
    kept, out = RandomCoreset(validation_fraction=fraction).split(images, seed=0)
    assert (len(kept), len(out)) == (pool, images - pool)


def test_the_split_is_disjoint_complete_and_a_function_of_the_seed():
    method = RCS(validation_fraction=0.2)
    torch.manual_seed(0)
    pool, out = method.split(50, seed=4)
    assert sorted([*pool.tolist(), *out.tolist()]) == list(range(50))
    assert pool.tolist() == sorted(pool.tolist()) and out.tolist() == sorted(out.tolist())
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = method.split(50, seed=4)
    assert torch.equal(again[0], pool) and torch.equal(again[1], out)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    others = {tuple(method.split(50, seed=s)[1].tolist()) for s in range(20)}
    assert len(others) == 20
    assert len({k for split in others for k in split}) > 40  # any image may be held out


# ---------------------------------------------------------------------- budgets and schedules
@pytest.mark.parametrize("fraction, images", [(0.05, 2475), (0.1, 4950), (0.2, 9900), (1.0, 49_500)])
def test_the_budget_is_the_fraction_asked_for(fraction, images):
    for method in (RandomCoreset(fraction=fraction), RCS(fraction=fraction)):
        assert method.budget(49_500, 512) == images


def test_the_budget_is_rounded_to_the_nearest_image_and_never_empty():
    assert RandomCoreset(fraction=0.26).budget(10, 4) == 3
    assert RandomCoreset(fraction=0.24).budget(10, 4) == 2
    assert RandomCoreset(fraction=0.01).budget(10, 4) == 1


def test_a_selection_is_due_every_interval():
    due = [epoch for epoch in range(100) if RandomCoreset(interval=20).due(epoch)]
    assert due == [0, 20, 40, 60, 80]
    assert all(RandomCoreset(interval=1).due(epoch) for epoch in range(5))


@pytest.mark.parametrize(
    "field, value",
    [
        ("fraction", 0),
        ("fraction", -0.1),
        ("fraction", 1.5),
        ("fraction", float("nan")),
        ("warmup_epochs", -1),
        ("warmup_epochs", float("inf")),
        ("warmup_epochs", float("nan")),
        ("interval", 0),
        ("interval", -5),
        ("interval", 1.5),
        ("interval", float("nan")),
        ("interval", float("inf")),
        ("validation_fraction", -0.01),
        ("validation_fraction", 1),
        ("validation_fraction", float("nan")),
    ],
)
@pytest.mark.parametrize("method", [ChosenCoreset, RandomCoreset])
def test_values_outside_their_range_are_refused_by_name(method, field, value):
    with pytest.raises(ValueError, match=field):
        method(**{field: value})


def test_values_at_the_ends_of_their_range_are_taken():
    method = RandomCoreset(fraction=1, warmup_epochs=0, interval=1, validation_fraction=0)
    assert not method.chooses
    assert RandomCoreset(fraction=0.999).chooses and RandomCoreset(fraction=1, validation_fraction=0.1).chooses


def test_every_field_of_a_method_is_a_flag_with_help():
    for name in coreset_names():
        for field in dataclasses.fields(load_coreset_method(name)):
            if field.name != "path":  # of a stored coreset: written behind the name
                assert field.metadata.get("help", "").endswith("."), (name, field.name)


# ---------------------------------------------------------------------- names
def test_methods_are_found_by_the_names_of_their_files():
    assert coreset_names() == ["file", "full", "random", "rcs"]
    found = {name: load_coreset_method(name) for name in coreset_names()}
    assert found == {"file": StoredCoreset, "full": FullData, "random": RandomCoreset, "rcs": RCS}
    assert load_coreset_method("RCS") is RCS
    assert all(issubclass(method, CoresetMethod) for method in found.values())


@pytest.mark.parametrize("name, hint", [("rsc", "did you mean 'rcs'"), ("base", "known are file, full, random, rcs")])
def test_an_unknown_name_is_refused_with_the_known_ones(name, hint):
    with pytest.raises(ValueError, match=hint):
        load_coreset_method(name)


# ---------------------------------------------------------------------- full data
def test_full_data_leaves_nothing_out():
    method, task = FullData(), make_task(ACL())
    assert not method.chooses and method.budget(26, 4) == 26 and method.warmup_epochs == 0
    assert [len(part) for part in method.split(26, seed=0)] == [26, 0]
    assert method.split(26, seed=0)[0].tolist() == list(range(26))
    assert [method.due(epoch) for epoch in range(3)] == [True, False, False]
    assert method.select(task).indices.tolist() == task.pool.tolist() and method.select(task).gains == []
    method.check(ACL(), task.model, task.dataset)


def test_the_base_class_has_no_search_of_its_own():
    with pytest.raises(NotImplementedError):
        CoresetMethod().select(make_task(ACL()))
