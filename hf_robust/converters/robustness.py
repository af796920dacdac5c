"""MadryLab's robustness library: ImageNet and CIFAR ResNets inside a model that attacks itself."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import (
    SINGLE,
    Conversion,
    Converter,
    Tensors,
    check_fit,
    choose_branch,
    some,
    strip_prefixes,
    take,
    take_classifier,
    take_normalization,
)
from .layouts import describe_resnet, resnet_keys

__all__ = ["Robustness"]

_IMAGENET_SIZE = 224


class Robustness(Converter):
    """Files `*.pt` of the robustness library, and of the ImageNet models for transfer that use it.

    The state dictionary is that of an `AttackerModel` in `DataParallel`: the network (`module.model`), its input
    normalisation (`module.normalizer`), and the attacker, which holds both a second time.

    Source: `robustness/attacker.py`, `robustness/train.py`, `robustness/tools/helpers.py` (InputNormalize) and the
        two `resnet.py` of MadryLab/robustness.
    """

    names: ClassVar[tuple[str, ...]] = ("robustness", "madrylab")
    source: ClassVar[str] = "MadryLab/robustness"

    def recognise(self, tensors: Tensors) -> str | None:
        """`normalizer.new_mean` beside `model`."""
        rest = strip_prefixes(tensors, "module.")
        if "normalizer.new_mean" in rest and "model.conv1.weight" in rest:
            return "normalizer.new_mean beside model.conv1.weight, as the robustness library writes its AttackerModel"
        return None

    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """See [`Converter.convert`]."""
        chosen = choose_branch((SINGLE,), branch)
        rest, notes = strip_prefixes(tensors, "module."), list[str]()
        _drop_copies(rest, notes)
        mean, std = take_normalization(rest, "normalizer.new_mean", "normalizer.new_std")
        inner = take(rest, r"model\.")
        if not inner:
            raise ValueError(
                "no key begins with 'model.', which the robustness library writes: leave --format out to see what "
                "the keys look like"
            )
        net = resnet_keys(strip_prefixes(inner, "model."))
        classifier = take_classifier(net, "fc", notes)
        architecture, args = describe_resnet(net)
        conversion = Conversion(
            architecture,
            {**net, **rest},  # what is left of the file is left over
            args,
            image_size=32 if architecture.endswith("_cifar") else _IMAGENET_SIZE,
            branch=chosen,
            mean=mean,
            std=std,
            classifier=classifier,
            notes=notes,
        )
        check_fit(conversion)
        return conversion


def _drop_copies(tensors: Tensors, notes: list[str]) -> None:
    """The attacker's copies of network and normalisation go, if they are copies."""
    copies = {
        **{key.removeprefix("attacker."): value for key, value in take(tensors, r"attacker\.model\.").items()},
        **{key.replace("attacker.normalize", "normalizer"): v for key, v in take(tensors, r"attacker\.norm").items()},
    }
    if not copies:
        return
    other = [key for key, value in copies.items() if key not in tensors or not torch.equal(value, tensors[key])]
    if other:
        raise ValueError(
            f"{len(other)} tensors of the attacker differ from those of the model ({some(other)}): a file of the "
            "robustness library holds them twice and equal; check that it is whole"
        )
    notes.append(f"left out: the attacker's copy of network and normalisation ({len(copies)} tensors, equal)")
