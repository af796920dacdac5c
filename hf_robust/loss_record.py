"""What the losses were since the last log entry, and whether one was ever not finite; kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LossRecord", "finite", "logged_seconds"]


class LossRecord:
    """Sums of named loss terms, read only when a log entry or a checkpoint is due.

    Args:
        device (`torch.device`): where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self._terms: dict[str, Tensor] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        """Count one micro-batch.

        Args:
            terms (`dict[str, torch.Tensor]`): scalars.
            loss (`torch.Tensor`): their sum.
        """
        for name, value in {**terms, "total": loss}.items():
            detached = value.detach().float()
            self._terms[name] = self._terms[name] + detached if name in self._terms else detached
        self._count += 1
        self.broken |= ~torch.isfinite(loss.detach())

    def close(self, accelerator: Any) -> dict[str, float]:
        """Give the means over micro-batches and processes and begin anew; called by all processes.

        Args:
            accelerator (`Accelerator`): reduces.

        Returns:
            `dict[str, float]`: `loss` and `loss_<term>`.
        """
        means = accelerator.reduce(torch.stack(list(self._terms.values())) / self._count, "mean").tolist()
        named = {f"loss_{name}": value for name, value in zip(self._terms, means, strict=True) if name != "total"}
        self._terms, self._count = {}, 0
        self.share(accelerator)
        return {"loss": means[-1], **named}

    def share(self, accelerator: Any) -> None:
        """Let every process know what one has seen, so that all of them stop or none; called by all processes.

        Args:
            accelerator (`Accelerator`): reduces.
        """
        self.broken = accelerator.reduce(self.broken.float(), "sum") > 0


@torch.no_grad()
def finite(networks: list[nn.Module]) -> Tensor:
    """Whether every weight and buffer of some networks is finite, as a tensor `()` on the device.

    Args:
        networks (`list[nn.Module]`): at least one with parameters; of weights that are shared out between processes,
            the part of this one is looked at.
    """
    held: list[Any] = [t for n in networks for t in (*n.parameters(), *n.buffers()) if t.is_floating_point()]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in held]
    return torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all()


def logged_seconds(entries: list[dict[str, float]]) -> float:
    """Wall seconds of a training as of its last log entry; 0 without entries.

    Args:
        entries (`list[dict]`): of the trainer's log.
    """
    return max((entry.get("seconds", 0.0) for entry in entries), default=0.0)
