"""Robust foundation models for the Hugging Face ecosystem.

Public names load on first use, so that ``import hf_robust`` costs no torch, timm or transformers import.
"""

from __future__ import annotations

import importlib
from typing import Any

from hf_robust._lazy import install_import_hooks

__version__ = "0.1.0"

_PUBLIC = {
    "ACL": "objectives.acl",
    "AIR": "objectives.air",
    "Coreset": "coresets.base",
    "DynACL": "objectives.dynacl",
    "FullData": "coresets.full",
    "ImageDataset": "data",
    "PGD": "attacks",
    "RCS": "coresets.rcs",
    "RandomCoreset": "coresets.random",
    "RobustModelForPreTraining": "models.modeling",
    "RobustPretrainer": "pretrainer",
    "RobustPretrainingConfig": "models.modeling",
    "RobustTrainer": "trainer",
    "RobustTrainingArguments": "training_args",
    "SAT": "objectives.sat",
    "SimCLR": "objectives.simclr",
    "StoredCoreset": "coresets.file",
    "load_encoder": "hub",
    "load_image_dataset": "data",
    "load_objective": "objectives",
    "save_encoder": "hub",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_robust' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"hf_robust.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


install_import_hooks()
