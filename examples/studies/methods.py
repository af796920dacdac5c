r"""Which pre-training method gives most in equal time? Nine methods, one network, one budget of seconds; resumable.

    python examples/studies/methods.py run --dataset_name uoft-cs/cifar10 --output_dir outputs/methods_study
    python examples/studies/methods.py report --output_dir outputs/methods_study

`run` works through the cells (method, seed), seed by seed, and writes one JSON file per finished cell: start it again
after a kill and it goes on; start it in a second terminal and both share the list (one core each). A cell pre-trains,
exports the encoder, fits a linear classifier on clean images (SLF) and one on attacked images (ALF), and counts right
answers of both on test images and under PGD-20. `report` prints the table (mean and standard deviation over seeds)
with the published ranking beside ours, and draws standard against PGD-20 accuracy.

The budget is processor seconds of the pre-training (`--minutes`, 6 by default). A few steps are timed first and thrown
away; they say how many steps fit, so that schedules of rate and augmentation end where the budget ends. How many
seconds it then took is in the record.

Methods that need an encoder pay for it: `teacher` is a SimCLR of the same seed in half the budget. DeACL and FARE
start from it and have the other half; AdvCL learns its clusters as pseudo-labels (no network of ImageNet here) and
pays for the clustering, too. In `deacl_given` and `fare_given` the teacher is the SimCLR of the whole budget, and
nobody pays: what the methods do where an encoder is there already.

Equal for all: images, network, batch, precision, attack budget of 8/255, fine-tuning, and the schedule: warm-up over a
twentieth of the steps, then a cosine to 0. As published: attacks (FARE: the common one in place of 10 steps at 4/255),
temperatures, weights, optimisers, views, heads, input normalisation. Rates go with the batch from the published ones,
doubled, which short runs want; FARE's is ours. A-InfoNCE stands on ACL here, so that nobody needs to be paid for it;
its published row comes from a host that has seen ImageNet.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from cells import finished, flags, load_records, mean_and_spread, work_through
from transformers import TrainerCallback, set_seed

from hf_robust.attacks import PGD
from hf_robust.classifiers import build_classifier
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.environment import collect_environment
from hf_robust.evaluation.leaderboard import AUTOATTACK, leaderboard_rows
from hf_robust.finetuner import RobustFinetuner
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives import Objective
from hf_robust.objectives.a_infonce import AInfoNCE
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.deacl import DeACL
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.fare import FARE
from hf_robust.objectives.rocl import RoCL
from hf_robust.objectives.simclr import SimCLR
from hf_robust.objectives.slf import SLF
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.pseudo_labels import PseudoLabels, cluster_images
from hf_robust.teachers import load_teacher, student_of
from hf_robust.training_args import RobustTrainingArguments

TEST_ATTACK = PGD(steps=20)  # 8/255 in steps of 2/255, as published
TEACHER = "teacher"


@dataclass(frozen=True)
class Size:
    """Everything about the study that is not the comparison."""

    images: int
    labelled_images: int
    eval_images: int
    model_args: dict[str, Any]
    batch_size: int
    timed_steps: int
    linear_epochs: float
    linear_batch_size: int
    linear_learning_rate: float
    clusters: tuple[int, ...]
    bf16: bool


SIZES = {
    "cpu": Size(
        images=20000,
        labelled_images=5000,
        eval_images=2000,
        model_args={"channels": [16, 32, 64, 128], "stem_stride": 2},
        batch_size=128,
        timed_steps=16,
        linear_epochs=8,
        linear_batch_size=64,
        linear_learning_rate=0.03,
        clusters=(2, 10, 50, 100, 500),
        bf16=True,
    ),
    "smoke": Size(
        images=48,
        labelled_images=32,
        eval_images=16,
        model_args={"channels": [8, 8, 8, 8], "stem_stride": 2},
        batch_size=8,
        timed_steps=4,
        linear_epochs=1,
        linear_batch_size=8,
        linear_learning_rate=0.1,
        clusters=(2, 3),
        bf16=False,
    ),
}


@dataclass(frozen=True)
class Method:
    """One row of the table; the learning rate is for batches of 512, and goes with the batch."""

    objective: Callable[[Size], Objective]
    learning_rate: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    attack: PGD | None = None  # default: the published one of the method
    needs: str | None = None  # whose encoder it takes
    pays: bool = True  # for that encoder
    share: float = 1.0  # of the budget
    published: str | None = None  # its name on the leaderboard


LARS: Mapping[str, Any] = MappingProxyType({"optimizer": "lars", "momentum": 0.9, "weight_decay": 1e-6})
SGD: Mapping[str, Any] = MappingProxyType({"optimizer": "sgd", "momentum": 0.9, "nesterov": False})
TAUGHT: Mapping[str, Any] = MappingProxyType({**SGD, "weight_decay": 5e-4})
ADAMW: Mapping[str, Any] = MappingProxyType({"optimizer": "adamw", "weight_decay": 1e-4})
METHODS: dict[str, Method] = {
    "simclr": Method(lambda size: SimCLR(), 10.0, LARS),
    TEACHER: Method(lambda size: SimCLR(), 10.0, LARS, share=0.5),
    "acl": Method(lambda size: ACL(), 10.0, LARS, published="ACL"),
    "dynacl": Method(lambda size: DynACL(), 10.0, LARS, published="DynACL"),
    "acl_air": Method(lambda size: AIR(), 10.0, LARS),
    "rocl": Method(lambda size: RoCL(), 3.0, LARS, published="RoCL"),
    "advcl": Method(
        lambda size: AdvCL(clusters=list(size.clusters)),
        *(1.0, {**SGD, "weight_decay": 1e-4}),
        needs=TEACHER,
        published="AdvCL",
    ),
    "acl_iphn": Method(lambda size: AInfoNCE(ACL(), "iphn"), 10.0, LARS, published="A-InfoNCE"),
    "deacl": Method(lambda size: DeACL(), 2.0, TAUGHT, needs=TEACHER, published="DeACL"),
    "fare": Method(lambda size: FARE(), 4e-3, ADAMW, attack=PGD(), needs=TEACHER),
    "deacl_given": Method(lambda size: DeACL(), 2.0, TAUGHT, needs="simclr", pays=False),
    "fare_given": Method(lambda size: FARE(), 4e-3, ADAMW, attack=PGD(), needs="simclr", pays=False),
}


@dataclass(frozen=True)
class Cell:
    """One pre-training run with its two linear classifiers."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Also its file name."""
        return f"{self.method}-seed{self.seed}"

    @property
    def needs(self) -> str | None:
        """The cell whose encoder this one takes."""
        before = METHODS[self.method].needs
        return Cell(before, self.seed).name if before else None


def cells(seeds: int) -> Iterator[Cell]:
    """The whole list, seed by seed, so that a part of it compares like with like."""
    for seed in range(1, seeds + 1):
        yield from (Cell(method, seed) for method in METHODS)


@dataclass(frozen=True)
class Study:
    """What the cells of one call share."""

    size: Size
    folder: Path
    seconds: float
    train: ImageDataset
    labelled: ImageDataset
    test: ImageDataset

    def encoder(self, cell: str) -> Path:
        """Where a cell leaves its encoder."""
        return self.folder / "encoders" / cell

    def paid(self, cell: Cell) -> float:
        """Processor seconds that the encoder which a cell takes has cost it."""
        if cell.needs is None or not METHODS[cell.method].pays:
            return 0.0
        return next(float(r["cpu_seconds"]) for r in load_records(self.folder) if r["name"] == cell.needs)


class StepTimes(TrainerCallback):
    """Processor seconds at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self.times.append(time.process_time())


def build(cell: Cell, study: Study, labels: PseudoLabels | None, steps: int, work: Path) -> RobustPretrainer:
    """The trainer of a cell."""
    method, size = METHODS[cell.method], study.size
    objective = method.objective(size)
    set_seed(cell.seed)
    teacher = str(study.encoder(cell.needs)) if cell.needs and not objective.pseudo_classes else None
    if objective.starts_from_teacher and teacher is not None:
        model = student_of(teacher, objective, 32)
    else:
        values: dict[str, Any] = {"architecture": "resnet10_cifar", "model_args": size.model_args, "image_size": 32}
        values |= {"norm_branches": objective.norm_branches, "head": objective.head, **objective.network}
        model = RobustModelForPreTraining(RobustPretrainingConfig(**values))
    args = RobustTrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=size.batch_size,
        dataloader_drop_last=True,
        learning_rate=method.learning_rate * size.batch_size / 512,
        min_learning_rate=0.0,
        warmup_epochs=steps / 20 / (len(study.train) // size.batch_size),
        bf16=size.bf16,
        channels_last=True,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
        **method.settings,
    )
    attack = method.attack or objective.training_attack
    return RobustPretrainer(
        model, args, objective, attack, train_dataset=study.train, teacher=teacher, pseudo_labels=labels
    )


def pseudo_labels(cell: Cell, study: Study) -> PseudoLabels | None:
    """Clusters of the features of the encoder that a cell takes, for methods that learn them."""
    clusters = METHODS[cell.method].objective(study.size).pseudo_classes
    if not clusters or cell.needs is None:
        return None
    teacher, options = load_teacher(study.encoder(cell.needs)), {"size": 32, "seed": cell.seed, "progress": False}
    return cluster_images(teacher, study.train, clusters, source=cell.needs, **options)


def steps_within(cell: Cell, study: Study, labels: PseudoLabels | None, seconds: float, work: Path) -> int:
    """How many steps fit, by the seconds of a few."""
    clock = StepTimes()
    trainer = build(cell, study, labels, study.size.timed_steps, work)
    trainer.add_callback(clock)
    trainer.train()
    skipped = len(clock.times) // 4  # the first ones make copies and choose kernels
    per_step = (clock.times[-1] - clock.times[skipped]) / (len(clock.times) - 1 - skipped)
    return max(4, math.floor(seconds / per_step))


def pretrain(cell: Cell, study: Study, work: Path) -> dict[str, Any]:
    """Pre-train within the budget, export the encoder and say what it took."""
    paid, started = study.paid(cell), time.process_time()
    labels = pseudo_labels(cell, study)
    paid += time.process_time() - started if labels else 0.0
    seconds = METHODS[cell.method].share * study.seconds - paid
    steps = steps_within(cell, study, labels, seconds, work)
    trainer = build(cell, study, labels, steps, work)
    wall, cpu = time.monotonic(), time.process_time()
    trainer.train()
    taken = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu, "paid_seconds": paid}
    shutil.rmtree(study.encoder(cell.name), ignore_errors=True)
    trainer.save_encoder(study.encoder(cell.name))
    images = steps * study.size.batch_size
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **taken,
        "title": trainer.objective.title,
        "objective": repr(trainer.objective),
        "training_attack": repr(trainer.attack),
        "optimizer": trainer.args.optimizer,
        "learning_rate": trainer.args.learning_rate,
        "steps": steps,
        "epochs": images / len(study.train),
        "loss_last": losses[-1] if losses else None,
    }


def linear(cell: Cell, study: Study, objective: Objective, work: Path) -> dict[str, Any]:
    """Train a linear classifier on the encoder of a cell and count its right answers."""
    size, recipe = study.size, dict(objective.recipe)
    share = size.linear_epochs / recipe["num_train_epochs"]
    recipe["lr_milestones"] = [round(share * epoch, 6) for epoch in recipe.get("lr_milestones") or ()]
    recipe |= {
        "num_train_epochs": size.linear_epochs,
        "per_device_train_batch_size": size.linear_batch_size,
        "learning_rate": size.linear_learning_rate,
    }
    args = RobustFinetuningArguments(
        **recipe,
        output_dir=str(work),
        keep="last",
        validation_fraction=0.0,
        bf16=size.bf16,
        channels_last=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
    )
    set_seed(cell.seed)
    classes = study.labelled.num_classes or 0
    model = build_classifier(study.encoder(cell.name), classes, objective.norm_branches)
    trainer = RobustFinetuner(model, args, objective, None, study.labelled)
    trainer.train()
    accuracy = trainer.measure(study.test, TEST_ATTACK)
    mode = objective.title.lower()
    return {f"{mode}_{key}": value for key, value in accuracy.to_dict().items()} | {"n_eval": accuracy.n}


def run_cell(cell: Cell, study: Study) -> dict[str, Any]:
    """Pre-train, fine-tune twice, measure."""
    work = study.folder / "runs" / cell.name
    shutil.rmtree(work, ignore_errors=True)
    found = {**dataclasses.asdict(cell), "name": cell.name, "budget_seconds": study.seconds}
    found |= pretrain(cell, study, work)
    started = time.process_time()
    for objective in (SLF(), ALF()):
        found |= linear(cell, study, objective, work)
    return found | {"linear_cpu_seconds": time.process_time() - started}


def run(options: argparse.Namespace) -> None:
    """Work through the cells that no file and no other process has."""
    torch.set_num_threads(options.threads)
    size, folder = SIZES[options.size], Path(options.output_dir)
    facts = {"size": dataclasses.asdict(size), "environment": collect_environment()}
    columns = {"image_size": 32, "label_column": options.label_column, "image_column": options.image_column}
    load = functools.partial(load_image_dataset, options.dataset_name, **columns)
    train = load("train", max_examples=size.images)
    labelled = load("train", max_examples=size.labelled_images)
    test = load("test", max_examples=size.eval_images)
    train.name = labelled.name = test.name = Path(options.dataset_name).name  # no path of this machine in a result
    study = Study(size, folder, 60 * options.minutes, train, labelled, test)
    for record in finished(folder):
        if (record["budget_seconds"], record["size"]) != (study.seconds, json.loads(json.dumps(facts["size"]))):
            sys.exit(
                f"error: {folder} has cells of another --minutes or --size ({record['name']}: "
                f"{record['budget_seconds'] / 60:g} minutes): give the same, or another --output_dir"
            )
    work_through(
        cells(options.seeds),
        lambda cell: {**run_cell(cell, study), **facts},
        folder,
        only=options.only,
        needs=lambda cell: cell.needs,
    )


# ---------------------------------------------------------------------- report
def load_groups(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Finished cells by method, in the order of the list."""
    records = list(load_records(folder))
    groups = {method: [r for r in records if r["method"] == method] for method in METHODS}
    return {method: group for method, group in groups.items() if group}


def robust_key(group: list[dict[str, Any]], mode: str) -> str:
    """Name of the accuracy under PGD-20."""
    return next(key for key in group[0] if key.startswith(f"{mode}_pgd20_"))


def mean(group: list[dict[str, Any]], key: str) -> float:
    """Mean over seeds."""
    return sum(record[key] for record in group) / len(group)


def ranks(values: Mapping[str, float]) -> dict[str, int]:
    """1 for the largest."""
    order = sorted(values, key=lambda name: -values[name])
    return {name: 1 + order.index(name) for name in order}


def published(mode: str) -> dict[str, float]:
    """AutoAttack accuracies of the leaderboard by our names, for CIFAR-10."""
    rows = leaderboard_rows(source="cifar10", target="cifar10", mode=mode)
    known = {row.method: row.metrics[AUTOATTACK] for row in rows if row.fine_tuning == "vanilla"}
    return {name: known[m.published] for name, m in METHODS.items() if m.published in known}


def table(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the table, in Markdown."""
    theirs = {name: value for name, value in published("slf").items() if name in groups}
    ours = {name: mean(groups[name], robust_key(groups[name], "slf")) for name in theirs}
    our_rank, their_rank = ranks(ours), ranks(theirs)
    lines = [
        "| method | seeds | SLF standard, % | SLF PGD-20, % | ALF standard, % | ALF PGD-20, % | epochs | CPU s "
        "| of which teacher | rank here | published AA, % (rank) |",
        "| --- " * 11 + "|",
    ]
    for name, group in groups.items():
        accuracies = [f"{mode}_standard_accuracy" for mode in ("slf", "alf")]
        keys = [accuracies[0], robust_key(group, "slf"), accuracies[1], robust_key(group, "alf")]
        total = [{"cpu": record["cpu_seconds"] + record["paid_seconds"]} for record in group]
        known = f"{100 * theirs[name]:.2f} ({their_rank[name]})" if name in theirs else ""
        lines.append(
            f"| `{name}` {group[0]['title']} | {len(group)} | "
            + " | ".join(mean_and_spread(group, key, 100) for key in keys)
            + f" | {mean_and_spread(group, 'epochs')} | {mean_and_spread(total, 'cpu', 1, 0)} "
            f"| {mean_and_spread(group, 'paid_seconds', 1, 0)} | {our_rank.get(name, '')} | {known} |"
        )
    return lines


def report(options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    folder = Path(options.output_dir)
    groups = load_groups(folder)
    lines = table(groups)
    (folder / "table.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))
    path = folder / "methods.png"
    plot(groups, path)
    print(f"Table: {folder / 'table.md'}\nPicture: {path}")


def plot(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Standard against PGD-20 accuracy of both linear classifiers; one mark per seed, the mean larger."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, mode in zip(axes, ("slf", "alf"), strict=True):
        for index, (name, group) in enumerate(groups.items()):
            marker = "os^D"[index // 10 % 4]
            key, color = robust_key(group, mode), f"C{index % 10}"
            x, y = ([100 * r[k] for r in group] for k in (f"{mode}_standard_accuracy", key))
            axis.plot(x, y, marker, color=color, markersize=4, alpha=0.5)
            axis.plot(sum(x) / len(x), sum(y) / len(y), marker, color=color, markersize=9, label=name)
        axis.set_xlabel("standard accuracy, %")
        axis.set_ylabel("PGD-20 accuracy, %")
        axis.set_title(f"{mode.upper()}: linear classifier on {'attacked' if mode == 'alf' else 'clean'} images")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    first = next(iter(groups.values()))[0]
    seeds = max(len(group) for group in groups.values())
    figure.suptitle(f"{first['budget_seconds'] / 60:g} minutes of one core for each method, {seeds} seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read the flags."""
    parser = flags(__doc__, "outputs/methods_study", SIZES, "deacl-seed1", seeds=2)
    parser.add_argument("--minutes", type=float, default=6.0, help="Processor time of each pre-training.")
    options = parser.parse_args(argv)
    {"run": run, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
