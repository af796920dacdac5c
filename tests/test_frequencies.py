from __future__ import annotations

import cmath
import math

import pytest
import torch

from hf_robust.frequencies import high_pass


def slow_high_pass(channel: torch.Tensor, radius: float) -> torch.Tensor:
    """Removes the waves of low frequency one by one, written out as a double sum over the pixels."""
    size = len(channel)
    kept = torch.zeros(size, size, dtype=torch.complex128)
    half = size // 2
    for u in range(-half, size - half):
        for v in range(-half, size - half):
            if math.hypot(u, v) < radius:
                continue
            wave = torch.tensor(
                [[cmath.exp(2j * math.pi * (u * i + v * j) / size) for j in range(size)] for i in range(size)],
                dtype=torch.complex128,
            )
            kept += (channel * wave.conj()).sum() * wave / size**2
    assert kept.imag.abs().max() < 1e-12
    return kept.real


@pytest.mark.parametrize(("size", "radius"), [(8, 2.0), (8, 3.5), (7, 2.0)])
def test_equals_the_sum_over_waves(size, radius):
    images = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = high_pass(images, radius)
    for image, passed in zip(images.flatten(0, 1), found.flatten(0, 1), strict=True):
        torch.testing.assert_close(passed, slow_high_pass(image, radius), atol=1e-12, rtol=0)


def test_193_of_1024_cells_go_at_the_published_radius():
    impulse = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    impulse[..., 0, 0] = 1  # its spectrum is 1 in every cell
    spectrum = torch.fft.fft2(high_pass(impulse, 8)).abs()
    assert int((spectrum < 1e-12).sum()) == 193
    assert int((spectrum - 1).abs().lt(1e-12).sum()) == 1024 - 193


def test_what_is_left_has_both_signs_and_no_mean():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    passed = high_pass(images, 8)
    assert passed.dtype == images.dtype and passed.shape == images.shape
    assert passed.min() < 0 and passed.mean((2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(high_pass(passed, 8), passed, atol=1e-6, rtol=0)
    torch.testing.assert_close(high_pass(images, 0), images, atol=1e-6, rtol=0)
    assert high_pass(images.bfloat16(), 8).dtype == torch.bfloat16
    strided = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(high_pass(strided, 8), passed, atol=1e-6, rtol=0)


def test_impossible_arguments():
    with pytest.raises(ValueError, match="images must be float pixels in .*, got torch.uint8: divide"):
        high_pass(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="radius must be 0 or more, got -1: published is 8 at 32 pixels"):
        high_pass(torch.zeros(1, 3, 8, 8), -1)
