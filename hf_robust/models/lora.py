"""Low-rank adapters (LoRA) of PEFT in a backbone: a second path for natural images, or all that trains.

AutoLoRa keeps two paths over one encoder: natural images pass the adapted layers, adversarial images the plain ones,
and each loss trains its own part; the adapters are thrown away afterwards. Adversarial LoRA fine-tuning is the other
way round: the encoder stands still, adapters and head train, and only they are saved. `hf_robust.adapters` makes these
models from plain ones and takes the adapters out again.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig

from .modeling import RobustModelForPreTraining, RobustPretrainingConfig
from .norm import use_branch

__all__ = ["AdaptedConfig", "AdapterModel", "LoraPathModel", "is_lora", "lora_scales", "lora_targets"]

logger = logging.getLogger(__name__)

ADAPTER = "default"  # PEFT's name of an only adapter; part of the keys of a state dict
LORA_PATH = "lora"
# Few numbers pass here whatever the width of the network: squeeze-and-excitation, position tables of Swin V2.
_BYWAYS = {"se", "cpb_mlp"}


class AdaptedConfig(RobustPretrainingConfig):
    """Configuration of a model whose backbone carries adapters.

    A model type of its own tells a checkpoint of it from one of a plain model, whose weights have other names.

    Args:
        lora_rank (`int`): Rank of every adapter. Defaults to 8, as released.
        lora_alpha (`float`, *optional*): Scale of the adapters times the rank; the rank itself by default. Without
            effect with `lora_init="matched"`, which sets one per layer.
        lora_init (`str`): `"matched"` or `"peft"` (the default), see `adapters.with_lora_path`.
        norm_update (`str`): `"both"` (the default) or `"plain_only"`, see `adapters.with_lora_path`.

    Raises:
        ValueError: For a rank below 1, an alpha that is not positive or an unknown choice.
    """

    model_type = "hf_robust_adapted"

    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_init: Literal["matched", "peft"] = "peft"
    norm_update: Literal["both", "plain_only"] = "both"

    def __post_init__(self, **kwargs: Any) -> None:
        _check_rank(self.lora_rank)
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"alpha must be positive, got {self.lora_alpha}: leave it out for alpha = rank")
        if self.lora_init not in ("matched", "peft"):
            raise ValueError(
                f"init must be 'matched' or 'peft', got {self.lora_init!r}: 'matched' learns at the speed of the "
                "released AutoLoRa, 'peft' is PEFT's own start"
            )
        if self.norm_update not in ("both", "plain_only"):
            raise ValueError(
                f"norm_update must be 'both' or 'plain_only', got {self.norm_update!r}: the released AutoLoRa lets "
                "both paths move the running statistics"
            )
        super().__post_init__(**kwargs)


def lora_targets(backbone: nn.Module, rank: int) -> list[str]:
    """Layers inside the blocks of a network that get an adapter: convolutions, shortcuts included, and linear layers.

    Left out are the stem (first convolution or patch embedding) and the classifier, and with one logged line what PEFT
    cannot adapt: dilated convolutions, grouped ones unless the groups divide the rank, layers of a kind of their own
    (weight-standardised convolutions), projections whose weight attention reads directly, and squeeze-and-excitation
    layers that are smaller than the rank.

    Args:
        backbone (`nn.Module`): timm network, with or without norm branches.
        rank (`int`): Rank of the adapters, at least 1.

    Returns:
        `list[str]`: Names in the order of the network; 19 for a ResNet-18.

    Raises:
        ValueError: When the rank is larger than a layer allows, or no layer can be adapted.
    """
    _check_rank(rank)
    outside, reads = _outside_blocks(backbone), _read_directly(backbone)
    targets: dict[str, nn.Conv2d | nn.Linear] = {}
    skipped: list[str] = []
    for name, layer in backbone.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or any(re.match(pattern, name) for pattern in outside):
            continue
        reason = "attention reads its weight" if name in reads else _obstacle(name, layer, rank)
        if reason is None:
            targets[name] = layer
        else:
            skipped.append(f"{name} ({reason})")
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        logger.info("no adapter for %s%s", ", ".join(skipped[:3]), more)
    if not targets:
        found = f"all were left out: {', '.join(skipped[:3])}" if skipped else "it has none outside stem and head"
        raise ValueError(
            f"LoRA adapts plain Conv2d and Linear layers, and this {type(backbone).__name__} offers none ({found}): "
            "fine-tune all of it with --mode aff, or take another backbone"
        )
    _check_rank_fits(targets, rank)
    return list(targets)


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number, 1 or more, got {rank!r}: the published value is 8")


def _outside_blocks(backbone: Any) -> list[str]:
    """Patterns of names, from the start, of stem and classifier, as timm documents them for its networks."""
    patterns: list[str] = []
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    for names in (cfg.get("first_conv"), cfg.get("classifier")):
        names = (names,) if isinstance(names, str) else names or ()
        patterns += [re.escape(name) + r"(\.|$)" for name in names]
    stem = backbone.group_matcher(coarse=True).get("stem") if hasattr(backbone, "group_matcher") else None
    entries = (stem,) if isinstance(stem, str) else stem or ()
    return patterns + [entry if isinstance(entry, str) else entry[0] for entry in entries]


def _read_directly(backbone: nn.Module) -> set[str]:
    # BEiT, EVA and Swin V2 put a bias together from parts and multiply by `qkv.weight` themselves: the adapter around
    # the layer would never be called.
    parts = [name for name, module in backbone.named_modules() if getattr(module, "q_bias", None) is not None]
    return {f"{name}.qkv" for name in parts}


def _obstacle(name: str, layer: nn.Conv2d | nn.Linear, rank: int) -> str | None:
    # PEFT builds the factors from the layer's own class: a factor with standardised weights could not start at zero.
    if type(layer) not in (nn.Conv2d, nn.Linear, Conv2dSame):
        return type(layer).__name__
    if min(_sides(layer)) < rank and _BYWAYS.intersection(name.split(".")):
        return "smaller than the rank"
    if isinstance(layer, nn.Linear):
        return None
    if any(step != 1 for step in layer.dilation):
        return "dilated"
    return None if rank % layer.groups == 0 else f"{layer.groups} groups"


def _sides(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    return layer.weight.shape[0], layer.weight[0].numel()


def _check_rank_fits(targets: dict[str, Any], rank: int) -> None:
    sides = {name: _sides(layer) for name, layer in targets.items()}
    name = min(sides, key=lambda key: min(sides[key]))
    limit = min(sides[name])
    if rank > limit:
        rows, columns = sides[name]
        raise ValueError(
            f"rank {rank} is larger than the layer {name!r}, whose {rows} x {columns} weights have rank {limit} at "
            f"most: write rank={limit} or less (--rank {limit}), or take a wider backbone"
        )


def _inject(backbone: nn.Module, config: AdaptedConfig) -> dict[str, Any]:
    """Wrap the targets, in place; the adapted layers by name, all parameters wanting gradients."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs the package peft, which is not installed: pip install peft") from error
    names = lora_targets(backbone, config.lora_rank)
    exact = "|".join(re.escape(name) for name in names)  # as a list, PEFT would take suffixes of other names too
    settings = LoraConfig(target_modules=f"(?:{exact})", **lora_scales(backbone, names, config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1.*")
        inject_adapter_in_model(settings, backbone, ADAPTER)
    layers: dict[str, Any] = {name: backbone.get_submodule(name) for name in names}
    if config.lora_init == "matched":
        for layer in layers.values():
            nn.init.normal_(layer.lora_A[ADAPTER].weight)
    backbone.requires_grad_(True)  # PEFT left the adapters only
    return layers


def lora_scales(backbone: nn.Module, names: list[str], config: AdaptedConfig, prefix: str = "") -> dict[str, Any]:
    """Rank and scales of the adapters as arguments of PEFT's `LoraConfig`.

    Args:
        backbone (`nn.Module`): timm network, adapted or not.
        names (`list[str]`): Its targets.
        config ([`AdaptedConfig`]): Rank, alpha and kind of start.
        prefix (`str`): Stands before the names in the model that PEFT sees. Nothing by default.

    Returns:
        `dict[str, Any]`: `r`, `lora_alpha` and, with `lora_init="matched"`, an `alpha_pattern`.
    """
    if config.lora_init == "peft":
        return {"r": config.lora_rank, "lora_alpha": config.lora_alpha or config.lora_rank}
    # The released factors of a k x k convolution have rank k times r in all: A of variance 1 then moves the weights
    # k / r as far in the first step as full training does, where PEFT's factors with alpha a move them a^2 / r.
    alphas = {}
    for name in names:
        layer: Any = backbone.get_submodule(name)
        sides = getattr(getattr(layer, "base_layer", layer), "kernel_size", (1, 1))
        alphas[name] = math.sqrt(math.sqrt(math.prod(sides)))
    pattern = {f"^{re.escape(prefix + name)}": alpha for name, alpha in alphas.items() if alpha != 1.0}
    return {"r": config.lora_rank, "lora_alpha": 1.0, "alpha_pattern": pattern}


def is_lora(name: str) -> bool:
    """Tell whether a name in a state dict is that of an adapter's factor.

    Args:
        name (`str`): Key.

    Returns:
        `bool`: `True` for both factors.
    """
    return ".lora_A." in name or ".lora_B." in name


class AdaptedModel(RobustModelForPreTraining):
    """A model whose backbone carries adapters; base of the two kinds below.

    Args:
        config ([`AdaptedConfig`]): Architecture, branches, head, normalisation, adapters.

    Attributes:
        lora_layers (`dict[str, nn.Module]`): PEFT's layers by their names in the backbone.
    """

    config_class = AdaptedConfig
    config: AdaptedConfig

    def __init__(self, config: AdaptedConfig) -> None:
        super().__init__(config)
        # A plain dict: the layers are children of the backbone already.
        self.lora_layers: dict[str, Any] = _inject(self.backbone, config)

    def adapted_layers(self, path: str) -> dict[str, Any]:
        """All adapted layers, see [`RobustModelForPreTraining.adapted_layers`]."""
        return self.lora_layers


class LoraPathModel(AdaptedModel):
    """A model with a second path, `"lora"`, beside its norm branches: adapters on, base weights held constant.

    A loss of the `"lora"` path trains adapters and head, a loss of a norm branch the encoder and head. Both paths use
    the same norm layers; the `"lora"` path those of `default_branch`. Made by `adapters.with_lora_path`.

    Args:
        config ([`AdaptedConfig`]): Architecture, branches, head, normalisation, adapters.

    Raises:
        ValueError: For a rank larger than a layer, or a norm branch called `"lora"`.
        ImportError: Without peft.
    """

    def __init__(self, config: AdaptedConfig) -> None:
        if LORA_PATH in config.norm_branches:
            raise ValueError(
                f"norm branches {list(config.norm_branches)} hold {LORA_PATH!r}, the name of the path with adapters: "
                "give the branch another name"
            )
        super().__init__(config)
        self._enable(False)

    @property
    def paths(self) -> tuple[str, ...]:
        """What the methods take as `branch`: the norm branches and `"lora"`."""
        return (*self.switch.branches, LORA_PATH)

    def features(self, x: torch.Tensor, branch: str) -> torch.Tensor:
        """Pooled features before the head, see [`RobustModelForPreTraining.features`].

        Args:
            x (`torch.Tensor`): Images `(N, 3, H, W)` in [0, 1].
            branch (`str`): Norm branch (adapters off), or `"lora"` (adapters on, nothing else gets a gradient).

        Returns:
            `torch.Tensor`: `(N, num_features)`.

        Raises:
            ValueError: For an unknown path; the message lists the known ones.
        """
        norm_branch = self.norm_branch(branch)
        if branch != LORA_PATH:
            return super().features(x, norm_branch)
        tensors = {n: p.detach() for n, p in self.backbone.named_parameters() if not is_lora(n)}
        if self.training and self.config.norm_update == "plain_only":
            # Clones take the updates of the running statistics.
            tensors |= {n: b.clone() for n, b in self.backbone.named_buffers()}
        with use_branch(self.switch, norm_branch), self._adapters_on():
            return functional_call(self.backbone, tensors, (self.normalize(x),))

    def head(self, features: torch.Tensor, branch: str) -> torch.Tensor:
        """Output of the head, which both paths share, see [`RobustModelForPreTraining.head`].

        Args:
            features (`torch.Tensor`): Pooled features `(N, num_features)` of [`features`].
            branch (`str`): Norm branch or `"lora"`.

        Returns:
            `torch.Tensor`: `(N, P)`.

        Raises:
            ValueError: For an unknown path; the message lists the known ones.
        """
        return super().head(features, self.norm_branch(branch))

    def adapted_layers(self, path: str) -> dict[str, Any]:
        """All adapted layers for `"lora"`, none for a norm branch."""
        return self.lora_layers if path == LORA_PATH else {}

    def norm_branch(self, path: str) -> str:
        """The norm branch that a path runs through, of `"lora"` the `default_branch`; unknown paths are refused."""
        if path not in self.paths:
            known = ", ".join(map(repr, self.paths))
            raise ValueError(f"unknown path {path!r}: this model has {known}; ask for one of these")
        return self.default_branch if path == LORA_PATH else path

    @contextmanager
    def _adapters_on(self) -> Iterator[None]:
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)

    def _enable(self, on: bool) -> None:
        # PEFT's own switch also turns requires_grad over and walks the whole network each time.
        for layer in self.lora_layers.values():
            layer._disable_adapters = not on


class AdapterModel(AdaptedModel):
    """A model of which only adapters and head train; the encoder stands still, running statistics included.

    Made by `adapters.with_adapter`.

    Args:
        config ([`AdaptedConfig`]): Architecture, branches, head, normalisation, adapters.

    Raises:
        ValueError: For a rank larger than a layer.
        ImportError: Without peft.
    """

    def __init__(self, config: AdaptedConfig) -> None:
        super().__init__(config)
        self._freeze_encoder()

    def _freeze_encoder(self) -> None:
        self.freeze_backbone()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(is_lora(name))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved model, see [`RobustModelForPreTraining.from_pretrained`].

        Args:
            *args (`Any`): Passed on.
            **kwargs (`Any`): Passed on.

        Returns:
            [`AdapterModel`]: The model, in eval mode, its encoder frozen.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_encoder()  # transformers put new parameters in the place of those that were frozen
        return loaded


AutoConfig.register(AdaptedConfig.model_type, AdaptedConfig, exist_ok=True)
