"""Does choosing images pay? Full data, random subsets and RCS, for ACL and SAT, over seeds; resumable.

    python examples/studies/coresets.py run --dataset_name uoft-cs/cifar10 --output_dir outputs/coreset_study
    python examples/studies/coresets.py report --output_dir outputs/coreset_study

`run` works through a list of cells (method, fraction, seed), seed by seed, and writes one JSON file per finished cell:
start it again after a kill and it goes on; start it in a second terminal and both share the list (one core each).
`report` prints the table (mean and standard deviation over seeds) and draws time against accuracy.

--size cpu (default): 8,192 images, a thin ResNet-10, 12 epochs: about 2.5 hours of processor time, half on two cores.
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
from cells import flags, load_records, mean_and_spread, work_through
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
# name in the picture, colour, place of the fraction beside its point
PLOTTED = {
    "full": ("full data", "black", (6, 6)),
    "full_short": ("full data, fewer epochs", "tab:green", (6, 6)),
    "random_fixed": ("Random, fixed", "tab:gray", (-12, 10)),
    "random_refresh": ("Random, refreshed", "tab:blue", (-26, -12)),
    "rcs": ("RCS", "tab:red", (6, -12)),
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
    """Counts processor time of selections apart."""

    selection_cpu_seconds = 0.0

    def _select_coreset(self, round: int) -> None:
        started = time.process_time()
        super()._select_coreset(round)
        self.selection_cpu_seconds += time.process_time() - started


def build(cell: Cell, size: Size, train: ImageDataset, evaluation: ImageDataset, folder: Path) -> Timed:
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


def run_cell(cell: Cell, size: Size, train: ImageDataset, evaluation: ImageDataset, folder: Path) -> dict[str, Any]:
    """Train, probe and say what it took."""
    work = folder / "runs" / cell.name
    shutil.rmtree(work, ignore_errors=True)
    trainer = build(cell, size, train, evaluation, work)
    started, cpu = time.monotonic(), time.process_time()
    trainer.train()
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    probe = trainer.probe(n_eval=min(size.eval_images, len(evaluation)), progress=False)
    overlaps = [e["coreset_overlap"] for e in trainer.state.log_history if "coreset_overlap" in e]
    return {
        **dataclasses.asdict(cell),
        **probe.to_dict(),
        "n_eval": probe.n_eval,
        "coreset": repr(trainer.phases.method),
        "images_per_round": trainer.phases.rounds.length,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "selection_seconds": trainer.selection_seconds,
        "cpu_seconds": cpu,
        "selection_cpu_seconds": trainer.selection_cpu_seconds,
        "overlap": statistics.mean(overlaps) if overlaps else None,
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
        lambda cell: {**run_cell(cell, size, train, evaluation, folder), **facts},
        folder,
        only=options.only,
    )


def load_cells(folder: Path) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """Finished cells, grouped over seeds."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for record in load_records(folder):
        groups.setdefault((record["objective"], record["method"], record["fraction"]), []).append(record)
    return groups


def split(group: list[dict[str, Any]], clock: str) -> tuple[float, float]:
    """Mean seconds of training and of selection, by the wall or by the processor (`"cpu_"`)."""
    selection = statistics.mean(r[f"selection_{clock}seconds"] for r in group)
    return statistics.mean(r[f"{clock}seconds"] for r in group) - selection, selection


def report(options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    folder = Path(options.output_dir)
    groups = load_cells(folder)
    robust = next(k for k in next(iter(groups.values()))[0] if k.startswith("pgd20_"))
    print(
        "| trains | method | share | images per epoch | seeds | standard, % | PGD-20, % "
        "| wall s: training + selection | CPU s: training + selection | speed-up |"
    )
    print("| --- " * 10 + "|")
    for (objective, method, fraction), group in sorted(groups.items()):
        wall, cpu = split(group, ""), split(group, "cpu_")
        full = groups.get((objective, "full", 1.0))
        speed = f"{sum(split(full, 'cpu_')) / sum(cpu):.2f} x" if full else ""
        print(
            f"| {objective.upper()} | {method} | {fraction:g} | {group[0]['images_per_round']} | {len(group)} "
            f"| {mean_and_spread(group, 'standard_accuracy', 100)} | {mean_and_spread(group, robust, 100)} "
            f"| {wall[0]:.0f} + {wall[1]:.0f} | {cpu[0]:.0f} + {cpu[1]:.0f} | {speed} |"
        )
    for objective in sorted({key[0] for key in groups}):
        path = folder / f"time_against_accuracy_{objective}.png"
        plot({k[1:]: g for k, g in groups.items() if k[0] == objective}, robust, objective.upper(), path)
        print(f"Picture: {path}")


def plot(groups: dict[tuple[str, float], list[dict[str, Any]]], robust: str, title: str, path: Path) -> None:
    """Time of the training against accuracy, one line per method, one point per fraction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {robust: "PGD-20 accuracy of the linear probe, %", "standard_accuracy": "standard accuracy, %"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for method, (name, color, offset) in PLOTTED.items():
            points = sorted((fraction, group) for (m, fraction), group in groups.items() if m == method)
            if not points:
                continue
            x = [statistics.mean(r["cpu_seconds"] for r in g) for _, g in points]
            y = [100 * statistics.mean(r[key] for r in g) for _, g in points]
            spread = [100 * statistics.stdev(r[key] for r in g) if len(g) > 1 else 0.0 for _, g in points]
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=name, color=color)
            for (fraction, _), a, b in zip(points, x, y, strict=True):
                axis.annotate(f"{fraction:g}", (a, b), textcoords="offset points", xytext=offset, fontsize=8)
        axis.set_xlabel("training and selection, processor seconds")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    seeds = max(len(g) for g in groups.values())
    figure.suptitle(f"{title}: time against accuracy; mean and standard deviation over {seeds} seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read the flags."""
    options = flags(__doc__, "outputs/coreset_study", SIZES, "acl-rcs-0.1").parse_args(argv)
    {"run": run, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
