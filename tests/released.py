"""Small networks whose norm branches have seen different images, to be written out and read again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

# name -> configuration; `stock` are those that timm builds without us
STOCK: dict[str, dict[str, Any]] = {
    "stl": {"architecture": "resnet18_stl", "model_args": {"channels": (8, 8, 8, 16)}, "image_size": 96},
    "vit": {"architecture": "vit_tiny_patch4_32", "model_args": {"depth": 1, "embed_dim": 24}, "image_size": 16},
    "timm": {"architecture": "test_efficientnet", "image_size": 48, "mean": None, "std": None},
}
OURS: dict[str, dict[str, Any]] = {
    "thin": {"architecture": "resnet10_cifar", "model_args": {"channels": (16, 32, 64, 128)}, "image_size": 16},
    "wide": {"architecture": "resnet18_cifar", "model_args": {"channels": (64, 8, 8, 8)}, "image_size": 16},
    "tiny": {"architecture": "resnet10_cifar", "model_args": {"channels": (4, 8, 8, 8)}, "image_size": 16},
    "wrn": {"architecture": "wide_resnet28_10", "model_args": {"depth": 10, "width": 1}, "image_size": 16},
}
NATIVE = ("thin", "wide")


def trained_model(**config: Any) -> RobustModelForPreTraining:
    """A model whose branches have seen different images and learned different scales."""
    torch.manual_seed(0)
    model = RobustModelForPreTraining(RobustPretrainingConfig(**config))
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    model.train()
    size = model.config.image_size
    with torch.no_grad():
        for _ in range(3):
            model([("clean", torch.rand(8, 3, size, size)), ("adv", torch.rand(8, 3, size, size) ** 3)])
    return model.eval()


def pictures(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def pixels(size: int) -> torch.Tensor:
    """The same pictures as the training model takes them: `(2, 3, size, size)` in [0, 1]."""
    return torch.from_numpy(pictures(size)).permute(0, 3, 1, 2).float() / 255
