"""The measurements run and report what they say; no time is asserted."""

from __future__ import annotations

import argparse

from benchmarks.bench_rcs import measure


def test_a_selection_is_measured_against_an_epoch(capsys):
    options = argparse.Namespace(
        dataset_name=None,
        images=64,
        batch_size=4,
        backbone="resnet10_cifar",
        model_args={"channels": [8, 8, 8, 8], "stem_stride": 2},
        bf16=False,
        short=False,
    )
    results = {r["name"]: r for r in measure(options)}
    exact = results["rcs/exact"]
    assert exact["overlap"] == 1.0 and exact["overlap_by_chance"] == 0.1
    assert exact["ratio"] == exact["seconds"] / exact["epoch_seconds"] > 0
    parts = exact["documented_bytes"]
    assert parts["gradients"] == 16 * 4 * (8 * 8 * 3 + 8)  # 16 minibatches, three 8 x 8 layers, one bias
    assert parts["validation_images"] == 1 * 3 * 32 * 32 and parts["float32_pass"] == 0
    assert exact["documented_bound_bytes"] == sum(parts.values())
    assert 0 <= results["rcs/exact, all drawn anew"]["overlap"] < 1
    assert results["rcs/single images"]["overlap"] == 1.0
    assert set(results) >= {"rcs/cheap", "rcs/attacked once", "rcs/single images, all drawn anew"}
