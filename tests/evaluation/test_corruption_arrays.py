"""The published arrays: found wherever they lie, checked by layout and checksum, refused when they are not whole."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_robust.evaluation import corruption_arrays
from hf_robust.evaluation.corruption_arrays import (
    CHECKSUMS,
    identify_published,
    load_published_corruptions,
    load_published_labels,
)
from hf_robust.evaluation.corruption_constants import CORRUPTIONS, EXTRA

PER_SEVERITY = 3
LABELS = np.tile(np.array([4, 0, 9], np.uint8), 5)


def fog() -> np.ndarray:
    """Row r is filled with r, its red channel with 100 + r."""
    images = np.zeros((15, 32, 32, 3), np.uint8) + np.arange(15, dtype=np.uint8)[:, None, None, None]
    images[..., 0] += 100
    return images


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes the arrays in a folder the published ones of CIFAR-10-C."""

    def make(folder: Path) -> Path:
        sums = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}
        monkeypatch.setitem(corruption_arrays.CHECKSUMS, "cifar10c", {**CHECKSUMS["cifar10c"], **sums})
        return folder

    corruption_arrays._download.cache_clear()
    return make


def write(folder: Path, images: np.ndarray | None = None, labels: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "fog.npy", fog() if images is None else images)
    np.save(folder / "labels.npy", LABELS if labels is None else labels)
    return folder


def packed(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.glob("*.npy")):
            archive.add(file, f"CIFAR-10-C/{file.name}")
    return path


def check(source: str | Path) -> None:
    for severity in range(1, 6):
        images, labels = load_published_corruptions(source, "fog", severity)
        assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and images.is_contiguous()
        rows = torch.arange(3 * (severity - 1), 3 * severity)
        assert torch.equal(images[:, 1, 5, 6].long(), rows) and torch.equal(images[:, 0, 5, 6].long(), rows + 100)
        assert labels.tolist() == [4, 0, 9] and labels.dtype == torch.int64


def test_a_severity_is_its_rows_channels_first(tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    check(publish(write(tmp_path)))
    check(str(tmp_path))
    assert identify_published(tmp_path) == "cifar10c"
    assert load_published_labels(tmp_path).tolist() == [4, 0, 9]


def test_a_folder_around_them_and_the_tar_in_place_will_do(tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    inner = publish(write(tmp_path / "around" / "CIFAR-10-C"))
    check(tmp_path / "around")
    check(packed(inner, tmp_path / "CIFAR-10-C.tar"))
    check(tmp_path)  # the folder of the tar


def test_both_sets_have_a_checksum_of_every_file() -> None:
    for sums in CHECKSUMS.values():
        assert sorted(sums) == sorted(("labels", *CORRUPTIONS, *EXTRA))
        assert all(len(value) == 32 for value in sums.values())
    assert not set(CHECKSUMS["cifar10c"].values()) & set(CHECKSUMS["cifar100c"].values())


def test_arrays_that_are_not_the_published_ones_are_refused(tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    with pytest.raises(ValueError, match="has MD5 .* the labels of CIFAR-10-C and CIFAR-100-C have others"):
        identify_published(write(tmp_path / "other"))
    folder = publish(write(tmp_path / "mine"))
    changed = fog()
    changed[7, 0, 0, 0] ^= 1
    np.save(folder / "fog.npy", changed)
    with pytest.raises(ValueError, match=r"\(fog\) has MD5 .* the published file has .*download it again"):
        load_published_corruptions(folder, "fog", 1)


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (fog().transpose(0, 3, 1, 2), None, r"is uint8 \(15, 3, 32, 32\), it must be uint8 \(rows, 32, 32, 3\)"),
        (fog().astype(np.float32), None, r"is float32 \(15, 32, 32, 3\)"),
        (fog()[:14], LABELS[:14], "14 images in fog.npy and labels uint8 .14,.*as many rows for each"),
        (fog()[:10], None, "10 images in fog.npy and labels uint8 .15,"),
        (None, LABELS.astype(float), "labels float64 .15,"),
        (None, np.sort(LABELS), "differ from severity to severity"),
    ],
)
def test_another_layout_is_named(
    tmp_path: Path,
    publish: Callable[[Path], Path],
    images: np.ndarray | None,
    labels: np.ndarray | None,
    complaint: str,
) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_published_corruptions(publish(write(tmp_path, images, labels)), "fog", 1)


def test_a_file_that_is_cut_off_or_no_array_is_named(tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    folder = write(tmp_path)
    whole = (folder / "fog.npy").read_bytes()
    (folder / "fog.npy").write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=f"fog.npy of .* has {len(whole) - 100} bytes, .* needs {len(whole)}: the down"
    ):
        load_published_corruptions(publish(folder), "fog", 1)
    (folder / "fog.npy").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="fog.npy of .* is not a numpy array"):
        load_published_corruptions(folder, "fog", 1)
    (folder / "broken.tar").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        identify_published(folder / "broken.tar")


def test_what_is_missing_is_named(tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    with pytest.raises(FileNotFoundError, match="no labels.npy in .* nor CIFAR-10-C.tar or CIFAR-100-C.tar"):
        identify_published(tmp_path)
    folder = publish(write(tmp_path))
    with pytest.raises(FileNotFoundError, match="no snow.npy in .*zenodo"):
        load_published_corruptions(folder, "snow", 1)
    with pytest.raises(FileNotFoundError, match="no snow.npy in .*tar"):
        load_published_corruptions(packed(folder, tmp_path / "some.tar"), "snow", 1)
    with pytest.raises(FileNotFoundError, match=r'no folder or file .*nowhere.*Hub data set repository "user/name"'):
        identify_published(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder or file 'cifar10'"):
        identify_published("cifar10")


def test_two_sets_in_one_folder_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("CIFAR-10-C", "CIFAR-100-C"):
        write(tmp_path / name)
    with pytest.raises(ValueError, match="holds several sets .*name one of them"):
        identify_published(tmp_path)


def test_the_name_and_severity_are_checked_before_any_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'fog'"):
        load_published_corruptions(tmp_path, "fogg", 1)
    with pytest.raises(ValueError, match="got 6"):
        load_published_corruptions(tmp_path, "fog", 6)


def test_a_repository_is_searched_for_the_array_then_for_the_tar(
    tmp_path: Path, publish: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(write(tmp_path))
    tar = packed(folder, tmp_path / "CIFAR-10-C.tar")
    asked: list[str] = []

    def download(repository: str, name: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append(f"{repository} {name}")
        if repository == "user/arrays" and "/" not in name and name.endswith("npy"):
            return str(folder / name)
        if repository == "user/tars" and name == "CIFAR-10-C.tar":
            return str(tar)
        raise LocalEntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    check("user/arrays")
    assert asked == ["user/arrays labels.npy", "user/arrays fog.npy"]  # each once
    check("user/tars:CIFAR-10-C")
    assert asked[2:4] == [
        "user/tars:CIFAR-10-C".split(":")[0] + end for end in (" CIFAR-10-C/labels.npy", " CIFAR-10-C.tar")
    ]
    with pytest.raises(FileNotFoundError, match="'user/tars' has none of CIFAR-100-C/labels.npy, CIFAR-100-C.tar"):
        identify_published("user/tars:CIFAR-100-C")


def test_a_repository_that_cannot_be_reached_is_named(publish: object) -> None:
    with pytest.raises(FileNotFoundError, match="'user/arrays' has none of labels.npy.* or the Hub cannot be reached"):
        identify_published("user/arrays")
    with pytest.raises(FileNotFoundError, match="cannot read the data set 'bad name/x'"):
        identify_published("bad name/x")
