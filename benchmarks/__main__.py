"""Run the measurements: python -m benchmarks [--only NAME ...] [--json FILE]; every file bench_*.py is one."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

import torch

import benchmarks
from hf_robust.evaluation.environment import collect_environment


def main() -> None:
    """Run what was asked for, print a table, write JSON."""
    known = sorted(
        m.name.removeprefix("bench_") for m in pkgutil.iter_modules(benchmarks.__path__) if "bench_" in m.name
    )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="Which measurements; default: all.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    parser.add_argument("--dataset_name", help="Labelled images, e.g. uoft-cs/cifar10; default: random pixels.")
    parser.add_argument("--images", type=int, default=4096, help="How many images to use; at most.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images of a step.")
    parser.add_argument("--backbone", default="resnet10_cifar", help="timm architecture.")
    parser.add_argument("--model_args", type=json.loads, default={"channels": [16, 32, 64, 128], "stem_stride": 2})
    parser.add_argument("--bf16", action="store_true", help="Attack and train in bfloat16.")
    parser.add_argument("--short", action="store_true", help="Only the modes that matter most.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of the process on a CPU.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for name in options.only:
        results += importlib.import_module(f"benchmarks.bench_{name}").measure(options)
    print(f"\n{'measurement':<44}{'ratio':>8}  details")
    for result in results:
        details = {k: v for k, v in result.items() if k not in ("name", "ratio", "ratio_min", "ratio_max")}
        print(f"{result['name']:<44}{result['ratio']:>8.3f}  {json.dumps(details)}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        record = {"results": results, "settings": settings, "environment": collect_environment()}
        options.json.write_text(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()
