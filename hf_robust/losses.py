"""The equations, as pure functions of embeddings; no state, no model, float32 inside.

Embeddings of N images arrive as one `(N, D)` tensor per view, not interleaved: row k of every tensor belongs to
image k. `gather` makes the tensors of all processes into one, with the exact gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather", "invariance_terms", "nt_xent"]

Formulation = Literal["released", "paper"]


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks and returns the local slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def gather(z: Tensor) -> Tensor:
    """Concatenate the rows of all processes, rank by rank, differentiably.

    A loss computed on the gathered rows is the loss of the global batch on every rank. Its backward pass sums the
    gradients over the ranks, and DistributedDataParallel then averages parameter gradients over the ranks: the two
    factors cancel, so that N processes give the gradient of one process on the whole batch. (Filling in only the
    own slice, or gathering without a backward, gives the right loss and a wrong gradient.)

    Args:
        z (`torch.Tensor` of shape `(N, D)`): rows of this process; every process must bring the same N.

    Returns:
        `torch.Tensor` of shape `(processes * N, D)`; `z` itself when there is one process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return z
    return _Gather.apply(z)


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalised-temperature cross-entropy of two views, averaged over all 2N anchors.

    For each of the 2N rows the partner is the other view of the same image; the denominator holds all other
    2N - 1 rows, the partner included. Cosine similarities are computed in float32.

    Args:
        z_i (`torch.Tensor` of shape `(N, D)`): embeddings of the first view, not normalised.
        z_j (`torch.Tensor` of shape `(N, D)`): embeddings of the second view; row k shows the image of `z_i[k]`.
        temperature (`float`, defaults to 0.5, as published on CIFAR and STL-10; 0.1 on ImageNet-32): positive.

    Returns:
        `torch.Tensor` of shape `()`: the mean loss; `log(2N - 1)` when all rows are equal.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.

    Source: Chen et al. 2020, Algorithm 1; released ACL code, `utils.py` (`nt_xent`), which subtracts the self
        similarity from the denominator where we mask it (equal up to rounding, stable at small temperatures).
    """
    _check_pair(z_i, z_j, temperature)
    n = z_i.shape[0]
    with torch.autocast(z_i.device.type, enabled=False):  # similarities in bf16 would cost two digits
        z = F.normalize(_at_least_float32(torch.cat([z_i, z_j])), dim=1)
        logits = z @ z.t() / temperature  # (2N, 2N)
        logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))
        partner = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(logits, partner)


def invariance_terms(
    z_i: Tensor,
    z_j: Tensor,
    z_original: Tensor,
    z_i_adv: Tensor,
    z_j_adv: Tensor,
    temperature: float = 0.5,
    formulation: Formulation = "released",
) -> tuple[Tensor, Tensor]:
    """Standard and robust term of adversarial invariant regularisation (AIR).

    With s(u, v)_k the cosine of row k of u and v divided by the temperature, and softmax over the batch index k:
    a = softmax s(i, o), b = softmax s(j, o) for the standard term, and for the robust one the products
    a~ = softmax s(i~, o) * softmax s(i~, i), b~ likewise with j, which are not normalised again.

    - `"released"`: sum_k b (log b - a) and sum_k b~ (log b~ - a~). The code hands probabilities to a KL divergence
      that expects log-probabilities; these terms produced the published numbers, and they are what AIR *is* in the
      published tables. They are not zero when the views agree: -log N - 1/N and -2 log(N)/N - N^-3.
    - `"paper"`: KL(a || b) and sum_k a~ (log a~ - log b~).

    Args:
        z_i, z_j (`torch.Tensor` of shape `(N, D)`): natural views, clean branch.
        z_original (`torch.Tensor` of shape `(N, D)`): un-augmented images, clean branch, with gradient.
        z_i_adv, z_j_adv (`torch.Tensor` of shape `(N, D)`): adversarial views, adversarial branch.
        temperature (`float`, defaults to 0.5, as published): positive.
        formulation (`str`, defaults to `"released"`): see above.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `()` each: standard term, robust term; sums over the N images.

    Raises:
        ValueError: for an unknown formulation, differing shapes or a temperature that is not positive.

    Source: Xu et al. 2023 (AIR), released code `AIR.py` (`SIR_loss`, `AIR_loss`). The code builds N x N matrices
        and keeps their diagonals; N dot products are the same.
    """
    for other in (z_j, z_original, z_i_adv, z_j_adv):
        _check_pair(z_i, other, temperature)
    i, j, original, i_adv, j_adv = (
        F.normalize(_at_least_float32(z), dim=1) for z in (z_i, z_j, z_original, z_i_adv, z_j_adv)
    )

    def log_profile(u: Tensor, v: Tensor) -> Tensor:
        return F.log_softmax((u * v).sum(1) / temperature, dim=0)

    log_a, log_b = log_profile(i, original), log_profile(j, original)
    log_a_adv = log_profile(i_adv, original) + log_profile(i_adv, i)
    log_b_adv = log_profile(j_adv, original) + log_profile(j_adv, j)
    if formulation == "released":
        return _released_divergence(log_a, log_b), _released_divergence(log_a_adv, log_b_adv)
    if formulation == "paper":
        return (log_a.exp() * (log_a - log_b)).sum(), (log_a_adv.exp() * (log_a_adv - log_b_adv)).sum()
    raise ValueError(f"formulation must be 'released' or 'paper', got {formulation!r}")


def _released_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_b.exp() * (log_b - log_a.exp())).sum()


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check_pair(z_i: Tensor, z_j: Tensor, temperature: float) -> None:
    if z_i.dim() != 2 or z_i.shape != z_j.shape:
        raise ValueError(
            f"embeddings must be two tensors of equal shape (N, D), got {tuple(z_i.shape)} and {tuple(z_j.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: the published value is 0.5")
