"""Does choosing images pay? Full data, random subsets and RCS, for ACL and SAT, over seeds; resumable.

    python examples/studies/coresets.py run --dataset_name uoft-cs/cifar10 --output_dir outputs/coreset_study
    python examples/studies/coresets.py report --output_dir outputs/coreset_study

`run` works through a list of cells (method, fraction, seed), seed by seed, and writes one JSON file per finished cell:
start it again after a kill and it goes on; start it in a second terminal and both share the list (one core each).
`report` prints the table (mean and standard deviation over seeds) and draws time against accuracy. With
`--probe_every 1` every run is probed after each epoch (2,000 training and 1,000 test images; the time of a probe is
not counted), and `report` draws learning curves over time, too. For one method only: `--only acl-full-`.

--size cpu (default): 8,192 images, a thin ResNet-10, 12 epochs; times: docs/results.md.
--size published: the whole CIFAR-10 training set, ResNet-18, 1000 epochs, for GPUs.

Times are given in wall seconds and in processor seconds of the process: on a shared machine, compare the latter.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import flags, work_through
from coresets_report import report
from transformers import set_seed

from hf_robust.attacks import PGD
from hf_robust.coresets import RCS, CoresetMethod, FullData, RandomCoreset
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.environment import collect_environment
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives import Objective, load_objective
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.training_args import RobustTrainingArguments


@dataclass(frozen=True)
class Size:
    """Everything about the study that is not the comparison."""

    images: int | None
    eval_images: int
    architecture: str
    model_args: dict[str, Any]
    batch_size: int
    epochs: float
    short_epochs: float  # on full data, about the time of RCS at fraction 0.1
    warmup_epochs: float  # on full data, before the first selection
    interval: int
    validation_fraction: float
    acl_learning_rate: float
    sat_learning_rate: float
    lr_warmup_epochs: float
    bf16: bool


SIZES = {
    "cpu": Size(
        images=8192,
        eval_images=5000,
        architecture="resnet10_cifar",
        model_args={"channels": [16, 32, 64, 128], "stem_stride": 2},
        batch_size=128,
        epochs=12,
        short_epochs=6,
        warmup_epochs=3,
        interval=3,
        validation_fraction=0.02,
        acl_learning_rate=2.5,
        sat_learning_rate=0.1,
        lr_warmup_epochs=0.5,
        bf16=True,
    ),
    "published": Size(
        images=None,
        eval_images=10000,
        architecture="resnet18_cifar",
        model_args={},
        batch_size=512,
        epochs=1000,
        short_epochs=224,
        warmup_epochs=100,
        interval=20,
        validation_fraction=0.01,
        acl_learning_rate=5.0,
        sat_learning_rate=0.1,
        lr_warmup_epochs=10,
        bf16=True,
    ),
    "smoke": Size(
        images=512,
        eval_images=64,
        architecture="resnet10_cifar",
        model_args={"channels": [8, 8, 8, 8], "stem_stride": 2},
        batch_size=16,
        epochs=2,
        short_epochs=1,
        warmup_epochs=1,
        interval=1,
        validation_fraction=0.1,
        acl_learning_rate=0.5,
        sat_learning_rate=0.05,
        lr_warmup_epochs=0.5,
        bf16=False,
    ),
}
FRACTIONS = (0.05, 0.1, 0.2)
# What RCS is varied by, at fraction 0.1: which of its parts matter.
VARIANTS: dict[str, dict[str, Any]] = {
    "rcs": {},
    "rcs_sample": {"candidates": "sample"},
    "rcs_released": {"variant": "released", "distance": "kl_minmax"},
    "rcs_cheap": {"attack_steps": 1, "reattack": False},
    "rcs_val10": {"validation_fraction": 0.1},
}


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    objective: str
    method: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Also its file name."""
        return f"{self.objective}-{self.method}-{self.fraction:g}-seed{self.seed}"

    def coreset(self, size: Size) -> CoresetMethod:
        """The method that chooses images; but for `rcs_val10`, all choose from the same pool."""
        if self.method.startswith("full"):
            return FullData()
        schedule: dict[str, Any] = {
            "fraction": self.fraction,
            "warmup_epochs": size.warmup_epochs,
            "interval": size.interval,
            "validation_fraction": size.validation_fraction,
        }
        if self.method.startswith("random"):
            return RandomCoreset(**schedule, refresh=self.method == "random_refresh")
        return RCS(**{**schedule, **VARIANTS[self.method]})


def cells(seeds: int) -> Iterator[Cell]:
    """The whole list, the main comparison first, seed by seed; then what explains it."""
    chosen = ("random_fixed", "random_refresh", "rcs")
    for seed in range(1, seeds + 1):
        yield Cell("acl", "full", 1.0, seed)
        for fraction in (0.1, 0.05, 0.2):
            yield from (Cell("acl", method, fraction, seed) for method in chosen)
        yield Cell("sat", "full", 1.0, seed)
        yield from (Cell("sat", method, 0.1, seed) for method in chosen)
    for seed in range(1, seeds + 1):
        yield Cell("acl", "full_short", 1.0, seed)
    for seed in range(1, seeds + 1):
        yield from (Cell("acl", method, 0.1, seed) for method in VARIANTS if method != "rcs")


class Timed(RobustPretrainer):
    """Counts processor time of selections apart, stops the clocks during a probe, and keeps what the probes found."""

    selection_cpu_seconds = 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with a curve of accuracies over time."""
        self.curve: list[dict[str, float]] = []
        self.started, self.cpu_started = time.monotonic(), time.process_time()
        return super().train(*args, **kwargs)

    @property
    def clocks(self) -> dict[str, float]:
        """Seconds since the start of the training, without probes."""
        return {"seconds": time.monotonic() - self.started, "cpu_seconds": time.process_time() - self.cpu_started}

    def _select_coreset(self, round: int) -> None:
        started = time.process_time()
        super()._select_coreset(round)
        self.selection_cpu_seconds += time.process_time() - started

    def end_epoch(self, before: float, epoch: float) -> None:
        """Probe with the clocks stopped."""
        reached, entries = self.clocks, len(self.state.log_history)
        super().end_epoch(before, epoch)
        for entry in self.state.log_history[entries:]:
            found = {k.removeprefix("probe_"): v for k, v in entry.items() if k.startswith("probe_")}
            self.curve.append({"epoch": epoch, **reached, **found})
        spent = {name: value - reached[name] for name, value in self.clocks.items()}
        self.started, self.cpu_started = self.started + spent["seconds"], self.cpu_started + spent["cpu_seconds"]


def build(
    cell: Cell, size: Size, train: ImageDataset, evaluation: ImageDataset, folder: Path, probe_every: float = 0.0
) -> Timed:
    """The trainer of a cell."""
    objective: Objective = load_objective(cell.objective)()
    supervised = objective.needs_labels
    set_seed(cell.seed)
    config = RobustPretrainingConfig(
        architecture=size.architecture,
        model_args=size.model_args,
        image_size=32,
        norm_branches=objective.norm_branches,
        head="classifier" if supervised else "projector",
        num_classes=train.num_classes if supervised else None,
    )
    args = RobustTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=size.short_epochs if cell.method == "full_short" else size.epochs,
        per_device_train_batch_size=size.batch_size,
        optimizer="sgd" if supervised else "lars",
        learning_rate=size.sat_learning_rate if supervised else size.acl_learning_rate,
        weight_decay=5e-4 if supervised else 1e-6,
        warmup_epochs=0 if supervised else size.lr_warmup_epochs,
        bf16=size.bf16,
        channels_last=True,
        probe_every=probe_every,
        probe_examples=2000,
        probe_eval_examples=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
    )
    return Timed(
        RobustModelForPreTraining(config),
        args,
        objective,
        PGD(steps=5),
        train_dataset=train,
        eval_dataset=evaluation,
        coreset=cell.coreset(size),
    )


def run_cell(
    cell: Cell, size: Size, train: ImageDataset, evaluation: ImageDataset, folder: Path, probe_every: float = 0.0
) -> dict[str, Any]:
    """Train, probe and say what it took."""
    work = folder / "runs" / cell.name
    shutil.rmtree(work, ignore_errors=True)
    trainer = build(cell, size, train, evaluation, work, probe_every)
    trainer.train()
    taken = trainer.clocks
    probe = trainer.probe(n_eval=min(size.eval_images, len(evaluation)), progress=False)
    overlaps = [e["coreset_overlap"] for e in trainer.state.log_history if "coreset_overlap" in e]
    return {
        **dataclasses.asdict(cell),
        **probe.to_dict(),
        "n_eval": probe.n_eval,
        "coreset": repr(trainer.phases.method),
        "images_per_round": trainer.phases.rounds.length,
        "steps": trainer.state.global_step,
        **taken,
        "selection_seconds": trainer.selection_seconds,
        "selection_cpu_seconds": trainer.selection_cpu_seconds,
        "overlap": statistics.mean(overlaps) if overlaps else None,
        "curve": trainer.curve,
    }


def run(options: argparse.Namespace) -> None:
    """Work through the cells that no file and no other process has."""
    torch.set_num_threads(options.threads)
    size, folder = SIZES[options.size], Path(options.output_dir)
    facts = {"size": dataclasses.asdict(size), "environment": collect_environment()}
    columns = {"image_size": 32, "label_column": options.label_column, "image_column": options.image_column}
    train = load_image_dataset(options.dataset_name, "train", max_examples=size.images, **columns)
    evaluation = load_image_dataset(options.dataset_name, "test", **columns)
    train.name = evaluation.name = Path(options.dataset_name).name  # no path of this machine in a result
    work_through(
        cells(options.seeds),
        lambda cell: {**run_cell(cell, size, train, evaluation, folder, options.probe_every), **facts},
        folder,
        only=options.only,
    )


def main(argv: list[str] | None = None) -> None:
    """Read the flags."""
    parser = flags(__doc__, "outputs/coreset_study", SIZES, "acl-rcs-0.1")
    parser.add_argument("--probe_every", type=float, default=0.0, help="Epochs between probes; 0: only at the end.")
    options = parser.parse_args(argv)
    {"run": run, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
