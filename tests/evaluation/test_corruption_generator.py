"""Corrupting any image and any data set: repeatable, independent of batches, and clear about what it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_robust.data import ImageDataset
from hf_robust.evaluation.corruption_constants import CORRUPTIONS, EXTRA
from hf_robust.evaluation.corruption_generator import CorruptedImages, corrupt, corrupt_dataset, default_constants

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "corruptions" / "cifar_c.npz")
RANDOM = sorted(
    {*CORRUPTIONS, *EXTRA}
    - {*("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "saturate")}
    - {*("pixelate", "jpeg_compression")}
)


def photographs(n: int = 3) -> ImageDataset:
    images = torch.from_numpy(GOLDEN["clean"][:n]).permute(0, 3, 1, 2).contiguous()
    return ImageDataset.from_tensors(images, torch.arange(n) % 2, ["a", "b"], name="photographs")


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
def test_the_seed_decides_and_nothing_else(name: str) -> None:
    image = GOLDEN["clean"][0]
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = corrupt(image, name, 5, seed=3)
    assert first.dtype == np.uint8 and first.shape == image.shape
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    np.testing.assert_array_equal(corrupt(image, name, 5, seed=3), first)
    other = corrupt(image, name, 5, seed=4)
    assert np.array_equal(other, first) == (name not in RANDOM)


@pytest.mark.parametrize(("name", "number"), [("gaussian_noise", 0), ("contrast", 11), ("jpeg_compression", 14)])
@pytest.mark.parametrize(("position", "severity"), [(0, 1), (1, 3), (2, 5)])
def test_the_door_gives_the_released_images(name: str, number: int, position: int, severity: int) -> None:
    for row, index in enumerate(GOLDEN["index"].tolist()):
        found = corrupt(GOLDEN["clean"][row], name, severity, "cifar", 10000 * number + 100 * severity + index)
        np.testing.assert_array_equal(found, GOLDEN[name][position][row])


def test_levels_are_cut_off_not_rounded() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    image[0] = 107  # mean 100.875; contrast 0.75 gives 100.21875 and 105.46875
    assert np.unique(corrupt(image, "contrast", 1)).tolist() == [100, 105]
    image[0] = 106  # mean 100.75: 100.1875 and 104.6875
    assert np.unique(corrupt(image, "contrast", 1)).tolist() == [100, 104]


def test_the_tables_differ_and_frost_takes_photographs() -> None:
    image = GOLDEN["clean"][0]
    mild, strong = corrupt(image, "gaussian_noise", 1), corrupt(image, "gaussian_noise", 1, "imagenet")
    assert np.abs(strong.astype(int) - image).mean() > 1.5 * np.abs(mild.astype(int) - image).mean()
    black = [np.zeros((300, 300, 3), np.uint8)]
    np.testing.assert_array_equal(corrupt(image, "frost", 1, frost_textures=black), image)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((3, 32, 32), np.uint8), r"uint8 \(3, 32, 32\)"),
        (np.zeros((32, 32), np.uint8), r"uint8 \(32, 32\)"),
        (np.zeros((32, 32, 4), np.uint8), r"uint8 \(32, 32, 4\)"),
        (np.zeros((32, 32, 3)), r"float64 \(32, 32, 3\)"),
        (np.zeros((7, 32, 3), np.uint8), r"uint8 \(7, 32, 3\)"),
        (torch.zeros((32, 32, 3), dtype=torch.uint8), r"torch.uint8 \(32, 32, 3\)"),
        ("cat.png", "str"),
    ],
)
def test_another_layout_is_refused_with_the_way_out(image: object, found: str) -> None:
    with pytest.raises(ValueError, match=rf"uint8 array \(H, W, 3\), 8 x 8 pixels or more, got {found}: .*permute"):
        corrupt(image, "fog", 1)  # type: ignore[arg-type]


def test_unknown_names_severities_tables_and_seeds_are_refused() -> None:
    image = GOLDEN["clean"][0]
    for arguments, complaint in (
        (("fgo", 1), "did you mean 'fog'"),
        (("fog", 0), "severity .* got 0"),
        (("fog", 1, "cifar100"), "'cifar', 'imagenet', got 'cifar100'"),
        (("fog", 1, "cifar", -1), "seed must be from 0 .* got -1"),
        (("fog", 1, "cifar", 2**32), "seed must be from 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            corrupt(image, *arguments)  # type: ignore[arg-type]


def test_a_data_set_keeps_labels_names_and_size() -> None:
    source = photographs()
    made = corrupt_dataset(source, "pixelate", 5)
    assert made.images is not None and made.images.shape == (3, 3, 32, 32)
    assert made.labels is not None and made.labels.tolist() == [0, 1, 0]
    assert made.label_names == ("a", "b") and made.num_classes == 2 and made.name == "photographs, pixelate 5"
    for row in range(3):
        expected = corrupt(GOLDEN["clean"][row], "pixelate", 5)
        np.testing.assert_array_equal(made.images[row].permute(1, 2, 0).numpy(), expected)
    assert len(made.subset([2, 0])) == 2


def test_every_image_severity_corruption_and_seed_has_random_numbers_of_its_own() -> None:
    same = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    flat = ImageDataset.from_tensors(same, torch.tensor([0, 1]))

    def noise(name: str = "gaussian_noise", severity: int = 3, seed: int = 0) -> torch.Tensor:
        images = corrupt_dataset(flat, name, severity, seed=seed).images
        assert images is not None
        return images.long() - 128

    first = noise()
    assert torch.equal(first, noise())
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, noise(seed=1))
    for other in (noise(severity=4), noise("speckle_noise", 5)):
        assert not torch.equal(first.sign(), other.sign())  # not the same draws at another strength


def test_the_lazy_images_are_the_same_in_any_order() -> None:
    source = photographs()
    lazy, eager = CorruptedImages(source, "snow", 3, seed=5), corrupt_dataset(source, "snow", 3, seed=5)
    assert len(lazy) == 3 and lazy.images is None and eager.images is not None
    for index in (2, 0, 1, 2):
        item = lazy[index]
        assert torch.equal(item["image"], eager.images[index])
        assert item["index"] == index and item["label"] == index % 2
    with pytest.raises(IndexError):
        lazy[3]


def test_constants_follow_the_size_unless_they_are_named() -> None:
    large = ImageDataset.from_tensors(torch.zeros((1, 3, 64, 80), dtype=torch.uint8))
    small = ImageDataset.from_tensors(torch.zeros((1, 3, 63, 80), dtype=torch.uint8))
    assert default_constants(large) == "imagenet" and default_constants(small) == "cifar"
    grey = ImageDataset.from_tensors(torch.randint(90, 160, (1, 3, 64, 64), dtype=torch.uint8))
    automatic, named = (corrupt_dataset(grey, "contrast", 5, constants).images for constants in (None, "cifar"))
    assert automatic is not None and named is not None
    assert automatic.float().std() < 0.5 * named.float().std()
    with pytest.raises(ValueError, match="no corruption 'noise'"):
        CorruptedImages(grey, "noise", 1)
