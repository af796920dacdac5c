"""The probe of an encoder: an encoder whose PGD-20 accuracy is known, subsets, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_robust.attacks import frozen
from hf_robust.data import ImageDataset
from hf_robust.evaluation.probe import (
    ProbeResult,
    attack_metric_name,
    extract_features,
    probe_encoder,
    stratified_indices,
)


def grey(levels: list[int], labels: list[int] | None, name: str = "grey", size: int = 8) -> ImageDataset:
    """Images of one grey level each."""
    images = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    return ImageDataset.from_tensors(images, None if labels is None else torch.tensor(labels), name=name)


def brightness(x: Tensor) -> Tensor:
    return x.mean((2, 3))[:, :1]


# Symmetric about 120, so that the fitted threshold is 120 exactly.
TRAIN = grey([60, 70, 80, 160, 170, 180], [0, 0, 0, 1, 1, 1], "train")
# Distances to the threshold: 40, 9, 7, 3 levels on either side, and one on the wrong side.
JUDGED = grey([80, 111, 113, 117, 160, 129, 127, 123, 125], [0, 0, 0, 0, 1, 1, 1, 1, 0], "judged")


def test_pgd20_of_a_linear_encoder_is_the_share_beyond_eps() -> None:
    result = probe_encoder(brightness, TRAIN, JUDGED, size=8)
    assert result.standard_accuracy == 8 / 9  # only the one on the wrong side
    assert result.pgd20_accuracy == 4 / 9  # beyond 8 levels: 80, 111, 160, 129
    assert (result.n_train, result.n_eval, result.steps) == (6, 9, 20)


@pytest.mark.parametrize(("levels", "expected"), [(2, 8 / 9), (5, 6 / 9), (10, 2 / 9), (60, 0.0)])
def test_a_larger_budget_fools_exactly_those_within_it(levels: int, expected: float) -> None:
    result = probe_encoder(brightness, TRAIN, JUDGED, size=8, eps=levels / 255, step_size=levels / 1020)
    assert result.pgd20_accuracy == expected
    assert result.standard_accuracy == 8 / 9


def test_the_head_takes_raw_features() -> None:
    result = probe_encoder(brightness, TRAIN, JUDGED, size=8, steps=0)
    assert result.head is not None
    logits = result.head(extract_features(brightness, JUDGED, size=8))
    assert (logits.argmax(1) == JUDGED.labels).float().mean().item() == pytest.approx(8 / 9)
    assert result.head.weight.shape == (2, 1)


def test_features_are_those_of_the_images_in_the_unit_range_at_the_asked_size() -> None:
    seen = []

    def features(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(tuple(x.shape))
        return brightness(x)

    out = extract_features(features, grey([0, 51, 255], None), size=4, batch_size=2)
    torch.testing.assert_close(out, torch.tensor([[0.0], [0.2], [1.0]]))
    assert seen == [(2, 3, 4, 4), (1, 3, 4, 4)]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))


def noisy(n: int, seed: int, classes: int = 3) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 120, (n, 3, 8, 8), generator=generator)
    images[torch.arange(n), labels] += 60
    return ImageDataset.from_tensors(images.to(torch.uint8), labels, name="noisy")


def test_model_gradients_and_random_state_are_left_alone() -> None:
    torch.manual_seed(0)
    encoder = Encoder().train()
    encoder.conv.weight.grad = torch.ones_like(encoder.conv.weight)
    state, random = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    with frozen(encoder), torch.no_grad():  # a trainer's evaluation runs without gradients
        result = probe_encoder(encoder, noisy(30, 0), noisy(12, 1), size=8, n_train=20, n_eval=9, steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    assert encoder.training and encoder.norm.training and all(p.requires_grad for p in encoder.parameters())
    assert (
        torch.equal(encoder.conv.weight.grad, torch.ones_like(encoder.conv.weight))
        and encoder.norm.weight.grad is None
    )
    assert 0 <= result.pgd20_accuracy <= result.standard_accuracy <= 1


def test_the_same_seed_gives_the_same_result_and_autocast_outside_changes_nothing() -> None:
    torch.manual_seed(0)
    encoder = Encoder().eval().requires_grad_(False)
    arguments = {"size": 8, "n_train": 20, "n_eval": 9, "steps": 3}
    first = probe_encoder(encoder, noisy(30, 0), noisy(12, 1), **arguments)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = probe_encoder(encoder, noisy(30, 0), noisy(12, 1), **arguments)
    assert first.head is not None and second.head is not None
    assert torch.equal(first.head.weight, second.head.weight)
    assert first.to_dict() == second.to_dict()


def test_the_random_start_depends_on_the_seed_only() -> None:
    def attacked_images(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        seen: list[Tensor] = []
        probe_encoder(lambda x: (seen.append(x.detach()), brightness(x))[1], TRAIN, JUDGED, size=8, steps=1, seed=seed)
        return seen[-1]

    assert torch.equal(attacked_images(0, 0), attacked_images(0, 1))
    assert not torch.equal(attacked_images(0, 0), attacked_images(1, 0))


def test_the_device_is_that_of_the_module_the_callable_looks_through() -> None:
    from hf_robust.evaluation.probe import _device

    encoder = Encoder().to("meta")
    wrapped = {"module": encoder, "method": encoder.forward, "lambda": lambda x: encoder(x)}
    assert {key: _device(features, None).type for key, features in wrapped.items()} == dict.fromkeys(wrapped, "meta")
    assert _device(brightness, None).type == "cpu" and _device(encoder, "cpu").type == "cpu"


def test_names_and_protocol_of_a_result() -> None:
    result = probe_encoder(brightness, TRAIN, JUDGED, size=8, eps=4 / 255, step_size=1 / 255, steps=7, seed=3)
    assert list(result.to_dict()) == ["standard_accuracy", "pgd7_linf_4_255_accuracy"]
    entry = result.to_result("ACL")
    assert entry["model"] == "ACL" and entry["metrics"] == result.to_dict() and entry["protocol"] == "linear probe"
    assert (entry["n_train"], entry["n_eval"], entry["seed"]) == (6, 9, 3)
    assert (
        entry["attack"]["eps"] == 4 / 255 and entry["attack"]["steps"] == 7 and entry["dataset"] == {"name": "judged"}
    )
    assert attack_metric_name("pgd20", "linf", 8 / 255) == "pgd20_linf_8_255_accuracy"
    assert isinstance(result, ProbeResult) and result.seconds > 0


def test_a_subset_keeps_the_class_shares() -> None:
    labels = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)
    chosen = stratified_indices(labels, 20, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [14, 5, 1]
    assert len(chosen.unique()) == 20 and torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, stratified_indices(labels, 20, seed=0))
    assert not torch.equal(chosen, stratified_indices(labels, 20, seed=1))
    assert torch.bincount(labels[stratified_indices(labels, 3)]).tolist() == [1, 1, 1]
    assert torch.equal(stratified_indices(labels, 100), torch.arange(100))


@pytest.mark.parametrize("n", range(7, 40))
def test_a_subset_has_the_asked_size_whatever_the_shares(n: int) -> None:
    labels = torch.tensor([0] * 17 + [1] * 11 + [2] * 5 + [3] * 3 + [4, 5, 6, 6])
    chosen = stratified_indices(labels, n)
    assert len(chosen) == n == len(chosen.unique())
    assert len(labels[chosen].unique()) == 7


@pytest.mark.parametrize(
    ("train", "judged", "arguments", "message"),
    [
        (grey([1, 2], None, "bare"), JUDGED, {}, "train data set 'bare' has no labels.*label_column"),
        (TRAIN, grey([1, 2], None, "bare"), {}, "evaluation data set 'bare' has no labels"),
        (TRAIN, grey([1, 2], None, "bare"), {"n_eval": 1}, "evaluation data set 'bare' has no labels"),
        (grey([1, 2], [1, 1]), JUDGED, {}, "has 1 class"),
        (grey([1, 2], [0, 2]), grey([1, 2], [0, 1]), {}, r"classes \[1\], which no train image shows"),
        (TRAIN, JUDGED, {"n_train": 1}, r"n=1.*2 \(one per class\) to 6"),
        (TRAIN, JUDGED, {"batch_size": 0}, "batch_size must be 1 or more"),
        (TRAIN, JUDGED, {"eps": 8.0}, "write 8/255"),
    ],
)
def test_data_that_cannot_be_probed_is_refused(
    train: ImageDataset, judged: ImageDataset, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        probe_encoder(brightness, train, judged, size=8, **arguments)


@pytest.mark.parametrize(
    ("features", "message"),
    [(lambda x: x, r"2-d \(N, D\)"), (lambda x: brightness(x) / 0 - brightness(x) / 0, "has diverged")],
)
def test_broken_features_are_refused(features, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_encoder(features, TRAIN, JUDGED, size=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_probe_follows_the_encoder_to_its_device() -> None:
    torch.manual_seed(0)
    encoder = Encoder().eval().requires_grad_(False).cuda()
    random = torch.cuda.get_rng_state()
    result = probe_encoder(lambda x: encoder(x), noisy(30, 0), noisy(12, 1), size=8, steps=3)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert result.head is not None and result.head.weight.is_cuda
    assert 0 <= result.pgd20_accuracy <= result.standard_accuracy <= 1
