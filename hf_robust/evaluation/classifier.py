"""Classifiers from folders, Hub repositories and objects: found, checked, with the image processor's layers inside."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from hf_robust.evaluation.pixel_classifier import PixelClassifier
from hf_robust.hub_folders import check_weights, find_folder, is_path, read_config
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

__all__ = ["PixelClassifier", "load_classifier"]

_ADAPTER = "adapter_config.json"
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_FILES = ("*.json", "*.safetensors")
_PLACES = "name the folder of a classifier, such as the output folder of a fine-tuning, or a repository 'user/name'"


def load_classifier(
    source: str | Path | nn.Module | Callable[[Tensor], Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    label_names: Sequence[str] | None = None,
    branch: str | None = None,
    subfolder: str | None = None,
    name: str | None = None,
) -> PixelClassifier:
    """Anything that classifies images as logits of pixels in [0, 1].

    Args:
        source (`str`, `Path`, `nn.Module` or `Callable`): a folder or Hub repository of an image classifier (of
            transformers or timm, of this package with its `native/`, of a PEFT adapter, or a training checkpoint),
            the output folder of a fine-tuning run, a model, or a function of images.
        mean (`Sequence[float]`, *optional*): input normalisation; default: that of the image processor or of the
            configuration. Of a plain module or function: none, it normalises by itself.
        std (`Sequence[float]`, *optional*): likewise.
        image_size (`int`, *optional*): side in pixels of the images that are evaluated and attacked; the network's
            own input size by default. Smaller images are enlarged inside.
        label_names (`Sequence[str]`, *optional*): default: those of the configuration.
        branch (`str`, *optional*): norm branch of a training model.
        subfolder (`str`, *optional*): folder inside of the source, such as `"native"`.
        name (`str`, *optional*): how reports call it; default: repository, last part of the path, or class.

    Returns:
        [`PixelClassifier`]: In evaluation mode when it was read from files.

    Raises:
        FileNotFoundError: When there is no such folder or repository.
        ValueError: For an encoder without classifier, missing weights, and for a model of transformers or timm that
            expects normalised images and does not say how.
    """
    if isinstance(source, PixelClassifier):
        return source
    given: dict[str, Any] = {"mean": mean, "std": std, "image_size": image_size, "label_names": label_names}
    if not isinstance(source, str | Path):
        return _from_object(source, branch, name, given)
    folder = _find(source, subfolder)
    inner = folder if not subfolder else folder / subfolder
    shown = str(source) if not is_path(source) else inner.resolve().name
    if shown in ("classifier", "adapter", "native"):
        shown = f"{inner.resolve().parent.name}/{shown}"
    facts = {"source": str(source), **_origin(inner)}
    with _quiet(), torch.random.fork_rng(devices=[]):  # fresh layers are drawn before they are filled
        model, found = _read(inner, str(source))
    values = {**found, **_fitting(model, branch, given)}
    return PixelClassifier(model.eval(), **values, branch=branch, name=name or shown, facts=facts)


def _fitting(model: Any, branch: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What the caller asked for, where the model can have it."""
    trains = isinstance(model, RobustModelForPreTraining)
    if branch is not None and (not trains or branch not in model.switch.branches):
        known = ", ".join(map(repr, model.switch.branches)) if trains else "none, an exported model holds one"
        raise ValueError(f"no norm branch {branch!r} to choose: the model has {known}; leave branch out")
    if trains and given["mean"] is not None:
        raise ValueError("a training model normalises in its first layer: leave mean and std out")
    if (given["mean"] is None) != (given["std"] is None):
        raise ValueError(
            f"got mean={given['mean']} and std={given['std']}: they belong together, one of them would meet the other "
            "of the image processor; give both or neither"
        )
    return {key: value for key, value in given.items() if value is not None}


def _from_object(source: Any, branch: str | None, name: str | None, given: dict[str, Any]) -> PixelClassifier:
    """A model or function that is there already."""
    shown = name or getattr(getattr(source, "config", None), "_name_or_path", "") or type(source).__name__
    if shown == "function":
        shown = source.__name__.strip("<>")
    found: dict[str, Any] = {}
    if isinstance(source, RobustModelForPreTraining):
        found = _of_training_model(source, shown)
    elif isinstance(source, nn.Module) and given["mean"] is None:
        found = _declared(source, shown)
    return PixelClassifier(source, **{**found, **_fitting(source, branch, given)}, branch=branch, name=str(shown))


def _declared(model: nn.Module, shown: str) -> dict[str, Any]:
    """What a model of transformers or timm says about its images; one that says nothing is refused."""
    given: Any = model
    base = given.get_base_model() if hasattr(given, "get_base_model") else given
    config = getattr(base, "config", None)
    if hasattr(base, "from_pretrained") and config is not None:
        cfg = getattr(config, "pretrained_cfg", None)
        if cfg and cfg.get("mean"):
            return {**_of_timm(cfg, config), **_classes(config)}
        raise ValueError(
            f"{shown} is a model of transformers, which takes normalised images, and its configuration does not say "
            "how they are normalised: pass mean and std of its image processor, or its folder instead of the model"
        )
    cfg = getattr(model, "pretrained_cfg", None)
    cfg = cfg if isinstance(cfg, Mapping) else {}
    if any(cfg.get("mean") or ()) or any(value != 1 for value in cfg.get("std") or ()):
        mean, std = (tuple(round(float(v), 4) for v in cfg[key]) for key in ("mean", "std"))
        raise ValueError(
            f"{shown} is a timm model whose configuration asks for normalised images (mean {mean}, std {std}), and "
            "budgets are measured in pixels of [0, 1]: pass mean and std to put the normalisation inside, or "
            "mean=(0, 0, 0), std=(1, 1, 1) if it was trained without"
        )
    return {}


def _find(source: str | Path, subfolder: str | None) -> Path:
    """The folder with the configuration; of the output folder of a run the classifier in it."""
    if not is_path(source):
        return _snapshot(str(source), subfolder)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: {_PLACES}")
    if not subfolder and not any((folder / file).is_file() for file in ("config.json", _ADAPTER)):
        for inner in ("classifier", "adapter"):
            if any((folder / inner / file).is_file() for file in ("config.json", _ADAPTER)):
                return folder / inner
    return folder


def _snapshot(repository: str, subfolder: str | None = None) -> Path:
    """What a repository holds in its root, or in one of its folders, downloaded."""
    wanted = [f"{subfolder}/{pattern}" for pattern in _FILES] if subfolder else list(_FILES)
    others = None if subfolder else ["*/*"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted, ignore_patterns=others))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {repository!r}: there is no such folder, and it could not be read as a Hub repository "
            f"({str(error).splitlines()[0]}); {_PLACES}"
        ) from error


def _read(folder: Path, shown: str) -> tuple[nn.Module, dict[str, Any]]:
    if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
        return _read_adapter(folder, shown)
    values = read_config(folder)
    check_weights(folder)
    kind = str(values.get("model_type"))
    if kind == RobustPretrainingConfig.model_type:
        if values.get("head") != "classifier":
            raise ValueError(
                f"{shown!r} is a checkpoint of pre-training with a projector, not a classifier: {_encoder_way_out()}"
            )
        model = RobustModelForPreTraining.from_pretrained(folder)
        return model, _of_training_model(model, shown)
    if kind.startswith("hf_robust") and not values.get("pretrained_cfg"):
        raise ValueError(
            f"{shown!r} is a checkpoint of a training with an adapter: pass the 'classifier' or 'adapter' folder that "
            "its run exported"
        )
    cfg = values.get("pretrained_cfg") or {}
    if cfg and not values.get("num_classes", cfg.get("num_classes")):
        raise ValueError(f"{shown!r} is an encoder without classifier: {_encoder_way_out()}")
    model, found, missing = _read_transformers(folder, shown)
    if missing:
        raise ValueError(
            f"the weights of {shown!r} lack {len(missing)} tensors ({', '.join(missing[:3])}), which would stay "
            f"random: if it is an encoder, {_encoder_way_out()}"
        )
    return model, found


def _encoder_way_out() -> str:
    return "fine-tune it first, with --protocol slf alf aff or examples/finetune.py"


def _read_transformers(
    folder: Path, shown: str, num_labels: int | None = None
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """An ordinary image classifier, its preprocessing, and the tensors that its files lack."""
    more = {} if num_labels is None else {"num_labels": num_labels}
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **more,
        )
    except ValueError as error:
        kind = AutoConfig.from_pretrained(folder).model_type
        raise ValueError(f"{shown!r} (model_type {kind!r}) is no image classifier: {error}") from error
    return model, {**_processing(folder, model.config, shown), **_classes(model.config)}, sorted(info["missing_keys"])


def _read_adapter(folder: Path, shown: str) -> tuple[nn.Module, dict[str, Any]]:
    """A PEFT adapter on the encoder or classifier that its configuration names."""
    from peft import PeftModel

    base = str(json.loads((folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path"))
    file = folder / "labels.json"
    names = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    try:
        place = find_folder(base, ()) if is_path(base) else _snapshot(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the adapter {shown!r} belongs to {base!r}, which is not there ({error}): put it back, or write its "
            f"place as base_model_name_or_path into {_ADAPTER}"
        ) from error
    model, found, missing = _read_transformers(place, base, len(names) if names else None)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        stored = list(tensors.keys())
    absent = [key for key in missing if not any(name.endswith(key) for name in stored)]
    if absent:
        raise ValueError(
            f"neither {base!r} nor the adapter {shown!r} holds {', '.join(absent[:3])}: save the adapter together "
            "with its head (modules_to_save), as save_adapter does"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
        adapted = PeftModel.from_pretrained(model, str(folder))
    return adapted, {**found, "label_names": names or found.get("label_names")}


def _of_training_model(model: RobustModelForPreTraining, shown: str) -> dict[str, Any]:
    config = model.config
    if config.head != "classifier":
        raise ValueError(f"{shown} has a {config.head} as head and gives no logits: {_encoder_way_out()}")
    size = config.image_size
    return {"image_size": size, "input_size": (size, size), "num_classes": config.num_classes}


def _of_timm(cfg: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Mean, std and size; of a `native/` re-expression the images are those before the enlargement."""
    height, width = cfg["input_size"][-2:]
    factor = getattr(config, "upsampling", None) or 1
    return {
        "mean": tuple(map(float, cfg["mean"])),
        "std": tuple(map(float, cfg["std"])),
        "input_size": (int(height), int(width)),
        "interpolation": cfg.get("interpolation") if cfg.get("interpolation") in _RESAMPLING.values() else "bicubic",
        "image_size": int(height) // factor,
    }


def _processing(folder: Path, config: Any, shown: str) -> dict[str, Any]:
    """What the image processor does, as arguments of [`PixelClassifier`]."""
    cfg = getattr(config, "pretrained_cfg", None) or {}
    if not (folder / "preprocessor_config.json").is_file():
        if cfg.get("mean"):
            return _of_timm(cfg, config)
        raise ValueError(
            f"{shown!r} has no image processor (preprocessor_config.json), so nobody knows how its images are "
            "normalised: pass mean and std, or save its image processor beside it"
        )
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    if hasattr(processor, "data_config"):  # transformers' wrapper around timm's own
        return _of_timm(processor.data_config, config)
    scale = 255 * (float(processor.rescale_factor) if processor.do_rescale else 1.0)
    normalises = bool(processor.do_normalize)
    mean = [float(v) / scale for v in processor.image_mean] if normalises else [0.0] * 3
    std = [float(v) / scale for v in processor.image_std] if normalises else [1.0 / scale] * 3
    size = _size_of(processor)
    return {
        "mean": mean,
        "std": std,
        "input_size": size,
        "interpolation": _RESAMPLING.get(int(getattr(processor, "resample", 3) or 0), "bicubic"),
        "image_size": None if size is None else min(size),
    }


def _size_of(processor: Any) -> tuple[int, int] | None:
    """The size at which images leave the processor."""
    cropped = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(cropped or (processor.size if processor.do_resize else None) or {})
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    edge = size.get("shortest_edge")
    return (int(edge), int(edge)) if edge else None


def _classes(config: Any) -> dict[str, Any]:
    names = [str(config.id2label[k]) for k in sorted(config.id2label)] if config.id2label else []
    numbered = all(name == f"LABEL_{k}" for k, name in enumerate(names))
    return {"num_classes": len(names) or None, "label_names": None if numbered else names}


def _origin(folder: Path) -> dict[str, Any]:
    """Method, data and mode, from the report that this package writes beside weights."""
    try:
        told = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(told, dict) or told.get("task") != "classifier":
        return {}
    start = told.get("encoder") or {}
    values = {
        "title": told.get("name"),
        "mode": (told.get("objective") or {}).get("name"),
        "method": start.get("objective"),
        "coreset": start.get("coreset"),
        "pretrained_on": start.get("dataset"),
        "finetuned_on": (told.get("dataset") or {}).get("name"),
    }
    return {key: value for key, value in values.items() if value}


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
