"""One function of pixels in [0, 1] around any network, which stays as it was."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_robust.evaluation.pixel_classifier import PixelClassifier, logits_of, modules_inside


def network(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def test_logits_are_found_in_whatever_a_model_returns():
    z = torch.rand(2, 3, dtype=torch.bfloat16)
    for output in (
        z,
        SimpleNamespace(logits=z),
        {"logits": z},
        (z, None),
        [SimpleNamespace(logits=z)],
        ({"logits": z},),
    ):
        assert torch.equal(logits_of(output), z.float()) and logits_of(output).dtype == torch.float32
    for output in (None, SimpleNamespace(pooler_output=z), {"features": z}, ()):
        with pytest.raises(ValueError, match="returns logits, got .* without them"):
            logits_of(output)
    for shape in ((2,), (2, 1), (2, 3, 4, 4)):
        with pytest.raises(ValueError, match="shape .N, C. with 2 classes"):
            logits_of(torch.rand(shape))


def test_normalisation_and_resizing_are_layers_and_differentiable():
    model, x = network().eval(), torch.rand(2, 3, 8, 8, requires_grad=True)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    classifier = PixelClassifier(model, mean=mean, std=std, input_size=(16, 16), interpolation="nearest")
    larger = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    by_hand = model((larger - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1))
    torch.testing.assert_close(classifier(x), by_hand)
    (gradient,) = torch.autograd.grad(classifier(x).sum(), x)
    assert gradient.abs().sum() > 0
    assert classifier(torch.rand(1, 3, 16, 16)).shape == (1, 3) and classifier.num_classes == 3
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8"):
        classifier(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for std in (None, (0.0, 1.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="belong together"):
            PixelClassifier(model, mean=mean, std=std)


def test_other_precisions_are_evaluated_as_a_float32_copy_without_autocast():
    model = network().to(torch.bfloat16).eval()
    classifier = PixelClassifier(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    assert logits.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16
    assert any(p.dtype == torch.float32 for p in classifier.parameters())
    assert classifier.notes == ["The weights are bfloat16; a float32 copy of the model was evaluated."]
    plain = network()
    assert PixelClassifier(plain).model is plain and not PixelClassifier(plain).notes


def test_held_puts_everything_back_also_inside_of_functions():
    model = network().train()
    model[0].weight.requires_grad_(False)
    classifier = PixelClassifier(model)
    statistics = model[1].running_mean.clone()
    with classifier.held():
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        classifier(torch.rand(4, 3, 8, 8))
    assert model.training and model[4].weight.requires_grad and not model[0].weight.requires_grad
    assert torch.equal(model[1].running_mean, statistics)
    model.eval()
    function = PixelClassifier(lambda x: model(x))
    with function.held():
        assert not any(p.requires_grad for p in model.parameters())
    assert model[4].weight.requires_grad


def test_a_function_around_a_network_in_training_mode_is_refused():
    model = network().train()
    for function in (lambda x: model(x), model.forward, functools.partial(nn.Module.__call__, model)):
        with pytest.raises(ValueError, match=r"in training mode.*call .eval\(\)"):
            PixelClassifier(function)
    assert modules_inside(lambda x: model(x) + model(x)) == [model]
    assert modules_inside(torch.relu) == []
    with pytest.raises(ValueError, match="got int"):
        PixelClassifier(3)


def test_the_fingerprint_follows_weights_and_preprocessing():
    model = network()
    first = PixelClassifier(model).fingerprint()
    assert first == PixelClassifier(model).fingerprint() and len(first) == 16
    different = [PixelClassifier(model, mean=(0.5,) * 3, std=(1.0,) * 3), PixelClassifier(model, input_size=(4, 4))]
    with torch.no_grad():
        other = network()
        other[4].bias[0] += 1e-3
    model.eval()
    prints = [c.fingerprint() for c in (*different, PixelClassifier(other))]
    assert len({first, *prints}) == 4
    assert PixelClassifier(lambda x: model(x)).fingerprint() != PixelClassifier(torch.relu).fingerprint()


def test_facts_are_plain_and_say_what_was_evaluated():
    facts = PixelClassifier(
        network(), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=8, name="mine", facts={"mode": "SLF"}
    ).facts()
    assert facts["name"] == "mine" and facts["parameters"] == 3 * 4 * 9 + 4 + 8 + 15 and facts["kind"] == "Sequential"
    assert facts["mean"] == [0.5] * 3 and facts["image_size"] == 8 and facts["mode"] == "SLF"
    assert "network_input_size" not in facts


class Served:
    """An object that is called, with its network inside."""

    def __init__(self, model):
        self.model = model

    def __call__(self, images):
        return self.model(images)

    def answers(self, images):
        return self.model(images)


SERVED = Served(network().eval())


def of_module(images):
    return sum(SERVED.model(part) for part in (images,))


def test_networks_are_found_wherever_a_function_keeps_them():
    first, second = network().eval(), network().eval()
    ensemble, served = [first, second], Served(first)
    later = lambda images: inner(images)  # noqa: E731
    inner = functools.partial(lambda model, images: model(images), second)
    for function, expected in (
        (lambda images: sum(model(images) for model in ensemble), ensemble),
        (lambda images: {"a": first, "b": second}["a"](images), ensemble),
        (served, [first]),
        (served.answers, [first]),
        (lambda images: served(images), [first]),
        (later, [second]),
        (of_module, [SERVED.model]),
        (lambda images: images.flatten(1), []),
    ):
        assert {*map(id, modules_inside(function))} == {*map(id, expected)}
    second.train()
    with pytest.raises(ValueError, match="network in training mode"):
        PixelClassifier(later)
