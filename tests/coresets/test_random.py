"""Random subsets: one for the whole training, or a new one at every selection."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from selection_task import CPU, make_task

from hf_robust.coresets import RandomCoreset, SelectionTask
from hf_robust.coresets.phases import seeded_generator
from hf_robust.objectives.acl import ACL

FIXED, REFRESHED = RandomCoreset(fraction=0.3, refresh=False), RandomCoreset(fraction=0.3, refresh=True)


TASK = make_task(ACL(), images=70, held_out=10, budget=18)


def at(selection: int, seed: int = 3) -> SelectionTask:
    """The task of the n-th selection of a run."""

    def generator(name: str) -> torch.Generator:
        return seeded_generator(CPU, seed, "coreset", selection, name)

    return dataclasses.replace(TASK, seed=seed, generator=generator)


def drawn(method: RandomCoreset, task: SelectionTask) -> list[int]:
    return method.select(task).indices.tolist()


@pytest.mark.parametrize("method", [FIXED, REFRESHED])
def test_distinct_images_of_the_pool(method):
    task = at(0)
    task = dataclasses.replace(task, pool=task.pool + 10, validation=torch.arange(10))
    found = method.select(task)
    assert found.indices.shape == (18,) and len(found.indices.unique()) == 18 and found.gains == []
    assert set(found.indices.tolist()) <= set(range(10, 70))


def test_the_fixed_subset_is_drawn_once():
    assert [FIXED.due(epoch) for epoch in range(0, 41)] == [True, *[False] * 40]
    assert drawn(FIXED, at(0)) == drawn(FIXED, at(20)) == drawn(FIXED, at(40))
    assert drawn(FIXED, at(0)) != drawn(FIXED, at(0, seed=4))


def test_the_refreshed_subset_is_another_one_at_every_selection():
    assert [epoch for epoch in range(50) if REFRESHED.due(epoch)] == [0, 20, 40]
    subsets = [drawn(REFRESHED, at(round)) for round in range(0, 400, 20)]
    assert len({tuple(sorted(s)) for s in subsets}) == 20
    assert set().union(*subsets) == set(range(60))  # in the course of the training all are seen
    assert drawn(REFRESHED, at(20)) == subsets[1]
    assert drawn(REFRESHED, at(20, seed=4)) != subsets[1]


@pytest.mark.parametrize("method", [FIXED, REFRESHED])
def test_every_image_is_as_likely(method):
    counts = torch.zeros(60)
    for seed in range(300):
        counts[drawn(method, at(0, seed=seed))] += 1
    # 300 draws of 18 of 60: 90 each, with a standard deviation of 8
    assert counts.sum() == 300 * 18 and 50 < counts.min() and counts.max() < 130


@pytest.mark.parametrize("method", [FIXED, REFRESHED])
def test_the_global_random_state_is_neither_read_nor_moved(method):
    torch.manual_seed(0)
    task, other = at(0), at(0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(method, task)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert drawn(method, other) == first


def test_the_network_plays_no_part():
    method = RandomCoreset(fraction=0.3)
    method.check(None, None, None)
    task = dataclasses.replace(at(0), model=None, objective=None, views=None)
    assert len(method.select(task).indices) == 18
