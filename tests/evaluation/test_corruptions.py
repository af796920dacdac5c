"""Accuracy under corruptions: counted cell by cell, named by what was corrupted, and resumed after a kill."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_robust.data import ImageDataset
from hf_robust.evaluation import corruption_arrays, corruptions
from hf_robust.evaluation.accuracy import measure_accuracy
from hf_robust.evaluation.corruptions import (
    CORRUPTIONS,
    CorruptionResult,
    corrupt_dataset,
    corruption_accuracy,
    load_published_corruptions,
)


def halves(n: int = 24, size: int = 16) -> ImageDataset:
    """Class 0 is dark, class 1 bright, from clear to close cases."""
    levels = torch.linspace(40, 216, n).round().to(torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    images[:, :, ::2, ::2] += 20
    return ImageDataset.from_tensors(images, (levels > 128).long(), name="halves")


def brightness(images: Tensor) -> Tensor:
    margin = (images.mean((1, 2, 3)) - 0.52) * 50
    return torch.stack([-margin, margin], 1)


def test_a_cell_is_the_accuracy_on_the_corrupted_images() -> None:
    data = halves()
    result = corruption_accuracy(brightness, data, size=16, names=("fog", "brightness"), severities=(1, 5), seed=3)
    for name in ("fog", "brightness"):
        for severity in (1, 5):
            cell = corrupt_dataset(data, name, severity, seed=3)
            assert result.table[name][severity] == measure_accuracy(brightness, cell, size=16).standard
    assert result.table["brightness"][1] > result.table["brightness"][5]
    assert (result.source, result.n, result.seed, result.constants) == ("generated", 24, 3, "cifar")
    assert result.mean == pytest.approx(sum(v for row in result.table.values() for v in row.values()) / 4)
    assert result.to_dict() == {"generated_corruptions_partial_mean_accuracy": result.mean}


def test_all_75_cells_make_the_mean_of_the_benchmark_and_extra_ones_stay_out() -> None:
    data = halves(4)
    result = corruption_accuracy(brightness, data, size=16, names=(*CORRUPTIONS, "saturate"), batch_size=3)
    assert result.complete and not result.published
    assert list(result.table) == [*CORRUPTIONS, "saturate"]
    by_severity = [np.mean([result.table[name][severity] for name in CORRUPTIONS]) for severity in range(1, 6)]
    assert result.mean == pytest.approx(np.mean(by_severity))
    assert result.to_dict() == {"generated_corruptions_mean_accuracy": result.mean}
    assert result.title.startswith("generated corruptions (hf_robust ") and "CIFAR-10-C" not in result.title
    assert len(result.notes) == 1 and "frost is generated ice" in result.notes[0]


def test_a_result_of_extra_corruptions_has_no_mean() -> None:
    result = CorruptionResult({"saturate": {1: 0.5}}, "generated", 4)
    assert result.to_dict() == {}
    with pytest.raises(ValueError, match="no main corruption was measured, only saturate"):
        _ = result.mean


def test_a_part_of_the_images_and_a_model_of_another_size() -> None:
    data, seen = halves(), []

    def model(images: Tensor) -> Tensor:
        seen.append(images.shape)
        return brightness(images)

    result = corruption_accuracy(model, data, size=8, names=("contrast",), severities=(2,), indices=[0, 5, 23])
    assert result.n == 3 and {shape[1:] for shape in seen} == {(3, 8, 8)}
    expected = measure_accuracy(brightness, corrupt_dataset(data.subset([0, 5, 23]), "contrast", 2), size=8)
    assert result.table["contrast"][2] == expected.standard


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two corruptions, two images per severity, with checksums as if they were CIFAR-10-C."""
    rows = np.arange(10, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 32, 32, 3), np.uint8)
    np.save(tmp_path / "fog.npy", rows * 20)
    np.save(tmp_path / "snow.npy", rows * 20 + 5)
    np.save(tmp_path / "labels.npy", np.array([1, 0] * 5, np.uint8))
    sums = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.npy")}
    monkeypatch.setitem(corruption_arrays.CHECKSUMS, "cifar10c", sums)
    return tmp_path


def ten(images: Tensor) -> Tensor:
    """Class 1 for bright images, else class 0, of ten."""
    return torch.nn.functional.pad(brightness(images), (0, 8), value=-1000.0)


def test_published_arrays_are_measured_as_they_are_and_named(published: Path) -> None:
    result = corruption_accuracy(ten, published, size=32, names=("fog", "snow"))
    for name in ("fog", "snow"):
        for severity in range(1, 6):
            images, labels = load_published_corruptions(published, name, severity)
            right = (ten(images.float() / 255).argmax(1) == labels).float().mean()
            assert result.table[name][severity] == right
    assert result.table["fog"] == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.0, 5: 0.5}
    assert result.published and result.title == "CIFAR-10-C" and result.constants is None and result.notes == []
    assert list(result.to_dict()) == ["cifar10c_partial_mean_accuracy"]
    one = corruption_accuracy(ten, str(published), size=32, names=("fog",), severities=(5,), indices=[0])
    assert one.n == 1 and one.table == {"fog": {5: 1.0}}


def test_what_does_not_fit_is_refused(published: Path) -> None:
    with pytest.raises(ValueError, match="the model tells 2 classes apart, .* has 10"):
        corruption_accuracy(brightness, published, size=32, names=("fog",))
    with pytest.raises(ValueError, match="the model tells 1 classes apart, 'halves' has 2"):
        corruption_accuracy(lambda x: brightness(x)[:, :1], halves(), size=16)
    with pytest.raises(ValueError, match="accuracy needs labels, 'tensors' has none"):
        corruption_accuracy(ten, ImageDataset.from_tensors(torch.zeros((2, 3, 8, 8), dtype=torch.uint8)), size=8)
    with pytest.raises(ValueError, match="constants and frost_textures are for generated ones"):
        corruption_accuracy(ten, published, size=32, constants="cifar")
    with pytest.raises(ValueError, match="did you mean 'fog'"):
        corruption_accuracy(ten, halves(), size=16, names=("fogg",))
    with pytest.raises(ValueError, match="at least one of each"):
        corruption_accuracy(ten, halves(), size=16, names=())
    with pytest.raises(FileNotFoundError, match="no folder or file 'elsewhere'"):
        corruption_accuracy(ten, "elsewhere", size=32)
    with pytest.raises(ValueError, match="finite"):
        corruption_accuracy(lambda x: ten(x) * float("nan"), halves(), size=16)


def test_one_corruption_and_severity_may_come_bare() -> None:
    one = corruption_accuracy(brightness, halves(), size=16, names="fog", severities=3)
    assert one == corruption_accuracy(brightness, halves(), size=16, names=("fog",), severities=(3,))
    for severities in (np.array([1, 3]), range(1, 4, 2)):
        found = corruption_accuracy(brightness, halves(), size=16, names="fog", severities=severities)  # type: ignore
        assert list(found.table["fog"]) == [1, 3]
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        corruption_accuracy(brightness, halves(), size=16, seed=-1)


def test_published_cells_go_on_from_a_state_that_others_began(published: Path, tmp_path: Path) -> None:
    state = tmp_path / "state" / "state.json"
    few = {"size": 32, "state_file": str(state)}
    corruption_accuracy(ten, published, names="snow", severities=2, **few)  # type: ignore[arg-type]
    result = corruption_accuracy(ten, published, names=("fog", "snow"), **few)  # type: ignore[arg-type]
    assert result == corruption_accuracy(ten, published, size=32, names=("fog", "snow"))
    assert json.loads(state.read_text())["table"].keys() == {"fog", "snow"}
    with pytest.raises(ValueError, match="differs in n, data"):
        corruption_accuracy(ten, published, names="snow", indices=[1], **few)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differs in model"):
        corruption_accuracy(lambda x: ten(x) * 2, published, names="snow", **few)  # type: ignore


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    data, state = halves(), tmp_path / "state" / "corruptions.json"
    wanted = {"names": ("fog", "gaussian_noise"), "severities": (1, 3, 5)}
    expected = corruption_accuracy(brightness, data, size=16, **wanted)  # type: ignore[arg-type]
    measured: list[str] = []

    def counting(logits: object, cell: ImageDataset, **options: object) -> object:
        if len(measured) == after:
            raise Killed
        measured.append(cell.name)
        return measure_accuracy(logits, cell, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(corruptions, "measure_accuracy", counting)
    with pytest.raises(Killed):
        corruption_accuracy(brightness, data, size=16, state_file=state, **wanted)  # type: ignore[arg-type]
    assert len(measured) == after
    after = 100
    again = corruption_accuracy(brightness, data, size=16, state_file=state, **wanted)  # type: ignore[arg-type]
    assert again == expected and len(measured) == len(set(measured)) == 6
    assert (
        corruption_accuracy(brightness, data, size=16, state_file=state, names=("fog",)).table["fog"][3]
        == (expected.table["fog"][3])
    )


def test_the_state_of_another_evaluation_is_refused_with_what_differs(tmp_path: Path) -> None:
    data, state = halves(), tmp_path / "state.json"
    few = {"size": 16, "names": ("fog",), "severities": (1,), "state_file": state}
    corruption_accuracy(brightness, data, **few)  # type: ignore[arg-type]
    assert json.loads(state.read_text())["table"].keys() == {"fog"}
    with pytest.raises(ValueError, match="is of another evaluation, it differs in seed: delete it"):
        corruption_accuracy(brightness, data, seed=1, **few)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differs in constants"):
        corruption_accuracy(brightness, data, constants="imagenet", **few)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differs in n, data"):
        corruption_accuracy(brightness, halves(20), **few)  # type: ignore[arg-type]
    other = halves()
    assert other.images is not None
    other.images[11] = 255 - other.images[11]
    with pytest.raises(ValueError, match="differs in data"):
        corruption_accuracy(brightness, other, **few)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differs in model"):
        corruption_accuracy(lambda x: brightness(x) + 3, data, **few)  # type: ignore[arg-type]
    for text in ("{", "[]", '{"facts": {}, "table": {}}'):
        state.write_text(text)
        with pytest.raises(ValueError, match="is not the state of an evaluation .*delete it"):
            corruption_accuracy(brightness, data, **few)  # type: ignore[arg-type]
    state.unlink()
    state.mkdir()
    with pytest.raises(ValueError, match="is not the state of an evaluation .*delete it"):
        corruption_accuracy(brightness, data, **few)  # type: ignore[arg-type]


class Together:
    """Stands for torch.distributed in one of two processes; `said`: what the first one broadcasts."""

    def __init__(self, rank: int, said: list[object] | None = None) -> None:
        self.rank, self.said = rank, said

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self.rank

    def broadcast_object_list(self, box: list[object], src: int) -> None:
        assert src == 0
        if self.rank == 0:
            self.said = list(box)
        else:
            box[:] = self.said or []


def test_processes_go_by_the_state_of_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.json"
    options = {"size": 16, "severities": (3,), "shared": True}
    corruption_accuracy(brightness, halves(), size=16, severities=(3,), names=("fog",), state_file=state)
    measured: list[str] = []

    def counting(logits: object, cell: ImageDataset, **options: object) -> object:
        assert options.pop("shared") is True
        measured.append(cell.name)
        return measure_accuracy(logits, cell, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(corruptions, "measure_accuracy", counting)
    # The second process knows nothing of the file: it must measure what the first does, or both wait for ever.
    for rank, file in ((0, state), (1, tmp_path / "unknown.json")):
        monkeypatch.setattr(corruptions, "dist", Together(rank, [{"fog": {3: 0.25}}, None]))
        options["state_file"] = file
        result = corruption_accuracy(brightness, halves(), names=("fog", "snow"), **options)  # type: ignore[arg-type]
        assert measured.pop() == "halves, snow 3" and measured == []
        assert rank == 0 or result.table["fog"][3] == 0.25
    assert not (tmp_path / "unknown.json").exists()
    assert json.loads(state.read_text())["table"].keys() == {"fog", "snow"}
    monkeypatch.setattr(corruptions, "dist", Together(1, [{}, "of another evaluation"]))
    with pytest.raises(ValueError, match="of another evaluation"):
        corruption_accuracy(brightness, halves(), **options)  # type: ignore[arg-type]
