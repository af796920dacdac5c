"""One pre-training step, attack and update, without augmentation: ACL and ACL-AIR against the published step.

Both sides begin with the same weights and the same views. The library's side is the trainer's own step.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.comparison import compare, library_cases, wanted
from benchmarks.harness import Action, Case
from benchmarks.reference import ContrastiveStep, interleave
from benchmarks.setting import LR, batch_of, build_model
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.air import AIR

NAMES = ("acl", "air")
METHODS = {"acl": ACL, "air": AIR}
BATCH = 32
EPOCH = 50_000  # images of CIFAR-10


def comparisons(options: argparse.Namespace) -> dict[str, list[Case]]:
    """The reference and the library's variants of every method asked for."""
    return {name: _cases(options, name) for name in wanted(options, NAMES)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios, with what they make of 1000 epochs of CIFAR-10: an extrapolation from single steps."""
    results = compare(options, comparisons(options))
    for result in results:
        result["epoch_seconds"] = EPOCH / result["images_per_second"]
        result["extrapolated_hours_of_1000_epochs"] = result["epoch_seconds"] * 1000 / 3600
    return results


def _cases(options: argparse.Namespace, name: str) -> list[Case]:
    objective, images = METHODS[name](), options.batch_size or BATCH
    batch = batch_of(options, objective, images)

    def reference() -> Action:
        step = ContrastiveStep(build_model(options, objective), LR)
        views, originals = interleave(batch["view_1"], batch["view_2"]), batch.get("original")
        step(views[:8], None if originals is None else originals[:4])  # momentum exists, as on the other side
        return lambda: step(views, originals)

    return [
        Case(f"{name}/fp32/reference", reference, images),
        *library_cases(options, name, objective, batch),
    ]
