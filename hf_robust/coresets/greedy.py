"""The search of coreset selection, apart from what a gain is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["greedy", "largest_remainder"]


def greedy(
    gains: Callable[[], Tensor], take: Callable[[Tensor], None], sizes: Tensor, budget: int, at_once: int = 1
) -> tuple[list[int], list[float]]:
    """Take the candidate of highest gain, let the gains change, and go on until the budget is filled.

    Args:
        gains (`Callable[[], torch.Tensor]`): present gain of every candidate, `(K,)`, on any device.
        take (`Callable[[torch.Tensor], None]`): told the candidates just taken, `(at_once,)`; called before gains
            are asked for again, not after the last pick.
        sizes (`torch.Tensor` of shape `(K,)`): images of every candidate, positive.
        budget (`int`): images to take, at most the sum of `sizes`; the last pick may overshoot it.
        at_once (`int`, defaults to 1): candidates taken before gains change.

    Returns:
        `tuple[list[int], list[float]]`: the candidates in the order of the picks, each at most once, and their gains.

    Raises:
        ValueError: if the budget is more than there is.
        FloatingPointError: if a gain is NaN or infinite.

    Source: Xu et al. 2023 (RCS), greedy search.
    """
    if budget > int(sizes.sum()):
        raise ValueError(f"the budget of {budget} images is more than the {int(sizes.sum())} of all candidates")
    picks: list[int] = []
    values: list[float] = []
    left, sizes = torch.ones(len(sizes), dtype=torch.bool), sizes.cpu()
    missing = budget
    while missing > 0:
        present = gains().cpu()
        if not bool(torch.isfinite(present).all()):
            broken = int((~torch.isfinite(present)).sum())
            raise FloatingPointError(
                f"{broken} of {len(present)} gains of a coreset selection are NaN or infinite: the network has "
                "diverged; go on from an earlier checkpoint with a lower --learning_rate"
            )
        present = present.masked_fill(~left, float("-inf"))
        # descending and stable: of equal gains the first candidate, on every machine
        order = present.argsort(descending=True, stable=True)[: min(at_once, int(left.sum()))]
        enough = int((sizes[order].cumsum(0) < missing).sum()) + 1
        taken = order[:enough]
        picks += taken.tolist()
        values += present[taken].tolist()
        left[taken] = False
        missing -= int(sizes[taken].sum())
        if missing > 0:
            take(taken)
    return picks, values


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    """Share a whole number in proportion to weights: whole shares that add up to it exactly.

    Args:
        total (`int`): what is shared, between 0 and the sum of the weights.
        weights (`Sequence[int]`): non-negative, not all zero.

    Returns:
        `list[int]`: shares, none above its weight, each within 1 of the exact proportion.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
