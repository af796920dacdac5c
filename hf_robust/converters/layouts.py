"""Two layouts of the published networks, residual and wide residual: foreign keys to timm's, shapes to arguments."""

from __future__ import annotations

import re
from typing import Any

import torch

__all__ = ["describe_resnet", "describe_wide_resnet", "is_resnet", "is_wide_resnet", "resnet_keys", "wide_resnet_keys"]

Tensors = dict[str, torch.Tensor]

_RENAMED = (
    (r"downsample\.conv\.", "downsample.0."),
    (r"downsample\.bn\.", "downsample.1."),
    (r"\.shortcut\.", ".downsample."),
    (r"^linear\.", "fc."),
)
_WIDE_RENAMED = (
    (r"^block(\d)\.layer\.", r"layer\1."),
    (r"\.convShortcut\.", ".downsample."),
    (r"^bn1\.", "norm."),
    (r"^linear\.", "fc."),
)
_WIDTHS = (64, 128, 256, 512)
# others are resnet18 or resnet50, with layers in their arguments
_DEPTHS: dict[tuple[str, tuple[int, ...]], str] = {("basic", (3, 4, 6, 3)): "resnet34"}
_LAYERS: dict[str, tuple[int, ...]] = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


def is_resnet(tensors: Tensors) -> bool:
    """Whether the keys are those of a residual network with four stages, under any of the usual names."""
    return {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= set(tensors)


def is_wide_resnet(tensors: Tensors) -> bool:
    """Whether the keys are those of the wide residual network that TRADES released."""
    return {"conv1.weight", "block1.layer.0.conv1.weight", "block3.layer.0.conv1.weight"} <= set(tensors)


def resnet_keys(tensors: Tensors) -> Tensors:
    """Keys of residual networks as timm has them: `downsample.0`, `downsample.1`, `fc`."""
    return _renamed(tensors, _RENAMED)


def wide_resnet_keys(tensors: Tensors) -> Tensors:
    """Keys of wide residual networks as `wide_resnet28_10` has them: `layer1.0`, `downsample`, `norm`, `fc`."""
    return _renamed(tensors, _WIDE_RENAMED)


def _renamed(tensors: Tensors, table: tuple[tuple[str, str], ...]) -> Tensors:
    out: Tensors = {}
    for key, value in tensors.items():
        new = key
        for pattern, replacement in table:
            new = re.sub(pattern, replacement, new)
        if new in out:
            raise ValueError(f"two tensors would be called {new}, one of them {key}: the file mixes two layouts")
        out[new] = value
    return out


def describe_resnet(tensors: Tensors) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments of a residual network, read from its shapes.

    Args:
        tensors (`dict[str, torch.Tensor]`): With timm's keys and plain norm layers.

    Returns:
        `tuple[str, dict[str, Any]]`: `resnet18_cifar` and the like for a 3x3 stem, timm's own names for a 7x7 one.

    Raises:
        ValueError: For a stem of another kind, or when a stage is missing.
    """
    layers = tuple(_blocks(tensors, f"layer{stage}") for stage in range(1, 5))
    kind = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic"
    name = _DEPTHS.get((kind, layers), "resnet50" if kind == "bottleneck" else "resnet18")
    if kind == "bottleneck":
        widths = tuple(_shape(tensors, f"layer{stage}.0.conv3.weight")[0] // 4 for stage in range(1, 5))
    else:
        widths = tuple(_shape(tensors, f"layer{stage}.0.conv1.weight")[0] for stage in range(1, 5))
    args: dict[str, Any] = {}
    if layers != _LAYERS[name]:
        args["layers"] = list(layers)
    if widths != _WIDTHS:
        args["channels"] = list(widths)
    if kind == "bottleneck":
        inner, per_group = _shape(tensors, "layer1.0.conv2.weight")[:2]
        cardinality = inner // per_group
        base_width = 64 * inner // (widths[0] * cardinality)
        args |= {"cardinality": cardinality} if cardinality != 1 else {}
        args |= {"base_width": base_width} if base_width != 64 else {}
    side = _shape(tensors, "conv1.weight")[-1]
    if side not in (3, 7):
        raise ValueError(
            f"the first layer is a {side}x{side} convolution: known stems are 3x3 (32x32 images) and 7x7 (larger)"
        )
    return (f"{name}_cifar" if side == 3 else name), args


def describe_wide_resnet(tensors: Tensors) -> tuple[str, dict[str, Any]]:
    """`wide_resnet28_10` with depth and width of a wide residual network, read from its shapes.

    Raises:
        ValueError: When a group is missing, or convolutions have biases (another network).
    """
    if "conv1.bias" in tensors or "layer1.0.conv1.bias" in tensors:
        raise ValueError(
            "the convolutions of this wide ResNet have biases (conv1.bias): it is another network, with leaky ReLU "
            "and another eps in its norm layers, which is not among the architectures here; convert a ResNet-18"
        )
    blocks = _blocks(tensors, "layer1")
    width = _shape(tensors, "layer1.0.conv1.weight")[0] // 16
    depth = 6 * blocks + 4
    args = {} if (depth, width) == (28, 10) else {"depth": depth, "width": width}
    return "wide_resnet28_10", args


def _blocks(tensors: Tensors, stage: str) -> int:
    found = [int(match[1]) for key in tensors if (match := re.match(rf"{stage}\.(\d+)\.", key))]
    if not found:
        raise ValueError(f"no tensor of {stage} is in the file: check that it is whole, and of this format")
    return max(found) + 1


def _shape(tensors: Tensors, key: str) -> torch.Size:
    if key not in tensors or tensors[key].ndim != 4:
        got = "nothing" if key not in tensors else f"a tensor {tuple(tensors[key].shape)}"
        raise ValueError(f"{key} must be a convolution, got {got}: check that the file is whole, and of this format")
    return tensors[key].shape
