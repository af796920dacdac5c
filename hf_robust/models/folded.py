"""A frozen copy of a network for many passes in evaluation mode, norm layers folded into convolutions."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .modeling import InputNormalization
from .norm import export_branch

__all__ = ["FoldedNetwork"]

logger = logging.getLogger(__name__)

CACHE_PIXELS = 256 * 32 * 32  # of images that pass together on a CPU, so that they stay in its caches


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
        self._scaled = isinstance(model.normalize, InputNormalization) and _scale(model, self._backbones.values())

    def features(self, x: Tensor, branch: str) -> Tensor:
        """Pooled features `(N, num_features)` of images `(N, 3, H, W)` in [0, 1]; on a CPU part by part."""
        backbone, normalize = self._backbones[self.switch.check(branch)], self._model.normalize
        x = x - normalize.mean if self._scaled else normalize(x)
        if x.device.type != "cpu":
            return backbone(x)
        at_once = max(1, CACHE_PIXELS // (x.shape[-2] * x.shape[-1]))
        return torch.cat([backbone(part) for part in x.split(at_once)])

    def head(self, features: Tensor, branch: str) -> Tensor:
        """Head outputs `(N, P)` of features `(N, num_features)`."""
        return self._model.head(features, branch)

    def embed(self, x: Tensor, branch: str) -> Tensor:
        """Head outputs `(N, P)` of images `(N, 3, H, W)` in [0, 1]."""
        return self.head(self.features(x, branch), branch)


@torch.no_grad()
def _scale(model: Any, backbones: Collection[nn.Module]) -> bool:
    """Let the first convolutions divide by the standard deviation of the pixels, where every network begins with one.

    The mean stays outside: a convolution pads normalised images with zeros.
    """
    firsts = []
    for backbone in backbones:
        nodes = list(backbone.graph.nodes) if isinstance(backbone, fx.GraphModule) else []
        readers = [n for n in nodes if n.op != "placeholder" and any(a.op == "placeholder" for a in n.all_input_nodes)]
        first = backbone.get_submodule(str(readers[0].target)) if [r.op for r in readers] == ["call_module"] else None
        if type(first) is not nn.Conv2d or first.groups != 1:
            return False
        firsts.append(first)
    for first in firsts:
        first.weight /= model.normalize.std
    return True


@torch.no_grad()
def _fold(model: Any, branch: str) -> nn.Module:
    plain = export_branch(model.backbone, branch).eval().requires_grad_(False)
    size, parameter = model.config.image_size, next(plain.parameters())
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        folded = _fuse(plain).eval().requires_grad_(False)
        expected = plain(x)
        # One percent: convolutions in reduced precision (TF32) differ by a tenth of that, a wrong fold by far more.
        agrees = bool((folded(x) - expected).norm() <= 1e-2 * expected.norm())
    except Exception as error:  # whatever tracing may raise on a network of a third party
        logger.info("the backbone is not folded: %s", error)
        return plain
    if not agrees:
        logger.info("the backbone is not folded: its folded form differs on random images")
        return plain
    four = [p for p in plain.parameters() if p.dim() == 4]
    if four and all(p.is_contiguous(memory_format=torch.channels_last) for p in four):
        folded.to(memory_format=torch.channels_last)
    return folded


def _fuse(network: nn.Module) -> nn.Module:
    """A traced copy in which every batch norm that alone reads a convolution has become part of it."""
    traced = fx.symbolic_trace(copy.deepcopy(network))
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        pair = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None
        if not pair or len(source.users) > 1 or calls[source.target] > 1 or calls[node.target] > 1:
            continue
        traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
