"""RobustBench: CIFAR classifiers, wide ResNets in the layout of TRADES and ResNets with `shortcut` and `linear`."""

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
    take_classifier,
    take_normalization,
)
from .layouts import (
    describe_resnet,
    describe_wide_resnet,
    is_resnet,
    is_wide_resnet,
    resnet_keys,
    wide_resnet_keys,
)

__all__ = ["RobustBench"]

_NORMALIZERS = (("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std"))
_NOT_NAMED = (
    "no input normalisation is in the file: pixels enter as they are in [0, 1]; RobustBench sets one in code for some "
    "models (Engstrom2019Robustness, Hendrycks2019Using, Rice2020Overfitting ...), then pass mean and std"
)


class RobustBench(Converter):
    """Files of RobustBench's CIFAR model zoo, and others in the same two layouts (TRADES, the SAT networks of RCS).

    `sub_block1`, which many files hold, is never used by the authors' forward pass. Pre-activation ResNets, DeepMind's
    wide ResNets (`init_conv`, other padding) and ensembles are other networks and are refused.

    Source: `robustbench/model_zoo/architectures/wide_resnet.py`, `resnet.py` and `robustbench/utils.py` of
        RobustBench/robustbench.
    """

    names: ClassVar[tuple[str, ...]] = ("robustbench", "trades")
    source: ClassVar[str] = "RobustBench/robustbench"

    def recognise(self, tensors: Tensors) -> str | None:
        """`block1.layer` with plain norm layers, or `shortcut` and `linear`."""
        rest = strip_prefixes(tensors, "module.", "model.")
        if any(".bn_list." in key for key in rest) or "linear.fc1.weight" in rest:
            return None
        if is_wide_resnet(rest):
            return "block1.layer.0 with plain norm layers, a wide ResNet as TRADES and RobustBench write it"
        if is_resnet(rest) and "layer2.0.shortcut.0.weight" in rest and "linear.weight" in rest:
            return "a ResNet with shortcut.0 and linear, as RobustBench writes it"
        return None

    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """See [`Converter.convert`]."""
        chosen = choose_branch((SINGLE,), branch)
        rest, notes = strip_prefixes(tensors, "module.", "model."), list[str]()
        _refuse_others(rest)
        mean = std = None
        for keys in _NORMALIZERS:
            if mean is None:
                mean, std = take_normalization(rest, *keys)
        if mean is None:
            notes.append(_NOT_NAMED)
        wide = is_wide_resnet(rest)
        if wide:
            leave_out(rest, r"sub_block1\.", "sub_block1, which the authors' network never uses", notes)
        rest = (wide_resnet_keys if wide else resnet_keys)(rest)
        classifier = take_classifier(rest, "fc", notes)
        architecture, args = (describe_wide_resnet if wide else describe_resnet)(rest)
        conversion = Conversion(
            architecture,
            rest,
            args,
            image_size=32 if wide or architecture.endswith("_cifar") else 224,
            branch=chosen,
            mean=mean,
            std=std,
            classifier=classifier,
            notes=notes,
        )
        check_fit(conversion)
        return conversion


def _refuse_others(tensors: Tensors) -> None:
    """Networks of the zoo that look alike and compute something else."""
    other = None
    if "init_conv.weight" in tensors or "conv_2d.weight" in tensors:
        other = "DeepMind's network (init_conv, other padding and mostly another activation)"
    elif is_resnet(tensors) and "bn1.weight" not in tensors:
        other = "a pre-activation ResNet (no bn1 behind the first convolution)"
    elif any(".bn_list." in key for key in tensors):
        other = "a network with several norm branches (bn_list): leave --format out, its keys tell the format"
    if other:
        raise ValueError(
            f"this is {other}, which is not among the architectures of this format: convert a WRN or a ResNet with "
            "norm layers behind its convolutions"
        )
