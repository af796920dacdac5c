"""One fine-tuning step: SLF, ALF, AFF and AutoLoRa against the published steps, without augmentation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.comparison import compare, library_cases, wanted
from benchmarks.harness import Action, Case
from benchmarks.reference_finetuning import AFFStep, ALFStep, AutoLoRaStep, SLFStep
from benchmarks.setting import batch_of, build_model
from hf_robust.adapters import with_lora_path, without_lora
from hf_robust.models.lora import is_lora
from hf_robust.objectives import Objective
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.slf import SLF

GROUP = "finetune"
METHODS: dict[str, Callable[[], Objective]] = {
    "slf": SLF,
    "alf": ALF,
    "aff": AFF,
    "autolora": lambda: AutoLoRa(rank=4),
}
NAMES = (GROUP, *METHODS)
BATCH = 32
STEPS: dict[str, Callable[[Any], Any]] = {"slf": SLFStep, "alf": ALFStep, "aff": AFFStep}


def autolora_reference(model: Any) -> AutoLoRaStep:
    """The published step on the weights and adapters of a model with a LoRA path."""
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, layer in model.lora_layers.items():
        a, b = (factor["default"].weight.flatten(1) for factor in (layer.lora_A, layer.lora_B))
        factors[name] = (a, b, layer.scaling["default"])
    plain = without_lora(model).to(next(model.parameters()).dtype)
    state = {name.replace("base_layer.", ""): x for name, x in model.state_dict().items() if not is_lora(name)}
    plain.load_state_dict(state)  # again, as it was rounded to float32 on the way
    return AutoLoRaStep(plain, factors)


def comparisons(options: argparse.Namespace) -> dict[str, list[Case]]:
    """The reference and the library's variants of every method asked for."""
    return {name: _cases(options, name) for name in wanted(options, list(METHODS), GROUP)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios."""
    return compare(options, comparisons(options))


def _cases(options: argparse.Namespace, name: str) -> list[Case]:
    objective, images = METHODS[name](), options.batch_size or BATCH
    if name == "autolora" and (options.model or "resnet18") == "resnet18":
        objective = AutoLoRa()  # rank 8, as published; thinner layers do not hold it
    batch = batch_of(options, objective, images)
    x, labels = batch[objective.views[0]], batch["label"]

    def reference() -> Action:
        model = build_model(options, objective)
        if name == "autolora":
            lora: Any = objective
            step: Any = autolora_reference(with_lora_path(model, lora.rank, lora.init, lora.norm_update))
        else:
            step = STEPS[name](model)
        step(x[:4], labels[:4])
        return lambda: step(x, labels)

    return [
        Case(f"{name}/fp32/reference", reference, images),
        *library_cases(options, name, objective, batch),
    ]
