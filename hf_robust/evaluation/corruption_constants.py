"""How strong every common corruption is: the published constants of CIFAR-10-C and of ImageNet-C, severities 1 to 5.

The two tables are not one table at two sizes: CIFAR-10-C is much milder, and the constants of ImageNet-C on 32-pixel
images cost a classifier several points more.

Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, and the released generators of both sets, `hendrycks/robustness`,
`ImageNet-C/create_c/make_cifar_c.py` and `make_imagenet_c.py`. Lengths are pixels unless a line says otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["CONSTANTS", "CORRUPTIONS", "EXTRA", "SEVERITIES", "check_corruption", "constant_of"]

CORRUPTIONS: tuple[str, ...] = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 corruptions of the benchmark, in its order."""
EXTRA: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Four more, kept for validation; never part of a mean."""
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)

_CIFAR: dict[str, tuple[Any, ...]] = {
    # standard deviation, pixels in [0, 1]
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    # photons of a white pixel
    "shot_noise": (500, 250, 100, 75, 50),
    # share of values that turn black or white
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    # standard deviation relative to the value
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),
    # standard deviation
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    # standard deviation of the blurs, longest step, sweeps
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    # radius of the disk, standard deviation of the blur of its rim
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    # radius, standard deviation
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    # end (excluded) and step of the zoom factors, which start at 1
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    # mean and standard deviation of the flakes, zoom, threshold, radius and deviation of the motion, share of image
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    # factor of the image, factor of the texture, step at which the texture is sampled
    "frost": ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
    # thickness, decay of the roughness from one scale to the next
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    # what the HSV value gains
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    # factor of the HSV saturation, what it gains
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    # factor of the distance from the mean
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    # amplitude and smoothness of the displacement, shift of the three corners; fractions of the image's side
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    # factor of the resolution
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    # JPEG quality
    "jpeg_compression": (80, 65, 58, 50, 40),
    # mean and standard deviation of the liquid, smoothness, threshold, strength (water) or softness (mud), mud?
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
}

# Its generator counts the 224-pixel images as 244 pixels; the published images have it.
_SIDE = 244 / 224

_IMAGENET: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": (
        (2 * _SIDE, 0.7 * _SIDE, 0.1 * _SIDE),
        (2 * _SIDE, 0.08 * _SIDE, 0.2 * _SIDE),
        (0.05 * _SIDE, 0.01 * _SIDE, 0.02 * _SIDE),
        (0.07 * _SIDE, 0.01 * _SIDE, 0.02 * _SIDE),
        (0.12 * _SIDE, 0.01 * _SIDE, 0.02 * _SIDE),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    ),
}

CONSTANTS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {"cifar": _CIFAR, "imagenet": _IMAGENET}
"""Table name -> corruption -> constants of severities 1 to 5."""


def check_corruption(name: str, severity: int) -> None:
    """Let a corruption through if there is one of that name and severity.

    Args:
        name (`str`): one of `CORRUPTIONS` or `EXTRA`.
        severity (`int`): 1 to 5.

    Raises:
        ValueError: for an unknown name or another severity.
    """
    if name not in CORRUPTIONS + EXTRA:
        near = difflib.get_close_matches(str(name), CORRUPTIONS + EXTRA, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"no corruption {name!r}: {hint}There are {', '.join(CORRUPTIONS)}; extra: {', '.join(EXTRA)}"
        )
    if isinstance(severity, bool) or not isinstance(severity, int | np.integer) or severity not in SEVERITIES:
        raise ValueError(f"severity must be a whole number from 1 (mild) to 5 (strong), got {severity!r}")


def constant_of(table: str, name: str, severity: int) -> Any:
    """Look up how strong a corruption is.

    Args:
        table (`str`): `"cifar"` or `"imagenet"`.
        name (`str`): one of `CORRUPTIONS` or `EXTRA`.
        severity (`int`): 1 to 5.

    Raises:
        ValueError: for an unknown table, name or severity.
    """
    if table not in CONSTANTS:
        raise ValueError(
            f'constants must be one of {", ".join(map(repr, CONSTANTS))}, got {table!r}: "cifar" is for images below '
            '64 pixels, "imagenet" for larger ones'
        )
    check_corruption(name, severity)
    return CONSTANTS[table][name][severity - 1]
