"""RCS: its ImageNet-32 wide ResNets hold the two norm layers in reversed order; its small networks are ACL's."""

from __future__ import annotations

from typing import ClassVar

from .acl import Acl
from .base import (
    SINGLE,
    Conversion,
    Converter,
    Tensors,
    check_fit,
    choose_branch,
    keep_branch,
    leave_out,
    strip_prefixes,
    take_classifier,
)
from .layouts import describe_wide_resnet, is_resnet, is_wide_resnet, wide_resnet_keys

__all__ = ["Rcs"]

_ORDER = ("adv", "clean")


class Rcs(Converter):
    """Files of ACL-RCS and DynACL-RCS.

    The ImageNet-32 networks are WRN-28-10 without input normalisation. Their list of norm layers is
    ``['pgd', 'normal']``: `bn_list.0` is the branch of attacked images here, `bn_list.1` in ACL.
    The first public version had plain norm layers.

    Source: `ACL_RCS/ImageNet_32/ACL_RCS.py` and `models/wrn_with_bn.py` of GodXuxilie/Efficient_ACL_via_RCS.
    """

    names: ClassVar[tuple[str, ...]] = ("rcs",)
    source: ClassVar[str] = "GodXuxilie/Efficient_ACL_via_RCS"

    def recognise(self, tensors: Tensors) -> str | None:
        """Norm layers side by side in a wide ResNet."""
        rest = strip_prefixes(tensors, "module.")
        if is_wide_resnet(rest) and any(".bn_list." in key for key in rest):
            return "a wide ResNet with bn_list, as RCS writes it for ImageNet-32 (adv 0, clean 1)"
        if is_wide_resnet(rest) and "linear.fc1.weight" in rest:
            return "a wide ResNet with the projector linear.fc1, as the first version of RCS writes it for ImageNet-32"
        return None

    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """See [`Converter.convert`]."""
        rest, notes = strip_prefixes(tensors, "module."), list[str]()
        if is_resnet(rest) or not is_wide_resnet(rest):
            return Acl().convert(tensors, branch)
        several = any(key.startswith("block1.") and ".bn_list." in key for key in rest)
        if not several and "linear.fc1.weight" not in rest:
            raise ValueError(
                "this wide ResNet has plain norm layers, as the supervised networks of RCS have them: "
                "convert it with --format robustbench"
            )
        leave_out(rest, r"linear\.(fc|bn)\d\.", "the projector", notes)
        chosen = SINGLE
        if several:
            rest, chosen = keep_branch(rest, _ORDER, branch, notes)
        elif branch is not None:
            choose_branch((SINGLE,), branch)
        rest = wide_resnet_keys(rest)
        classifier = take_classifier(rest, "fc", notes)
        architecture, args = describe_wide_resnet(rest)
        conversion = Conversion(architecture, rest, args, branch=chosen, classifier=classifier, notes=notes)
        check_fit(conversion)
        return conversion
