"""Counted, not timed: arithmetic, dispatched operations and host synchronisations of one training step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
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
from hf_robust.objectives.autolora import AutoLoRa

# Of the width of the embedded example, of the depth of the published network.
NETWORK: dict[str, Any] = {
    "architecture": "resnet18_cifar",
    "model_args": {"channels": [16, 32, 64, 128]},
    "image_size": 32,
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
    def operations(self) -> int:
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
    """Enters a mode when a step begins and leaves it when it ends, the first one excepted, which builds."""

    def __init__(self, make_mode: Any) -> None:
        self._make, self._mode, self.found = make_mode, None, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self._mode = self._make()
            self._mode.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.found.append(self._mode)
            self._mode = None


def counted_steps(folder: Path, objective: Objective, make_mode: Any, **arguments: Any) -> tuple[Any, list[Any]]:
    """Train three steps as a user does and keep what was counted in the second and the third."""
    model = tiny_model(objective, **NETWORK)
    images = tiny_images(24 if objective.needs_labels else BATCH)
    common = {"max_steps": 3, "per_device_train_batch_size": BATCH, "logging_steps": 10**6, **arguments}
    common |= {"logging_first_step": False, "num_train_epochs": 3}
    if objective.needs_labels:
        common |= {"keep": "last", "lr_rule": "milestones", "validation_steps": 1}
        trainer: Any = tiny_finetuner(folder, objective, model=model, data=images, **common)
    else:
        trainer = tiny_trainer(folder, objective, model=model, data=images, **common)
    trainer.attack = objective.training_attack
    trainer.views = FixedBatch(objective, 32)
    trainer.measure = lambda *_, **__: _Measured()
    callback = EveryStep(make_mode)
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.found) == 2
    return trainer, callback.found


class _Measured:
    """Accuracies that nobody measured."""

    standard, attacked = 0.5, 0.25

    def to_dict(self) -> dict[str, float]:
        return {}


def forward_flops(model: Any) -> int:
    """Arithmetic of one forward pass of one view."""
    module, x = getattr(model, "module", model), torch.rand(1, 3, 32, 32)
    with frozen(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.embed(x, module.default_branch)
    return counter.get_total_flops()


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
def test_arithmetic_per_view(tmp_path, name, views, expected):
    objective = load_objective(name)()
    trainer, found = counted_steps(tmp_path, objective, lambda: FlopCounterMode(display=False))
    per_view = [counter.get_total_flops() / forward_flops(trainer.model) / (views * BATCH) for counter in found]
    assert per_view == pytest.approx([expected] * 2, rel=0.01)


def test_arithmetic_of_autolora(tmp_path):
    """Ten steps, the adversarial pass and the clean one, whose base weights get no gradient: 25, and the adapters."""
    trainer, found = counted_steps(tmp_path, AutoLoRa(), lambda: FlopCounterMode(display=False))
    for counter in found:
        assert 25.0 < counter.get_total_flops() / forward_flops(trainer.model) / BATCH <= 26.0


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
def test_operations_of_a_step(tmp_path, name, most):
    _, found = counted_steps(tmp_path, load_objective(name)(), Counted)
    assert all(1000 < counted.operations <= most for counted in found)


@pytest.mark.parametrize("name", ["simclr", "acl", "air", "dynacl", "sat", "slf", "alf", "aff", "lora", "autolora"])
def test_no_step_waits(tmp_path, name):
    _, found = counted_steps(tmp_path, load_objective(name)(), Counted)
    assert [counted.waits() for counted in found] == [{}, {}]


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
    with Counted() as counted:
        wait(torch.ones(2))
    assert counted.waits()
