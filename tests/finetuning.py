"""A fine-tuner on a tiny network, for tests that fine-tune; also run as a script in child processes.

    python tests/finetuning.py OUTPUT_DIR [--seconds_per_step 0.3] [--resume]

fine-tunes AutoLoRa for 12 steps, 4 per epoch, with a checkpoint every 5, and writes OUTPUT_DIR/final.pt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from training import tiny_images, tiny_model

from hf_robust.attacks import PGD
from hf_robust.data import ImageDataset
from hf_robust.finetuner import RobustFinetuner
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.held_out import split_validation
from hf_robust.objectives import Objective
from hf_robust.objectives.autolora import AutoLoRa


def tiny_arguments(folder: Path | str, **changes: Any) -> RobustFinetuningArguments:
    """3 epochs of 4 steps on 18 images, 6 held out."""
    values = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 5,
        "learning_rate": 0.05,
        "validation_fraction": 0.25,
        "validation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return RobustFinetuningArguments(**{**values, **changes})


def tiny_finetuner(
    folder: Path | str,
    objective: Objective,
    *,
    data: ImageDataset | None = None,
    model: Any = None,
    **changes: Any,
) -> RobustFinetuner:
    """A fine-tuner whose head starts at zero."""
    args = tiny_arguments(folder, **changes)
    train, validation = split_validation(data if data is not None else tiny_images(), args.validation_fraction, 0)
    model = model if model is not None else tiny_model(objective)
    if model.config.head == "classifier":
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
    return RobustFinetuner(model, args, objective, PGD(steps=2), train, validation)


def main() -> None:
    """Train as the module docstring says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seconds_per_step", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = tiny_finetuner(
        options.folder,
        AutoLoRa(rank=2),
        lr_rule="auto",
        auto_lr_epochs=[1, 2],
        save_strategy="steps",
        save_steps=5,
        seed=3,
    )
    before_step = trainer.before_step

    def slow() -> None:
        before_step()
        time.sleep(options.seconds_per_step)

    trainer.before_step = slow  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=options.resume)
    final = {"model": trainer.model.state_dict(), "best": trainer._best, "rate": trainer.rate.state_dict()}
    torch.save({**final, "log": trainer.state.log_history}, Path(options.folder, "final.pt"))


if __name__ == "__main__":
    main()
