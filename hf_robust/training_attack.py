"""The attack inside a training step: its precision, what stands still around it, and what it looks through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust.attack_replay import PerturbationMemory
from hf_robust.attacks import PGD, LossFn, frozen
from hf_robust.models.folded import FoldedNetwork
from hf_robust.objectives.base import unwrapped

__all__ = ["TrainingAttack"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingAttack:
    """Hands an objective its attack, and the network to attack in the place of the one that trains.

    An attack of k steps passes a network k times forward and backward while its weights stand still. In evaluation
    mode it therefore sees a copy that is made once per step: norms are part of the convolutions, weights are cast to
    the precision of the training once, nothing asks for a weight gradient. Up to rounding this is the attack on the
    module itself, which is also what happens in training mode, on sharded weights and where nothing can be gained.

    Args:
        accelerator (`Any`): knows the precision of the training.
        eval_mode (`bool`): whether the attack sees networks in evaluation mode.
        fold_norms (`bool`): make such copies; `False`: attack the module itself.
        compile_options (`Mapping[str, Any]`, *optional*): arguments of `torch.compile` for the copies; default: they
            run eagerly.
    """

    def __init__(
        self,
        accelerator: Any,
        *,
        eval_mode: bool = True,
        fold_norms: bool = True,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._accelerator, self._eval_mode = accelerator, eval_mode
        self._copies_allowed, self._compile_options = fold_norms and eval_mode, compile_options
        self._copies: dict[nn.Module, FoldedNetwork | None] = {}
        self._memory: PerturbationMemory | None = None

    def restart(self, attack: PGD, images: int) -> None:
        """Forget what a training remembered, before the next one.

        Args:
            attack ([`PGD`]): of the training that begins.
            images (`int`): size of its data set.

        Raises:
            ValueError: for an attack with `replay` or `min_gain` on several processes.
        """
        processes = self._accelerator.num_processes
        if processes > 1 and (attack.replay or attack.min_gain):
            name = "attack_replay" if attack.replay else "attack_min_gain"
            why = "an image moves from process to process" if attack.replay else "all would have to stop together"
            raise ValueError(
                f"{name} works on one process, got {processes}: {why}; leave it out and take a shorter schedule, such "
                "as --attack_schedule decay3"
            )
        self._memory = PerturbationMemory(attack, images) if attack.replay else None

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what a resumed training would otherwise have forgotten.

        Args:
            folder (`Path`): of the checkpoint.
        """
        if self._memory is not None:
            self._memory.save(folder)

    def load(self, folder: Path) -> None:
        """Remember what a checkpoint holds; see `PerturbationMemory.load`.

        Args:
            folder (`Path`): of the checkpoint.
        """
        if self._memory is not None:
            self._memory.load(folder, self._accelerator.device)

    def bind(
        self,
        attack: PGD,
        networks: Sequence[nn.Module],
        generator: torch.Generator,
        index: Tensor | None = None,
    ) -> Callable[[LossFn, Tensor], Tensor]:
        """Make the attack of one step ready to use.

        Args:
            attack ([`PGD`]): the attack.
            networks (`Sequence[nn.Module]`): are held still meanwhile.
            generator (`torch.Generator`): of the random starts.
            index (`torch.Tensor` of shape `(N,)`, *optional*): int64, positions of the images in the data set: an
                attack with `replay` starts where its last one on these images ended.

        Returns:
            `Callable[[LossFn, Tensor], Tensor]`: loss function and images to adversarial images.
        """
        memory = self._memory if attack.replay else None
        # In half precision the gradient of a mean over a large batch underflows; the attack ignores its scale.
        scale = 1024.0 if self._accelerator.mixed_precision == "fp16" else 1.0

        def bound(loss_fn: LossFn, x: Tensor) -> Tensor:
            def loss(images: Tensor) -> Tensor:
                with self._accelerator.autocast():
                    value = loss_fn(images)
                    return value if scale == 1.0 else value * scale

            with frozen(nn.ModuleList(networks), eval_mode=self._eval_mode):
                if memory is None or index is None:
                    return attack(loss, x, generator=generator)
                x_adv = attack(loss, x, memory.start(x, index, generator), generator=generator)
                memory.keep(x_adv - x, index)
                return x_adv

        return bound

    def seen(self, model: Any) -> Any:
        """The network to attack in the place of `model`, with its present weights; see `StepContext.seen`.

        Args:
            model (`Any`): a pre-training model or teacher, wrapped or not.

        Returns:
            `Any`: has `features`, `head` and `embed`.
        """
        module = unwrapped(model)
        module = getattr(module, "_orig_mod", module)  # inside torch.compile
        if not self._copies_allowed:
            return module
        if module not in self._copies:
            self._copies[module] = self._copy(module)
        copied = self._copies[module]
        return module if copied is None else copied.refresh()

    def _copy(self, module: Any) -> FoldedNetwork | None:
        if any(hasattr(p, "full_tensor") for p in module.parameters()):  # every process holds a part of it
            return None
        dtype = _HALF.get(self._accelerator.mixed_precision)
        copied = FoldedNetwork(module, dtype, self._compile_options)
        gains = dtype is not None or self._compile_options is not None or copied.folds(module.default_branch)
        return copied if gains else None
