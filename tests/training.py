"""A tiny network, tiny images and a trainer on them, for tests that train; also run as a script in child processes.

    python tests/training.py OUTPUT_DIR [--seconds_per_step 0.3] [--resume] [--coreset]

trains 12 steps (with a coreset 18) with a checkpoint every 4, slowly enough to be killed on the way, and writes
OUTPUT_DIR/final.pt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from hf_robust.adapters import with_adapter, with_lora_path
from hf_robust.attacks import PGD
from hf_robust.coresets import RCS, CoresetMethod
from hf_robust.data import ImageDataset
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives import Objective
from hf_robust.objectives.dynacl import DynACL
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.teachers import FrozenTeacher
from hf_robust.training_args import RobustTrainingArguments


def tiny_images(n: int = 24, seed: int = 0, classes: int = 3) -> ImageDataset:
    """Random images of `classes` classes, told apart by brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 120, (n, 3, 8, 8), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
    return ImageDataset.from_tensors(images.to(torch.uint8), labels, name="tiny")


def tiny_model(objective: Objective, seed: int = 0, **config: Any) -> RobustModelForPreTraining:
    """A ResNet with eight channels, with the LoRA path or the adapter that the method trains."""
    torch.manual_seed(seed)
    values = {
        "architecture": "resnet10_cifar",
        "model_args": {"channels": [8, 8, 8, 8], "stem_stride": 2},
        "image_size": 8,
        "norm_branches": objective.norm_branches,
        "head": objective.head,
        **({"num_classes": 3} if objective.needs_labels else {}),
        **objective.network,
    }
    model = RobustModelForPreTraining(RobustPretrainingConfig(**{**values, **config}))
    method: Any = objective
    if "lora" in method.paths:
        return with_lora_path(model, method.rank, method.init, method.norm_update)
    if method.trains == "adapter":
        rank = getattr(method, "adapter_rank", None) or method.rank
        return with_adapter(model, rank, getattr(method, "alpha", None))
    return model


def tiny_vit(**config: Any) -> dict[str, Any]:
    """Configuration of a transformer with two blocks, for `tiny_model`."""
    blocks = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return {"architecture": "vit_tiny_patch4_32", "model_args": blocks, **config}


def tiny_teacher(objective: Objective, seed: int = 5, **config: Any) -> FrozenTeacher | None:
    """A frozen network as wide as `tiny_model`, of other weights, for methods that learn from one."""
    if objective.teacher_kind != "frozen":
        return None
    with torch.random.fork_rng():
        return FrozenTeacher(tiny_model(objective, seed, **config), "tiny")


def tiny_rcs(**changes: Any) -> RCS:
    """Of 24 images 3 validate and 10 are chosen, after 3 rounds of warm-up."""
    return RCS(**{"fraction": 0.5, "warmup_epochs": 1, "interval": 1, "validation_fraction": 0.1, **changes})


def tiny_trainer(
    folder: Path | str,
    objective: Objective,
    *,
    data: ImageDataset | None = None,
    model: Any = None,
    coreset: CoresetMethod | None = None,
    teacher: Any = None,
    pseudo_labels: Any = None,
    **arguments: Any,
) -> RobustPretrainer:
    """A trainer for 2 epochs of 6 steps."""
    values = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.5,
        "warmup_epochs": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = RobustTrainingArguments(**{**values, **arguments})
    return RobustPretrainer(
        model if model is not None else tiny_model(objective),
        args,
        objective,
        PGD(steps=2),
        train_dataset=data if data is not None else tiny_images(),
        eval_dataset=tiny_images(9, seed=1),
        coreset=coreset,
        teacher=teacher if teacher is not None else tiny_teacher(objective),
        pseudo_labels=pseudo_labels,
    )


def main() -> None:
    """Train as the module docstring says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seconds_per_step", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--coreset", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = tiny_trainer(
        options.folder,
        DynACL(period=0.25, ema_decay=0.9),
        save_strategy="steps",
        save_steps=4,
        seed=3,
        probe_every=1,
        **({"coreset": tiny_rcs(), "num_train_epochs": 4} if options.coreset else {}),
    )
    before_step = trainer.before_step

    def slow() -> None:
        before_step()
        time.sleep(options.seconds_per_step)

    trainer.before_step = slow  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=options.resume)
    state = {"model": trainer.model.state_dict(), "teacher": trainer.teacher.state_dict()}
    torch.save({**state, "log": trainer.state.log_history}, Path(options.folder, "final.pt"))


if __name__ == "__main__":
    main()
