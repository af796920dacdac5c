"""The trainer of robust fine-tuning: held-out images decide which epoch stays, and how fast it learns."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_robust.adapters import AdapterModel, LoraPathModel, merge_adapter, save_adapter, without_lora
from hf_robust.attacks import PGD, frozen
from hf_robust.auto_lr import AutoLearningRate
from hf_robust.checkpoints import fingerprint
from hf_robust.classifiers import save_classifier
from hf_robust.data import ImageDataset
from hf_robust.evaluation.accuracy import Accuracy, measure_accuracy
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.hub import save_encoder
from hf_robust.memory_model import check_training_memory
from hf_robust.models.norm import NormBranches
from hf_robust.objectives import Objective, StepContext
from hf_robust.optim import step_decay
from hf_robust.trainer import RobustTrainer
from hf_robust.views import Views

__all__ = ["RobustFinetuner"]

logger = logging.getLogger(__name__)

_STATE, _BEST = "finetune.json", "best.safetensors"
_STEP_SIZE = 2 / 255  # of the attack on the validation images, as published


class RobustFinetuner(RobustTrainer):
    """Robust fine-tuning of a classifier: SLF, ALF, AFF, LoRA or AutoLoRa, judged on held-out training images.

    After every epoch standard and PGD-20 accuracy are measured on the validation images. They decide which weights
    stay (`args.keep`) and, with `args.lr_rule="auto"`, when the learning rate is halved; methods that ask for it
    (AutoLoRa) also get the accuracy of their natural path. The test images are no argument of this class.

    Args:
        model ([`RobustModelForPreTraining`]): with `head="classifier"`, such as [`build_classifier`] makes; for
            AutoLoRa with a LoRA path ([`with_lora_path`]), for LoRA with an adapter ([`with_adapter`]).
        args ([`RobustFinetuningArguments`]): training knobs.
        objective ([`Objective`]): SLF, ALF, AFF, LoRA, AutoLoRa.
        attack ([`PGD`], *optional*): the training attack; default: the method's own.
        train_dataset ([`ImageDataset`]): labelled images.
        validation_dataset ([`ImageDataset`], *optional*): those that decide, see `held_out.split_validation`.
        views ([`Views`], *optional*): default: at the model's image size.
        kwargs: passed on to [`RobustTrainer`].

    Raises:
        ValueError: if the arguments want validation images and there are none, or model and method do not fit.
    """

    args: RobustFinetuningArguments
    releases_encoder: bool = False
    shardable = False

    def __init__(
        self,
        model: Any,
        args: RobustFinetuningArguments,
        objective: Objective,
        attack: PGD | None = None,
        train_dataset: ImageDataset | None = None,
        validation_dataset: ImageDataset | None = None,
        views: Views | None = None,
        **kwargs: Any,
    ) -> None:
        _check_fit(model, args, objective, validation_dataset)
        _choose_what_trains(model, objective)
        attack = attack if attack is not None else objective.training_attack
        super().__init__(model, args, objective, attack, train_dataset=train_dataset, **kwargs)
        self.validation_dataset = validation_dataset
        self.views = views if views is not None else Views(self.model.config.image_size)
        # the training budget where it is L-inf, else the published one
        eps = attack.eps if attack.norm == "linf" else 8 / 255
        self.validation_attack = PGD(eps, _STEP_SIZE, args.validation_steps)
        self._start = fingerprint(model)
        self._restart()

    def _restart(self) -> None:
        self.rate = AutoLearningRate(self.args.learning_rate, self.args.halving_epochs)
        self._best: dict[str, Tensor] = {}
        self._best_of = (-1.0, -1.0, 0)  # PGD accuracy, standard accuracy, epoch
        self._standard_accuracy, self._measured_at = 0.0, -1

    # ------------------------------------------------------------------ one step
    def prepare_batch(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the views of the method; labels stay beside them."""
        batch = self.views(inputs["image"], self.objective.views, generator=generator)
        if self.args.channels_last:
            batch = {name: x.contiguous(memory_format=torch.channels_last) for name, x in batch.items()}
        return {**batch, "label": inputs["label"]}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Measure what the method asked for when it is time, then as [`RobustTrainer`]."""
        self._measure_on_request()
        return super().compute_loss(*args, **kwargs)

    def step_context(self, generator: torch.Generator, index: Tensor | None = None) -> StepContext:
        """Add the accuracy that the method asked for."""
        return dataclasses.replace(super().step_context(generator, index), standard_accuracy=self._standard_accuracy)

    def _measure_on_request(self) -> None:
        """At the beginning of an epoch and at equal distances within; once per step, also after a resume there."""
        request, step = self.objective.accuracy_request, self.state.global_step
        if request is None or self._measured_at == step:
            return
        position, parts = step % self._steps_per_round, max(1, request.per_epoch - 1)
        between = request.per_epoch > 1 and position % max(1, self._steps_per_round // parts) == 0
        if position and not between:
            return
        self.stop_if_not_finite()  # reads a value from the device: not in every step
        held_out = cast(ImageDataset, self.validation_dataset)  # checked before training
        dataset = held_out if request.split == "validation" else self.train_dataset
        view = "original" if request.split == "validation" else self.objective.views[0]
        self._standard_accuracy = self.measure(dataset, attack=None, path=request.path, view=view, seed=step).standard
        self._measured_at = step
        weights = self.objective.term_weights(self._standard_accuracy)
        self.log({"path_standard_accuracy": self._standard_accuracy, **weights})

    # ------------------------------------------------------------------ measuring
    def measure(
        self,
        dataset: ImageDataset,
        attack: PGD | None = None,
        *,
        path: str | None = None,
        view: str = "original",
        seed: int | None = None,
        progress: bool = False,
    ) -> Accuracy:
        """Count right answers, on clean images and under an attack; all processes take part.

        Args:
            dataset ([`ImageDataset`]): labelled images.
            attack ([`PGD`], *optional*): default: none.
            path (`str`, *optional*): norm branch, or `"lora"`; default: the branch that leaves.
            view (`str`, defaults to `"original"`): what is classified.
            seed (`int`, *optional*): of the random starts; default: that of the training.
            progress (`bool`, defaults to `False`): show a bar.

        Returns:
            [`Accuracy`].
        """
        module = self.accelerator.unwrap_model(self.model)
        branch = path if path is not None else module.default_branch
        with frozen(module):
            return measure_accuracy(
                partial(_logits, module, branch),
                dataset,
                size=self.views.size,
                attack=attack,
                view=view,
                batch_size=self.args.per_device_eval_batch_size,
                seed=self.args.seed if seed is None else seed,
                device=self.args.device,
                shared=True,
                progress=progress and not self.args.disable_tqdm and self.is_world_process_zero(),
            )

    def end_epoch(self, before: float, epoch: float) -> None:
        """Measure on the validation images; keep the best weights, halve the rate when it is time."""
        unfinished = math.floor(epoch + 1e-6) == math.floor(before + 1e-6)
        if self.validation_dataset is None or (unfinished and self.state.global_step < self.state.max_steps):
            return
        self.stop_if_not_finite()
        found = self.measure(self.validation_dataset, self.validation_attack)
        number, attacked = math.ceil(epoch - 1e-6), cast(float, found.attacked)
        decision = self.rate.update(number, attacked)
        module = self.accelerator.unwrap_model(self.model)
        if (attacked, found.standard) > self._best_of[:2]:  # of equals under attack, the better on clean images
            self._best_of = (attacked, found.standard, number)
            self._best = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        if decision.restore:
            module.load_state_dict(self._best)
        if self.args.lr_rule == "auto":
            self._set_rate(decision.learning_rate)
        halved = {"learning_rate_halved": decision.learning_rate} if decision.restore else {}
        self.log({f"validation_{name}": value for name, value in found.to_dict().items()} | halved)

    # ------------------------------------------------------------------ learning rate
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule of `args.lr_rule`; cosine as in pre-training."""
        args = self.args
        if args.lr_rule == "cosine" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)

        def multiplier(step: int) -> float:
            if args.lr_rule == "auto":
                return self.rate.learning_rate / args.learning_rate
            return step_decay(self._epoch_at(step), 1.0, args.lr_milestones or ())

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, multiplier)
        return self.lr_scheduler

    def _set_rate(self, rate: float) -> None:
        # The schedule has already computed the rate of the next step, and reports it to the log.
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # inside Accelerate's wrapper
        schedule._last_lr = [rate] * len(self.optimizer.param_groups)

    # ------------------------------------------------------------------ the whole run
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume, and leave the weights that `args.keep` asks for in the model."""
        check_training_memory(self)
        self._restart()
        output = super().train(*args, **kwargs)
        if self.args.keep == "best" and self._best:
            self.accelerator.unwrap_model(self.model).load_state_dict(self._best)
            self._warn_of_chance()
        return output

    def _warn_of_chance(self) -> None:
        chance, (attacked, standard, epoch) = 1 / self.train_dataset.num_classes, self._best_of
        if attacked <= chance:
            logger.warning(
                "the best accuracy under attack on held-out images, %.1f %% after epoch %d, is not above chance "
                "(%.1f %%), so the kept weights say little (%.1f %% on clean images): the encoder is not robust, or "
                "the training was too short; --keep last keeps the last epoch",
                *(100 * attacked, epoch, 100 * chance, 100 * standard),
            )

    @property
    def kept_epoch(self) -> int | None:
        """The epoch whose weights stay, counted from 1; `None` for the last one."""
        return self._best_of[2] if self.args.keep == "best" and self._best else None

    def save_beside(self, checkpoint: Path) -> None:
        """Add the controllers and the best weights so far."""
        super().save_beside(checkpoint)
        state = {"rate": self.rate.state_dict(), "accuracy": self._standard_accuracy, "measured_at": self._measured_at}
        (checkpoint / _STATE).write_text(json.dumps({**state, "best": self._best_of}))
        if self._best:
            plain = {name: value.contiguous() for name, value in self._best.items()}  # channels_last is not saved
            save_file(plain, checkpoint / _BEST)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / _STATE).read_text())
        self.rate.load_state_dict(state["rate"])
        self._standard_accuracy, self._measured_at = state["accuracy"], state["measured_at"]
        self._best_of = tuple(state["best"])
        self._best = load_file(folder / _BEST) if (folder / _BEST).is_file() else {}

    def describe_run(self) -> dict[str, str]:
        """Add what decides during fine-tuning to what a resumed run must agree with."""
        args = self.args
        rule = (args.lr_rule, args.halving_epochs, args.keep, args.validation_steps, args.nesterov)
        held_out = len(self.validation_dataset) if self.validation_dataset is not None else 0
        return {
            **super().describe_run(),
            "views": repr(self.views),
            "rate, halving epochs, kept, validation steps, nesterov": repr(rule),
            "validation images": str(held_out),
            "weights at the start": self._start,
        }

    # ------------------------------------------------------------------ what leaves
    @property
    def classifier_model(self) -> Any:
        """A plain classifier: of AutoLoRa the path without adapters, of LoRA with the adapters taken in."""
        module = self.accelerator.unwrap_model(self.model)
        if isinstance(module, LoraPathModel):
            return without_lora(module)
        return merge_adapter(module) if isinstance(module, AdapterModel) else module

    def save_classifier(self, directory: str | Path, **kwargs: Any) -> Path:
        """Write the classifier as an ordinary transformers model; see `classifiers.save_classifier`.

        Args:
            directory (`str` or `Path`): target folder.
            kwargs: passed on.

        Returns:
            `Path`: the folder.
        """
        self.stop_if_not_finite()
        model = self.classifier_model
        kwargs = {"label_names": self.train_dataset.label_names, "branch": model.default_branch, **kwargs}
        return save_classifier(model, directory, **kwargs)

    def save_adapter(self, directory: str | Path, base: str) -> Path:
        """Write the adapter and the head of mode LoRA as a PEFT folder; see `adapters.save_adapter`.

        Args:
            directory (`str` or `Path`): target folder.
            base (`str`): the encoder it belongs to, folder or repository.

        Returns:
            `Path`: the folder.
        """
        self.stop_if_not_finite()
        module = self.accelerator.unwrap_model(self.model)
        return save_adapter(module, directory, base, self.train_dataset.label_names)

    def save_encoder(self, directory: str | Path, **kwargs: Any) -> Path:
        """Write the network without its head as an encoder; see `hub.save_encoder`.

        Args:
            directory (`str` or `Path`): target folder.
            kwargs: passed on.

        Returns:
            `Path`: the folder.
        """
        self.stop_if_not_finite()
        model = self.classifier_model
        return save_encoder(model, directory, branch=model.default_branch, **kwargs)

    def save_release(self, directory: Path) -> Path:
        """Write what fine-tuning publishes: the classifier, the adapter, or (`releases_encoder`) the encoder.

        With `args.keep="best"` the best weights so far are written, whatever the model holds at the moment.
        """
        module = self.accelerator.unwrap_model(self.model)
        held = {name: value.detach().clone() for name, value in module.state_dict().items()}
        try:
            if self.args.keep == "best" and self._best:
                module.load_state_dict(self._best)
            if self.releases_encoder:
                return self.save_encoder(directory)
            if isinstance(module, AdapterModel) and self.adapter_base is not None:
                return self.save_adapter(directory, self.adapter_base)
            return self.save_classifier(directory)
        finally:
            module.load_state_dict(held)


def _logits(module: Any, branch: str, images: Tensor) -> Tensor:
    return module.embed(images, branch)


def _check_fit(
    model: Any, args: RobustFinetuningArguments, objective: Objective, validation: ImageDataset | None
) -> None:
    request = objective.accuracy_request
    reasons: Mapping[str, bool] = {
        "keep='best' chooses the epoch": args.keep == "best",
        "lr_rule='auto' halves the rate": args.lr_rule == "auto",
        f"{objective.title} weighs its terms": request is not None and request.split == "validation",
    }
    wanted = [reason for reason, holds in reasons.items() if holds]
    if validation is None and wanted:
        other = "keep='last' and lr_rule='milestones'"
        if reasons[f"{objective.title} weighs its terms"]:
            other += ", with formulation='released', which weighs by training images"
        raise ValueError(
            f"{wanted[0]} by validation images and validation_dataset is missing: hold images out with "
            f"split_validation(dataset, 0.05, seed), or write {other}"
        )
    pairs = {"rank": "lora_rank", "init": "lora_init", "norm_update": "norm_update", "alpha": "lora_alpha"}
    for mine, theirs in pairs.items():
        built = getattr(model.config, theirs, None)
        if hasattr(objective, mine) and hasattr(model.config, theirs) and getattr(objective, mine) != built:
            raise ValueError(
                f"{objective.title} says {mine}={getattr(objective, mine)!r}, the adapters of the model were built "
                f"with {built!r}: give both the same"
            )


def _choose_what_trains(model: Any, objective: Objective) -> None:
    if objective.trains == "classifier":
        model.freeze_backbone()
    for layer in model.modules():
        if isinstance(layer, NormBranches):
            for branch in objective.idle_branches:  # without a gradient, which distributed training would wait for
                getattr(layer, branch).requires_grad_(False)
