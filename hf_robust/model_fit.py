"""Whether a model and a training set suit a method: said before anything is computed."""

from __future__ import annotations

from typing import Any

from hf_robust.objectives.base import Objective

__all__ = ["check_fit"]


def check_fit(objective: Objective, model: Any, dataset: Any | None = None) -> None:
    """Refuse a model or a training set that does not suit the method.

    Args:
        objective ([`Objective`]): the method.
        model (`Any`): has `config.norm_branches` and `config.head`.
        dataset (`Any`, *optional*): has `labels`, `num_classes` and `name`.

    Raises:
        ValueError: for other norm branches or heads than the method's, missing labels, or more clusters than images.
    """
    has = tuple(model.config.norm_branches)
    if set(has) != set(objective.norm_branches):
        raise ValueError(
            f"{objective.title} runs images through the norm branches {list(objective.norm_branches)}, the model has "
            f"{list(has)}: build the model with norm_branches={tuple(objective.norm_branches)!r}"
        )
    missing = [path for path in objective.paths if path not in getattr(model, "paths", has)]
    if missing:
        raise ValueError(
            f"{objective.title} passes images through the path {missing[0]!r}, which the model has not: build it with "
            "hf_robust.adapters.with_lora_path"
        )
    head, wanted = model.config.head, objective.head
    if head != wanted:
        has_head, trains = ("no head" if kind == "none" else f"a {kind}" for kind in (head, wanted))
        raise ValueError(
            f"{objective.title} trains {trains}, the model has {has_head}: build the model with head={wanted!r}"
        )
    ends, needed = getattr(model.config, "branch_heads", None) or {}, dict(objective.network.get("branch_heads", {}))
    if ends != needed:
        raise ValueError(
            f"{objective.title} ends its branches in the classifiers {needed}, the model has {ends}: build the model "
            "with **objective.network"
        )
    if dataset is None:
        return
    fitting = [str(k) for k in objective.pseudo_classes if k <= len(dataset)]
    if len(fitting) < len(objective.pseudo_classes):
        raise ValueError(
            f"{objective.title} learns {max(objective.pseudo_classes)} clusters, more than the {len(dataset)} images "
            f"of {dataset.name!r}: ask for those that fit, --clusters {' '.join(fitting) or '2'}"
        )
    if not objective.needs_labels:
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
