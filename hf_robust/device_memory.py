"""How much memory a device has, and how much of it is free."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

__all__ = ["device_memory"]


def _limit_of_container() -> tuple[int, int] | None:
    """Bytes that this process's control group may use and has used; `None` without a limit."""
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (root / limit).read_text().strip(), (root / used).read_text().strip()
        except OSError:
            continue
        if most.isdigit() and int(most) < 2**60:
            return int(most), int(now)
    return None


def device_memory(device: torch.device | str) -> tuple[int, int]:
    """Bytes that a process could still get on a device, and all there are; on a CPU of the machine or its container.

    Args:
        device (`torch.device` or `str`): a CPU or an accelerator.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    host = psutil.virtual_memory()
    limit = _limit_of_container()
    if limit is None:
        return host.available, host.total
    return min(host.available, max(0, limit[0] - limit[1])), min(host.total, limit[0])
