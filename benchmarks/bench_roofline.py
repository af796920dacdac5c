"""How much of the time of an ACL step is convolutions that no implementation can leave out.

The convolutions of the network are run by themselves, forward, for the input gradient and for the weight gradient, in
turn with the library's step in every mode asked for. An ACL step needs each seven times forward, seven times for the
input and twice for the weights: its floor. `ratio` is floor over step, the fraction reached; 1 would be a step of
nothing but convolutions.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.ceilings import KINDS, Convolutions, gemm_peak
from benchmarks.comparison import in_time, or_left_out, wanted
from benchmarks.harness import DISTURBED, Action, Reading, interleave, others_share, ratio, timer_for
from benchmarks.setting import DTYPES, batch_of, build_model, library_step, modes
from hf_robust.objectives.acl import ACL

NAMES = ("roofline",)
BATCH = 32
PASSES = dict(zip(KINDS, (7, 7, 2), strict=True))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result per precision and mode."""
    if not wanted(options, NAMES):
        return []
    return [result for dtype in options.dtype if options.budget.allows() for result in _roofline(options, dtype)]


def _roofline(options: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    objective, images = ACL(), options.batch_size or BATCH
    convolutions = Convolutions(build_model(options, objective), 2 * images, DTYPES[dtype])
    batch = batch_of(options, objective, images)
    actions: dict[str, Action] = {kind: convolutions.action(kind) for kind in KINDS}
    for action in actions.values():
        action()
    steps: dict[str, Action] = {}
    for mode in modes(options):
        name = f"roofline/{dtype}/{mode}"
        if not steps or in_time(options, name):
            with or_left_out(name):
                step = library_step(options, objective, batch, dtype=dtype, mode=mode)
                step()
                steps[mode] = step
    if not steps:
        return []
    readings = interleave(
        actions | steps,
        options.rounds,
        timer_for(options.device),
        budget=options.budget,
        title=f"roofline/{dtype}",
        quiet=options.quiet,
    )
    peak = gemm_peak(DTYPES[dtype], options.device, options.gemm)
    return [summary(readings, mode, convolutions.flop, dtype, peak) for mode in steps]


def summary(readings: dict[str, list[Reading]], mode: str, flop: float, dtype: str, peak: float) -> dict[str, Any]:
    """Floor, fraction reached and rates.

    Args:
        readings (`dict[str, list[Reading]]`): of the three kinds of pass and of every mode's step, by round.
        mode (`str`): whose step is meant.
        flop (`float`): of one pass.
        dtype (`str`): of the name.
        peak (`float`): FLOP per second of matrix products.
    """
    steps = readings[mode]
    floors = [
        Reading(
            *(sum(n * getattr(readings[kind][r], clock) for kind, n in PASSES.items()) for clock in ("wall", "cpu"))
        )
        for r in range(len(steps))
    ]
    found = ratio(floors, steps)
    middle = len(steps) // 2
    rates = {kind: flop / max(sorted(r.wall for r in readings[kind])[middle], 1e-9) for kind in KINDS}
    share = others_share([r for name in (*KINDS, mode) for r in readings[name]], os.cpu_count() or 1)
    return {
        "name": f"roofline/{dtype}/{mode}",
        "ratio": found.median,
        "ratio_min": found.low,
        "ratio_max": found.high,
        "ratio_of": "seconds of the convolutions alone over seconds of the step",
        "seconds": sorted(r.wall for r in steps)[middle],
        "floor_seconds": sorted(r.wall for r in floors)[middle],
        "convolution_flop_per_second": rates,
        "gemm_flop_per_second": peak,
        "others_share": share,
        "disturbed": None if share is None else share > DISTURBED,
    }
