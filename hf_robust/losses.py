"""The equations, as pure functions of embeddings; no state, no model, float32 inside.

Embeddings of N images arrive as one `(N, D)` tensor per view, not interleaved: row k of every tensor belongs to
image k. `gather` makes the tensors of all processes into one, with the exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DISTANCE_KINDS",
    "cross_entropy",
    "gather",
    "invariance_terms",
    "kl_divergence",
    "nt_xent",
    "pretended",
    "representational_distance",
    "trades",
    "ungathered",
]

Formulation = Literal["released", "paper"]
Reduction = Literal["mean", "none"]

# Of the thread, not of the process: a selection in one thread leaves a training step in another alone.
_pretended: ContextVar[int | None] = ContextVar("pretended_processes", default=None)


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
        `torch.Tensor` of shape `(processes * N, D)`; `z` itself when there is one process or inside `ungathered`.
    """
    pretended = _pretended.get()
    if pretended is not None:
        return z if pretended == 1 else z.repeat(pretended, 1)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return z
    return _Gather.apply(z)


def ungathered() -> AbstractContextManager[None]:
    """Make `gather` return its argument, for losses of the rows of this process alone.

    Coreset selection scores different minibatches, and different numbers of them, on different processes; gathering
    would mix them, or wait for a process that has none left. Holds for the calling thread, may be nested.

    Returns:
        A context manager.
    """
    return pretended(1)


@contextmanager
def pretended(processes: int) -> Iterator[None]:
    """Make `gather` repeat its argument, as if so many processes had brought the same rows, and call none of them.

    What a step needs on several processes can then be foreseen on one. Holds for the calling thread, may be nested.

    Args:
        processes (`int`): 1 or more; 1 gives what `ungathered` does.

    Returns:
        A context manager.
    """
    token = _pretended.set(processes)
    try:
        yield
    finally:
        _pretended.reset(token)


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float = 0.5, reduction: Reduction = "mean") -> Tensor:
    """Normalised-temperature cross-entropy of two views, averaged over all 2N anchors.

    For each of the 2N rows the partner is the other view of the same image; the denominator holds all other
    2N - 1 rows, the partner included. Cosine similarities are computed in float32.

    Args:
        z_i (`torch.Tensor` of shape `(N, D)`): embeddings of the first view, not normalised.
        z_j (`torch.Tensor` of shape `(N, D)`): embeddings of the second view; row k shows the image of `z_i[k]`.
        temperature (`float`, defaults to 0.5, as published on CIFAR and STL-10; 0.1 on ImageNet-32): positive.
        reduction (`str`, defaults to `"mean"`): `"none"` for one loss per image, the mean over its two anchors. The
            loss of an image depends on all the others, which are its negatives.

    Returns:
        `torch.Tensor` of shape `()`: the mean loss; `log(2N - 1)` when all rows are equal. Of shape `(N,)` with
        `reduction="none"`, whose mean is that number.

    Raises:
        ValueError: if the shapes differ, the temperature is not positive or the reduction is unknown.

    Source: Chen et al. 2020, Algorithm 1; released ACL code, `utils.py` (`nt_xent`), which subtracts the self
        similarity from the denominator where we mask it (equal up to rounding, stable at small temperatures).
    """
    _check_pair(z_i, z_j, temperature)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    n = z_i.shape[0]
    with torch.autocast(z_i.device.type, enabled=False):  # similarities in bf16 would cost two digits
        z = F.normalize(_at_least_float32(torch.cat([z_i, z_j])), dim=1)
        logits = z @ z.t() / temperature  # (2N, 2N)
        logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))
        partner = torch.arange(2 * n, device=z.device).roll(n)
        if reduction == "mean":
            return F.cross_entropy(logits, partner)
        return F.cross_entropy(logits, partner, reduction="none").view(2, n).mean(0)


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


def representational_distance(z_clean: Tensor, z_adv: Tensor, kind: str = "kl_softmax") -> Tensor:
    """Distance of the outputs of clean and adversarial images: what a robustness-aware coreset is to lower.

    With P columns, c and a the softmax of the rows of `z_clean` and `z_adv`, m = (a + c) / 2:

    - `"kl_softmax"` (paper, d(f(x~), f(x))): KL(a || c) = sum a log(a / c), mean over the N rows.
    - `"kl_softmax_released"` (released code, ImageNet): KL(c || a), mean over all N x P elements.
    - `"kl_minmax"` (released code, CIFAR and STL-10): q log(q / p), mean over all elements, with q and p the rows of
      `z_adv` and `z_clean` stretched to [0, 1], plus 1e-8.
    - `"js"` (our fix, Jensen-Shannon as defined): (KL(a || m) + KL(c || m)) / 2, mean over the rows.
    - `"js_released"` (released code, CIFAR and STL-10): (KL(m || a) + KL(m || c)) / 2, mean over all elements.
    - `"ot"` (released code): entropic optimal transport between the two batches.

    `"kl_minmax"` is no divergence (its rows do not sum to 1): it may be negative. A constant row is stretched to
    zeros and gets no gradient, where the released code divides 0 by 0. `"ot"` matches the rows of one batch to those
    of the other at cost max(0, 1 - cosine(c_r, a_s)), so it depends on the batch and holds N x N matrices, up to some
    hundreds in the backward pass: call it with N of 256, as the released code does. Gradient flows into both
    arguments, in `"ot"` also through the plan; detach what is a constant of your problem, as an attack detaches
    `z_clean`. No kind sees a constant added to a row, so the gradient of a row sums to zero.

    Args:
        z_clean (`torch.Tensor` of shape `(N, P)`): projector outputs or logits of the clean images.
        z_adv (`torch.Tensor` of shape `(N, P)`): of the adversarial ones; row k belongs to the image of `z_clean[k]`.
        kind (`str`, defaults to `"kl_softmax"`, as the paper defines it): one of `DISTANCE_KINDS`.

    Returns:
        `torch.Tensor` of shape `()`; float32, or float64 for float64 input.

    Raises:
        ValueError: if the shapes differ or the kind is unknown.

    Source: Xu et al. 2023 (RCS); released RCS code, `RCS.py` (`kl_loss`, `JS_loss`) and `ot.py`.
    """
    _check_shapes(z_clean, z_adv)
    if kind not in _DISTANCES:
        raise ValueError(f"kind must be one of {', '.join(DISTANCE_KINDS)}, got {kind!r}")
    with torch.autocast(z_clean.device.type, enabled=False):
        return _DISTANCES[kind](_at_least_float32(z_clean), _at_least_float32(z_adv))


def cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy of class logits, in float32 at least.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): not normalised.
        labels (`torch.Tensor` of shape `(N,)`): int64, in [0, C).
        reduction (`str`, defaults to `"mean"`): `"none"` for one loss per image.

    Returns:
        `torch.Tensor` of shape `()`; `(N,)` with `reduction="none"`.
    """
    return F.cross_entropy(_at_least_float32(logits), labels, reduction=reduction)


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of the softmax distributions: sum over the classes, mean over the images, in float32 at least.

    Gradient flows into both arguments; detach what is a constant of your problem, as an attack detaches `logits_p`.

    Args:
        logits_p (`torch.Tensor` of shape `(N, C)`): of the distribution that weighs the classes.
        logits_q (`torch.Tensor` of shape `(N, C)`): of the other one.

    Returns:
        `torch.Tensor` of shape `()`: 0 or more; 0 for equal distributions.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(logits_p, logits_q)
    log_p, log_q = (F.log_softmax(_at_least_float32(z), dim=1) for z in (logits_p, logits_q))
    return _kl_elements(log_p, log_q).sum(1).mean()


def trades(logits_clean: Tensor, logits_adv: Tensor, labels: Tensor, beta: float = 6.0) -> tuple[Tensor, Tensor]:
    """The two terms of TRADES: CE(clean) and beta KL(p_clean || p_adv), whose sum is the loss.

    Args:
        logits_clean (`torch.Tensor` of shape `(N, C)`): of the clean images.
        logits_adv (`torch.Tensor` of shape `(N, C)`): of the adversarial images; row k shows the image of
            `logits_clean[k]`.
        labels (`torch.Tensor` of shape `(N,)`): int64, in [0, C).
        beta (`float`, defaults to 6, as published): weight of the divergence.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `()` each: cross-entropy, weighted divergence.

    Raises:
        ValueError: if the shapes of the logits differ.

    Source: Zhang et al. 2019, equation 5 with the divergence that its released code uses; released RobustSSL code,
        `utils.py` of the vanilla fine-tuning. Gradient flows through both arguments of the divergence there, too.
    """
    return cross_entropy(logits_clean, labels), beta * kl_divergence(logits_clean, logits_adv)


def _kl_elements(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _log_softmaxes(z_clean: Tensor, z_adv: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(z_clean, dim=1), F.log_softmax(z_adv, dim=1)


def _kl_softmax(z_clean: Tensor, z_adv: Tensor) -> Tensor:
    log_c, log_a = _log_softmaxes(z_clean, z_adv)
    return _kl_elements(log_a, log_c).sum(1).mean()


def _kl_softmax_released(z_clean: Tensor, z_adv: Tensor) -> Tensor:
    return _kl_elements(*_log_softmaxes(z_clean, z_adv)).mean()


def _js(z_clean: Tensor, z_adv: Tensor) -> Tensor:
    log_c, log_a = _log_softmaxes(z_clean, z_adv)
    log_m = torch.logaddexp(log_c, log_a) - math.log(2)
    return (_kl_elements(log_a, log_m) + _kl_elements(log_c, log_m)).sum(1).mean() / 2


def _js_released(z_clean: Tensor, z_adv: Tensor) -> Tensor:
    log_c, log_a = _log_softmaxes(z_clean, z_adv)
    log_m = torch.logaddexp(log_c, log_a) - math.log(2)
    return (_kl_elements(log_m, log_a) + _kl_elements(log_m, log_c)).mean() / 2


def _kl_minmax(z_clean: Tensor, z_adv: Tensor) -> Tensor:
    return _kl_elements((_stretch(z_adv) + 1e-8).log(), (_stretch(z_clean) + 1e-8).log()).mean()


def _stretch(z: Tensor) -> Tensor:
    low = z.amin(1, keepdim=True)
    spread = (z.amax(1, keepdim=True) - low).clamp_min(1e-12)
    # The least element is 0 whatever z is. Written as (low - low) / spread, its derivative is the difference of two
    # numbers near 1e8 (from the logarithm of 0 + 1e-8), which swallow a part of the others in float32.
    return torch.where(z == low, 0.0, (z - low) / spread)


def _optimal_transport(z_clean: Tensor, z_adv: Tensor) -> Tensor:
    clean, adversarial = (F.normalize(z.softmax(1), dim=1) for z in (z_clean, z_adv))
    cost = (1 - clean @ adversarial.t()).clamp_min(0)  # (N, N)
    return (_transport_plan(cost) * cost).sum()


def _transport_plan(
    cost: Tensor, regularisation: float = 0.01, iterations: int = 100, tolerance: float = 0.1
) -> Tensor:
    """Sinkhorn's plan between uniform marginals; constants and the 1e-6 of the logarithm as released."""
    u, v = cost.new_zeros(len(cost), 1), cost.new_zeros(1, len(cost))
    log_mass = -math.log(len(cost))
    for _ in range(iterations):
        previous = u
        u = u + regularisation * (log_mass - _log_sum((u + v - cost) / regularisation, dim=1))
        v = v + regularisation * (log_mass - _log_sum((u + v - cost) / regularisation, dim=0))
        # Reads one number from the device. Doing all iterations and freezing the converged state would cost more: two
        # to eight suffice for outputs of unit size, and the backward pass keeps N x N matrices of each.
        if float((u - previous).detach().abs().sum()) < tolerance:
            break
    return ((u + v - cost) / regularisation).exp()


def _log_sum(exponents: Tensor, dim: int) -> Tensor:
    return (exponents.exp().sum(dim, keepdim=True) + 1e-6).log()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_softmax": _kl_softmax,
    "kl_softmax_released": _kl_softmax_released,
    "kl_minmax": _kl_minmax,
    "js": _js,
    "js_released": _js_released,
    "ot": _optimal_transport,
}
DISTANCE_KINDS: tuple[str, ...] = tuple(_DISTANCES)


def _released_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_b.exp() * (log_b - log_a.exp())).sum()


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check_shapes(z_i: Tensor, z_j: Tensor) -> None:
    if z_i.dim() != 2 or z_i.shape != z_j.shape:
        raise ValueError(
            f"embeddings must be two tensors of equal shape (N, D), got {tuple(z_i.shape)} and {tuple(z_j.shape)}"
        )


def _check_pair(z_i: Tensor, z_j: Tensor, temperature: float) -> None:
    _check_shapes(z_i, z_j)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: the published value is 0.5")
