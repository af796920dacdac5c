"""What a finished training says about itself in reports and cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_robust.trainer import RobustTrainer

__all__ = ["dataset_title", "training_facts"]


def dataset_title(source: str) -> str:
    """The data set as cards and tables call it: a Hub id, or the last part of a path.

    Args:
        source (`str`): what the user asked for.
    """
    path = Path(source)
    return path.resolve().name if path.exists() else source


def training_facts(trainer: RobustTrainer) -> dict[str, Any]:
    """The entry `training` of a report.

    Args:
        trainer ([`RobustTrainer`]): after the training.

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
