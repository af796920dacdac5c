"""The contract of an objective: what it needs, and the named loss terms it returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_robust.attacks import LossFn

__all__ = ["Objective", "StepContext", "check_fit"]


@dataclass(frozen=True)
class StepContext:
    """What the trainer hands to an objective beside model and batch.

    Args:
        attack (`Callable[[LossFn, Tensor], Tensor]`): the training attack, ready to use: the model is frozen around
            it, autocast and the step's own random generator are set.
        progress (`float`): training progress in [0, 1], the only clock; weights and strength are functions of it.
        teacher (`nn.Module`, *optional*): the second network of methods that declare `teacher_kind`.
        autocast (`Callable[[], AbstractContextManager]`): the precision of the training, for passes of the teacher
            (the model and the attack are in it already).
    """

    attack: Callable[[LossFn, Tensor], Tensor]
    progress: float = 0.0
    teacher: Any = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Objective:
    """Base class of all methods: a dataclass whose fields are its hyper-parameters, flags and card entry.

    It owns no parameters and keeps no model. Attributes declare what it needs:

    - `views`: keys of the batch it reads, names that `hf_robust.views.Views` makes (`"view_1"`, `"view_2"`,
      `"original"`, `"padded_crop"`, `"resized_crop"`);
    - `norm_branches`: normalisation branches it runs images through; must equal the encoder's;
    - `trains`: `"all"` or `"classifier"`;
    - `needs_labels`: whether the batch holds `label`, int64 `(N,)`; supervised methods only;
    - `attack_in_eval_mode`: whether the attack sees the network in evaluation mode;
    - `teacher_kind`: `None` or `"ema"` (the trainer builds, updates, saves and exports it);
    - `citation`: BibTeX of the method, for the model card.
    """

    trains: ClassVar[str] = "all"
    needs_labels: ClassVar[bool] = False
    attack_in_eval_mode: ClassVar[bool] = True
    citation: ClassVar[str] = ""

    @property
    def views(self) -> tuple[str, ...]:
        """Views this configuration reads from the batch: two random ones by default."""
        return ("view_1", "view_2")

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """Branches this configuration uses, in the order clean, adv."""
        return ("clean", "adv")

    @property
    def teacher_kind(self) -> str | None:
        """Kind of second network: none by default."""
        return None

    @property
    def title(self) -> str:
        """Name in tables and cards, in the paper's spelling."""
        return type(self).__name__

    def strength(self, progress: float) -> float:
        """Augmentation strength at a training progress; 1 is the published SimCLR pipeline.

        Args:
            progress (`float`): in [0, 1].

        Returns:
            `float` in [0, 1].
        """
        return 1.0

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Compute the weighted loss terms of one batch; the trainer sums and logs them.

        Args:
            model (`nn.Module`): the (possibly wrapped) pre-training model; called exactly once per step, as
                `model([(branch, images), ...])`, so that distributed wrappers see one forward pass.
            batch (`dict[str, torch.Tensor]`): the views, `(N, 3, H, W)` each, pixels in [0, 1].
            context (`StepContext`): attack, progress, teacher.

        Returns:
            `dict[str, torch.Tensor]`: named scalars whose sum is the loss.
        """
        raise NotImplementedError

    def candidate_passes(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext
    ) -> list[tuple[str, Tensor]]:
        """Attack one candidate minibatch of coreset selection and say which images pass which branch.

        Args:
            model (`nn.Module`): the unwrapped model, frozen and in evaluation mode.
            batch (`dict[str, torch.Tensor]`): as in `__call__`.
            context (`StepContext`): the attack that scores candidates.

        Returns:
            `list[tuple[str, torch.Tensor]]`: branch and images `(M, 3, H, W)` in [0, 1], for `candidate_losses`.

        Raises:
            NotImplementedError: the method has no loss by which a coreset could be chosen.
        """
        raise NotImplementedError(
            f"{self.title} has no loss by which images could be chosen: use --coreset random, or train ACL, DynACL, "
            "AIR or SAT"
        )

    def candidate_losses(self, outputs: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Loss of every image of a candidate minibatch, un-weighted and not gathered over processes.

        Args:
            outputs (`list[torch.Tensor]`): head outputs `(M, P)` of each pass of `candidate_passes`.
            batch (`dict[str, torch.Tensor]`): as in `__call__`.

        Returns:
            `torch.Tensor` of shape `(N,)`: their mean is the loss of the minibatch.
        """
        raise NotImplementedError


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive.

    Args:
        temperature (`float`): of the contrastive loss.

    Raises:
        ValueError: with the published value.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: the published value is 0.5")


def unwrapped(model: Any) -> Any:
    """The module inside a distributed wrapper, where `embed` lives."""
    return getattr(model, "module", model)


def check_fit(objective: Objective, model: Any, dataset: Any | None = None) -> None:
    """Refuse a model or a training set that does not suit the method.

    Args:
        objective ([`Objective`]): the method.
        model (`Any`): has `config.norm_branches` and, for supervised methods, `config.head`.
        dataset (`Any`, *optional*): has `labels`, `num_classes` and `name`.

    Raises:
        ValueError: for other norm branches than the method's, a head of another kind, missing labels.
    """
    has = tuple(model.config.norm_branches)
    if set(has) != set(objective.norm_branches):
        raise ValueError(
            f"{objective.title} runs images through the norm branches {list(objective.norm_branches)}, the model has "
            f"{list(has)}: build the model with norm_branches={tuple(objective.norm_branches)!r}"
        )
    head, wanted = model.config.head, "classifier" if objective.needs_labels else "projector"
    if head != wanted:
        raise ValueError(
            f"{objective.title} trains a {wanted}, the model has a {head}: build the model with head={wanted!r}"
        )
    if dataset is None or not objective.needs_labels:
        return
    if dataset.labels is None or len(dataset.labels.unique()) < 2:
        found = "no labels" if dataset.labels is None else "images of one class only"
        raise ValueError(
            f"{objective.title} is supervised and {dataset.name!r} has {found}: name a label column "
            "(--label_column), or train a self-supervised method such as --objective acl"
        )
    if dataset.num_classes > model.config.num_classes:
        raise ValueError(
            f"the classifier has {model.config.num_classes} outputs and {dataset.name!r} {dataset.num_classes} "
            f"classes: build the model with num_classes={dataset.num_classes}"
        )
