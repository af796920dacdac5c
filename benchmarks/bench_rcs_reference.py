"""Coreset selection: the library's against the published one, on the same views; six candidates, three picks.

What a selection costs beside a training epoch, and how much it depends on its random starts, measures `bench_rcs`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import compare
from benchmarks.harness import Action, Case
from benchmarks.reference import interleave
from benchmarks.reference_selection import select
from benchmarks.setting import batch_of, build_model
from hf_robust.attacks import PGD, frozen
from hf_robust.coresets import RCS, SelectionTask
from hf_robust.coresets.base import on_cpu
from hf_robust.coresets.candidates import minibatches
from hf_robust.coresets.phases import seeded_generator
from hf_robust.data import ImageDataset
from hf_robust.objectives.acl import ACL

NAMES = ("rcs", "rcs_reference")
BATCH, CANDIDATES, PICKS = 16, 6, 3
# What the released code computes, but for its validation images.
PUBLISHED = RCS(variant="released", distance="kl_minmax")
CHEAP = RCS(variant="released", distance="kl_minmax", attack_steps=1, reattack=False)


def selection_task(options: argparse.Namespace, dtype: str, held_out: int | None = None) -> SelectionTask:
    """A task whose views are made beforehand, so that a selection is timed without its augmentation."""
    objective, size = ACL(), options.batch_size or BATCH
    pool, held_out = CANDIDATES * size, held_out or size * 3 // 2
    batch = batch_of(options, objective, pool + held_out)
    levels = (batch["view_1"].cpu() * 255).round().to(torch.uint8)

    def views(inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        rows = inputs["index"].to(options.device)
        return {name: batch[name][rows] for name in objective.views}

    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    if dtype == "bf16":
        autocast = functools.partial(torch.autocast, options.device, torch.bfloat16)
    device = torch.device(options.device)
    return SelectionTask(
        model=build_model(options, objective).eval(),
        objective=objective,
        dataset=ImageDataset.from_tensors(levels),
        pool=torch.arange(pool),
        validation=torch.arange(pool, pool + held_out),
        budget=PICKS * size,
        batch_size=size,
        views=views,
        originals=lambda images: images.float() / 255,
        attack=PGD(),
        seed=0,
        generator=lambda name: seeded_generator(device, 0, "coreset", 0, name),
        autocast=autocast,
        progress=0.5,
        device=device,
    )


def reference_inputs(task: SelectionTask) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The same candidates in the same order for the published selection: images, interleaved views, validation."""
    order = torch.randperm(len(task.pool), generator=on_cpu(task.generator("order")))
    rows = minibatches(task.pool[order], task.batch_size)
    drawn = [task.views({"index": numbers}, task.generator("views")) for numbers in rows]
    levels: Any = task.dataset.images
    validation = [task.originals(levels[part].to(task.device)) for part in task.validation.split(task.batch_size)]
    return rows, [interleave(batch["view_1"], batch["view_2"]) for batch in drawn], validation


def comparisons(options: argparse.Namespace) -> dict[str, list[Case]]:
    """The published selection, ours with attacks in each precision, and ours with cheap scores."""

    def reference() -> Action:
        task = selection_task(options, "fp32")
        _, views, validation = reference_inputs(task)
        task.model.train()
        return lambda: select(task.model, views, validation, PICKS)

    def library(dtype: str, method: RCS) -> Action:
        task = selection_task(options, dtype)
        task.model.to(memory_format=torch.channels_last)  # as the other measurements train

        def run() -> None:
            with frozen(task.model), torch.no_grad():
                method.select(task)

        return run

    images = CANDIDATES * (options.batch_size or BATCH)
    cases = [Case("rcs/fp32/reference", reference, images)]
    for dtype in options.dtype:
        for name, method in (("eager", PUBLISHED), ("cheap", CHEAP)):
            build = functools.partial(library, dtype, method)
            cases.append(Case(f"rcs/{dtype}/{name}", build, images, dtype))
    return {"rcs": cases}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios; nothing with `--short` or for a data set, which are asked of the measurement over an epoch."""
    return [] if options.short or options.dataset_name else compare(options, comparisons(options))
