"""The encoder leaves the house: one norm branch, timm's own names, loadable by the Auto classes of transformers.

Architectures that stock timm builds become an ordinary timm repository (`model_type: timm_wrapper`) that needs nothing
of ours. CIFAR stems and wide ResNets get a model type of their own with the code files beside the weights, and CIFAR
ResNets also a subfolder ``native/`` with their exact re-expression on stock timm.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from hf_robust.hub_files import network_files, replace_files
from hf_robust.hub_folders import check_weights, is_path, neither_folder_nor_repository, read_config
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

__all__ = ["encoder_features", "load_encoder", "save_encoder"]

logger = logging.getLogger(__name__)


def save_encoder(
    model: RobustModelForPreTraining, directory: str | Path, branch: str = "adv", *, native: bool = True
) -> Path:
    """Writes one norm branch of the backbone as a folder that transformers and timm load.

    The folder holds ``model.safetensors`` with timm's own keys, ``config.json`` (which records `norm_branch`,
    `image_size` and `hf_robust_version`) and ``preprocessor_config.json``, whose mean and std are the input
    normalisation of the training model. CIFAR stems and wide ResNets also get their code files, and CIFAR ResNets a
    subfolder ``native/`` where stock timm can carry them exactly; `native_subfolder` in the configuration says so.
    Everything is written beside the folder first and then moved in, so that a full disk leaves an earlier export as it
    was. Other files in the folder stay.

    Args:
        model ([`~hf_robust.models.modeling.RobustModelForPreTraining`]): The trained model, or any object with its
            `backbone` and `config`; it is not changed.
        directory (`str` or `Path`): Folder to write, created when missing.
        branch (`str`): The norm branch that leaves. Defaults to `"adv"`; the clean statistics are less robust.
        native (`bool`): Also write ``native/`` for CIFAR ResNets. Defaults to `True`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: For a branch that the model does not have; the message lists the known ones.
        OSError: When the files cannot be written; an earlier export there is intact.
    """
    target = replace_files(directory, network_files(model, branch, native=native))
    logger.info("wrote norm branch %r of %s to %s", branch, model.config.architecture, target)
    return target


def load_encoder(directory_or_repo: str | Path, **kwargs: Any) -> PreTrainedModel:
    """An encoder from a folder of [`save_encoder`] or from a Hub repository, ready to use.

    Weights are read from safetensors only, never from pickles, and no code of the repository is run.

    Args:
        directory_or_repo (`str` or `Path`): Folder, or name of a Hub repository ``"user/name"``; of a classifier the
            backbone is taken.
        **kwargs (`Any`): Passed on to `AutoModel.from_pretrained` (`subfolder`, `revision`, `token`, `dtype` ...).

    Returns:
        `transformers.PreTrainedModel`: In eval mode. Called with normalised images `(N, 3, H, W)` its output holds
        `pooler_output` `(N, num_features)`; [`encoder_features`] takes pixels in [0, 1] instead.

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
        ValueError: When the folder holds something else: a training checkpoint, no or damaged weights.
    """
    if kwargs.get("use_safetensors") is False or kwargs.get("trust_remote_code"):
        raise ValueError(
            "load_encoder reads safetensors only and runs no code of a repository: leave use_safetensors and "
            "trust_remote_code out, or call transformers.AutoModel.from_pretrained yourself"
        )
    kwargs = {**kwargs, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    source = str(directory_or_repo)
    if is_path(directory_or_repo):
        source = str(Path(source).expanduser())
        _check_folder(Path(source), str(kwargs.get("subfolder") or ""))
    try:
        model, info = AutoModel.from_pretrained(source, **kwargs)
    except OSError as error:
        if os.path.isdir(source):
            raise
        raise neither_folder_nor_repository(source, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"the weights of {source!r} lack {len(missing)} tensors of {model.config.architecture} "
            f"({', '.join(missing[:3])} ...), which would stay random: export the encoder again with save_encoder"
        )
    return model.eval()


def encoder_features(
    encoder: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The encoder as a function of pixels in [0, 1], the space in which attack budgets are measured.

    Args:
        encoder (`transformers.PreTrainedModel`): From [`load_encoder`] or `AutoModel.from_pretrained`, a ``native/``
            encoder included; its train mode and gradients are left as they are.
        mean (`Sequence[float]`, *optional*): Subtracted from the pixels. Defaults to the encoder's own, which its
            image processor applies too.
        std (`Sequence[float]`, *optional*): Divides the pixels. Defaults to the encoder's own.

    Returns:
        `Callable`: Maps images `(N, 3, H, W)` in [0, 1] to pooled features `(N, num_features)`, differentiably; equal
        to `features(x, branch)` of the training model.

    Raises:
        ValueError: When the encoder's configuration does not say its mean and std.
    """
    config: Any = encoder.config
    own = getattr(config, "pretrained_cfg", None) or {}
    mean, std = mean or own.get("mean"), std or own.get("std")
    if mean is None or std is None:
        raise ValueError(
            f"the configuration of this {type(encoder).__name__} does not say how its pixels are normalised: "
            "pass mean=(...) and std=(...) of its image processor"
        )
    device = next(encoder.parameters()).device
    shift, scale = (torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))
    factor = getattr(config, "upsampling", None) or 1

    def features(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise ValueError(f"pixels must be floats in [0, 1], got {x.dtype}: write images.float() / 255")
        x = (x - shift.to(x)) / scale.to(x)
        if factor != 1:
            x = F.interpolate(x, scale_factor=factor, mode="nearest")
        return encoder(pixel_values=x).pooler_output.flatten(1)

    return features


def _check_folder(folder: Path, subfolder: str) -> None:
    """Says what is wrong with a folder before transformers says it in its own way."""
    place = folder / subfolder
    if not place.is_dir():
        raise FileNotFoundError(f"no folder {str(place)!r}: write the path of a folder written by save_encoder")
    if read_config(place).get("model_type") == RobustPretrainingConfig.model_type:
        raise ValueError(
            f"{str(place)!r} is a training checkpoint, which holds all norm branches and the projector: load the "
            "'encoder' folder of its run, or export one with "
            "save_encoder(RobustModelForPreTraining.from_pretrained(checkpoint), directory)"
        )
    check_weights(place)
