"""LARS as the released code applies it, and the warm-up plus cosine schedule in fractional epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["LARS", "make_optimizer", "paper_schedule", "step_decay", "warmup_cosine"]

logger = logging.getLogger(__name__)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling with momentum, on every tensor, biases and norm affines included.

    For each tensor: ratio = eta |w| / (|g| + weight_decay |w|), or 1 where |w| or |g| is below 1e-15;
    v <- momentum v + lr ratio (g + weight_decay w); w <- w - v. The learning rate multiplies *inside* the momentum
    buffer (timm's `Lars` multiplies outside, so that a schedule acts differently). No value leaves the device.

    Args:
        params: parameters or parameter groups.
        lr (`float`): learning rate; 5.0 as published for batch 512 on CIFAR-10.
        momentum (`float`, defaults to 0.9, as released).
        weight_decay (`float`, defaults to 1e-6, as released).
        eta (`float`, defaults to 1e-3, as released): trust coefficient.

    Raises:
        ValueError: for a negative hyper-parameter.

    Source: You et al. 2017; the released ACL/AIR/RCS/DynACL code, `optimizer/lars.py`, which we follow, including
        that a tensor that is exactly zero takes its first step with ratio 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        eta: float = 1e-3,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eta", eta)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_device.setdefault((p.device, p.dtype), []).append(p)
            for params in by_device.values():
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = [_own_part(self.state[p]["momentum_buffer"]) for p in params]
        mesh = getattr(params[0], "device_mesh", None)
        grads = [_own_part(p.grad) for p in params]
        params = [_own_part(p) for p in params]
        weight_norm, grad_norm = _norms(params, mesh), _norms(grads, mesh)
        decay = group["weight_decay"]
        ratio = group["eta"] * weight_norm / (grad_norm + decay * weight_norm)
        ratio = torch.where((weight_norm < 1e-15) | (grad_norm < 1e-15), torch.ones_like(ratio), ratio) * group["lr"]
        update = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_mul_(update, list(ratio.unbind()))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, update)
        torch._foreach_sub_(params, buffers)


def _own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor that is shared out between processes; else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _norms(parts: list[Tensor], mesh: Any) -> Tensor:
    """Norm of every tensor, `(n,)`; of tensors that are shared out, over all processes."""
    norms = torch.stack(torch._foreach_norm(parts))
    if mesh is None:
        return norms
    squares = norms.square_()
    dist.all_reduce(squares, group=mesh.get_group())
    return squares.sqrt_()


def make_optimizer(
    kind: str,
    params: list[nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    nesterov: bool = True,
) -> torch.optim.Optimizer:
    """Build an optimiser by name.

    Args:
        kind (`str`): `"lars"` (every tensor alike, as released), `"sgd"` or `"adamw"` (no decay on vectors and
            biases).
        params (`list[nn.Parameter]`): what is trained.
        lr (`float`): peak learning rate.
        momentum (`float`): of lars and sgd.
        weight_decay (`float`): 0 or more.
        betas, eps: of adamw.
        nesterov (`bool`, defaults to `True`): of sgd, when the momentum is positive.

    Returns:
        `torch.optim.Optimizer`: without state.
    """
    if kind == "lars":
        return LARS(params, lr, momentum, weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0)
    if kind == "adamw":
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr, betas, eps)
    raise ValueError(f"optimizer must be lars, sgd or adamw, got {kind!r}")


def step_decay(epoch: float, base_lr: float, milestones: Sequence[float]) -> float:
    """Learning rate that falls to a tenth at each milestone.

    Args:
        epoch (`float`): epochs already trained.
        base_lr (`float`): rate before the first milestone.
        milestones (`Sequence[float]`): epochs.

    Returns:
        `float`: `base_lr` times 0.1 to the number of milestones reached.

    Source: released SAT code for ImageNet (`adjust_learning_rate`) and the fine-tuning scripts.
    """
    return base_lr * 0.1 ** sum(epoch + 1e-9 >= m for m in milestones)


def warmup_cosine(epoch: float, *, base_lr: float, warmup_epochs: float, epochs: float, min_lr: float = 1e-6) -> float:
    """Learning rate at a fractional epoch: linear warm-up from 0, then a cosine down to `min_lr`.

    Args:
        epoch (`float`): u, in epochs; iteration t (counted from 0) of a run with L iterations per epoch uses
            u = (t + 1) / L, because the released code steps its scheduler *before* the batch.
        base_lr (`float`): peak learning rate, reached at `warmup_epochs`.
        warmup_epochs (`float`): length of the warm-up, 0 or more; published: 10 of 1000.
        epochs (`float`): length of the run, positive.
        min_lr (`float`, defaults to 1e-6, as released): absolute floor of the cosine.

    Returns:
        `float`: the learning rate.

    Source: released ACL/AIR/RCS code, `cosine_annealing` in the training scripts; same curve for a full epoch and for
        a coreset, since only the fractional epoch enters.
    """
    if epoch < warmup_epochs:
        return base_lr * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return base_lr
    phase = min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * phase))


def paper_schedule(
    epoch_at: Callable[[int], float],
    epochs: float,
    *,
    base_lr: float,
    warmup_epochs: float,
    min_lr: float,
    granularity: str,
    milestones: Sequence[float] = (),
) -> Callable[[int], float]:
    """Build the learning rate of a step, as a share of the peak.

    Args:
        epoch_at (`Callable[[int], float]`): epochs trained after a number of steps.
        epochs (`float`): length of the run.
        base_lr, warmup_epochs, min_lr: of `warmup_cosine`.
        granularity (`str`): `"step"`, or `"epoch"` for a rate that changes once per epoch (official DynACL).
        milestones (`Sequence[float]`): with any, `step_decay` instead of warm-up and cosine.

    Returns:
        `Callable[[int], float]`: step (from 0) to multiplier. A warning is logged when the run ends in its warm-up.
    """
    if warmup_epochs >= epochs and not milestones:
        text = "the run of %.3g epochs ends inside the warm-up of %g, below the learning rate asked for: lower "
        logger.warning(text + "--warmup_epochs", epochs, warmup_epochs)

    def multiplier(step: int) -> float:
        """Share of the peak."""
        if milestones:
            return step_decay(epoch_at(step), 1.0, milestones)
        epoch = epoch_at(step + 1)
        if granularity == "epoch":
            index = math.floor(epoch_at(step) + 1e-9)
            epoch = index + 1 if index < warmup_epochs else index
        rate = warmup_cosine(epoch, base_lr=base_lr, warmup_epochs=warmup_epochs, epochs=epochs, min_lr=min_lr)
        return rate / base_lr if base_lr else 0.0

    return multiplier
