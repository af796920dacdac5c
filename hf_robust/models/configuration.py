"""The configuration of a pre-training model: network, norm branches, heads, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedConfig

from .norm import BranchSwitch

__all__ = ["RobustPretrainingConfig"]


class RobustPretrainingConfig(PreTrainedConfig):
    """Everything needed to rebuild a [`RobustModelForPreTraining`].

    Args:
        architecture (`str`): timm name of the backbone. Defaults to `"resnet18_cifar"`, the papers' on CIFAR.
        model_args (`dict[str, Any]`, *optional*): Further arguments of the architecture.
        image_size (`int`): Side of the training images in pixels. Defaults to 32.
        norm_branches (`Sequence[str]`): Names of the norm branches. Defaults to ``("clean", "adv")``; a single name
            leaves the norm layers plain. Networks whose norms keep no running statistics (LayerNorm of vision
            transformers, GroupNorm) share all of the backbone between the branches: the names stay valid, and only a
            projector has branches then.
        head (`str`): What stands on the features: `"projector"` (contrastive methods, the default), `"classifier"`,
            one linear layer for supervised ones, or `"none"` for methods that compare the features themselves.
        num_classes (`int`, *optional*): Outputs of the classifier, at least 2; left out with a projector.
        projector_layers (`int`): 2 or 3. Defaults to 3, as released for the CIFAR and STL networks. Without effect
            for a classifier, as is `projector_dim`.
        projector_dim (`int`, *optional*): Width of the embedding. The backbone's feature width by default.
        projector_hidden_dim (`int`, *optional*): Width between the layers. The backbone's feature width by default.
        projector_norms (`str`): Batch norm after `"all"` layers of the projector (ACL, the default), after the
            `"hidden"` ones only (AdvCL) or `"none"` (RoCL).
        projector_norm_branches (`str`): `"own"` (the default): its norms have the branches of the backbone's;
            `"shared"`: one norm for all branches (AdvCL).
        branch_heads (`Mapping[str, Sequence[int]]`, *optional*): Branches whose features go to linear classifiers of
            these sizes instead of the projector, such as ``{"adv_ce": [2, 10]}``. None by default.
        mean (`Sequence[float]`, *optional*): Subtracted from the pixels per channel. ImageNet's by default, as
            released for every ResNet-18; `None` (with `std=None`) for no normalisation.
        std (`Sequence[float]`, *optional*): Divides the pixels per channel.

    Raises:
        ValueError: For an impossible set of branches, an unknown head, a classifier without number of classes (or a
            projector with one), another projector than these, classifiers for an unknown branch, or a mean without
            std.
    """

    model_type = "hf_robust_pretraining"

    architecture: str = "resnet18_cifar"
    model_args: dict[str, Any] | None = None
    image_size: int = 32
    norm_branches: Sequence[str] = ("clean", "adv")
    head: Literal["projector", "classifier", "none"] = "projector"
    num_classes: int | None = None
    projector_layers: int = 3
    projector_dim: int | None = None
    projector_hidden_dim: int | None = None
    projector_norms: Literal["all", "hidden", "none"] = "all"
    projector_norm_branches: Literal["own", "shared"] = "own"
    branch_heads: dict[str, list[int]] | None = None
    mean: Sequence[float] | None = (0.485, 0.456, 0.406)
    std: Sequence[float] | None = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs: Any) -> None:
        self.model_args = dict(self.model_args or {})
        self.norm_branches = BranchSwitch(self.norm_branches).branches
        _check_head(self.head, self.num_classes)
        _check_projector(self)
        self.branch_heads = {name: list(sizes) for name, sizes in (self.branch_heads or {}).items()}
        _check_branch_heads(self)
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
    if head not in ("projector", "classifier", "none"):
        raise ValueError(
            f"head must be 'projector', 'classifier' or 'none', got {head!r}: contrastive methods train a projector, "
            "supervised ones a classifier, those with a frozen teacher neither"
        )
    if head != "classifier" and num_classes is not None:
        what = "a projector" if head == "projector" else "a model without head"
        raise ValueError(
            f"{what} has no classes, got num_classes={num_classes!r}: write head='classifier', or leave "
            "num_classes out and set projector_dim"
        )
    if head == "classifier" and (num_classes is None or num_classes < 2):
        raise ValueError(
            f"a classifier needs at least 2 classes, got num_classes={num_classes!r}: pass the num_classes of the "
            "labelled data set, e.g. num_classes=10 for CIFAR-10"
        )


def _check_projector(config: RobustPretrainingConfig) -> None:
    if config.projector_layers not in (2, 3):
        raise ValueError(f"projector_layers must be 2 or 3, got {config.projector_layers!r}: the papers use 3")
    if config.projector_norms not in ("all", "hidden", "none"):
        raise ValueError(
            f"projector_norms must be 'all' (ACL), 'hidden' (AdvCL) or 'none' (RoCL), got {config.projector_norms!r}"
        )
    if config.projector_norm_branches not in ("own", "shared"):
        raise ValueError(
            f"projector_norm_branches must be 'own' or 'shared' (AdvCL), got {config.projector_norm_branches!r}"
        )


def _check_branch_heads(config: RobustPretrainingConfig) -> None:
    for name, sizes in (config.branch_heads or {}).items():
        if name not in config.norm_branches:
            raise ValueError(
                f"branch_heads names the branch {name!r}, norm_branches are {', '.join(config.norm_branches)}: add it "
                "there"
            )
        if not sizes or min(sizes) < 2:
            raise ValueError(f"classifiers of {name!r} need at least 2 classes each, got {sizes}: such as [2, 10]")
