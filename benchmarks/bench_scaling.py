"""Steps on one process and on two, in turn: strong scaling (one batch shared out) and weak scaling (a batch each).

Every process is launched anew, has one thread, and waits for its turn. Communication is counted, not estimated: calls
of the library by their bytes, the gradients of DistributedDataParallel by the size of what it averages. A model for
more processes is in docs/guides/large_data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Case, Reading, busy_seconds, interleave, record
from benchmarks.setting import batch_of, library_step
from hf_robust.objectives.acl import ACL

BATCH = 64
WORLD = 2


class Processes:
    """Some processes that take a training step together whenever they are told to.

    Args:
        options (`argparse.Namespace`): network, `training_args`.
        world (`int`): how many.
        images (`int`): of a step, on each.
    """

    def __init__(self, options: argparse.Namespace, world: int, images: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.images, self._children = world * images, []
        command = [sys.executable, "-m", "benchmarks.bench_scaling", options.model or "thin16", str(images)]
        command.append(json.dumps(options.training_args or {}))
        for rank in range(world):
            many = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
            environment = {**os.environ, **many, **where, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            child = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._children.append(child)

    def ready(self) -> dict[str, Any]:
        """Wait until all are set up; what the first one says of its communication."""
        return self._answers()[0]

    def step(self) -> Reading:
        """One step: the seconds of the slowest process, and processor seconds of all of them."""
        busy = busy_seconds()
        for child in self._children:
            child.stdin.write("step\n")
            child.stdin.flush()
        found, now = self._answers(), busy_seconds()
        cpu = sum(f["cpu"] for f in found)
        others = None if busy is None or now is None else max(0.0, now - busy - cpu)
        return Reading(max(f["wall"] for f in found), cpu, others)

    def close(self) -> None:
        """Let them end."""
        for child in self._children:
            child.stdin.close()
        for child in self._children:
            child.wait(timeout=60)
            child.stdout.close()

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for child in self._children:
            line = ""
            while not line.startswith("{"):  # the trainer may have something to say, too
                line = child.stdout.readline()
                if not line:
                    raise ValueError(f"a process of the scaling measurement ended with status {child.wait()}")
            found.append(json.loads(line))
        return found


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes of the results of every collective call of this process that goes through Python."""
    found: dict[str, int] = {}
    kept = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counting(name: str) -> Any:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            parts = tensor if isinstance(tensor, list) else [tensor]
            found[name] = found.get(name, 0) + sum(t.numel() * t.element_size() for t in parts)
            return kept[name](tensor, *args, **kwargs)

        return call

    try:
        for name in kept:
            setattr(dist, name, counting(name))
        yield found
    finally:
        for name, call in kept.items():
            setattr(dist, name, call)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second on two processes over those on one; 2 would be perfect."""
    images = options.batch_size or BATCH
    groups: dict[str, Processes] = {}
    results: list[dict[str, Any]] = []
    try:
        groups["one"] = Processes(options, 1, images)
        groups["strong"] = Processes(options, WORLD, images // WORLD)
        groups["weak"] = Processes(options, WORLD, images)
        facts = {name: group.ready() for name, group in groups.items()}
        turns = {name: group.step for name, group in groups.items()}
        readings = interleave(
            turns, options.rounds, lambda turn: turn(), budget=options.budget, title="scaling", quiet=options.quiet
        )
    finally:
        for group in groups.values():
            group.close()
    for kind in ("strong", "weak"):
        name, more = f"scaling/{kind}/{WORLD}", groups[kind].images / groups["one"].images
        case = Case(name, lambda: lambda: None, groups[kind].images)
        found = record(case, "one", {name: readings[kind], "one": readings["one"]})
        found |= {key: more * found[key] for key in ("ratio", "ratio_min", "ratio_max", "cpu_ratio")}
        found |= {"efficiency": found["ratio"] / WORLD, "ratio_of": "one process", "processes": WORLD}
        results.append(found | facts[kind])
    return results


def volume(model: Any, calls: dict[str, int], images: int) -> dict[str, Any]:
    """What a process sends and receives in a step, by the sizes of the results.

    Args:
        model (`Any`): of the trainer.
        calls (`dict[str, int]`): of `counted_bytes`: gathered embeddings, their gradients, norm statistics.
        images (`int`): of a step, on this process.
    """
    return {
        "gradient_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "gathered_bytes": calls.get("all_gather", 0),
        "reduced_bytes": calls.get("all_reduce", 0),
        "images_per_process": images,
    }


def child(name: str, images: int, training_args: dict[str, Any]) -> None:
    """One process: set up, then a step per line that comes in."""
    torch.set_num_threads(1)
    options = argparse.Namespace(model=name, device="cpu", training_args={"cpu_threads": 1, **training_args})
    objective = ACL()
    step = library_step(options, objective, batch_of(options, objective, images, int(os.environ.get("RANK", 0))))
    with counted_bytes() as calls:
        step()
    print(json.dumps(volume(step.trainer.model, calls, images)), flush=True)
    for _ in sys.stdin:
        if dist.is_initialized():
            dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
