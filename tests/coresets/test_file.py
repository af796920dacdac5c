"""Coresets that an earlier run has chosen."""

from __future__ import annotations

import dataclasses

import pytest
from selection_task import make_task
from test_base import CORESET
from training import tiny_images

from hf_robust.coresets import StoredCoreset
from hf_robust.coresets.phases import CoresetPhases
from hf_robust.objectives.acl import ACL


@pytest.fixture
def path(tmp_path) -> str:
    CORESET.save(tmp_path / "coreset-0020.json")
    return str(tmp_path / "coreset-0020.json")


def test_the_stored_images_are_used_from_the_end_of_the_warm_up_on(path):
    method = StoredCoreset(path, warmup_epochs=5)
    assert method.chooses and method.warmup_epochs == 5 and method.fraction == pytest.approx(4 / 12)
    assert method.budget(12, 4) == 4
    assert [method.due(epoch) for epoch in range(3)] == [True, False, False]
    assert method.select(make_task(ACL())).indices.tolist() == [0, 3, 4, 7]


def test_nothing_is_held_out(path):
    pool, validation = StoredCoreset(path).split(12, seed=0)
    assert pool.tolist() == list(range(12)) and len(validation) == 0


def test_it_trains_like_any_other_method(path):
    phases = CoresetPhases(StoredCoreset(path), tiny_images(12), 4, seed=0, epochs=10)
    assert phases.due(0)
    logs = phases.select(0, make_task(ACL()))
    assert phases.current.indices == CORESET.indices and logs["coreset_images"] == 4
    assert sorted(phases.sampler) == CORESET.indices and not any(phases.due(round) for round in range(1, 10))


def test_a_file_with_every_image_chooses_nothing(tmp_path):
    everything = dataclasses.replace(CORESET, indices=list(range(12)))
    everything.save(tmp_path / "all.json")
    assert not StoredCoreset(str(tmp_path / "all.json")).chooses


def test_a_data_set_of_another_size_is_refused(path):
    StoredCoreset(path).check(ACL(), None, tiny_images(12))
    with pytest.raises(ValueError, match="chosen from 12 images of 'tiny', and the training set has 13"):
        StoredCoreset(path).check(ACL(), None, tiny_images(13))


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path):
    (tmp_path / "broken.json").write_text('{"indices": [1, 1]}')
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ValueError, match=name):
            StoredCoreset(str(tmp_path / name))


@pytest.mark.parametrize("epochs", [-1, float("nan"), float("inf")])
def test_a_warm_up_outside_its_range_is_refused(path, epochs):
    with pytest.raises(ValueError, match="warmup_epochs must be 0 or more"):
        StoredCoreset(path, warmup_epochs=epochs)
