"""Exact re-expression of a CIFAR-stem ResNet as a network that stock timm builds, for readers without this package.

Stock timm ResNets halve the image twice before the first stage. Fed with the image enlarged four times (nearest
neighbour) such a stem can still compute the 3x3 stride-1 convolution of a CIFAR stem exactly: its first layers copy
pixels, and the convolution that replaces the pooling (`replace_stem_pool`) finishes the sum. All layers after the stem
keep their weights and names. The result holds in eval mode; training mode would renormalise the copying channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

__all__ = ["UPSAMPLING", "stock_architecture", "to_stock_resnet"]

#: How many times the image is enlarged (nearest neighbour) before it enters the re-expressed network.
UPSAMPLING = 4

_STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet10_cifar": ("resnet18", {"layers": [1, 1, 1, 1]}),
    "resnet18_cifar": ("resnet18", {}),
    "resnet34_cifar": ("resnet34", {}),
    "resnet50_cifar": ("resnet50", {}),
}

# These change the layers that the copying relies on (ReLU, batch norm, a plain strided convolution, three colours).
_UNSUPPORTED = ("act_layer", "norm_layer", "aa_layer", "in_chans", "block_args")

# Colours and one constant channel must pass the two narrow layers of timm's deep stem.
_DEEP_STEM_CHANNELS = 4

# 7x7 taps of stride 2 that read pixel o - 1, o and o + 1 of the original at position 2 o + 1 of the halved image.
_TAPS = (0, 3, 5)

# The copied pixels are lifted by this constant before a ReLU and lowered again in the norm behind it. Pixels that are
# never negative need it too: a ReLU at exactly 0 has gradient 0, which would hide black pixels from attacks.
_SHIFT = 4.0


def stock_architecture(
    architecture: str, model_args: dict[str, Any] | None = None
) -> tuple[str, dict[str, Any]] | None:
    """Stock timm name and arguments of the network that can carry a CIFAR-stem ResNet exactly.

    Args:
        architecture (`str`): Architecture name.
        model_args (`dict[str, Any]`, *optional*): Arguments that the network was built with.

    Returns:
        `tuple[str, dict[str, Any]]` or `None`: `None` when there is no such network: other architectures, a stem of
        fewer than 8 channels, or another activation, norm or number of image channels.
    """
    args = {key: value for key, value in (model_args or {}).items() if value is not None}
    if architecture not in _STOCK or any(key in args for key in _UNSUPPORTED):
        return None
    if args.pop("stem_stride", 1) != 1 or args.pop("stem_padding", 1) != 1:
        return None
    args.pop("zero_init_last", None)  # only matters for a fresh network
    name, defaults = _STOCK[architecture]
    stem = args.get("channels", (64,))[0]
    args = {**defaults, **args, "replace_stem_pool": True}
    if stem == 64:
        return name, args
    if stem // 2 < _DEEP_STEM_CHANNELS:
        return None
    return name, {**args, "stem_type": "deep", "stem_width": stem // 2}


@torch.no_grad()
def to_stock_resnet(
    backbone: nn.Module,
    architecture: str,
    model_args: dict[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module | None:
    """The stock timm network that computes the same features from the four times enlarged image.

    Args:
        backbone (`nn.Module`): CIFAR-stem ResNet without classifier and with plain norm layers; it is not changed.
        architecture (`str`): Its name.
        model_args (`dict[str, Any]`, *optional*): Arguments that it was built with.
        mean (`Sequence[float]`, *optional*): Input normalisation of the images that `backbone` takes, for pixels in
            [0, 1]; it only sets how far the copied pixels are shifted. Defaults to none.
        std (`Sequence[float]`, *optional*): Likewise.

    Returns:
        `nn.Module` or `None`: Network in eval mode with the data type of `backbone`; it maps the same normalised
        images, enlarged by [`UPSAMPLING`], to features `(N, num_features)` equal up to rounding. `None` when stock
        timm has no such network.
    """
    stock = stock_architecture(architecture, model_args)
    if stock is None:
        return None
    name, args = stock
    source: Any = backbone
    with torch.random.fork_rng(devices=[]):  # the fresh weights are all replaced: leave the caller's RNG alone
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, **args).double().eval()
    stem = ("conv1.", "bn1.", "maxpool.")
    rest = {key: value for key, value in source.state_dict().items() if not key.startswith(stem)}
    missing, unexpected = net.load_state_dict(rest, strict=False)
    if unexpected or any(not key.startswith(stem) for key in missing):
        return None
    shift = max(_SHIFT, math.ceil(1.5 * _largest_pixel(mean, std)))
    kernel = source.conv1.weight.detach().double().cpu()
    fill = _fill_deep_stem if "stem_type" in args else _fill_wide_stem
    lifted = fill(net, kernel, shift)
    # The norm of the CIFAR stem moves behind the second convolution, where it takes the shift away again.
    net.maxpool[1].load_state_dict(source.bn1.state_dict())
    net.maxpool[1].running_mean += lifted
    return net.to(source.conv1.weight.dtype)


def _largest_pixel(mean: Sequence[float] | None, std: Sequence[float] | None) -> float:
    mean, std = mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)
    return max(max(abs(m), abs(1 - m)) / s for m, s in zip(mean, std, strict=True))


def _identity_norm(norm: Any, bias: float | torch.Tensor) -> None:
    # eval mode: (x - 0) / sqrt(1 - eps + eps) + bias
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.fill_(1)
    norm.bias.copy_(torch.as_tensor(bias).expand_as(norm.bias))


def _fill_wide_stem(net: Any, kernel: torch.Tensor, shift: float) -> torch.Tensor:
    """7x7 stem: 27 of 64 channels copy one colour of one neighbour each, the second convolution weights them.

    Returns what the shift adds to each output `(64,)`.
    """
    first, second = net.conv1.weight.zero_(), net.maxpool[0].weight.zero_()
    copies = [(c, a, b) for c in range(3) for a in range(3) for b in range(3)]
    for channel, (c, a, b) in enumerate(copies):
        first[channel, c, _TAPS[a], _TAPS[b]] = 1
        second[:, channel, 2, 2] = kernel[:, c, a, b]
    bias = torch.zeros(first.shape[0], dtype=first.dtype)
    bias[: len(copies)] = shift
    _identity_norm(net.bn1, bias)
    return shift * kernel.sum(dim=(1, 2, 3))


def _fill_deep_stem(net: Any, kernel: torch.Tensor, shift: float) -> torch.Tensor:
    """3x3 stem of any even width from 8 on: copy colours, convolve at double resolution, add up 2x2 positions.

    In one dimension the doubled image holds each pixel twice. A kernel `K` at its positions 2 o and 2 o + 1, added up,
    reads `K[-1] x[o-1] + (K[-1] + 2 K[0] + K[1]) x[o] + K[1] x[o+1]`, so that any three taps can be reached.

    Returns what the shift adds to each output `(width,)`.
    """
    width = net.conv1[0].out_channels
    outer = torch.eye(3, dtype=kernel.dtype)
    outer[1] = torch.tensor([-0.5, 0.5, -0.5], dtype=kernel.dtype)
    doubled = torch.einsum("ai,bj,ocij->ocab", outer, outer, kernel)

    # Channels 0-2 hold the shifted colours. Channel 3 holds the shift alone: subtracted with the same kernel it also
    # sees the zero padding at the border, where the lifted colours would otherwise be wrong.
    bias = torch.zeros(width, dtype=kernel.dtype)
    bias[:_DEEP_STEM_CHANNELS] = shift
    first, second, third = (net.conv1[i].weight.zero_() for i in (0, 3, 6))
    for channel in range(3):
        first[channel, channel, 1, 1] = 1
    _identity_norm(net.conv1[1], bias)
    for channel in range(_DEEP_STEM_CHANNELS):
        second[channel, channel, 1, 1] = 1
    _identity_norm(net.conv1[4], 0.0)
    third[:, :3] = doubled
    third[:, 3] = -doubled.sum(dim=1)

    # No pixel is larger than the shift, so this bias keeps every sum positive.
    lift = shift * doubled.abs().sum(dim=(1, 2, 3))
    _identity_norm(net.bn1, lift)
    pool = net.maxpool[0].weight.zero_()
    for channel in range(pool.shape[0]):
        pool[channel, channel, 1:, 1:] = 1
    return 4 * lift
