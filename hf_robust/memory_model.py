"""How much memory a training step will need, found out before it is taken, and the batch that fits.

The method's own step is run with tensors that have shapes and no content: nothing is computed, nothing is allocated,
and every tensor that would live is counted from its birth to its death. So the count knows of every method, every
backbone, precision and activation checkpointing, of the similarity matrices of a contrastive loss and of the rows
that other processes bring to it. It does not know what a library takes beside tensors: workspaces of convolutions,
blocked weight layouts, gaps between allocations. On a CPU tests find peaks of two networks within a fifth of it when
the C library leaves no gaps; what gaps take is said in docs/guides/large_data.md.
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hf_robust.attacks import LossFn, frozen
from hf_robust.device_memory import device_memory
from hf_robust.losses import pretended
from hf_robust.objectives.base import Objective, StepContext

__all__ = [
    "TOLERANCE",
    "StepMemory",
    "check_memory",
    "check_training_memory",
    "step_memory",
    "suggest_batch_size",
]

logger = logging.getLogger(__name__)

TOLERANCE = 0.35  # of the count: left free by a suggested batch, for gaps between tensors and for workspaces
_TOO_HIGH = 0.25  # of the count: with activation checkpointing peaks lie below it; what is refused cannot fit
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_STATES = {"lars": 1, "sgd": 1, "adamw": 2}  # values that an optimiser keeps per weight
_MOST_PER_PIXEL = 20_000  # more than any backbone keeps per pixel and pass: below it nobody has to count


@dataclass(frozen=True)
class StepMemory:
    """What one training step on one process needs, in bytes.

    Args:
        batch_size (`int`): images of the step on this process.
        weights (`int`): parameters and buffers, of the momentum encoder, too; they are there before a training begins.
        state (`int`): optimiser state, and the copy of the network that the attack looks through.
        activations (`int`): the highest total of everything that comes and goes in a step, gradients included.
    """

    batch_size: int
    weights: int
    state: int
    activations: int

    @property
    def needed(self) -> int:
        """What has to be free before the training begins, in bytes."""
        return self.state + self.activations

    @property
    def total(self) -> int:
        """Peak of the process, in bytes, without interpreter, libraries and data."""
        return self.weights + self.needed


class _Living(TorchDispatchMode):
    """Counts the bytes of all storages from birth to death."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def know(self, tensor: Tensor) -> None:
        """Leave a tensor out of the count: it was there before."""
        self._known[tensor.untyped_storage()._cdata] = None

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.now += size
            self.peak = max(self.peak, self.now)
            self._known[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self.now -= size


def _hollow(model: Any, mode: FakeTensorMode) -> Any:
    """A copy whose tensors have no content, in training mode."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            hollow = mode.from_tensor(tensor.detach())
            memo[id(tensor)] = (
                nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
            )
    copied = copy.deepcopy(model, memo)
    for layer in copied.modules():
        if isinstance(layer, _BatchNorm):  # one that asks other processes is counted as one that does not
            layer.__dict__.pop("forward", None)
    return copied.train()


def _bytes(model: Any, trainable_only: bool = False) -> int:
    tensors = {id(t): t for t in model.parameters() if t.requires_grad or not trainable_only}
    if not trainable_only:
        tensors |= {id(t): t for t in model.buffers()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def step_memory(
    model: Any,
    objective: Objective,
    batch_size: int,
    *,
    precision: Literal["no", "bf16", "fp16"] = "no",
    optimizer: Literal["lars", "sgd", "adamw"] = "lars",
    processes: int = 1,
) -> StepMemory:
    """Foresee the peak memory of a training step.

    Takes a second or so at any batch size and needs no memory: it may be asked on a laptop what a model needs on a
    large GPU. The kernels that run on a GPU may keep a little more or less than those that are counted.

    Args:
        model (`Any`): a [`RobustModelForPreTraining`], wrapped in nothing; stays as it is.
        objective ([`Objective`]): the method.
        batch_size (`int`): images of the step on one process.
        precision (`str`, defaults to `"no"`): `"no"` (float32), `"bf16"` or `"fp16"` autocast.
        optimizer (`str`, defaults to `"lars"`): whose state is counted.
        processes (`int`, defaults to 1): processes whose embeddings meet in a contrastive loss.

    Returns:
        [`StepMemory`]: in bytes.

    Raises:
        ValueError: for no image, or an unknown precision or optimiser.
    """
    if batch_size < 1 or processes < 1:
        raise ValueError(f"batch_size and processes must be 1 or more, got {batch_size} and {processes}")
    if precision not in ("no", *_HALF) or optimizer not in _STATES:
        raise ValueError(
            f"precision must be no, bf16 or fp16 and optimizer lars, sgd or adamw, got {precision!r}, {optimizer!r}"
        )
    weights, teacher = _bytes(model), _bytes(model) if objective.teacher_kind else 0
    copies = _bytes(model) // (2 if precision in _HALF else 1) if objective.adversarial else 0
    state = _STATES[optimizer] * _bytes(model, trainable_only=True) + copies
    return StepMemory(
        batch_size=batch_size,
        weights=weights + teacher,
        state=state,
        activations=_peak_of_step(model, objective, batch_size, _HALF.get(precision), processes),
    )


def _peak_of_step(model: Any, objective: Objective, images: int, dtype: torch.dtype | None, processes: int) -> int:
    device, size, living = next(model.parameters()).device, model.config.image_size, _Living()

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pretended(processes):
        network, kind = _hollow(model, mode), objective.teacher_kind
        teacher: Any = _hollow(model, mode).requires_grad_(False) if kind else None
        for held in filter(None, (network, teacher)):
            for tensor in (*held.parameters(), *held.buffers()):
                living.know(tensor)
        with living:
            batch = {name: torch.empty(images, 3, size, size, device=device) for name in objective.views}
            labels = ("label", *(f"pseudo_label_{k}" for k in objective.pseudo_classes))
            batch |= dict.fromkeys(labels, torch.empty(images, dtype=torch.int64, device=device))
            answers = partial(teacher.features, branch=teacher.default_branch) if kind == "frozen" else teacher
            context = StepContext(_one_gradient(network, autocast), 0.0, answers, autocast)
            with autocast():
                terms = objective(network, batch, context)
                loss = torch.stack(list(terms.values())).sum()
            del terms
            if loss.requires_grad:
                loss.backward()
    return living.peak


def _one_gradient(network: nn.Module, autocast: Callable[[], Any]) -> Callable[[LossFn, Tensor], Tensor]:
    """An attack of one step: the others need the same again, one after the other."""

    def attack(loss_fn: LossFn, x: Tensor) -> Tensor:
        images = x.detach().clone().requires_grad_()
        with frozen(network):
            with autocast():
                loss = loss_fn(images)
            (gradient,) = torch.autograd.grad(loss, [images])
        return (images + gradient.sign()).detach()

    return attack


def suggest_batch_size(
    model: Any,
    objective: Objective,
    *,
    memory: int | None = None,
    at_most: int = 512,
    precision: Literal["no", "bf16", "fp16"] = "no",
    optimizer: Literal["lars", "sgd", "adamw"] = "lars",
    processes: int = 1,
) -> int:
    """The largest batch per process whose step is foreseen to fit, with `TOLERANCE` to spare.

    The learning rate belongs to the batch: the published 5.0 of LARS is for 512 images.

    Args:
        model (`Any`): a [`RobustModelForPreTraining`]; stays as it is.
        objective ([`Objective`]): the method.
        memory (`int`, *optional*): bytes for the step and the optimiser, weights not counted; default: what is free
            where the model is.
        at_most (`int`, defaults to 512): the largest batch wanted.
        precision (`str`, defaults to `"no"`): as in `step_memory`.
        optimizer (`str`, defaults to `"lars"`): likewise.
        processes (`int`, defaults to 1): likewise.

    Returns:
        `int`: a multiple of 8 from 16 on, smaller ones as they come; 0 when not even two images fit.
    """
    room = device_memory(next(model.parameters()).device)[0] if memory is None else memory

    def fits(images: int) -> bool:
        found = step_memory(model, objective, images, precision=precision, optimizer=optimizer, processes=processes)
        return found.needed * (1 + TOLERANCE) <= room

    sizes = [n for n in (*range(2, 16), *range(16, at_most, 8), at_most) if n <= at_most]
    low, high = -1, len(sizes) - 1  # sizes[low] fits, and nothing above sizes[high] does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle - 1)
    return sizes[low] if low >= 0 else 0


def check_memory(
    model: Any,
    objective: Objective,
    batch_size: int,
    *,
    sharing: int = 1,
    first: bool = True,
    **setting: Any,
) -> StepMemory | None:
    """Say before a training begins whether its batch will fit, and which one would.

    One line in the log (level INFO) when it fits, a warning when less is free than a step is foreseen to need.
    Nothing is counted for networks and batches so small that they fit anywhere, nor where the method's step cannot be
    run without content (what it does depends on values of tensors).

    Args:
        model (`Any`): a [`RobustModelForPreTraining`], on the device on which it will train.
        objective ([`Objective`]): the method.
        batch_size (`int`): images of a step on this process.
        sharing (`int`, defaults to 1): processes that share this device's memory.
        first (`bool`, defaults to `True`): whether this process writes into the log.
        setting (`Any`): `precision`, `optimizer` and `processes` of `step_memory`.

    Returns:
        [`StepMemory`], *optional*: what was found.

    Raises:
        ValueError: if the step needs more than the device has, a quarter of the count allowed for: on a CPU the system
            would otherwise end processes, maybe others than this one.
    """
    device = next(model.parameters()).device
    free, total = (value // sharing for value in device_memory(device))
    views = len(objective.views) * max(1, len(objective.paths))
    most = views * batch_size * model.config.image_size**2 * _MOST_PER_PIXEL * 4
    if most + 8 * _bytes(model) <= free // 4:
        return None
    try:
        found = step_memory(model, objective, batch_size, **setting)
    except Exception as error:  # whatever a network or a method of a third party may not be able to do without content
        logger.debug("the memory of a step could not be foreseen: %s", error)
        return None
    each = f"{found.activations / batch_size / 2**20:.1f} MiB per image"
    if found.needed <= free:
        if first:
            logger.info(
                "a step on %d images is foreseen to need %s beside weights and data (%s); %s are free on %s",
                *(batch_size, _gib(found.needed), each, _gib(free), device),
            )
        return found
    fitting = suggest_batch_size(model, objective, memory=free, at_most=batch_size, **setting)
    text = (
        f"a step on per_device_train_batch_size={batch_size} images is foreseen to need {_gib(found.needed)} beside "
        f"weights and data ({each}), and {_gib(free)} are free on {device}"
        f"{f' for each of {sharing} processes' if sharing > 1 else ''}: {_way_out(fitting)}"
    )
    if found.total * (1 - _TOO_HIGH) > total:
        raise ValueError(text)
    if first:
        logger.warning("%s", text)
    return found


def check_training_memory(trainer: Any) -> StepMemory | None:
    """Run [`check_memory`] on what a trainer is about to train; nothing is said of sharded weights.

    Args:
        trainer ([`RobustTrainer`]): before its first step.

    Raises:
        ValueError: as `check_memory`.
    """
    args = trainer.args
    if trainer.is_fsdp_enabled:
        return None
    return check_memory(
        trainer.model,
        trainer.objective,
        args.per_device_train_batch_size,
        precision=trainer.accelerator.mixed_precision,
        optimizer=args.optimizer,
        processes=args.world_size,
        sharing=int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if args.device.type == "cpu" else 1,
        first=trainer.is_world_process_zero(),
    )


def _way_out(fitting: int) -> str:
    if fitting:
        return (
            f"set --per_device_train_batch_size {fitting} and scale --learning_rate with it, or keep the batch with "
            "--bf16 true, --gradient_checkpointing true or more processes"
        )
    return (
        "not even two images are foreseen to fit: try --bf16 true and --gradient_checkpointing true, or a smaller "
        "network or image size"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
