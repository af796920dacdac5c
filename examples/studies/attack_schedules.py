"""What do cheaper and stronger training attacks give? Step schedules, replay, early stop, over seeds; resumable.

    python examples/studies/attack_schedules.py run --dataset_name uoft-cs/cifar10 --output_dir outputs/attack_study
    python examples/studies/attack_schedules.py report --output_dir outputs/attack_study

`run` trains ACL once per cell (attack, seed), seed by seed, same images and epochs for all, and writes one JSON file
per finished cell: start it again after a kill and it goes on; start it in a second terminal and both share the list
(one core each). `report` prints the table (mean and standard deviation over seeds) and draws price against accuracy.

Beside the accuracies of the linear probe, a record holds
- how far the attack raises the loss: in every 16th batch of the last quarter, loss of the attacked images minus loss
  of the images, in percent of what the published five steps reach on the same batch and network;
- the price: passes of the network over a view, counted, and FLOP per image (2 views); wall and processor seconds of
  the training, without those measurements. On a shared machine, compare processor seconds.

--size cpu (default): 8,192 images, a thin ResNet-10, 6 epochs; times: docs/methods/attack_schedules.md.
--size published: the whole CIFAR-10 training set, ResNet-18, 1000 epochs, for GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import flags, load_records, mean_and_spread, work_through
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from hf_robust.attack_schedules import with_schedule
from hf_robust.attacks import PGD, LossFn
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.environment import collect_environment
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives.acl import ACL
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
    learning_rate: float
    warmup_epochs: float
    bf16: bool


THIN = {"channels": [16, 32, 64, 128], "stem_stride": 2}
SIZES = {
    "cpu": Size(8192, 3000, "resnet10_cifar", THIN, 128, 6, 2.5, 0.5, True),
    "published": Size(None, 10000, "resnet18_cifar", {}, 512, 1000, 5.0, 10, True),
    "smoke": Size(64, 32, "resnet10_cifar", {"channels": [8, 8, 8, 8], "stem_stride": 2}, 16, 2, 0.5, 0.5, False),
}
# name: schedule and other options of the attack; how the report calls it. Replay is to be compared with flat2, early
# stopping with published.
ATTACKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "published": ("published", {}, "published: 5 x 2"),
    "decay3": ("decay3", {}, "decay3: 8, 4, 2"),
    "decay5": ("decay5", {}, "decay5: 8, 4, 4, 2, 2"),
    "decay2": ("decay2", {}, "decay2: 8, 4"),
    "flat2": ("flat2", {}, "flat2: 2 x 5"),
    "replay2": ("flat2", {"replay": True}, "flat2, replayed over epochs"),
    "early_stop": ("published", {"min_gain": 0.03}, "published, stops below 3 % gain"),
}
_MEASURED = 16  # every how many batches of the last quarter


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    attack: str
    seed: int

    @property
    def name(self) -> str:
        """Also its file name."""
        return f"{self.attack}-seed{self.seed}"

    def pgd(self) -> PGD:
        """The training attack."""
        schedule, options, _ = ATTACKS[self.attack]
        return dataclasses.replace(with_schedule(PGD(), schedule), **options)


def cells(seeds: int) -> Iterator[Cell]:
    """The whole list, seed by seed, so that a part of it compares like with like."""
    for seed in range(1, seeds + 1):
        yield from (Cell(attack, seed) for attack in ATTACKS)


class Watch:
    """Counts what an attack does, and measures now and then what it reaches."""

    def __init__(self, attack: PGD) -> None:
        self.attack, self.replay = attack, attack.replay
        self.late = False
        self.seen_late = 0
        self.attacks = self.forwards = self.backwards = 0
        self.gains: list[tuple[float, float]] = []  # of this attack, of the published one
        self.wall = self.cpu = 0.0  # of the measurements

    def __call__(
        self, loss_fn: LossFn, x: torch.Tensor, start: Any = None, *, generator: torch.Generator
    ) -> torch.Tensor:
        """Attack as the training asked for."""
        handle = _Counter(loss_fn)
        x_adv = self.attack(handle, x, start, generator=generator)
        self.attacks += 1
        self.forwards += handle.forwards
        self.backwards += handle.backwards
        if self.late:
            if self.seen_late % _MEASURED == 0:
                self._measure(loss_fn, x, x_adv, generator)
            self.seen_late += 1
        return x_adv

    def _measure(self, loss_fn: LossFn, x: torch.Tensor, x_adv: torch.Tensor, generator: torch.Generator) -> None:
        wall, cpu, state = time.monotonic(), time.process_time(), generator.get_state()
        published = PGD()(loss_fn, x, generator=generator)
        generator.set_state(state)  # the training goes on as if nobody had looked
        with torch.no_grad():
            clean, own, reference = (float(loss_fn(images)) for images in (x, x_adv, published))
        self.gains.append((own - clean, reference - clean))
        self.wall += time.monotonic() - wall
        self.cpu += time.process_time() - cpu


class _Counter:
    """A loss function that counts passes."""

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn
        self.forwards = self.backwards = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        images.register_hook(self._count)
        return self._loss_fn(images)

    def _count(self, gradient: torch.Tensor) -> None:
        self.backwards += 1


class Watched(RobustPretrainer):
    """A pre-training whose attack is watched."""

    watch: Watch
    measured_from = 0.75  # progress

    def step_context(self, generator: torch.Generator, index: torch.Tensor | None = None) -> Any:
        """Hand over the watched attack."""
        self.watch.late = self.progress >= self.measured_from
        attack = self.training_attack.bind(self.watch, [self.model], generator, index)  # type: ignore[arg-type]
        return dataclasses.replace(super().step_context(generator, index), attack=attack)


def build(cell: Cell, size: Size, train: ImageDataset, evaluation: ImageDataset, folder: Path) -> Watched:
    """The trainer of a cell."""
    objective = ACL()
    set_seed(cell.seed)
    config = RobustPretrainingConfig(
        architecture=size.architecture,
        model_args=size.model_args,
        image_size=32,
        norm_branches=objective.norm_branches,
    )
    args = RobustTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=size.epochs,
        per_device_train_batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        warmup_epochs=size.warmup_epochs,
        bf16=size.bf16,
        channels_last=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
    )
    attack = cell.pgd()
    trainer = Watched(
        RobustModelForPreTraining(config), args, objective, attack, train_dataset=train, eval_dataset=evaluation
    )
    trainer.watch = Watch(attack)
    return trainer


def forward_flop(trainer: Watched) -> int:
    """FLOP of one forward pass over one view."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trainer.model.eval().embed(torch.zeros(1, 3, 32, 32), "adv")
    return counter.get_total_flops()


def run_cell(cell: Cell, size: Size, train: ImageDataset, evaluation: ImageDataset, folder: Path) -> dict[str, Any]:
    """Train, probe and say what it took."""
    work = folder / "runs" / cell.name
    shutil.rmtree(work, ignore_errors=True)
    trainer = build(cell, size, train, evaluation, work)
    watch = trainer.watch
    flop = forward_flop(trainer)
    started, cpu = time.monotonic(), time.process_time()
    trainer.train()
    seconds, cpu = time.monotonic() - started - watch.wall, time.process_time() - cpu - watch.cpu
    probe = trainer.probe(n_eval=min(size.eval_images, len(evaluation)), progress=False)
    forwards, backwards = watch.forwards / watch.attacks, watch.backwards / watch.attacks
    own, published = (statistics.mean(values) for values in zip(*watch.gains, strict=True))
    return {
        **dataclasses.asdict(cell),
        **probe.to_dict(),
        "n_eval": probe.n_eval,
        "pgd": repr(cell.pgd()),
        "steps": trainer.state.global_step,
        "attack_steps": backwards,
        "passes": forwards + backwards + 6,  # clean and adversarial: forward, and twice as much backward
        "gigaflop_per_image": 2 * flop * (forwards + backwards + 6) / 1e9,
        "gain": own,
        "published_gain": published,
        "gain_percent": 100 * own / published,
        "seconds": seconds,
        "cpu_seconds": cpu,
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


def load_groups(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Finished cells by attack, in the order of the list."""
    records = list(load_records(folder))
    groups = {attack: [r for r in records if r["attack"] == attack] for attack in ATTACKS}
    return {attack: group for attack, group in groups.items() if group}


def paired(group: list[dict[str, Any]], reference: list[dict[str, Any]], key: str) -> str:
    """Mean and spread of the difference to the published attack of the same seed, in points."""
    by_seed = {r["seed"]: r[key] for r in reference}
    differences = [{"difference": r[key] - by_seed[r["seed"]]} for r in group if r["seed"] in by_seed]
    if not differences or group is reference:
        return ""
    text = mean_and_spread(differences, "difference", 100)
    return text if text.startswith("-") else f"+{text}"


def report(options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    folder = Path(options.output_dir)
    groups = load_groups(folder)
    robust = next(k for k in next(iter(groups.values()))[0] if k.startswith("pgd20_"))
    reference = groups.get("published", [])
    lines = [
        "| attack, steps in 1/255 | seeds | passes | GFLOP per image | loss gain, % of published | standard, % "
        "| PGD-20, % | PGD-20 minus published | wall s | CPU s |",
        "| --- " * 10 + "|",
    ]
    for attack, group in groups.items():
        lines.append(
            f"| {ATTACKS[attack][2]} | {len(group)} | {mean_and_spread(group, 'passes')} "
            f"| {mean_and_spread(group, 'gigaflop_per_image', 1, 2)} | {mean_and_spread(group, 'gain_percent')} "
            f"| {mean_and_spread(group, 'standard_accuracy', 100)} | {mean_and_spread(group, robust, 100)} "
            f"| {paired(group, reference, robust)} | {mean_and_spread(group, 'seconds', 1, 0)} "
            f"| {mean_and_spread(group, 'cpu_seconds', 1, 0)} |"
        )
    (folder / "table.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))
    path = folder / "attack_price_against_accuracy.png"
    plot(groups, robust, path)
    print(f"Table: {folder / 'table.md'}\nPicture: {path}")


def plot(groups: dict[str, list[dict[str, Any]]], robust: str, path: Path) -> None:
    """Price of a view against accuracy, and how far the attack raises the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panels: list[tuple[str, str, Callable[[float], float]]] = [
        (robust, "PGD-20 accuracy of the linear probe, %", lambda v: 100 * v),
        ("standard_accuracy", "standard accuracy, %", lambda v: 100 * v),
        ("gain_percent", "loss gain, % of the published attack's", lambda v: v),
    ]
    for axis, (key, label, scaled) in zip(axes, panels, strict=True):
        for color, (attack, group) in enumerate(groups.items()):
            x = statistics.mean(r["passes"] for r in group)
            values = [scaled(r[key]) for r in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.errorbar(x, statistics.mean(values), spread, marker="o", capsize=3, label=attack, color=f"C{color}")
        axis.set_xlabel("passes of the network per view and step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    seeds = max(len(g) for g in groups.values())
    figure.suptitle(f"ACL with other training attacks: mean and standard deviation over {seeds} seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read the flags."""
    options = flags(__doc__, "outputs/attack_study", SIZES, "decay3-seed1").parse_args(argv)
    {"run": run, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
