"""Contrastive losses of any number of views, and what sets adversarial views and hard negatives apart in them.

Embeddings of N images arrive as one `(N, P)` tensor per view, not interleaved: row k of every tensor belongs to
image k. The functions see what they are given: `losses.gather` each view first to contrast the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["HardNegatives", "PairRule", "adversarial_anchors", "inferior_positives", "supcon"]

HardNegativeForm = Literal["fixed", "released_rocl", "released_advcl"]


@dataclass(frozen=True, eq=False)
class PairRule:
    """How the terms of each ordered pair of the V views count in `supcon`.

    Args:
        weights (`torch.Tensor` of shape `(V, V)`): `weights[a, b]` is the factor of the terms with anchors in view a
            and positives in view b. The diagonal is never read.
        detached (`torch.Tensor` of shape `(V, V)`): bool, on the CPU; where true, these terms send gradient to their
            anchors only, not to positives and negatives.
    """

    weights: Tensor
    detached: Tensor


@dataclass(frozen=True)
class HardNegatives:
    """Debiased negatives of which the more similar ones weigh more; option of `supcon`.

    With e_ik = exp(u_i . u_k / T), K = (N - 1) V negatives of row i (all rows of other images) and pos_i the mean of
    e_ik over its positives, the denominator of every term of anchor i becomes pos_i + G_i:

        G_i = max((R_i - tau_plus K pos_i) / (1 - tau_plus), K exp(-1/T)),
        R_i = (sum over negatives k of e_ik^(1 + beta)) / (mean over negatives k of e_ik^beta).

    - `"fixed"`: these equations.
    - `"released_rocl"`: e_ik^(1 + beta) is divided by the mean of row k, not of row i, and that mean counts the V rows
      of the image itself as zeros. So the RoCL code.
    - `"released_advcl"`: the same; furthermore the denominator of a term is the one of its positive, not of its
      anchor, and the lower bound of G is K instead of K exp(-1/T), because similarities are shifted by their maximum
      and the bound is not. So the AdvCL code.

    Args:
        beta (`float`, defaults to 1, as published): concentration on hard negatives, 0 or more; 0 weighs them alike.
        tau_plus (`float`, defaults to 0.1): share of the images that show the anchor's class, in [0, 1). Published:
            0.1 or 0.12 on CIFAR-10.
        formulation (`str`, defaults to `"fixed"`): see above.

    Raises:
        ValueError: for a value outside its range.

    Source: Robinson et al. 2021 (hard negatives); Yu et al. 2022; `NT_xent_HN` of `Asym-RoCL/loss.py` and
        `SupConLoss` of `Asym-AdvCL/losses.py` in A-InfoNCE@b28763e.
    """

    beta: float = 1.0
    tau_plus: float = 0.1
    formulation: HardNegativeForm = "fixed"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be 0 or more, got {self.beta}: published is 1")
        if not 0 <= self.tau_plus < 1:
            raise ValueError(f"tau_plus must be in [0, 1), got {self.tau_plus}: published is 0.1 on CIFAR-10")
        if self.formulation not in get_args(HardNegativeForm):
            raise ValueError(
                f"formulation must be one of {', '.join(get_args(HardNegativeForm))}, got {self.formulation!r}"
            )


def supcon(
    views: Sequence[Tensor],
    *,
    temperature: float = 0.5,
    base_temperature: float | None = None,
    positives: Literal["mean", "sum"] = "mean",
    detach_keys: bool = False,
    pairs: PairRule | None = None,
    hard_negatives: HardNegatives | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Contrastive loss of V views of N images: every row is an anchor, the other views of its image its positives.

    With unit rows u of the V N embeddings, T the temperature and T0 the base temperature:

        l_ij = log(exp(u_i . u_j / T) / sum over k != i of exp(u_i . u_k / T))
        L = -T/T0 * 1/(V N) * sum over i of c * sum over the positives j of w_ij l_ij

    with c = 1/(V - 1) for `positives="mean"` and 1 for `"sum"`. The denominator holds the other positives, too. The
    logarithm is inside the sum over the positives (the L_out of SupCon). Similarities are computed in float32.

    - Two views, T0 = T: `losses.nt_xent`.
    - RoCL: `positives="sum"`, `detach_keys=True`. Detached keys leave the value alone; where all pairs count alike
      they halve the gradient and keep its direction.
    - AdvCL: `positives="mean"`, T = 0.5, T0 = 0.07, which multiplies by 7.14.
    - A-InfoNCE: `pairs` and `hard_negatives` beside those of its host.

    Args:
        views (`Sequence[torch.Tensor]`): two or more embeddings of shape `(N, P)`, not normalised; row k of each
            shows image k.
        temperature (`float`, defaults to 0.5, as published for RoCL and AdvCL): T, positive.
        base_temperature (`float`, *optional*): T0, positive; T by default.
        positives (`str`, defaults to `"mean"`): whether the V - 1 positives of an anchor are averaged or summed.
        detach_keys (`bool`, defaults to `False`): whether gradient reaches anchors only, in all pairs.
        pairs ([`PairRule`], *optional*): weight and direction of the pairs of views; 1 and both ways by default.
        hard_negatives ([`HardNegatives`], *optional*): weigh the negatives; needs two images or more.
        reduction (`str`, defaults to `"mean"`): `"none"` for one loss per image, the mean over its V anchors.

    Returns:
        `torch.Tensor` of shape `()`; `(N,)` with `reduction="none"`, whose mean is that number.

    Raises:
        ValueError: for fewer than two views, differing shapes, a temperature that is not positive, an unknown word, a
            rule for another number of views, or hard negatives of one image.

    Source: Khosla et al. 2020, equation 2; `NT_xent` of `src/loss.py` in RoCL@b6d5185, whose 1e-8 inside the
        logarithm and the denominator are left out; `losses.py` of AdvCL@24cb7a6.
    """
    _check(views, temperature, base_temperature, positives, reduction, pairs)
    count, n = len(views), views[0].shape[0]
    if hard_negatives is not None and n < 2:
        raise ValueError(f"hard negatives need two images or more, got {n}: nothing is a negative")
    with torch.autocast(views[0].device.type, enabled=False):  # similarities in bf16 would cost two digits
        u = F.normalize(_at_least_float32(torch.cat(list(views))), dim=1)
        total = u.new_zeros(n)
        for keys, weights in _weighted_keys(u, pairs, count, detach_keys):
            terms = _pair_terms(u @ keys.t() / temperature, count, temperature, hard_negatives)
            total = total + (weights[:, :, None] * terms).sum((0, 1))
    scale = temperature / (base_temperature or temperature) / count / (count - 1 if positives == "mean" else 1)
    return scale * (total.mean() if reduction == "mean" else total)


def inferior_positives(
    views: int, adversarial: Collection[int], sigma: float | Tensor, weight: float = 1.0
) -> PairRule:
    """Rule by which adversarial views pull clean embeddings less than clean embeddings pull them.

    For an adversarial view a and a clean view c, the pair contributes, per image and with keys detached,

        2 weight * (sigma l(c -> a) + (1 - sigma) l(a -> c)),

    where l(c -> a) moves the clean anchor to its adversarial positive. sigma = 0 leaves clean embeddings alone,
    sigma = 1/2 treats both alike. Pairs within the clean or within the adversarial views count 1, both ways.

    Args:
        views (`int`): number of views V.
        adversarial (`Collection[int]`): positions of the adversarial views, in [0, V); not all of them.
        sigma (`float` or scalar `torch.Tensor`): share of the pull on clean embeddings, in [0, 1/2] as meant.
        weight (`float`, defaults to 1): factor of the clean-adversarial pairs; at 1 and sigma = 1/2 the value of the
            loss is that without a rule. The RoCL code leaves the 2 out: its weight w is weight = w / 2.

    Returns:
        [`PairRule`]

    Raises:
        ValueError: for positions outside the views, all of them adversarial, or a sigma or weight out of range.

    Source: Yu et al. 2022; `stop_grad` of `Asym-AdvCL/losses.py` in A-InfoNCE@b28763e.
    """
    to_adversarial, to_clean = _cross_pairs(views, adversarial)
    if not isinstance(sigma, Tensor) and not 0 <= sigma <= 1:
        raise ValueError(f"sigma must be in [0, 1], got {sigma}: published are 0.2 and 0.3; 1/2 treats both alike")
    if not weight >= 0:
        raise ValueError(f"weight must be 0 or more, got {weight}: published are 0.5 to 1.5")
    share = torch.as_tensor(sigma, dtype=torch.float64 if not isinstance(sigma, Tensor) else None)
    towards, away = to_adversarial.to(share.device), to_clean.to(share.device)
    weights = torch.where(towards, 2 * weight * share, torch.where(away, 2 * weight * (1 - share), 1.0))
    return PairRule(weights, to_adversarial | to_clean)


def adversarial_anchors(views: int, adversarial: Collection[int], weight: float = 1.0) -> PairRule:
    """Rule of the released A-InfoNCE code where no inferior positives are asked for.

    It means all pairs to count alike and overwrites the terms l(c -> a) by l(a -> c) in place, so that a pair of an
    adversarial and a clean view counts (weight + weight^2) l(a -> c), and l(c -> a) not at all.

    Args:
        views (`int`): number of views V.
        adversarial (`Collection[int]`): positions of the adversarial views, in [0, V); not all of them.
        weight (`float`, defaults to 1): factor of the clean-adversarial pairs.

    Returns:
        [`PairRule`]

    Raises:
        ValueError: for positions outside the views or all of them adversarial.

    Source: the branch without `stop_grad` of `Asym-AdvCL/losses.py` in A-InfoNCE@b28763e.
    """
    to_adversarial, to_clean = _cross_pairs(views, adversarial)
    weights = torch.ones(views, views, dtype=torch.float64)
    weights[to_adversarial], weights[to_clean] = 0.0, weight + weight**2
    return PairRule(weights, torch.zeros(views, views, dtype=torch.bool))


def _cross_pairs(views: int, adversarial: Collection[int]) -> tuple[Tensor, Tensor]:
    """Masks of the pairs with a clean anchor and an adversarial positive, and the other way round."""
    chosen = sorted(set(adversarial))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < views or len(chosen) == views:
        raise ValueError(
            f"adversarial must name some of the views 0 to {views - 1} and not all, got {chosen}: a rule between "
            "clean and adversarial views needs one of each"
        )
    is_adversarial = torch.zeros(views, dtype=torch.bool)
    is_adversarial[chosen] = True
    to_adversarial = ~is_adversarial[:, None] & is_adversarial[None, :]
    return to_adversarial, to_adversarial.t()


def _weighted_keys(
    u: Tensor, pairs: PairRule | None, count: int, detach_keys: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys with or without gradient, and the weights `(V, V)` of the terms that take them."""
    others = ~torch.eye(count, dtype=torch.bool)
    if pairs is None or detach_keys:
        weights = others.to(u) if pairs is None else others.to(u) * pairs.weights.to(u)
        yield u.detach() if detach_keys else u, weights
        return
    # Both, whatever the rule: asking whether it has pairs of a kind would read a tensor, which has no content where
    # the memory of a step is foreseen.
    for keys, chosen in ((u, others & ~pairs.detached), (u.detach(), others & pairs.detached)):
        yield keys, pairs.weights.to(u) * chosen.to(u)


def _pair_terms(logits: Tensor, count: int, temperature: float, hard_negatives: HardNegatives | None) -> Tensor:
    """-l of `(V N, V N)` similarities: `(V, V, N)`, by view of the anchor, view of the positive, image."""
    n = logits.shape[0] // count
    positive = logits.view(count, n, count, n).diagonal(dim1=1, dim2=3)
    if hard_negatives is None:
        itself = torch.eye(count * n, dtype=torch.bool, device=logits.device)
        denominator = logits.masked_fill(itself, float("-inf")).logsumexp(1).view(count, n)
    else:
        denominator = _log_denominator(logits, count, temperature, hard_negatives).view(count, n)
        if hard_negatives.formulation == "released_advcl":
            return denominator[None] - positive  # the one of the positive
    return denominator[:, None] - positive


def _log_denominator(logits: Tensor, count: int, temperature: float, options: HardNegatives) -> Tensor:
    """log(pos + G) of every row, see `HardNegatives`; in units of exp(1/T), the largest similarity there is."""
    rows, beta, tau = logits.shape[0], options.beta, options.tau_plus
    itself = torch.eye(rows, dtype=torch.bool, device=logits.device)
    same = torch.eye(rows // count, dtype=torch.bool, device=logits.device).repeat(count, count)
    negatives, largest, minus_infinity = rows - count, 1 / temperature, float("-inf")
    positive = logits.masked_fill(~same | itself, minus_infinity).logsumexp(1) - math.log(count - 1) - largest
    importance = (beta * logits).masked_fill(same, minus_infinity).logsumexp(1)  # of a sum over the negatives
    weighted = ((1 + beta) * logits).masked_fill(same, minus_infinity)
    if options.formulation == "fixed":
        log_r = weighted.logsumexp(1) - importance + math.log(negatives)
    else:
        log_r = (weighted - importance).logsumexp(1) + math.log(rows)
    bound = -largest if options.formulation == "released_advcl" else -2 * largest
    debiased = ((log_r - largest).exp() - tau * negatives * positive.exp()) / (1 - tau)
    return (positive.exp() + debiased.clamp_min(negatives * math.exp(bound))).log() + largest


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check(
    views: Sequence[Tensor],
    temperature: float,
    base_temperature: float | None,
    positives: str,
    reduction: str,
    pairs: PairRule | None,
) -> None:
    if len(views) < 2 or any(z.dim() != 2 or z.shape != views[0].shape for z in views):
        shapes = [tuple(z.shape) for z in views]
        raise ValueError(f"need two or more views of equal shape (images, width), got {shapes}: pass one per view")
    for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}: published are 0.5, and 0.07 as base of AdvCL")
    if positives not in ("mean", "sum"):
        raise ValueError(f"positives must be 'mean' or 'sum', got {positives!r}: AdvCL averages them, RoCL sums them")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if pairs is not None and tuple(pairs.weights.shape) != (len(views),) * 2:
        raise ValueError(
            f"the pair rule is for {pairs.weights.shape[0]} views, got {len(views)}: make one for {len(views)}"
        )
