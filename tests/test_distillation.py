"""Distances to a frozen teacher: slow transcriptions, a number computed independently, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hf_robust.distillation import deacl_terms, mean_cosine, mean_squared_distance


def wave(function, frequency, *shape):
    """Row-major, float64."""
    return function(frequency * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(*shape)


@pytest.fixture
def features():
    """Of a student on clean and on adversarial images, and of a teacher on clean ones."""
    return wave(torch.sin, 0.7, 4, 6), wave(torch.cos, 0.9, 4, 6), wave(torch.sin, 1.3, 4, 6)


def slow_cosines(a, b):
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return [sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v)) for u, v in pairs]


def slow_deacl(z, z_adv, z_teacher, weight):
    """Zhang et al. 2022, image by image."""
    near, robust = slow_cosines(z, z_teacher), slow_cosines(z_adv, z)
    return -sum(near) / len(near), -weight * sum(robust) / len(robust)


def differences(function, tensors, step=1e-6):
    """Gradient of a sum with respect to each tensor, by central differences."""
    out = []
    for which, tensor in enumerate(tensors):
        gradient = torch.zeros_like(tensor)
        for k in range(tensor.numel()):
            values = []
            for sign in (1, -1):
                moved = [t.clone() for t in tensors]
                moved[which].view(-1)[k] += sign * step
                values.append(function(*moved))
            gradient.view(-1)[k] = (values[0] - values[1]) / (2 * step)
        out.append(gradient)
    return out


def test_deacl_is_the_number_that_was_computed_independently(features):
    assert sum(deacl_terms(*features)).item() == pytest.approx(0.175173542142, abs=1e-12)


@pytest.mark.parametrize("weight", [2.0, 0.5])
def test_deacl_is_the_slow_equation(features, weight):
    terms = deacl_terms(*features, weight)
    assert [term.item() for term in terms] == pytest.approx(slow_deacl(*features, weight), rel=1e-12)


def test_the_gradient_of_deacl_reaches_clean_features_through_both_terms(features):
    z, z_adv, z_teacher = features
    leaves = [z.clone().requires_grad_(), z_adv.clone().requires_grad_()]
    sum(deacl_terms(*leaves, z_teacher)).backward()
    expected = differences(lambda a, b: sum(slow_deacl(a, b, z_teacher, 2.0)), [z, z_adv])
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-7, rtol=1e-5)
    alone = z.clone().requires_grad_()
    deacl_terms(alone, z_adv, z_teacher)[1].backward()
    assert alone.grad.norm() > 0.01


def test_the_best_value_is_reached_where_all_agree_in_direction():
    z = torch.randn(3, 5)
    clean, adversarial = deacl_terms(z, 3 * z, 7 * z)
    assert (clean.item(), adversarial.item()) == pytest.approx((-1, -2), abs=1e-6)


def test_squared_distance_by_hand_and_its_gradient():
    z = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    distance = mean_squared_distance(z, torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    assert distance.item() == pytest.approx((4 + 25) / 2)
    distance.backward()
    torch.testing.assert_close(z.grad, torch.tensor([[0.0, 2.0], [-3.0, -4.0]]))


@pytest.mark.parametrize("function", [mean_cosine, mean_squared_distance])
def test_half_precision_loses_no_digits_beyond_those_of_its_arguments(function):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 64, generator=generator).bfloat16()
    other = (z.float() + 0.05 * torch.randn(8, 64, generator=generator)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(z, other)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(function(z.double(), other.double()).item(), rel=1e-5)


@pytest.mark.parametrize("function", [mean_cosine, mean_squared_distance])
def test_features_of_another_shape_are_refused(function):
    for other in (torch.zeros(4, 3), torch.zeros(1, 6), torch.zeros(4, 6, 1)):
        with pytest.raises(ValueError, match=r"of one shape, got \(4, 6\) and .*: take a student as wide"):
            function(torch.zeros(4, 6), other)
