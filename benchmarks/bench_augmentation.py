"""Random views: the batched pipeline of the library against PIL, one image at a time, and how far they agree."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference_views
from benchmarks.comparison import compare
from benchmarks.harness import Action, Case
from benchmarks.setting import batch_of, network
from hf_robust.objectives.acl import ACL
from hf_robust.views import Views, apply_parameters, sample_parameters

IMAGES = 512


def levels(options: argparse.Namespace, images: int) -> Tensor:
    """Uint8 images on the CPU."""
    return (batch_of(options, ACL(), images)["view_1"].cpu() * 255).round().to(torch.uint8)


def agreement(images: Tensor, size: int, seed: int = 0) -> tuple[float, float]:
    """Share of values that equal Pillow's, given the same parameters, and share within one level of them."""
    drawn = sample_parameters(len(images), image_size=(size, size), generator=torch.Generator().manual_seed(seed))
    ours = (apply_parameters(images, drawn, size=size) * 255).round()
    theirs = torch.stack([reference_views.view(image, drawn, row, size) for row, image in enumerate(images)])
    distance = (ours - theirs).abs()
    return float((distance == 0).double().mean()), float((distance <= 1).double().mean())


def comparisons(options: argparse.Namespace) -> dict[str, list[Case]]:
    """One view of every image."""
    size, images = network(options)[2], options.batch_size or IMAGES
    pictures = levels(options, images)
    views, resident = Views(size), pictures.to(options.device)

    def reference() -> Action:
        pipeline, stored = reference_views.pipeline(size), [reference_views.to_pil(image) for image in pictures]
        return lambda: torch.stack([pipeline(image) for image in stored])

    equal, close = agreement(pictures[:256], size)
    facts = {"identical_to_pil": equal, "within_one_level": close}
    return {
        "augmentation": [
            Case("augmentation/reference", reference, images),
            Case("augmentation/batched", lambda: lambda: views(resident, ["view_1"]), images, facts=facts),
        ]
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios."""
    results = compare(options, comparisons(options))
    for result in results:
        result["microseconds_per_view"] = 1e6 / result["images_per_second"]
    return results
