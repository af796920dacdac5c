r"""What do the ways of fine-tuning a robust encoder give? SLF, ALF, AFF, AutoLoRa and ++, over seeds; resumable.

    python examples/studies/finetuning.py run --encoder acl=DIR_OR_REPO --encoder air=DIR \
        --dataset_name uoft-cs/cifar10 --output_dir outputs/finetuning_study
    python examples/studies/finetuning.py report --output_dir outputs/finetuning_study

An encoder is an exported folder, a Hub repository or a training checkpoint. `run` works through a list of cells
(encoder, data set, mode, seed) and writes one JSON file per finished cell: start it again after a kill and it goes on;
start it in a second terminal and both share the list (one core each). Seed 1 of everything comes first. `report`
prints the table (mean and standard deviation over seeds) and draws standard against PGD-20 accuracy.

Data sets: the one given, and scikit-learn's digits, which no encoder has seen. Modes: slf, alf, aff (one norm branch,
last epoch, three learning rates: vanilla) and autolora (automatic rate, best epoch on held-out images). The encoder
`NAME++` is NAME after post-processing (mode lp_aff: pseudo-labels, one norm branch), once per seed, fine-tuned by slf
and aff. Of encoders after the first, modes alf, digits and ++ come last.

What is held equal: training images, number of epochs (autolora and aff), test images, network, precision. What is
not: autolora measures accuracy on the held-out images, vanilla modes never see these.

--size published: all images, epochs, batches and rates as published (autolora 50 epochs, the others 25), for GPUs.
--size cpu (default): a thin ResNet-10; times: docs/results.md. Ours: 2,560 training images and 256 held out;
    8 epochs; milestones at the published shares of the run; linear modes at batch 64 and rate 0.03, because at the
    published batch of 512 and rate of 0.01 a head that starts at zero would stop far from where it goes in 40 steps
    (on other training images, clean accuracy was the same from 0.01 to 0.1); ++ at batch 128; bfloat16 (measurements
    in float32); 1,000 test images. Published: attacks, objectives, first rate and batch of aff and autolora, momentum,
    weight decay, heads that start at zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import work_through
from finetuning_report import print_report
from transformers import set_seed

from hf_robust.adapters import with_lora_path
from hf_robust.attacks import PGD
from hf_robust.classifiers import build_classifier
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.environment import collect_environment
from hf_robust.finetuner import RobustFinetuner
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.held_out import split_validation
from hf_robust.objectives import Objective, load_objective
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.postprocessing import PostProcessing, post_process
from hf_robust.run_facts import dataset_title

DIGITS, POST = "digits", "lp_aff"
MODES = ("slf", "alf", "aff", "autolora")
SAME_RATE = "autolora_milestones"  # to tell the loss of AutoLoRa from its learning rate: AFF's rate, last epoch
TEST_ATTACK = PGD(steps=20)  # 8/255 in steps of 2/255, as published


@dataclass(frozen=True)
class Size:
    """Everything about the study that is not the comparison; `None`: as published."""

    images: int | None
    digits_images: int | None
    eval_images: int
    validation_fraction: float
    epochs: float | None
    batch_size: int | None
    linear_batch_size: int | None
    linear_learning_rate: float | None
    post_batch_size: int
    post_probe_epochs: float
    bf16: bool


SIZES = {
    "cpu": Size(
        images=2816,
        digits_images=720,
        eval_images=1000,
        validation_fraction=1 / 11,
        epochs=8,
        batch_size=None,
        linear_batch_size=64,
        linear_learning_rate=0.03,
        post_batch_size=128,
        post_probe_epochs=8,
        bf16=True,
    ),
    "published": Size(
        images=None,
        digits_images=None,
        eval_images=10000,
        validation_fraction=0.05,
        epochs=None,
        batch_size=None,
        linear_batch_size=None,
        linear_learning_rate=None,
        post_batch_size=512,
        post_probe_epochs=10,
        bf16=True,
    ),
    "smoke": Size(
        images=64,
        digits_images=48,
        eval_images=16,
        validation_fraction=0.25,
        epochs=2,
        batch_size=16,
        linear_batch_size=16,
        linear_learning_rate=0.1,
        post_batch_size=16,
        post_probe_epochs=1,
        bf16=False,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run of the study; `encoder` is its name, with `++` after post-processing."""

    encoder: str
    dataset: str
    mode: str
    seed: int

    @property
    def name(self) -> str:
        """Also its file name."""
        return f"{self.encoder}-{self.dataset}-{self.mode}-seed{self.seed}"

    @property
    def needs(self) -> str | None:
        """The cell that makes the encoder of this one."""
        if not self.encoder.endswith("++"):
            return None
        return Cell(self.encoder.removesuffix("++"), self.dataset, POST, self.seed).name


def cells(encoders: list[str], dataset: str, seeds: int) -> Iterator[Cell]:
    """The whole list, the main comparison first, seed by seed."""
    first, *others = encoders
    for seed in range(1, seeds + 1):
        yield from _transfer(first, dataset, MODES, seed)
        yield from (Cell(name, dataset, mode, seed) for name in others for mode in ("slf", "aff", "autolora"))
        yield from _improved(first, dataset, seed)
        if dataset != DIGITS:
            yield from _transfer(first, DIGITS, MODES, seed)
    for seed in range(1, seeds + 1):
        for name in dict.fromkeys((dataset, DIGITS)):
            yield Cell(first, name, SAME_RATE, seed)
    for seed in range(1, seeds + 1):
        for name in others:
            yield from _improved(name, dataset, seed)
            yield Cell(name, dataset, "alf", seed)
            if dataset != DIGITS:
                yield from _transfer(name, DIGITS, MODES, seed)


def _transfer(encoder: str, dataset: str, modes: tuple[str, ...], seed: int) -> Iterator[Cell]:
    yield from (Cell(encoder, dataset, mode, seed) for mode in modes)


def _improved(encoder: str, dataset: str, seed: int) -> Iterator[Cell]:
    yield Cell(encoder, dataset, POST, seed)
    yield from (Cell(f"{encoder}++", dataset, mode, seed) for mode in ("slf", "aff"))


@dataclass(frozen=True)
class Study:
    """What the cells of one call share."""

    size: Size
    folder: Path
    encoders: dict[str, str]
    train: dict[str, ImageDataset]
    test: dict[str, ImageDataset]

    def encoder_of(self, cell: Cell) -> str:
        """Where the encoder of a cell lies."""
        if cell.needs is None:
            return self.encoders[cell.encoder]
        return str(self.folder / "encoders" / f"{cell.encoder}-{cell.dataset}-seed{cell.seed}")


def method(mode: str) -> Objective:
    """The objective of a mode; one norm branch, as exported encoders have."""
    if mode in ("aff", POST):
        return AFF(clean_branch="adv", reference_branch="adv")
    objective: Objective = load_objective("autolora" if mode == SAME_RATE else mode)()
    return objective


def arguments(cell: Cell, size: Size, folder: Path) -> RobustFinetuningArguments:
    """The published recipe of a mode, squeezed into the size; what happens at an epoch keeps its share of the run."""
    objective = method(cell.mode)
    recipe: dict[str, Any] = dict(objective.recipe)
    if cell.mode == SAME_RATE:
        recipe = dict(AFF.recipe)
    if cell.mode == POST:  # as released for AIR
        recipe |= {"weight_decay": 1e-4, "lr_milestones": [10, 20], "dataloader_drop_last": True}
        recipe["per_device_train_batch_size"] = size.post_batch_size
    elif objective.trains == "classifier":
        recipe["per_device_train_batch_size"] = size.linear_batch_size or recipe["per_device_train_batch_size"]
        recipe["learning_rate"] = size.linear_learning_rate or recipe["learning_rate"]
    else:
        recipe["per_device_train_batch_size"] = size.batch_size or recipe["per_device_train_batch_size"]
    epochs = size.epochs or recipe["num_train_epochs"]
    share = epochs / recipe["num_train_epochs"]
    if recipe.get("lr_milestones"):
        recipe["lr_milestones"] = [round(share * epoch, 6) for epoch in recipe["lr_milestones"]]
    if recipe.get("auto_lr_epochs"):  # the rule looks back after the epoch that follows
        looks = sorted({round(share * (epoch + 1)) - 1 for epoch in recipe["auto_lr_epochs"]})
        recipe["auto_lr_epochs"] = [epoch for epoch in looks if 1 <= epoch <= epochs - 2]
    automatic = recipe.get("lr_rule") == "auto"
    return RobustFinetuningArguments(
        **{
            **recipe,
            "output_dir": str(folder),
            "num_train_epochs": epochs,
            "keep": "best" if automatic else "last",
            "validation_fraction": size.validation_fraction if automatic or objective.accuracy_request else 0.0,
            "bf16": size.bf16,
            "channels_last": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1_000_000,
            "seed": cell.seed,
        }
    )


def fine_tune(cell: Cell, study: Study, work: Path) -> RobustFinetuner:
    """Train a classifier on the encoder of a cell."""
    train, held_out = split_validation(study.train[cell.dataset], study.size.validation_fraction, cell.seed)
    objective, args = method(cell.mode), arguments(cell, study.size, work)
    set_seed(cell.seed)
    model = build_classifier(study.encoder_of(cell), train.num_classes or 0, objective.norm_branches)
    if isinstance(objective, AutoLoRa):
        model = with_lora_path(model, objective.rank, objective.init, objective.norm_update)
    judged = held_out if args.validation_fraction else None
    trainer = RobustFinetuner(model, args, objective, None, train, judged)
    trainer.train()
    return trainer


def improve(cell: Cell, study: Study, work: Path) -> RobustFinetuner:
    """Post-process an encoder on pseudo-labels; held-out images take part, their labels do not."""
    args = arguments(cell, study.size, work)
    settings = PostProcessing(
        probe_stage_epochs=study.size.post_probe_epochs,
        probe_stage_learning_rate=study.size.linear_learning_rate or 0.01,
    )
    set_seed(cell.seed)
    trainer = post_process(study.encoder_of(cell), study.train[cell.dataset], settings, args)
    trainer.save_encoder(study.encoder_of(dataclasses.replace(cell, encoder=f"{cell.encoder}++")))
    return trainer


def run_cell(cell: Cell, study: Study) -> dict[str, Any]:
    """Train, measure on test images and say what it took."""
    work = study.folder / "runs" / cell.name
    shutil.rmtree(work, ignore_errors=True)
    weights = fingerprint(study.encoder_of(cell))
    started, cpu = time.monotonic(), time.process_time()
    trainer = (improve if cell.mode == POST else fine_tune)(cell, study, work)
    taken = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    found: dict[str, Any] = {}
    if cell.mode != POST:
        accuracy = trainer.measure(study.test[cell.dataset], TEST_ATTACK)
        found = {**accuracy.to_dict(), "n_eval": accuracy.n}
    return {
        **dataclasses.asdict(cell),
        **found,
        **taken,
        "encoder_weights": weights,
        "n_train": len(trainer.train_dataset),
        "n_held_out": len(trainer.validation_dataset or ()),
        "epochs": trainer.args.num_train_epochs,
        "steps": trainer.state.global_step,
        "kept_epoch": trainer.kept_epoch or trainer.args.num_train_epochs,
        **settings_of(trainer),
        **traces(trainer),
        "log": trainer.state.log_history,
    }


def fingerprint(encoder: str) -> str | None:
    """Says which weights those were, without a path of this machine."""
    file = Path(encoder, "model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else encoder


def settings_of(trainer: RobustFinetuner) -> dict[str, Any]:
    """Settings in which the modes differ from each other or from what was published."""
    args = trainer.args
    return {
        "method": repr(trainer.objective),
        "training_attack": repr(trainer.attack),
        "batch_size": args.per_device_train_batch_size,
        "weight_decay": args.weight_decay,
        "lr_rule": args.lr_rule,
        "lr_milestones": args.lr_milestones,
        "auto_lr_epochs": args.auto_lr_epochs,
        "kept": args.keep,
    }


def traces(trainer: RobustFinetuner) -> dict[str, Any]:
    """Ends of what changed during the training."""
    log = trainer.state.log_history
    rates = [args["learning_rate_halved"] for args in log if "learning_rate_halved" in args]
    found: dict[str, Any] = {
        "learning_rate_first": trainer.args.learning_rate,
        "learning_rate_last": trainer.optimizer.param_groups[0]["lr"],
        "halvings": len(rates) if trainer.args.lr_rule == "auto" else None,
    }
    for name in ("lambda_1", "lambda_2"):
        values = [entry[name] for entry in log if name in entry]
        found |= {f"{name}_first": values[0], f"{name}_last": values[-1]} if values else {}
    return found


def run(options: argparse.Namespace) -> None:
    """Work through the cells that no file and no other process has."""
    torch.set_num_threads(options.threads)
    encoders = read_encoders(options.encoder)
    size, title = SIZES[options.size], dataset_title(options.dataset_name)
    facts = {"size": dataclasses.asdict(size), "environment": collect_environment()}
    sizes = {encoder: build_classifier(encoder, 2).config.image_size for encoder in encoders.values()}
    if len(set(sizes.values())) > 1:
        sys.exit(f"error: the encoders take images of several sizes, {sizes}: give them to studies of their own")
    columns = {"label_column": options.label_column, "image_column": options.image_column}
    sources: dict[str, tuple[str, int | None, dict[str, Any]]] = {
        title: (options.dataset_name, size.images, columns),
        DIGITS: (DIGITS, size.digits_images if title != DIGITS else size.images, {}),
    }
    side = next(iter(sizes.values()))

    def load(name: str, split: str) -> ImageDataset:
        source, images, more = sources[name]
        limit = images if split == "train" else size.eval_images
        dataset = load_image_dataset(source, split, image_size=side, max_examples=limit, **more)
        dataset.name = name  # no path of this machine in a result
        return dataset

    study = Study(
        size,
        Path(options.output_dir),
        encoders,
        {name: load(name, "train") for name in sources},
        {name: load(name, "test") for name in sources},
    )
    work_through(
        cells(list(encoders), title, options.seeds),
        lambda cell: {**run_cell(cell, study), **facts},
        study.folder,
        only=options.only,
        needs=lambda cell: cell.needs,
    )


def read_encoders(given: list[str]) -> dict[str, str]:
    """`NAME=DIR_OR_REPO`, several times."""
    pairs = [entry.partition("=") for entry in given]
    wrong = [entry for entry, (name, _, place) in zip(given, pairs, strict=True) if not name or not place]
    if wrong or not pairs:
        sys.exit(f"error: got --encoder {wrong[0] if wrong else 'nothing'}: write --encoder NAME=DIR_OR_REPO")
    return {name: place for name, _, place in pairs}


def main(argv: list[str] | None = None) -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument(
        "--encoder", action="append", default=[], help="NAME=DIR_OR_REPO; again for each; the first counts most."
    )
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Labelled set with splits train and test.")
    parser.add_argument("--image_column", help="Found by type when unset.")
    parser.add_argument("--label_column", help="Found by type when unset.")
    parser.add_argument("--output_dir", default="outputs/finetuning_study", help="Folder of the study.")
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu", help="How large: see above.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds 1 to this.")
    parser.add_argument("--only", help="Run only cells whose name contains this, e.g. acl-cifar10-aff.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of this process.")
    options = parser.parse_args(argv)
    if options.command == "run":
        run(options)
    else:
        print_report(Path(options.output_dir))


if __name__ == "__main__":
    main()
