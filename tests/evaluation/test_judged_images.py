"""Images are judged as pixels in [0, 1], whatever they are stored as; anything normalised is refused."""

from __future__ import annotations

import pytest
import torch

from hf_robust.data import ImageDataset
from hf_robust.evaluation.judged_images import JudgedImages

LABELS = torch.arange(20) % 4


def stored(channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (20, channels, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_all_ways_to_give_the_same_images_give_the_same_pixels():
    images = stored()
    ways = (ImageDataset.from_tensors(images, LABELS), (images, LABELS), [images.float() / 255, LABELS.int()])
    for way in ways:
        judged = JudgedImages.of(way)
        assert torch.equal(judged.pixels(range(3, 7), None), images[3:7].float() / 255)
        assert torch.equal(judged.labels, LABELS) and judged.labels.dtype == torch.int64 and len(judged) == 20
        assert judged.image_size == (8, 8) and torch.equal(judged.stored().images, images)


def test_images_are_brought_to_a_size_inside_of_the_range():
    for way in (ImageDataset.from_tensors(stored(), LABELS), (stored().float() / 255, LABELS)):
        x = JudgedImages.of(way).pixels(range(0, 4), 16)
        assert x.shape == (4, 3, 16, 16) and x.is_contiguous() and 0 <= float(x.min()) and float(x.max()) <= 1


def test_a_part_is_stratified_seeded_and_remembers_its_places():
    data = ImageDataset.from_tensors(stored(), LABELS, name="mine")
    part, again, other = (JudgedImages.of(data, 8, seed) for seed in (3, 3, 4))
    assert part.labels.bincount().tolist() == [2, 2, 2, 2] and part.n_total == 20 and part.name == "mine"
    assert torch.equal(part.indices, again.indices) and not torch.equal(part.indices, other.indices)
    assert torch.equal(part.pixels(range(0, 8), None), data.images[part.indices].float() / 255)
    inner = part.part(torch.tensor([5, 1]))
    assert inner.indices.tolist() == part.indices[[5, 1]].tolist()
    assert torch.equal(JudgedImages.of((stored(), LABELS), 8, 3).indices, part.indices)
    assert len(JudgedImages.of(data, 99)) == 20


def test_the_fingerprint_follows_the_images():
    first = JudgedImages.of((stored(), LABELS)).fingerprint()
    assert first == JudgedImages.of((stored(), LABELS)).fingerprint()
    changed = stored()
    changed[0, 0, 0, 0] ^= 1
    others = [JudgedImages.of((changed, LABELS)), JudgedImages.of((stored(), 3 - LABELS))]
    others.append(JudgedImages.of((stored(), LABELS), 8))
    assert len({first, *(o.fingerprint() for o in others)}) == 4
    inside = stored()
    inside[7] = 255 - inside[7]  # neither the first nor the last
    assert JudgedImages.of((inside, LABELS)).fingerprint() != first


def test_classes_get_the_numbers_of_other_names_in_every_form_of_the_images():
    data = ImageDataset.from_tensors(stored(), LABELS, ("d", "c", "b", "a"), name="mine")
    judged = JudgedImages.of(data).numbered_as(("a", "b", "x", "c", "d"))
    expected = torch.tensor([4, 3, 1, 0])[LABELS]
    assert torch.equal(judged.labels, expected) and torch.equal(judged.stored().labels, expected)
    assert judged.label_names == judged.stored().label_names == ("a", "b", "x", "c", "d") and judged.name == "mine"


def test_grey_images_stay_grey_and_are_stored_as_rgb():
    judged = JudgedImages.of((stored(1), LABELS))
    assert judged.pixels(range(0, 2), None).shape == (2, 1, 8, 8) and judged.stored().images.shape == (20, 3, 8, 8)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ((stored().float() / 127.5 - 1, LABELS), r"pixels in \[0, 1\].*put Normalize inside the model"),
        ((stored().float(), LABELS), r"divide by 255"),
        ((torch.full((20, 3, 8, 8), torch.nan), LABELS), r"pixels in \[0, 1\]"),
        ((stored().long(), LABELS), r"pixels in \[0, 1\] \(or uint8\)"),
        ((stored(), LABELS[:5]), r"one label per image"),
        ((stored()[0], LABELS), r"images must be \(N, C, H, W\)"),
        ((stored(), LABELS.float()), r"whole numbers from 0, got torch.float32"),
        ((stored(), LABELS - 1), r"whole numbers from 0"),
        (ImageDataset.from_tensors(stored()), r"needs labels.*embedding_robustness"),
        (torch.utils.data.DataLoader([1]), r"load_image_dataset or a pair .* got DataLoader.*normalises"),
    ],
)
def test_what_cannot_be_judged_says_so(dataset, message):
    with pytest.raises(ValueError, match=message):
        JudgedImages.of(dataset)
