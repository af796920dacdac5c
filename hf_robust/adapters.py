"""From a plain model to one with adapters and back, and the adapter as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from hf_robust.checkpoints import is_write_error
from hf_robust.models.lora import (
    ADAPTER,
    AdaptedConfig,
    AdaptedModel,
    AdapterModel,
    LoraPathModel,
    is_lora,
    lora_scales,
    lora_targets,
)
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.models.norm import export_branch

__all__ = [
    "AdapterModel",
    "LoraPathModel",
    "lora_targets",
    "merge_adapter",
    "save_adapter",
    "with_adapter",
    "with_lora_path",
    "without_lora",
]

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_LABELS = "labels.json"
_NETWORK = "timm_model"  # where transformers' timm wrapper keeps the network

_Adapted = TypeVar("_Adapted", bound=AdaptedModel)


def with_lora_path(
    model: RobustModelForPreTraining,
    rank: int = 8,
    init: Literal["matched", "peft"] = "matched",
    norm_update: Literal["both", "plain_only"] = "both",
) -> LoraPathModel:
    """A copy of a model with a second path for natural images, as AutoLoRa trains it.

    Fresh adapters change nothing: both paths give the same output.

    Args:
        model ([`RobustModelForPreTraining`]): The model; it is not changed.
        rank (`int`): Rank of the adapters. Defaults to 8, as released.
        init (`str`): `"matched"` (the default): A drawn from N(0, 1) and alpha the square root of the kernel's side,
            so that the first step moves the weights as far as in the released code (on 1 x 1 convolutions this is
            the released adapter); `"peft"`: PEFT's own start, which moves them about 80 times less.
        norm_update (`str`): Which path moves the running statistics in train mode: `"both"` (as released, the
            default) or `"plain_only"`.

    Returns:
        [`LoraPathModel`]: On the device and in the mode of `model`; all its parameters want gradients.

    Raises:
        ValueError: For a rank larger than a layer, an unknown choice, or a model that has adapters already.
        ImportError: Without peft.

    Source: AutoLoRa (Xu et al. 2024), all convolutions of the residual blocks and their shortcuts as in its code for
    32-pixel images.
    """
    return _adapted(model, LoraPathModel, lora_rank=rank, lora_init=init, norm_update=norm_update)


def with_adapter(model: RobustModelForPreTraining, rank: int = 8, alpha: float | None = None) -> AdapterModel:
    """A copy of a model of which only adapters and head train.

    Args:
        model ([`RobustModelForPreTraining`]): The model; it is not changed.
        rank (`int`): Rank of the adapters. Defaults to 8.
        alpha (`float`, *optional*): Scale of the adapters times the rank. The rank by default, a scale of 1.

    Returns:
        [`AdapterModel`]: On the device and in the mode of `model`, except that its backbone stays in evaluation mode.

    Raises:
        ValueError: For a rank larger than a layer, an alpha that is not positive, or a model that has adapters.
        ImportError: Without peft.

    Source: Hu et al. 2022, with PEFT's start of the factors.
    """
    return _adapted(model, AdapterModel, lora_rank=rank, lora_alpha=alpha)


def _adapted(model: RobustModelForPreTraining, kind: type[_Adapted], **fields: Any) -> _Adapted:
    if isinstance(model, AdaptedModel):
        raise ValueError(
            f"this {type(model).__name__} has adapters already: take them out first with without_lora or merge_adapter"
        )
    out = kind(AdaptedConfig.from_dict({**_plain_fields(model.config), **fields}))
    layers = {f"backbone.{name}": f"backbone.{name}.base_layer" for name in out.lora_layers}
    state = {}
    for key, value in model.state_dict().items():
        layer, _, last = key.rpartition(".")
        state[f"{layers.get(layer, layer)}.{last}"] = value
    missing, unexpected = out.load_state_dict(state, strict=False)
    if unexpected or not all(map(is_lora, missing)):
        raise RuntimeError(f"weights did not find their place: missing {missing}, unexpected {unexpected}")
    return _like(out, model)


def without_lora(model: AdaptedModel) -> RobustModelForPreTraining:
    """The plain model that AutoLoRa leaves: adapters thrown away (PEFT's `unload`), names as before.

    Args:
        model ([`LoraPathModel`]): The trained model; it is not changed. Of an [`AdapterModel`] the encoder it started
            from comes back, under the head it has learned.

    Returns:
        [`RobustModelForPreTraining`]: Equal to the norm branches of `model`, bit by bit.
    """
    state = {_plain_name(key): value for key, value in model.state_dict().items() if not is_lora(key)}
    return _plain(model, state)


def merge_adapter(model: AdapterModel) -> RobustModelForPreTraining:
    """A plain model whose weights have taken in the adapters, to be exported whole.

    Args:
        model ([`AdapterModel`]): The trained model; it is not changed.

    Returns:
        [`RobustModelForPreTraining`]: Equal to `model` up to rounding.

    Raises:
        ValueError: For an adapted convolution with groups, whose sum with an adapter has none.
    """
    state = {_plain_name(key): value.clone() for key, value in model.state_dict().items() if not is_lora(key)}
    for name, layer in model.lora_layers.items():
        if getattr(layer.get_base_layer(), "groups", 1) != 1:
            raise ValueError(
                f"the adapter of the grouped convolution {name!r} cannot be merged: save it as it is with save_adapter"
            )
        weight = state[f"backbone.{name}.weight"]
        weight += layer.get_delta_weight(ADAPTER).detach().view_as(weight)
    return _plain(model, state)


def _plain(model: AdaptedModel, state: dict[str, torch.Tensor]) -> RobustModelForPreTraining:
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are overwritten
        out = RobustModelForPreTraining(RobustPretrainingConfig.from_dict(_plain_fields(model.config)))
    out.load_state_dict(state)
    return _like(out, model)


_Model = TypeVar("_Model", bound=RobustModelForPreTraining)


def _like(out: _Model, model: RobustModelForPreTraining) -> _Model:
    first = next(model.parameters())
    placed: nn.Module = out
    placed.to(device=first.device, dtype=first.dtype)
    return out.train(model.training)


def _plain_fields(config: RobustPretrainingConfig) -> dict[str, Any]:
    own = ("model_type", "architectures", "lora_rank", "lora_alpha", "lora_init", "norm_update")
    return {key: value for key, value in config.to_dict().items() if key not in own}


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def save_adapter(
    model: AdapterModel | LoraPathModel, directory: str | Path, base: str, label_names: Sequence[str] | None = None
) -> Path:
    """Writes the adapters as an ordinary PEFT folder, beside the encoder they belong to.

    With C classes, `PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base, num_labels=C),
    directory)` gives the logits of `model` for normalised images. The folder holds PEFT's configuration, the weights
    in safetensors and ``labels.json``, the list of class names, for `id2label=dict(enumerate(...))` beside
    `num_labels=C` (PEFT has no place for them). Nothing is written unless `base` holds exactly the encoder that
    `model` carries.

    Args:
        model ([`AdapterModel`] or [`LoraPathModel`]): The trained model with `head="classifier"`. Of an
            [`AdapterModel`] the head is saved with the adapters, and `base` is the encoder. Of a [`LoraPathModel`] the
            adapters alone, which turn the classifier of [`without_lora`] into the natural path; `base` is that
            classifier.
        directory (`str` or `Path`): Folder to write, created when missing. Other files in it stay.
        base (`str`): Folder or Hub repository, written into the configuration as given.
        label_names (`Sequence[str]`, *optional*): Names of the classes in order. `"LABEL_0"` ... by default.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: For a model without classifier, another number of names, or another network in `base`.
        FileNotFoundError: When `base` cannot be read.
        OSError: When the files cannot be written; an earlier adapter there is intact.
    """
    names = _label_names(model, label_names)
    with torch.random.fork_rng(devices=[]):  # layers are drawn before they are filled, no business of a training
        return _write(_as_peft(model, base, len(names)), Path(directory).expanduser().resolve(), names)


def _as_peft(model: AdapterModel | LoraPathModel, base: str, classes: int) -> Any:
    """The classifier of `base` as a PeftModel that holds the adapters, and the head where it belongs to them."""
    import peft

    classifier = _read_base(base, classes)
    head = _check_same(classifier, model, base)
    exact = "|".join(re.escape(name) for name in model.lora_layers)
    settings = peft.LoraConfig(
        target_modules=rf"{_NETWORK}\.(?:{exact})",
        modules_to_save=[f"{_NETWORK}.{name}" for name in head] or None,
        base_model_name_or_path=str(base),
        **lora_scales(model.backbone, list(model.lora_layers), model.config, f"{_NETWORK}."),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1.*")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
        adapted: Any = peft.get_peft_model(classifier, settings)
    network = adapted.get_base_model().get_submodule(_NETWORK)
    with torch.no_grad():
        for name, layer in model.lora_layers.items():
            for factor in ("lora_A", "lora_B"):
                written = getattr(network.get_submodule(name), factor)[ADAPTER].weight
                written.copy_(getattr(layer, factor)[ADAPTER].weight)
        for name in head:
            _copy_head(model.classifier, network.get_submodule(name).modules_to_save[ADAPTER])
    return adapted


def _label_names(model: AdaptedModel, label_names: Sequence[str] | None) -> list[str]:
    if model.config.head != "classifier" or model.config.num_classes is None:
        raise ValueError(f"only a classifier's adapter can be saved, this model has a {model.config.head} as head")
    number = model.config.num_classes
    if label_names is not None and len(label_names) != number:
        raise ValueError(
            f"got {len(label_names)} label names for {number} classes: give one name per class, or none at all"
        )
    return list(label_names) if label_names is not None else [f"LABEL_{index}" for index in range(number)]


def _read_base(base: str, num_labels: int) -> Any:
    try:
        with _quiet():  # the head is reported as missing, which it must be
            return AutoModelForImageClassification.from_pretrained(
                base, num_labels=num_labels, use_safetensors=True, trust_remote_code=False
            ).eval()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"an adapter belongs to an encoder, and {base!r} cannot be read as one ({str(error).splitlines()[0]}): "
            "write the folder of save_encoder, or the Hub repository, that the fine-tuning started from"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_same(classifier: Any, model: AdaptedModel, base: str) -> tuple[str, ...]:
    """Names of the layers of `base` that are saved with the adapter, if all others are those of the model."""
    plain = without_lora(model)
    ours = export_branch(plain.backbone, model.default_branch).state_dict()
    network, cfg = getattr(classifier, _NETWORK, None), getattr(classifier.config, "pretrained_cfg", None) or {}
    head = cfg.get("classifier") or ()
    head = (head,) if isinstance(head, str) else tuple(head)
    theirs = {} if network is None else network.state_dict()
    if isinstance(model, LoraPathModel):
        ours |= {f"{name}.{key}": value for name in head for key, value in model.classifier.state_dict().items()}
    else:
        theirs = {key: value for key, value in theirs.items() if key.rpartition(".")[0] not in head}
    differ = sorted(theirs.keys() ^ ours.keys())
    differ += [key for key in theirs if key in ours and not _equal(theirs[key], ours[key])]
    mean, std = plain.config.mean or (0.0,) * 3, plain.config.std or (1.0,) * 3
    if (tuple(cfg.get("mean", ())), tuple(cfg.get("std", ()))) != (tuple(mean), tuple(std)):
        differ.append("mean and std of the images")
    side = (cfg.get("input_size") or (0, 0, 0))[-1]
    if isinstance(model, AdapterModel) and side != plain.config.image_size:
        # whoever loads the adapter takes the image processor of the base
        differ.append(f"the image size ({side} pixels there, {plain.config.image_size} here)")
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"{base!r} is not the network that this {plain.config.architecture} was fine-tuned from, they differ in "
            f"{', '.join(differ[:3])}{more}: name the folder or repository that the fine-tuning started from, or "
            "write one with save_encoder (for a LoRA path with save_classifier)"
        )
    return () if isinstance(model, LoraPathModel) else head


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.cpu(), b.cpu().to(a.dtype).view_as(a))


def _copy_head(classifier: Any, layer: Any) -> None:
    layer.weight.copy_(classifier.weight.view_as(layer.weight))  # some networks classify by a 1 x 1 convolution
    layer.bias.copy_(classifier.bias)


def _write(adapted: Any, target: Path, names: list[str]) -> Path:
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            # Not as PEFT would: it asks the Hub about the vocabulary of the base, which has none.
            adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            Path(folder, _LABELS).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
            for name in (*_FILES, _LABELS):
                os.replace(Path(folder, name), target / name)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise OSError(
            f"cannot write the adapter to {str(target)!r} ({error}); an adapter saved there earlier is intact: make "
            "room or choose another folder"
        ) from error
    return target
