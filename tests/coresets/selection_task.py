"""A selection task on a tiny network, as the trainer would hand it over, and eyes on what passes the network."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from training import tiny_images, tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.coresets import CoresetMethod, Selection, SelectionTask
from hf_robust.coresets.phases import seeded_generator
from hf_robust.objectives import Objective
from hf_robust.views import Views

CPU = torch.device("cpu")
ATTACK = PGD(eps=16 / 255, step_size=4 / 255, steps=2)


def live_in(network: nn.Module, seed: int = 5) -> nn.Module:
    """Give every norm layer statistics and affine values of its own, as training does: fresh ones hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return network


def make_task(
    objective: Objective,
    *,
    images: int = 26,
    held_out: int = 6,
    budget: int = 9,
    batch_size: int = 4,
    **changes: Any,
) -> SelectionTask:
    """The last `held_out` images are the validation split; every random number is named, as in the trainer."""
    views = Views(8)

    def draw(inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        batch = views(inputs["image"], objective.views, generator=generator)
        return {**batch, "label": inputs["label"]} if objective.needs_labels else batch

    task = SelectionTask(
        model=live_in(tiny_model(objective)),
        objective=objective,
        dataset=tiny_images(images),
        pool=torch.arange(images - held_out),
        validation=torch.arange(images - held_out, images),
        budget=budget,
        batch_size=batch_size,
        views=draw,
        originals=lambda x: views(x, ("original",))["original"],
        attack=ATTACK,
        seed=3,
        generator=lambda name: seeded_generator(CPU, 3, "coreset", 0, name),
        autocast=contextlib.nullcontext,
        progress=0.4,
        device=CPU,
    )
    return dataclasses.replace(task, **changes)


def choose(method: CoresetMethod, task: SelectionTask) -> Selection:
    """Call the method the way the trainer does."""
    with frozen(task.model), torch.no_grad():
        return method.select(task)


class Watched:
    """Passes everything on to a model and remembers which images went through its backbone, and by which branch."""

    def __init__(self, model: Any) -> None:
        self._model, self.passes = model, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def features(self, x: Tensor, branch: str) -> Tensor:
        self.passes.append((branch, x.detach().clone()))
        return self._model.features(x, branch)

    def embed(self, x: Tensor, branch: str) -> Tensor:
        return self._model.head(self.features(x, branch), branch)


def linear_parameters(model: Any) -> list[nn.Parameter]:
    """Weights and biases of the linear layers of the head, in the order of the layers."""
    return [p for m in model.head_module.modules() if isinstance(m, nn.Linear) for p in m.parameters()]


def plain_gradient(model: Any, loss: Tensor) -> Tensor:
    """Flat gradient of a loss with respect to the linear parameters themselves."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, linear_parameters(model))])
