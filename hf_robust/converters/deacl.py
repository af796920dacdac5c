"""DeACL: checkpoints of a Lightning module that holds student, teacher and two online classifiers."""

from __future__ import annotations

from typing import ClassVar

from .base import (
    SINGLE,
    Conversion,
    Converter,
    Tensors,
    check_fit,
    choose_branch,
    leave_out,
    strip_prefixes,
    take,
    take_normalization,
)
from .layouts import describe_resnet, describe_wide_resnet, is_wide_resnet, resnet_keys, wide_resnet_keys

__all__ = ["DeAcl"]


class DeAcl(Converter):
    """Files `*.ckpt` of DeACL: the student `backbone` with plain norm layers and CIFAR's mean and std inside.

    The 3x3 stem of the authors has a padding of 2 (a 32x32 image becomes 34x34), which no key tells.

    Source: `solo/methods/base_for_adversarial_training.py` and `solo/models/resnet_add_normalize.py` of
        pantheon5100/DeACL.
    """

    names: ClassVar[tuple[str, ...]] = ("deacl",)
    source: ClassVar[str] = "pantheon5100/DeACL"

    def recognise(self, tensors: Tensors) -> str | None:
        """A `backbone` with its own normalisation, usually beside its teacher."""
        if "backbone.normalize.mean" in tensors and "backbone.conv1.weight" in tensors:
            return "backbone.conv1.weight with backbone.normalize.mean, as DeACL writes its student"
        return None

    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """See [`Converter.convert`]."""
        chosen = choose_branch((SINGLE,), branch)
        rest, notes = dict(tensors), list[str]()
        backbone = strip_prefixes(take(rest, r"backbone\."), "backbone.")
        if not backbone:
            raise ValueError(
                "no key begins with 'backbone.', which DeACL writes: leave --format out to see what the keys look like"
            )
        leave_out(rest, r"momentum_backbone\.", "the teacher", notes)
        leave_out(rest, r"(momentum_)?classifier(_adv)?\.", "the online classifiers", notes)
        leave_out(rest, r"(momentum_)?projector\.", "the projectors", notes)
        mean, std = take_normalization(backbone, "normalize.mean", "normalize.std")
        if is_wide_resnet(backbone):
            describe_wide_resnet(wide_resnet_keys(backbone))  # says why it cannot be
        backbone = resnet_keys(backbone)
        architecture, args = describe_resnet(backbone)
        if architecture.endswith("_cifar"):
            args["stem_padding"] = 2
            notes.append("the 3x3 stem has padding 2, as in the authors' code; the RobustSSL benchmark ran it with 1")
        conversion = Conversion(
            architecture="resnet18_stl" if architecture == "resnet18" else architecture,
            tensors={**backbone, **rest},  # what is left of the file is left over
            model_args=args,
            image_size=32 if architecture.endswith("_cifar") else 96,
            branch=chosen,
            mean=mean,
            std=std,
            notes=notes,
        )
        check_fit(conversion)
        return conversion
