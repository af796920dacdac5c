"""Weights shared out between processes (FSDP2): each process keeps a part of every weight and its state."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from hf_robust.callbacks import share_from_first
from hf_robust.models.checkpointing import network_blocks

__all__ = ["ShardedTraining", "copy_whole", "shard", "whole_state"]

ENTRIES = ("embed", "features", "head")  # of a pre-training model, beside `forward`


def shard(model: Any, device: torch.device) -> None:
    """Share the weights of a pre-training model out between all processes, in place, with torch's FSDP2.

    Each process keeps 1/P of every weight. Blocks of the backbone are gathered one at a time when an image passes and
    freed behind it, the layers between them together. Weights stay in their own precision, so that loss and gradients
    are those of plain data-parallel training up to the order of sums; buffers (running statistics) stay whole.

    An attack calls the model's methods rather than the model. They are therefore registered with FSDP as entries; a
    method called inside another entry finds the weights gathered already and passes straight through.

    Args:
        model (`Any`): a [`RobustModelForPreTraining`] with the same weights on every process; `forward` is called as
            a module, `embed`, `features` and `head` as methods.
        device (`torch.device`): where it is.

    Source: `torch.distributed.fsdp.fully_shard`, `register_fsdp_forward_method`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    entry = _Entry()
    methods = {name: getattr(model, name) for name in ENTRIES}
    model.forward = entry.inner(model.forward)
    for block in network_blocks(model.backbone):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The root, too, is freed behind every pass: an attack ends without a training backward that would do it.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for name, method in methods.items():
        register_fsdp_forward_method(model, name)
        setattr(model, name, entry.outer(getattr(model, name), method))


class _Entry:
    """Whether a call has entered the sharded network already."""

    def __init__(self) -> None:
        self._inside = False

    def inner(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, marking that it runs."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._inside = self._inside, True
            try:
                return method(*args, **kwargs)
            finally:
                self._inside = before

        return call

    def outer(self, gathering: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """`gathering` from outside, `plain` from inside another entry."""
        entered = self.inner(gathering)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if self._inside else entered(*args, **kwargs)

        return call


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@torch.no_grad()
def copy_whole(sharded: nn.Module, target: nn.Module) -> None:
    """Write the whole weights and the buffers of a sharded network into an ordinary one; called by all processes.

    Args:
        sharded (`nn.Module`): as [`shard`] left it.
        target (`nn.Module`): a copy from before, on any device; changed in place on every process.
    """
    sources = [*sharded.named_parameters(), *sharded.named_buffers()]
    targets: dict[str, Tensor] = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    for name, value in sources:
        targets[name].copy_(_whole(value))


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser as one process would have it; called by all processes.

    Args:
        state (`dict[str, Any]`): `optimizer.state_dict()`.

    Returns:
        `dict[str, Any]`: the same with whole tensors.
    """
    return {**state, "state": {k: {n: _whole(v) for n, v in s.items()} for k, s in state["state"].items()}}


def _own_part(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a whole optimiser state that belongs to this process; a hook of `load_state_dict`."""
    from torch.distributed.tensor import distribute_tensor

    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, parameter: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not hasattr(parameter, "full_tensor"):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    parts = {k: {n: part(v, parameters[k]) for n, v in s.items()} for k, s in state["state"].items()}
    return {**state, "state": parts}


class ShardedTraining(Trainer):
    """A `transformers.Trainer` that can share weights and optimiser state out between its processes.

    With `args.shard_weights` on several processes, `model` is sharded while `train` runs, and an ordinary model again
    afterwards. Checkpoints hold whole tensors in the ordinary format, so that a run may go on with another number of
    parts. Whatever wants a whole network on the way (probe, coreset selection, export) asks for `network`.

    Better than plain data-parallel training only where weights, gradients and optimiser states fill the memory:
    every attack step gathers all weights anew.
    """

    args: Any
    model: Any
    optimizer: Any
    shardable: ClassVar[bool] = True
    _ordinary: Any = None  # while weights are sharded: a whole copy, as of the last `gather_network`

    @property
    def sharded(self) -> bool:
        """Whether this process holds parts of the weights only, at this moment."""
        return self._ordinary is not None

    @property
    def network(self) -> Any:
        """The model without wrappers; while weights are sharded, the copy that `gather_network` filled last."""
        return self._ordinary if self.sharded else self.accelerator.unwrap_model(self.model)

    def gather_network(self, device: torch.device | str = "cpu") -> Any:
        """Bring `network` up to date; called by all processes.

        Args:
            device (`torch.device` or `str`): where the copy shall be, until the next call; without effect on a model
                that is not sharded.

        Returns:
            `Any`: `network`.
        """
        if self.sharded:
            copy_whole(self.model, self._ordinary.to(device))
        return self.network

    @classmethod
    def check_sharding(cls, args: Any) -> None:
        """Refuse to share out what this trainer needs whole.

        Args:
            args ([`RobustTrainingArguments`]): of a trainer that is being built.

        Raises:
            ValueError: naming the way out.
        """
        if args.shard_weights and not cls.shardable:
            raise ValueError(
                f"shard_weights=True is not supported by {cls.__name__}, which keeps its best weights whole: "
                "leave it out (plain data-parallel training, examples/accelerate/multi_gpu.yaml)"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.shard_weights and self.args.world_size > 1 and not self.sharded:
            share_from_first(self.model)  # as DDP does
            ordinary = copy.deepcopy(self.model).cpu()
            # Accelerate adds the precision of the training, and takes a prepared model as it is from now on.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            shard(self.model, self.args.device)
            self._ordinary = ordinary
        return super()._prepare_for_training(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`. Afterwards the model is whole on every process."""
        result = super().train(*args, **kwargs)
        if self.sharded:
            model = self.gather_network(self.args.device)
            self._ordinary = self.optimizer = self.lr_scheduler = None  # both would go on with the parts
            self.model = self.model_wrapped = model.train()
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the whole model; see `Trainer.save_model`."""
        model, self.model = self.model, self.gather_network() if self.sharded else self.model
        try:
            super().save_model(*args, **kwargs)
        finally:
            self.model = model

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(*args, **kwargs)
        state = whole_state(self.optimizer.state_dict())
        self.optimizer.state_dict = lambda: state  # what the stock method writes, on one process
        try:
            super()._save_optimizer_and_scheduler(*args, **kwargs)
        finally:
            del self.optimizer.state_dict

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        if not self.sharded:
            return super()._load_optimizer_and_scheduler(*args, **kwargs)
        hook = self.optimizer.optimizer.register_load_state_dict_pre_hook(_own_part)
        try:
            super()._load_optimizer_and_scheduler(*args, **kwargs)
        finally:
            hook.remove()
