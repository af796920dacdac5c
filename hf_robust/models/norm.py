"""Named norm branches: one set of statistics and affine parameters per kind of input, in any torch model.

Adversarial and clean images have different feature statistics. Layers that keep running statistics are therefore
duplicated, one copy per named branch, while every other weight is shared; a plain switch object chooses the branch of
the next forward pass.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BranchSwitch", "NormBranches", "add_norm_branches", "export_branch", "synchronize_norms", "use_branch"]


class BranchSwitch:
    """Chooses the norm branch of the next forward pass; one plain object shared by all norm layers of a model.

    The branch is an ordinary Python attribute, so ``torch.compile`` guards on it and builds one graph per branch.

    Args:
        branches (`Sequence[str]`): Names of the branches, Python identifiers, the first one active at the start.

    Attributes:
        branch (`str`): Name of the active branch. Prefer [`use_branch`], which checks the name and restores it.
        branches (`tuple[str, ...]`): All names.

    Raises:
        ValueError: For no name, a repeated name or one that cannot be a module name.
    """

    def __init__(self, branches: Sequence[str] = ("clean", "adv")) -> None:
        names = (branches,) if isinstance(branches, str) else tuple(branches)
        if (
            not names
            or len(set(names)) != len(names)
            or not all(isinstance(n, str) and n.isidentifier() for n in names)
        ):
            raise ValueError(
                f"norm branches must be one or more different identifiers, got {branches!r}: "
                'write for example ("clean", "adv")'
            )
        self.branches: tuple[str, ...] = names
        self.branch: str = names[0]

    def check(self, branch: str) -> str:
        """The name itself when the branch exists.

        Args:
            branch (`str`): Name to look up.

        Returns:
            `str`: The same name.

        Raises:
            ValueError: For an unknown name; the message lists the known ones.
        """
        if branch not in self.branches:
            raise ValueError(
                f"unknown norm branch {branch!r}: this model has {', '.join(map(repr, self.branches))}; "
                "ask for one of these or build the model with more norm branches"
            )
        return branch

    def __repr__(self) -> str:
        return f"BranchSwitch(branches={self.branches!r}, branch={self.branch!r})"


class NormBranches(nn.Module):
    """One norm layer per branch; the forward pass uses the branch that the switch names.

    The children carry the names of the branches, so a state dict reads ``bn1.clean.weight``, ``bn1.adv.weight``.
    Reads of public attributes that the wrapper does not have (``weight``, ``num_features``, ``running_mean``, ``act``
    ...) answer for the active branch.

    Args:
        norm (`nn.Module`): The layer to duplicate. It becomes the first branch, the others start as exact copies.
        switch ([`BranchSwitch`]): The switch of the whole model.
    """

    def __init__(self, norm: nn.Module, switch: BranchSwitch) -> None:
        super().__init__()
        # A plain object, neither module nor tensor: deepcopy keeps one switch per copy, state dicts do not see it.
        self.switch = switch
        for index, name in enumerate(switch.branches):
            if hasattr(norm, name) or hasattr(nn.Module, name):
                raise ValueError(
                    f"{name!r} cannot name a norm branch: {type(norm).__name__} has an attribute of that name; "
                    'use another one, such as "clean" or "adv"'
                )
            self.add_module(name, norm if index == 0 else copy.deepcopy(norm))
        self.train(norm.training)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output of the active branch's norm layer.

        Args:
            x (`torch.Tensor`): Features of the shape that the wrapped layer takes.
            *args (`Any`): Passed on to the wrapped layer.
            **kwargs (`Any`): Passed on to the wrapped layer.

        Returns:
            `torch.Tensor`: Same shape as `x`.
        """
        return getattr(self, self.switch.branch)(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # nn.Module's own lookup (parameters, buffers, children) comes first. Underscored names are not forwarded:
        # copy and pickle probe for them on half-built objects.
        try:
            return super().__getattr__(name)
        except AttributeError:
            switch = self.__dict__.get("switch")
            active = self.__dict__.get("_modules", {}).get(switch.branch) if switch is not None else None
            if name.startswith("_") or active is None:
                raise
            return getattr(active, name)

    def extra_repr(self) -> str:
        """Names of the branches, for printing.

        Returns:
            `str`: For example ``branches=('clean', 'adv')``.
        """
        return f"branches={self.switch.branches!r}"


def _keeps_statistics(module: nn.Module) -> bool:
    # By state rather than by class: also layers outside torch's family (frozen or in-place batch norms, EvoNorm-B0)
    # and InstanceNorm that tracks; LayerNorm and GroupNorm keep none and stay shared.
    if isinstance(module, _BatchNorm):
        return True
    buffers = module._buffers
    return any(buffers.get(name) is not None for name in ("running_mean", "running_var"))


def add_norm_branches(
    module: nn.Module, branches: Sequence[str] = ("clean", "adv"), switch: BranchSwitch | None = None
) -> BranchSwitch:
    """Gives every layer of a module that keeps running statistics one copy per branch, in place.

    Statistics and affine parameters are separate, everything else is shared. A new branch starts equal to the layer it
    was copied from. With a single branch the layers are left as they are.

    Args:
        module (`nn.Module`): Any torch model; every `_BatchNorm` subclass (timm's `BatchNormAct2d` too) and every
            other layer with running statistics is converted.
        branches (`Sequence[str]`): Names of the branches, the first one active. Defaults to ``("clean", "adv")``.
        switch ([`BranchSwitch`], *optional*): Joins an existing switch, whose branches then count instead of
            `branches`; this is how a backbone and a projector share one.

    Returns:
        [`BranchSwitch`]: The switch, to be handed to [`use_branch`].

    Raises:
        ValueError: When `module` itself is a norm layer, or already follows another switch.

    Source: dual batch norm of adversarial contrastive learning, where both statistics and affine parameters are
    separate (`models/resnet_multi_bn.py` of the released code of ACL and RCS), here by name instead of by index.
    """
    switch = BranchSwitch(branches) if switch is None else switch
    if _keeps_statistics(module):
        raise ValueError(
            f"add_norm_branches replaces layers inside a module, got the norm layer {type(module).__name__} itself: "
            "wrap it in nn.Sequential first"
        )
    parents = [m for m in module.modules() if not isinstance(m, NormBranches)]
    if any(isinstance(m, NormBranches) and m.switch is not switch for m in module.modules()):
        raise ValueError(
            "the module already has norm branches that follow another switch: pass that switch, "
            "or take one branch out with export_branch first"
        )
    if len(switch.branches) == 1:
        return switch
    done: dict[int, NormBranches] = {}  # a layer used in two places stays one layer
    inside = {id(child) for m in module.modules() if isinstance(m, NormBranches) for child in m.modules()}
    for parent in parents:
        if id(parent) in inside:
            continue
        for name, child in list(parent.named_children()):
            if not isinstance(child, NormBranches) and _keeps_statistics(child):
                if id(child) not in done:
                    done[id(child)] = NormBranches(child, switch)
                setattr(parent, name, done[id(child)])
    return switch


@contextmanager
def use_branch(switch: BranchSwitch, branch: str) -> Iterator[None]:
    """Makes a branch the active one inside the `with` block and restores the former one afterwards.

    Args:
        switch ([`BranchSwitch`]): The model's switch.
        branch (`str`): Name of the branch.

    Yields:
        `None`.

    Raises:
        ValueError: For an unknown branch; the message lists the known ones.
    """
    before, switch.branch = switch.branch, switch.check(branch)
    try:
        yield
    finally:
        switch.branch = before


def export_branch(module: nn.Module, branch: str) -> nn.Module:
    """A deep copy of a module with the plain norm layers of one branch, keys as before the branches were added.

    Args:
        module (`nn.Module`): A module with or without norm branches; it is not changed.
        branch (`str`): The branch that stays. A module without branches comes back as a plain copy.

    Returns:
        `nn.Module`: The copy.

    Raises:
        ValueError: For a branch that the module does not have; the message lists the known ones.
    """
    for layer in module.modules():
        if isinstance(layer, NormBranches):
            layer.switch.check(branch)
    out = copy.deepcopy(module)
    if isinstance(out, NormBranches):
        return getattr(out, branch)
    for parent in list(out.modules()):
        if isinstance(parent, NormBranches):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, NormBranches):
                setattr(parent, name, getattr(child, branch))
    return out


def synchronize_norms(module: nn.Module) -> int:
    """Let batch norms in train mode normalise with the statistics of all processes together, in place.

    Then P processes with N / P images each compute what one process computes with N, gradients and running statistics
    included. Layers keep their type, state and keys. Runs on every backend (torch's own `SyncBatchNorm` needs a GPU)
    and keeps the activation inside timm's `BatchNormAct2d`.

    Args:
        module (`nn.Module`): Any model; without a process group its layers act as before.

    Returns:
        `int`: The number of layers.

    Source: Ioffe and Szegedy 2015 on the global batch; variance in two passes, biased for the output and unbiased for
    the running statistics, as torch does.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.forward = types.MethodType(_synchronized_forward, layer)  # type: ignore[method-assign]
    return len(layers)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced, too: every process's output depends on every process's input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _synchronized_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    if alone or not layer.training:
        return type(layer).forward(layer, x)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    dims = [0, *range(2, x.dim())]
    with torch.autocast(x.device.type, enabled=False):
        wide = x if x.dtype == torch.float64 else x.float()
        count = torch.full((1,), wide.numel() / wide.shape[1], dtype=wide.dtype, device=x.device)
        dist.all_reduce(count)
        mean = _SumOverProcesses.apply(wide.sum(dims)) / count
        centred = wide - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / count
        y = centred * torch.rsqrt(variance + layer.eps).view(shape)
        if layer.affine:
            y = y * layer.weight.view(shape) + layer.bias.view(shape)
    if layer.track_running_stats:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            rate = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.to(layer.running_mean), rate)
            layer.running_var.lerp_((variance * count / (count - 1)).to(layer.running_var), rate)
    y = y.to(x.dtype)
    return layer.act(layer.drop(y)) if hasattr(layer, "act") else y
