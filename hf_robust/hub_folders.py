"""Folders and Hub repositories with a network in them: found, checked and read, safetensors only.

Whatever is wrong with one is said here, before transformers or timm say it in their own way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import safetensors.torch
import torch

from hf_robust.evaluation.environment import holds_secret

__all__ = [
    "check_repo_id",
    "check_weights",
    "find_folder",
    "is_path",
    "neither_folder_nor_repository",
    "read_config",
    "read_weights",
]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def is_path(source: str | Path) -> bool:
    """Whether a name means a folder of this machine rather than a repository of the Hub.

    Args:
        source (`str` or `Path`): Folder, or ``"user/name"``.

    Returns:
        `bool`: `True` for a folder that exists, and for whatever cannot name a repository.
    """
    text = str(source)
    return (
        isinstance(source, Path)
        or os.path.isdir(Path(text).expanduser())
        or text.startswith(("/", ".", "~"))
        or os.sep != "/"
        and os.sep in text
        or text.count("/") > 1
    )


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that cannot be a repository's.

    Args:
        repo_id (`str`): `"user/name"`, or `"name"` for one of one's own.

    Raises:
        ValueError: with the rule.
    """
    rule = "write 'user/name' with letters, digits, '-', '_' and '.', at most 96 characters"
    if not isinstance(repo_id, str) or not repo_id:
        raise ValueError(f"a repository needs a name, got {repo_id!r}: {rule}")
    if holds_secret(repo_id):
        raise ValueError(f"the name of the repository looks like an access token: {rule}")
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} cannot name a repository of the Hub ({error}): {rule}") from None


def find_folder(source: str | Path, patterns: Sequence[str]) -> Path:
    """The folder itself, or what a Hub repository holds in its root, downloaded.

    Args:
        source (`str` or `Path`): Folder, or name of a Hub repository ``"user/name"``.
        patterns (`Sequence[str]`): Names of the files to download, with wildcards.

    Returns:
        `Path`: A folder of this machine.

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
    """
    if is_path(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}: write the path of a folder written by save_encoder")
        return folder
    try:
        return Path(
            huggingface_hub.snapshot_download(str(source), allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except (OSError, ValueError) as error:
        raise neither_folder_nor_repository(str(source), error) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a folder.

    Args:
        folder (`Path`): An existing folder.

    Returns:
        `dict[str, Any]`: The content of its ``config.json``.

    Raises:
        ValueError: When there is none, or it is not a configuration.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        inner = folder / "encoder"
        hint = (
            f"its encoder is in {str(inner)!r}" if (inner / CONFIG_FILE).is_file() else "write one with save_encoder"
        )
        raise ValueError(f"{str(folder)!r} is not an encoder, it has no {CONFIG_FILE}: {hint}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a configuration ({error}): export the encoder again with save_encoder"
        ) from error
    return values


def check_weights(folder: Path) -> None:
    """Makes sure that a folder has weights as safetensors, whole ones.

    Args:
        folder (`Path`): An existing folder.

    Raises:
        ValueError: When there are none, only pickled ones, or a file is damaged.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f"only {', '.join(pickled)}, which could run code when opened" if pickled else "no weights at all"
        raise ValueError(f"{str(folder)!r} has no {WEIGHTS_FILE} but {found}: export the encoder with save_encoder")
    for path in weights:
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged or incomplete ({path.stat().st_size} bytes; {error}): "
                "copy or download it again, or export the encoder again with save_encoder"
            ) from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the model in a folder, by name; of several files where an index says so.

    Args:
        folder (`Path`): A folder that passed [`check_weights`].

    Returns:
        `dict[str, torch.Tensor]`: On the CPU.

    Raises:
        ValueError: When the files of the index are not all there, or there is no model among the files.
    """
    index = folder / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(absent)}: copy or download the whole folder again")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= safetensors.torch.load_file(folder / name)
    return tensors


def neither_folder_nor_repository(source: str, error: Exception) -> FileNotFoundError:
    """The error for a name that is neither a folder nor a repository.

    Args:
        source (`str`): The name.
        error (`Exception`): What the Hub answered.

    Returns:
        `FileNotFoundError`: To be raised.
    """
    return FileNotFoundError(
        f"no encoder {source!r}: there is no such folder, and it could not be read as a Hub repository "
        f"({str(error).splitlines()[0]}); write the path of a folder written by save_encoder, or 'user/name'"
    )
