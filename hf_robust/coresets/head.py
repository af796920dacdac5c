"""Gradients of the last layers of a network, as flat vectors: what candidates and validation set are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from hf_robust.models.norm import use_branch

__all__ = ["Head", "process_count", "process_number", "summed", "wide"]

Weights = dict[str, Tensor]
Outputs = Callable[[str, Tensor], Tensor]  # branch, features (N, D) -> head outputs (N, P)


def process_count() -> int:
    """How many processes share a selection."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place: exact where each value is zero on all processes but one.

    Args:
        values (`torch.Tensor`): of the same shape on every process.
    """
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def wide(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they are that."""
    return values if values.dtype == torch.float64 else values.float()


class Head:
    """The linear layers of a projector or classifier as a function of their weights; the module is never written to.

    Weights and biases of every `nn.Linear` count, in float32 (float64 in a network of that); affine parameters of
    norm layers do not, as released.

    Args:
        model (`Any`): has `head_module` and `switch`; in evaluation mode.

    Source: released RCS code, `RCS.py`: gradients of the linear layers of the projection head or of the classifier.
    """

    def __init__(self, model: Any) -> None:
        self._module, self._switch = model.head_module, model.switch
        self.weights: Weights = {}
        for path, module in self._module.named_modules():
            if isinstance(module, nn.Linear):
                for name, value in module.named_parameters():
                    self.weights[f"{path}.{name}" if path else name] = wide(value.detach())

    @property
    def like(self) -> dict[str, Any]:
        """Precision and device of gradients, as arguments of a new tensor."""
        first = next(iter(self.weights.values()))
        return {"dtype": first.dtype, "device": first.device}

    @property
    def length(self) -> int:
        """Number of values of a gradient."""
        return sum(value.numel() for value in self.weights.values())

    def outputs(self, weights: Weights) -> Outputs:
        """The head with other weights.

        Args:
            weights (`dict[str, torch.Tensor]`): named as `self.weights`.

        Returns:
            `Callable[[str, Tensor], Tensor]`: branch and features `(N, D)` to outputs `(N, P)`, in float32.
        """

        def outputs(branch: str, features: Tensor) -> Tensor:
            with use_branch(self._switch, branch), torch.autocast(features.device.type, enabled=False):
                return functional_call(self._module, weights, (wide(features),))

        return outputs

    def gradient(self, loss: Callable[[Outputs], Tensor], weights: Weights) -> Tensor:
        """Gradient of a loss with respect to the linear layers.

        Args:
            loss (`Callable[[Outputs], torch.Tensor]`): the head as a function in, a scalar out.
            weights (`dict[str, torch.Tensor]`): where the gradient is taken.

        Returns:
            `torch.Tensor` of shape `(length,)`, float32.
        """
        leaves = {name: value.detach().requires_grad_(True) for name, value in weights.items()}
        with torch.enable_grad():
            found = torch.autograd.grad(loss(self.outputs(leaves)), list(leaves.values()), materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def directional(self, loss: Callable[[Outputs], Tensor], weights: Weights, direction: Tensor) -> Tensor:
        """Inner products of the gradients of many losses with one direction, without computing the gradients.

        Args:
            loss (`Callable[[Outputs], torch.Tensor]`): the head as a function in, `(N,)` losses out.
            weights (`dict[str, torch.Tensor]`): where the gradients are taken.
            direction (`torch.Tensor` of shape `(length,)`): the other factor.

        Returns:
            `torch.Tensor` of shape `(N,)`: how the inner product of the gradient of a weighted sum of the losses with
                the direction depends on the weights of the sum; two backward passes serve all N losses.
        """
        leaves = {name: value.detach().requires_grad_(True) for name, value in weights.items()}
        with torch.enable_grad():
            losses = loss(self.outputs(leaves))
            shares = torch.ones_like(losses, requires_grad=True)
            gradients = torch.autograd.grad(
                losses, list(leaves.values()), shares, create_graph=True, materialize_grads=True
            )
            product = torch.cat([g.flatten() for g in gradients]) @ direction
            (found,) = torch.autograd.grad(product, shares)
        return found

    def unflatten(self, flat: Tensor) -> Weights:
        """Cut a vector `(length,)` into tensors named and shaped as the weights."""
        parts = flat.split([value.numel() for value in self.weights.values()])
        return {n: p.view_as(v) for (n, v), p in zip(self.weights.items(), parts, strict=True)}

    def step(self, weights: Weights, gradient: Tensor, size: float) -> Weights:
        """Weights after one gradient step.

        Args:
            weights (`dict[str, torch.Tensor]`): before; not written to.
            gradient (`torch.Tensor` of shape `(length,)`): as of `gradient`.
            size (`float`): step size.
        """
        return {name: weights[name] - size * g for name, g in self.unflatten(gradient).items()}

    def row_means(self, gradients: Tensor) -> Tensor:
        """The released signature: every gradient averaged over the outputs of its layer.

        Args:
            gradients (`torch.Tensor` of shape `(K, length)`): flat gradients.

        Returns:
            `torch.Tensor` of shape `(K, inputs of all layers + number of biases)`.

        Source: released RCS code, `RCS.py`. It vanishes for softmax cross-entropy, whose gradients add up to zero
            over the classes.
        """
        means = []
        for value, part in zip(
            self.weights.values(), gradients.split([v.numel() for v in self.weights.values()], dim=1), strict=True
        ):
            means.append(part.reshape(len(part), len(value), value.numel() // len(value)).mean(1))
        return torch.cat(means, dim=1)
