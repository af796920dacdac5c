"""The published augmentation, one PIL image at a time; see `benchmarks.reference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from hf_robust.views import ViewParameters

__all__ = ["pipeline", "to_pil", "view"]


def to_pil(image: Tensor) -> Image.Image:
    """A PIL image of a uint8 tensor `(3, H, W)`."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def pipeline(size: int) -> Callable[[Any], Tensor]:
    """The random view of ACL at full strength: a PIL image in, float `(3, size, size)` in [0, 1] out.

    Source: ACL, RCS and AIR: bicubic crop of 10 to 100 % of the area, flip, colour jitter with probability 0.8, grey
        with 0.2.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.1, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
        ]
    )


def view(image: Tensor, parameters: ViewParameters, row: int, size: int) -> Tensor:
    """The same operations with given parameters: how far the library's arithmetic agrees with Pillow's.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`): uint8.
        parameters ([`ViewParameters`]): of a batch.
        row (`int`): which of them.
        size (`int`): side of the view.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`: whole levels, uint8.
    """
    crop = (int(field[row]) for field in (parameters.top, parameters.left, parameters.height, parameters.width))
    picture = F.resized_crop(to_pil(image), *crop, size=[size, size], interpolation=InterpolationMode.BICUBIC)
    if parameters.flip[row]:
        picture = F.hflip(picture)
    if parameters.jitter[row]:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        amounts = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
        for operation in parameters.order[row].tolist():
            picture = adjust[operation](picture, float(amounts[operation][row]))
    if parameters.gray[row]:
        picture = F.to_grayscale(picture, num_output_channels=3)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
