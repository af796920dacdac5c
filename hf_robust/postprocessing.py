"""Post-processing of encoders (DynACL++, AIR++): clusters as labels, a linear probe, adversarial training on both."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_robust.attacks import PGD, frozen
from hf_robust.checkpoints import fingerprint, latest_complete, to_resume
from hf_robust.classifiers import build_classifier
from hf_robust.clustering import cluster_features, of_first_process
from hf_robust.data import ImageDataset
from hf_robust.evaluation.probe import extract_features
from hf_robust.finetuner import RobustFinetuner
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.objectives import Objective
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.slf import SLF

__all__ = ["PostProcessing", "cluster_labels", "post_process", "train_head", "where_to_resume"]

logger = logging.getLogger(__name__)

# of a stage that trains a head; another value would give another head
_STAGE_SETTINGS = (
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_milestones", "optimizer", "momentum", "nesterov", "weight_decay", "seed"),
)
_LABELS, _HEAD, _PROBE = "pseudo_labels.json", "head.safetensors", "probe"


@dataclass(frozen=True)
class PostProcessing:
    """Linear probing, then adversarial full fine-tuning, on pseudo-labels: no real label is read.

    `lp_variant="dynacl"` trains and attacks one norm branch; `"air"` keeps the clean branch of the encoder and
    measures the attack from its predictions, while both loss terms pass the adversarial branch. An exported encoder
    has the adversarial branch only: `"air"` needs a training checkpoint to be what was published.

    Args:
        clusters (`int`, *optional*): pseudo-classes; default: the classes of the data set, as released for AIR.
        probe_stage_epochs (`float`, defaults to 10, as released): epochs of the linear probe.
        probe_stage_learning_rate (`float`, defaults to 0.01, as released): its constant rate.
        lp_variant (`str`): `"dynacl"` (default) or `"air"`.

    Raises:
        ValueError: for an unknown variant, fewer than 2 clusters or no epoch.

    Source: Luo et al. 2023 (DynACL++), `LPAFT.py` and `assign_label.py`, which fixes 10 clusters even for CIFAR-100;
        Xu et al. 2023 (AIR++), `LP-AFF.py`: k-means with tolerance 1e-5 on features of the clean branch, a zero head,
        probe and fine-tuning with weight decay 1e-4 and batch 512.
    """

    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType(  # of the last stage; real labels choose nothing
        {
            **AFF.recipe,
            "per_device_train_batch_size": 512,
            "lr_milestones": [10, 20],
            "weight_decay": 1e-4,
            "dataloader_drop_last": True,
            "keep": "last",
            "validation_fraction": 0.0,
        }
    )

    clusters: None | int = field(
        default=None, metadata={"help": "Pseudo-classes of k-means; unset: as many as the data set has classes."}
    )
    probe_stage_epochs: float = field(default=10.0, metadata={"help": "Epochs of the linear probe; published: 10."})
    probe_stage_learning_rate: float = field(
        default=0.01, metadata={"help": "Constant learning rate of the linear probe; published: 0.01."}
    )
    lp_variant: Literal["dynacl", "air"] = field(
        default="dynacl", metadata={"help": "dynacl: one norm branch; air: attack measured from the clean branch."}
    )

    def __post_init__(self) -> None:
        if self.lp_variant not in ("dynacl", "air"):
            raise ValueError(f"lp_variant must be dynacl or air, got {self.lp_variant!r}")
        if self.clusters is not None and self.clusters < 2:
            raise ValueError(f"clusters must be 2 or more, got {self.clusters}: they serve as classes")
        if not self.probe_stage_epochs > 0:
            raise ValueError(f"probe_stage_epochs must be positive, got {self.probe_stage_epochs}: published is 10")

    def objective(self, beta: float = 6.0) -> AFF:
        """Adversarial full fine-tuning with the branches of the variant.

        Args:
            beta (`float`, defaults to 6, as published): weight of the KL divergence.
        """
        return AFF(beta=beta, clean_branch="adv", reference_branch="clean" if self.lp_variant == "air" else "adv")

    def count(self, dataset: ImageDataset) -> int:
        """How many clusters a data set is divided into.

        Args:
            dataset ([`ImageDataset`]): with classes, unless `clusters` is given.

        Raises:
            ValueError: if neither says how many, or there are fewer images than that.
        """
        found = self.clusters or dataset.num_classes
        if found is None or found < 2:
            raise ValueError(
                f"{dataset.name!r} has no classes to count: say how many pseudo-classes, e.g. --clusters 10"
            )
        if found > len(dataset):
            raise ValueError(f"{found} clusters are more than the {len(dataset)} images: lower --clusters")
        return found


def cluster_labels(
    model: Any, dataset: ImageDataset, clusters: int, *, seed: int, device: Any = "cpu", progress: bool = True
) -> Tensor:
    """Assign every image the number of its k-means cluster in the space of the features.

    Args:
        model ([`RobustModelForPreTraining`]): the encoder; features come through its clean branch where it has one.
        dataset ([`ImageDataset`]): images, un-augmented; labels are not read.
        clusters (`int`): at least 2.
        seed (`int`): of the initial centres.
        device (`Any`): where the features are computed.
        progress (`bool`): show a bar.

    Returns:
        `torch.Tensor` of shape `(N,)`: int64, in the order of the data set.

    Raises:
        ValueError: if the features have fewer different clusters.

    Source: released AIR, `LP-AFF.py`: Euclidean k-means on pooled features of un-augmented images, clean branch.
    """
    branches = model.switch.branches
    branch = "clean" if "clean" in branches else branches[0]
    with frozen(model):
        features = extract_features(
            lambda x: model.features(x, branch),
            dataset,
            size=model.config.image_size,
            device=device,
            progress=progress,
        )
    return cluster_features(features, clusters, seed=seed)


def train_head(
    model: Any,
    objective: Objective,
    args: RobustFinetuningArguments,
    dataset: ImageDataset,
    *,
    folder: str | Path,
    resume: bool,
    **changes: Any,
) -> dict[str, Tensor]:
    """Train a linear head on a frozen encoder as a stage of its own, once.

    Args:
        model ([`RobustModelForPreTraining`]): a classifier.
        objective ([`Objective`]): SLF or ALF.
        args ([`RobustFinetuningArguments`]): of the whole run.
        dataset ([`ImageDataset`]): labelled images.
        folder (`str` or `Path`): of the stage; what a finished stage left there is taken when resuming.
        resume (`bool`): go on with an earlier run.
        changes (`Any`): training arguments that differ from those of the run.

    Returns:
        `dict[str, torch.Tensor]`: weight `(C, D)` and bias `(C,)` of the head.
    """
    file, stage = Path(folder) / _HEAD, copy.copy(args)
    unchosen = {"keep": "last", "lr_rule": "milestones", "lr_milestones": None, "auto_lr_epochs": None}
    stage.push_to_hub = False  # the last stage publishes
    for name, value in {**unchosen, "max_steps": -1, "output_dir": str(folder), **changes}.items():
        setattr(stage, name, value)
    facts = {
        "objective": repr(objective),
        "encoder": fingerprint(model),
        "images": f"{len(dataset)} of {dataset.name}, labels {_labels_told(dataset)}",
        **{name: repr(getattr(stage, name)) for name in _STAGE_SETTINGS},
    }
    if resume and file.is_file():
        with safe_open(file, "pt") as stored:
            _check_facts(file, stored.metadata() or {}, facts)
        return load_file(file)
    trainer = RobustFinetuner(model, stage, objective, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=bool(resume and latest_complete(folder)) or None)
    head = {name: value.detach().cpu().contiguous() for name, value in model.classifier.state_dict().items()}
    if trainer.is_world_process_zero():
        save_file(head, file, facts)
    trainer.accelerator.wait_for_everyone()
    return head


def post_process(
    encoder: str | Path,
    dataset: ImageDataset,
    settings: PostProcessing,
    args: RobustFinetuningArguments,
    *,
    beta: float = 6.0,
    attack: PGD | None = None,
    image_size: int | None = None,
) -> RobustFinetuner:
    """Cluster, probe, fine-tune; every finished stage in `args.output_dir` is taken up by a resumed run.

    Args:
        encoder (`str` or `Path`): folder or repository of an encoder, or a training checkpoint.
        dataset ([`ImageDataset`]): images; labels are not read.
        settings ([`PostProcessing`]): clusters, probe, variant.
        args ([`RobustFinetuningArguments`]): of the adversarial fine-tuning, whose folder holds all stages.
        beta (`float`, defaults to 6, as published): of TRADES.
        attack ([`PGD`], *optional*): default: that of AFF.
        image_size (`int`, *optional*): default: the encoder's.

    Returns:
        [`RobustFinetuner`]: after the training; `save_encoder` writes the result.

    Raises:
        ValueError: if the labels of an earlier run do not belong to this one.
    """
    folder, asked = Path(str(args.output_dir)), args.resume_from_checkpoint
    resume, clusters, objective = bool(asked), settings.count(dataset), settings.objective(beta)
    _check_before(args, dataset, folder, resume)
    branches = ("clean", "adv")
    reader: Any = build_classifier(encoder, clusters, branches, image_size)
    reader = reader.to(args.device)
    labels = _labels(folder, reader, dataset, clusters, args, resume)
    labelled = dataset.relabelled(labels)
    head = train_head(
        build_classifier(encoder, clusters, ("adv",), image_size),
        SLF(),
        args,
        labelled,
        folder=folder / _PROBE,
        resume=resume,
        num_train_epochs=settings.probe_stage_epochs,
        learning_rate=settings.probe_stage_learning_rate,
    )
    model = build_classifier(encoder, clusters, objective.norm_branches, image_size)
    model.classifier.load_state_dict(head)
    trainer = RobustFinetuner(model, args, objective, attack, train_dataset=labelled)
    trainer.releases_encoder = True
    trainer.train(resume_from_checkpoint=where_to_resume(asked, folder))
    return trainer


def where_to_resume(asked: str | bool | None, folder: str | Path) -> str | bool | None:
    """Where the last of several stages goes on: it may not have begun when the run was stopped.

    Args:
        asked (`str`, `bool` or `None`): of the user: a path, or `True` for the newest.
        folder (`str` or `Path`): of the stage.

    Returns:
        `str`, `bool` or `None`: for `RobustTrainer.train`.
    """
    return asked if isinstance(asked, str) else (bool(asked and latest_complete(folder)) or None)


def _check_before(args: RobustFinetuningArguments, dataset: ImageDataset, folder: Path, resume: bool) -> None:
    """Find out now, not after the first stages, what the last one would refuse."""
    if args.keep == "best" or args.lr_rule == "auto" or args.validation_fraction:
        raise ValueError(
            f"post-processing reads no label, so nothing can choose by accuracy, got keep={args.keep!r}, "
            f"lr_rule={args.lr_rule!r}, validation_fraction={args.validation_fraction:g}: write --keep last --lr_rule "
            "milestones --validation_fraction 0, which are its defaults"
        )
    args.check_batch(len(dataset))
    if not resume:  # before anything of an earlier run is written over
        for stage in (folder, folder / _PROBE):
            to_resume(stage, None)


def _labels(
    folder: Path, model: Any, dataset: ImageDataset, clusters: int, args: RobustFinetuningArguments, resume: bool
) -> Tensor:
    """Those of an earlier run when resuming, else new ones, which are written down."""
    file = folder / _LABELS
    facts = {"dataset": dataset.name, "images": len(dataset), "clusters": clusters, "seed": args.seed}
    facts["encoder"] = fingerprint(model)
    if resume and file.is_file():
        stored = json.loads(file.read_text())
        _check_facts(file, stored, facts)
        return torch.tensor(stored["labels"])
    show = not args.disable_tqdm and args.process_index == 0
    labels = cluster_labels(model, dataset, clusters, seed=args.seed, device=args.device, progress=show)
    labels = of_first_process(labels.to(args.device)).cpu()
    if args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**facts, "labels": labels.tolist()}))
    return labels


def _check_facts(file: Path, stored: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    differing = [f"{k}: {stored.get(k)} there, {v} here" for k, v in facts.items() if stored.get(k) != v]
    if differing:
        raise ValueError(
            f"{file} belongs to another run ({'; '.join(differing)}): resume with the same settings, or start anew in "
            "another --output_dir"
        )


def _labels_told(dataset: ImageDataset) -> str:
    """Another text for other labels."""
    labels = dataset.labels if dataset.labels is not None else torch.empty(0)
    return hashlib.blake2b(labels.numpy().tobytes(), digest_size=8).hexdigest()
