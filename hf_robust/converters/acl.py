"""ACL and its descendants DynACL and AIR: residual networks with two norm layers side by side, and a projector."""

from __future__ import annotations

from typing import ClassVar

from .base import (
    SINGLE,
    Conversion,
    Converter,
    Tensors,
    check_fit,
    choose_branch,
    keep_branch,
    leave_out,
    norm_branches,
    strip_prefixes,
    take,
    take_classifier,
    take_normalization,
)
from .layouts import describe_resnet, is_resnet, resnet_keys

__all__ = ["Acl"]

_ORDER = ("clean", "adv")
_STL_SIZE = 96


class Acl(Converter):
    """Files `model.pt` of ACL, DynACL, DynACL++ and AIR, and of the classifiers that RobustSSL fine-tuned from them.

    Two norm layers stand side by side, `bn_list.0` for clean and `bn_list.1` for attacked images, and `normalize`
    holds mean and std. DynACL writes a second, momentum encoder (`encoder_k`), which is the published one. DynACL++
    for linear probing and fine-tuned classifiers have plain norm layers.

    Source: `models/resnet_multi_bn.py` of VITA-Group/Adversarial-Contrastive-Learning, PKU-ML/DYNACL and
        GodXuxilie/RobustSSL_Benchmark; `bn_names = ['normal', 'pgd']` in their training scripts.
    """

    names: ClassVar[tuple[str, ...]] = ("acl", "dynacl", "dynacl++", "air")
    source: ClassVar[str] = (
        "VITA-Group/Adversarial-Contrastive-Learning, PKU-ML/DYNACL or GodXuxilie/RobustSSL_Benchmark"
    )

    def recognise(self, tensors: Tensors) -> str | None:
        """Two norm layers side by side in a ResNet, or plain ones next to `normalize.mean`."""
        inner, _ = _encoder(tensors)
        if not is_resnet(inner):
            return None
        if norm_branches(inner) in (1, 2):
            return "a ResNet with bn_list.0 and bn_list.1, as ACL, DynACL, AIR and RCS write it (clean 0, adv 1)"
        if "normalize.mean" in inner and "bn1.weight" in inner:
            return "a ResNet with plain norm layers and normalize.mean, as DynACL++ and RobustSSL write it"
        return None

    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """See [`Converter.convert`]."""
        rest, notes = _encoder(tensors)
        leave_out(rest, r"fc\.(fc|bn)\d\.", "the projector", notes)
        mean, std = take_normalization(rest, "normalize.mean", "normalize.std")
        if norm_branches(rest) or any(".bn_list." in key for key in rest):
            rest, chosen = keep_branch(rest, _ORDER, branch, notes)
        else:
            chosen = SINGLE if branch is None else choose_branch((SINGLE,), branch)
        rest = resnet_keys(rest)
        classifier = take_classifier(rest, "fc", notes)
        architecture, args = describe_resnet(rest)
        cifar = architecture.endswith("_cifar")
        conversion = Conversion(
            architecture="resnet18_stl" if architecture == "resnet18" else architecture,
            tensors=rest,
            model_args=args,
            image_size=32 if cifar else _STL_SIZE,
            branch=chosen,
            mean=mean,
            std=std,
            classifier=classifier,
            notes=notes,
        )
        check_fit(conversion)
        return conversion


def _encoder(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The one network of the file, and a note where there were two."""
    rest, notes = strip_prefixes(tensors, "module."), list[str]()
    momentum = take(rest, r"encoder_k\.")
    if not momentum:
        return rest, notes
    trained = take(rest, r"encoder_q\.")
    notes.append(
        f"encoder_k, the momentum encoder that the authors evaluate, is taken; left out: encoder_q ({len(trained)} "
        "tensors)"
    )
    return {**rest, **strip_prefixes(momentum, "encoder_k.")}, notes
