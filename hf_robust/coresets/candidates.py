"""What a candidate is, a minibatch or a single image, and what taking it would gain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_robust.attacks import PGD, LossFn
from hf_robust.data import collate_images
from hf_robust.objectives.base import StepContext

from .base import SelectionTask
from .head import Head, Outputs, process_count, process_number, summed, wide
from .validation import ATTACK_SCALE, ValidationDistance

__all__ = ["Candidates", "Chunk", "Minibatches", "Samples", "Scorer", "minibatches"]


def minibatches(order: Tensor, size: int) -> list[Tensor]:
    """Cut a shuffled pool into minibatches; the last, short one is a candidate like any other.

    Args:
        order (`torch.Tensor` of shape `(n,)`): positions.
        size (`int`): images of a minibatch.

    Returns:
        `list[torch.Tensor]`: a rest of one image joins the minibatch before it, as it has nothing to contrast with.
    """
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@dataclass(frozen=True)
class Scored:
    """A candidate minibatch after the attack: features of each pass, and the loss of every image given the head."""

    batch: dict[str, Tensor]
    features: list[tuple[str, Tensor]]
    losses: Callable[[Outputs], Tensor]


class Scorer:
    """Draws the views of a minibatch, attacks them and keeps the features; seeded by the number of the minibatch.

    Args:
        task ([`SelectionTask`]): model, images, objective.
        attack_steps (`int`, *optional*): steps of the attack, of the same total length as in training; default: those
            of training.

    Source: released RCS code, `ACL_RCS.py`: fresh augmentations, the training loss un-weighted, evaluation mode;
        step size (2/255) 5/T.
    """

    def __init__(self, task: SelectionTask, attack_steps: int | None) -> None:
        self._task = task
        self._attack = task.attack if attack_steps is None else task.attack.with_steps(attack_steps)

    def stream(self, minibatches: dict[int, Tensor]) -> Iterator[tuple[int, Scored]]:
        """Score minibatches one after the other, loading ahead when the training does.

        Args:
            minibatches (`dict[int, torch.Tensor]`): number in this selection to positions in the training set.

        Returns:
            `Iterator[tuple[int, Scored]]`: in the order given.
        """
        loader = torch.utils.data.DataLoader(
            self._task.dataset,
            batch_sampler=[rows.tolist() for rows in minibatches.values()],
            num_workers=self._task.workers,
            collate_fn=collate_images,
            generator=torch.Generator(),  # or it would draw a seed from the global state
        )
        for number, items in zip(minibatches, loader, strict=True):
            yield number, self._score(items, number)

    def __call__(self, rows: Tensor, number: int) -> Scored:
        """Score one minibatch.

        Args:
            rows (`torch.Tensor` of shape `(N,)`): positions in the training set.
            number (`int`): of the minibatch in this selection.

        Returns:
            `Scored`: features in float32, without a graph.
        """
        return self._score(collate_images([self._task.dataset[int(k)] for k in rows]), number)

    def _score(self, items: dict[str, Tensor], number: int) -> Scored:
        task = self._task
        batch = task.views({k: v.to(task.device) for k, v in items.items()}, task.generator(f"views {number}"))
        attack = self._bound(self._attack, task.generator(f"attack {number}"))
        context = StepContext(attack, task.progress, None, task.autocast, seen=task.seen)
        passes = task.objective.candidate_passes(task.model, batch, context)
        with torch.no_grad():
            features = [(branch, wide(task.model.features(x, branch))) for branch, x in passes]
        kept = {k: v for k, v in batch.items() if k == "label"}  # the images have done their part

        def losses(outputs: Outputs) -> Tensor:
            return task.objective.candidate_losses([outputs(branch, f) for branch, f in features], kept)

        return Scored(kept, features, losses)

    def _bound(self, attack: PGD, generator: torch.Generator) -> Callable[[LossFn, Tensor], Tensor]:
        def bound(loss_fn: LossFn, x: Tensor) -> Tensor:
            def loss(images: Tensor) -> Tensor:
                with self._task.autocast():
                    return loss_fn(images) * ATTACK_SCALE

            return attack(loss, x, generator=generator)

        return bound


@dataclass(frozen=True)
class Chunk:
    """Minibatches that are searched together, and what they are searched with.

    Args:
        rows (`Sequence[torch.Tensor]`): positions of every minibatch.
        first (`int`): number of the first one in this selection.
        scorer ([`Scorer`]): attacks minibatches.
        head ([`Head`]): whose gradients are compared.
        validation ([`ValidationDistance`]): the other side.
        tick (`Callable[[], Any]`): called after every minibatch and every pick.
    """

    rows: Sequence[Tensor]
    first: int
    scorer: Scorer
    head: Head
    validation: ValidationDistance
    tick: Callable[[], Any] = lambda: None


class Candidates:
    """Candidates of one chunk: their gains against the validation gradient, and the step that taking them means.

    Args:
        chunk ([`Chunk`]): the minibatches.
        step_size (`float`): eta' of the step after a pick.
        signature (`Callable`, *optional*): turns gradients `(K, length)` into what is compared.
    """

    def __init__(self, chunk: Chunk, step_size: float, signature: Callable[[Tensor], Tensor] | None = None) -> None:
        self._head, self._validation, self._size = chunk.head, chunk.validation, step_size
        self._signature = signature if signature is not None else lambda gradients: gradients
        self._weights = chunk.head.weights  # theta', moves; candidates are compared at theta
        self._rows = list(chunk.rows)
        self._local = list(range(process_number(), len(self._rows), process_count()))
        self._score(chunk)

    @property
    def sizes(self) -> Tensor:
        """Images of every candidate, `(K,)`."""
        raise NotImplementedError

    def gains(self) -> Tensor:
        """Gain of every candidate at the present theta', `(K,)`; the same on every process."""
        return summed(self._gains(self._validation.gradient(self._weights)))

    def take(self, picks: Tensor) -> None:
        """Step on the head along the gradient of the candidates just taken."""
        gradient = summed(self._gradient(picks))
        self._weights = self._head.step(self._weights, gradient, self._size)

    def images(self, picks: Sequence[int]) -> Tensor:
        """Positions in the training set of the candidates taken, in order."""
        raise NotImplementedError

    def _score(self, chunk: Chunk) -> None:
        raise NotImplementedError

    def _gains(self, direction: Tensor) -> Tensor:
        raise NotImplementedError

    def _gradient(self, picks: Tensor) -> Tensor:
        raise NotImplementedError


class Minibatches(Candidates):
    """A candidate is a minibatch; its gradient is that of the mean loss (released)."""

    def _score(self, chunk: Chunk) -> None:
        self._gradients = torch.empty(len(self._local), self._head.length, **self._head.like)
        chosen = {chunk.first + k: self._rows[k] for k in self._local}
        for place, (_, scored) in enumerate(chunk.scorer.stream(chosen)):
            losses = scored.losses
            self._gradients[place] = self._head.gradient(lambda outputs: losses(outputs).mean(), self._head.weights)  # noqa: B023
            chunk.tick()
        self._signatures = self._signature(self._gradients)

    @property
    def sizes(self) -> Tensor:
        """Images of every minibatch."""
        return torch.tensor([len(r) for r in self._rows])

    def images(self, picks: Sequence[int]) -> Tensor:
        """All images of the minibatches."""
        return torch.cat([self._rows[k] for k in picks])

    def _gains(self, direction: Tensor) -> Tensor:
        gains = torch.zeros(len(self._rows), **self._head.like)
        gains[self._local] = self._signatures @ self._signature(direction[None])[0]
        return gains

    def _gradient(self, picks: Tensor) -> Tensor:
        mine = [place for place, k in enumerate(self._local) if k in set(picks.tolist())]
        return self._gradients[mine].sum(0) / len(picks)


class Samples(Candidates):
    """A candidate is one image; its gradient is that of its own loss within its minibatch (the paper's sample).

    Gradients are never written out: gains are derivatives of all losses along one direction.
    """

    def _score(self, chunk: Chunk) -> None:
        self._scored = {}
        for number, scored in chunk.scorer.stream({chunk.first + k: self._rows[k] for k in self._local}):
            self._scored[number - chunk.first] = scored
            chunk.tick()
        self._bounds = torch.tensor([0, *(len(r) for r in self._rows)]).cumsum(0).tolist()

    @property
    def sizes(self) -> Tensor:
        """One image each."""
        return torch.ones(self._bounds[-1], dtype=torch.int64)

    def images(self, picks: Sequence[int]) -> Tensor:
        """The images taken."""
        return torch.cat(self._rows)[torch.tensor(picks)]

    def _gains(self, direction: Tensor) -> Tensor:
        gains = torch.zeros(self._bounds[-1], **self._head.like)
        for k, scored in self._scored.items():
            here = slice(self._bounds[k], self._bounds[k + 1])
            gains[here] = self._head.directional(scored.losses, self._head.weights, direction)
        return gains

    def _gradient(self, picks: Tensor) -> Tensor:
        gradient = torch.zeros(self._head.length, **self._head.like)
        taken = torch.zeros(self._bounds[-1], **self._head.like).index_fill_(0, picks.to(gradient.device), 1.0)
        for k, scored in self._scored.items():
            weight = taken[self._bounds[k] : self._bounds[k + 1]] / len(picks)
            gradient += self._head.gradient(lambda out: (scored.losses(out) * weight).sum(), self._head.weights)  # noqa: B023
        return gradient
