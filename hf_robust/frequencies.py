"""Frequencies of images: what is left of them without the low ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["high_pass"]


def high_pass(images: Tensor, radius: float) -> Tensor:
    """Images without their low frequencies: edges and texture, around 0 instead of around a mean.

    The spectrum of each channel loses every cell whose distance from frequency zero, in cells, is below `radius`.
    The mean goes with them, so that values are of both signs; they are not clipped to [0, 1].

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): pixels in [0, 1].
        radius (`float`): in periods per side of the image, 0 or more; published: 8 at 32 x 32 pixels, which removes
            193 of 1024 cells. With 0 nothing is removed.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`: of the type of `images`.

    Raises:
        ValueError: if the images are not float, or the radius is negative.

    Source: Fan et al. 2021 (AdvCL), released code `fr_util.py` (`generate_high`), on square images.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be float pixels in [0, 1], got {images.dtype}: divide uint8 images by 255")
    if not radius >= 0:
        raise ValueError(f"radius must be 0 or more, got {radius}: published is 8 at 32 pixels")
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device)  # in periods per side, zero first
    columns = torch.fft.rfftfreq(width, 1 / width, device=images.device)  # real images have the other half mirrored
    kept = rows[:, None].square() + columns.square() >= radius**2
    wide = images if images.dtype == torch.float64 else images.float()
    return torch.fft.irfft2(torch.fft.rfft2(wide) * kept, s=(height, width)).to(images.dtype)
