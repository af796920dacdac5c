"""Common corruptions: accuracy on the published CIFAR-10-C and 100-C, or on corruptions made of any data set.

The number of the benchmark comes from the published arrays alone. What is generated here follows the same definition
with the same constants, but with other random numbers and without the photographs of frost, and is called "generated
corruptions" wherever it is written down.
"""

from __future__ import annotations

import hashlib
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

from .. import __version__
from ..data import ImageDataset
from ..views import Views
from .accuracy import Logits, measure_accuracy, progress_bar
from .corruption_arrays import identify_published, load_published_corruptions
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
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    constants: str | None = None,
    frost_textures: Textures | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    shared: bool = False,
    state_file: Path | None = None,
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
        names (`Sequence[str]`, defaults to the 15): corruptions, also extra ones.
        severities (`Sequence[int]`, defaults to 1 to 5).
        constants (`str`, *optional*): for generated ones, see [`corrupt_dataset`].
        frost_textures (`Sequence[ndarray]`, *optional*): for generated ones, see [`read_frost_textures`].
        indices (`Sequence[int]`, *optional*): measure on these images only, the same in every cell.
        batch_size (`int`, defaults to 256): images per batch.
        seed (`int`, defaults to 0): of the generated corruptions.
        device (`str` or `torch.device`): where the images are sent.
        shared (`bool`, defaults to `False`): the processes share the batches and all of them call.
        state_file (`Path`, *optional*): JSON with the finished cells, written after each one; a run that finds it
            goes on from there.
        progress (`bool`, defaults to `False`): show a bar when it takes more than a few seconds.

    Returns:
        [`CorruptionResult`]: the same on every process.

    Raises:
        FileNotFoundError: when the published arrays are missing.
        ValueError: for unknown names or severities, images without labels, a model whose number of outputs does not
            fit the labels, or a state file of another evaluation.

    Source: corruption accuracy of RobustSSL_Benchmark@19dc714: plain accuracy, mean over 15 x 5 cells.
    """
    if not names or not severities:
        raise ValueError(f"got names {names!r} and severities {severities!r}: at least one of each is needed")
    for name in names:
        for severity in severities:
            check_corruption(name, severity)
    cells = _cells_of(source, constants, seed, frost_textures, indices)
    sample = cells.sample or cells.load(names[0], severities[0])
    facts = {
        "source": cells.kind,
        "constants": cells.constants,
        "seed": seed,
        "size": size,
        "n": len(sample),
        "data": _fingerprint(sample),
        "frost": None if frost_textures is None else len(frost_textures),
        "logits": _sample_logits(logits, sample, size, device, CLASSES.get(cells.kind)),
    }
    table = _resume(state_file, facts, shared)
    with progress_bar(len(sample) * len(names) * len(severities), f"corruptions of {sample.name}", progress) as bar:
        for name in names:
            for severity in severities:
                if severity not in table.setdefault(name, {}):
                    cell = cells.load(name, severity)
                    found = measure_accuracy(
                        logits, cell, size=size, batch_size=batch_size, device=device, shared=shared
                    )
                    table[name][int(severity)] = found.standard
                    _save(state_file, facts, table, shared)
                bar.update(len(sample))
    asked = {name: {int(severity): table[name][severity] for severity in severities} for name in names}
    generated_ice = "frost" in names and cells.constants is not None and frost_textures is None
    notes = [_GENERATED_FROST] if generated_ice else []
    return CorruptionResult(asked, cells.kind, len(sample), seed, cells.constants, notes)


@dataclass(frozen=True)
class _Cells:
    """Where the images of a cell come from; `sample`: clean images, where there are any."""

    kind: str
    constants: str | None
    sample: ImageDataset | None
    load: Callable[[str, int], ImageDataset]


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
        return _Cells("generated", table, chosen, make)
    if constants is not None or textures is not None:
        raise ValueError(
            f"{str(source)!r} holds published images, constants and frost_textures are for generated ones: leave them "
            "out, or pass a data set"
        )
    return _Cells(identify_published(source), None, None, partial(_published_cell, source, indices))


def _published_cell(
    source: str | os.PathLike[str], indices: Sequence[int] | None, name: str, severity: int
) -> ImageDataset:
    images, labels = load_published_corruptions(source, name, severity)
    cell = ImageDataset.from_tensors(images, labels, name=str(source))
    return cell if indices is None else cell.subset(indices)


def _fingerprint(dataset: ImageDataset) -> str:
    digest = hashlib.sha256(
        dataset[0]["image"].numpy().tobytes() + dataset[len(dataset) - 1]["image"].numpy().tobytes()
    )
    if dataset.labels is not None:
        digest.update(dataset.labels.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _sample_logits(
    logits: Logits, dataset: ImageDataset, size: int, device: str | torch.device, classes: int | None
) -> list[float]:
    """What the model says of a few images: whether it fits the labels, and which model it is."""
    images = torch.stack([dataset[k]["image"] for k in range(min(SAMPLE, len(dataset)))]).to(device)
    with torch.autocast(torch.device(device).type, enabled=False):
        found = check_features(logits(Views(size=size)(images, ["original"])["original"]))
    if classes is not None and found.shape[1] != classes or found.shape[1] < (dataset.num_classes or 0):
        raise ValueError(
            f"the model tells {found.shape[1]} classes apart, {dataset.name!r} has {classes or dataset.num_classes}: "
            "evaluate a model that was trained for these classes"
        )
    return [float(value) for value in found.flatten().float().cpu()]


def _resume(state_file: Path | None, facts: dict[str, Any], shared: bool) -> dict[str, dict[int, float]]:
    """The finished cells of a state file, as the first process reads them."""
    share = shared and dist.is_available() and dist.is_initialized()
    box: list[Any] = [{}, None]
    if not share or dist.get_rank() == 0:
        try:
            box[0] = _read_state(state_file, facts)
        except ValueError as error:
            box[1] = str(error)
    if share:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


def _read_state(state_file: Path | None, facts: dict[str, Any]) -> dict[str, dict[int, float]]:
    if state_file is None or not state_file.is_file():
        return {}
    way_out = "delete it, or write to another file"
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        stored, table = state["facts"], state["table"]
        sample, other = np.array(facts["logits"]), np.array(stored["logits"], float)
        differing = [key for key in facts if key != "logits" and stored.get(key) != facts[key]]
        cells = {name: {int(severity): float(v) for severity, v in row.items()} for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(state_file)!r} is not the state of an evaluation ({error!r}): {way_out}") from error
    # The same weights give the same logits up to the order of additions, which batch and machine decide.
    if sample.shape != other.shape or not np.allclose(sample, other, rtol=1e-2, atol=1e-2 * abs(sample).max()):
        differing.append("model")
    if differing:
        raise ValueError(
            f"{str(state_file)!r} is of another evaluation, it differs in {', '.join(differing)}: {way_out}"
        )
    return cells


def _save(state_file: Path | None, facts: dict[str, Any], table: dict[str, dict[int, float]], shared: bool) -> None:
    first = not (shared and dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if state_file is not None and first:
        write_text(state_file, json.dumps({"facts": facts, "table": table}, indent=1))
