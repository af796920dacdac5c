"""What happens between steps: sampler epochs, the momentum encoder, shared norm statistics and the probe."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["MethodCallback", "average_buffers", "share_from_first", "update_ema"]


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Give every process the mean of the floating-point buffers (running norm statistics) of all processes.

    Args:
        module (`nn.Module`): changed in place; nothing happens with one process.

    Without it each rank would attack another evaluation-mode network, only rank 0's statistics would be saved, and a
    resumed run would differ from an uninterrupted one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.flatten().float() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def share_from_first(module: nn.Module) -> None:
    """Give every process the weights and buffers of the first.

    Args:
        module (`nn.Module`): changed in place; nothing happens with one process.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move every parameter of the momentum encoder towards the student: t <- decay t + (1 - decay) s.

    Buffers are left alone: the teacher's own train-mode passes move its running statistics.

    Args:
        teacher (`nn.Module`): changed in place.
        student (`nn.Module`): same structure; weights that are shared out between processes are gathered.
        decay (`float`): in [0, 1); 0.99 as published.

    Source: released DynACL code, `models/resnet_multi_bn.py`; called once per iteration, before the optimiser step.
    """
    targets: list[torch.Tensor] = list(teacher.parameters())
    held: list[Any] = list(student.parameters())
    sources: list[torch.Tensor] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in held]
    torch._foreach_lerp_(targets, sources, 1.0 - decay)


class MethodCallback(TrainerCallback):
    """Calls the trainer's own hooks at the moments `transformers.Trainer` announces.

    Args:
        trainer (`RobustTrainer`): has `start_epoch`, `before_step`, `after_step` and `end_epoch`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start an epoch."""
        # int, not round: after a resume in mid-epoch state.epoch is, say, 1.5, which belongs to epoch 1
        self.trainer.start_epoch(int((state.epoch or 0) + 1e-6))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the optimiser step."""
        self.trainer.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the optimiser step."""
        self.trainer.after_step()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close a round: probe, and keep checkpoints for the ends of epochs."""
        ended = self.trainer.close_round(state.epoch or 0.0)
        if not ended and args.save_strategy == "epoch":
            control.should_save = False
