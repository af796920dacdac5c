"""Catches the random starts that the library's attack draws, so that another implementation can begin there, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_robust.attacks import PGD


def stacked_noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that grows by the start of every attack, in the order of its images."""
    drawn: list[Tensor] = []
    original = PGD.first

    def start(self: PGD, x: Tensor, generator: torch.Generator | None) -> Any:
        noise = original(self, x, generator)
        drawn.append(noise.clone())
        return noise

    monkeypatch.setattr(PGD, "first", start)
    return drawn
