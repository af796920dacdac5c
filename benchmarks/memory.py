"""Peak memory of one call beyond what was there before it: a process of its own on a CPU, the allocator on a GPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = ["child_peak", "peak_of"]

MARK = "peak bytes: "


def _resident(key: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (highest) of this process in bytes; `None` where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def peak_of(action: Callable[[], object], device: torch.device | str) -> int:
    """Highest memory during two calls, beyond what is held before them, in bytes.

    Args:
        action (`Callable[[], object]`): a step, its weights and data already there.
        device (`torch.device` or `str`): whose memory is meant.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        action()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    try:  # forget the peak of what came before, imports included
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    before = _resident("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    action()
    action()
    after = _resident("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(0, after - before)


def child_peak(name: str, arguments: Sequence[str]) -> int | None:
    """The peak of one variant in a fresh process: what another variant has left behind does not count.

    Where the C library is glibc, the process gives tensors of 64 KiB and more back to the system when they die. By
    itself glibc keeps gaps between them, in a size that differs from run to run.

    Args:
        name (`str`): of the variant, `"acl/bf16/eager"`.
        arguments (`Sequence[str]`): of `python -m benchmarks`.

    Returns:
        `int`, *optional*: bytes; `None` when the process failed.
    """
    command = [sys.executable, "-m", "benchmarks", *arguments, "--peak_of", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return int(json.loads(lines[-1].removeprefix(MARK))) if done.returncode == 0 and lines else None
