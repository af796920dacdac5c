"""What the benchmarks run on: networks by name, images, and the library's own training step, called from outside."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from transformers import PrinterCallback

from hf_robust.adapters import with_lora_path
from hf_robust.attacks import PGD
from hf_robust.data import ImageDataset
from hf_robust.finetuner import RobustFinetuner
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives import Objective
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.training_args import RobustTrainingArguments

__all__ = ["DTYPES", "MODELS", "FixedViews", "LibraryStep", "batch_of", "build_model", "library_step", "modes"]

# name on the command line: architecture, its arguments, image size
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18": ("resnet18_cifar", {}, 32),
    "thin16": ("resnet18_cifar", {"channels": [16, 32, 64, 128]}, 32),
    "wrn28_10": ("wide_resnet28_10", {}, 32),
    "resnet50": ("resnet50", {}, 224),
    "vit_tiny": ("vit_tiny_patch4_32", {}, 32),
    "tiny": ("resnet10_cifar", {"channels": [8, 8, 8, 8], "stem_stride": 2}, 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
CLASSES = 10
LR = 0.1
# What a mode changes in the training arguments; "eager" is what the library does by itself.
_MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"torch_compile": True},
    "graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    "no_fold": {"fold_norms": False},
    "nchw": {"channels_last": False},
}


def modes(options: argparse.Namespace) -> list[str]:
    """Modes of the library's side: what was asked for, eager when nothing was.

    Args:
        options (`argparse.Namespace`): has `mode`.
    """
    return list(dict.fromkeys(options.mode or ["eager"]))


def network(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    """Architecture, its arguments, image size: of `--backbone`, or of `--model` by our name or timm's."""
    if getattr(options, "backbone", None):
        return options.backbone, options.model_args or {}, 32
    name = getattr(options, "model", None) or "resnet18"
    architecture, model_args, size = MODELS.get(name, (name, {}, 224))
    return architecture, getattr(options, "model_args", None) or model_args, size


def build_model(options: argparse.Namespace, objective: Objective, **config: Any) -> RobustModelForPreTraining:
    """A network for a method, the same one whenever it is called, on the device, in training mode."""
    architecture, model_args, size = network(options)
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "architecture": architecture,
        "model_args": model_args,
        "image_size": size,
        "norm_branches": objective.norm_branches,
        **({"head": "classifier", "num_classes": CLASSES} if objective.needs_labels else {}),
    }
    model = RobustModelForPreTraining(RobustPretrainingConfig(**{**values, **config}))
    return model.to(options.device).train()


def batch_of(options: argparse.Namespace, objective: Objective, images: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch as a method reads it: random smooth views in [0, 1] on the device, and labels."""
    size, generator = network(options)[2], torch.Generator().manual_seed(seed)
    batch: dict[str, Tensor] = {}
    for name in objective.views:
        coarse = torch.rand(images, 3, max(2, size // 4), max(2, size // 4), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
        batch[name] = noisy.clamp(0, 1).to(options.device)
    batch["label"] = torch.randint(0, CLASSES, (images,), generator=generator).to(options.device)
    return batch


@dataclasses.dataclass(frozen=True, repr=False)
class FixedViews:
    """Stands in for `Views`: the same batch in every step, so that a step is timed without its augmentation."""

    batch: Mapping[str, Tensor]
    size: int

    def __call__(
        self, images: Tensor, names: Any, *, strength: float = 1.0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """As many rows of the named views as there are images."""
        return {name: self.batch[name][: len(images)] for name in names}


class LibraryStep:
    """The library's training step: what its trainer does between two batches, without loading, schedule and log.

    The trainer trains one step at a vanishing learning rate first, so that everything is wrapped as in a training, and
    is then called from outside.

    Args:
        trainer (`Any`): not yet trained.
        batch (`Mapping[str, torch.Tensor]`): what its views return; has `label`.
        lr (`float`): learning rate.
    """

    def __init__(self, trainer: Any, batch: Mapping[str, Tensor], lr: float = LR) -> None:
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer._measured_at = trainer.state.global_step  # an accuracy that a method asks for is no part of a step
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        n, size = len(batch["label"]), trainer.views.size
        images = torch.zeros(n, 3, size, size, dtype=torch.uint8, device=batch["label"].device)
        self.inputs = {"image": images, "label": batch["label"]}

    def __call__(self) -> Tensor:
        """Train one step; the loss before it."""
        trainer = self.trainer
        loss = trainer.training_step(trainer.model_wrapped, dict(self.inputs))
        trainer.before_step()
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()
        trainer.after_step()
        return loss


def library_step(
    options: argparse.Namespace,
    objective: Objective,
    batch: Mapping[str, Tensor],
    *,
    dtype: str = "fp32",
    mode: str = "eager",
    attack: PGD | None = None,
) -> LibraryStep:
    """A training step of the library, ready to be called.

    Args:
        options (`argparse.Namespace`): network, device, `training_args`.
        objective ([`Objective`]): the method.
        batch (`Mapping[str, torch.Tensor]`): of `batch_of`.
        dtype (`str`): `"fp32"`, `"bf16"`, or `"fp64"` for tests.
        mode (`str`): of `modes`.
        attack ([`PGD`], *optional*): default: the method's own.

    Raises:
        ValueError: when the library refuses the mode.
    """
    with _shared_state():
        return _library_step(options, objective, batch, dtype, mode, attack)


@contextlib.contextmanager
def _shared_state() -> Iterator[None]:
    """What trainers share in a process stays as it was when one is refused: steps that were made before go on."""
    states: Any = (AcceleratorState._shared_state, PartialState._shared_state)
    kept = [dict(state) for state in states]
    try:
        yield
    except Exception:
        for state, values in zip(states, kept, strict=True):
            state.clear()
            state.update(values)
        raise


def _library_step(
    options: argparse.Namespace,
    objective: Objective,
    batch: Mapping[str, Tensor],
    dtype: str,
    mode: str,
    attack: PGD | None,
) -> LibraryStep:
    model: Any = build_model(options, objective)
    if "lora" in objective.paths:
        values: Any = objective
        model = with_lora_path(model, values.rank, values.init, values.norm_update)
    model.to(DTYPES["fp64" if dtype == "fp64" else "fp32"])
    # Setting up takes a step of its own: of four images, where no graph is recorded for a shape.
    rows = len(batch["label"]) if mode in ("compiled", "graphs") or options.device == "cuda" else 4
    rows = min(rows, len(batch["label"]))
    size = network(options)[2]
    everywhere = rows * int(os.environ.get("WORLD_SIZE", 1))
    levels = torch.zeros(everywhere, 3, size, size, dtype=torch.uint8)
    images = ImageDataset.from_tensors(levels, torch.arange(everywhere) % 2)
    live = {name: x.double() if dtype == "fp64" and x.is_floating_point() else x for name, x in batch.items()}
    views: Any = FixedViews(live, size)
    attack = attack or objective.training_attack
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-30,
        "warmup_epochs": 0.0,
        "bf16": dtype == "bf16",
        "channels_last": True,
        "use_cpu": options.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10**9,
        "logging_first_step": False,
        "disable_tqdm": True,
        **_MODES[mode],
        **(options.training_args or {}),
    }
    if objective.needs_labels:
        arguments |= {"keep": "last", "validation_steps": 1}
        args: Any = RobustFinetuningArguments(**arguments)
        return LibraryStep(RobustFinetuner(model, args, objective, attack, images, images, views), live)
    pretraining = RobustTrainingArguments(**arguments)
    trainer = RobustPretrainer(model, pretraining, objective, attack, train_dataset=images, views=views)
    return LibraryStep(trainer, live)


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object of a flag.

    Args:
        text (`str`): as typed.

    Raises:
        ValueError: for anything else.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, got {text!r}: write for example '{{\"fold_norms\": false}}'")
    return value
