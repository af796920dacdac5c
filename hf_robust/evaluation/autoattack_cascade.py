"""The attacks one after the other on the images of one process, batch by batch, with a note after each."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .accuracy import PROGRESS_DELAY
from .autoattack_findings import Findings
from .autoattack_model import AttackedModel, check_labels, examine
from .autoattack_plan import PlannedAttack, plan_attacks, prepare
from .autoattack_state import CascadeState, StageCount

__all__ = ["Cascade", "CascadeBar", "Setting", "Share"]

REMEMBERED_LOGITS = 16  # images whose logits a state file keeps, to recognise the model


@dataclass(frozen=True)
class Setting:
    """What the user asked for; the arguments of `autoattack` of the same names."""

    eps: float
    norm: str
    preset: str
    batch_size: int
    seed: int


@dataclass
class Share:
    """The outcome of one process.

    Args:
        state ([`CascadeState`], *optional*): at the end; `None` where there were fewer images than processes.
        num_classes (`int`): of the model.
        notes (`list[str]`): sentences on departures from the standard attacks.
        tag (`dict`): what was evaluated.
    """

    state: CascadeState | None = None
    num_classes: int = 0
    notes: list[str] = field(default_factory=list)
    tag: dict[str, Any] = field(default_factory=dict)


class CascadeBar:
    """A progress bar over the work of the whole cascade, in forward passes, as if no further image were broken.

    Args:
        shown (`bool`): `False` for no bar at all.
    """

    def __init__(self, shown: bool) -> None:
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, at most {remaining} left{postfix}"
        self._bar = tqdm(
            total=1,
            desc="AutoAttack",
            bar_format=layout,
            delay=PROGRESS_DELAY,
            mininterval=1.0,
            disable=not shown,
            leave=False,
        )

    def __enter__(self) -> CascadeBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def work(self, passes: int) -> None:
        """Move on.

        Args:
            passes (`int`): forward passes of one image; a backward pass counts as two.
        """
        # An attack may take a few passes more than planned; beyond its total tqdm shows 0 %.
        self._bar.total = max(self._bar.total, self._bar.n + passes)
        self._bar.update(passes)

    def stands(self, attack: PlannedAttack, ahead: Sequence[PlannedAttack], rest: int, robust: int, n: int) -> None:
        """Say where the cascade stands; images that fell before their time shorten what is left.

        Args:
            attack ([`PlannedAttack`]): the present one.
            ahead (`Sequence[PlannedAttack]`): those after it.
            rest (`int`): images the present attack has still to see.
            robust (`int`): images not broken so far.
            n (`int`): all images.
        """
        left = rest * attack.work + robust * sum(later.work for later in ahead)
        self._bar.total = max(1, self._bar.n + left)
        self._bar.set_postfix_str(f"{attack.name}, {robust} of {n} images robust so far", refresh=False)


class Cascade:
    """The attacks of one process on its images, one batch after the other.

    Args:
        package (`ModuleType`): `pyautoattack`.
        target ([`AttackedModel`]): the model.
        setting ([`Setting`]): what was asked for.
        images (`torch.Tensor` of shape `(N, C, H, W)`): of this process, float32 in [0, 1].
        labels (`torch.Tensor` of shape `(N,)`): theirs, on the CPU.
        tag (`dict`): what a state file belongs to.
        state_file (`Path`, *optional*): where the state is kept.
        bar ([`CascadeBar`]): told about progress.
    """

    def __init__(
        self,
        package: ModuleType,
        target: AttackedModel,
        setting: Setting,
        images: Tensor,
        labels: Tensor,
        tag: dict[str, Any],
        state_file: Path | None,
        bar: CascadeBar,
    ) -> None:
        self.package, self.target, self.setting = package, target, setting
        self.images, self.labels, self.tag, self.file, self.bar = images, labels, tag, state_file, bar

    def __call__(self, findings: Findings) -> Share:
        """Run, or go on from the state file.

        Args:
            findings ([`Findings`]): what is known already; a state that is loaded has its own.

        Returns:
            [`Share`]: the outcome.
        """
        if len(self.images) == 0:
            return Share(tag=self.tag)
        state = self._begin(findings)
        num_classes = state.logits.shape[1]
        plan, notes = plan_attacks(num_classes, self.setting.preset, self.setting.norm, tuple(self.images.shape[1:]))
        self.target.on_work = self.bar.work
        for k, attack in enumerate(plan):
            if k >= len(state.after):
                self._attack(state, attack, plan[k:])
        self.target.on_work = None
        state.findings.outputs |= self.target.output_types
        return Share(state, num_classes, notes, self.tag)

    def _begin(self, findings: Findings) -> CascadeState:
        """Load the state, or classify the clean images and look the model over."""
        x, y = self._batch(slice(0, self.setting.batch_size))
        first = self.target.logits(x).cpu()
        check_labels(self.labels, len(self.labels), first.shape[1])
        if self.file is not None and self.file.exists():
            state = CascadeState.load(self.file, self.tag)
            state.check_logits(first[:REMEMBERED_LOGITS], self.file)
            return state
        examine(self.target, x, y, findings)
        size = self.setting.batch_size
        starts = range(0, len(self.images), size)
        guesses = torch.cat([self.target(self._batch(slice(s, s + size))[0]).argmax(1).cpu() for s in starts])
        clean = guesses == self.labels
        distances, logits = torch.zeros(len(clean)), first[:REMEMBERED_LOGITS].clone()
        return CascadeState(clean, clean.clone(), clean.clone(), guesses, distances, logits, findings=findings)

    def _batch(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        rows_there = rows.to(self.images.device) if isinstance(rows, Tensor) else rows
        images = self.images[rows_there].to(self.target.device)
        return images.contiguous(), self.labels[rows].to(self.target.device)

    def _attack(self, state: CascadeState, attack: PlannedAttack, ahead: Sequence[PlannedAttack]) -> None:
        """Run one attack to its end, from the batch the state stands at; note each batch."""
        if len(state.counts) == len(state.after):
            state.counts.append(StageCount(attack.name))
            state.entered, state.batches = state.robust.clone(), 0
        listener = _GradientListener(state.findings)
        tool = self.package.AutoAttack(
            self.target,
            norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[self.setting.norm],
            eps=self.setting.eps,
            seed=self.setting.seed,
            version="standard",
            device=self.target.device,
        )
        perturb = prepare(tool, attack, self.setting.seed, listener)
        batches = state.entered.nonzero()[:, 0].split(self.setting.batch_size)
        count = state.counts[-1]
        for number, rows in enumerate(batches):
            if number < state.batches or len(rows) == 0:
                continue
            rest = sum(len(later) for later in batches[number:])
            self.bar.stands(attack, ahead[1:], rest, int(state.robust.sum()), len(state.robust))
            self.target.forwards = self.target.backwards = 0
            began = time.perf_counter()
            x, y = self._batch(rows)
            self._judge(state, rows, x, y, perturb(x.clone(), y.clone()))
            count.seconds += time.perf_counter() - began
            count.forwards += self.target.forwards
            count.backwards += self.target.backwards
            state.batches = number + 1
            self._save(state)
        state.after.append(state.robust.clone())
        self._save(state)

    def _judge(self, state: CascadeState, rows: Tensor, x: Tensor, y: Tensor, x_adv: Tensor) -> None:
        """Believe an attack only what can be checked: within budget and box, finite, and classified otherwise."""
        guesses = self.target(x_adv).argmax(1)
        difference = (x_adv - x).flatten(1)
        order, eps = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[self.setting.norm], self.setting.eps
        distances = torch.linalg.vector_norm(difference, ord=order, dim=1)
        # Rounding of x + eps for L-inf; for the others of a sum over all pixels.
        limit = eps + 1e-6 if self.setting.norm == "linf" else eps * (1 + 1e-4)
        inside = (x_adv >= 0).flatten(1).all(1) & (x_adv <= 1).flatten(1).all(1) & (distances <= limit)
        fooled = guesses != y
        state.findings.rejected += int((fooled & ~inside).sum())
        broken = (fooled & inside).cpu()
        state.robust[rows[broken]] = False
        state.predictions[rows[broken]] = guesses.cpu()[broken]
        state.distances[rows[broken]] = distances.float().cpu()[broken]

    def _save(self, state: CascadeState) -> None:
        if self.file is not None:
            state.save(self.file, self.tag)


class _GradientListener:
    """Takes the place of the package's logger, which says how many starting points have no gradient."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def warning(self, text: str) -> None:
        found = re.search(r"there are (\d+) points with zero gradient", text)
        if found:
            self.findings.zero_starts += int(found[1])
