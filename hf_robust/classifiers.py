"""From an encoder to a model that trains: with a linear head to be fine-tuned, or as it is; and classifiers out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import nn

from hf_robust.hub_files import network_files, replace_files
from hf_robust.hub_folders import check_weights, find_folder, is_path, read_config, read_weights
from hf_robust.models.backbones import create_backbone
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.models.norm import NormBranches, add_norm_branches, export_branch

__all__ = ["build_classifier", "has_timm_weights", "save_classifier", "start_from"]

logger = logging.getLogger(__name__)

_NAMED = 3  # tensors spelled out in a message
_MAKE_NEW = "export the encoder again with save_encoder, and keep config.json and model.safetensors together"
# Of a training checkpoint: what describes the backbone, and the parts of the model.
_SHARED = ("architecture", "model_args", "image_size", "norm_branches", "mean", "std")
_PARTS = ("normalize", "backbone", "projector", "classifier")


def build_classifier(
    encoder: str | Path,
    num_classes: int,
    norm_branches: Sequence[str] = ("adv",),
    image_size: int | None = None,
    head_init: Literal["zero", "default"] = "zero",
) -> RobustModelForPreTraining:
    """A pre-trained encoder with a fresh linear head, ready for fine-tuning.

    Every tensor of the encoder must be there and fit: a network that is partly random looks like one that transfers
    badly. Norm branches are found by name; branches that the source does not have start as copies of its `"adv"`
    branch (of its first one where there is none). A projector or an older classifier stays behind.

    Args:
        encoder (`str` or `Path`): Folder or Hub repository ``"user/name"`` of [`~hf_robust.hub.save_encoder`] or
            [`save_classifier`], which hold one norm branch, or a training checkpoint (or another folder that
            `RobustModelForPreTraining.save_pretrained` wrote), which holds all of them.
        num_classes (`int`): Outputs of the head, at least 2.
        norm_branches (`Sequence[str]`): Norm branches to fine-tune with. Defaults to ``("adv",)``.
        image_size (`int`, *optional*): Side of the images in pixels. Convolutional networks take any; position tables
            of transformers are resampled. Defaults to the encoder's own.
        head_init (`str`): `"zero"` (weight and bias, as published, the default) or `"default"` (torch's).

    Returns:
        [`~hf_robust.models.modeling.RobustModelForPreTraining`]: With `head="classifier"`, in eval mode; it takes
        pixels in [0, 1], its first layer is the encoder's own normalisation.

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
        ValueError: When the folder holds something else (a ``native/`` re-expression, an adapter), or tensors are
            missing, left over or of another shape; the message names them.

    Source: `Finetuning_Methods/Vanilla_Finetuning/utils.py` of RobustSSL_Benchmark@19dc714 (head set to zero). The
        released code finds branches by position and ignores tensors that do not fit, which left norm layers random
        in published runs; here names decide and everything must fit.
    """
    if head_init not in ("zero", "default"):
        raise ValueError(f"head_init must be 'zero' (published) or 'default' (torch's), got {head_init!r}")
    model = start_from(encoder, norm_branches, image_size, head="classifier", num_classes=num_classes)
    if head_init == "zero":
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    return model


def start_from(
    encoder: str | Path, norm_branches: Sequence[str] = ("adv",), image_size: int | None = None, **head: Any
) -> RobustModelForPreTraining:
    """A model whose backbone is a pre-trained encoder, ready to be trained on.

    Every tensor must be there and fit, and norm branches are found by name, as for [`build_classifier`].

    Args:
        encoder (`str` or `Path`): As for [`build_classifier`], or the name of a timm architecture that has pre-trained
            weights (`"vit_base_patch16_clip_quickgelu_224.openai"`), which timm downloads.
        norm_branches (`Sequence[str]`): Norm branches to train with. Defaults to ``("adv",)``.
        image_size (`int`, *optional*): Side of the images in pixels. Defaults to the encoder's own.
        head (`Any`): `head`, `num_classes`, `projector_layers`, `projector_dim` of the configuration; no head by
            default.

    Returns:
        [`~hf_robust.models.modeling.RobustModelForPreTraining`]: In eval mode; it takes pixels in [0, 1].

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
        ValueError: When the folder holds something else or the tensors do not fit.
    """
    config, tensors = _read_source(encoder)
    with torch.random.fork_rng(devices=[]):  # these fresh weights are all replaced
        trained = create_backbone(config.architecture, image_size=config.image_size, model_args=config.model_args)
    add_norm_branches(trained, config.norm_branches)
    _check_tensors(trained, tensors, config.architecture, str(encoder))
    trained.load_state_dict(tensors)
    args, size = dict(config.model_args or {}), image_size or config.image_size
    if size != config.image_size:
        _resize(trained, config.architecture, args, size)
    model = RobustModelForPreTraining(
        RobustPretrainingConfig(
            architecture=config.architecture,
            model_args=args,
            image_size=size,
            norm_branches=norm_branches,
            mean=config.mean,
            std=config.std,
            **{"head": "none", **head},
        )
    )
    _fill(model, trained, tuple(config.norm_branches))
    return model.eval()


def has_timm_weights(name: str | Path) -> bool:
    """Whether a name is that of a timm architecture, rather than of a folder or a Hub repository.

    Args:
        name (`str` or `Path`): Such as `"resnet18"` or `"vit_base_patch16_clip_224.openai"`.

    Returns:
        `bool`: `False` for other names.

    Raises:
        ValueError: For an architecture that has no pre-trained weights (of this name).
    """
    text = str(name)
    if is_path(name) or not timm.is_model(text):
        return False
    if not timm.models.is_model_pretrained(text):
        known = timm.list_pretrained(f"{text.partition('.')[0]}.*")
        others = f"write one of {_some(known)}" if known else "give the folder of an encoder, or a Hub repository"
        raise ValueError(f"timm has no pre-trained weights of the name {text!r}: {others}")
    return True


def save_classifier(
    model: RobustModelForPreTraining,
    directory: str | Path,
    branch: str = "adv",
    label_names: Sequence[str] | None = None,
    *,
    native: bool = True,
) -> Path:
    """Writes one norm branch of backbone and classifier as a folder that transformers and timm load.

    The layout is that of [`~hf_robust.hub.save_encoder`], with the classifier under timm's name:
    `AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline("image-classification")` load it under the
    same rule as the encoder, and [`~hf_robust.hub.load_encoder`] takes the backbone out of it.

    Args:
        model ([`~hf_robust.models.modeling.RobustModelForPreTraining`]): With `head="classifier"`; it is not changed.
        directory (`str` or `Path`): Folder to write, created when missing; other files in it stay.
        branch (`str`): The norm branch that leaves. Defaults to `"adv"`.
        label_names (`Sequence[str]`, *optional*): One name per class, in the order of the outputs; they become
            `id2label`. Defaults to transformers' ``LABEL_0``, ``LABEL_1`` ...
        native (`bool`): Also write ``native/`` for CIFAR ResNets. Defaults to `True`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: For a model without classifier or with an adapter inside, a wrong number of names, or a branch
            that the model does not have.
        OSError: When the files cannot be written; an earlier export there is intact.
    """
    if model.config.head != "classifier":
        raise ValueError(
            "save_classifier needs a model with head='classifier', this one has a projector: fine-tune it first "
            "(build_classifier), or release the encoder with save_encoder"
        )
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "the model has an adapter inside, which a plain reader cannot build: take it out with without_lora, or "
            "release it beside its encoder with save_adapter"
        )
    classes = model.classifier.out_features
    names = [f"LABEL_{i}" for i in range(classes)] if label_names is None else [str(name) for name in label_names]
    if len(names) != classes:
        raise ValueError(
            f"label_names must name each of the {classes} classes, got {len(names)} ({_some(names)}): pass the "
            "label_names of the data set it was trained on, or leave them out"
        )
    files = network_files(model, branch, native=native, label_names=names)
    target = replace_files(directory, files, "a classifier")
    logger.info("wrote norm branch %r of a %s classifier to %s", branch, model.config.architecture, target)
    return target


def _read_source(encoder: str | Path) -> tuple[RobustPretrainingConfig, dict[str, torch.Tensor]]:
    if not has_timm_weights(encoder):
        return _read(find_folder(encoder, ("config.json", "*.safetensors", "*.safetensors.index.json")), str(encoder))
    # By timm and not as the repository of the weights: networks that share one (quick GELU) differ in architecture.
    name = str(encoder)
    cfg = cast(Any, timm.get_pretrained_cfg(name))
    size = cfg.input_size[-1]
    config = RobustPretrainingConfig(
        architecture=name.partition(".")[0], image_size=size, norm_branches=("adv",), mean=cfg.mean, std=cfg.std
    )
    return config, timm.create_model(name, pretrained=True, num_classes=0).state_dict()


def _read(folder: Path, name: str) -> tuple[RobustPretrainingConfig, dict[str, torch.Tensor]]:
    """What the backbone was built with, and its tensors by the names they have in it."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} is an adapter, not an encoder: pass the encoder that it was trained on")
    values = read_config(folder)
    if values.get("model_type") == RobustPretrainingConfig.model_type:
        check_weights(folder)
        config = RobustPretrainingConfig(**{key: values[key] for key in _SHARED if key in values})
        return config, _checkpoint_backbone(folder, name)
    config = _released_config(values, name)
    check_weights(folder)
    # models that transformers built itself are saved under the name of its wrapper
    tensors = {key.removeprefix("timm_model."): tensor for key, tensor in read_weights(folder).items()}
    head = values["pretrained_cfg"].get("classifier") if values.get("num_classes") else None
    dropped = [key for key in tensors if isinstance(head, str) and key in (f"{head}.weight", f"{head}.bias")]
    if dropped:
        logger.info("%s is a classifier: %s stay behind", name, ", ".join(dropped))
    return config, {key: tensor for key, tensor in tensors.items() if key not in dropped}


def _checkpoint_backbone(folder: Path, name: str) -> dict[str, torch.Tensor]:
    if (folder / "teacher.safetensors").is_file():
        logger.warning(
            "%s also holds a teacher, which is not read; where a run releases its momentum encoder, the 'encoder' "
            "folder of the run is that one",
            name,
        )
    tensors = read_weights(folder)
    strange = [key for key in tensors if key.partition(".")[0] not in _PARTS]
    if strange:
        raise ValueError(
            f"{name!r} holds tensors that are no part of a training checkpoint ({_some(strange)}): load the "
            "checkpoint of a training run, or the folder that its run exported"
        )
    return {key.removeprefix("backbone."): t for key, t in tensors.items() if key.startswith("backbone.")}


def _released_config(values: Mapping[str, Any], name: str) -> RobustPretrainingConfig:
    """The configuration of a released encoder in the words of the training model."""
    if values.get("native_of"):
        raise ValueError(
            f"{name!r} re-expresses {values['native_of']} for readers without this package, and is the same network "
            f"in eval mode only: fine-tune the folder above it, {str(Path(name).parent)!r}"
        )
    cfg = values.get("pretrained_cfg") or {}
    if not cfg and str(values.get("model_type")).startswith("hf_robust"):
        raise ValueError(
            f"{name!r} is a checkpoint of a training with an adapter (model_type {values['model_type']!r}), not an "
            "encoder: pass the folder that its run exported, or the encoder that it started from"
        )
    if not values.get("architecture") or not cfg.get("mean") or not cfg.get("std"):
        raise ValueError(
            f"the configuration of {name!r} (model_type {values.get('model_type')!r}) does not say architecture, mean "
            "and std of a timm network: of CLIP and other networks of transformers take timm's form, such as "
            f"'vit_base_patch16_clip_quickgelu_224.openai'; of one of ours, {_MAKE_NEW}"
        )
    mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
    plain = not any(mean) and all(value == 1 for value in std)
    return RobustPretrainingConfig(
        architecture=values["architecture"],
        # newer timm repeats the number of classes there, of the classifier that stays behind
        model_args={key: value for key, value in (values.get("model_args") or {}).items() if key != "num_classes"},
        image_size=values.get("image_size") or cfg["input_size"][-1],
        norm_branches=(values.get("norm_branch") or "adv",),
        mean=None if plain else mean,
        std=None if plain else std,
    )


def _check_tensors(backbone: nn.Module, tensors: Mapping[str, torch.Tensor], architecture: str, name: str) -> None:
    wanted = backbone.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    other = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    found = [
        f"{len(keys)} {what} ({_some(keys)})"
        for keys, what in ((missing, "missing"), (unexpected, "left over"), (other, "of another shape"))
        if keys
    ]
    if found:
        way_out = _way_out(backbone, tensors, missing, unexpected, bool(other))
        raise ValueError(f"the tensors of {name!r} do not fit {architecture}, {', '.join(found)}: {way_out}")


def _way_out(
    backbone: nn.Module, tensors: Mapping[str, torch.Tensor], missing: list[str], unexpected: list[str], other: bool
) -> str:
    stem = str((getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv") or "conv1") + ".weight"
    wanted = backbone.state_dict()
    if any("lora_" in key for key in unexpected):
        return "an adapter is still inside; take it out with without_lora, or load what the run exported"
    if stem in missing or stem in wanted and tensors[stem].shape[2:] != wanted[stem].shape[2:]:
        return (
            "the first layer is that of another stem (resnet18_cifar starts with 3x3, resnet18 and resnet18_stl with "
            "7x7); name the network of these weights as architecture in config.json, or export the encoder again with "
            "save_encoder"
        )
    if missing and not other and all(_is_norm_entry(backbone, key) for key in missing):
        return (
            "these norm layers would start over and the network would not be the trained one; export the encoder "
            "again with save_encoder, or load the training checkpoint of its run"
        )
    return f"name architecture and model_args of these weights in config.json, or {_MAKE_NEW}"


def _is_norm_entry(backbone: nn.Module, key: str) -> bool:
    return getattr(backbone.get_submodule(key.rpartition(".")[0]), "running_mean", None) is not None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def _resize(backbone: nn.Module, architecture: str, args: dict[str, Any], image_size: int) -> None:
    """Makes a network take another image size where it is built for one; its arguments follow."""
    timm_cfg = timm.get_pretrained_cfg(architecture)
    if "img_size" in args:
        args["img_size"] = image_size
    elif timm_cfg is None or not timm_cfg.fixed_input_size:
        return
    if not hasattr(backbone, "set_input_size"):
        raise ValueError(
            f"timm cannot change the image size of {architecture}, got image_size={image_size}: leave image_size out, "
            "so that the images are resized to the encoder's own"
        )
    cast(Any, backbone).set_input_size(img_size=(image_size, image_size))


@torch.no_grad()
def _fill(model: RobustModelForPreTraining, trained: nn.Module, known: tuple[str, ...]) -> None:
    """Copies the encoder into the model, each norm branch from the one of its name."""
    branches, start = model.switch.branches, "adv" if "adv" in known else known[0]
    sources = {branch: export_branch(trained, branch if branch in known else start) for branch in branches}
    copied = [branch for branch in branches if branch not in known]
    if copied:
        logger.info("norm branches %s start as copies of %r", ", ".join(map(repr, copied)), start)
    backbone = export_branch(sources[branches[0]], branches[0])
    add_norm_branches(backbone, switch=model.switch)
    for name, layer in backbone.named_modules():
        if isinstance(layer, NormBranches):
            for branch in branches:
                getattr(layer, branch).load_state_dict(sources[branch].get_submodule(name).state_dict())
    model.backbone.load_state_dict(backbone.state_dict())
