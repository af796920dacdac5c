"""Counted, not timed: arithmetic, dispatched operations and host synchronisations of one training step."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from finetuning import tiny_finetuner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from training import tiny_images, tiny_model, tiny_rcs, tiny_trainer
from transformers import TrainerCallback

from hf_robust.attacks import PGD, frozen
from hf_robust.coresets.candidates import Scorer
from hf_robust.coresets.head import Head
from hf_robust.coresets.validation import ValidationDistance
from hf_robust.models.folded import FoldedNetwork
from hf_robust.objectives import Objective, load_objective

# Of the width of the embedded example, of the depth of the published network.
NETWORK: dict[str, Any] = {
    "architecture": "resnet18_cifar",
    "model_args": {"channels": [16, 32, 64, 128]},
    "image_size": 16,
}
BATCH = 8
# What would make a GPU wait for the host, or the host for the GPU: reading a value, indexing by a mask or by a list,
# and copying a host value to the device.
WAITS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.equal",
    "aten.is_nonzero",
    "aten.index.Tensor",
    "aten.index_put",
    "aten._index_put",
    "aten.lift_fresh",
    "aten._unique",
    "aten.unique",
    "aten.repeat_interleave.Tensor",
)


class Counted(TorchDispatchMode):
    """Counts operations by name; `aten.detach` comes from the counter itself, which sees how results are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operations that a step dispatches."""
        return sum(n for name, n in self.calls.items() if not name.startswith("aten.detach"))

    def waits(self) -> dict[str, int]:
        """Operations that make one side wait for the other."""
        return {name: n for name, n in self.calls.items() if name.startswith(WAITS)}


class FixedBatch:
    """In the place of the views: the batch of a step is there already, so that augmentation is not counted."""

    def __init__(self, objective: Objective, size: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.size = size
        self.batch = {name: torch.rand(BATCH, 3, size, size, generator=generator) for name in objective.views}

    def __call__(self, images: Tensor, names: Any, **_: Any) -> dict[str, Tensor]:
        return {name: self.batch[name][: len(images)] for name in names}


class EveryStep(TrainerCallback):
    """Counts arithmetic in the second step and operations in the third; the first one builds."""

    def __init__(self) -> None:
        self.flops, self.operations = FlopCounterMode(display=False), Counted()

    def _counter(self, step: int) -> Any:
        return {1: self.flops, 2: self.operations}.get(step, nullcontext())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counter(state.global_step).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counter(state.global_step - 1).__exit__(None, None, None)


@cache
def counted(name: str) -> tuple[EveryStep, float]:
    """Train three steps as a user does: what was counted, and the arithmetic of a forward pass of one view."""
    objective: Any = load_objective(name)()
    model = tiny_model(objective, **NETWORK)
    settings: dict[str, Any] = {"num_train_epochs": 3, "max_steps": 3, "per_device_train_batch_size": BATCH}
    settings |= {"logging_steps": 10**6, "logging_first_step": False}
    with tempfile.TemporaryDirectory() as folder:
        if objective.needs_labels:
            settings |= {"keep": "last", "lr_rule": "milestones"}
            trainer: Any = tiny_finetuner(folder, objective, model=model, data=tiny_images(4 * BATCH), **settings)
        else:
            trainer = tiny_trainer(folder, objective, model=model, data=tiny_images(BATCH), **settings)
        trainer.attack, trainer.views = objective.training_attack, FixedBatch(objective, NETWORK["image_size"])
        trainer.measure = lambda *_, **__: _Measured()
        counters = EveryStep()
        trainer.add_callback(counters)
        trainer.train()
    return counters, forward_flops(model)


class _Measured:
    """Accuracies that nobody measured."""

    standard, attacked = 0.5, 0.25

    def to_dict(self) -> dict[str, float]:
        return {}


def forward_flops(model: Any) -> float:
    """Arithmetic of one forward pass of one view."""
    x = torch.rand(1, 3, model.config.image_size, model.config.image_size)
    with frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.embed(x, model.default_branch)
    return float(counter.get_total_flops())


# ---------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize(
    ("name", "views", "expected"),
    [
        ("simclr", 2, 3.0),
        ("acl", 2, 16.0),  # five steps forward and backward, two passes forward and twice backward
        ("air", 2, 17.5),  # and the un-augmented image, half a view each
        ("dynacl", 2, 16.0),
        ("sat", 1, 13.0),
        ("aff", 1, 27.0),  # the reference once, ten steps, two passes
        ("alf", 1, 21.0),
    ],
)
def test_arithmetic_per_view(name, views, expected):
    counters, forward = counted(name)
    assert counters.flops.get_total_flops() / forward / (views * BATCH) == pytest.approx(expected, rel=0.01)


def test_arithmetic_of_autolora():
    """Ten steps, the adversarial pass and the clean one, whose base weights get no gradient: 25, and the adapters."""
    counters, forward = counted("autolora")
    assert 25.0 < counters.flops.get_total_flops() / forward / BATCH <= 26.0


def selection(trainer: Any) -> Any:
    """What the trainer hands to a coreset method."""
    kept: list[Any] = []
    trainer.phases.select = lambda round, task: kept.append(task) or {}
    trainer._select_coreset(0)
    return kept[0]


def test_arithmetic_of_a_selection(tmp_path):
    """A candidate view: five steps and a pass through each branch, 12; a validation image of a pick: 7."""
    objective = load_objective("acl")()
    trainer = tiny_trainer(tmp_path, objective, model=tiny_model(objective, **NETWORK), coreset=tiny_rcs())
    trainer.attack = PGD()
    task = selection(trainer)
    flops = forward_flops(trainer.model)
    with frozen(trainer.model), torch.no_grad():
        task = dataclasses.replace(task, model=FoldedNetwork(task.model))
        scorer, head = Scorer(task, None), Head(task.model)
        validation = ValidationDistance(task, head, "kl_softmax", 3, True)
        scorer(task.pool[:BATCH], 0)
        validation.gradient(head.weights)
        with FlopCounterMode(display=False) as counter:
            scorer(task.pool[:BATCH], 1)
        assert counter.get_total_flops() / flops / (2 * BATCH) == pytest.approx(12.0, rel=0.01)
        with FlopCounterMode(display=False) as counter:
            validation.gradient(head.weights)
        assert counter.get_total_flops() / flops / len(task.validation) == pytest.approx(7.0, rel=0.02)


# ---------------------------------------------------------------------- operations and waits
@pytest.mark.parametrize(("name", "most"), [("acl", 1600), ("air", 2000)])
def test_operations_of_a_step(name, most):
    counters, _ = counted(name)
    assert 1000 < counters.operations.total <= most


@pytest.mark.parametrize("name", ["simclr", "acl", "air", "dynacl", "sat", "slf", "alf", "aff", "lora", "autolora"])
def test_no_step_waits(name):
    counters, _ = counted(name)
    assert counters.operations.total > 100 and counters.operations.waits() == {}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x * torch.tensor([1.0, 2.0]),
        lambda x: x.index_put((torch.arange(1),), torch.ones(1)),
        lambda x: (x > 0).nonzero(),
    ],
)
def test_the_counter_sees_what_waits(wait):
    with Counted() as counter:
        wait(torch.ones(2))
    assert counter.waits()
