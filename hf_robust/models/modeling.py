"""The pre-training model: any timm backbone with named norm branches, plus a projector or a linear classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel

from .backbones import create_backbone
from .checkpointing import checkpoint_blocks
from .norm import BranchSwitch, add_norm_branches, use_branch

__all__ = ["InputNormalization", "Projector", "RobustModelForPreTraining", "RobustPretrainingConfig"]


class RobustPretrainingConfig(PreTrainedConfig):
    """Everything needed to rebuild a [`RobustModelForPreTraining`].

    Args:
        architecture (`str`): timm name of the backbone. Defaults to `"resnet18_cifar"`, the papers' on CIFAR.
        model_args (`dict[str, Any]`, *optional*): Further arguments of the architecture.
        image_size (`int`): Side of the training images in pixels. Defaults to 32.
        norm_branches (`Sequence[str]`): Names of the norm branches. Defaults to ``("clean", "adv")``; a single name
            leaves the norm layers plain.
        head (`str`): What stands on the features: `"projector"` (contrastive methods, the default) or `"classifier"`,
            one linear layer for supervised ones.
        num_classes (`int`, *optional*): Outputs of the classifier, at least 2; left out with a projector.
        projector_layers (`int`): 2 or 3. Defaults to 3, as released for the CIFAR and STL networks. Without effect
            for a classifier, as is `projector_dim`.
        projector_dim (`int`, *optional*): Width of the embedding. The backbone's feature width by default.
        mean (`Sequence[float]`, *optional*): Subtracted from the pixels per channel. ImageNet's by default, as
            released for every ResNet-18; `None` (with `std=None`) for no normalisation.
        std (`Sequence[float]`, *optional*): Divides the pixels per channel.

    Raises:
        ValueError: For an impossible set of branches, an unknown head, a classifier without number of classes (or a
            projector with one), a projector of another depth, or a mean without std.
    """

    model_type = "hf_robust_pretraining"

    architecture: str = "resnet18_cifar"
    model_args: dict[str, Any] | None = None
    image_size: int = 32
    norm_branches: Sequence[str] = ("clean", "adv")
    head: Literal["projector", "classifier"] = "projector"
    num_classes: int | None = None
    projector_layers: int = 3
    projector_dim: int | None = None
    mean: Sequence[float] | None = (0.485, 0.456, 0.406)
    std: Sequence[float] | None = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs: Any) -> None:
        self.model_args = dict(self.model_args or {})
        self.norm_branches = BranchSwitch(self.norm_branches).branches
        _check_head(self.head, self.num_classes)
        if self.projector_layers not in (2, 3):
            raise ValueError(f"projector_layers must be 2 or 3, got {self.projector_layers!r}: the papers use 3")
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"mean and std go together, got mean={self.mean!r} and std={self.std!r}: "
                "give both, or None for both to feed raw pixels"
            )
        # JSON has no tuples: a loaded configuration must equal the saved one.
        self.mean = None if self.mean is None else tuple(float(v) for v in self.mean)
        self.std = None if self.std is None else tuple(float(v) for v in self.std)
        if self.std is not None and not all(v > 0 for v in self.std):
            raise ValueError(f"std must be positive, got {self.std!r}: it divides the pixels")
        super().__post_init__(**kwargs)


def _check_head(head: str, num_classes: int | None) -> None:
    if head not in ("projector", "classifier"):
        raise ValueError(
            f"head must be 'projector' or 'classifier', got {head!r}: contrastive methods train a projector, "
            "supervised ones a classifier"
        )
    if head == "projector" and num_classes is not None:
        raise ValueError(
            f"a projector has no classes, got num_classes={num_classes!r}: write head='classifier', or leave "
            "num_classes out and set projector_dim"
        )
    if head == "classifier" and (num_classes is None or num_classes < 2):
        raise ValueError(
            f"a classifier needs at least 2 classes, got num_classes={num_classes!r}: pass the num_classes of the "
            "labelled data set, e.g. num_classes=10 for CIFAR-10"
        )


class InputNormalization(nn.Module):
    """Subtracts a mean and divides by a standard deviation per channel, as first layer of a network.

    Args:
        mean (`Sequence[float]`): One value per channel, in pixel units of [0, 1].
        std (`Sequence[float]`): One positive value per channel.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images.

        Args:
            x (`torch.Tensor`): Images `(N, C, H, W)` in [0, 1].

        Returns:
            `torch.Tensor`: `(N, C, H, W)`.
        """
        return (x - self.mean) / self.std


class Projector(nn.Sequential):
    """The head between pooled features and contrastive loss: linear layers, each followed by batch norm.

    ReLU stands between the layers and not at the end; only the first linear layer has a bias.

    Args:
        in_features (`int`): Width of the features, and of the hidden layers.
        out_features (`int`): Width of the embedding.
        layers (`int`): 2 or 3.

    Source: `models/resnet_multi_bn.py` of the released code of ACL and RCS (three layers; its two-layer option and the
    head of the ImageNet-32 network have this form with two).
    """

    def __init__(self, in_features: int, out_features: int, layers: int = 3) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, layers + 1):
            last = index == layers
            width = out_features if last else in_features
            parts[f"fc{index}"] = nn.Linear(in_features, width, bias=index == 1)
            parts[f"bn{index}"] = nn.BatchNorm1d(width)
            if not last:
                parts[f"act{index}"] = nn.ReLU(inplace=True)
        super().__init__(parts)


class RobustModelForPreTraining(PreTrainedModel):
    """A timm backbone and a head, whose norm layers have one branch per kind of input.

    All methods take images in [0, 1]: the normalisation is the first layer of the network, so that attack budgets are
    in pixels. Weights of a fresh model are timm's own initialisation.

    Args:
        config ([`RobustPretrainingConfig`]): Architecture, branches, head, normalisation.

    Attributes:
        switch ([`~hf_robust.models.norm.BranchSwitch`]): Chooses the branch; the methods below set it themselves.
        normalize (`nn.Module`): First layer of `features`.
        backbone (`nn.Module`): timm model without classifier.
        projector (`nn.Module`): Head of the contrastive loss; with `head="projector"` only.
        classifier (`nn.Linear`): Head of the cross-entropy; with `head="classifier"` only.
        num_features (`int`): Width of `features`.

    Raises:
        ValueError: For an unknown architecture.
    """

    config_class = RobustPretrainingConfig
    config: RobustPretrainingConfig
    main_input_name = "image"
    accepts_loss_kwargs = False
    _backbone_frozen = False

    def __init__(self, config: RobustPretrainingConfig) -> None:
        super().__init__(config)
        self.switch = BranchSwitch(config.norm_branches)
        self.normalize: nn.Module = nn.Identity()
        if config.mean is not None and config.std is not None:
            self.normalize = InputNormalization(config.mean, config.std)
        self.backbone = create_backbone(
            config.architecture, image_size=config.image_size, model_args=config.model_args
        )
        # Some networks (MobileNetV3) widen the features after pooling; timm calls that width head_hidden_size.
        self.num_features: int = int(
            cast(Any, getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features)
        )
        add_norm_branches(self.backbone, switch=self.switch)
        if config.head == "classifier":
            self.classifier = nn.Linear(self.num_features, cast(int, config.num_classes))
        else:
            self.projector = Projector(
                self.num_features, config.projector_dim or self.num_features, config.projector_layers
            )
            add_norm_branches(self.projector, switch=self.switch)
        self.post_init()

    @property
    def head_module(self) -> nn.Module:
        """What stands on the features, by whichever name it is saved.

        Returns:
            `nn.Module`: The projector or the classifier.
        """
        return self.classifier if self.config.head == "classifier" else self.projector

    @property
    def default_branch(self) -> str:
        """Branch to use downstream: `"adv"` when the model has it, else the first one.

        Returns:
            `str`: Name of the branch.
        """
        return "adv" if "adv" in self.switch.branches else self.switch.branches[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """What the methods take as `branch`: the norm branches."""
        return self.switch.branches

    def norm_branch(self, path: str) -> str:
        """The norm branch that a path runs through: itself.

        Args:
            path (`str`): One of `paths`.

        Returns:
            `str`: Name of the branch.

        Raises:
            ValueError: For an unknown path; the message lists the known ones.
        """
        return self.switch.check(path)

    def adapted_layers(self, path: str) -> dict[str, Any]:
        """Layers of the backbone whose adapters act on a path, by their names: none.

        Args:
            path (`str`): One of `paths`.

        Returns:
            `dict[str, nn.Module]`: PEFT's layers.
        """
        return {}

    def freeze_backbone(self) -> None:
        """Lets only the head learn: backbone parameters want no gradient, its layers stay in evaluation mode.

        [`train`] then reaches the head only, so running statistics and dropout of the backbone stand still. It holds
        for this object; a model loaded from a checkpoint is frozen anew.
        """
        self._backbone_frozen = True
        self.backbone.requires_grad_(False).eval()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Computes activations of the backbone twice rather than keeping them, see [`checkpoint_blocks`].

        Args:
            *args (`Any`): Without effect; those of transformers' method.
            **kwargs (`Any`): The same.

        Raises:
            ValueError: For a backbone that is not made of blocks, and for a network with a second path of adapters.
        """
        if self.paths != self.switch.branches:
            raise ValueError(
                f"gradient_checkpointing=True does not work with the paths {list(self.paths)}: activations would be "
                "computed again without the adapters; leave it out and lower --per_device_train_batch_size"
            )
        if not checkpoint_blocks(self.backbone, self.switch):
            raise ValueError(
                f"gradient_checkpointing=True does not work with the backbone {self.config.architecture!r}, which is "
                "not made of blocks: leave it out and lower --per_device_train_batch_size"
            )

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode; a backbone frozen by [`freeze_backbone`] stays in evaluation mode.

        Args:
            mode (`bool`): `True` for training.

        Returns:
            [`RobustModelForPreTraining`]: The model itself.
        """
        super().train(mode)
        if self._backbone_frozen:
            self.backbone.eval()
        return self

    def features(self, x: torch.Tensor, branch: str) -> torch.Tensor:
        """Pooled features before the head.

        Args:
            x (`torch.Tensor`): Images `(N, 3, H, W)` in [0, 1].
            branch (`str`): Norm branch to use.

        Returns:
            `torch.Tensor`: `(N, num_features)`.

        Raises:
            ValueError: For an unknown branch; the message lists the known ones.
        """
        with use_branch(self.switch, branch):
            return self.backbone(self.normalize(x))

    def head(self, features: torch.Tensor, branch: str) -> torch.Tensor:
        """Output of the head: an embedding, not normalised to unit length, or class logits.

        Args:
            features (`torch.Tensor`): Pooled features `(N, num_features)` of [`features`].
            branch (`str`): Norm branch to use.

        Returns:
            `torch.Tensor`: `(N, P)`; P is `projector_dim`, or `num_classes` of a classifier.

        Raises:
            ValueError: For an unknown branch; the message lists the known ones.
        """
        with use_branch(self.switch, branch):
            return self.head_module(features)

    def embed(self, x: torch.Tensor, branch: str) -> torch.Tensor:
        """Output of the head for images: `head(features(x, branch), branch)`.

        Args:
            x (`torch.Tensor`): Images `(N, 3, H, W)` in [0, 1].
            branch (`str`): Norm branch to use.

        Returns:
            `torch.Tensor`: `(N, P)`; P is `projector_dim`, or `num_classes` of a classifier.

        Raises:
            ValueError: For an unknown branch; the message lists the known ones.
        """
        return self.head(self.features(x, branch), branch)

    def forward(self, passes: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Head outputs of several batches, each through its own branch, in one call.

        A distributed wrapper sees a single forward per step and so reduces every gradient once.

        Args:
            passes (`Sequence[tuple[str, torch.Tensor]]`): Pairs of branch and images `(N_i, 3, H, W)` in [0, 1],
                run in this order.

        Returns:
            `list[torch.Tensor]`: One `(N_i, P)` per pass, see [`embed`].

        Raises:
            ValueError: For an unknown branch; the message lists the known ones.
        """
        return [self.embed(x, branch) for branch, x in passes]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved model, see [`~transformers.PreTrainedModel.from_pretrained`].

        Args:
            *args (`Any`): Passed on.
            **kwargs (`Any`): Passed on.

        Returns:
            [`RobustModelForPreTraining`]: The model, in eval mode, all branches as saved.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._restore_tables()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves the weights alone: timm and torch initialised them."""

    @torch.no_grad()
    def _restore_tables(self) -> None:
        # transformers builds the model without memory and fills what the file holds. Index and position tables that
        # timm keeps out of state dicts (non-persistent buffers) come back empty; a fresh model has them right.
        saved = self.state_dict().keys()
        tables = {name: buffer for name, buffer in self.named_buffers() if name not in saved}
        if tables:
            fresh = dict(type(self)(self.config).named_buffers())
            for name, buffer in tables.items():
                buffer.copy_(fresh[name])


AutoConfig.register(RobustPretrainingConfig.model_type, RobustPretrainingConfig, exist_ok=True)
AutoModelForPreTraining.register(RobustPretrainingConfig, RobustModelForPreTraining, exist_ok=True)
