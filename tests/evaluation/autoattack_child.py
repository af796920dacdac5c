"""Processes for `test_autoattack_resume.py` and `test_autoattack_processes.py`.

python autoattack_child.py kill STATE ATTACK           attack, and die by SIGKILL inside the second batch of ATTACK
python autoattack_child.py share RANK WORLD PORT OUT   one of several processes that share the images
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attacked import Ladder, ladder_images
from torch import Tensor

from hf_robust.evaluation.autoattack import AutoAttackResult, autoattack

LEVELS = [20.0, 31.5, 45.0, 60.0, 76.0, 90.0, 114.0, 130.0, 150.0, 63.0, 57.0]


def evaluate(model: Any, state: str | None, levels: list[float] = LEVELS, **settings: Any) -> AutoAttackResult:
    """The same images and settings everywhere."""
    images, labels = ladder_images(levels)
    settings = {"eps": 7 / 255, "preset": "smoke", "batch_size": 3, "progress": False, **settings}
    return autoattack(model, images, labels, state_file=state, **settings)


class Dying(Ladder):
    """Kills its process a few passes after the first batch of one attack has been noted."""

    def __init__(self, state: str, attack: str) -> None:
        super().__init__()
        self.state, self.attack, self.passes = Path(state), attack, 0

    def forward(self, images: Tensor) -> Tensor:
        if self.state.exists():
            with np.load(self.state, allow_pickle=False) as stored:
                facts = json.loads(str(stored["facts"]))
                over = len(stored["after"])
            if facts["counts"][-1]["name"] == self.attack and over < len(facts["counts"]) and facts["batches"] == 1:
                self.passes += 1
                if self.passes == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class Unspeakable(RuntimeError):
    """Cannot be pickled, as exceptions that hold a lock or a file cannot."""

    def __init__(self) -> None:
        super().__init__("out of something")
        self.held = lambda: None


def broken(images: Tensor) -> Tensor:
    raise Unspeakable


def facts(result: AutoAttackResult) -> dict[str, Any]:
    """Everything but the clock, as plain values."""
    return {
        "robust": result.robust.tolist(),
        "clean": result.clean.tolist(),
        "predictions": result.predictions.tolist(),
        "distances": result.distances.tolist(),
        "stages": [[s.name, s.robust.tolist(), s.forwards, s.backwards] for s in result.stages],
        "warnings": result.warnings,
    }


def share(rank: int, world: int, port: str, out: str) -> None:
    """Evaluate as one of several processes, a few times over, and write down what this one was told."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    sound = Ladder()
    cases: dict[str, tuple[Any, str | None]] = {
        "good": (sound, f"{out}-state.npz"),
        "again": (sound, f"{out}-state.npz"),
        "failing": ((lambda images: sound(images) * float("nan")) if rank == 1 else sound, None),
        "unspeakable": (broken if rank == 1 else sound, None),
        "different": (Ladder(5 if rank else 4), None),
    }
    found: dict[str, Any] = {"lonely": facts(evaluate(sound, None, LEVELS[:1]))}
    for case, (model, state) in cases.items():
        try:
            found[case] = facts(evaluate(model, state))
        except (ValueError, RuntimeError) as error:
            found[case] = {"error": f"{type(error).__name__}: {error}"}
    Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        evaluate(Dying(sys.argv[2], sys.argv[3]), sys.argv[2])
    else:
        share(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
