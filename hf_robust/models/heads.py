"""What stands on the pooled features during pre-training: a projector, or linear classifiers of pseudo-labels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

__all__ = ["LinearHeads", "Projector"]


class Projector(nn.Sequential):
    """The head between pooled features and contrastive loss: linear layers, each followed by batch norm by default.

    ReLU stands between the layers and not at the end. A layer that a norm follows has no bias, except the first.

    Args:
        in_features (`int`): Width of the features.
        out_features (`int`): Width of the embedding.
        layers (`int`): 2 or 3.
        hidden_features (`int`, *optional*): Width between the layers; `in_features` by default.
        norms (`str`): Batch norm after `"all"` layers (the default), the `"hidden"` ones or `"none"`.

    Source: `models/resnet_multi_bn.py` of the released code of ACL and RCS (three layers; its two-layer option and the
    head of the ImageNet-32 network have this form with two); `models/resnet_cifar_multibn_ensembleFC.py` of AdvCL's
    (two layers, `"hidden"`); `models/projector.py` of RoCL's (two layers, `"none"`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layers: int = 3,
        hidden_features: int | None = None,
        norms: Literal["all", "hidden", "none"] = "all",
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        before, hidden = in_features, hidden_features or in_features
        for index in range(1, layers + 1):
            last = index == layers
            width, norm = out_features if last else hidden, norms == "all" or norms == "hidden" and not last
            parts[f"fc{index}"] = nn.Linear(before, width, bias=index == 1 or not norm)
            if norm:
                parts[f"bn{index}"] = nn.BatchNorm1d(width)
            if not last:
                parts[f"act{index}"] = nn.ReLU(inplace=True)
            before = width
        super().__init__(parts)


class LinearHeads(nn.ModuleList):
    """Several linear classifiers on the same features, their logits side by side.

    Args:
        in_features (`int`): Width of the features.
        classes (`Sequence[int]`): Outputs of each classifier.
    """

    def __init__(self, in_features: int, classes: Sequence[int]) -> None:
        super().__init__(nn.Linear(in_features, width) for width in classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of all classifiers.

        Args:
            features (`torch.Tensor`): `(N, in_features)`.

        Returns:
            `torch.Tensor`: `(N, sum of classes)`, in their order.
        """
        return torch.cat([head(features) for head in self], dim=1)
