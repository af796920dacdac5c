"""Side-by-side measurement: variants take turns in one process, and ratios are taken round by round.

Between two calls of a variant the machine may have changed its mind; between two neighbours in a round it rarely has.
So a ratio is the median over the rounds of (time of the reference / time of the variant) within the round, with its
smallest and largest value. Beside the wall clock the processor seconds of this process are kept, and what all other
processes used meanwhile: a measurement during which they used more than a tenth of the machine is marked, not refused.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

__all__ = ["Budget", "Case", "Ratio", "Reading", "busy_seconds", "interleave", "order", "ratio", "record", "timer_for"]

DISTURBED = 0.1  # share of the machine that others may use before a measurement is marked
Action = Callable[[], object]


@dataclass(frozen=True)
class Reading:
    """One call: wall seconds, processor seconds of this process, processor seconds of all others (if known)."""

    wall: float
    cpu: float
    others: float | None = None


Timer = Callable[[Action], Reading]


def busy_seconds() -> float | None:
    """Processor seconds that all processes of the machine have used so far; `None` where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            values = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle, waiting = values[3:5]
    return (sum(values) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def time_on_cpu(action: Action) -> Reading:
    """Call it once, by the wall clock."""
    busy, own, started = busy_seconds(), time.process_time(), time.perf_counter()
    action()
    wall, cpu, now = time.perf_counter() - started, time.process_time() - own, busy_seconds()
    return Reading(wall, cpu, None if busy is None or now is None else max(0.0, now - busy - cpu))


def time_on_gpu(action: Action) -> Reading:
    """Call it once, from one event on the device to another."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()

    def between() -> None:
        first.record()
        action()
        last.record()
        torch.cuda.synchronize()

    host = time_on_cpu(between)
    return Reading(first.elapsed_time(last) / 1000, host.cpu, host.others)


def timer_for(device: torch.device | str) -> Timer:
    """The clock of a device."""
    return time_on_gpu if torch.device(device).type == "cuda" else time_on_cpu


class Budget:
    """Seconds that a whole run may take; what does not fit is left out.

    Args:
        seconds (`float`, *optional*): default: no end.
        clock (`Callable[[], float]`): seconds of a steady clock.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, None if seconds is None else clock() + seconds

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left."""
        return self._end is None or self._clock() + seconds < self._end

    def now(self) -> float:
        """Seconds of the clock."""
        return self._clock()


@dataclass
class Case:
    """One side of a comparison.

    Args:
        name (`str`): for example `"acl/bf16/eager"`.
        build (`Callable[[], Callable[[], object]]`): allocates what is not measured and returns what is.
        images (`int`): how many a call works on; 0 where that means nothing.
        dtype (`str`): `"fp32"` or `"bf16"`, whose matrix peak the arithmetic is compared with.
        facts (`dict`): more fields of the result.
        counted (`bool`): whether operations are counted during its first call; not for compiled code.
    """

    name: str
    build: Callable[[], Action]
    images: int = 0
    dtype: str = "fp32"
    facts: dict[str, Any] = field(default_factory=dict)
    counted: bool = True


def order(names: Sequence[str], number: int) -> list[str]:
    """Order of the variants in a round: each round of even number begins one further, the next one runs backwards.

    Args:
        names (`Sequence[str]`): the variants.
        number (`int`): of the round, from 0.
    """
    start = number // 2 % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if number % 2 else turned


def interleave(
    actions: Mapping[str, Action],
    rounds: int,
    timer: Timer,
    *,
    budget: Budget | None = None,
    title: str = "",
    quiet: bool = True,
) -> dict[str, list[Reading]]:
    """Call all variants in turn, so many rounds, and read the clocks.

    Args:
        actions (`Mapping[str, Callable]`): ready to be called, and called before.
        rounds (`int`): 1 or more.
        timer (`Callable`): calls one and reads the clocks.
        budget ([`Budget`], *optional*): when less is left than the last round took, the rounds so far count.
        title (`str`): of the progress bar, which also shows how long it will take.
        quiet (`bool`): no bar.

    Returns:
        `dict[str, list[Reading]]`: as many readings of each.

    Raises:
        ValueError: for no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}: 5 show the spread")
    budget = budget or Budget()
    readings: dict[str, list[Reading]] = {name: [] for name in actions}
    with tqdm(total=rounds * len(actions), desc=title, unit="call", disable=quiet, leave=False) as bar:
        for number in range(rounds):
            began = budget.now()
            for name in order(list(actions), number):
                readings[name].append(timer(actions[name]))
                bar.update()
            if not budget.allows(budget.now() - began):
                break
    return readings


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float


def ratio(reference: Sequence[Reading], variant: Sequence[Reading], clock: Literal["wall", "cpu"] = "wall") -> Ratio:
    """How many times faster the variant is, round by round.

    Args:
        reference (`Sequence[Reading]`): of the reference.
        variant (`Sequence[Reading]`): of the same rounds.
        clock (`str`): `"wall"` or `"cpu"`.
    """
    pairs = zip(reference, variant, strict=True)
    values = [max(getattr(a, clock), 1e-9) / max(getattr(b, clock), 1e-9) for a, b in pairs]
    return Ratio(statistics.median(values), min(values), max(values))


def others_share(readings: Sequence[Reading], cores: int) -> float | None:
    """Share of the machine's processor time that other processes used during the readings; `None` if unknown."""
    known = [r for r in readings if r.others is not None]
    wall = sum(r.wall for r in known)
    return sum(r.others or 0.0 for r in known) / (wall * cores) if known and wall > 0 else None


def record(
    case: Case,
    reference: str,
    readings: Mapping[str, Sequence[Reading]],
    *,
    cores: int | None = None,
    flops: float = 0.0,
) -> dict[str, Any]:
    """The result of one variant, ready for JSON.

    Args:
        case ([`Case`]): the variant.
        reference (`str`): name of the reference among the readings.
        readings (`Mapping[str, Sequence[Reading]]`): of `interleave`.
        cores (`int`, *optional*): of the machine.
        flops (`float`): counted arithmetic of a call; 0: not known.

    Returns:
        `dict`: `name`, `ratio`, `ratio_min`, `ratio_max` (wall), `cpu_ratio`, `seconds`, `reference`,
            `reference_seconds`, `rounds`, `others_share` and `disturbed`; what is known of images and FLOP per second.
    """
    mine, base = readings[case.name], readings[reference]
    wall, cpu = ratio(base, mine), ratio(base, mine, "cpu")
    seconds = statistics.median(r.wall for r in mine)
    share = others_share([*mine, *base], cores or os.cpu_count() or 1)
    result: dict[str, Any] = {
        "name": case.name,
        "ratio": wall.median,
        "ratio_min": wall.low,
        "ratio_max": wall.high,
        "cpu_ratio": cpu.median,
        "seconds": seconds,
        "reference": reference,
        "reference_seconds": statistics.median(r.wall for r in base),
        "rounds": len(mine),
        "others_share": share,
        "disturbed": None if share is None else share > DISTURBED,
    }
    if case.images:
        result["images_per_second"] = case.images / max(seconds, 1e-9)
    if flops:
        result |= {"flop": flops, "flop_per_second": flops / max(seconds, 1e-9)}
    return result | case.facts


def count_flops(action: Action) -> float:
    """Floating-point operations of one call, by torch's counter (matrix products and convolutions)."""
    with FlopCounterMode(display=False) as counter:
        action()
    return float(counter.get_total_flops())
