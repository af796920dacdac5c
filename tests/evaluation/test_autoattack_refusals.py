"""AutoAttack refuses what it would give a meaningless number for (H10 among it), and says the way out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attacked import LEVELS, Ladder, ladder_images
from torch import Tensor

from hf_robust.evaluation.autoattack import autoattack

IMAGES, LABELS = ladder_images(LEVELS)


def attack(model: Callable[[Tensor], Any], images: Any = IMAGES, labels: Tensor = LABELS, **settings: Any) -> Any:
    """A cascade cut short, without a bar."""
    return autoattack(model, images, labels, **{"preset": "smoke", "progress": False, "batch_size": 4, **settings})


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda logits: "cat", TypeError, "got a str from the model"),
        (lambda logits: logits[:, :1], ValueError, r"shape \(4, 1\) for 4 images.*at least 2"),
        (lambda logits: logits[0], ValueError, r"shape \(4,\) for 4 images"),
        (lambda logits: logits * math.nan, ValueError, "not finite"),
        (lambda logits: logits * 1e38 * 1e38, ValueError, "not finite"),
        (lambda logits: logits.detach(), ValueError, "cut off from the pixels"),
    ],
)
def test_outputs_that_cannot_be_attacked_are_refused(answer: Callable, error: type, message: str) -> None:
    model = Ladder()
    with pytest.raises(error, match=message):
        attack(lambda x: answer(model(x)))


@pytest.mark.parametrize("images", [IMAGES.numpy(), list(IMAGES)])
def test_images_that_are_no_tensor_are_refused_with_the_way_out(images: Any) -> None:
    with pytest.raises(TypeError, match="AutoAttack takes one tensor .*torch.from_numpy.*torch.stack"):
        attack(Ladder(), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES - 0.45) / 0.25, r"pixels from -1.49 to 0.475.*put the normalisation inside the model"),
        (IMAGES * 255, "divide images from 0 to 255 by 255"),
        ((IMAGES * 255).to(torch.uint8), "torch.uint8.*divide uint8 images by 255"),
        (IMAGES * math.nan, "pixels from nan"),
        (IMAGES[0], "shape"),
        (IMAGES[:0], "N of 1 or more"),
    ],
)
def test_h10_images_outside_zero_and_one_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(Ladder(), images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS - 1, r"labels from -1 to 2, they must be 0 or more"),
        (LABELS + 1, r"labels from 1 to 4, they must be 0 to 3, the classes of the model"),
        (LABELS[:3], r"shape \(3,\).* for 10 images"),
        (LABELS.float(), "one whole number per image"),
        (torch.eye(4)[LABELS], "argmax"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(Ladder(), IMAGES, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8.0}, r"eps must be in \(0, 1\], got 8.0.*8/255"),
        ({"eps": 0.0, "norm": "l2"}, "eps must be positive"),
        ({"norm": "Linf"}, "norm must be 'linf', 'l2' or 'l1', got 'Linf'"),
        ({"preset": "plus"}, "preset must be one of standard, fast, smoke, got 'plus'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(Ladder(), **settings)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"pyautoattack.*extra eval.*pip install 'hf_robust\[eval\]'"):
        attack(Ladder())
