"""The trainer of self-supervised pre-training: views in, a linear probe now and then, an encoder out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_robust.adapters import AdapterModel, merge_adapter
from hf_robust.attacks import frozen
from hf_robust.checkpoints import to_resume
from hf_robust.evaluation.probe import ProbeResult, probe_encoder
from hf_robust.hub import save_encoder
from hf_robust.memory_model import check_training_memory
from hf_robust.pseudo_labels import Labelling
from hf_robust.trainer import RobustTrainer
from hf_robust.views import Views

__all__ = ["RobustPretrainer"]


class RobustPretrainer(RobustTrainer):
    """Self-supervised pre-training: random views from uint8 images, a linear probe now and then, encoder out.

    Args:
        model ([`RobustModelForPreTraining`]): backbone with norm branches and projector.
        args ([`RobustTrainingArguments`]): training knobs.
        objective ([`Objective`]): SimCLR, ACL, DynACL, AIR, ...
        attack ([`PGD`], *optional*): the training attack.
        train_dataset ([`ImageDataset`]): images; labels are not used for training.
        eval_dataset ([`ImageDataset`], *optional*): labelled images that the probe is evaluated on.
        views ([`Views`], *optional*): default: bicubic crops at the model's image size, as the objective asks for.
        teacher (`str`, `Path` or `nn.Module`, *optional*): frozen teacher of the methods that have one (DeACL, FARE),
            or the encoder whose features become pseudo-labels (AdvCL; default: the model itself as it is given):
            folder, Hub repository, timm name or network, see `teachers.load_teacher`.
        pseudo_labels ([`PseudoLabels`] or path of a file, *optional*): of the methods that learn them (AdvCL).
    """

    def __init__(
        self, *args: Any, views: Views | None = None, teacher: Any = None, pseudo_labels: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs | {"teacher": teacher})
        self._check_probe()
        if views is None:
            views = Views(self.model.config.image_size, **self.objective.view_options)
        self.views = views
        self.labelling = Labelling(self.objective, self.train_dataset, pseudo_labels, teacher)

    def prepare_batch(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the objective's views at the present augmentation strength."""
        batch = self.views(inputs["image"], self.objective.views, strength=self._strength, generator=generator)
        if self.args.channels_last:
            batch = {name: x.contiguous(memory_format=torch.channels_last) for name, x in batch.items()}
        labels = {"label": inputs["label"]} if "label" in inputs else {}
        return {**batch, **labels, **self.labelling.of(inputs)}

    def originals(self, images: Tensor) -> Tensor:
        """Un-augmented images at the size of the views."""
        x = self.views(images, ("original",))["original"]
        return x.contiguous(memory_format=torch.channels_last) if self.args.channels_last else x

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make pseudo-labels where the method learns them, see that the batch fits (`memory_model`), then train."""
        resume = to_resume(str(self.args.output_dir), resume_from_checkpoint)
        if not resume:
            self.labelling.prepare(self.accelerator.unwrap_model(self.model), self.args)
        check_training_memory(self)
        return super().train(resume, *args, **kwargs)

    def save_beside(self, checkpoint: Path) -> None:
        """Add the pseudo-labels."""
        super().save_beside(checkpoint)
        self.labelling.save(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.labelling.load(resume_from_checkpoint)

    def describe_run(self) -> dict[str, str]:
        """Add the views to what a resumed run must agree with."""
        return {**super().describe_run(), "views": repr(self.views)}

    @property
    def encoder_model(self) -> Any:
        """The network that leaves the house: the momentum encoder where the method has one, else the model.

        Adapters have been taken in: a copy then, made anew on every call.
        """
        if self.objective.teacher_kind == "ema":
            return self.teacher
        return merge_adapter(self.network) if isinstance(self.network, AdapterModel) else self.network

    @property
    def encoder_branch(self) -> str:
        """The norm branch that leaves the house: `"adv"` where the method has it."""
        return self.accelerator.unwrap_model(self.model).default_branch

    def probe(self, n_train: int | None = None, n_eval: int | None = None, **kwargs: Any) -> ProbeResult:
        """Fit a linear probe on the encoder and measure standard and PGD-20 accuracy.

        Args:
            n_train, n_eval (`int`, *optional*): how many images to use; default: all.
            kwargs: passed to `probe_encoder`.

        Returns:
            [`ProbeResult`]: the accuracies, with n.
        """
        network, branch = self.encoder_model.to(self.args.device), self.encoder_branch
        if self.attack.norm == "linf":  # the probe's attack is L-inf: the training budget, or the published one
            kwargs.setdefault("eps", self.attack.eps)
        with frozen(network):
            return probe_encoder(
                lambda x: network.features(x, branch),
                self.train_dataset,
                self.eval_dataset,
                size=network.config.image_size,
                n_train=n_train,
                n_eval=n_eval,
                device=self.args.device,
                seed=self.args.seed,
                **kwargs,
            )

    @property
    def can_probe(self) -> bool:
        """Whether there are labels to fit a probe on and to measure it with."""
        sets = (self.train_dataset, self.eval_dataset)
        return all(s is not None and s.labels is not None for s in sets) and self.train_dataset.num_classes > 1

    def _check_probe(self) -> None:
        """Find out now, not after hours, that the evaluation set does not fit the training set."""
        if not self.can_probe:
            return
        unseen = set(self.eval_dataset.labels.tolist()) - set(self.train_dataset.labels.tolist())
        if unseen:
            raise ValueError(
                f"the evaluation images have the classes {sorted(unseen)[:5]} that no training image has: a probe "
                "cannot know them; use splits of one data set, or leave eval_dataset out"
            )

    def end_epoch(self, before: float, epoch: float) -> None:
        """Run the probe every `probe_every` epochs when labels exist."""
        every = self.args.probe_every
        if not every or not self.can_probe or not self.is_world_process_zero():
            return
        if math.floor(epoch / every + 1e-6) == math.floor(before / every + 1e-6):
            return
        classes = len(self.train_dataset.labels.unique())  # a stratified subset holds each of them
        n_train, n_eval = (max(n, classes) for n in (self.args.probe_examples, self.args.probe_eval_examples))
        result = self.probe(n_train, n_eval, progress=False)
        self.log({f"probe_{name}": value for name, value in result.to_dict().items()})

    def save_encoder(self, directory: str | Path, **kwargs: Any) -> Path:
        """Write the encoder as an ordinary transformers/timm model; see `hub.save_encoder`.

        Args:
            directory (`str` or `Path`): target folder.

        Returns:
            `Path`: the folder.
        """
        self.stop_if_not_finite()
        return save_encoder(self.encoder_model, directory, branch=self.encoder_branch, **kwargs)

    def save_release(self, directory: Path) -> Path:
        """Write the encoder, which is what pre-training publishes."""
        return self.save_encoder(directory)
