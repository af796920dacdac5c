"""Run the measurements: python -m benchmarks [--only NAME ...] [--json FILE] [--plot FILE].

Every file bench_*.py is one, or several where it says so (`NAMES`); --only takes their names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import benchmarks
from benchmarks.harness import Budget
from benchmarks.memory import MARK, peak_of
from benchmarks.report import plot, table, write_json
from benchmarks.setting import DTYPES, MODELS, parse_json
from hf_robust.evaluation.environment import collect_environment

# One run of at most ten minutes on a GPU: ceilings, steps at the published batch, memory, whether the host waits.
PRESETS: dict[str, dict[str, Any]] = {
    "gpu_short": {
        "only": ["roofline", "acl", "optim", "augmentation", "air", "aff"],
        "device": "cuda",
        "model": "resnet18",
        "batch_size": 512,
        "dtype": ["bf16"],
        "mode": ["eager", "compiled"],
        "rounds": 5,
        "memory": True,
        "seconds": 420.0,
    }
}


def modules() -> dict[str, list[ModuleType]]:
    """The files of measurements by the names they answer to."""
    found: dict[str, list[ModuleType]] = {}
    for info in pkgutil.iter_modules(benchmarks.__path__):
        if info.name.startswith("bench_"):
            module = importlib.import_module(f"benchmarks.{info.name}")
            for name in getattr(module, "NAMES", (info.name.removeprefix("bench_"),)):
                found.setdefault(name, []).append(module)
    return found


def make_parser(known: Sequence[str]) -> argparse.ArgumentParser:
    """The flags.

    Args:
        known (`Sequence[str]`): names of measurements.
    """
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=sorted(known), default=sorted(known), help="Which measurements; default: all.")
    add("--json", type=Path, help="File for the results.")
    add("--plot", type=Path, help="Picture of the ratios.")
    add(
        "--model",
        help=f"{', '.join(MODELS)} or a timm architecture; default: resnet18 (rcs over an epoch: a thin net).",
    )
    add("--batch_size", type=int, help="Images of a step; default: what suits the measurement.")
    add("--dtype", nargs="+", choices=[d for d in DTYPES if d != "fp64"], default=["fp32", "bf16"], help="Precisions.")
    add("--mode", nargs="+", choices=["eager", "compiled", "graphs", "no_fold", "nchw"], help="Library's variants.")
    add("--training_args", type=parse_json, help="JSON of training arguments for the library's side.")
    add("--rounds", type=int, default=5, help="Turns of every variant.")
    add("--threads", type=int, default=1, help="Threads of the process on a CPU.")
    add("--device", default=default_device, choices=["cpu", "cuda"], help="Where.")
    add("--memory", action="store_true", help="Also measure peak memory; on a CPU in a process per variant.")
    add("--seconds", type=float, help="End after about so long; what does not fit is left out.")
    add("--gemm", type=int, default=0, help="Side of the matrices of the peak; 0: 2048, on a GPU 8192.")
    add("--no_tf32", action="store_true", help="On a GPU: float32 products in full precision, on both sides.")
    add("--quiet", action="store_true", help="No progress bars.")
    add("--preset", choices=sorted(PRESETS), help="Values for many flags; a flag that is given wins.")
    rcs = parser.add_argument_group("rcs over an epoch")
    rcs.add_argument("--dataset_name", help="Labelled images, e.g. uoft-cs/cifar10; default: random pixels.")
    rcs.add_argument("--images", type=int, default=4096, help="How many images to use; at most.")
    rcs.add_argument("--backbone", help="timm architecture, in the place of --model.")
    rcs.add_argument("--model_args", type=parse_json, help="JSON of its arguments.")
    rcs.add_argument("--bf16", action="store_true", help="Attack and train in bfloat16.")
    rcs.add_argument("--short", action="store_true", help="Only the modes that matter most.")
    add("--peak_of", help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str], known: Sequence[str]) -> argparse.Namespace:
    """Options of a command line, a preset's values below those that are given.

    Args:
        argv (`Sequence[str]`): arguments.
        known (`Sequence[str]`): names of measurements.
    """
    parser = make_parser(known)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, and torch finds no CUDA device: write --device cpu")
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {options.rounds}")
    options.arguments = list(argv)  # for child processes
    options.budget = Budget(options.seconds)
    return options


def print_peak(options: argparse.Namespace, found: dict[str, list[ModuleType]]) -> None:
    """As a child process: build one variant and print the peak of its memory."""
    group = options.peak_of.split("/")[0]
    options.only = [group]
    for module in found.get(group, []):
        for cases in getattr(module, "comparisons", lambda options: {})(options).values():
            for case in cases:
                if case.name == options.peak_of:
                    print(f"{MARK}{json.dumps(peak_of(case.build(), options.device))}")
                    return
    raise SystemExit(f"no variant {options.peak_of!r}")


def title_of(options: argparse.Namespace) -> str:
    """What it was measured on, in a line."""
    hardware = collect_environment()["hardware"]
    machine = (
        hardware.get("gpu") if options.device == "cuda" else f"{hardware.get('cpu')}, {options.threads} thread(s)"
    )
    return f"{options.model or 'resnet18'}, {machine}, {options.rounds} rounds"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what was asked for, print a table, write JSON and picture.

    Args:
        argv (`Sequence[str]`, *optional*): default: the command line.

    Returns:
        `list[dict]`: the results.
    """
    found = modules()
    options = parse(sys.argv[1:] if argv is None else argv, list(found))
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not options.no_tf32
    if options.peak_of:
        print_peak(options, found)
        return []
    chosen = list(dict.fromkeys(module for name in options.only for module in found[name]))
    results: list[dict[str, Any]] = []
    for number, module in enumerate(chosen, start=1):
        name = module.__name__.rpartition(".")[2]
        if not options.budget.allows():
            print(f"[{number}/{len(chosen)}] {name}: left out, the time of this run is over", file=sys.stderr)
            continue
        print(f"[{number}/{len(chosen)}] {name}", file=sys.stderr)
        results += module.measure(options)
        settings = {
            k: v for k, v in vars(options).items() if k not in ("json", "plot", "budget", "arguments", "peak_of")
        }
        if options.json:  # after every measurement: a run that is stopped leaves what it has
            write_json(options.json, results, settings)
    print(table(results))
    if options.plot and results:
        plot(options.plot, results, title_of(options))
    return results


if __name__ == "__main__":
    main()
