"""What every converter shares: the result of a conversion, and the small steps from foreign keys to timm's."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from hf_robust.models.backbones import create_backbone

__all__ = [
    "SINGLE",
    "Conversion",
    "Converter",
    "check_fit",
    "choose_branch",
    "keep_branch",
    "leave_out",
    "norm_branches",
    "some",
    "strip_prefixes",
    "take",
    "take_classifier",
    "take_normalization",
]

Tensors = dict[str, torch.Tensor]

#: Branch name of networks whose norm layers have one set of statistics only.
SINGLE = "single"

_NAMED = 4
_AUTHORS_NAMES = {"normal": "clean", "nor": "clean", "nat": "clean", "pgd": "adv", "pgd_ce": "adv_ce"}
_COUNTER = ".num_batches_tracked"


@dataclass
class Conversion:
    """A network in the words of timm, read from the file of somebody else.

    Args:
        architecture (`str`): timm name, one of ours included.
        tensors (`dict[str, torch.Tensor]`): Backbone under timm's keys, without classifier.
        model_args (`dict[str, Any]`): Arguments of the architecture.
        image_size (`int`): Side in pixels of the images that the authors used.
        branch (`str`): Norm branch taken: `"clean"`, `"adv"`, `"adv_ce"`, or [`SINGLE`].
        mean (`tuple[float, ...]`, *optional*): Input normalisation in the file, for pixels in [0, 1].
        std (`tuple[float, ...]`, *optional*): Likewise.
        classifier (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Weight `(classes, features)` and bias
            `(classes,)` of the linear classifier in the file.
        notes (`list[str]`): What was left out or assumed, one sentence each.
    """

    architecture: str
    tensors: Tensors
    model_args: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    branch: str = SINGLE
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classifier: tuple[torch.Tensor, torch.Tensor] | None = None
    notes: list[str] = field(default_factory=list)


class Converter(ABC):
    """One family of published checkpoints. A file in this folder with a subclass is a format; no list names it.

    Attributes:
        names (`tuple[str, ...]`): What `--format` calls it; the first is the file's name.
        source (`str`): The repository whose code wrote such files.
    """

    names: ClassVar[tuple[str, ...]]
    source: ClassVar[str]

    @abstractmethod
    def recognise(self, tensors: Tensors) -> str | None:
        """Why these keys are of this family, or nothing.

        Args:
            tensors (`dict[str, torch.Tensor]`): State dictionary as it lies in the file.

        Returns:
            `str` or `None`: The reason, naming keys.
        """

    @abstractmethod
    def convert(self, tensors: Tensors, branch: str | None = None) -> Conversion:
        """The state dictionary in the words of timm; changes nothing and reads nothing else.

        Args:
            tensors (`dict[str, torch.Tensor]`): State dictionary as it lies in the file.
            branch (`str`, *optional*): Norm branch by name. Defaults to `"adv"` where there is one.

        Returns:
            [`Conversion`]: Every tensor of the file is in it or named in its notes.

        Raises:
            ValueError: When keys are missing, left over or of another shape, or there is no such branch.
        """


def some(names: Sequence[str]) -> str:
    """The first few names of a list, for messages."""
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def strip_prefixes(tensors: Tensors, *prefixes: str) -> Tensors:
    """A copy without those prefixes that every key has, outermost first."""
    for prefix in prefixes:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return dict(tensors)


def take(tensors: Tensors, pattern: str) -> Tensors:
    """Removes and returns the entries whose keys begin with a regular expression."""
    found = {key: value for key, value in tensors.items() if re.match(pattern, key)}
    for key in found:
        del tensors[key]
    return found


def leave_out(tensors: Tensors, pattern: str, what: str, notes: list[str]) -> None:
    """Removes entries that do not belong to the network, and says so."""
    found = list(take(tensors, pattern))
    if found:
        notes.append(f"left out: {what} ({len(found)} tensors: {some(found)})")


def take_normalization(
    tensors: Tensors, mean_key: str, std_key: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Removes the buffers of an input normalisation.

    Returns:
        `tuple`: Mean and standard deviation per channel, or `None` twice when there are no such buffers.

    Raises:
        ValueError: When only one of them is there, or they do not hold one value for each of three channels.
    """
    mean, std = tensors.pop(mean_key, None), tensors.pop(std_key, None)
    if mean is None and std is None:
        return None, None
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3 or not bool((std > 0).all()):
        raise ValueError(
            f"an input normalisation has three means and three positive standard deviations, got {mean_key} = {mean} "
            f"and {std_key} = {std}: check the file, it may be damaged"
        )
    # through text: 0.485, not the 0.48500001430511475 that its single precision reads as
    plain = [tuple(float(str(np.float32(v))) for v in t.flatten().tolist()) for t in (mean, std)]
    return plain[0], plain[1]


def take_classifier(tensors: Tensors, name: str, notes: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Removes a linear classifier; one without bias gets a bias of zeros, and a note."""
    if f"{name}.weight" not in tensors:
        return None
    weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
    if bias is None:
        notes.append(f"the classifier {name} has no bias in the file: its bias is zero")
        bias = weight.new_zeros(weight.shape[0])
    return weight, bias


def norm_branches(tensors: Tensors) -> int:
    """How many numbered norm layers stand side by side (`bn_list.0`, `bn_list.1` ...); 0 for plain norm layers."""
    found = {int(match[1]) for key in tensors if (match := re.search(r"\.bn_list\.(\d+)\.", key))}
    return max(found) + 1 if found else 0


def choose_branch(known: Sequence[str], branch: str | None) -> str:
    """The branch that was asked for, by our name or the authors' (`normal`, `pgd`, `pgd_ce`).

    Raises:
        ValueError: For another name; the message lists the known ones.
    """
    if branch is None:
        return "adv" if "adv" in known else known[0]
    name = _AUTHORS_NAMES.get(branch, branch)
    if name in known:
        return name
    if tuple(known) == (SINGLE,):
        raise ValueError(f"this file has one set of norm layers and so no branch {branch!r}: leave the branch out")
    raise ValueError(f"unknown norm branch {branch!r}: this file has {', '.join(known)}")


def keep_branch(tensors: Tensors, order: Sequence[str], branch: str | None, notes: list[str]) -> tuple[Tensors, str]:
    """Keeps one of the norm layers that stand side by side, chosen by name.

    Args:
        tensors (`dict[str, torch.Tensor]`): Without the projector, which has norm layers of its own.
        order (`Sequence[str]`): Names of `bn_list.0`, `bn_list.1` ... in this family.
        branch (`str`, *optional*): The one to keep.
        notes (`list[str]`): Is told which ones stay behind.

    Returns:
        `tuple`: The tensors without `bn_list` in their keys, and the branch.

    Raises:
        ValueError: When the file has more branches than this family, or not the one asked for.
    """
    count = norm_branches(tensors)
    if count == 0:  # bn_names=None of the released code: one layer, still called bn_list
        chosen = choose_branch((SINGLE,), branch)
        return {key.replace(".bn_list.", "."): value for key, value in tensors.items()}, chosen
    if count > len(order):
        raise ValueError(
            f"the norm layers have {count} branches (bn_list.0 to bn_list.{count - 1}), this format has "
            f"{len(order)}: {', '.join(order)}; three are written by AdvCL and A-InfoNCE, --format advcl"
        )
    known = order[:count]
    chosen = choose_branch(known, branch)
    wanted = f".bn_list.{known.index(chosen)}."
    kept = {key.replace(wanted, "."): v for key, v in tensors.items() if ".bn_list." not in key or wanted in key}
    others = [f"{name} (bn_list.{i})" for i, name in enumerate(known) if name != chosen]
    notes.append(f"norm branch {chosen} is bn_list.{known.index(chosen)} of this file")
    if others:
        notes.append(f"left out: the other norm branches, {', '.join(others)}")
    return kept, chosen


def check_fit(conversion: Conversion) -> None:
    """Makes sure that the tensors are those of the architecture, each of the right shape and finite.

    Counters of batches that files from old versions of torch lack are set to zero; no result depends on them.

    Raises:
        ValueError: Lists what is missing, left over, of another shape or not finite.
    """
    with torch.device("meta"):  # only names and shapes are wanted
        net: Any = create_backbone(
            conversion.architecture, image_size=conversion.image_size, model_args=conversion.model_args
        )
    wanted, found = net.state_dict(), conversion.tensors
    counters = [key for key in wanted if key.endswith(_COUNTER) and key not in found]
    if counters:
        found |= {key: torch.zeros((), dtype=torch.int64) for key in counters}
        conversion.notes.append(f"{len(counters)} counters of batches (num_batches_tracked) are not in the file: zero")
    groups = {
        "missing": [key for key in wanted if key not in found],
        "left over": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted
            if key in found and found[key].shape != wanted[key].shape
        ],
        "not finite": [key for key in wanted if key in found and not bool(torch.isfinite(found[key]).all())],
    }
    wrong = [f"{len(keys)} {what} ({', '.join(keys)})" for what, keys in groups.items() if keys]
    if wrong:
        raise ValueError(
            f"the tensors do not fit {conversion.architecture} {conversion.model_args or ''}: {'; '.join(wrong)}. "
            "Every tensor has to be used or known: check that the file is whole, and that it is of this format"
        )
    if conversion.classifier is None:
        return
    weight, bias = conversion.classifier
    if tuple(weight.shape) != (len(bias), net.num_features):
        raise ValueError(
            f"the classifier of the file has weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, one on "
            f"{net.num_features} pooled features was expected: the network is used at another image size, or the file "
            "is of another format"
        )
