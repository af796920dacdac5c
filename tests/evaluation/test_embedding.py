"""How far an attack moves embeddings, without labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_robust.data import ImageDataset
from hf_robust.evaluation.embedding import embedding_robustness

COSINE, DISTANCE, RETRIEVAL = (
    "embedding_cosine_pgd20_linf_8_255",
    "embedding_relative_distance_pgd20_linf_8_255",
    "embedding_retrieval_pgd20_linf_8_255_accuracy",
)


def images(n: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def linear(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8)).requires_grad_(True)


def measure(features, data=None, **settings):
    return embedding_robustness(features, images() if data is None else data, progress=False, **settings)


def test_an_encoder_that_looks_at_nothing_cannot_be_moved():
    constant = torch.rand(12, 4)

    def features(x):
        return constant[: len(x)] + 0 * x.mean((1, 2, 3))[:, None]

    found = measure(features)
    assert found.metrics == {COSINE: pytest.approx(1.0), DISTANCE: 0.0, RETRIEVAL: 1.0}


def test_the_attack_moves_as_far_as_a_linear_encoder_lets_it():
    model, eps = nn.Sequential(nn.Flatten(), nn.Linear(108, 1, bias=False)), 8 / 255
    data = torch.full((5, 3, 6, 6), 0.5)
    found = measure(model, data, distance="l2", steps=30)
    weight = model[1].weight.detach()
    most = eps * weight.abs().sum() / (data[0].flatten() @ weight[0]).abs()
    torch.testing.assert_close(found.relative_distance, most.expand(5), rtol=1e-4, atol=1e-5)


def test_a_stronger_attack_moves_more_and_values_are_per_image():
    weak, strong = measure(linear(), eps=2 / 255), measure(linear(), eps=8 / 255)
    assert (strong.cosine < weak.cosine).all() and (strong.relative_distance > weak.relative_distance).all()
    assert strong.cosine.shape == (12,) and strong.metrics[COSINE] == pytest.approx(float(strong.cosine.mean()))
    assert strong.retrieved.dtype == torch.bool and strong.step_size == pytest.approx(2 / 255) and strong.n == 12
    entry = strong.to_result("mine")
    assert entry["metrics"] == strong.metrics and entry["attack"]["loss"] == "cosine" and entry["n_eval"] == 12


def test_seed_batches_and_kinds_of_images():
    data = (images() * 255).to(torch.uint8)
    ways = (data, ImageDataset.from_tensors(data), (data, torch.zeros(12)), data.float() / 255)
    first, *others = (measure(linear(), way, seed=3) for way in ways)
    assert all(torch.equal(first.cosine, other.cosine) for other in others)
    assert not torch.equal(first.cosine, measure(linear(), data, seed=4).cosine)
    assert measure(linear(), data, n_examples=5).n == 5
    assert measure(nn.Sequential(nn.AdaptiveAvgPool2d(6), linear()), data, size=12, steps=1).n == 12


def test_the_encoder_stays_as_it_was_also_inside_of_a_function():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    measure(lambda x: model(x), steps=2)
    assert model.training and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_evaluated_in_float32_and_put_back(dtype):
    model = linear().to(dtype)
    expected = measure(linear().to(dtype).float(), steps=2)
    for features in (model, lambda x: model(x)):
        assert torch.equal(measure(features, steps=2).cosine, expected.cosine)
    assert model[1].weight.dtype == dtype and model.training and model[1].weight.requires_grad
    with pytest.raises(KeyboardInterrupt):
        measure(lambda x: (_ for _ in ()).throw(KeyboardInterrupt) if model[1].weight.dtype != dtype else model(x))
    assert model[1].weight.dtype == dtype and model.training and model[1].weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_examples": 0}, "n_examples must be 1 or more, got 0"),
        ({"n_examples": -1}, "n_examples must be 1 or more, got -1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"data": ()}, "images must be a tensor .* got tuple: stack a list"),
        ({"features": lambda x: (x.flatten(1),)}, r"a tensor \(N, D\), got tuple: wrap the encoder"),
        ({"features": lambda x: x.flatten(1).detach()}, "cut off from the pixels.*inference_mode"),
        ({"distance": "l1"}, "distance must be 'cosine' or 'l2', got 'l1'"),
        ({"data": images() * 2 - 1}, "put Normalize inside the model"),
        ({"features": nn.Conv2d(3, 4, 3)}, r"embeddings must be \(N, D\) and finite, got shape \(12, 4, 4, 4\)"),
        ({"features": lambda x: x.flatten(1).log().log()}, "finite"),
        ({"eps": 8}, r"eps must be in \(0, 1\], got 8"),
    ],
)
def test_mistakes_are_named(settings, message):
    settings = {"features": linear(), **settings}
    with pytest.raises(ValueError, match=message):
        measure(settings.pop("features"), settings.pop("data", None), **settings)
