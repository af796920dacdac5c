"""From a file of somebody else to a folder with weights, configuration, report and card."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_robust.evaluation.environment import collect_environment
from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub_files import network_files, replace_files
from hf_robust.model_card import write_model_card
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

from .base import SINGLE, Conversion
from .checkpoint_file import file_sha256, read_tensors
from .formats import load_converter, recognise

__all__ = ["Converted", "convert"]

AUTO = "auto"


@dataclass
class Converted:
    """A finished conversion.

    Args:
        folder (`Path`): What was written.
        format (`str`): The format it was read as.
        why (`str`): Why that one.
        conversion ([`Conversion`]): The network and the notes on it.
        report ([`~hf_robust.evaluation.report.EncoderReport`]): What the card was written from.
    """

    folder: Path
    format: str
    why: str
    conversion: Conversion
    report: EncoderReport


def convert(
    file: str | Path,
    output_dir: str | Path,
    format: str = AUTO,
    branch: str | None = None,
    *,
    classifier: bool = False,
    label_names: Sequence[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    native: bool = True,
    command: str | None = None,
) -> Converted:
    """A published checkpoint as a folder that `AutoModel.from_pretrained` loads.

    The folder is that of [`~hf_robust.hub.save_encoder`] (with `classifier` of
    [`~hf_robust.classifiers.save_classifier`]), plus `converted_from` in its configuration, `report.json` and a model
    card. No number enters that was not in the file: how robust the network is has to be measured.

    Args:
        file (`str` or `Path`): `.pt`, `.pth`, `.ckpt` or `.safetensors`; nothing in it is run.
        output_dir (`str` or `Path`): Folder to write, created when missing.
        format (`str`): One of [`~hf_robust.converters.format_names`], or `"auto"` (the default) to go by the keys.
        branch (`str`, *optional*): Norm branch by name: `"adv"` (the default where there is one), `"clean"`,
            `"adv_ce"`.
        classifier (`bool`): Take the linear classifier of the file along. Defaults to `False`, the encoder alone.
        label_names (`Sequence[str]`, *optional*): One name per class, with `classifier`.
        image_size (`int`, *optional*): Side of the images in pixels. Defaults to the format's.
        mean (`Sequence[float]`, *optional*): Input normalisation of files that do not hold it, for pixels in [0, 1].
        std (`Sequence[float]`, *optional*): Likewise.
        name (`str`, *optional*): Title of the card. Defaults to the name of the file.
        native (`bool`): Also write ``native/`` for CIFAR ResNets. Defaults to `True`.
        command (`str`, *optional*): Command line for the report.

    Returns:
        [`Converted`]: With the folder.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file cannot be read safely, is of another format, or has tensors that are not understood.
        OSError: When the folder cannot be written.
    """
    path = Path(file).expanduser()
    conversion, kind, why, source = _read(path, format, branch)
    _set_input(conversion, image_size, mean, std)
    names = _label_names(conversion, classifier, label_names)
    origin = {"format": kind, "file": path.name, "sha256": file_sha256(path), "branch": conversion.branch}
    origin["source"] = source
    files = network_files(
        _model(conversion, classifier), conversion.branch, native=native, label_names=names if classifier else None
    )
    for entry in [entry for entry in files if entry.rpartition("/")[2] == "config.json"]:
        files[entry] = (json.dumps(json.loads(files[entry]) | {"converted_from": origin}, indent=2) + "\n").encode()
    folder = replace_files(output_dir, files, "a classifier" if classifier else "an encoder")
    report = _report(conversion, json.loads(files["config.json"]), origin, name or path.stem, names, command)
    report.native = any(entry.startswith("native/") for entry in files)
    report.save(folder)
    write_model_card(report, folder)
    return Converted(folder, kind, why, conversion, report)


def _read(path: Path, format: str, branch: str | None) -> tuple[Conversion, str, str, str]:
    """The network in a file, the format it was read as, why that one, and whose code writes it."""
    converter = None if format == AUTO else load_converter(format)  # a wrong name shows before a large file is read
    tensors, notes = read_tensors(path)
    kind, why = format, "as asked for"
    if converter is None:
        converter, why = recognise(tensors)
        kind = converter.names[0]
    try:
        conversion = converter.convert(tensors, branch)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be converted as {kind}: {error}") from error
    conversion.notes[:0] = notes
    return conversion, kind, why, converter.source


def _set_input(
    conversion: Conversion, image_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """What the file does not say and the caller may."""
    if image_size is not None:
        if image_size < 1:
            raise ValueError(f"image_size must be 1 or more, got {image_size}: it is the side of the images in pixels")
        conversion.image_size = image_size
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got mean={mean} and std={std}: give both or neither")
    if mean is None or std is None:
        return
    given = tuple(map(float, mean)), tuple(map(float, std))
    if len(given[0]) != 3 or len(given[1]) != 3 or min(given[1]) <= 0:
        raise ValueError(f"mean and std are three numbers each, std positive, got {mean} and {std}")
    if conversion.mean is not None and (conversion.mean, conversion.std) != given:
        raise ValueError(
            f"the file holds its own input normalisation, mean {conversion.mean} and std {conversion.std}, got {mean} "
            f"and {std}: leave mean and std out"
        )
    conversion.mean, conversion.std = given
    conversion.notes.append(f"mean {given[0]} and std {given[1]} are as given, not from the file")


def _label_names(conversion: Conversion, classifier: bool, label_names: Sequence[str] | None) -> list[str]:
    head = conversion.classifier
    if not classifier:
        if label_names is not None:
            raise ValueError("label_names name the classes of a classifier: ask for the classifier, too")
        if head is not None:
            conversion.notes.append(f"left out: the linear classifier of {len(head[1])} classes")
        return []
    if head is None:
        raise ValueError("the file holds no linear classifier on the features: convert the encoder alone")
    names = [f"LABEL_{i}" for i in range(len(head[1]))] if label_names is None else [str(n) for n in label_names]
    if len(names) != len(head[1]):
        raise ValueError(
            f"label_names must name each of the {len(head[1])} classes in the order of the outputs, got {len(names)}"
        )
    return names


@torch.no_grad()
def _model(conversion: Conversion, classifier: bool) -> RobustModelForPreTraining:
    head = conversion.classifier if classifier else None
    args: dict[str, Any] = {"head": "classifier", "num_classes": len(head[1])} if head is not None else {}
    config = RobustPretrainingConfig(
        architecture=conversion.architecture,
        model_args=conversion.model_args,
        image_size=conversion.image_size,
        norm_branches=(conversion.branch,),
        mean=conversion.mean,
        std=conversion.std,
        **args,
    )
    with torch.random.fork_rng(devices=[]):  # the fresh weights are all replaced
        model = RobustModelForPreTraining(config)
    model.backbone.load_state_dict(conversion.tensors)
    if head is not None:
        model.classifier.weight.copy_(head[0])
        model.classifier.bias.copy_(head[1])
    return model.eval()


def _report(
    conversion: Conversion,
    config: dict[str, Any],
    origin: dict[str, Any],
    name: str,
    label_names: list[str],
    command: str | None,
) -> EncoderReport:
    environment = collect_environment()
    return EncoderReport(
        name=name,
        architecture=config["architecture"],
        exported_format=config["model_type"],
        model_args=config["model_args"],
        image_size=conversion.image_size,
        norm_branch=None if conversion.branch == SINGLE else conversion.branch,
        task="classifier" if label_names else "encoder",
        label_names=label_names,
        converted_from={**origin, "notes": conversion.notes},
        versions=environment["versions"],
        commit=environment["commit"],
        library_version=environment["library_version"],
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=command,
    )
