"""The demo as a folder to upload as a Space: the program, what it needs, the models, and an introduction."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

import hf_robust
from hf_robust.demo.sources import find_model, title_of
from hf_robust.demo_cli import DemoRun
from hf_robust.hub_folders import is_path

__all__ = ["REQUIREMENTS", "write_space"]

# What the demo imports, as the package declares it; Gradio itself comes with the Space (sdk_version).
REQUIREMENTS = (
    "accelerate>=1.15",
    "datasets>=4.0",
    "huggingface_hub>=1.33",
    "numpy>=1.26",
    "peft>=0.21",
    "pillow>=10.0",
    "pyyaml>=6.0",
    "safetensors>=0.4.5",
    "scikit-learn>=1.4",
    "timm>=1.0.29",
    "torch>=2.11",
    "torchvision>=0.26",
    "tqdm>=4.65",
    "transformers>=5.17",
)
_GRADIO = "6.31.0"  # where none is installed on the machine that writes
# Neither optimiser nor random state of a checkpoint, nor anything pickled.
_MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "labels.json",
    "report.json",
    "adapter_config.json",
    "model*.safetensors*",
    "adapter_model.safetensors",
)
_PACKAGE_FILES = ("*.py", "*.json", "py.typed")
_APP = '''"""A demo of hf_robust: one image, one attack, the robust and the plain model side by side."""

from hf_robust.runs.demo import main

ARGUMENTS = {arguments}

if __name__ == "__main__":
    main(ARGUMENTS, prog="app.py")
'''


def write_space(folder: Path, run: DemoRun, sources: dict[str, str]) -> Path:
    """Write everything that a Space needs, the package and models of this machine included.

    Args:
        folder (`Path`): made when missing; an earlier Space in it is replaced file by file.
        run ([`~hf_robust.demo_cli.DemoRun`]): models, images and data set of the demo.
        sources (`dict[str, str]`): where the models are, by name; repositories are named, folders are copied.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: for a folder with other files in it, an adapter or a data set of this machine only, or an encoder
            whose data set nobody names.
    """
    folder = folder.expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "app.py").is_file():
        raise ValueError(f"{str(folder)!r} holds other files and no Space: give another --space_dir")
    places = _checked(run, sources)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("models", "images", "hf_robust"):
        shutil.rmtree(folder / part, ignore_errors=True)
    arguments = []
    for (name, place), flag in zip(places.items(), ("--model", "--plain"), strict=False):
        if is_path(place):
            _copy(Path(place).expanduser(), folder / "models" / name, _MODEL_FILES)
            place = f"models/{name}"
        arguments += [flag, place]
    package = Path(hf_robust.__file__).parent
    _copy(package, folder / "hf_robust", _PACKAGE_FILES, deep=True)
    arguments += ["--titles", *(run.models.titles or map(title_of, sources.values()))]
    arguments += _image_flags(run, folder)
    (folder / "app.py").write_text(_APP.format(arguments=_listed(arguments)), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_introduction(run, sources), encoding="utf-8")
    return folder


def _checked(run: DemoRun, sources: dict[str, str]) -> dict[str, str]:
    """Where the weights are, after everything that a Space could not have is refused."""
    dataset, places = run.data.dataset_name, {}
    for name, source in sources.items():
        places[name], is_encoder = find_model(source)
        if is_path(places[name]) and (Path(places[name]).expanduser() / "adapter_config.json").is_file():
            raise ValueError(
                f"{source!r} is an adapter, whose base a Space would not find: name the 'classifier' folder of its "
                "run, or push base and adapter and name the repository"
            )
        if is_encoder and dataset is None:
            raise ValueError(
                f"{source!r} is an encoder and has no classes: name labelled images for a linear probe with "
                "--dataset_name, 'digits' or a Hub id"
            )
    if dataset and dataset != "digits" and is_path(dataset):
        raise ValueError(
            f"--dataset_name {dataset!r} is a folder of this machine, which a Space does not have: name a data set of "
            "the Hub, or a classifier and its pictures with --images"
        )
    for path in run.data.images or ():
        if not Path(path).exists():
            raise FileNotFoundError(f"--images {path!r} is not there: name picture files, or folders with some")
    return places


def _copy(source: Path, target: Path, patterns: tuple[str, ...], deep: bool = False) -> None:
    for pattern in patterns:
        for file in source.rglob(pattern) if deep else source.glob(pattern):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _image_flags(run: DemoRun, folder: Path) -> list[str]:
    data, flags = run.data, []
    for path in map(Path, data.images or ()):
        (folder / "images").mkdir(exist_ok=True)
        for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
            shutil.copyfile(file, folder / "images" / file.name)
    if data.images:
        flags += ["--images", "images"]
    if data.dataset_name:
        flags += ["--dataset_name", data.dataset_name, "--split", data.split, "--eval_split", data.eval_split]
        flags += ["--probe_images", str(data.probe_images)]
        for name in ("image_column", "label_column"):
            value = getattr(data, name)
            flags += [f"--{name}", value] if value else []
    return flags + (["--image_size", str(run.models.image_size)] if run.models.image_size else [])


def _listed(arguments: list[str]) -> str:
    return "[\n" + "".join(f"    {json.dumps(word)},\n" for word in arguments) + "]"


def _introduction(run: DemoRun, sources: dict[str, str]) -> str:
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        version = _GRADIO
    facts: dict[str, Any] = {
        "title": "Robust and plain model under attack",
        "emoji": "\U0001f6e1\ufe0f",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": version,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "short_description": "Attack an image, compare two models",
        "tags": ["adversarial-robustness", "hf_robust"],
    }
    if repositories := [source for source in sources.values() if not is_path(source)]:
        facts["models"] = repositories
    if run.data.dataset_name and "/" in run.data.dataset_name:
        facts["datasets"] = [run.data.dataset_name]
    titles = run.models.titles or map(title_of, sources.values())
    models = "\n".join(f"- {name} model: {title}" for name, title in zip(sources, titles, strict=True))
    return (
        f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n\n# {facts['title']}\n\n"
        "Upload or pick an image and choose an attack and its budget. The page shows the image, the change of its "
        "pixels (amplified), the changed image, and what each model says before and after.\n\n"
        f"{models}\n\nWritten by `hf-robust demo --space_dir`, hf_robust {hf_robust.__version__}.\n"
    )
