"""One LARS update of all tensors of a pre-training network: the library's against one tensor after the other."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.comparison import compare
from benchmarks.harness import Action, Case
from benchmarks.reference import PerTensorLARS
from benchmarks.setting import LR, build_model
from hf_robust.objectives.acl import ACL
from hf_robust.optim import LARS


def comparisons(options: argparse.Namespace) -> dict[str, list[Case]]:
    """The same gradients on both sides."""

    def update(kind: type[torch.optim.Optimizer]) -> Action:
        model = build_model(options, ACL())
        generator = torch.Generator(options.device).manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, device=p.device)
        return kind(model.parameters(), LR).step  # type: ignore[call-arg, arg-type]

    return {
        "optim": [
            Case("optim/lars/reference", lambda: update(PerTensorLARS)),
            Case("optim/lars/foreach", lambda: update(LARS)),
        ]
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios."""
    return compare(options, comparisons(options))
