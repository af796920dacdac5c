"""The run behind `examples/evaluate.py` and `hf-robust evaluate`: a classifier or an encoder, measured and drawn."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_robust.checkpoints import latest_complete
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.evaluate_cli import EvaluateRun, parse_evaluate
from hf_robust.evaluation.classifier import PixelClassifier, load_classifier
from hf_robust.evaluation.environment import command_line
from hf_robust.evaluation.evaluation_parts import world
from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.report import EncoderReport, write_text
from hf_robust.evaluation.robustness import check_needs, evaluate_robustness
from hf_robust.finetune_cli import parse_finetune
from hf_robust.hub_folders import is_path
from hf_robust.model_card import copy_evaluation_pictures, write_model_card
from hf_robust.run_facts import dataset_title
from hf_robust.runs import finetune
from hf_robust.runs.console import tell

__all__ = ["main", "update_card"]

_DONE = "finetune_arguments.json"
_FINETUNE = "hf-robust finetune"  # whose flags --finetune_args are
WARNED = 3  # exit status of --strict


def say(text: str = "") -> None:
    """Print on one process only."""
    if world()[0] == 0:
        tell(text)


def default_folder(run: EvaluateRun) -> Path:
    """Beside the model where it is a folder, else below `outputs/`; of protocols beside the encoder, not in it."""
    title = dataset_title(run.data.dataset_name).replace("/", "--")
    if run.settings.n_examples:
        title += f"-n{run.settings.n_examples}"
    if is_path(run.model) and run.protocol.protocol:
        encoder = Path(run.model).expanduser().resolve()
        return encoder.with_name(f"{encoder.name}-protocols") / title
    if is_path(run.model):
        return Path(run.model).expanduser() / "evaluation" / title
    return Path("outputs", "evaluation", run.model.replace("/", "--"), title)


def load_images(run: EvaluateRun, classifier: PixelClassifier) -> ImageDataset:
    """Decode the split at the size in which its images are attacked."""
    data = run.data
    dataset = load_image_dataset(
        data.dataset_name,
        data.split,
        image_column=data.image_column,
        label_column=data.label_column,
        image_size=classifier.image_size,
        on_error=data.on_error,
    )
    dataset.name = dataset_title(data.dataset_name)
    return dataset


def evaluate(run: EvaluateRun, model: str, folder: Path) -> EvaluationReport:
    """Measure one classifier and write its report."""
    settings = run.settings
    classifier = load_classifier(model, **dataclasses.asdict(run.loading))
    classifier.to(PartialState(cpu=settings.use_cpu).device)
    images = load_images(run, classifier)
    n = min(settings.n_examples or len(images), len(images))
    before = _metrics_in(folder)
    say(f"{classifier.name}: {n} of {len(images)} images of {run.data.dataset_name}, {', '.join(settings.metrics)}")
    report = evaluate_robustness(
        classifier,
        images,
        settings.metrics,
        eps=settings.eps,
        norm=settings.norm,
        preset=settings.preset,
        n_examples=settings.n_examples,
        seed=settings.seed,
        output_dir=folder,
        resume=settings.resume,
        batch_size=settings.batch_size,
        corruptions=settings.corruptions,
        curve_examples=settings.curve_examples,
        split=run.data.split,
        command=command_line(),
    )
    say(f"\n{report.table()}\n")
    files = [name for name in ("report.html", "report.json", "flags.npz") if (folder / name).is_file()]
    gone = [name for name in before if name not in report.metrics]
    if gone:
        say(f"The report replaces one with {', '.join(gone)}; finished parts are kept: name all metrics to have both.")
    say(f"Output folder: {folder}  ({', '.join([*files, *sorted(p.name for p in folder.glob('*.png'))])})")
    return report


def _metrics_in(folder: Path) -> list[str]:
    """What the report of an earlier evaluation there measured."""
    try:
        return list(EvaluationReport.load(folder).metrics)
    except (OSError, ValueError, TypeError):
        return []


def update_card(
    model: str | Path, report: EvaluationReport, protocol: str = "evaluation", pictures: Path | None = None
) -> bool:
    """Put the figures into `report.json` and the model card beside the weights.

    Args:
        model (`str` or `Path`): folder of the model.
        report ([`EvaluationReport`]): the figures; an earlier evaluation on as many images keeps those that are not
            among them.
        protocol (`str`): as in [`EvaluationReport.to_result`].
        pictures (`Path`, *optional*): folder of the evaluation, whose pictures the card then shows, too.

    Returns:
        `bool`: `False` where there is no card of ours to update.
    """
    folder = Path(model).expanduser()
    inner = next(
        (
            folder / name
            for name in (".", "classifier", "adapter")
            if (folder / name / "config.json").is_file() or (folder / name / "adapter_config.json").is_file()
        ),
        folder,
    )
    if not (inner / "report.json").is_file():
        return False
    card = EncoderReport.load(inner)
    result = report.to_result(card.name, protocol)
    result = copy_evaluation_pictures(result, pictures, inner) if pictures is not None else result
    same = ("protocol", "dataset", "n_eval", "seed")
    others = [row for row in card.results if any(row.get(key) != result[key] for key in same)]
    for row in card.results:
        if row not in others:
            for key in ("metrics", "intervals"):
                result[key] = {**row.get(key, {}), **result.get(key, {})}
    card = dataclasses.replace(card, results=[*others, result])
    card.save(inner)
    write_model_card(card, inner)
    return True


def finetune_flags(run: EvaluateRun, mode: str) -> list[str]:
    """The command line of `hf-robust finetune` for one protocol, without its output folder."""
    data = run.data
    arguments = ["--encoder", run.model, "--mode", mode, "--dataset_name", data.dataset_name]
    arguments += ["--split", run.protocol.train_split, "--eval_split", "", "--on_error", data.on_error]
    for name in ("image_column", "label_column"):
        value = getattr(data, name)
        arguments += [f"--{name}", value] if value else []
    arguments += ["--image_size", str(run.loading.image_size)] if run.loading.image_size else []
    arguments += ["--use_cpu", "true"] if run.settings.use_cpu else []
    arguments += ["--cpu_threads", str(run.settings.cpu_threads)] if run.settings.cpu_threads else []
    return [*arguments, "--seed", str(run.settings.seed), *shlex.split(run.protocol.finetune_args)]


def fine_tuned(run: EvaluateRun, mode: str, folder: Path) -> Path:
    """The classifier of one protocol: fine-tuned now, gone on with, or there already."""
    arguments = finetune_flags(run, mode)
    target, done = folder / ("adapter" if mode == "lora" else "classifier"), folder / _DONE
    if done.is_file() and target.is_dir() and run.settings.resume:
        if json.loads(done.read_text(encoding="utf-8")) != arguments:
            raise ValueError(
                f"{str(folder)!r} holds a classifier that was fine-tuned with other flags: give another --output_dir, "
                "or --resume false to fine-tune again"
            )
        say(f"{mode.upper()}: fine-tuned already, in {target}")
        return target
    if not run.settings.resume:
        _start_over(folder)
    resume = ["--resume_from_checkpoint", "true"] if run.settings.resume and latest_complete(folder) else []
    finetune.main([*arguments, "--output_dir", str(folder), *resume], prog=_FINETUNE)
    if world()[0] == 0:
        write_text(done, json.dumps(arguments) + "\n")
    if world()[1] > 1:
        torch.distributed.barrier()
    return target


def _start_over(folder: Path) -> None:
    """Throw the checkpoints of an earlier fine-tuning away, which the trainer would refuse to mix with its own."""
    if world()[0] == 0:
        (folder / _DONE).unlink(missing_ok=True)
        for checkpoint in [path for path in folder.rglob("checkpoint-*") if path.is_dir()]:
            shutil.rmtree(checkpoint)
    if world()[1] > 1:
        torch.distributed.barrier()


def evaluate_protocols(run: EvaluateRun, folder: Path) -> dict[str, EvaluationReport]:
    """Fine-tune an encoder by each protocol and evaluate each classifier; one table in the end."""
    for mode in (
        run.protocol.protocol or ()
    ):  # a slip in the flags of the last one is found before the first one trains
        parse_finetune([*finetune_flags(run, mode), "--output_dir", str(folder / mode)], prog=_FINETUNE)
    reports = {}
    for mode in run.protocol.protocol or ():
        target = fine_tuned(run, mode, folder / mode)
        pictures = folder / mode / "evaluation"
        reports[mode.upper()] = evaluate(run, str(target), pictures)
        if run.settings.update_card and world()[0] == 0:
            update_card(target, reports[mode.upper()], pictures=pictures)
            update_card(run.model, reports[mode.upper()], f"fine-tuned by {mode.upper()}", pictures)
    names = list(dict.fromkeys(name for report in reports.values() for name in report.metrics))
    width = max(len(name) for name in names) + 2
    say("\n" + " " * width + "".join(f"{mode:>12}" for mode in reports))
    for name in names:
        cells = [report.metrics.get(name) for report in reports.values()]
        say(f"{name:<{width}}" + "".join(f"{'-' if value is None else f'{value:.1%}':>12}" for value in cells))
    first = next(iter(reports.values()))
    say(f"n = {first.n}, seed {first.seed}; the intervals are above and in the reports")
    return reports


def main(argv: list[str] | None = None, **parsing: Any) -> None:
    """Evaluate, draw, report.

    Args:
        argv (`list[str]`, *optional*): flags; default: those of the process.
        parsing (`Any`): passed on to [`parse_evaluate`].
    """
    run = parse_evaluate(argv, **parsing)
    if run.settings.cpu_threads:
        torch.set_num_threads(run.settings.cpu_threads)
    check_needs(run.settings.metrics, run.settings.corruptions)  # before anything is fine-tuned
    PartialState(cpu=run.settings.use_cpu)  # the processes of `accelerate launch` find each other
    folder = Path(run.settings.output_dir) if run.settings.output_dir else default_folder(run)
    if run.protocol.protocol:
        reports = list(evaluate_protocols(run, folder).values())
    else:
        reports = [evaluate(run, run.model, folder)]
        wanted = run.settings.update_card and world()[0] == 0
        if wanted and not update_card(run.model, reports[0], pictures=folder):
            say("No model card was updated: the model has no report.json of hf_robust beside its weights.")
    if run.settings.strict and any(report.warnings for report in reports):
        sys.exit(WARNED)
