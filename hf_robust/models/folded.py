"""A frozen copy of a network for many passes in evaluation mode, norm layers folded into convolutions."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from .norm import export_branch

__all__ = ["FoldedNetwork"]

logger = logging.getLogger(__name__)


class FoldedNetwork:
    """Stands in for a pre-training model while its weights stand still; the same function up to rounding.

    In evaluation mode a norm layer after a convolution is a scale and a shift, which the convolution can take over:
    fewer passes over memory per image, forward and backward. One backbone per branch is copied; a backbone that
    cannot be traced, or whose folded form does not agree, is copied as it is. The head is the model's own.

    Args:
        model (`Any`): a [`RobustModelForPreTraining`] in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.switch, self.head_module, self.config = model.switch, model.head_module, model.config
        self._backbones = {branch: _fold(model, branch) for branch in model.switch.branches}

    def features(self, x: Tensor, branch: str) -> Tensor:
        """Pooled features `(N, num_features)` of images `(N, 3, H, W)` in [0, 1]."""
        return self._backbones[self.switch.check(branch)](self._model.normalize(x))

    def head(self, features: Tensor, branch: str) -> Tensor:
        """Head outputs `(N, P)` of features `(N, num_features)`."""
        return self._model.head(features, branch)

    def embed(self, x: Tensor, branch: str) -> Tensor:
        """Head outputs `(N, P)` of images `(N, 3, H, W)` in [0, 1]."""
        return self.head(self.features(x, branch), branch)


@torch.no_grad()
def _fold(model: Any, branch: str) -> nn.Module:
    plain = export_branch(model.backbone, branch).eval().requires_grad_(False)
    size, parameter = model.config.image_size, next(plain.parameters())
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        folded: nn.Module = fuse(plain).eval().requires_grad_(False)
        agrees = torch.allclose(folded(x), plain(x), rtol=1e-3, atol=1e-4)
    except Exception as error:  # whatever tracing may raise on a network of a third party
        logger.info("the backbone is not folded: %s", error)
        return plain
    if not agrees:
        return plain
    four = [p for p in plain.parameters() if p.dim() == 4]
    if four and all(p.is_contiguous(memory_format=torch.channels_last) for p in four):
        folded.to(memory_format=torch.channels_last)
    return folded
