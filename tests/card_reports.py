"""Reports and checks that the tests of model cards share."""

from __future__ import annotations

import copy
import json
import urllib.request
from typing import Any

import huggingface_hub
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

CITATION = (
    "@inproceedings{acl,\n  title = {Robust Pre-Training by Adversarial Contrastive Learning},\n  year = {2020}\n}"
)
CORESET = {
    "name": "RCS",
    "parameters": {"fraction": 0.2, "interval": 2, "attack_steps": None},
    "fraction": 0.2,
    "effective_fraction": 0.19958,
    "images": 284,
    "pool_images": 1423,
    "validation_images": 14,
    "warmup_epochs": 2.0,
    "selections": 5,
    "selection_seconds": 12.34,
    "training_seconds": 100.0,
}
CLASSIFIER = {
    "name": "aff-cifar",
    "task": "classifier",
    "objective": {"name": "AFF", "parameters": {"beta": 6.0}, "supervised": True},
    "dataset": {"name": "CIFAR-10", "hub_id": "uoft-cs/cifar10", "split": "train", "n_images": 47500},
    "encoder": {"name": "acl-digits", "hub_id": "ann/acl", "objective": "ACL", "dataset": "digits"},
    "label_names": ["cat", "dog", "newt"],
    "results": [
        {
            "model": "aff-cifar",
            "metrics": {"standard_accuracy": 0.8, "pgd20_linf_8_255_accuracy": 0.5},
            "protocol": "test images",
            "n_eval": 10000,
        }
    ],
}
# What the Hub knows; a card with another word is refused there.
PIPELINES = {"image-feature-extraction", "image-classification"}
LIBRARIES = {"transformers", "peft", "timm"}


def report(**changes: Any) -> dict[str, Any]:
    """An encoder with one contrast, everything known."""
    own = {"standard_accuracy": 0.9, "pgd20_linf_8_255_accuracy": 0.1 * 7}
    shared = {"protocol": "linear probe", "n_train": 1437, "n_eval": 360, "seed": 0}
    attack = {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 20}
    values = {
        "name": "acl-digits",
        "library_version": "0.1.0",
        "objective": {"name": "ACL", "parameters": {"temperature": 0.5, "mode": "ds"}},
        "architecture": "resnet10_cifar",
        "model_args": {"channels": [16, 32, 64, 128]},
        "image_size": 32,
        "norm_branch": "adv",
        "exported_format": "hf_robust_timm",
        "dataset": {"name": "digits", "split": "train", "n_images": 1437, "hub_id": None},
        "threat_model": {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 5},
        "training": {"epochs": 30, "batch_size": 128, "optimizer": "lars", "seed": 0, "seconds": 1800.0},
        "results": [
            {"model": "SimCLR", "metrics": {"standard_accuracy": 0.97, "pgd20_linf_8_255_accuracy": 0.0}, **shared},
            {
                "model": "acl-digits",
                "metrics": own,
                "attack": attack,
                "dataset": {"name": "digits", "split": "test"},
                **shared,
            },
        ],
        "command": "hf-robust pretrain --objective acl",
        "commit": "abc123-dirty",
        "hardware": {"cpu": "Some CPU", "cores": 2},
        "versions": {"torch": "2.15.0"},
        "date": "2026-11-22",
        "citation": CITATION,
    }
    return {**copy.deepcopy(values), **copy.deepcopy(changes)}


def validate_card(text: str, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    """The card's metadata as the Hub and its client read it; fails where they would refuse it."""
    card = ModelCard(text, ignore_metadata_errors=False)
    data = card.data
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")) == data.to_dict()
    assert data.pipeline_tag in PIPELINES and data.library_name in LIBRARIES
    assert data.tags and all(isinstance(tag, str) for tag in data.tags) and "adversarial-robustness" in data.tags
    if data.eval_results:
        index = eval_results_to_model_index(data.model_name, data.eval_results)
        assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
        for result in data.eval_results:
            assert result.task_type and result.dataset_type and result.dataset_name and result.metric_type
            assert isinstance(result.metric_value, float)
    with HubServer() as hub:
        if huggingface_hub.__version__.startswith("1."):  # its client asks one fixed address, whatever the endpoint
            body = json.dumps({"content": text, "repoType": "model"})
            with urllib.request.urlopen(f"{hub.endpoint}/api/validate-yaml", body.encode()) as answer:
                assert answer.status == 200
        else:
            with monkeypatch.context() as patch:
                patch.setattr(constants, "ENDPOINT", hub.endpoint)
                patch.setattr(constants, "HF_HUB_OFFLINE", False)
                card.validate()
        assert len(hub.seen("POST /api/validate-yaml")) == 1
    return card
