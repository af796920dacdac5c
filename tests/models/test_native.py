"""A CIFAR ResNet and its re-expression on stock timm are the same function of the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from hf_robust.models.backbones import create_backbone
from hf_robust.models.native import UPSAMPLING, stock_architecture, to_stock_resnet

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WIDE = ("resnet10_cifar", {"channels": [64, 8, 8, 16]})
THIN = ("resnet10_cifar", {"channels": [16, 32, 64, 128]})


def used_backbone(architecture: str, model_args: dict[str, Any]) -> Any:
    """A backbone after a few training steps of its norm layers, in float64 and eval mode."""
    torch.manual_seed(0)
    backbone = create_backbone(architecture, model_args=model_args).double()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    return backbone.eval()


def images(size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """Pixels in [0, 1], a good part of them exactly 0 or 1, as after a clamped attack."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    return (2 * x - 0.5).clamp(0, 1)


def features_and_gradient(net: nn.Module, pixels: torch.Tensor, norm: dict[str, Any], scale: int) -> Any:
    x = pixels.clone().requires_grad_()
    mean = torch.tensor(norm.get("mean", (0.0, 0.0, 0.0)), dtype=x.dtype).view(-1, 1, 1)
    std = torch.tensor(norm.get("std", (1.0, 1.0, 1.0)), dtype=x.dtype).view(-1, 1, 1)
    features = net(F.interpolate((x - mean) / std, scale_factor=scale, mode="nearest"))
    weights = torch.linspace(-1, 1, features.shape[1], dtype=x.dtype)
    return features.detach(), torch.autograd.grad((features * weights).sum(), x)[0]


@pytest.mark.parametrize("norm", [{}, IMAGENET, {"mean": (0.9, 0.5, 0.1), "std": (0.05, 0.1, 0.2)}])
@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        WIDE,
        THIN,
        ("resnet10_cifar", {"channels": [8, 8, 8, 8]}),
        ("resnet10_cifar", {"channels": [96, 8, 8, 8], "drop_path_rate": 0.1, "zero_init_last": True}),
        ("resnet18_cifar", {"channels": [10, 8, 8, 8]}),
        ("resnet34_cifar", {"channels": [8, 8, 8, 8]}),
        ("resnet50_cifar", {"channels": [16, 8, 8, 8]}),
        ("resnet50_cifar", {"channels": [64, 8, 8, 8]}),
    ],
)
def test_same_features_and_input_gradients_in_float64(architecture, model_args, norm):
    backbone = used_backbone(architecture, model_args)
    net = to_stock_resnet(backbone, architecture, model_args, **norm)
    expected, gradient = features_and_gradient(backbone, images(), norm, 1)
    found, native_gradient = features_and_gradient(net, images(), norm, UPSAMPLING)
    assert expected.abs().max() > 0.1 and gradient.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(native_gradient, gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("architecture", "model_args"), [WIDE, THIN])
def test_it_is_what_stock_timm_builds_and_holds_in_float32_for_any_size(architecture, model_args):
    backbone = used_backbone(architecture, model_args).float()
    net = to_stock_resnet(backbone, architecture, model_args, **IMAGENET)
    name, args = stock_architecture(architecture, model_args)
    assert "cifar" not in name
    stock = timm.create_model(name, num_classes=0, **args).eval()
    stock.load_state_dict(net.state_dict())
    x = images((20, 12)).float()
    expected, _ = features_and_gradient(backbone, x, IMAGENET, 1)
    found, _ = features_and_gradient(stock, x, IMAGENET, UPSAMPLING)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_the_full_width_network_is_a_plain_resnet18():
    assert stock_architecture("resnet18_cifar", {}) == ("resnet18", {"replace_stem_pool": True})
    net = to_stock_resnet(create_backbone("resnet18_cifar"), "resnet18_cifar", {}, **IMAGENET)
    assert net.conv1.weight.shape == (64, 3, 7, 7)
    assert (net.bn1.bias == 4).sum() == 27  # one copying channel per colour and neighbour
    assert net.conv1.weight.count_nonzero() == 27


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("resnet18_cifar", {"channels": [6, 8, 8, 8]}),
        ("resnet18_cifar", {"act_layer": "gelu"}),
        ("resnet18_cifar", {"in_chans": 1}),
        ("wide_resnet28_10", {"depth": 10, "width": 1}),
        ("resnet18_stl", {}),
    ],
)
def test_what_stock_timm_cannot_carry_is_refused(architecture, model_args):
    assert stock_architecture(architecture, model_args) is None
    assert to_stock_resnet(create_backbone(architecture, model_args=model_args), architecture, model_args) is None


def test_neither_the_backbone_nor_the_random_numbers_change():
    backbone = used_backbone(*THIN).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    to_stock_resnet(backbone, *THIN, **IMAGENET)
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
