"""Gradients of the head against autograd on the module itself, and the released signature."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from selection_task import linear_parameters, live_in, plain_gradient
from torch import Tensor, nn
from training import tiny_model

from hf_robust.attacks import frozen
from hf_robust.coresets.head import Head
from hf_robust.losses import nt_xent, representational_distance
from hf_robust.models.modeling import Projector
from hf_robust.models.norm import BranchSwitch, add_norm_branches
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.sat import SAT


def projector_model(width: int = 8, layers: int = 3):
    torch.manual_seed(2)
    switch, projector = BranchSwitch(("clean", "adv")), Projector(width, width, layers)
    add_norm_branches(projector, switch=switch)
    return SimpleNamespace(head_module=live_in(projector).eval(), switch=switch)


def classifier_model(width: int = 16, classes: int = 10):
    torch.manual_seed(2)
    return SimpleNamespace(head_module=nn.Linear(width, classes), switch=BranchSwitch(("adv",)))


def features(n: int = 12, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def labels(n: int = 12) -> Tensor:
    return torch.arange(n) % 3


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_gradient_of_the_projector_is_that_of_its_parameters(branch):
    model = live_in(tiny_model(ACL()))
    found = []
    with frozen(model):
        head = Head(model)
        found.append(head.gradient(lambda out: nt_xent(*out(branch, features()).chunk(2)), head.weights))
    model.eval()
    expected = plain_gradient(model, nt_xent(*model.head(features(), branch).chunk(2)))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-7)
    assert head.length == expected.numel() == 3 * 8 * 8 + 8
    parts = head.unflatten(found[0])
    assert list(parts) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc3.weight"]
    assert all(part.norm() > 0 for part in parts.values())


def test_gradient_through_both_branches_at_once():
    model = live_in(tiny_model(ACL())).eval()
    head = Head(model)
    clean, adversarial = features(seed=1), features(seed=2)
    found = head.gradient(
        lambda out: representational_distance(out("clean", clean), out("adv", adversarial)), head.weights
    )
    loss = representational_distance(model.head(clean, "clean"), model.head(adversarial, "adv"))
    torch.testing.assert_close(found, plain_gradient(model, loss), rtol=1e-4, atol=1e-7)


def test_gradient_of_the_classifier_is_that_of_its_parameters():
    model = tiny_model(SAT()).eval()
    head = Head(model)
    found = head.gradient(lambda out: F.cross_entropy(out("adv", features()), labels()), head.weights)
    torch.testing.assert_close(
        found, plain_gradient(model, F.cross_entropy(model.head(features(), "adv"), labels())), rtol=1e-4, atol=1e-7
    )
    assert list(head.weights) == ["weight", "bias"] and head.length == 3 * 8 + 3


def test_gradient_at_other_weights_is_that_of_a_module_with_these_weights():
    model = projector_model()
    head = Head(model)
    moved = head.step(head.weights, torch.linspace(-1, 1, head.length), 0.7)
    found = head.gradient(lambda out: out("adv", features()).square().mean(), moved)
    with torch.no_grad():
        for parameter, value in zip(linear_parameters(model), moved.values(), strict=True):
            parameter.copy_(value)
    model.switch.branch = "adv"
    expected = plain_gradient(model, model.head_module(features()).square().mean())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_other_weights_leave_the_module_alone():
    model = projector_model()
    head, before = Head(model), {k: v.clone() for k, v in model.head_module.state_dict().items()}
    pointers = [p.data_ptr() for p in model.head_module.parameters()]
    moved = head.step(head.weights, torch.ones(head.length), 0.5)
    own, other = head.outputs(head.weights)("adv", features()), head.outputs(moved)("adv", features())
    head.gradient(lambda out: out("clean", features()).sum(), moved)
    head.directional(lambda out: out("adv", features()).sum(1), moved, torch.ones(head.length))
    assert not torch.allclose(own, other)
    assert all(torch.equal(v, before[k]) for k, v in model.head_module.state_dict().items())
    assert [p.data_ptr() for p in model.head_module.parameters()] == pointers
    assert all(p.grad is None for p in model.head_module.parameters())
    assert model.switch.branch == "clean"
    for value, parameter in zip(head.weights.values(), linear_parameters(model), strict=True):
        assert torch.equal(value, parameter)


def test_a_step_goes_against_the_gradient():
    head = Head(projector_model())
    gradient = torch.arange(head.length).float()
    moved = head.step(head.weights, gradient, 0.25)
    flat = torch.cat([v.flatten() for v in moved.values()]) - torch.cat([v.flatten() for v in head.weights.values()])
    torch.testing.assert_close(flat, -0.25 * gradient)


def contrastive(out) -> Tensor:
    z, z_adv = out("clean", features(seed=1)).chunk(2), out("adv", features(seed=2)).chunk(2)
    return (nt_xent(*z, reduction="none") + nt_xent(*z_adv, reduction="none")) / 2


def supervised(out) -> Tensor:
    return F.cross_entropy(out("adv", features(width=16)), labels(), reduction="none")


@pytest.mark.parametrize("make, loss", [(projector_model, contrastive), (classifier_model, supervised)])
def test_directional_is_the_inner_product_with_the_gradient_of_every_loss(make, loss):
    head = Head(make())
    direction = torch.randn(head.length, generator=torch.Generator().manual_seed(7))
    found = head.directional(loss, head.weights, direction)
    count = len(loss(head.outputs(head.weights)))
    slow = [head.gradient(lambda out, k=k: loss(out)[k], head.weights) @ direction for k in range(count)]
    torch.testing.assert_close(found, torch.stack(slow), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01  # they do differ


def test_directional_is_the_jacobian_times_the_direction():
    """The same by torch.func, which writes all gradients out."""
    head = Head(classifier_model())
    direction = torch.randn(head.length, generator=torch.Generator().manual_seed(7))
    jacobians = torch.func.jacrev(lambda weights: supervised(head.outputs(weights)))(head.weights)
    gradients = torch.cat([jacobian.flatten(1) for jacobian in jacobians.values()], dim=1)
    found = head.directional(supervised, head.weights, direction)
    torch.testing.assert_close(found, gradients @ direction, rtol=1e-4, atol=1e-5)


def test_row_means_average_over_the_outputs_of_every_layer():
    head = Head(projector_model())
    gradients = torch.randn(5, head.length, generator=torch.Generator().manual_seed(1))
    found = head.row_means(gradients)
    for row, gradient in zip(found, gradients, strict=True):
        slow = []
        for part in head.unflatten(gradient).values():
            if part.dim() == 1:
                slow.append(sum(part.tolist()) / len(part))
                continue
            for column in range(part.shape[1]):
                slow.append(sum(part[r, column].item() for r in range(part.shape[0])) / part.shape[0])
        torch.testing.assert_close(row, torch.tensor(slow), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "model, length, signature",
    [
        (lambda: projector_model(512), 3 * 512 * 512 + 512, 1537),  # ResNet-18
        (lambda: projector_model(640, layers=2), 2 * 640 * 640 + 640, 1281),  # WRN-28-10, contrastive
        (lambda: classifier_model(640, 1000), 641_000, 641),  # WRN-28-10, supervised
    ],
)
def test_lengths_of_the_released_signatures(model, length, signature):
    head = Head(model())
    assert head.length == length
    assert head.row_means(torch.zeros(1, length)).shape == (1, signature)


def test_the_released_signature_of_softmax_cross_entropy_is_rounding_noise():
    """Over the classes the gradient adds up to zero, that of the divergence between two softmaxes as well."""
    head = Head(classifier_model(64, 10))
    clean, x = features(32, 64, seed=3), features(32, 64, seed=4)
    candidate = head.gradient(lambda out: F.cross_entropy(out("adv", x), torch.arange(32) % 10), head.weights)
    validation = head.gradient(
        lambda out: representational_distance(out("adv", clean), out("adv", clean + 0.3 * x)), head.weights
    )
    for gradient in (candidate, validation):
        assert gradient.norm() > 1e-3
        assert head.row_means(gradient[None]).norm() < 1e-6 * gradient.norm()
    assert candidate @ validation / candidate.norm() / validation.norm() > 0.01
    embedding = Head(projector_model())
    contrast = embedding.gradient(lambda out: contrastive(out).mean(), embedding.weights)
    assert embedding.row_means(contrast[None]).norm() > 1e-3 * contrast.norm()  # a projector's does not vanish
