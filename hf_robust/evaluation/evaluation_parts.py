"""Parts of an evaluation: batches that processes share, and that are noted down so that a kill costs one of them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..attacks import PGD
from .accuracy import progress_bar
from .autoattack_state import LOGITS_TOLERANCE
from .judged_images import JudgedImages
from .report import write_text

__all__ = ["EvaluationParts", "Predictions", "predict", "world"]

Logits = Callable[[Tensor], Tensor]
_TAG = "evaluation.json"


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; `(0, 1)` outside of distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class Predictions:
    """Classes that images were given, and what that cost.

    Args:
        classes (`torch.Tensor` of shape `(N,)`): int64.
        seconds (`float`): of computing, divided by the number of processes.
        forwards (`int`): images classified.
        backwards (`int`): images whose gradient was taken.
    """

    classes: Tensor
    seconds: float
    forwards: int
    backwards: int


class EvaluationParts:
    """Notes about finished batches in a folder, which belong to one model, one set of images and one setting.

    Args:
        folder (`Path`, *optional*): where; default: nothing is noted.
        tag (`dict`): what the notes belong to; plain JSON values. Of `logits`, which the model gives to the first
            image, a rounding error is let pass.
        resume (`bool`, defaults to `True`): go on from notes that are there, else throw them away.

    Raises:
        ValueError: for notes of another evaluation.
    """

    def __init__(self, folder: Path | None, tag: dict[str, Any], resume: bool = True) -> None:
        self.folder = folder
        if folder is None:
            return
        if world()[0] == 0 and not resume:
            shutil.rmtree(folder, ignore_errors=True)
        if world()[1] > 1:
            dist.barrier()
        file = folder / _TAG
        if file.is_file() and any(path != file for path in folder.iterdir()):  # else there is nothing to lose
            self._compare(file, tag)
        if world()[1] > 1:
            dist.barrier()  # nobody writes before all have compared
        if world()[0] == 0:
            write_text(file, json.dumps(tag, indent=2) + "\n")

    @staticmethod
    def _compare(file: Path, tag: dict[str, Any]) -> None:
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        differing = [key for key in tag if key != "logits" and stored.get(key) != tag[key]]
        told = [f"{key} (there {stored.get(key)!r}, here {tag[key]!r})" for key in differing]
        if not differing and "logits" in tag and not _alike(stored.get("logits"), tag["logits"]):
            told = ["what the model answers to the first image (its weights are the same)"]
        if told:
            raise ValueError(
                f"{str(file.parent.parent)!r} holds an evaluation that differs in {', '.join(told)}: give another "
                "output_dir, or throw that one away with resume=False (--resume false)"
            )

    def load(self, part: str, number: int) -> Any:
        """What was noted for a batch, or `None`."""
        file = None if self.folder is None else self.folder / part / f"{number:05d}.json"
        if file is None or not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # cannot happen by a kill: files are replaced whole
            return None

    def save(self, part: str, number: int, value: Any) -> None:
        """Note the outcome of a batch."""
        if self.folder is not None:
            write_text(self.folder / part / f"{number:05d}.json", json.dumps(value))

    def file(self, name: str) -> Path | None:
        """Place of another file of the same evaluation."""
        return None if self.folder is None else self.folder / name


def _alike(stored: Any, logits: list[float]) -> bool:
    if not isinstance(stored, list) or len(stored) != len(logits):
        return False
    there, here = torch.tensor(stored), torch.tensor(logits)
    both = torch.equal(there.isfinite(), here.isfinite())
    spread = float(here.max() - here.min())
    return both and (not here.isfinite().all() or float((there - here).abs().max()) <= LOGITS_TOLERANCE * spread)


def predict(
    logits: Logits,
    images: JudgedImages,
    part: str,
    parts: EvaluationParts,
    *,
    size: int | None,
    attack: PGD | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
    title: str = "",
) -> Predictions:
    """Classify images, clean or under PGD on the cross-entropy, in float32.

    Every image is attacked, also one that is misclassified already, and the last iterate counts. Random starts depend
    on seed and batch number alone, so that flags do not depend on the number of processes, nor on a kill.

    Args:
        logits (`Callable[[Tensor], Tensor]`): images in [0, 1] to logits; its network held by the caller.
        images ([`JudgedImages`]): what is classified.
        part (`str`): name of the notes.
        parts ([`EvaluationParts`]): where batches are noted.
        size (`int`, *optional*): side in pixels.
        attack ([`PGD`], *optional*): default: none.
        batch_size (`int`, defaults to 128): images per batch.
        seed (`int`, defaults to 0): of the random starts.
        device (`torch.device` or `str`): where the images go.
        progress (`bool`, defaults to `False`): show a bar.
        title (`str`): of the bar.

    Returns:
        [`Predictions`]: the same on every process.

    Raises:
        ValueError: for logits that are not finite.

    Source: PGD-20 of RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning/utils.py` (evaluation mode,
        cross-entropy, uniform start, last iterate).
    """
    rank, processes = world()
    starts = range(0, len(images), batch_size)

    def share() -> dict[int, dict[str, Any]]:
        found = {}
        with progress_bar(len(images), title or part, progress and rank == 0) as bar:
            for number in range(len(starts)):
                rows = range(starts[number], min(starts[number] + batch_size, len(images)))
                if number % processes == rank:
                    noted = parts.load(part, number)
                    if noted is None:
                        noted = _one_batch(logits, images, rows, size, attack, seed * 1_000_003 + number, device)
                        parts.save(part, number, noted)
                    found[number] = noted
                bar.update(len(rows))
        return found

    found = exchange(share)
    classes = torch.tensor([c for number in range(len(starts)) for c in found[number]["classes"]], dtype=torch.int64)
    steps = attack.steps if attack is not None else 0
    seconds = sum(float(noted["seconds"]) for noted in found.values()) / processes
    passes = (steps + 1) * len(images)
    return Predictions(classes, seconds, passes, steps * len(images))


def exchange(share: Callable[[], dict[int, Any]]) -> dict[int, Any]:
    """Run the share of this process and join it with those of the others; an error of one ends all of them.

    Args:
        share (`Callable`): gives outcomes by number.

    Returns:
        `dict[int, Any]`: the outcomes of all processes.
    """
    _, processes = world()
    if processes == 1:
        return share()
    outcome: Any
    try:
        outcome = share()
    except Exception as error:
        outcome = error
    outcomes: list[Any] = [None] * processes
    dist.all_gather_object(outcomes, outcome)
    if isinstance(outcome, Exception):
        raise outcome
    for rank, other in enumerate(outcomes):
        if isinstance(other, Exception):
            raise RuntimeError(f"process {rank} could not do its share: {other}") from other
    return {number: value for other in outcomes for number, value in other.items()}


def _one_batch(
    logits: Logits,
    images: JudgedImages,
    rows: range,
    size: int | None,
    attack: PGD | None,
    seed: int,
    device: torch.device | str,
) -> dict[str, Any]:
    started = time.perf_counter()
    x, labels = images.pixels(rows, size, device), images.labels[rows.start : rows.stop].to(device)
    if attack is not None:
        generator = torch.Generator(device).manual_seed(seed)
        try:
            x = attack(partial(_summed_loss, logits, labels), x, generator=generator)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError(
                "the logits do not depend on the images differentiably, a gradient attack has nothing to follow: take "
                "no_grad, detach and numpy out of the model, or measure accuracy and corruptions alone"
            ) from error
    with torch.no_grad():
        values = logits(x)
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite().all(1)).sum())
        raise ValueError(
            f"the model gives logits that are not finite (NaN or infinite) for {bad} of {len(x)} images in [0, 1]: no "
            "accuracy can be counted on them; look for an overflow, log(0) or 0/0 in the model, or damaged weights"
        )
    return {"classes": values.argmax(1).tolist(), "seconds": round(time.perf_counter() - started, 4)}


def _summed_loss(logits: Logits, labels: Tensor, images: Tensor) -> Tensor:
    # The sum, not the mean: each image's gradient is its own, whatever batch it sits in.
    return cross_entropy(logits(images).float(), labels, reduction="sum")
