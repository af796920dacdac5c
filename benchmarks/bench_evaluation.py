"""Accuracy on clean and PGD-20 images: the library's measurement, in float32 as it always is, against plain PGD.

`eager` is what the library does by itself; `folded` hands the same measurement a folded network, which a caller may
do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.comparison import compare
from benchmarks.harness import Action, Case
from benchmarks.reference_finetuning import right_answers
from benchmarks.setting import batch_of, build_model, network
from hf_robust.attacks import PGD, frozen
from hf_robust.data import ImageDataset
from hf_robust.evaluation.accuracy import measure_accuracy
from hf_robust.models.folded import FoldedNetwork
from hf_robust.objectives.sat import SAT

BATCH = 32


def comparisons(options: argparse.Namespace) -> dict[str, list[Case]]:
    """One batch of images, in the network itself and in its folded form."""
    objective, images = SAT(), options.batch_size or BATCH
    batch = batch_of(options, objective, images)
    levels, labels = (batch[objective.views[0]] * 255).round().to(torch.uint8), batch["label"]

    def reference() -> Action:
        model = build_model(options, objective)
        return lambda: right_answers(model, levels.float() / 255, labels)

    def library(folded: bool) -> Action:
        model = build_model(options, objective).eval()
        dataset = ImageDataset.from_tensors(levels.cpu(), labels.cpu())
        with frozen(model):
            seen: Any = FoldedNetwork(model) if folded else model  # once per data set, not per batch

        def run() -> None:
            with frozen(model):
                measure_accuracy(
                    lambda x: seen.embed(x, "adv"),
                    dataset,
                    size=network(options)[2],
                    attack=PGD(steps=20),
                    batch_size=images,
                    device=options.device,
                )

        return run

    return {
        "evaluation": [
            Case("evaluation/fp32/reference", reference, images),
            Case("evaluation/fp32/eager", lambda: library(False), images),
            Case("evaluation/fp32/folded", lambda: library(True), images),
        ]
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios."""
    return compare(options, comparisons(options))
