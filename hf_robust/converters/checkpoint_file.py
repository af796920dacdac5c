"""Reads the tensors of a published file, and nothing that could run code; says what is wrong with the others."""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

__all__ = ["file_sha256", "read_tensors"]

# Where the state dictionary lies, in the order in which RobustSSL looks for it.
_CONTAINERS = ("state_dict_dual", "state_dict", "model")
_NAMED = 6
_HEAD = 512
_CHUNK = 2**20
_AGAIN = "download it again, and compare its size with the one that the authors' page shows"
_WEB_PAGE = re.compile(rb"(?is)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype\s+html|html|head)")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path (`Path`): The file.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dictionary in a file of torch or safetensors.

    Args:
        path (`Path`): The file. Files of torch are read with `weights_only=True`: tensors and plain values, no code.

    Returns:
        `tuple`: Tensors on the CPU under the keys of the file, and notes on what else the file holds.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: For a web page, a pointer of git LFS, a damaged file, one that needs unpickling, or one without a
            state dictionary; the message says what to do.
    """
    _check_kind(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path), []
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is damaged or incomplete ({_size(path)}; {error}): {_AGAIN}") from error
    return _state_dict(_load(path), path)


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes"


def _check_kind(path: Path) -> None:
    """Says what a file is that is none of torch's, before torch says it in its own way."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name the file of the authors (.pt, .pth, .ckpt, .safetensors)")
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: download it from the authors first, then write its path")
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise ValueError(f"{str(path)!r} is empty: {_AGAIN}")
    if _WEB_PAGE.match(head):
        raise ValueError(
            f"{str(path)!r} is a web page ({_size(path)}), not weights: shares such as Google Drive send a page that "
            "asks for confirmation where a large file is expected; open the link in a browser and save the file "
            "behind it"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{str(path)!r} is a pointer of git LFS, not weights: run 'git lfs pull' where it came from")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if "TorchScript" in str(error):
            raise _refusal(path, str(error)) from error
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ValueError:
    reason = (why.splitlines() or ["unexpected end"])[0]
    return ValueError(f"{str(path)!r} is damaged or incomplete ({_size(path)}; {reason}): {_AGAIN}")


def _refusal(path: Path, why: str) -> ValueError:
    """The file holds objects, and reading those means running what its author wrote."""
    found = re.search(r"Unsupported (?:global|class|operand)[^\n]*?([\w]+(?:\.[\w]+)+)", why) or re.search(
        r"GLOBAL ([\w.]+)", why
    )
    with open(path, "rb") as file:
        pickled = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if not pickled:
        return ValueError(
            f"{str(path)!r} is no file of torch or safetensors ({_size(path)}): name a .pt, .pth, .ckpt or "
            f".safetensors file, or {_AGAIN}"
        )
    if found is None and "weights only" not in why.lower() and "torchscript" not in why.lower():
        return _damaged(path, why)
    what = f" ({found[1]})" if found else ""
    return ValueError(
        f"{str(path)!r} holds objects besides tensors{what}, and reading objects runs code of whoever wrote the file, "
        "so it is not read. If you trust the authors, re-save the tensors in the environment that the file came from "
        "(with dill for files of the robustness library) and convert the new file:\n"
        "    import torch, pickle  # or: import dill as pickle\n"
        f"    file = torch.load({path.name!r}, map_location='cpu', weights_only=False, pickle_module=pickle)\n"
        "    tensors = next((file[key] for key in ('state_dict', 'model') if key in file), file)\n"
        f"    torch.save({{'state_dict': dict(tensors)}}, {path.stem + '-tensors.pt'!r})"
    )


def _state_dict(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{str(path)!r} holds a {type(content).__name__}, not a state dictionary: name the file with the weights "
            "of the network"
        )
    notes = []
    found: Any = content
    for key in _CONTAINERS:
        if isinstance(content.get(key), Mapping):
            found = content[key]
            others = [str(name) for name in content if name != key]
            if others:
                notes.append(f"left out: {', '.join(others)}, which the file holds beside {key!r}")
            break
    strange = [str(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if strange or not found:
        listed = ", ".join(strange[:_NAMED]) + (" ..." if len(strange) > _NAMED else "") if strange else "nothing"
        raise ValueError(
            f"{str(path)!r} holds no state dictionary under {', '.join(map(repr, _CONTAINERS))}, nor is it one itself "
            f"(no tensors: {listed}): re-save it as torch.save({{'state_dict': network.state_dict()}}, ...)"
        )
    return {str(key): value.detach() for key, value in found.items()}, notes
