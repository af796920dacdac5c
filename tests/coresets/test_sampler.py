"""Rounds of constant length, the time they stand for, and the images they show."""

from __future__ import annotations

import math

import pytest
import torch

from hf_robust.coresets.sampler import CoresetSampler, Rounds
from hf_robust.data import epoch_order

SETTINGS = [
    Rounds(pool=100, length=20, warmup_epochs=3.0),
    Rounds(pool=97, length=13, warmup_epochs=4.0),  # full passes end within rounds
    Rounds(pool=49_500, length=2475, warmup_epochs=100.0),  # CIFAR, 5 %
    Rounds(pool=99_000, length=19_800, warmup_epochs=100.0),  # STL-10, 20 %
    Rounds(pool=50, length=10, warmup_epochs=0.5),
    Rounds(pool=30, length=12, warmup_epochs=0.0),
    Rounds(pool=40, length=40, warmup_epochs=2.0),
]


def shown(sampler: CoresetSampler, round: int) -> list[int]:
    sampler.set_epoch(round)
    return list(sampler)


# ---------------------------------------------------------------------- time
def test_known_points_of_the_published_schedule():
    clock = Rounds(pool=49_500, length=2475, warmup_epochs=100)  # 100 epochs in full are 2,000 rounds of 5 %
    assert clock.warmup == 2000
    assert clock.epoch(0) == 0 and clock.epoch(20) == 1 and clock.epoch(1000) == 50
    assert clock.epoch(2000) == 100 and clock.epoch(2001) == 101 and clock.epoch(2900) == 1000
    assert clock.epoch(2000.5) == 100.5
    assert clock.rounds(1000) == 2900 and clock.rounds(100) == 2000 and clock.rounds(1) == 20


def test_the_warm_up_is_as_many_rounds_as_its_passes_fill():
    assert Rounds(100, 20, 3).warmup == 15
    assert Rounds(97, 13, 4).warmup == 30  # 388 images in 29.8 rounds
    assert Rounds(100, 20, 0).warmup == 0 and Rounds(100, 100, 7).warmup == 7
    assert Rounds(10, 3, 0.3).warmup == 1  # 3 images: one round, whatever the rounding of 0.3 * 10 / 3


@pytest.mark.parametrize("clock", SETTINGS)
def test_epochs_and_rounds_are_inverse_and_rising(clock):
    end = clock.warmup + 50
    grid = [end * k / 997 for k in range(998)]
    for value in grid:
        assert clock.rounds(clock.epoch(value)) == pytest.approx(value)
        assert clock.epoch(clock.rounds(value)) == pytest.approx(value)
    epochs = [clock.epoch(value) for value in grid]
    assert epochs[0] == 0 and all(b > a for a, b in zip(epochs, epochs[1:], strict=False))
    assert clock.epoch(clock.warmup) == clock.warmup_epochs
    if clock.warmup:
        assert clock.epoch(clock.warmup - 1e-9) == pytest.approx(clock.warmup_epochs)  # no jump


# ---------------------------------------------------------------------- images
@pytest.mark.parametrize("clock", [s for s in SETTINGS if s.warmup and s.pool <= 100])
def test_the_rounds_of_the_warm_up_tile_full_passes(clock):
    pool = torch.arange(clock.pool) * 3 + 1
    sampler = CoresetSampler(pool, clock, seed=2)
    rounds = [shown(sampler, round) for round in range(clock.warmup)]
    assert all(len(r) == clock.length == len(sampler) for r in rounds)
    row = [k for r in rounds for k in r]
    passes = [row[k : k + clock.pool] for k in range(0, len(row), clock.pool)]
    for whole in passes[: math.floor(clock.warmup_epochs)]:
        assert sorted(whole) == pool.tolist()  # every image once in every pass
    assert all(len(set(part)) == len(part) for part in passes)
    assert len(passes) < 2 or passes[0] != passes[1][: len(passes[0])]


def test_after_the_warm_up_every_round_is_a_shuffled_coreset():
    sampler = CoresetSampler(torch.arange(30), Rounds(30, 12, 2.0), seed=1)
    sampler.indices = torch.arange(30)[3:15] * 2 - 5
    rounds = [shown(sampler, round) for round in range(5, 9)]
    assert all(sorted(r) == sampler.indices.tolist() for r in rounds)
    assert len({tuple(r) for r in rounds}) == 4
    assert all(type(k) is int for k in rounds[0])


def test_the_order_is_a_function_of_seed_round_and_coreset():
    def order(seed: int, round: int) -> list[int]:
        sampler = CoresetSampler(torch.arange(30), Rounds(30, 12, 2.0), seed)
        sampler.indices = torch.arange(0, 24, 2)
        return shown(sampler, round)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = {(seed, round): order(seed, round) for seed in (0, 1) for round in (0, 4, 5, 6)}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(order(*key) == found for key, found in first.items())
    assert len({tuple(found) for found in first.values()}) == len(first)


@pytest.mark.parametrize("warmup", [0.0, 3.0])
def test_everything_in_every_round_is_the_order_of_plain_epochs(warmup):
    sampler = CoresetSampler(torch.arange(37), Rounds(37, 37, warmup), seed=5)
    sampler.indices = torch.arange(37)
    for epoch in range(6):
        assert shown(sampler, epoch) == epoch_order(37, 5, epoch).tolist()


def test_a_round_without_its_coreset_is_an_error():
    sampler = CoresetSampler(torch.arange(30), Rounds(30, 12, 2.0))
    assert len(shown(sampler, 4)) == 12
    with pytest.raises(RuntimeError, match="round 5 needs a coreset"):
        shown(sampler, 5)
