"""Backbones of the robust pre-training papers that stock timm lacks, registered with timm under names of their own.

Importing this module makes ``timm.create_model("resnet18_cifar")`` and the other names of [`ARCHITECTURES`] work. It
needs torch and timm only and refers to nothing else of the package, because it travels to the Hub next to the weights.
None of these networks normalises its input: pixels are in [0, 1] and mean/std are the business of the model around it.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, model_entrypoint, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "ARCHITECTURES",
    "CifarResNet",
    "WideResNet",
    "create_backbone",
    "native_architecture",
    "register_backbones",
]


class CifarResNet(ResNet):
    """timm's ResNet with the stem for small images: one 3x3 convolution of stride 1 and no pooling.

    A 32x32 image stays 32x32 up to the second stage. State-dict keys are those of timm's ResNet.

    Args:
        channels (`Sequence[int]`): Widths of the four stages; the stem is as wide as the first, which must be even.
            Defaults to (64, 128, 256, 512), ResNet-18's; (16, 32, 64, 128) gives a thin net.
        stem_stride (`int`): Stride of the 3x3 stem, 1 (the CIFAR stem) or 2 (a quarter of the cost). Defaults to 1.
        stem_padding (`int`): Padding of the 3x3 stem, 1 or 2 (DeACL's: a 32x32 image becomes 34x34). Defaults to 1.
        zero_init_last (`bool`): timm's zero start of the last norm of each block. Defaults to `False`, as released.
        **kwargs (`Any`): Passed on to timm's ResNet; `stem_type`, `stem_width` and `replace_stem_pool` are taken.

    Source: `models/resnet_multi_bn.py` of the released code of ACL, RCS and AIR (Kaiming fan-out convolutions, norm
    weight 1 and bias 0).
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_stride: int = 1,
        stem_padding: int = 1,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 (the CIFAR stem) or 2 (a cheaper net), got {stem_stride!r}")
        if stem_padding not in (1, 2):
            raise ValueError(f"stem_padding must be 1 (the CIFAR stem) or 2 (DeACL's), got {stem_padding!r}")
        if len(channels) != 4 or any(c < 1 for c in channels) or channels[0] % 2:
            raise ValueError(
                f"channels must be four positive widths, the first one even, got {channels!r}: "
                "write for example (16, 32, 64, 128)"
            )
        taken = {"stem_type", "stem_width", "replace_stem_pool"} & set(kwargs)
        if taken:
            raise ValueError(
                f"a CIFAR ResNet has a fixed stem, got {', '.join(sorted(taken))}: "
                "choose a stock timm ResNet (resnet18, resnet50d ...) to change the stem"
            )
        # Only timm's deep stem lets the caller choose the width of the first stage's input; its three convolutions
        # are replaced below.
        super().__init__(
            channels=tuple(channels),
            stem_type="deep",
            stem_width=channels[0] // 2,
            zero_init_last=zero_init_last,
            **kwargs,
        )
        stem = nn.Conv2d(self.in_chans, channels[0], 3, stride=stem_stride, padding=stem_padding, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self._modules.update(conv1=stem, maxpool=nn.Identity())
        infos: list[dict[str, Any]] = self.feature_info
        for info, reduction in zip(infos, (1, 1, 2, 4, 8), strict=True):
            info["reduction"] = reduction * stem_stride


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and ReLU, plus a shortcut (the basic block of wide ResNets).

    Args:
        in_chs (`int`): Input channels.
        out_chs (`int`): Output channels.
        stride (`int`): Stride of the first convolution. Defaults to 1.

    When the number of channels changes the 1x1 shortcut starts from the activated input, else the input is added as
    it is.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False) if in_chs != out_chs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(N, in_chs, H, W)` to `(N, out_chs, H / stride, W / stride)`."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class WideResNet(nn.Module):
    """Pre-activation wide ResNet for 32x32 images; the methods are those of every timm model.

    Args:
        depth (`int`): Number of layers, 6 n + 4. Defaults to 28.
        width (`int`): Multiplier of the stage widths 16, 32, 64. Defaults to 10.
        num_classes (`int`): Size of the classifier, 0 for none. Defaults to 1000, timm's.
        in_chans (`int`): Image channels. Defaults to 3.
        global_pool (`str`): timm's pooling type. Defaults to `"avg"`.
        drop_rate (`float`): Dropout probability before the classifier. Defaults to 0.0.

    Raises:
        ValueError: For a depth that is not 6 n + 4.

    Source: the ImageNet-32 network of the released code of RCS (WRN-28-10, global average pooling, no dropout).
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(
                f"a wide ResNet has depth 6 n + 4 (10, 16, 22, 28, 34 ...) and width >= 1, "
                f"got depth {depth} and width {width}: write depth=28, width=10"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        chs = 16
        self.conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False)
        self.feature_info = [{"num_chs": chs, "reduction": 1, "module": "conv1"}]
        for stage, stride in enumerate((1, 2, 2)):
            out_chs = 16 * 2**stage * width
            blocks = [PreActivationBlock(chs, out_chs, stride)]
            blocks += [PreActivationBlock(out_chs, out_chs) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": out_chs, "reduction": 2**stage, "module": f"layer{stage + 1}"})
            chs = out_chs
        self.norm = nn.BatchNorm2d(chs)
        self.num_features = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool)
        self.head_hidden_size = chs * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws the convolutions from N(0, 2 / (k^2 C_out)) and sets the classifier's bias to 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that sort parameters into stem and blocks, for layer-wise decay."""
        return {"stem": r"^conv1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each stage in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier (`nn.Identity` without classes), or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, or by none for 0 classes."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.to(device=self.conv1.weight.device, dtype=self.conv1.weight.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final map and the maps after stem and stages, each `(N, C_i, H_i, W_i)`; `norm` acts on the last one."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}: permute the maps yourself")
        wanted, last = feature_take_indices(4, indices)
        maps = []
        x = self.conv1(x)
        for index in range(4):
            if index > 0 and not (stop_early and index > last):
                x = getattr(self, f"layer{index}")(x)
            if index in wanted:
                maps.append(F.relu(self.norm(x)) if norm and index == 3 else x)
        if intermediates_only:
            return maps
        return F.relu(self.norm(x)) if not (stop_early and last < 3) else x, maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map `(N, 64 width, H / 4, W / 4)` of images `(N, C, H, W)`."""
        x = self.conv1(x)
        for name in ("layer1", "layer2", "layer3"):
            stage = self.get_submodule(name)
            x = checkpoint(stage, x, use_reentrant=False) if self.grad_checkpointing else stage(x)
        return F.relu(self.norm(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Class scores `(N, num_classes)` of a feature map; `(N, num_features)` with `pre_logits` or no classes."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores `(N, num_classes)` of images `(N, C, H, W)`, or pooled features without classes."""
        return self.forward_head(self.forward_features(x))


def _cfg(size: int, **changes: Any) -> dict[str, Any]:
    cfg = {
        "url": "",
        "num_classes": 10,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv1",
        "classifier": "fc",
        "fixed_input_size": False,
    }
    return {**cfg, **changes}


# name -> (class, constructor arguments, pretrained_cfg, how timm collects its feature maps)
_RECIPES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "resnet10_cifar": (CifarResNet, {"block": BasicBlock, "layers": (1, 1, 1, 1)}, _cfg(32), {}),
    "resnet18_cifar": (CifarResNet, {"block": BasicBlock, "layers": (2, 2, 2, 2)}, _cfg(32), {}),
    "resnet34_cifar": (CifarResNet, {"block": BasicBlock, "layers": (3, 4, 6, 3)}, _cfg(32), {}),
    "resnet50_cifar": (CifarResNet, {"block": Bottleneck, "layers": (3, 4, 6, 3)}, _cfg(32), {}),
    "resnet18_stl": (ResNet, {"block": BasicBlock, "layers": (2, 2, 2, 2), "zero_init_last": False}, _cfg(96), {}),
    "wide_resnet28_10": (WideResNet, {"depth": 28, "width": 10}, _cfg(32), {"out_indices": (0, 1, 2, 3)}),
    "vit_tiny_patch4_32": (
        VisionTransformer,
        {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3},
        _cfg(32, first_conv="patch_embed.proj", classifier="head", fixed_input_size=True),
        {"out_indices": 3, "feature_cls": "getter"},
    ),
}

#: Names registered with timm by this module.
ARCHITECTURES: tuple[str, ...] = tuple(_RECIPES)

default_cfgs = generate_default_cfgs({name: recipe[2] for name, recipe in _RECIPES.items()})

_RESERVED = ("checkpoint_path", "features_only", "num_classes", "pretrained", "pretrained_cfg")


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cls, defaults, _, feature_cfg = _RECIPES[name]
        options: dict[str, Any] = {**defaults, **kwargs}
        return build_model_with_cfg(cls, name, pretrained, feature_cfg=dict(feature_cfg), **options)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: see [`ARCHITECTURES`]."
    return build


def register_backbones() -> None:
    """Registers the architectures of this module with timm; does nothing for those that are registered already.

    A copy of this file loaded from the Hub and the installed package may both be imported: the first one stays. Should
    a later timm bring a network of the same name, ours replaces it, because checkpoints were written for ours.
    """
    for name in ARCHITECTURES:
        if is_model(name) and not model_entrypoint(name).__module__.startswith("timm."):
            continue
        entrypoint = _entrypoint(name)
        setattr(sys.modules[__name__], name, entrypoint)  # timm expects to find it in its module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            register_model(entrypoint)


def native_architecture(name: str, model_args: dict[str, Any] | None) -> tuple[str, dict[str, Any]] | None:
    """Stock timm name and arguments that build the same network without this package.

    Args:
        name (`str`): Architecture name.
        model_args (`dict[str, Any]`, *optional*): Arguments that the network was built with.

    Returns:
        `tuple[str, dict[str, Any]]` or `None`: `None` for networks that stock timm cannot build (CIFAR stems, wide
        ResNets); a stock timm name maps to itself.

    Raises:
        ValueError: For an unknown name; the message lists close matches.
    """
    _check_known(name)
    args = dict(model_args or {})
    if name == "resnet18_stl":
        args.pop("zero_init_last", None)  # only matters for a fresh network
        return "resnet18", args
    if name == "vit_tiny_patch4_32":
        return "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, **args}
    return None if name in ARCHITECTURES else (name, args)


def create_backbone(
    architecture: str, *, image_size: int | None = None, model_args: dict[str, Any] | None = None
) -> nn.Module:
    """A freshly initialised timm network without classifier.

    Args:
        architecture (`str`): Any timm name or one of [`ARCHITECTURES`].
        image_size (`int`, *optional*): Side of the images in pixels, for networks that are built for one size (vision
            transformers); others take any size. The architecture's own by default.
        model_args (`dict[str, Any]`, *optional*): Further arguments of the architecture; `img_size` in it wins.

    Returns:
        `nn.Module`: Maps images `(N, 3, H, W)` to features `(N, num_features)`.

    Raises:
        ValueError: For an unknown architecture, with close matches, or an argument that this function sets itself
            or the architecture does not know.
    """
    _check_known(architecture)
    args = dict(model_args or {})
    reserved = [key for key in _RESERVED if key in args]
    if reserved:
        raise ValueError(
            f"model_args may not contain {', '.join(reserved)}: a backbone is created without classifier and with "
            "fresh weights; remove the key"
        )
    cfg = timm.get_pretrained_cfg(architecture)
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        args.setdefault("img_size", image_size)
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, **args)
    except TypeError as error:  # timm hands every argument on to the network
        raise ValueError(f"{architecture} does not take model_args={args}: {error}") from error


def _check_known(architecture: str) -> None:
    if isinstance(architecture, str) and is_model(architecture):
        return
    close = difflib.get_close_matches(str(architecture), timm.list_models(), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"for example {', '.join(ARCHITECTURES)}"
    raise ValueError(
        f"unknown backbone {architecture!r}: it must be a timm architecture or one of ours; {hint} "
        "(timm.list_models() names them all)"
    )


register_backbones()
