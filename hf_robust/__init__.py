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
    "AFF": "objectives.aff",
    "AIR": "objectives.air",
    "AInfoNCE": "objectives.a_infonce",
    "ALF": "objectives.alf",
    "AdvCL": "objectives.advcl",
    "AutoLoRa": "objectives.autolora",
    "Coreset": "coresets.base",
    "DeACL": "objectives.deacl",
    "DynACL": "objectives.dynacl",
    "EvaluationReport": "evaluation.evaluation_report",
    "FARE": "objectives.fare",
    "FullData": "coresets.full",
    "ImageDataset": "data",
    "LoRA": "objectives.lora",
    "PGD": "attacks",
    "PostProcessing": "postprocessing",
    "RCS": "coresets.rcs",
    "RandomCoreset": "coresets.random",
    "RoCL": "objectives.rocl",
    "RobustFinetuner": "finetuner",
    "RobustFinetuningArguments": "finetuning_args",
    "RobustModelForPreTraining": "models.modeling",
    "RobustPretrainer": "pretrainer",
    "RobustPretrainingConfig": "models.modeling",
    "RobustTrainer": "trainer",
    "RobustTrainingArguments": "training_args",
    "SAT": "objectives.sat",
    "SLF": "objectives.slf",
    "SimCLR": "objectives.simclr",
    "StoredCoreset": "coresets.file",
    "build_classifier": "classifiers",
    "embedding_robustness": "evaluation.embedding",
    "evaluate_robustness": "evaluation.robustness",
    "load_classifier": "evaluation.classifier",
    "load_encoder": "hub",
    "load_image_dataset": "data",
    "load_objective": "objectives",
    "load_preset": "presets",
    "post_process": "postprocessing",
    "push_folder": "publishing",
    "save_adapter": "adapters",
    "save_classifier": "classifiers",
    "save_encoder": "hub",
    "split_validation": "held_out",
    "step_memory": "memory_model",
    "suggest_batch_size": "memory_model",
    "with_adapter": "adapters",
    "with_lora_path": "adapters",
    "with_schedule": "attack_schedules",
    "without_lora": "adapters",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_robust' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"hf_robust.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


install_import_hooks()
