"""Predicted hours: arithmetic of the networks counted again, passes by hand, rates as given."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_robust.models.backbones import create_backbone
from hf_robust.reproduction.hours import (
    NETWORKS,
    Rate,
    Work,
    evaluation_passes,
    finetuning_passes,
    pretraining_passes,
)

ACL = {"objective": "acl", "steps": 5, "num_train_epochs": 1000, "per_device_train_batch_size": 512}
RCS = {"coreset": "rcs", "coreset_fraction": 0.2, "coreset_warmup_epochs": 100, "coreset_interval": 20}


@pytest.mark.parametrize(("architecture", "size"), list(NETWORKS))
def test_a_forward_pass_is_counted(architecture, size):
    with torch.device("meta"):
        network = create_backbone(architecture, image_size=size).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() == pytest.approx(NETWORKS[architecture, size], rel=1e-3)


# What a step is worth by the tests of `tests/test_step_counts.py`, per view or image.
@pytest.mark.parametrize(
    ("settings", "views", "passes"),
    [
        ({"objective": "acl"}, 2, 16),
        ({}, 2, 16),
        ({"objective": "air"}, 2, 17.5),
        ({"objective": "dynacl"}, 2, 16),
        ({"objective": "dynacl", "ema_decay": 0.99}, 2, 14),
        ({"objective": "simclr"}, 2, 3),
        ({"objective": "sat"}, 1, 13),
        ({"objective": "sat", "steps": 0}, 1, 3),
        ({"objective": "acl", "steps": "3"}, 2, 12),
    ],
)
def test_steps_of_pre_training(settings, views, passes):
    assert pretraining_passes({"num_train_epochs": 3, **settings}, 100) == pytest.approx(3 * 100 * views * passes)


def test_coresets_by_hand():
    pool, epoch = 50_000 * 0.99, 50_000 * 0.99 * 2 * 16
    random = pretraining_passes({**ACL, **RCS, "coreset": "random", "coreset_validation_fraction": 0.01}, 50_000)
    assert random == pytest.approx((100 + 0.2 * 900) * epoch)
    selection = 12 / 16 * epoch + pool * 0.2 / 512 * 500 * 7
    assert pretraining_passes({**ACL, **RCS}, 50_000) == pytest.approx(random + 45 * selection)
    cheap = pretraining_passes({**ACL, **RCS, "coreset_attack_steps": 1}, 50_000)
    assert cheap == pytest.approx(random + 45 * (4 / 16 * epoch + pool * 0.2 / 512 * 500 * 7))


def test_a_fifth_of_the_images_costs_a_third():
    """A tenth of the epochs on everything, a fifth of the rest, and 45 selections of three quarters of an epoch."""
    share = pretraining_passes({**ACL, **RCS}, 50_000) / pretraining_passes(ACL, 50_000)
    assert share == pytest.approx(0.31, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"mode": "slf", "num_train_epochs": 25}, 25),
        ({"mode": "alf", "num_train_epochs": 25}, 25 * 21),
        ({"mode": "aff", "num_train_epochs": "100"}, 100 * 27),
        ({"mode": "autolora", "num_train_epochs": 50, "validation_fraction": 0.05}, 50 * (0.95 * 26 + 0.05 * 41)),
        ({"mode": "lp_aff", "num_train_epochs": 25, "probe_stage_epochs": 10}, 25 * 27 + 11),
    ],
)
def test_fine_tuning(settings, passes):
    assert finetuning_passes(settings, 1000) == pytest.approx(1000 * passes)


def test_autoattack_costs_most_where_most_withstands():
    weak, strong = (evaluation_passes(["accuracy", "autoattack"], 10, 0.8, robust) for robust in (0.1, 0.5))
    assert weak == pytest.approx(10 * (1 + 160 + 950)) and strong == pytest.approx(10 * (1 + 160 + 4750))
    assert evaluation_passes(["autoattack"], 10, None, None) == pytest.approx(10 * (160 + 4275))
    assert evaluation_passes(["pgd20"], 10, 0.8, 0.1) == 410


# ---------------------------------------------------------------------- rates
def test_the_assumed_rate_says_that_it_is_assumed():
    rate = Rate.assumed()
    assert "not measured" in rate.told and rate.epoch_seconds == pytest.approx(7.5, abs=0.01)
    assert rate.hours(Work(rate.flops_per_second * 3600)) == pytest.approx(1)
    assert rate.hours(Work(rate.flops_per_second * 3600, "fp32")) == pytest.approx(2)


def test_an_epoch_gives_the_rate_back():
    rate = Rate.of_epoch(20)
    acl = pretraining_passes(ACL, 50_000) * NETWORKS["resnet18_cifar", 32]
    assert rate.epoch_seconds == pytest.approx(20) and rate.hours(Work(acl)) == pytest.approx(20_000 / 3600)
    with pytest.raises(ValueError, match="seconds_per_epoch must be positive, got 0"):
        Rate.of_epoch(0)


def test_a_file_of_benchmarks_gives_the_rate(tmp_path):
    file = tmp_path / "gpu.json"
    results = [
        {"name": "acl/fp32/reference", "epoch_seconds": 28.0},
        {"name": "acl/bf16/eager", "epoch_seconds": 11.0},
        {"name": "acl/bf16/compiled", "epoch_seconds": 8.0},
    ]
    document = {"results": results, "settings": {"model": None}, "environment": {"hardware": {"gpu": "Some GPU"}}}
    file.write_text(json.dumps(document))
    rate = Rate.of_benchmark(file)
    assert rate.epoch_seconds == pytest.approx(11) and rate.told == (
        "measured by benchmarks on Some GPU: 11 seconds per ACL epoch"
    )
    file.write_text(json.dumps({**document, "settings": {"model": "wrn28_10"}}))
    with pytest.raises(ValueError, match="no acl/bf16/eager of resnet18, it holds .* of wrn28_10: write one with"):
        Rate.of_benchmark(file)
    file.write_text(json.dumps({**document, "results": results[:1]}))
    with pytest.raises(ValueError, match="no acl/bf16/eager of resnet18, it holds acl/fp32/reference"):
        Rate.of_benchmark(file)
    for text in ("no", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(ValueError, match="is not a file of benchmarks"):
            Rate.of_benchmark(file)
