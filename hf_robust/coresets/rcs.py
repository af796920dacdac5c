"""RCS: robustness-aware coreset selection."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_robust.data import ImageDataset
from hf_robust.losses import DISTANCE_KINDS, ungathered
from hf_robust.models.folded import FoldedNetwork
from hf_robust.objectives.base import Objective

from .base import ChosenCoreset, Selection, SelectionTask, on_cpu
from .candidates import Chunk, Minibatches, Samples, Scorer, minibatches
from .greedy import greedy, largest_remainder
from .head import Head, process_count
from .validation import ValidationDistance

__all__ = ["RCS"]

CHUNK_BYTES = 2**30  # of head gradients that are kept together


@dataclass
class RCS(ChosenCoreset):
    """Choose the images whose training step brings attacked validation images closest to the clean ones.

    With q_c the gradient of the training loss of candidate c at the present weights, and q_U the gradient of the
    representational distance of the validation split, the search takes the candidate of largest <q_c, q_U>, steps
    theta' <- theta' - eta' q_c on the head, computes q_U anew there (with a new attack), and goes on until the budget
    is filled. Both gradients are those of the linear layers of the head (projector or classifier).

    Candidates are minibatches of one shuffled, augmented and attacked pass over the pool, as released; the last pick
    is cut so that the coreset has exactly the budget. `candidates="sample"` scores single images, within their
    minibatch, and takes as many between two updates as a minibatch has.

    `variant="released"` compares gradients averaged over the outputs of every layer, steps twice (the released code
    updates one module under two names) and rounds the budget down to whole minibatches; it is refused where its
    signature vanishes, as it does for softmax cross-entropy. The default compares the whole gradients.

    Memory beside that of the model: a candidate minibatch is attacked whole, on one process, without weight gradients
    (on P processes that is P times the images of a training step of one: `batch_size` lowers it); for minibatches
    `chunk_size` x (values of a head gradient) x 4 bytes, 0.3 GB for 97 of them and ResNet-18's projector, plus the
    signatures of `"released"`; for single images `chunk_size` x (images of a minibatch) x (values of the features of
    all passes) x 4 bytes; one folded backbone per norm branch (a second one in half
    precision where the training is); the validation images as uint8; in a training of
    lower precision, the activations of one float32 pass over a candidate minibatch. The search is made chunk by
    chunk, independently, the budget shared by largest remainder. Several processes score disjoint candidates, attack
    disjoint validation images, and exchange gains and features.

    Source: Xu et al. 2023, "Efficient Adversarial Contrastive Learning via Robustness-Aware Coreset Selection";
        released code `RCS.py`. What we change: gradients in full, one step, exact budget, every validation image.
    """

    citation: ClassVar[str] = """@inproceedings{xu2023rcs,
  title     = {Efficient Adversarial Contrastive Learning via Robustness-Aware Coreset Selection},
  author    = {Xu, Xilie and Zhang, Jingfeng and Liu, Feng and Sugiyama, Masashi and Kankanhalli, Mohan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""

    validation_fraction: float = field(
        default=0.01,
        metadata={"help": "Share of the training images kept for validation; published: 0.01, on ImageNet 0.005."},
    )
    candidates: Literal["batch", "sample"] = field(
        default="batch", metadata={"help": "What is scored: minibatches (as released) or single images (the paper)."}
    )
    variant: Literal["fixed", "released"] = field(
        default="fixed", metadata={"help": "fixed: whole gradients, exact budget; released: as the code computes."}
    )
    distance: Literal["kl_softmax", "kl_softmax_released", "kl_minmax", "js", "js_released", "ot"] = field(
        default="kl_softmax", metadata={"help": "Representational distance; released on CIFAR: kl_minmax."}
    )
    head_step_size: float = field(
        default=0.01, metadata={"help": "Step on the head after every pick, eta'; published: 0.01."}
    )
    attack_steps: None | int = field(
        default=None,
        metadata={"help": "Attack steps when candidates are scored, same total length; unset: those of training."},
    )
    validation_steps: int = field(
        default=3, metadata={"help": "Attack steps on the validation images; published: 3, on ImageNet 1."}
    )
    reattack: bool = field(
        default=True, metadata={"help": "Attack the validation images again after every pick; false: once."}
    )
    chunk_size: None | int = field(
        default=None,
        metadata={"help": "Minibatches searched together; unset: what 1 GiB of gradients holds. Released: 100."},
    )
    batch_size: None | int = field(
        default=None, metadata={"help": "Images of a candidate minibatch; unset: those of a training step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"candidates": ("batch", "sample"), "variant": ("fixed", "released"), "distance": DISTANCE_KINDS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"coreset {name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if not self.validation_fraction > 0:
            raise ValueError("RCS needs validation images: coreset validation_fraction must be above 0, e.g. 0.01")
        if self.variant == "released" and self.candidates == "sample":
            raise ValueError("coreset variant 'released' scores minibatches: leave candidates='batch'")
        if not self.head_step_size >= 0:
            raise ValueError(f"coreset head_step_size must be 0 or more, got {self.head_step_size}: published is 0.01")
        if self.attack_steps is not None and self.attack_steps < 0:
            raise ValueError(f"coreset attack_steps must be 0 or more, got {self.attack_steps}")
        if self.validation_steps < 1:
            raise ValueError(f"coreset validation_steps must be 1 or more, got {self.validation_steps}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"coreset chunk_size must be 1 or more, got {self.chunk_size}")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"coreset batch_size must be 2 or more, got {self.batch_size}: images are contrasted")

    def budget(self, pool: int, batch_size: int) -> int:
        """To the nearest image; `"released"`: rounded down to whole minibatches."""
        if self.variant == "fixed":
            return super().budget(pool, batch_size)
        batch_size = self.batch_size or batch_size
        return int(self.fraction * pool + 1e-9) // batch_size * batch_size

    def check(self, objective: Objective, model: Any, dataset: ImageDataset) -> None:
        """Refuse methods without a candidate loss, and signatures that vanish."""
        if type(objective).candidate_losses is Objective.candidate_losses:
            raise ValueError(
                f"{objective.title} has no loss by which RCS could choose images: use --coreset random, or train "
                "ACL, DynACL, AIR or SAT"
            )
        if self.variant == "released" and getattr(model.config, "head", "projector") == "classifier":
            raise ValueError(
                "coreset variant 'released' averages gradients over the classes, and the gradient of softmax "
                "cross-entropy adds up to zero over them: every gain would be rounding noise. Leave variant='fixed'"
            )

    def select(self, task: SelectionTask) -> Selection:
        """Score one pass over the pool and search it, chunk by chunk."""
        if task.budget == len(task.pool):
            return Selection(task.pool)
        task = dataclasses.replace(
            task,
            model=FoldedNetwork(task.model),
            attacked=_copy_in_half_precision(task),
            batch_size=self.batch_size or task.batch_size,
        )
        # a generator of the CPU, so that every device sees the same candidates
        order = torch.randperm(len(task.pool), generator=on_cpu(task.generator("order")))
        batches = minibatches(task.pool[order], task.batch_size)
        head = Head(task.model)
        size = self.chunk_size or max(1, CHUNK_BYTES // (4 * head.length))
        chunks = {first: batches[first : first + size] for first in range(0, len(batches), size)}
        budgets = largest_remainder(task.budget, [sum(len(rows) for rows in chunk) for chunk in chunks.values()])
        # minibatches that the first process scores, then one attack on the validation images per pick
        scored = sum(-(-len(chunk) // process_count()) for chunk in chunks.values())
        picked = sum(-(-budget // task.batch_size) for budget in budgets)
        bar = tqdm(total=scored + picked, desc="choosing a coreset", unit="step", disable=not task.show_progress)
        with bar, ungathered():
            validation = ValidationDistance(task, head, self.distance, self.validation_steps, self.reattack)
            scorer = Scorer(task, self.attack_steps)
            parts = [
                self._search(Chunk(rows, first, scorer, head, validation, bar.update), budget, task.batch_size)
                for (first, rows), budget in zip(chunks.items(), budgets, strict=True)
                if budget  # there may be more chunks than images to choose
            ]
        return Selection(torch.cat([p.indices for p in parts]), [gain for p in parts for gain in p.gains])

    def _search(self, chunk: Chunk, budget: int, batch_size: int) -> Selection:
        # the released update runs through two names of one module
        step_size, signature = self.head_step_size, None
        if self.variant == "released":
            step_size, signature = 2 * step_size, chunk.head.row_means
        kind, at_once = (Samples, batch_size) if self.candidates == "sample" else (Minibatches, 1)
        candidates = kind(chunk, step_size, signature)

        def gains() -> Tensor:
            chunk.tick()
            return candidates.gains()

        picks, found = greedy(gains, candidates.take, candidates.sizes, budget, at_once)
        return Selection(candidates.images(picks)[:budget], found)


def _copy_in_half_precision(task: SelectionTask) -> FoldedNetwork | None:
    """For the attacks of a training in half precision: weights are cast once, not in every pass."""
    kind = task.device.type
    with task.autocast():
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return None if dtype is None else FoldedNetwork(task.model, dtype)
