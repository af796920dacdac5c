"""Common corruptions: accuracy on the published CIFAR-10-C and 100-C, or on corruptions made of any data set.

The number of the benchmark comes from the published arrays alone. What is generated here follows the same definition
with the same constants, but with other random numbers and without the photographs of frost, and is called "generated
corruptions" wherever it is written down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.random import RandomState

from .. import __version__
from ..data import ImageDataset
from ..views import Views
from .accuracy import Accuracy, Logits, measure_accuracy, progress_bar
from .autoattack_state import fingerprint
from .corruption_arrays import SIDE, identify_published, load_published_corruptions, load_published_labels
from .corruption_constants import CORRUPTIONS, EXTRA, SEVERITIES, check_corruption
from .corruption_generator import CorruptedImages, corrupt, corrupt_dataset, default_constants
from .corruption_images import Textures, read_frost_textures
from .linear_probe import check_features
from .report import write_text

__all__ = [
    "CORRUPTIONS",
    "EXTRA",
    "SEVERITIES",
    "CorruptionResult",
    "corrupt",
    "corrupt_dataset",
    "corruption_accuracy",
    "load_published_corruptions",
    "read_frost_textures",
]

SAMPLE = 4  # images by which a model is recognised
SPREAD = 64  # images by which a data set is recognised that is not in memory
TITLES = {"cifar10c": "CIFAR-10-C", "cifar100c": "CIFAR-100-C"}
CLASSES = {"cifar10c": 10, "cifar100c": 100}
_GENERATED_FROST = "frost is generated ice, not the photographs of the published sets (pass frost_textures for those)"


@dataclass
class CorruptionResult:
    """Accuracy under every corruption at every severity, and what was corrupted.

    Args:
        table (`dict[str, dict[int, float]]`): corruption -> severity -> accuracy in [0, 1].
        source (`str`): `"cifar10c"` or `"cifar100c"` for the published arrays, else `"generated"`.
        n (`int`): images per cell of the table.
        seed (`int`): of the generated corruptions.
        constants (`str`, *optional*): table of the generated corruptions; `None` for published ones.
        notes (`list[str]`): what a reader of the numbers must know.
    """

    table: dict[str, dict[int, float]]
    source: str
    n: int
    seed: int = 0
    constants: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def published(self) -> bool:
        """Whether the images are the published ones, checksums compared."""
        return self.source in TITLES

    @property
    def title(self) -> str:
        """How to call the images: never by the name of a published set unless they are that set."""
        return (
            TITLES.get(self.source) or f"generated corruptions (hf_robust {__version__}, {self.constants} constants)"
        )

    @property
    def complete(self) -> bool:
        """Whether all 15 corruptions at all 5 severities are there, which the benchmark's mean needs."""
        return all(set(SEVERITIES) <= set(self.table.get(name, ())) for name in CORRUPTIONS)

    @property
    def mean(self) -> float:
        """Mean of all cells of the main corruptions, in [0, 1]; the extra ones do not count.

        Raises:
            ValueError: when only extra corruptions were measured.
        """
        cells = list(self._cells())
        if not cells:
            raise ValueError(f"no main corruption was measured, only {', '.join(self.table)}: the mean is over those")
        return sum(cells) / len(cells)

    def _cells(self) -> Iterator[float]:
        return (value for name in self.table if name in CORRUPTIONS for value in self.table[name].values())

    def to_dict(self) -> dict[str, float]:
        """Give the mean under a name that says what it is the mean of.

        Returns:
            `dict[str, float]`: `cifar10c_mean_accuracy`, `cifar100c_mean_accuracy` or
            `generated_corruptions_mean_accuracy`; `..._partial_mean_accuracy` when cells are missing.
        """
        if not any(name in CORRUPTIONS for name in self.table):
            return {}
        name = self.source if self.published else "generated_corruptions"
        return {f"{name}_{'mean' if self.complete else 'partial_mean'}_accuracy": self.mean}


def corruption_accuracy(
    logits: Logits,
    source: ImageDataset | str | os.PathLike[str],
    *,
    size: int,
    names: Sequence[str] | str = CORRUPTIONS,
    severities: Sequence[int] | int = SEVERITIES,
    constants: str | None = None,
    frost_textures: Textures | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    shared: bool = False,
    state_file: str | Path | None = None,
    progress: bool = False,
) -> CorruptionResult:
    """Measure a classifier's accuracy under common corruptions, one cell of corruption and severity at a time.

    Corruptions are made at the stored size of the images; only then are they resized to what the model takes. Hold
    the network with `hf_robust.attacks.frozen` around the call, so that it is in evaluation mode.

    Args:
        logits (`Callable[[Tensor], Tensor]`): images `(N, 3, S, S)` in [0, 1] to logits `(N, C)`.
        source ([`ImageDataset`], `str` or `PathLike`): labelled images to corrupt, or the published arrays: a folder,
            a tar or a Hub repository, see [`load_published_corruptions`].
        size (`int`): side S in pixels.
        names (`Sequence[str]` or `str`, defaults to the 15): corruptions, also extra ones.
        severities (`Sequence[int]` or `int`, defaults to 1 to 5).
        constants (`str`, *optional*): for generated ones, see [`corrupt_dataset`].
        frost_textures (`Sequence[ndarray]`, *optional*): for generated ones, see [`read_frost_textures`].
        indices (`Sequence[int]`, *optional*): measure on these images only, the same in every cell.
        batch_size (`int`, defaults to 256): images per batch.
        seed (`int`, defaults to 0): of the generated corruptions.
        device (`str` or `torch.device`): where the images are sent.
        shared (`bool`, defaults to `False`): the processes share the batches and all of them call.
        state_file (`str` or `Path`, *optional*): JSON with the finished cells, written after each one; a run that
            finds it goes on from there.
        progress (`bool`, defaults to `False`): show a bar when it takes more than a few seconds.

    Returns:
        [`CorruptionResult`]: the same on every process.

    Raises:
        FileNotFoundError: when the published arrays are missing.
        ValueError: for unknown names or severities, images without labels, a model whose number of outputs does not
            fit the labels, or a state file of another evaluation.

    Source: corruption accuracy of RobustSSL_Benchmark@19dc714: plain accuracy, mean over 15 x 5 cells.
    """
    names, severities = _checked_cells(names, severities, seed)
    cells = _cells_of(source, constants, seed, frost_textures, indices)
    facts = {"seed": seed, "size": size, "frost": None if frost_textures is None else len(frost_textures)}
    facts |= cells.facts() | {"logits": _sample_logits(logits, cells, size, device)}
    judge = partial(measure_accuracy, logits, size=size, batch_size=batch_size, device=device, shared=shared)
    table = _measured(judge, cells, names, severities, _State(state_file, facts, shared), progress)
    notes = [_GENERATED_FROST] if "frost" in names and cells.generated and frost_textures is None else []
    return CorruptionResult(table, cells.kind, cells.n, seed, cells.constants, notes)


def _checked_cells(
    names: Sequence[str] | str, severities: Sequence[int] | int, seed: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What was asked for, as tuples; a single one may come bare."""
    names = (names,) if isinstance(names, str) else tuple(names)
    severities = tuple(severities) if isinstance(severities, Sequence | np.ndarray) else (severities,)
    if not names or not severities:
        raise ValueError(f"got names {names!r} and severities {severities!r}: at least one of each is needed")
    for name in names:
        for severity in severities:
            check_corruption(name, severity)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}: 0 is the default")
    return names, tuple(int(severity) for severity in severities)


def _measured(
    judge: Callable[[ImageDataset], Accuracy],
    cells: _Cells,
    names: Sequence[str],
    severities: Sequence[int],
    state: _State,
    progress: bool,
) -> dict[str, dict[int, float]]:
    """Accuracy in every cell that was asked for; those of the state are not measured again."""
    table = state.read()
    left = [(name, severity) for name in names for severity in severities if severity not in table.get(name, {})]
    with progress_bar(cells.n * len(left), f"corruptions of {cells.sample.name}", progress) as bar:
        for name, severity in left:
            table.setdefault(name, {})[severity] = judge(cells.load(name, severity)).standard
            state.write(table)
            bar.update(cells.n)
    return {name: {severity: table[name][severity] for severity in severities} for name in names}


@dataclass(frozen=True)
class _Cells:
    """Where the images of a cell come from, how many, and a few images that show which model it is."""

    kind: str
    constants: str | None
    n: int
    data: str  # hash of images and labels
    sample: ImageDataset
    load: Callable[[str, int], ImageDataset]

    @property
    def generated(self) -> bool:
        return self.constants is not None

    def facts(self) -> dict[str, Any]:
        """What a state file belongs to."""
        return {"source": self.kind, "constants": self.constants, "n": self.n, "data": self.data}


def _cells_of(
    source: ImageDataset | str | os.PathLike[str],
    constants: str | None,
    seed: int,
    textures: Textures | None,
    indices: Sequence[int] | None,
) -> _Cells:
    if isinstance(source, ImageDataset):
        if source.labels is None:
            raise ValueError(
                f"accuracy needs labels, {source.name!r} has none: name its label column (label_column=...)"
            )
        chosen = source if indices is None else source.subset(indices)
        table = constants or default_constants(source)
        make = partial(CorruptedImages, chosen, constants=table, seed=seed, frost_textures=textures)
        return _Cells("generated", table, len(chosen), _fingerprint(chosen), chosen, make)
    if constants is not None or textures is not None:
        raise ValueError(
            f"{str(source)!r} holds published images, constants and frost_textures are for generated ones: leave them "
            "out, or pass a data set"
        )
    # Their checksums say which images they are. The model is recognised by noise: any cell may be asked for first.
    kind, labels = identify_published(source), load_published_labels(source)
    noise = RandomState(0).randint(0, 256, (SAMPLE, 3, SIDE, SIDE)).astype(np.uint8)
    sample = ImageDataset.from_tensors(torch.from_numpy(noise), name=str(source))
    rows = torch.arange(len(labels)) if indices is None else torch.as_tensor(indices)
    data = fingerprint([("labels", labels), ("rows", rows.long())])
    return _Cells(kind, None, len(rows), data, sample, partial(_published_cell, source, indices))


def _published_cell(
    source: str | os.PathLike[str], indices: Sequence[int] | None, name: str, severity: int
) -> ImageDataset:
    images, labels = load_published_corruptions(source, name, severity)
    cell = ImageDataset.from_tensors(images, labels, name=str(source))
    return cell if indices is None else cell.subset(indices)


def _fingerprint(dataset: ImageDataset) -> str:
    """Hash of the labels and of all images in memory; of images that are decoded at access, some stand for all."""
    images = dataset.images
    if images is None:
        rows = torch.linspace(0, len(dataset) - 1, min(SPREAD, len(dataset))).long().tolist()
        images = torch.stack([dataset[row]["image"] for row in rows])
    return fingerprint([("images", images), *([] if dataset.labels is None else [("labels", dataset.labels)])])


@torch.no_grad()
def _sample_logits(logits: Logits, cells: _Cells, size: int, device: str | torch.device) -> list[float]:
    """What the model says of a few images: whether it fits the labels, and which model it is."""
    dataset, classes = cells.sample, CLASSES.get(cells.kind)
    images = torch.stack([dataset[k]["image"] for k in range(min(SAMPLE, len(dataset)))]).to(device)
    with torch.autocast(torch.device(device).type, enabled=False):
        found = check_features(logits(Views(size=size)(images, ["original"])["original"]))
    if classes is not None and found.shape[1] != classes or found.shape[1] < (dataset.num_classes or 0):
        raise ValueError(
            f"the model tells {found.shape[1]} classes apart, {dataset.name!r} has {classes or dataset.num_classes}: "
            "evaluate a model that was trained for these classes"
        )
    return [float(value) for value in found.flatten().float().cpu()]


@dataclass(frozen=True)
class _State:
    """The finished cells on disk, as the first process reads and writes them."""

    file: Path | str | None
    facts: dict[str, Any]
    shared: bool

    def read(self) -> dict[str, dict[int, float]]:
        """The finished cells, the same for every process."""
        box: list[Any] = [{}, None]
        if self._first():
            try:
                box[0] = _read_state(self.file, self.facts)
            except ValueError as error:
                box[1] = str(error)
        if self._together():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise ValueError(box[1])
        return box[0]

    def write(self, table: dict[str, dict[int, float]]) -> None:
        """Note the finished cells."""
        if self.file is not None and self._first():
            write_text(Path(self.file), json.dumps({"facts": self.facts, "table": table}, indent=1))

    def _together(self) -> bool:
        return self.shared and dist.is_available() and dist.is_initialized()

    def _first(self) -> bool:
        return not self._together() or dist.get_rank() == 0


def _read_state(file: Path | str | None, facts: dict[str, Any]) -> dict[str, dict[int, float]]:
    if file is None or not Path(file).exists():
        return {}
    way_out = "delete it, or write to another file"
    try:
        state = json.loads(Path(file).read_text(encoding="utf-8"))
        stored, table = state["facts"], state["table"]
        sample, other = np.array(facts["logits"]), np.array(stored["logits"], float)
        differing = [key for key in facts if key != "logits" and stored.get(key) != facts[key]]
        cells = {name: {int(severity): float(v) for severity, v in row.items()} for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{str(file)!r} is not the state of an evaluation ({error!r}): {way_out}") from error
    # The same weights give the same logits up to the order of additions, which batch and machine decide.
    if sample.shape != other.shape or not np.allclose(sample, other, rtol=1e-2, atol=1e-2 * abs(sample).max()):
        differing.append("model")
    if differing:
        raise ValueError(f"{str(file)!r} is of another evaluation, it differs in {', '.join(differing)}: {way_out}")
    return cells
