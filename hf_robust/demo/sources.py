"""What the demo stands on: the classifiers it compares, encoders with a probe among them, and images to pick from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hf_robust.attacks import frozen
from hf_robust.checkpoints import latest_complete
from hf_robust.classifiers import build_classifier
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.demo.rendering import read_picture
from hf_robust.evaluation.classifier import PixelClassifier, load_classifier
from hf_robust.evaluation.probe import extract_features, fit_linear_probe, stratified_indices
from hf_robust.hub_folders import find_folder, is_path, read_config
from hf_robust.objectives import load_objective, objective_names

__all__ = [
    "Exhibit",
    "Picked",
    "default_models",
    "examples_of",
    "find_model",
    "known_dataset",
    "labelled_images",
    "load_model",
    "pictures_in",
    "probed",
    "report_of",
    "title_of",
]

_FIRST_RUN = "python examples/pretrain.py"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Picked:
    """An image to pick from.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`): uint8.
        truth (`str`, *optional*): name of its class.
    """

    image: Tensor
    truth: str | None = None


@dataclass(frozen=True)
class Exhibit:
    """Everything the page needs.

    Args:
        models (`dict[str, PixelClassifier]`): `"robust"`, and `"plain"` where there is one.
        titles (`dict[str, str]`): what each of them is, for the reader.
        examples (`tuple[Picked, ...]`): images to pick from.
        label_names (`tuple[str, ...]`, *optional*): for models that do not name their classes.
    """

    models: dict[str, PixelClassifier]
    titles: dict[str, str]
    examples: tuple[Picked, ...] = ()
    label_names: tuple[str, ...] | None = None

    def size_of(self, name: str) -> int:
        """Side in pixels of the images that a model takes."""
        model = self.models[name]
        return model.image_size or (min(model.input_size) if model.input_size else 224)

    def truth_of(self, picture: Image.Image) -> str | None:
        """The class of a picture that is one of the examples, pixel by pixel; else `None`."""
        pixels, _ = read_picture(picture, None)
        stored = (pixels * 255).round().to(torch.uint8)
        return next((example.truth for example in self.examples if torch.equal(stored, example.image)), None)


def default_models(folder: str | Path = "outputs/digits") -> tuple[str, str]:
    """The encoder and the contrast encoder that the first command of the README leaves.

    Args:
        folder (`str` or `Path`): output folder of that run.

    Returns:
        `tuple[str, str]`: for [`find_model`].

    Raises:
        FileNotFoundError: if they are not there; the message says which command makes them.
    """
    folder = Path(folder)
    contrasts = [path for path in sorted(folder.glob("contrast_*")) if latest_complete(path)]
    if not (folder / "encoder" / "config.json").is_file() or not contrasts:
        raise FileNotFoundError(
            f"there is no encoder with its contrast in {str(folder)!r}, which the demo shows when nothing else is "
            f"named: run '{_FIRST_RUN}' first (minutes on a CPU), or name a model with --model"
        )
    return str(folder / "encoder"), str(contrasts[0])


def find_model(source: str) -> tuple[str, bool]:
    """Where the weights of a model are, and whether it is an encoder without classes.

    Args:
        source (`str`): folder or Hub repository of a classifier or an encoder, or the output folder of a run.

    Returns:
        `tuple[str, bool]`: folder or repository, and `True` for an encoder.

    Raises:
        FileNotFoundError: when there is no such folder or repository.
        ValueError: when the folder holds no model.
    """
    folder = find_folder(source, ("*.json",))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return source, False
    if is_path(source) and not (folder / "config.json").is_file():
        for inner in ("classifier", "adapter", "encoder"):
            if any((folder / inner / file).is_file() for file in ("config.json", "adapter_config.json")):
                return find_model(str(folder / inner))
        checkpoint = latest_complete(folder)
        if checkpoint:
            return find_model(checkpoint)
    config = read_config(folder)
    cfg = config.get("pretrained_cfg") or {}
    if config.get("model_type") == "hf_robust_pretraining":
        return source, config.get("head") != "classifier"
    return source, bool(cfg) and not config.get("num_classes", cfg.get("num_classes"))


def report_of(source: str) -> tuple[dict[str, Any], bool]:
    """The report of a model or of its run.

    Args:
        source (`str`): folder or Hub repository.

    Returns:
        `tuple[dict, bool]`: empty where there is none, and whether it stands beside the weights.
    """
    try:
        folder = find_folder(source, ("report.json",))
    except FileNotFoundError:
        return {}, False
    # A checkpoint of the contrast stands two folders below the report of its run.
    places = [folder, folder.resolve().parent, folder.resolve().parent.parent] if is_path(source) else [folder]
    for place in places:
        try:
            found = json.loads((place / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found, place == folder
    return {}, False


def known_dataset(sources: Sequence[str]) -> str | None:
    """The data set that the models' reports name, if it needs no download: the digits; else `None`."""
    names = {str((report_of(source)[0].get("dataset") or {}).get("name")) for source in sources}
    return "digits" if "digits" in names else None


def title_of(source: str) -> str:
    """What a model is, for the reader; never the path of a folder on this machine.

    Args:
        source (`str`): as of [`find_model`].

    Returns:
        `str`: the title of its card, the method of a contrast, a repository, or the last part of a path.
    """
    place, _ = find_model(source)
    report, beside = report_of(place)
    if beside and report.get("name"):
        return str(report["name"])
    if not is_path(place):
        return place
    folder = Path(place).expanduser().resolve()
    method = folder.parent.name.removeprefix("contrast_")
    if folder.parent.name == f"contrast_{method}" and method in objective_names():
        return load_objective(method)().title
    inner = folder.name in ("classifier", "adapter", "encoder", "native") or folder.name.startswith("checkpoint-")
    return folder.parent.name if inner else folder.name


def load_model(
    source: str,
    train: ImageDataset | None,
    *,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> PixelClassifier:
    """A classifier, or an encoder that gets a linear probe.

    Args:
        source (`str`): as of [`find_model`].
        train ([`ImageDataset`], *optional*): labelled images for the probe of an encoder.
        image_size (`int`, *optional*): side in pixels of the images; default: the model's own.
        device (`torch.device` or `str`): where the model goes.
        progress (`bool`, defaults to `True`): show a bar while features are computed.

    Returns:
        [`PixelClassifier`]: held still, on `device`.

    Raises:
        ValueError: for an encoder without images, or whatever is no model.
    """
    place, is_encoder = find_model(source)
    if not is_encoder:
        classifier = load_classifier(place, image_size=image_size)
    elif train is None:
        raise ValueError(
            f"{source!r} is an encoder and has no classes: name labelled images for a linear probe with "
            "--dataset_name, or fine-tune it first with 'hf-robust finetune' and name the classifier"
        )
    else:
        classifier = probed(place, train, image_size=image_size, device=device, progress=progress)
    classifier.to(device)
    for network in (classifier, *classifier.networks):
        network.eval().requires_grad_(False)
    return classifier


def probed(
    encoder: str,
    train: ImageDataset,
    *,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> PixelClassifier:
    """An encoder with a linear classifier fitted on its frozen features.

    Args:
        encoder (`str`): folder or Hub repository of an encoder, or a checkpoint of pre-training.
        train ([`ImageDataset`]): labelled images.
        image_size (`int`, *optional*): side in pixels; default: the encoder's own.
        device (`torch.device` or `str`): where the features are computed.
        progress (`bool`, defaults to `True`): show a bar when it takes more than a few seconds.

    Returns:
        [`PixelClassifier`]: with the names of the data set's classes.

    Raises:
        ValueError: for images without labels or of one class only.
    """
    if train.labels is None or (train.num_classes or 0) < 2:
        raise ValueError(
            f"{train.name!r} has no labels with two classes or more, and a linear probe needs them: name its label "
            "column with --label_column, or other images with --dataset_name"
        )
    classes = cast(int, train.num_classes)
    network: Any = build_classifier(encoder, classes, ("adv",), image_size)
    network = network.to(device)
    with frozen(network):
        x = extract_features(
            lambda images: network.features(images, "adv"),
            train,
            size=network.config.image_size,
            device=device,
            progress=progress,
        )
    head = fit_linear_probe(x, train.labels.cpu(), classes)
    network.classifier.load_state_dict(head.state_dict())
    return load_classifier(network, label_names=train.label_names, name=Path(encoder).name)


def labelled_images(
    name: str, split: str, n: int | None, *, image_column: str | None = None, label_column: str | None = None
) -> ImageDataset:
    """A split for the probe or to pick from, of at most `n` images, of each class its share.

    Args:
        name (`str`): Hub id, folder, or `"digits"`.
        split (`str`): of it.
        n (`int`, *optional*): default: all.
        image_column (`str`, *optional*): found by type when unset.
        label_column (`str`, *optional*): likewise.
    """
    return load_image_dataset(name, split, image_column=image_column, label_column=label_column, max_examples=n)


def examples_of(dataset: ImageDataset, n: int = 12) -> tuple[Picked, ...]:
    """A few images of a data set, of as many classes as possible.

    Args:
        dataset ([`ImageDataset`]): with or without labels.
        n (`int`, defaults to 12): at most so many.
    """
    rows = torch.arange(min(n, len(dataset)))
    if dataset.labels is not None and n < len(dataset):
        classes = len(dataset.labels.unique())
        rows = stratified_indices(dataset.labels.cpu(), n, 0) if classes <= n else rows
    found = []
    for row in rows.tolist():
        item, label = dataset[row], None if dataset.labels is None else int(dataset.labels[row])
        names = dataset.label_names
        truth = None if label is None else names[label] if names else str(label)
        found.append(Picked(item["image"], truth))
    return tuple(found)


def pictures_in(paths: Sequence[str]) -> tuple[Picked, ...]:
    """Pictures of files and folders, without classes.

    Args:
        paths (`Sequence[str]`): files, and folders whose pictures are taken in the order of their names.

    Raises:
        FileNotFoundError: for a path that is not there, or a folder without pictures.
        ValueError: for a file that is no picture.
    """
    found = []
    for path in map(Path, paths):
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICTURES) if path.is_dir() else [path]
        if not path.exists() or not files:
            what = "holds no pictures" if path.exists() else "is not there"
            raise FileNotFoundError(f"--images {str(path)!r} {what}: name picture files, or a folder with some")
        for file in files:
            try:
                with Image.open(file) as picture:
                    side = min(min(picture.size), 512)
                    pixels, _ = read_picture(picture, side)
            except UnidentifiedImageError as error:
                raise ValueError(f"--images {str(file)!r} is no picture that can be read: leave it out") from error
            found.append(Picked((pixels * 255).round().to(torch.uint8)))
    return tuple(found)
