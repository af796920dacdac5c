"""CIFAR-10-C and CIFAR-100-C as their authors published them: found, checked, and read one severity at a time.

Each set is one file per corruption, `<corruption>.npy`, uint8 `(50000, 32, 32, 3)`: the 10,000 test images at severity
1, again at severity 2, and so on; and `labels.npy` with the 50,000 labels. The files are accepted as they were
unpacked, or inside the published `CIFAR-10-C.tar`, which is read in place.

Source: Zenodo records 2535967 and 3555552 (CC BY 4.0); checksums as listed by `torch_uncertainty`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .corruption_constants import SEVERITIES, check_corruption

__all__ = ["CHECKSUMS", "identify_published", "load_published_corruptions", "load_published_labels"]

CHECKSUMS: dict[str, dict[str, str]] = {
    "cifar10c": {
        "labels": "c439b113295ed5254878798ffe28fd54",
        "gaussian_noise": "ecaf8b9a2399ffeda7680934c33405fd",
        "shot_noise": "3a7239bb118894f013d9bf1984be7f11",
        "impulse_noise": "2090e01c83519ec51427e65116af6b1a",
        "defocus_blur": "7d1322666342a0702b1957e92f6254bc",
        "glass_blur": "7361fb4019269e02dbf6925f083e8629",
        "motion_blur": "fffa5f852ff7ad299cfe8a7643f090f4",
        "zoom_blur": "6ea8e63f1c5cdee1517533840641641b",
        "snow": "bb238de8555123da9c282dea23bd6e55",
        "frost": "31f6ab3bce1d9934abfb0cc13656f141",
        "fog": "7b397314b5670f825465fbcd1f6e9ccd",
        "brightness": "0a81ef75e0b523c3383219c330a85d48",
        "contrast": "3c8262171c51307f916c30a3308235a8",
        "elastic_transform": "9421657c6cd452429cf6ce96cc412b5f",
        "pixelate": "0f14f7e2db14288304e1de10df16832f",
        "jpeg_compression": "2b9cc4c864e0193bb64db8d7728f8187",
        "speckle_noise": "ef00b87611792b00df09c0b0237a1e30",
        "gaussian_blur": "c33370155bc9b055fb4a89113d3c559d",
        "spatter": "8a5a3903a7f8f65b59501a6093b4311e",
        "saturate": "1cfae0964219c5102abbb883e538cc56",
    },
    "cifar100c": {
        "labels": "bb4026e9ce52996b95f439544568cdb2",
        "gaussian_noise": "ecc4d366eac432bdf25c024086f5e97d",
        "shot_noise": "b0a1fa6e1e465a747c1b204b1914048a",
        "impulse_noise": "3b3c210ddfa0b5cb918ff4537a429fef",
        "defocus_blur": "d923e3d9c585a27f0956e2f2ad832564",
        "glass_blur": "0bf384f38e5ccbf8dd479d9059b913e1",
        "motion_blur": "732a7e2e54152ff97c742d4c388c5516",
        "zoom_blur": "0204613400c034a81c4830d5df81cb82",
        "snow": "0237be164583af146b7b144e73b43465",
        "frost": "3a39c6823bdfaa0bf8b12fe7004b8117",
        "fog": "4efc7ebd5e82b028bdbe13048e3ea564",
        "brightness": "f22d7195aecd6abb541e27fca230c171",
        "contrast": "322bb385f1d05154ee197ca16535f71e",
        "elastic_transform": "a0792bd6581f6810878be71acedfc65a",
        "pixelate": "96c00c60f144539e14cffb02ddbd0640",
        "jpeg_compression": "c851b7f1324e1d2ffddeb76920576d11",
        "speckle_noise": "e3f215b1a0f9fd9fd6f0d1cf94a7ce99",
        "gaussian_blur": "5204ba0d557839772ef5a4196a052c3e",
        "spatter": "12ccf41d62564d36e1f6a6ada5022728",
        "saturate": "c0697e9fdd646916a61e9c312c77bf6b",
    },
}
"""Set -> corruption, or `labels` -> MD5 of its npy file."""

SIDE = 32
_FOLDERS = {"cifar10c": "CIFAR-10-C", "cifar100c": "CIFAR-100-C"}
_PUBLISHED_AT = "https://zenodo.org/records/2535967 (CIFAR-10-C) or 3555552 (CIFAR-100-C)"
_READ = 1 << 22


def identify_published(source: str | os.PathLike[str]) -> str:
    """Say which published set a folder or repository holds, by the checksum of its labels.

    Args:
        source (`str` or `PathLike`): see [`load_published_corruptions`].

    Returns:
        `str`: `"cifar10c"` or `"cifar100c"`.

    Raises:
        FileNotFoundError: without labels there.
        ValueError: for labels of neither set.
    """
    path, start, size = _locate(source, "labels")
    found = _md5(path, start, size, path.stat().st_mtime_ns)
    for name, sums in CHECKSUMS.items():
        if found == sums["labels"]:
            return name
    raise ValueError(
        f"{str(path)!r} has MD5 {found}, the labels of {' and '.join(_FOLDERS.values())} have others: the file is "
        f"damaged or of another set; download it from {_PUBLISHED_AT}, or let corruption_accuracy generate the "
        "corruptions of your own data set"
    )


def load_published_corruptions(source: str | os.PathLike[str], name: str, severity: int) -> tuple[Tensor, Tensor]:
    """Read the images of one corruption at one severity.

    Only those rows are read from the file; it is hashed once per process.

    Args:
        source (`str` or `PathLike`): a folder with the npy files (or with one of `CIFAR-10-C`, `CIFAR-100-C`, as a
            folder or as the published tar), such a tar, or a data set repository of the Hub that holds the same;
            `"user/name:CIFAR-100-C"` chooses among two sets in one repository.
        name (`str`): a corruption, one of the 15 or of the 4 extra ones.
        severity (`int`): 1 to 5.

    Returns:
        `tuple[Tensor, Tensor]`: images uint8 `(10000, 3, 32, 32)` and labels int64 `(10000,)`, in the order of the
        test set.

    Raises:
        FileNotFoundError: when the source or the file is missing.
        ValueError: for a file that is not the published one, an array of another layout, an unknown name or an
            impossible severity.
    """
    check_corruption(name, severity)
    which = identify_published(source)
    labels, images = _array(source, "labels"), _array(source, name)
    _check_layout(source, name, images, labels)
    path, start, size = _locate(source, name)
    found = _md5(path, start, size, path.stat().st_mtime_ns)
    if found != CHECKSUMS[which][name]:
        raise ValueError(
            f"{str(path)!r} ({name}) has MD5 {found}, the published file has {CHECKSUMS[which][name]}: its figures "
            f"would not be those of {_FOLDERS[which]}; download it again from {_PUBLISHED_AT}"
        )
    count = len(images) // len(SEVERITIES)
    rows = slice((severity - 1) * count, severity * count)
    pixels = np.ascontiguousarray(np.moveaxis(images[rows], -1, 1))
    return torch.from_numpy(pixels), torch.from_numpy(labels[rows].astype(np.int64))


def load_published_labels(source: str | os.PathLike[str]) -> Tensor:
    """Read the labels, which are the same for every corruption and severity.

    Args:
        source (`str` or `PathLike`): see [`load_published_corruptions`].

    Returns:
        `torch.Tensor` of shape `(10000,)`: int64, in the order of the test set.

    Raises:
        FileNotFoundError: without labels there.
        ValueError: for labels of neither set.
    """
    identify_published(source)
    labels = _array(source, "labels")
    return torch.from_numpy(labels[: len(labels) // len(SEVERITIES)].astype(np.int64))


def _check_layout(source: str | os.PathLike[str], name: str, images: Any, labels: Any) -> None:
    wanted = f"uint8 (rows, {SIDE}, {SIDE}, 3) with {len(SEVERITIES)} severities one after the other"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(
            f"{name}.npy of {str(source)!r} is {images.dtype} {images.shape}, it must be {wanted}: download it again "
            f"from {_PUBLISHED_AT}"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images) or len(images) % 5:
        raise ValueError(
            f"{str(source)!r} has {len(images)} images in {name}.npy and labels {labels.dtype} {labels.shape}, there "
            f"must be one label per image and as many rows for each of the {len(SEVERITIES)} severities: download "
            f"both again from {_PUBLISHED_AT}"
        )
    if (labels.reshape(len(SEVERITIES), -1) != labels[: len(labels) // len(SEVERITIES)]).any():
        raise ValueError(
            f"the labels of {str(source)!r} differ from severity to severity, they must repeat: the rows are in "
            f"another order; download the files again from {_PUBLISHED_AT}"
        )


def _array(source: str | os.PathLike[str], name: str) -> Any:
    """The array of one file, mapped into memory; also from the middle of a tar."""
    path, start, size = _locate(source, name)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with open(path, "rb") as file:
        file.seek(start)
        try:
            shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{name}.npy of {str(path)!r} is not a numpy array ({error}): download it again from {_PUBLISHED_AT}"
            ) from error
        offset = file.tell()
    if dtype.hasobject or offset - start + dtype.itemsize * math.prod(shape) != size:
        raise ValueError(
            f"{name}.npy of {str(path)!r} has {size} bytes, an array {dtype} {shape} needs "
            f"{offset - start + dtype.itemsize * math.prod(shape)}: the download was cut off, repeat it"
        )
    return np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")


@functools.lru_cache(maxsize=64)
def _md5(path: Path, start: int, size: int, modified: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        file.seek(start)
        while size > 0 and (block := file.read(min(_READ, size))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _locate(source: str | os.PathLike[str], name: str) -> tuple[Path, int, int]:
    """File, first byte and number of bytes of one array."""
    path = Path(source).expanduser()
    file = f"{name}.npy"
    if path.is_dir():
        return _inside(path, file)
    if path.is_file():
        return _in_tar(path, file)
    repository, _, inner = str(source).partition(":")
    if isinstance(source, str) and repository.count("/") == 1 and not repository.startswith(("/", ".", "~")):
        found = _download(repository, inner, file)
        return _in_tar(found, file) if found.suffix == ".tar" else (found, 0, found.stat().st_size)
    raise FileNotFoundError(
        f"no folder or file {str(source)!r}: pass the folder of the unpacked arrays from {_PUBLISHED_AT}, or a Hub "
        'data set repository "user/name"'
    )


def _inside(folder: Path, file: str) -> tuple[Path, int, int]:
    places = [folder, *(folder / name for name in _FOLDERS.values())]
    found = [place / file for place in places if (place / file).is_file()]
    tars = [folder / f"{name}.tar" for name in _FOLDERS.values() if (folder / f"{name}.tar").is_file()]
    if len(found) > 1 or not found and len(tars) > 1:
        raise ValueError(
            f"{str(folder)!r} holds several sets ({', '.join(map(str, found or tars))}): name one of them"
        )
    if found:
        return found[0], 0, found[0].stat().st_size
    if tars:
        return _in_tar(tars[0], file)
    raise FileNotFoundError(
        f"no {file} in {str(folder)!r}, nor {' or '.join(f'{name}.tar' for name in _FOLDERS.values())}: unpack the "
        f"arrays from {_PUBLISHED_AT} there"
    )


def _in_tar(path: Path, file: str) -> tuple[Path, int, int]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and member.name.rpartition("/")[2] == file:
                    return path, member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(
            f"{str(path)!r} is not an uncompressed tar ({error}): download it again from {_PUBLISHED_AT}"
        ) from error
    raise FileNotFoundError(f"no {file} in {str(path)!r}: download it again from {_PUBLISHED_AT}")


@functools.lru_cache(maxsize=64)
def _download(repository: str, inner: str, file: str) -> Path:
    """One file of a Hub data set repository: the array, in the root or in a folder of its set, or the tar."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    sets = [inner] if inner else list(_FOLDERS.values())
    candidates = [*([] if inner else [file]), *(f"{name}/{file}" for name in sets), *(f"{name}.tar" for name in sets)]
    for candidate in candidates:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, candidate, repo_type="dataset"))
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"cannot read the data set {repository!r} of the Hub ({error}): check its name and the network, or "
                f"pass a folder with the arrays from {_PUBLISHED_AT}"
            ) from error
    raise FileNotFoundError(
        f"{repository!r} has none of {', '.join(candidates)}, or the Hub cannot be reached: pass a folder with the "
        f"arrays from {_PUBLISHED_AT}"
    )
