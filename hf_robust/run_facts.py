"""What a training says about itself in reports and cards."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from hf_robust.evaluation.environment import collect_environment, command_line, redact
from hf_robust.evaluation.report import EncoderReport

__all__ = ["dataset_title", "encoder_title", "release_report", "training_facts"]


def dataset_title(source: str) -> str:
    """The data set as cards and tables call it: a Hub id, or the last part of a path.

    Args:
        source (`str`): what the user asked for.
    """
    path = Path(source)
    return path.resolve().name if path.exists() else source


def encoder_title(source: str) -> str:
    """An encoder as reports call it: a Hub id or timm name, or the last two parts of a path.

    Args:
        source (`str`): what the user asked for.
    """
    path = Path(source).expanduser()
    return "/".join(Path(redact(str(path.resolve()))).parts[-2:]) if path.exists() else source


def training_facts(trainer: Any) -> dict[str, Any]:
    """The entry `training` of a report.

    Args:
        trainer ([`RobustTrainer`]): after the training, or in it.

    Returns:
        `dict`: epochs, steps, batch, optimiser, precision, seed, seconds, processes.
    """
    args = trainer.args
    return {
        "epochs": trainer.epoch,
        "steps": trainer.state.global_step,
        "batch_size": args.per_device_train_batch_size * args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "optimizer": args.optimizer,
        "learning_rate": args.learning_rate,
        "precision": trainer.accelerator.mixed_precision.replace("no", "fp32"),
        "seed": args.seed,
        "seconds": trainer.training_seconds,
        "processes": args.world_size,
    }


def release_report(
    trainer: Any, folder: Path, hub_id: str | None = None, environment: dict[str, Any] | None = None
) -> EncoderReport:
    """The report of what a trainer has just written to a folder, finished or not; without any result.

    Args:
        trainer ([`RobustTrainer`]): its objective, attack, data and progress are told.
        folder (`Path`): with the weights.
        hub_id (`str`, *optional*): the repository it is for.
        environment (`dict`, *optional*): of `collect_environment`, at the start of the training; default: now.

    Returns:
        [`EncoderReport`]: for the card of a push; a run writes a fuller one in the end.
    """
    objective, config = trainer.objective, trainer.accelerator.unwrap_model(trainer.model).config
    base, file, dataset = getattr(objective, "base", None), folder / "config.json", trainer.train_dataset
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    adapter, state, title = not told, trainer.state, dataset_title(dataset.name)
    progress = {}
    if 0 <= state.global_step < state.max_steps:
        progress["finished"] = f"no, {state.global_step} of {state.max_steps} steps"
    classifier = adapter or bool(told.get("num_classes"))
    of_classifier: dict[str, Any] = (
        {"task": "classifier", "label_names": list(dataset.label_names or ())} if classifier else {}
    )
    encoder = trainer.adapter_base
    return EncoderReport(
        name=f"{objective.title} {config.architecture} {title.split('/')[-1]}",
        architecture=config.architecture,
        exported_format=told.get("model_type", "peft"),
        objective={
            "name": objective.title,
            "parameters": {k: v for k, v in vars(objective).items() if k != "base"} | (vars(base) if base else {}),
            "base": base.title if base is not None else None,
            "supervised": objective.needs_labels,
        },
        model_args=config.model_args or {},
        image_size=config.image_size,
        norm_branch=told.get("norm_branch"),
        hub_id=hub_id,
        dataset={"name": title, "n_images": len(dataset), "hub_id": title if "/" in title else None},
        threat_model=trainer.attack.to_dict() if objective.adversarial else None,
        training={**training_facts(trainer), **progress},
        command=command_line(),
        date=date.today().isoformat(),
        citation="\n\n".join(m.citation for m in (objective, base) if m is not None and m.citation) or None,
        encoder={"name": encoder, "hub_id": encoder} if encoder else {},
        **(environment or collect_environment()),
        **of_classifier,
    )
