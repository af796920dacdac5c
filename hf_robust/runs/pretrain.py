"""The run behind `examples/pretrain.py` and `hf-robust pretrain`: train an encoder, measure, draw, export."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import set_seed

from hf_robust.attacks import PGD, frozen
from hf_robust.checkpoints import latest_complete
from hf_robust.cli import PretrainRun, parse_pretrain
from hf_robust.coresets import Coreset, CoresetMethod, FullData
from hf_robust.coresets.phases import CoresetPhases
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.coreset_pictures import plot_coresets
from hf_robust.evaluation.curves import plot_curves
from hf_robust.evaluation.environment import collect_environment, command_line, redact
from hf_robust.evaluation.pictures import plot_examples
from hf_robust.evaluation.probe import ProbeResult
from hf_robust.evaluation.report import EncoderReport
from hf_robust.image_sources import MissingSplitError, find_image_column, find_label_column, open_split, read_labels
from hf_robust.model_card import write_model_card
from hf_robust.model_fit import check_fit
from hf_robust.models.backbones import create_backbone
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives import Objective, load_objective
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.pseudo_labels import PseudoLabels
from hf_robust.run_facts import dataset_title, encoder_title, training_facts
from hf_robust.runs.console import tell
from hf_robust.runs.push import push_result
from hf_robust.runs.students import begin_at_teacher
from hf_robust.teachers import load_teacher
from hf_robust.views import Views

__all__ = ["main"]

SHOWN = 5  # rows of examples.png
NETWORK_FLAGS = ("projector_layers", "projector_dim", "projector_norms", "projector_norm_branches")
PICTURES = ("curves.png", "examples.png", "coreset.png")


def say(run: PretrainRun, text: str) -> None:
    """Print on one process only."""
    if run.training.process_index == 0:
        tell(text)


class Undecoded(SimpleNamespace):
    """What the checks before training read of a data set: its length, name, labels, num_classes."""

    def __len__(self) -> int:
        return self.images


def check_before_decoding(run: PretrainRun, image_size: int) -> None:
    """Refuse what the table of the images already shows: the trainer would, but decoding may take an hour."""
    data, args = run.data, run.training
    if run.model.pseudo_labels:
        PseudoLabels.load(run.model.pseudo_labels)
    if run.model.teacher and run.objective.pseudo_classes:
        load_teacher(run.model.teacher)
    if data.dataset_name == "digits":  # decoded in a moment
        return
    table = open_split(data.dataset_name, data.split)
    find_image_column(table.features, data.image_column, data.dataset_name)
    column = find_label_column(table.features, data.label_column, data.dataset_name)
    labels, _, classes = read_labels(table, column, data.dataset_name)
    images = min(len(table), data.max_examples or len(table))
    train: Any = Undecoded(
        images=images, name=dataset_title(run.data.dataset_name), labels=labels, num_classes=classes
    )
    model = SimpleNamespace(config=model_config(run, run.objective, image_size, classes))
    check_fit(run.objective, model, train)
    if len(table) and data.on_error == "raise":  # otherwise nobody knows yet how many images there are
        args.check_batch(len(train))
        run.coreset.check(run.objective, model, train)
        batch = args.per_device_train_batch_size * args.world_size
        epochs, seed = (args.num_train_epochs if args.max_steps <= 0 else 0.0), args.data_seed or args.seed
        phases = CoresetPhases(run.coreset, train, batch, seed, epochs, whole_batches=args.world_size > 1)
        phases.steps(args.num_train_epochs, args.max_steps, args.steps_per_epoch(phases.rounds.length))


def load_data(run: PretrainRun, image_size: int) -> tuple[ImageDataset, ImageDataset | None]:
    """Decode the training images, and the labelled images of the probe where there are any."""
    data = run.data
    columns: dict[str, Any] = {
        "image_column": data.image_column,
        "label_column": data.label_column,
        "image_size": image_size,
        "on_error": data.on_error,
    }
    train = load_image_dataset(
        data.dataset_name, data.split, **columns, max_examples=data.max_examples, check_images=data.check_images
    )
    train.name = dataset_title(run.data.dataset_name)
    if train.labels is None or train.num_classes == 1 or not data.eval_split:
        say(run, "No labels to probe with: the encoder is trained, but its accuracy is not measured.")
        return train, None
    try:
        evaluation = load_image_dataset(data.dataset_name, data.eval_split, **columns)
    except MissingSplitError as error:
        say(run, f"The accuracy of the encoder is not measured: {error}")
        return train, None
    if evaluation.labels is None:
        say(run, f"The split {data.eval_split!r} has no labels: the accuracy of the encoder is not measured.")
        return train, None
    evaluation.name = dataset_title(run.data.dataset_name)
    return train, evaluation.numbered_as(train)


def model_config(
    run: PretrainRun, objective: Objective, image_size: int, classes: int | None
) -> RobustPretrainingConfig:
    """The network: backbone, norm branches, and a projector or, for supervised methods, a classifier."""
    # Too few classes are refused by a check that knows the data set's name.
    head: dict[str, Any] = {"head": objective.head}
    if objective.needs_labels:
        head["num_classes"] = max(2, classes or 0)
    published = dict(objective.network)
    if run.model.normalize is not None:
        published = {key: value for key, value in published.items() if key not in ("mean", "std")}
        published |= {} if run.model.normalize else {"mean": None, "std": None}
    asked = {key: getattr(run.model, key) for key in NETWORK_FLAGS if getattr(run.model, key) is not None}
    return RobustPretrainingConfig(
        architecture=run.model.backbone,
        model_args=run.model_args,
        image_size=image_size,
        norm_branches=objective.norm_branches,
        **{**head, **published, **asked},
    )


def build_trainer(
    run: PretrainRun,
    objective: Objective,
    image_size: int,
    train: ImageDataset,
    evaluation: ImageDataset | None,
    student: RobustModelForPreTraining | None = None,
) -> RobustPretrainer:
    """Put model, objective, attack, coreset method and data into the trainer; `student` is a model with weights."""
    set_seed(run.training.seed)
    return RobustPretrainer(
        student or RobustModelForPreTraining(model_config(run, objective, image_size, train.num_classes)),
        run.training,
        objective,
        run.attack,
        train_dataset=train,
        coreset=run.coreset,
        eval_dataset=evaluation,
        teacher=run.model.teacher if objective.teacher_kind == "frozen" or objective.pseudo_classes else None,
        pseudo_labels=run.model.pseudo_labels if objective.pseudo_classes else None,
        views=Views(image_size, run.data.interpolation, **objective.view_options),
    )


def train_contrast(
    run: PretrainRun, image_size: int, train: ImageDataset, evaluation: ImageDataset | None
) -> RobustPretrainer:
    """Train the non-robust encoder with the same data, network and budget; on all images, whatever the coreset."""
    folder = Path(str(run.training.output_dir), f"contrast_{run.model.contrast}")
    training = copy.copy(run.training)  # the main run keeps its own folder
    training.output_dir, training.push_to_hub = str(folder), False
    run = dataclasses.replace(run, training=training, coreset=FullData())
    trainer = build_trainer(run, load_objective(run.model.contrast)(), image_size, train, evaluation)
    going_on = run.training.resume_from_checkpoint and latest_complete(folder) is not None
    trainer.train(resume_from_checkpoint=going_on)
    return trainer


def print_table(results: dict[str, ProbeResult], classes: int) -> None:
    """Standard and attacked accuracy of every encoder, one line each."""
    width = max(len(name) for name in results) + 2
    first = next(iter(results.values()))
    tell(f"\nLinear probe on {first.eval_name}, n = {first.n_eval}, one seed")
    tell(f"{'encoder':<{width}}{'standard':>10}{f'PGD-{first.steps}, L-inf {first.eps * 255:g}/255':>26}")
    for name, result in results.items():
        tell(f"{name:<{width}}{result.standard_accuracy:>10.1%}{result.pgd20_accuracy:>26.1%}")
    tell(f"{'chance':<{width}}{1 / classes:>10.1%}{1 / classes:>26.1%}\n")


def write_examples(
    trainers: dict[str, RobustPretrainer], results: dict[str, ProbeResult], evaluation: ImageDataset, path: Path
) -> None:
    """Draw clean images, perturbations and attacked images with the predictions of every encoder."""
    chosen = evaluation.subset(range(min(SHOWN, len(evaluation))))
    attack = PGD(eps=next(iter(results.values())).eps, steps=20)
    classifiers = {}
    for name, trainer in trainers.items():
        network, head = trainer.encoder_model.cpu().eval(), cast(torch.nn.Linear, results[name].head).cpu()
        classifiers[name] = lambda x, f=network.features, b=trainer.encoder_branch, h=head: h(f(x, b))
    networks = torch.nn.ModuleList([trainer.encoder_model for trainer in trainers.values()])
    images = torch.stack([chosen[k]["image"] for k in range(len(chosen))]).float() / 255
    with frozen(networks):
        labels = cast(torch.Tensor, chosen.labels)
        plot_examples(classifiers, images, labels, path, attack=attack, label_names=evaluation.label_names)


def coreset_title(method: CoresetMethod) -> str:
    """`RCS`, `Random`, `Stored`."""
    return type(method).__name__.removesuffix("Coreset")


def describe_coreset(trainer: RobustPretrainer) -> str:
    """Such as "RCS 20 % of 1,423 images, after 2 epochs on all, every 2 epochs"."""
    method, pool = trainer.phases.method, len(trainer.phases.pool)
    warmup, interval = (f"{n:g} epoch{'s' * (n != 1)}" for n in (method.warmup_epochs, method.interval))
    start = f", after {warmup} on all" if method.warmup_epochs else ""
    often = f"every {interval}" if method.due(method.interval) else "chosen once"
    return f"{coreset_title(method)} {100 * method.fraction:.3g} % of {pool:,} images{start}, {often}"


def chosen_coresets(trainer: RobustPretrainer, folder: Path) -> list[Coreset]:
    """The selections of this run, in order; files that an earlier one has left in the folder are not among them."""
    epochs = [entry["paper_epoch"] for entry in trainer.state.log_history if "coreset_seconds" in entry]
    files = [folder / f"coreset-{int(epoch):04d}.json" for epoch in epochs]
    return [Coreset.load(file) for file in files if file.is_file()]


def coreset_facts(trainer: RobustPretrainer) -> dict[str, Any] | None:
    """The entry of the report about the coreset; none for full data."""
    phases, method = trainer.phases, trainer.phases.method
    if not method.chooses:
        return None
    return {
        "name": coreset_title(method),
        "parameters": dataclasses.asdict(cast(Any, method)),
        "fraction": method.fraction,
        "effective_fraction": phases.rounds.length / len(phases.pool),
        "images": phases.rounds.length,
        "pool_images": len(phases.pool),
        "validation_images": len(phases.validation),
        "warmup_epochs": method.warmup_epochs,
        "selections": sum("coreset_seconds" in entry for entry in trainer.state.log_history),
        "selection_seconds": trainer.selection_seconds,
        "training_seconds": trainer.training_seconds - trainer.selection_seconds,
    }


def write_report(
    run: PretrainRun,
    trainer: RobustPretrainer,
    results: dict[str, ProbeResult],
    folder: Path,
    environment: dict[str, Any],
) -> None:
    """Write report.json and, from it alone, the model card; beside the encoder and in the output folder."""
    objective, config = trainer.objective, trainer.encoder_model.config
    base = getattr(objective, "base", None)
    parameters = {k: v for k, v in vars(objective).items() if k != "base"} | (vars(base) if base else {})
    parameters |= {"teacher": redact(encoder_title(run.model.teacher))} if run.model.teacher else {}
    parameters |= {"pseudo_labels": trainer.labelling.labels.source} if trainer.labelling.labels else {}
    dataset = dataset_title(run.data.dataset_name)
    name = f"{objective.title} {config.architecture} {dataset.split('/')[-1]}"
    rows = [r.to_result(name if k == objective.title else k) for k, r in results.items()]
    attack = run.attack if "adv" in objective.norm_branches else None
    report = EncoderReport(
        name=name,
        architecture=config.architecture,
        exported_format=json.loads((folder / "encoder" / "config.json").read_text())["model_type"],
        objective={"name": objective.title, "parameters": parameters, "supervised": objective.needs_labels},
        model_args=config.model_args,
        image_size=config.image_size,
        norm_branch=trainer.encoder_branch,
        dataset={
            "name": dataset,
            "split": run.data.split,
            "n_images": len(trainer.train_dataset),
            "hub_id": dataset if "/" in dataset else None,
        },
        threat_model=attack.to_dict() if attack else None,
        training=training_facts(trainer),
        coreset=coreset_facts(trainer),
        results=rows,
        command=command_line(),
        date=date.today().isoformat(),
        citation="\n\n".join(m.citation for m in (objective, base, run.coreset) if m is not None and m.citation),
        **environment,
    )
    for target in (folder, folder / "encoder"):
        report.save(target)
        write_model_card(report.to_dict(), target)


def put_beside_encoder(trainer: RobustPretrainer, folder: Path) -> None:
    """Copy the pictures and the last coreset into encoder/, which can then be pushed as it is."""
    encoder = folder / "encoder"
    for file in (*PICTURES, "coreset.json"):  # of this run, not of an earlier one in the same folder
        (encoder / file).unlink(missing_ok=True)
        if (folder / file).is_file():
            shutil.copy(folder / file, encoder / file)
    last = trainer.phases.current
    if last is not None and trainer.phases.method.chooses:
        dataclasses.replace(last, method=redact(last.method)).save(encoder / "coreset.json")


def start_line(run: PretrainRun, trainer: RobustPretrainer, image_size: int) -> str:
    """What is going to be trained, on what, for how long, against which attack."""
    args, attack, images = run.training, run.attack, f"{len(trainer.train_dataset)} images of {run.data.dataset_name}"
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    attacked = "adv" in run.objective.norm_branches
    budget = attack.title if attacked else "no attack"
    coreset = f"; coreset: {describe_coreset(trainer)}" if run.coreset.chooses else ""
    teacher = f"; teacher: {run.model.teacher}" if run.model.teacher else ""
    return (
        f"{run.objective.title}: {run.model.backbone} {run.model_args or ''}, {images}, "
        f"{image_size} x {image_size} pixels, {length}, {budget}{coreset}{teacher}"
    )


def finish(
    run: PretrainRun,
    trainers: dict[str, RobustPretrainer],
    train: ImageDataset,
    evaluation: ImageDataset | None,
    environment: dict[str, Any],
) -> None:
    """Measure, draw and report; the first trainer is the run's own, the others are its contrast."""
    folder, (title, trainer) = Path(str(run.training.output_dir)), next(iter(trainers.items()))
    for picture in PICTURES:  # an earlier run may have left more of them than this one draws
        (folder / picture).unlink(missing_ok=True)
    classes = (evaluation.num_classes or 0) if evaluation is not None else 0
    chance = 1 / classes if classes else None
    plot_curves({name: t.state.log_history for name, t in trainers.items()}, folder / "curves.png", chance=chance)
    if run.coreset.chooses and (coresets := chosen_coresets(trainer, folder)):
        plot_coresets(coresets, train, folder / "coreset.png")
    results = {name: t.probe() for name, t in trainers.items()} if evaluation is not None else {}
    if evaluation is not None:
        write_examples(trainers, results, evaluation, folder / "examples.png")
    if run.coreset.chooses:
        results = {name if name == title else f"{name} (full data)": r for name, r in results.items()}
    put_beside_encoder(trainer, folder)
    write_report(run, trainer, results, folder, environment)
    trainer.save_state()
    if results:
        print_table(results, classes)
    left = ["model card README.md", "report.json", *(p for p in PICTURES if (folder / p).is_file()), "encoder/"]
    tell(f"Output folder: {folder}  ({', '.join(left)})")


def main(argv: list[str] | None = None, **parsing: Any) -> None:
    """Train, measure, draw, export.

    Args:
        argv (`list[str]`, *optional*): flags; default: those of the process.
        parsing (`Any`): passed on to [`parse_pretrain`].
    """
    run = parse_pretrain(argv, **parsing)
    environment = collect_environment()  # now: the source tree may have moved on when training ends
    folder = Path(str(run.training.output_dir))
    run, student = begin_at_teacher(run)
    image_size = student.config.image_size if student else run.data.image_size
    if image_size is None:
        backbone: Any = create_backbone(run.model.backbone, model_args=run.model_args)
        image_size = int(backbone.pretrained_cfg["input_size"][-1])
    check_before_decoding(run, image_size)
    train, evaluation = load_data(run, image_size)
    contrast = run.model.contrast not in ("none", run.objective.title.lower())
    stale = latest_complete(folder / f"contrast_{run.model.contrast}") if contrast else None
    if stale and not run.training.resume_from_checkpoint:  # found now, not after the main run
        raise ValueError(
            f"{stale} is of an earlier run: go on with --resume_from_checkpoint true, or give another --output_dir"
        )
    trainer = build_trainer(run, run.objective, image_size, train, evaluation, student)
    say(run, start_line(run, trainer, image_size))
    trainer.train(resume_from_checkpoint=run.training.resume_from_checkpoint)
    trainers = {run.objective.title: trainer}
    if trainer.is_world_process_zero():
        trainer.save_encoder(folder / "encoder")
        tell(f"The encoder is in {folder / 'encoder'}.")
    if contrast:
        other = train_contrast(run, image_size, train, evaluation)
        trainers[other.objective.title] = other
    if trainer.is_world_process_zero():
        finish(run, trainers, train, evaluation, environment)
        push_result(run.training, folder / "encoder")
