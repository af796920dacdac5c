"""Decaying and shorter step schedules of the training attack, by name: other algorithms than the published one.

From a random start in a ball of 8/255 the published five steps of 2/255 cannot reach the opposite side: 5 x 2 = 10 of
16 levels. Steps that are long first and short later go further for the same price, or as far for less.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from hf_robust.attacks import PGD

__all__ = ["PUBLISHED", "SCHEDULES", "with_schedule"]

PUBLISHED = "published"

# Lengths of the steps in 255ths of a pixel in a ball of 8; they grow and shrink with the ball.
SCHEDULES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "decay2": (8, 4),
        "decay3": (8, 4, 2),
        "decay5": (8, 4, 4, 2, 2),
        "flat2": (5, 5),  # as far together as the published five
        "flat3": (10 / 3, 10 / 3, 10 / 3),
        "gentle3": (6, 4, 2),
        "gentle5": (4, 3, 2, 2, 1),
    }
)


def with_schedule(attack: PGD, name: str) -> PGD:
    """Give an attack the step lengths of a named schedule; budget, norm and start stay.

    Price of an ACL step in forward passes F over a view, with n attack steps: (2 n + 6) F. `"published"` leaves the
    attack as it is (5 steps: 16 F). In 255ths, for a ball of 8/255:

    - `"decay5"`: 8, 4, 4, 2, 2 (16 F): stronger at the price of the published attack;
    - `"decay3"`: 8, 4, 2 (12 F): about as strong as the published attack, on some networks stronger and on some a few
      percent weaker, for three quarters of its price;
    - `"decay2"`: 8, 4 (10 F);
    - `"gentle5"`: 4, 3, 2, 2, 1 (16 F) and `"gentle3"`: 6, 4, 2 (12 F): milder forms of these;
    - `"flat3"`: 3 x 10/3 (12 F) and `"flat2"`: 2 x 5 (10 F): fewer, larger steps, as far together as the published.

    Better than fewer steps of the published length, which are weaker. The network meets other adversarial images
    than in published runs, so that results are to be called by the schedule's name.

    Args:
        attack ([`PGD`]): gives everything but `steps` and `step_size`.
        name (`str`): `"published"` or a key of `SCHEDULES`.

    Returns:
        [`PGD`]: with `step_sizes` in pixels of [0, 1], in proportion to `eps`.

    Raises:
        ValueError: for an unknown name.

    Source: ours; the ACL release has five steps of one length.
    """
    if name == PUBLISHED:
        return attack
    if name not in SCHEDULES:
        close = difflib.get_close_matches(name, [PUBLISHED, *SCHEDULES], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown attack schedule {name!r}: {hint}known are {', '.join([PUBLISHED, *SCHEDULES])}")
    sizes = tuple(attack.eps * levels / 8 for levels in SCHEDULES[name])
    return replace(attack, step_sizes=sizes, steps=len(sizes), step_size=sizes[0])
