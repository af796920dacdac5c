"""The flags of cheaper and stronger training attacks, and the attack that all its flags together ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_robust.attack_schedules import PUBLISHED, with_schedule
from hf_robust.attacks import PGD, parse_budget
from hf_robust.flags import as_flags, given, take

__all__ = ["AttackArguments", "attack_of", "plain_attack_flags"]

_PREFIX = "attack_"
_OPTIONS = ("step_sizes", "min_gain", "replay")  # fields of PGD whose flags are here
_SCHEDULE_HELP = (
    "Lengths of the steps; published: --steps of --step_size; in 255ths of a ball of 8/255: decay3 is 8 4 2, decay5 "
    "8 4 4 2 2, decay2 8 4, gentle3 6 4 2, gentle5 4 3 2 2 1, flat3 and flat2 the published length in 3 and 2 steps."
)


@dataclass
class AttackArguments:
    """Other algorithms than the published attack: off unless asked for."""

    attack_schedule: Literal["published", "decay2", "decay3", "decay5", "flat2", "flat3", "gentle3", "gentle5"] = (
        field(default="published", metadata={"help": _SCHEDULE_HELP})
    )
    attack_step_sizes: list[float] | None = field(
        default=None, metadata={"help": "Lengths of the steps one by one instead, such as 8/255 4/255 2/255."}
    )
    attack_min_gain: float = field(
        default=0.0,
        metadata={
            "help": "Stop the attack on a batch when a step raises its loss by less than this share, such as 0.03; "
            "0: never. Waits for the device in every step."
        },
    )
    attack_replay: bool = field(
        default=False, metadata={"help": "Start where the last attack on the image ended, an epoch ago."}
    )


def plain_attack_flags() -> Any:
    """[`PGD`] as the parser should see it: the published attack, without what `AttackArguments` gives."""
    return as_flags(PGD, _OPTIONS)


def attack_of(values: Mapping[str, Any], argv: Sequence[str], written: Collection[str]) -> PGD:
    """Build the training attack from its flags.

    A schedule decides over the `steps` and `step_size` that are defaults of a method or stand in a file; those that
    were written beside it must agree with it.

    Args:
        values (`Mapping[str, Any]`): of all flags.
        argv (`Sequence[str]`): the command line.
        written (`Collection[str]`): keys of the YAML file.

    Returns:
        [`PGD`].

    Raises:
        ValueError: for two schedules, or a number or length of steps that contradicts the schedule.
    """
    name, sizes = values[f"{_PREFIX}schedule"], values[f"{_PREFIX}step_sizes"]
    options = {option: values[_PREFIX + option] for option in ("min_gain", "replay")}
    if name == PUBLISHED and sizes is None:
        return take(PGD, values, **options)
    if name != PUBLISHED and sizes is not None:
        raise ValueError(
            f"--attack_schedule {name} and --attack_step_sizes both say how long the steps are: leave one out"
        )
    plain = take(PGD, {k: v for k, v in values.items() if k not in ("steps", "step_size")}, **options)
    if sizes is None:
        attack = with_schedule(plain, name)
    else:
        each = sizes if isinstance(sizes, list | tuple) else [sizes]
        attack = replace(plain, step_sizes=tuple(map(parse_budget, each)))
    beside = {f"{_PREFIX}schedule", f"{_PREFIX}step_sizes"} & set(written)
    for flag in ("steps", "step_size"):
        said = given(argv, flag) or (beside and flag in written)
        if said and values[flag] != getattr(attack, flag):
            shown = f"--attack_schedule {name}" if sizes is None else "--attack_step_sizes"
            raise ValueError(
                f"--{flag} {values[flag]:g} contradicts {shown}, which is {attack.title}: leave one of them out"
            )
    return attack
