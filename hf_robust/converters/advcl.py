"""AdvCL and A-InfoNCE: residual networks with three norm layers side by side and heads for pseudo-labels."""

from __future__ import annotations

from typing import ClassVar

from .base import (
    Conversion,
    Converter,
    Tensors,
    check_fit,
    keep_branch,
    leave_out,
    norm_branches,
    strip_prefixes,
    take_normalization,
)
from .layouts import describe_resnet, is_resnet, resnet_keys

__all__ = ["AdvCl"]

_ORDER = ("clean", "adv", "adv_ce")


class AdvCl(Converter):
    """Files of AdvCL and of A-InfoNCE's AdvCL variant.

    Norm layers: `bn_list.0` for clean images, `bn_list.1` for images that attack the contrastive loss, `bn_list.2`
    for images that attack the pseudo-labels. The released networks take pixels as they are; should a file hold
    `normalize.mean`, that normalisation is kept.

    Source: `models/resnet_cifar_multibn_ensembleFC.py` and `pretraining_advCL.py` of LijieFan/AdvCL and
        yqy2001/A-InfoNCE (`bn_names = ['normal', 'pgd', 'pgd_ce']`).
    """

    names: ClassVar[tuple[str, ...]] = ("advcl", "a-infonce")
    source: ClassVar[str] = "LijieFan/AdvCL or yqy2001/A-InfoNCE"

    def recognise(self, tensors: Tensors) -> str | None:
        """Three norm layers side by side in a ResNet."""
        rest = strip_prefixes(tensors, "module.")
        if is_resnet(rest) and norm_branches(rest) == 3:
            return "a ResNet with bn_list.0 to bn_list.2, as AdvCL and A-InfoNCE write it (clean 0, adv 1, adv_ce 2)"
        return None

    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """See [`Converter.convert`]."""
        rest, notes = strip_prefixes(tensors, "module."), list[str]()
        if norm_branches(rest) != len(_ORDER):
            raise ValueError(
                f"AdvCL and A-InfoNCE write three norm layers side by side (bn_list.0 to bn_list.2), this file has "
                f"{norm_branches(rest)}: leave --format out, its keys may tell the format"
            )
        leave_out(rest, r"head_(ce|proj|pred)\.", "projector, predictor and class head", notes)
        leave_out(rest, r"fc(_\d+)?\.", "heads for pseudo-labels", notes)
        mean, std = take_normalization(rest, "normalize.mean", "normalize.std")
        rest, chosen = keep_branch(rest, _ORDER, branch, notes)
        rest = resnet_keys(rest)
        architecture, args = describe_resnet(rest)
        conversion = Conversion(architecture, rest, args, branch=chosen, mean=mean, std=std, notes=notes)
        check_fit(conversion)
        return conversion
