"""The selection written down slowly: copies of the network, `backward` through all of it, one candidate at a time.

It shares with the library the attack, the losses and the names of the generators, and nothing of the search, of the
head as a function, of the folded network or of the cached features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from selection_task import linear_parameters, plain_gradient
from torch import Tensor, nn

from hf_robust.attacks import PGD
from hf_robust.coresets import SelectionTask
from hf_robust.losses import nt_xent, representational_distance


def shuffled(task: SelectionTask) -> list[Tensor]:
    """The pool in the order of the selection, cut into minibatches."""
    order = torch.randperm(len(task.pool), generator=task.generator("order"))
    parts = [task.pool[order[k : k + task.batch_size]] for k in range(0, len(order), task.batch_size)]
    if len(parts[-1]) == 1:
        parts = [*parts[:-2], torch.cat(parts[-2:])]
    return parts


def image_losses(model: Any, task: SelectionTask, rows: Tensor, number: int) -> Tensor:
    """Loss of every image of a candidate minibatch of ACL or of SAT, attacked through the model."""
    noise = task.generator(f"attack {number}")
    inputs = {"image": torch.stack([task.dataset[int(k)]["image"] for k in rows]), "index": rows}
    inputs["label"] = torch.tensor([task.dataset[int(k)]["label"] for k in rows])
    batch = task.views(inputs, task.generator(f"views {number}"))
    if task.objective.needs_labels:
        x, y = batch["padded_crop"], batch["label"]
        x_adv = task.attack(lambda im: F.cross_entropy(model.embed(im, "adv"), y), x, generator=noise)
        return F.cross_entropy(model.embed(x_adv, "adv"), y, reduction="none")
    x = torch.cat([batch["view_1"], batch["view_2"]])
    x_adv = task.attack(lambda im: nt_xent(*model.embed(im, "adv").chunk(2)), x, generator=noise)
    clean = nt_xent(*model.embed(x, "clean").chunk(2), reduction="none")
    return (clean + nt_xent(*model.embed(x_adv, "adv").chunk(2), reduction="none")) / 2


class ValidationSide:
    """q_U at theta', the attack on the validation split made anew or once."""

    def __init__(self, task: SelectionTask, kind: str, steps: int, reattack: bool) -> None:
        self.task, self.kind, self.reattack = task, kind, reattack
        self.attack = PGD(task.attack.eps, 1.25 * task.attack.eps / steps, steps)
        self.generator = task.generator("validation attack")
        images = torch.stack([task.dataset[int(k)]["image"] for k in task.validation]).float() / 255
        self.batches = images.split(task.batch_size)
        self.adversarial: list[Tensor] = []

    def gradient(self, model: Any) -> Tensor:
        clean = model.switch.branches[0]
        if self.reattack or not self.adversarial:
            self.adversarial = []
            for x in self.batches:
                z = model.embed(x, clean).detach()
                self.adversarial.append(
                    self.attack(
                        lambda im, z=z: representational_distance(z, model.embed(im, "adv"), self.kind),
                        x,
                        generator=self.generator,
                    )
                )
        z, z_adv = model.embed(torch.cat(self.batches), clean), model.embed(torch.cat(self.adversarial), "adv")
        return plain_gradient(model, representational_distance(z, z_adv, self.kind))


def row_averaged(model: Any, flat: Tensor) -> Tensor:
    """The released signature of a flat gradient."""
    pieces, start = [], 0
    for parameter in linear_parameters(model):
        piece = flat[start : start + parameter.numel()].view_as(parameter)
        pieces.append(piece.mean(0) if piece.dim() == 2 else piece.mean().view(1))
        start += parameter.numel()
    return torch.cat(pieces)


def step(model: nn.Module, flat: Tensor, size: float) -> None:
    """Move the linear layers of the head against a flat gradient, in place."""
    start = 0
    with torch.no_grad():
        for parameter in linear_parameters(model):
            parameter -= size * flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Largest remainder, one seat after the other."""
    given = [math.floor(total * w / sum(weights)) for w in weights]
    while sum(given) < total:
        rests = [total * w / sum(weights) - g for w, g in zip(weights, given, strict=True)]
        given[rests.index(max(rests))] += 1
    return given


def slow_rcs(
    task: SelectionTask,
    *,
    chunk_size: int = 100,
    head_step_size: float = 0.01,
    reattack: bool = True,
    distance: str = "kl_softmax",
    validation_steps: int = 3,
    released: bool = False,
    by_sample: bool = False,
) -> tuple[list[int], list[float]]:
    """Images in the order of the picks, and the gain of every pick."""
    theta = copy.deepcopy(task.model).eval()
    batches = shuffled(task)
    chunks = [range(k, min(k + chunk_size, len(batches))) for k in range(0, len(batches), chunk_size)]
    budgets = shares(task.budget, [sum(len(batches[k]) for k in chunk) for chunk in chunks])
    validation = ValidationSide(task, distance, validation_steps, reattack)
    images: list[int] = []
    gains: list[float] = []
    for chunk, budget in zip(chunks, budgets, strict=True):
        members: list[list[int]] = []  # images of every candidate
        gradients: list[Tensor] = []  # at theta
        for number in chunk:
            losses = image_losses(theta, task, batches[number], number)
            if by_sample:
                for k, row in enumerate(batches[number].tolist()):
                    alone = image_losses(theta, task, batches[number], number)
                    members.append([row])
                    gradients.append(plain_gradient(theta, alone[k]))
            else:
                members.append(batches[number].tolist())
                gradients.append(plain_gradient(theta, losses.mean()))
        moving, left, chosen = copy.deepcopy(theta), list(range(len(members))), []
        while len(chosen) < budget:
            direction = validation.gradient(moving)
            if released:
                worth = {k: float(row_averaged(theta, gradients[k]) @ row_averaged(theta, direction)) for k in left}
            else:
                worth = {k: float(gradients[k] @ direction) for k in left}
            best = sorted(left, key=lambda k: (-worth[k], k))[: task.batch_size if by_sample else 1]
            if by_sample:
                best = best[: budget - len(chosen)]
            for k in best:
                chosen += members[k]
                gains.append(worth[k])
                left.remove(k)
            for _ in range(2 if released else 1):
                step(moving, torch.stack([gradients[k] for k in best]).mean(0), head_step_size)
        images += chosen[:budget]
    return images, gains
