"""The second network of a method: a momentum encoder that follows the model, or a frozen encoder from elsewhere."""

from __future__ import annotations

import copy
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoImageProcessor

from hf_robust.adapters import merge_adapter, with_adapter
from hf_robust.attacks import frozen
from hf_robust.checkpoints import fingerprint
from hf_robust.classifiers import has_timm_weights, start_from
from hf_robust.hub import encoder_features, load_encoder
from hf_robust.models.modeling import RobustModelForPreTraining
from hf_robust.objectives.base import Objective

__all__ = ["FrozenTeacher", "build_teacher", "load_teacher", "restore_teacher", "save_teacher", "student_of"]

logger = logging.getLogger(__name__)

_MOMENTUM_FILE, _FROZEN_FILE = "teacher.safetensors", "teacher.json"
_TOLERANCE = 1e-3  # of features of one image, relative: the same network in another order of arithmetic


class FrozenTeacher(nn.Module):
    """An encoder that only answers: pixels in, features out; evaluation mode, no gradient, no graph, always.

    Args:
        network (`nn.Module`): what [`load_teacher`] takes; it is frozen in place.
        name (`str`): where it comes from, for messages and checkpoints.
        mean, std (`Sequence[float]`, *optional*): of the pixels, for encoders of transformers whose configuration does
            not say them.
    """

    def __init__(self, network: nn.Module, name: str, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.name, self._statistics = name, {"mean": mean, "std": std}
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images (`torch.Tensor`): `(N, 3, H, W)` in [0, 1]; the teacher's own normalisation is inside.

        Returns:
            `torch.Tensor`: `(N, D)`, without a graph.
        """
        network: Any = self.network
        if isinstance(network, RobustModelForPreTraining):
            return network.features(images, network.default_branch)
        if hasattr(network, "config"):
            return encoder_features(network, **self._statistics)(images)
        return network(images)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the weights, see `checkpoints.fingerprint`; a checkpoint keeps it in place of them."""
        return fingerprint(self.network)


def load_teacher(source: Any) -> FrozenTeacher:
    """A frozen teacher from wherever an encoder may come from.

    Args:
        source (`str`, `Path` or `nn.Module`): folder of [`~hf_robust.hub.save_encoder`]; Hub repository
            ``"user/name"`` that `AutoModel` reads (safetensors, no code of its own) and whose output is pooled (of
            CLIP and its kin the image tower, before its projection); name of a timm architecture with pre-trained
            weights; or a network, of which a copy is taken: a `RobustModelForPreTraining`, an encoder of
            [`~hf_robust.hub.load_encoder`], or any module that maps pixels in [0, 1] to features `(N, D)`.

    Returns:
        [`FrozenTeacher`]: On the CPU.

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
        ValueError: When it holds something else, or nothing says how its pixels are normalised.
    """
    if isinstance(source, FrozenTeacher):
        return source
    if isinstance(source, nn.Module):
        return FrozenTeacher(copy.deepcopy(source), type(source).__name__)
    if has_timm_weights(source):
        return FrozenTeacher(start_from(source), str(source))
    network: Any = load_encoder(source)
    if hasattr(network, "get_image_features"):  # CLIP and its kin: the text tower has nothing to say
        network = network.vision_model
    if (getattr(network.config, "pretrained_cfg", None) or {}).get("mean"):
        return FrozenTeacher(network, str(source))
    processor: Any = AutoImageProcessor.from_pretrained(str(source))  # transformers' own networks say it there
    return FrozenTeacher(network, str(source), processor.image_mean, processor.image_std)


def student_of(teacher: str | Path, objective: Objective, image_size: int | None = None) -> RobustModelForPreTraining:
    """The model of a method that starts from its teacher: the same network, to be trained.

    Args:
        teacher (`str` or `Path`): folder, Hub repository or timm name, of a network that timm builds (CLIP's image
            towers in timm's form included, `"vit_base_patch16_clip_quickgelu_224.openai"`).
        objective ([`Objective`]): says norm branches and head, and whether adapters train instead of all weights.
        image_size (`int`, *optional*): side of the images; default: the teacher's own.

    Returns:
        [`RobustModelForPreTraining`]: equal to the teacher on every image, in eval mode.

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
        ValueError: When the weights do not fit, timm has none of that name, or adapters cannot be taken in.
    """
    model = start_from(teacher, objective.norm_branches, image_size, head=objective.head)
    if objective.trains != "adapter":
        return model
    adapted = with_adapter(model, objective.adapter_rank)  # type: ignore[attr-defined]
    merge_adapter(adapted)  # now, not after the training, if the network cannot take the adapters in
    return adapted


def build_teacher(objective: Objective, model: Any, source: Any, device: Any) -> Any:
    """The second network that a method declares by its `teacher_kind`.

    Args:
        objective ([`Objective`]): the method.
        model ([`RobustModelForPreTraining`]): what trains, on `device`.
        source (`Any`): of a frozen teacher, see [`load_teacher`]; else `None`.
        device (`torch.device`): where it answers.

    Returns:
        `nn.Module` or `None`: a copy of the model in train mode (`"ema"`), a [`FrozenTeacher`] (`"frozen"`), nothing.

    Raises:
        ValueError: for a teacher that is missing, that no one asked for, that cannot see images of the model's size,
            or whose features are of another width than the model's.
    """
    if source is not None and objective.teacher_kind != "frozen" and not objective.pseudo_classes:
        raise ValueError(
            f"{objective.title} learns from no frozen teacher, got teacher={_shown(source)}: leave it out, or train "
            "DeACL or FARE"
        )
    if objective.teacher_kind is None:
        return None
    if objective.teacher_kind == "ema":
        return copy.deepcopy(model).requires_grad_(False).to(device).train()
    if source is None:
        raise ValueError(
            f"{objective.title} learns from a frozen teacher and none is given: name the folder of an encoder, a Hub "
            "repository or a timm architecture with pre-trained weights (--teacher, in Python teacher=...)"
        )
    teacher = load_teacher(source).to(device)
    _check_fit(objective, model, teacher, device)
    return teacher


def save_teacher(teacher: Any, checkpoint: Path) -> None:
    """Put into a checkpoint what a resume needs of the teacher: weights of one that moves, the digest of a frozen one.

    Args:
        teacher (`nn.Module` or `None`): of [`build_teacher`].
        checkpoint (`Path`): the folder.
    """
    if isinstance(teacher, FrozenTeacher):
        facts = {"name": teacher.name, "fingerprint": teacher.fingerprint}
        (checkpoint / _FROZEN_FILE).write_text(json.dumps(facts, indent=1))
    elif teacher is not None:
        save_model(teacher, str(checkpoint / _MOMENTUM_FILE))


def restore_teacher(teacher: Any, checkpoint: str | Path) -> None:
    """Bring a teacher to the state of a checkpoint, or make sure that a frozen one is still the same.

    Args:
        teacher (`nn.Module` or `None`): of [`build_teacher`].
        checkpoint (`str` or `Path`): the folder.

    Raises:
        ValueError: for a frozen teacher with other weights; wherever the same weights lie now, they are the same.
    """
    folder = Path(checkpoint)
    if isinstance(teacher, FrozenTeacher):
        stored = json.loads((folder / _FROZEN_FILE).read_text())
        if stored["fingerprint"] != teacher.fingerprint:
            raise ValueError(
                f"{str(folder)!r} was trained with the teacher {stored['name']!r} (weights {stored['fingerprint']}), "
                f"got {teacher.name!r} (weights {teacher.fingerprint}): resume with that teacher, or start anew in "
                "another --output_dir"
            )
    elif teacher is not None:
        load_model(teacher, str(folder / _MOMENTUM_FILE))


def _shown(source: Any) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else repr(str(source))


@torch.no_grad()
def _check_fit(objective: Objective, model: Any, teacher: FrozenTeacher, device: Any) -> None:
    size = model.config.image_size
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        expected = teacher(x)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the teacher {teacher.name!r} cannot see images of {size} pixels ({error}): train at the teacher's own "
            "size (--image_size), or take another teacher"
        ) from error
    if objective.head != "none":
        return
    if expected.shape != (2, model.num_features):
        raise ValueError(
            f"the teacher {teacher.name!r} has features {tuple(expected.shape[1:])}, those of the model are "
            f"({model.num_features},): both are compared, take a student as wide as its teacher"
        )
    if objective.starts_from_teacher:
        with frozen(model):
            found = model.features(x, model.default_branch)
        if (found - expected).norm() > _TOLERANCE * expected.norm():
            logger.warning(
                "%s starts from its teacher, and this model is another network than %s: build it with "
                "hf_robust.teachers.student_of",
                *(objective.title, teacher.name),
            )
