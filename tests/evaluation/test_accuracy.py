"""Accuracy on clean and attacked images: counted right, whatever the batches, and free of side effects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_robust.attacks import PGD, frozen
from hf_robust.data import ImageDataset
from hf_robust.evaluation.accuracy import measure_accuracy


def grey_images(levels: list[int], labels: list[int]) -> ImageDataset:
    """One image of one grey level each."""
    images = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ImageDataset.from_tensors(images, torch.tensor(labels), name="grey")


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Class 1 above level 100, class 0 below; the logit grows with the distance."""
    margin = images.mean((1, 2, 3)) * 255 - 100.5
    return torch.stack([-margin, margin], 1)


# distances from the boundary: 2.5, 4.5, 20.5, and one that is wrong from the start
GREY = grey_images([98, 105, 121, 121], [0, 1, 1, 0])


@pytest.mark.parametrize(("levels", "left"), [(1, 3), (3, 2), (8, 1), (30, 0)])
def test_what_lies_within_eps_of_the_boundary_falls(levels: int, left: int) -> None:
    attack = PGD(levels / 255, levels / 255, 3)
    found = measure_accuracy(brightness, GREY, size=8, attack=attack)
    assert (found.standard, found.attacked, found.n) == (3 / 4, left / 4, 4)
    assert found.to_dict() == {"standard_accuracy": 3 / 4, f"pgd3_linf_{levels}_255_accuracy": left / 4}


def test_without_an_attack_only_clean_images_are_counted() -> None:
    found = measure_accuracy(brightness, GREY, size=8)
    assert found.attacked is None and found.to_dict() == {"standard_accuracy": 3 / 4}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


def random_images(n: int = 40) -> ImageDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageDataset.from_tensors(images, torch.arange(n) % 3)


def test_model_and_random_state_are_left_alone_and_autocast_outside_changes_nothing() -> None:
    model, data, attack = network(), random_images(), PGD(steps=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with frozen(model):
        first = measure_accuracy(model, data, size=8, attack=attack, batch_size=16)
        with torch.autocast("cpu", torch.bfloat16):
            second = measure_accuracy(model, data, size=8, attack=attack, batch_size=16, shared=True)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_decides_the_random_starts_and_augmented_views() -> None:
    seen: list[torch.Tensor] = []

    def note(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return images.flatten(1)[:, :3] * 1.0

    data = random_images(6)
    for seed in (0, 0, 1):
        measure_accuracy(note, data, size=8, view="padded_crop", seed=seed)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (ImageDataset.from_tensors(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), {}, "accuracy needs labels"),
        (GREY, {"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(dataset: ImageDataset, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_accuracy(brightness, dataset, size=8, **settings)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        measure_accuracy(lambda x: brightness(x) * float("nan"), GREY, size=8)
