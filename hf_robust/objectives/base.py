"""The contract of an objective: what it needs, and the named loss terms it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_robust.attacks import PGD, LossFn
from hf_robust.losses import cross_entropy, kl_divergence

__all__ = ["AccuracyRequest", "Objective", "StepContext", "SupervisedObjective"]


@dataclass(frozen=True)
class AccuracyRequest:
    """What a method wants the trainer to measure while it trains: the standard accuracy of one path.

    Args:
        path (`str`): what `model.embed` takes as `branch`, such as `"lora"` or `"adv"`.
        split (`str`): `"validation"`: held-out images, un-augmented; `"train"`: augmented training images.
        per_epoch (`int`): measurements per epoch, the first at its beginning; 1 or more.
    """

    path: str
    split: Literal["validation", "train"]
    per_epoch: int


def unwrapped(model: Any) -> Any:
    """The module inside a distributed wrapper, where `embed` lives."""
    return getattr(model, "module", model)


@dataclass(frozen=True)
class StepContext:
    """What the trainer hands to an objective beside model and batch.

    Args:
        attack (`Callable[[LossFn, Tensor], Tensor]`): the training attack, ready to use: the model is frozen around
            it, autocast and the step's own random generator are set.
        progress (`float`): training progress in [0, 1], the only clock; weights and strength are functions of it.
        teacher (`nn.Module`, *optional*): the second network of methods that declare `teacher_kind`; a frozen one is
            called with images `(N, 3, H, W)` in [0, 1] and gives features `(N, D)` without a graph.
        autocast (`Callable[[], AbstractContextManager]`): the precision of the training, for passes of the teacher
            (the model and the attack are in it already).
        standard_accuracy (`float`): last answer to the objective's `accuracy_request`, in [0, 1]; 0 before the first.
        memory (`dict[str, float]`): numbers that the method keeps from step to step, the same on all processes; it
            writes them, the trainer saves them with its checkpoints.
        seen (`Callable[[Any], Any]`): the network to attack in the place of a (possibly wrapped) model or teacher,
            with its `features`, `head` and `embed`: the same function in the mode of the attack, perhaps faster.
            Asked for once per attack, right before it: it does not follow later changes of the weights.
    """

    attack: Callable[[LossFn, Tensor], Tensor]
    progress: float = 0.0
    teacher: Any = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    standard_accuracy: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)
    seen: Callable[[Any], Any] = unwrapped


@dataclass
class Objective:
    """Base class of all methods: a dataclass whose fields are its hyper-parameters, flags and card entry.

    It owns no parameters and keeps no model. Attributes declare what it needs:

    - `views`: keys of the batch it reads, names that `hf_robust.views.Views` makes (`"view_1"`, `"view_2"`,
      `"original"`, `"padded_crop"`, `"resized_crop"`, `"high_frequency"`);
    - `norm_branches`: normalisation branches it runs images through; must equal the encoder's;
    - `trains`: `"all"`, `"classifier"` (the encoder stands still, running statistics included) or `"adapter"` (the
      encoder stands still, its adapters and the classifier train);
    - `needs_labels`: whether the batch holds `label`, int64 `(N,)`; supervised methods only;
    - `head`: what stands on the features: `"projector"`, `"classifier"` or `"none"`;
    - `network`: values of the model's configuration it was published with; the flags of the network override them;
    - `view_options`: values of `hf_robust.views.Views` it was published with, beside size and interpolation;
    - `pseudo_classes`: numbers of clusters K whose labels the batch holds as `pseudo_label_K`, int64 `(N,)`;
    - `attack_in_eval_mode`: whether the attack sees the network in evaluation mode;
    - `teacher_kind`: `None`, `"ema"` (the trainer builds, updates, saves and exports it) or `"frozen"` (an encoder
      that is given to the trainer and never changes);
    - `starts_from_teacher`: whether training begins at the weights of the frozen teacher;
    - `training_attack`: what the attack's flags default to;
    - `recipe`: published training settings, names of training arguments with their values, which flags default to;
      empty where the training arguments' own defaults are the published ones;
    - `citation`: BibTeX of the method, for the model card;
    - `take_when`: when it is better than its neighbours, half a sentence for the table of methods.
    """

    trains: ClassVar[Literal["all", "classifier", "adapter"]] = "all"
    needs_labels: ClassVar[bool] = False
    training_attack: ClassVar[PGD] = PGD()
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    citation: ClassVar[str] = ""
    take_when: ClassVar[str] = ""

    @property
    def views(self) -> tuple[str, ...]:
        """Views this configuration reads from the batch: two random ones by default."""
        return ("view_1", "view_2")

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """Branches this configuration uses, in the order clean, adv."""
        return ("clean", "adv")

    @property
    def adversarial(self) -> bool:
        """Whether it attacks its images."""
        return "adv" in self.norm_branches

    @property
    def paths(self) -> tuple[str, ...]:
        """What it passes to the model as `branch`: the norm branches, unless the network has a path beside them."""
        return self.norm_branches

    @property
    def idle_branches(self) -> tuple[str, ...]:
        """Norm branches that only the attack looks through, whose scales and shifts get no gradient: none."""
        return ()

    @property
    def accuracy_request(self) -> AccuracyRequest | None:
        """Accuracy that the trainer should measure on the way: none by default."""
        return None

    def term_weights(self, standard_accuracy: float) -> dict[str, float]:
        """Weights of the loss terms that follow from the accuracy it asked for, to be logged: none by default.

        Args:
            standard_accuracy (`float`): answer to `accuracy_request`, in [0, 1].

        Returns:
            `dict[str, float]`: by name.
        """
        return {}

    @property
    def teacher_kind(self) -> str | None:
        """Kind of second network: none by default."""
        return None

    @property
    def starts_from_teacher(self) -> bool:
        """Whether the model is built as a copy of the frozen teacher: no by default."""
        return False

    @property
    def head(self) -> Literal["projector", "classifier", "none"]:
        """What stands on the features: a classifier for supervised methods, else a projector."""
        return "classifier" if self.needs_labels else "projector"

    @property
    def network(self) -> Mapping[str, Any]:
        """Values of `RobustPretrainingConfig` that differ from its defaults: none by default."""
        return {}

    @property
    def view_options(self) -> Mapping[str, Any]:
        """Values of `hf_robust.views.Views` that differ from its defaults: none by default."""
        return {}

    @property
    def pseudo_classes(self) -> tuple[int, ...]:
        """Numbers of clusters of the pseudo-labels that it learns: none by default."""
        return ()

    @property
    def attack_in_eval_mode(self) -> bool:
        """Whether the attack sees the network in evaluation mode: yes by default."""
        return True

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


@dataclass
class SupervisedObjective(Objective):
    """Base of the methods that train a classifier: one augmented image and its label, one norm branch.

    A loss is a mean over the images of this process. Nothing is gathered: with equal shares on all processes, the
    average that DistributedDataParallel takes of the gradients is the gradient of the global mean.
    """

    needs_labels: ClassVar[bool] = True

    augmentation: Literal["padded_crop", "resized_crop"] = field(
        default="padded_crop",
        metadata={"help": "padded_crop: shifted crop and flip, for small images; resized_crop: published at 224."},
    )

    def __post_init__(self) -> None:
        if self.augmentation not in ("padded_crop", "resized_crop"):
            raise ValueError(
                f"augmentation must be 'padded_crop' or 'resized_crop', got {self.augmentation!r}: published runs use "
                "'padded_crop' at 32 pixels and 'resized_crop' at 224"
            )

    @property
    def views(self) -> tuple[str, ...]:
        """The augmented image."""
        return (self.augmentation,)

    @property
    def norm_branches(self) -> tuple[str, ...]:
        """One branch: the one the encoder is used through downstream."""
        return ("adv",)

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Labels of a batch, int64 `(N,)`.

        Args:
            batch (`dict[str, torch.Tensor]`): as in `__call__`.

        Returns:
            `torch.Tensor` of shape `(N,)`.

        Raises:
            ValueError: for a batch without labels.
        """
        if "label" not in batch:
            raise ValueError(
                f"{self.title} needs labels, got a batch with {', '.join(batch)}: name the label column of the data "
                "set, or train without labels (ACL, DynACL, AIR)"
            )
        return batch["label"]

    def attack_cross_entropy(self, model: nn.Module, batch: dict[str, Tensor], context: StepContext) -> Tensor:
        """Images attacked to raise the cross-entropy of their labels through the branch `"adv"`.

        Args:
            model (`nn.Module`): the (possibly wrapped) model.
            batch (`dict[str, torch.Tensor]`): as in `__call__`.
            context (`StepContext`): the attack.

        Returns:
            `torch.Tensor` of shape `(N, 3, H, W)` in [0, 1].
        """
        seen, labels = context.seen(model), self.labels(batch)

        def loss(images: Tensor) -> Tensor:
            return cross_entropy(seen.embed(images, "adv"), labels)

        return context.attack(loss, batch[self.augmentation])

    def attack_divergence(
        self, model: nn.Module, batch: dict[str, Tensor], context: StepContext, reference_branch: str
    ) -> Tensor:
        """Images attacked to raise KL(p(x) || p(x')), x' through the branch `"adv"`; p(x) is a constant.

        Args:
            model (`nn.Module`): the (possibly wrapped) model.
            batch (`dict[str, torch.Tensor]`): as in `__call__`.
            context (`StepContext`): the attack; started at the images themselves, its first gradient would be zero.
            reference_branch (`str`): branch of p(x).

        Returns:
            `torch.Tensor` of shape `(N, 3, H, W)` in [0, 1].
        """
        seen, x = context.seen(model), batch[self.augmentation]
        references: list[Tensor] = []

        def loss(images: Tensor) -> Tensor:
            if not references:  # once, inside the attack, where the network is in evaluation mode
                with torch.no_grad():
                    references.append(seen.embed(x, reference_branch))
            return kl_divergence(references[0], seen.embed(images, "adv"))

        return context.attack(loss, x)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive.

    Args:
        temperature (`float`): of the contrastive loss.

    Raises:
        ValueError: with the published value.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: the published value is 0.5")


def check_beta(beta: float) -> None:
    """Refuse a weight of the TRADES divergence that is not positive.

    Args:
        beta (`float`): of the loss CE + beta KL.

    Raises:
        ValueError: with the published value.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive, got {beta}: the published value is 6")


def check_rank(rank: int) -> None:
    """Refuse an impossible rank of an adapter; whether it fits a layer is checked where the layer is.

    Args:
        rank (`int`): of the low-rank matrices.

    Raises:
        ValueError: with the published value.
    """
    if rank != int(rank) or rank < 1:
        raise ValueError(f"rank must be a whole number, 1 or more, got {rank}: the published value is 8")
