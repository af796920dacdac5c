"""Activation checkpointing of a backbone block by block, aware of norm branches and running statistics."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .norm import BranchSwitch, use_branch

__all__ = ["checkpoint_blocks", "network_blocks"]


def network_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: residual blocks, transformer blocks, stages.

    Args:
        network (`nn.Module`): any timm backbone.

    Returns:
        `list[nn.Module]`: in the order of the network, none inside another: members of an outermost `nn.Sequential` or
            `nn.ModuleList` that are made of several layers with weights. Empty where there are none.
    """
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            for member in child:
                layers = [m for m in member.modules() if any(True for _ in m.parameters(recurse=False))]
                found += [member] if len(layers) > 1 and not isinstance(member, nn.Sequential) else []
                found += network_blocks(nn.ModuleList([member])) if isinstance(member, nn.Sequential) else []
        else:
            found += network_blocks(child)
    return found


def checkpoint_blocks(network: nn.Module, switch: BranchSwitch) -> int:
    """Keep only the inputs of every block for the backward pass and compute the rest once more there, in place.

    Loss and gradients are those of the plain network, bit by bit on one machine; a training step costs one forward
    pass more and keeps the activations of one block at a time. The second computation runs through the norm branch of
    the first and leaves running statistics alone. timm's own switch (`set_grad_checkpointing`) does neither: norms
    would move twice per step, and the branch would be the one that happens to be active during the backward pass.
    In evaluation mode, in which attacks run, nothing changes.

    Args:
        network (`nn.Module`): a backbone, its norm layers branched or not.
        switch ([`BranchSwitch`]): which branch is active.

    Returns:
        `int`: number of blocks; 0 when the network has none, and nothing has changed.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; `torch.utils.checkpoint`.
    """
    blocks = network_blocks(network)
    for block in blocks:
        block.checkpoint_switch = switch  # type: ignore[assignment]  # a plain object, which deepcopy follows
        block.forward = types.MethodType(_checkpointed, block)  # type: ignore[method-assign]
    return len(blocks)


def _checkpointed(block: Any, *args: Any, **kwargs: Any) -> Any:
    forward = types.MethodType(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    branch = block.checkpoint_switch.branch

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _again(block, branch)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _again(block: Any, branch: str) -> Iterator[None]:
    """The branch of the first computation; running statistics are stand-ins that are thrown away."""
    kept = [(m._buffers, name, b) for m in block.modules() for name, b in m._buffers.items() if b is not None]
    for buffers, name, buffer in kept:
        buffers[name] = buffer.clone()
    try:
        with use_branch(block.checkpoint_switch, branch):
            yield
    finally:
        for buffers, name, buffer in kept:
            buffers[name] = buffer
