"""The pre-training model: any timm backbone with named norm branches, plus a projector or a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedModel

from .backbones import create_backbone
from .checkpointing import checkpoint_blocks
from .configuration import RobustPretrainingConfig
from .heads import LinearHeads, Projector
from .norm import BranchSwitch, add_norm_branches, use_branch

__all__ = ["InputNormalization", "Projector", "RobustModelForPreTraining", "RobustPretrainingConfig"]


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
        classifier (`nn.Linear`): Head of the cross-entropy; with `head="classifier"` only. With `head="none"` there
            is neither, and the output is the features.
        branch_heads (`nn.ModuleDict`): [`LinearHeads`] by branch, where the configuration names any.
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
        elif config.head == "projector":
            self.projector = Projector(
                self.num_features,
                config.projector_dim or self.num_features,
                config.projector_layers,
                config.projector_hidden_dim,
                config.projector_norms,
            )
            if config.projector_norm_branches == "own":
                add_norm_branches(self.projector, switch=self.switch)
        if config.branch_heads:
            self.branch_heads = nn.ModuleDict(
                {name: LinearHeads(self.num_features, sizes) for name, sizes in config.branch_heads.items()}
            )
        self.post_init()

    @property
    def head_module(self) -> nn.Module:
        """What stands on the features, by whichever name it is saved.

        Returns:
            `nn.Module`: The projector, the classifier or an `nn.Identity`.
        """
        return nn.Identity() if self.config.head == "none" else self.get_submodule(self.config.head)

    def head_of(self, branch: str) -> nn.Module:
        """What stands on the features of a branch.

        Args:
            branch (`str`): One of `norm_branches`.

        Returns:
            `nn.Module`: Its own classifiers of `branch_heads`, else `head_module`.
        """
        own = self.config.branch_heads and branch in self.config.branch_heads
        return self.branch_heads[branch] if own else self.head_module

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
        """Output of the head: an embedding, not normalised to unit length, class logits, or the features themselves.

        Args:
            features (`torch.Tensor`): Pooled features `(N, num_features)` of [`features`].
            branch (`str`): Norm branch to use.

        Returns:
            `torch.Tensor`: `(N, P)`; P is `projector_dim`, `num_classes` of a classifier, or D without head; of a
            branch in `branch_heads`, the sum of its classes.

        Raises:
            ValueError: For an unknown branch; the message lists the known ones.
        """
        with use_branch(self.switch, branch):
            return self.head_of(branch)(features)

    def embed(self, x: torch.Tensor, branch: str) -> torch.Tensor:
        """Output of the head for images: `head(features(x, branch), branch)`.

        Args:
            x (`torch.Tensor`): Images `(N, 3, H, W)` in [0, 1].
            branch (`str`): Norm branch to use.

        Returns:
            `torch.Tensor`: `(N, P)`; P is `projector_dim`, `num_classes` of a classifier, or D without head.

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
