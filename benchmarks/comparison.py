"""From the two sides of a comparison to results: set up, count, take turns, look at memory and at the ceilings."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import gemm_peak
from benchmarks.harness import Action, Budget, Case, count_flops, interleave, record, timer_for
from benchmarks.memory import child_peak, peak_of
from benchmarks.setting import DTYPES, library_step, modes
from hf_robust.objectives import Objective

__all__ = ["compare", "in_time", "library_cases", "or_left_out", "wanted"]


def wanted(options: argparse.Namespace, names: Sequence[str], group: str | None = None) -> list[str]:
    """Those of a file's names that were asked for; all of them by the name of their group.

    Args:
        options (`argparse.Namespace`): has `only`.
        names (`Sequence[str]`): of the file.
        group (`str`, *optional*): a name for all of them together.
    """
    return [name for name in names if name in options.only or group in options.only]


def library_cases(
    options: argparse.Namespace, name: str, objective: Objective, batch: Mapping[str, Tensor]
) -> list[Case]:
    """The library's step in every precision and mode asked for.

    Args:
        options (`argparse.Namespace`): `dtype`, `mode`, and what `library_step` reads.
        name (`str`): of the method.
        objective ([`Objective`]): the method.
        batch (`Mapping[str, torch.Tensor]`): of `batch_of`.
    """

    def case(dtype: str, mode: str) -> Case:
        return Case(
            f"{name}/{dtype}/{mode}",
            lambda: library_step(options, objective, batch, dtype=dtype, mode=mode),
            len(batch["label"]),
            dtype,
            counted=mode not in ("compiled", "graphs"),
        )

    return [case(dtype, mode) for dtype in options.dtype for mode in modes(options)]


def compare(options: argparse.Namespace, comparisons: Mapping[str, Sequence[Case]]) -> list[dict[str, Any]]:
    """Run comparisons one after the other.

    Args:
        options (`argparse.Namespace`): `rounds`, `device`, `memory`, `budget`, `quiet`, `gemm`, `arguments`.
        comparisons (`Mapping`): title to its variants, the reference first.

    Returns:
        `list[dict]`: one result per variant that could be set up.
    """
    results: list[dict[str, Any]] = []
    budget: Budget = options.budget
    for title, cases in comparisons.items():
        if budget.allows():
            results += _one(options, title, cases)
        else:
            _say(f"{title}: left out, the time of this run is over")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return results


def _one(options: argparse.Namespace, title: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    actions, flops = _set_up(options, cases)
    reference = cases[0].name
    if reference not in actions or len(actions) < 2:
        return []
    readings = interleave(
        actions, options.rounds, timer_for(options.device), budget=options.budget, title=title, quiet=options.quiet
    )
    peaks = _peaks(options, actions) if options.memory else {}
    results = []
    for case in cases[1:]:
        if case.name not in actions:
            continue
        result = record(case, reference, readings, flops=flops.get(case.name, 0.0))
        if flops.get(reference) and flops.get(case.name):
            result["flop_ratio"] = flops[reference] / flops[case.name]
            ceiling = gemm_peak(DTYPES[case.dtype], options.device, options.gemm)
            result |= {"gemm_flop_per_second": ceiling, "utilisation": result["flop_per_second"] / ceiling}
        if peaks.get(case.name) and peaks.get(reference):
            result |= {"peak_bytes": peaks[case.name], "peak_ratio": peaks[case.name] / peaks[reference]}
        if options.device == "cuda":
            result["synchronises"] = _synchronises(actions[case.name])
        results.append(result)
    return results


def in_time(options: argparse.Namespace, name: str) -> bool:
    """Whether a variant may still be set up; says so when the time of this run is over.

    Args:
        options (`argparse.Namespace`): has `budget`.
        name (`str`): of the variant.
    """
    allowed = options.budget.allows()
    if not allowed:
        _say(f"{name}: left out, the time of this run is over")
    return allowed


@contextlib.contextmanager
def or_left_out(name: str) -> Iterator[None]:
    """Around setting up a variant: what the library refuses is left out, with its reason.

    Args:
        name (`str`): of the variant.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        _say(f"{name}: left out: {error}")


def _set_up(options: argparse.Namespace, cases: Sequence[Case]) -> tuple[dict[str, Action], dict[str, float]]:
    """Build every variant and call it, once or (on a GPU) more often; what is refused is left out, with its reason."""
    actions: dict[str, Action] = {}
    flops: dict[str, float] = {}
    for number, case in enumerate(cases):
        if number > 1 and not in_time(options, case.name):
            continue
        with or_left_out(case.name):
            action = case.build()
            if case.counted:
                flops[case.name] = count_flops(action)
            for _ in range(3 if options.device == "cuda" else 0 if case.counted else 1):
                action()
            actions[case.name] = action
    for case in cases:  # compiled code computes what the eager code computes
        if case.name in actions and not case.counted:
            like = [other.name for other in cases[1:] if other.counted and other.name in flops]
            flops |= {case.name: flops[like[0]]} if like else {}
    return actions, flops


def _peaks(options: argparse.Namespace, actions: Mapping[str, Action]) -> dict[str, int]:
    if options.device == "cuda":
        return {name: peak_of(action, "cuda") for name, action in actions.items()}
    found = {name: child_peak(name, options.arguments) for name in actions}
    return {name: peak for name, peak in found.items() if peak}


def _synchronises(action: Action) -> bool | str:
    """Whether a call makes the host wait for the device: `False`, or what the driver says where it does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        action()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def _say(text: str) -> None:
    print(text, file=sys.stderr)
