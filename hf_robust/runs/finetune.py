"""The run behind `examples/finetune.py` and `hf-robust finetune`: a classifier from an encoder, measured once."""

from __future__ import annotations

import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import set_seed

from hf_robust.adapters import save_adapter, with_adapter, with_lora_path
from hf_robust.attacks import PGD, frozen
from hf_robust.classifiers import build_classifier
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluation.accuracy import Accuracy
from hf_robust.evaluation.curves import plot_curves
from hf_robust.evaluation.environment import collect_environment, command_line
from hf_robust.evaluation.pictures import plot_examples
from hf_robust.evaluation.probe import ProbeResult, probe_encoder
from hf_robust.evaluation.report import EncoderReport, describe_metric
from hf_robust.finetune_cli import FinetuneRun, parse_finetune
from hf_robust.finetuner import RobustFinetuner
from hf_robust.finetuning_args import falls
from hf_robust.held_out import split_validation
from hf_robust.hub_folders import is_path
from hf_robust.image_sources import MissingSplitError, find_image_column, open_split
from hf_robust.model_card import write_model_card
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.lora import LoRA
from hf_robust.postprocessing import post_process, train_head, where_to_resume
from hf_robust.run_facts import dataset_title, training_facts
from hf_robust.runs.console import tell
from hf_robust.runs.push import push_result
from hf_robust.views import Views

__all__ = ["main"]

SHOWN = 5  # rows of examples.png
PICTURES = ("curves.png", "examples.png")
TEST_STEPS, TEST_STEP_SIZE = 20, 2 / 255  # PGD-20 as published


def say(run: FinetuneRun, text: str) -> None:
    """Print on one process only."""
    if run.training.process_index == 0:
        tell(text)


# ---------------------------------------------------------------------- images
def load(run: FinetuneRun, split: str, image_size: int, **more: Any) -> ImageDataset:
    """Decode a split."""
    data = run.data
    dataset = load_image_dataset(
        data.dataset_name,
        split,
        image_column=data.image_column,
        label_column=data.label_column,
        image_size=image_size,
        on_error=data.on_error,
        **more,
    )
    dataset.name = dataset_title(data.dataset_name)
    return dataset


def check_test_split(run: FinetuneRun) -> bool:
    """Whether there is something to measure on in the end; its images are not read before."""
    if not run.data.eval_split:
        return False
    if run.data.dataset_name == "digits":
        return True
    try:
        table = open_split(run.data.dataset_name, run.data.eval_split)
        find_image_column(table.features, run.data.image_column, run.data.dataset_name)
    except MissingSplitError as error:
        say(run, f"The result will not be measured on test images: {error}")
        return False
    return True


def load_test(run: FinetuneRun, train: ImageDataset, image_size: int) -> ImageDataset | None:
    """Decode the test images, after the training."""
    test = load(run, str(run.data.eval_split), image_size)
    if test.labels is None:
        say(run, f"The split {run.data.eval_split!r} has no labels: the result is not measured on it.")
        return None
    return test.numbered_as(train)


# ---------------------------------------------------------------------- model and trainer
def build_model(run: FinetuneRun, train: ImageDataset) -> Any:
    """The encoder with a fresh head, and adapters where the mode wants them; a stage for the head comes last."""
    set_seed(run.training.seed)
    begin: Literal["zero", "default"] = "default" if run.classifier.head_init == "default" else "zero"
    classes, branches = train.num_classes or 0, run.objective.norm_branches
    model: Any = build_classifier(run.encoder, classes, branches, run.data.image_size, head_init=begin)
    if isinstance(run.objective, AutoLoRa):
        model = with_lora_path(model, run.objective.rank, run.objective.init, run.objective.norm_update)
    if isinstance(run.objective, LoRA):
        model = with_adapter(model, run.objective.rank, run.objective.alpha)
        with tempfile.TemporaryDirectory() as folder:  # now, not after the training, if the encoder cannot carry it
            save_adapter(model, folder, run.encoder, train.label_names)
    if run.classifier.head_init == "alf":
        run.training.check_batch(len(train))
        model.classifier.load_state_dict(adversarial_head(run, train))
    return model


def adversarial_head(run: FinetuneRun, train: ImageDataset) -> dict[str, torch.Tensor]:
    """A head trained by adversarial linear fine-tuning, as a stage of its own in alf/."""
    epochs = min(float(ALF.recipe["num_train_epochs"]), run.training.num_train_epochs)
    recipe = {key: value for key, value in ALF.recipe.items() if hasattr(run.training, key)}
    recipe |= {"num_train_epochs": epochs, "lr_milestones": falls(ALF.recipe, epochs, "milestones")["lr_milestones"]}
    recipe["per_device_train_batch_size"] = min(int(recipe["per_device_train_batch_size"]), len(train))
    return train_head(
        build_classifier(run.encoder, train.num_classes or 0, ("adv",), run.data.image_size),
        ALF(),
        run.training,
        train,
        folder=Path(str(run.training.output_dir), "alf"),
        resume=bool(run.training.resume_from_checkpoint),
        **recipe,
    )


def start_line(run: FinetuneRun, train: ImageDataset, held_out: ImageDataset | None, image_size: int) -> str:
    """What is going to be trained, on what, for how long, against which attack."""
    args, attack = run.training, run.attack
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    budget = attack.title if run.objective.adversarial else "no attack"
    deciding = f", {len(held_out)} more decide" if held_out is not None else ""
    classes = run.post.count(train) if run.post else train.num_classes
    return (
        f"{run.objective.title}: encoder {run.encoder}, {len(train)} images of {run.data.dataset_name} in {classes} "
        f"classes{deciding}, {image_size} x {image_size} pixels, {length}, {budget}"
    )


# ---------------------------------------------------------------------- results
def print_table(rows: dict[str, dict[str, float]], n: int, title: str) -> None:
    """Every accuracy under its name, one line per network."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    titles = {name: describe_metric(name)["title"].replace(" accuracy", "") for name in names}
    width = max(len(name) for name in rows) + 2
    tell(f"\n{title}, n = {n}, one seed")
    tell(f"{'':<{width}}" + "".join(f"{titles[name]:>{len(titles[name]) + 3}}" for name in names))
    for row, metrics in rows.items():
        tell(f"{row:<{width}}" + "".join(f"{metrics[name]:>{len(titles[name]) + 3}.1%}" for name in names))
    tell()


def result(run: FinetuneRun, name: str, found: Accuracy, n_train: int, split: str) -> dict[str, Any]:
    """An entry of `EncoderReport.results`."""
    attack = found.attack.to_dict() if found.attack is not None else {}
    return {
        "model": name,
        "metrics": found.to_dict(),
        "protocol": f"fine-tuned by {run.objective.title}",
        "n_train": n_train,
        "n_eval": found.n,
        "seed": run.training.seed,
        "attack": {**attack, "loss": "cross-entropy", "iterate": "last"},
        "dataset": {"name": dataset_title(run.data.dataset_name), "split": split},
    }


def draw(
    run: FinetuneRun, trainer: RobustFinetuner, test: ImageDataset | None, attack: PGD | None, folder: Path
) -> None:
    """curves.png, and examples.png where there are test images."""
    for picture in PICTURES:  # an earlier run may have left more of them than this one draws
        (folder / picture).unlink(missing_ok=True)
    chance = 1 / trainer.train_dataset.num_classes
    plot_curves({run.objective.title: trainer.state.log_history}, folder / "curves.png", chance=chance)
    if test is None or attack is None:
        return
    network = trainer.classifier_model.cpu().eval()
    chosen = test.subset(range(min(SHOWN, len(test))))
    images = Views(network.config.image_size)(
        torch.stack([chosen[k]["image"] for k in range(len(chosen))]), ("original",)
    )["original"]
    classifiers = {run.objective.title: lambda x: network.embed(x, network.default_branch)}
    with frozen(network):
        labels = cast(torch.Tensor, chosen.labels)
        plot_examples(
            classifiers, images, labels, folder / "examples.png", attack=attack, label_names=test.label_names
        )


def origin(run: FinetuneRun) -> dict[str, Any]:
    """Where a classifier comes from, as far as the encoder's own folder says."""
    folder = Path(run.encoder)
    if not folder.exists():
        return {"name": run.encoder, "hub_id": run.encoder}
    file = folder / "report.json"
    told = json.loads(file.read_text()) if file.is_file() else {}
    known = {key: (told.get(key) or {}).get("name") for key in ("objective", "dataset", "coreset")}
    known |= {"name": told.get("name") or folder.resolve().name, "exported_format": told.get("exported_format")}
    return {key: value for key, value in known.items() if value}


def write_report(
    run: FinetuneRun,
    trainer: RobustFinetuner,
    results: list[dict[str, Any]],
    target: Path,
    environment: dict[str, Any],
    name: str,
) -> None:
    """Write report.json and, from it alone, the model card; beside the weights and in the output folder."""
    config, dataset = trainer.classifier_model.config, dataset_title(run.data.dataset_name)
    file, args = target / "config.json", run.training
    rule = {"milestones": args.lr_milestones, "auto": list(args.halving_epochs)}.get(args.lr_rule)
    chosen = {
        "momentum": args.momentum,
        "weight_decay": args.weight_decay,
        "learning_rate_rule": f"{args.lr_rule} {rule or ''}".strip(),
        "kept_epoch": trainer.kept_epoch or "last",
    }
    if trainer.validation_dataset is not None:
        chosen["validation_images"] = len(trainer.validation_dataset)
    if run.preset is not None:
        chosen["preset"] = f"{run.preset.name} ({run.preset.source})"
    of_classifier: dict[str, Any] = {
        "task": "classifier",
        "label_names": list(trainer.train_dataset.label_names or ()),
    }
    report = EncoderReport(
        name=name,
        architecture=config.architecture,
        exported_format=json.loads(file.read_text())["model_type"] if file.is_file() else "peft",
        objective={
            "name": f"LP-{run.objective.title}" if run.post else run.objective.title,
            "parameters": vars(run.objective) | (vars(run.post) if run.post else {}),
            "supervised": run.post is None,
        },
        model_args=config.model_args,
        image_size=config.image_size,
        norm_branch=trainer.classifier_model.default_branch,
        dataset={
            "name": dataset,
            "split": run.data.split,
            "n_images": len(trainer.train_dataset),
            "hub_id": dataset if "/" in dataset else None,
        },
        threat_model=run.attack.to_dict() if run.objective.adversarial else None,
        training={**training_facts(trainer), **chosen},
        results=results,
        command=command_line(),
        date=date.today().isoformat(),
        citation=run.objective.citation or None,
        encoder=origin(run),
        **environment,
        **({} if run.post else of_classifier),
    )
    for folder in (target.parent, target):
        report.save(folder)
        write_model_card(report.to_dict(), folder)


# ---------------------------------------------------------------------- the two ways through
def finetune(run: FinetuneRun, environment: dict[str, Any]) -> None:
    """Train a classifier, then measure, draw and export it."""
    if run.training.push_to_hub and isinstance(run.objective, LoRA) and is_path(run.encoder):
        raise ValueError(
            f"an adapter is published beside its encoder, and {run.encoder!r} is a folder that nobody else has: push "
            "the encoder first (hf-robust push) and give its repository as --encoder"
        )
    folder = Path(str(run.training.output_dir))
    start = build_classifier(run.encoder, 2, image_size=run.data.image_size)  # an unfit encoder is found now
    image_size, measured = start.config.image_size, check_test_split(run)
    data = run.data
    images = load(run, data.split, image_size, max_examples=data.max_examples, check_images=data.check_images)
    train, held_out = split_validation(images, run.training.validation_fraction, run.training.seed)
    model = build_model(run, train)
    trainer = RobustFinetuner(model, run.training, run.objective, run.attack, train, held_out)
    trainer.adapter_base = run.encoder if isinstance(run.objective, LoRA) else None
    say(run, start_line(run, train, held_out, image_size))
    if run.preset is not None:
        say(run, " ".join(filter(None, [f"Preset {run.preset.name} ({run.preset.source}).", run.preset.note])))
    asked = run.training.resume_from_checkpoint
    trainer.train(where_to_resume(asked, folder) if run.classifier.head_init == "alf" else asked)
    target = export(run, trainer, folder)  # first: whatever the test images hold, the result is on disk
    test = load_test(run, train, image_size) if measured else None
    attack = PGD(trainer.validation_attack.eps, TEST_STEP_SIZE, TEST_STEPS)
    found = trainer.measure(test, attack, progress=True) if test is not None else None
    if not trainer.is_world_process_zero():
        return
    draw(run, trainer, test, attack, folder)
    name = f"{run.objective.title} {model.config.architecture} {dataset_title(run.data.dataset_name).split('/')[-1]}"
    results = [result(run, name, found, len(train), str(run.data.eval_split))] if found is not None else []
    write_report(run, trainer, results, target, environment, name)
    trainer.save_state()
    if found is not None:
        print_table({run.objective.title: found.to_dict()}, found.n, f"Test images of {images.name}")
    if trainer.kept_epoch:
        tell(f"Kept: epoch {trainer.kept_epoch}, the best by PGD on {len(held_out or ())} held-out training images.")
    tell(f"Output folder: {folder}  ({target.name}/, model card README.md, report.json, {', '.join(PICTURES)})")
    push_result(run.training, target)


def export(run: FinetuneRun, trainer: RobustFinetuner, folder: Path) -> Path:
    """Write the classifier, or of mode lora the adapter; on one process."""
    adapter = isinstance(run.objective, LoRA)
    target = folder / ("adapter" if adapter else "classifier")
    if trainer.is_world_process_zero():
        trainer.save_adapter(target, run.encoder) if adapter else trainer.save_classifier(target)
    return target


def improve_encoder(run: FinetuneRun, environment: dict[str, Any]) -> None:
    """Post-process an encoder on pseudo-labels; a linear probe before and after shows what it brought."""
    assert run.post is not None
    folder = Path(str(run.training.output_dir))
    start = build_classifier(run.encoder, 2, image_size=run.data.image_size)
    image_size, measured = start.config.image_size, check_test_split(run)
    data = run.data
    images = load(run, data.split, image_size, max_examples=data.max_examples, check_images=data.check_images)
    say(run, f"{run.post.count(images)} pseudo-classes. " + start_line(run, images, None, image_size))
    trainer = post_process(
        run.encoder,
        images,
        run.post,
        run.training,
        beta=cast(Any, run.objective).beta,
        attack=run.attack,
        image_size=run.data.image_size,
    )
    if not trainer.is_world_process_zero():
        return
    target = trainer.save_encoder(folder / "encoder")
    name = f"LP-AFF {start.config.architecture} {images.name.split('/')[-1]}"
    rows: dict[str, ProbeResult] = {}
    test = load_test(run, images, image_size) if measured and images.labels is not None else None
    if test is not None:
        networks = {name: trainer.classifier_model, "before": cast(Any, start).to(run.training.device)}
        rows = {key: probe(network, images, test, run) for key, network in networks.items()}
    draw(run, trainer, None, None, folder)
    write_report(run, trainer, [r.to_result(key) for key, r in rows.items()], target, environment, name)
    if rows:
        table = {("after" if key == name else key): r.to_dict() for key, r in reversed(rows.items())}
        print_table(table, len(test or ()), f"Linear probe on {images.name}")
    tell(f"Output folder: {folder}  (encoder/, model card README.md, report.json, curves.png)")
    push_result(run.training, target)


def probe(network: Any, images: ImageDataset, test: ImageDataset, run: FinetuneRun) -> ProbeResult:
    """Linear probe of the branch that leaves."""
    branch = network.default_branch
    with frozen(network):
        return probe_encoder(
            lambda x: network.features(x, branch),
            images,
            test,
            size=network.config.image_size,
            device=run.training.device,
            seed=run.training.seed,
        )


def main(argv: list[str] | None = None, **parsing: Any) -> None:
    """Fine-tune, measure, draw, export.

    Args:
        argv (`list[str]`, *optional*): flags; default: those of the process.
        parsing (`Any`): passed on to [`parse_finetune`].
    """
    run = parse_finetune(argv, **parsing)
    environment = collect_environment()  # now: the source tree may have moved on when training ends
    (improve_encoder if run.post is not None else finetune)(run, environment)
