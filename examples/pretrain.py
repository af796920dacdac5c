"""Pre-train a robust encoder and show what it withstands.

Without arguments: scikit-learn's digits, a thin network, a few minutes on two CPU cores, and a SimCLR encoder of the
same budget for contrast. With --dataset_name and --config: any image data set, any timm backbone, any method.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --config examples/configs/acl_cifar10.yaml --objective air --base dynacl
    accelerate launch examples/pretrain.py --dataset_name path/to/images --backbone resnet50 --image_size 64

The output folder receives encoder/ (load it with AutoModel.from_pretrained), README.md (model card), report.json,
curves.png, examples.png, trainer_state.json, runs/ (TensorBoard) and checkpoints; --resume_from_checkpoint true goes
on after a kill.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_robust.attacks import PGD, frozen
from hf_robust.checkpoints import latest_complete
from hf_robust.cli import PretrainRun, parse_pretrain
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.environment import collect_environment, command_line
from hf_robust.evaluation.pictures import plot_curves, plot_examples
from hf_robust.evaluation.probe import ProbeResult
from hf_robust.evaluation.report import EncoderReport
from hf_robust.image_sources import MissingSplitError
from hf_robust.model_card import write_model_card
from hf_robust.models.backbones import create_backbone
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives import Objective, load_objective
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.views import Views

DIGITS = Path(__file__).parent / "configs" / "digits_cpu.yaml"
SHOWN = 5  # rows of examples.png


def say(run: PretrainRun, text: str) -> None:
    """Print on one process only."""
    if run.training.process_index == 0:
        print(text, flush=True)


def dataset_title(run: PretrainRun) -> str:
    """The data set as cards and tables call it: a Hub id, or the last part of a path."""
    source = Path(run.data.dataset_name)
    return source.resolve().name if source.exists() else run.data.dataset_name


def load_data(run: PretrainRun, image_size: int) -> tuple[ImageDataset, ImageDataset | None]:
    """Decode the training images, and the labelled images of the probe where there are any."""
    data = run.data
    columns = {"image_column": data.image_column, "label_column": data.label_column, "image_size": image_size}
    train = load_image_dataset(
        data.dataset_name, data.split, **columns, on_error=data.on_error, max_examples=data.max_examples
    )
    train.name = dataset_title(run)
    if train.labels is None or train.num_classes == 1 or not data.eval_split:
        say(run, "No labels to probe with: the encoder is trained, but its accuracy is not measured.")
        return train, None
    try:
        evaluation = load_image_dataset(data.dataset_name, data.eval_split, **columns, on_error=data.on_error)
    except MissingSplitError as error:
        say(run, f"The accuracy of the encoder is not measured: {error}")
        return train, None
    if evaluation.labels is None:
        say(run, f"The split {data.eval_split!r} has no labels: the accuracy of the encoder is not measured.")
        return train, None
    evaluation.name = dataset_title(run)
    return train, evaluation


def build_trainer(
    run: PretrainRun, objective: Objective, image_size: int, train: ImageDataset, evaluation: ImageDataset | None
) -> RobustPretrainer:
    """Put model, objective, attack and data into the trainer."""
    set_seed(run.training.seed)
    config = RobustPretrainingConfig(
        architecture=run.model.backbone,
        model_args=run.model_args,
        image_size=image_size,
        norm_branches=objective.norm_branches,
        projector_layers=run.model.projector_layers,
        **({} if run.model.normalize else {"mean": None, "std": None}),
    )
    return RobustPretrainer(
        RobustModelForPreTraining(config),
        run.training,
        objective,
        run.attack,
        train_dataset=train,
        eval_dataset=evaluation,
        views=Views(image_size, run.data.interpolation),
    )


def train_contrast(
    run: PretrainRun, image_size: int, train: ImageDataset, evaluation: ImageDataset | None
) -> RobustPretrainer:
    """Train the non-robust encoder with the same data, network and budget."""
    folder = Path(run.training.output_dir, f"contrast_{run.model.contrast}")
    run = dataclasses.replace(run, training=copy.copy(run.training))  # the main run keeps its own folder
    run.training.output_dir = str(folder)
    trainer = build_trainer(run, load_objective(run.model.contrast)(), image_size, train, evaluation)
    going_on = run.training.resume_from_checkpoint and latest_complete(folder) is not None
    trainer.train(resume_from_checkpoint=going_on)
    return trainer


def print_table(results: dict[str, ProbeResult], classes: int) -> None:
    """Standard and attacked accuracy of every encoder, one line each."""
    width = max(len(name) for name in results) + 2
    first = next(iter(results.values()))
    print(f"\nLinear probe on {first.eval_name}, n = {first.n_eval}, one seed")
    print(f"{'encoder':<{width}}{'standard':>10}{f'PGD-{first.steps}, L-inf {first.eps * 255:g}/255':>26}")
    for name, result in results.items():
        print(f"{name:<{width}}{result.standard_accuracy:>10.1%}{result.pgd20_accuracy:>26.1%}")
    print(f"{'chance':<{width}}{1 / classes:>10.1%}{1 / classes:>26.1%}\n")


def write_examples(
    trainers: dict[str, RobustPretrainer], results: dict[str, ProbeResult], evaluation: ImageDataset, path: Path
) -> None:
    """Draw clean images, perturbations and attacked images with the predictions of every encoder."""
    chosen = evaluation.subset(range(min(SHOWN, len(evaluation))))
    attack = PGD(eps=next(iter(results.values())).eps, steps=20)
    classifiers = {}
    for name, trainer in trainers.items():
        network, head = trainer.encoder_model.cpu().eval(), results[name].head.cpu()
        classifiers[name] = lambda x, f=network.features, b=trainer.encoder_branch, h=head: h(f(x, b))
    networks = torch.nn.ModuleList([trainer.encoder_model for trainer in trainers.values()])
    images = torch.stack([chosen[k]["image"] for k in range(len(chosen))]).float() / 255
    with frozen(networks):
        plot_examples(classifiers, images, chosen.labels, path, attack=attack, label_names=evaluation.label_names)


def write_report(
    run: PretrainRun,
    trainer: RobustPretrainer,
    results: dict[str, ProbeResult],
    folder: Path,
    environment: dict[str, Any],
) -> None:
    """Write report.json and, from it alone, the model card; beside the encoder and in the output folder."""
    objective, args, config = trainer.objective, trainer.args, trainer.encoder_model.config
    base = getattr(objective, "base", None)
    parameters = {k: v for k, v in vars(objective).items() if k != "base"} | (vars(base) if base else {})
    dataset = dataset_title(run)
    name = f"{objective.title} {config.architecture} {dataset.split('/')[-1]}"
    rows = [r.to_result(name if k == objective.title else k) for k, r in results.items()]
    attack = run.attack if "adv" in objective.norm_branches else None
    report = EncoderReport(
        name=name,
        architecture=config.architecture,
        exported_format=json.loads((folder / "encoder" / "config.json").read_text())["model_type"],
        objective={"name": objective.title, "parameters": parameters},
        model_args=config.model_args,
        image_size=config.image_size,
        norm_branch=trainer.encoder_branch,
        dataset={
            "name": dataset,
            "split": run.data.split,
            "n_images": len(trainer.train_dataset),
            "hub_id": dataset if "/" in dataset else None,
        },
        threat_model=vars(attack) if attack else None,
        training={
            "epochs": trainer.state.epoch,
            "steps": trainer.state.global_step,
            "batch_size": args.per_device_train_batch_size * args.world_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "optimizer": args.optimizer,
            "learning_rate": args.learning_rate,
            "precision": trainer.accelerator.mixed_precision.replace("no", "fp32"),
            "seed": args.seed,
            "seconds": trainer.training_seconds,
            "processes": args.world_size,
        },
        results=rows,
        command=command_line(),
        date=date.today().isoformat(),
        citation=objective.citation + ("\n\n" + base.citation if base else ""),
        **environment,
    )
    for picture in ("curves.png", "examples.png"):  # of this run, not of an earlier one in the same folder
        (folder / "encoder" / picture).unlink(missing_ok=True)
        if (folder / picture).is_file():
            shutil.copy(folder / picture, folder / "encoder" / picture)
    for target in (folder, folder / "encoder"):
        report.save(target)
        write_model_card(report.to_dict(), target)


def main(argv: list[str] | None = None) -> None:
    """Train, measure, draw, export."""
    run = parse_pretrain(argv, default_config=DIGITS, description=__doc__)
    environment = collect_environment()  # now: the source tree may have moved on when training ends
    folder = Path(run.training.output_dir)
    image_size = (
        run.data.image_size
        or create_backbone(run.model.backbone, model_args=run.model_args).pretrained_cfg["input_size"][-1]
    )
    train, evaluation = load_data(run, image_size)
    contrast = run.model.contrast not in ("none", run.objective.title.lower())
    stale = latest_complete(folder / f"contrast_{run.model.contrast}") if contrast else None
    if stale and not run.training.resume_from_checkpoint:  # found now, not after the main run
        raise ValueError(
            f"{stale} is of an earlier run: go on with --resume_from_checkpoint true, or give another --output_dir"
        )
    trainer = build_trainer(run, run.objective, image_size, train, evaluation)
    title = run.objective.title
    args, attack = run.training, run.attack
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    attacked = "adv" in run.objective.norm_branches
    budget = f"PGD-{attack.steps}, {attack.norm} {attack.eps * 255:.3g}/255" if attacked else "no attack"
    say(
        run,
        f"{title}: {run.model.backbone} {run.model_args or ''}, {len(train)} images of {run.data.dataset_name}, "
        f"{image_size} x {image_size} pixels, {length}, {budget}",
    )
    trainer.train(resume_from_checkpoint=run.training.resume_from_checkpoint)
    trainers = {title: trainer}
    if trainer.is_world_process_zero():
        trainer.save_encoder(folder / "encoder")
        print(f"The encoder is in {folder / 'encoder'}.")
    if contrast:
        other = train_contrast(run, image_size, train, evaluation)
        trainers[other.objective.title] = other
    if not trainer.is_world_process_zero():
        return
    chance = 1 / evaluation.num_classes if evaluation is not None else None
    plot_curves({name: t.state.log_history for name, t in trainers.items()}, folder / "curves.png", chance=chance)
    results = {name: t.probe() for name, t in trainers.items()} if evaluation is not None else {}
    if results:
        write_examples(trainers, results, evaluation, folder / "examples.png")
    write_report(run, trainer, results, folder, environment)
    trainer.save_state()
    if results:
        print_table(results, evaluation.num_classes)
    print(f"Output folder: {folder}  (model card README.md, report.json, curves.png, examples.png, encoder/)")


def run_or_exit(argv: list[str] | None = None) -> None:
    """Run `main`; an error of the user's making ends in one message and exit status 1, not in a traceback."""
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_or_exit()
