"""One of several gloo processes of `test_robustness.py`: python robustness_child.py RANK WORLD PORT FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from attacked import LEVELS, Ladder, ladder_images

from hf_robust.evaluation.robustness import evaluate_robustness


class Failing(Ladder):
    """Gives NaN for the second batch, which the second process has."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return logits / 0 * 0 if len(images) == 3 and 70 < float(images[0].mean()) * 255 < 120 else logits


def main() -> None:
    """Evaluate together, then with a model that fails in one process only."""
    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    settings = {"eps": 7 / 255, "preset": "smoke", "batch_size": 3, "progress": False, "curve_examples": 0}
    data = ladder_images(LEVELS)
    report = evaluate_robustness(Ladder(), data, ("pgd10", "autoattack"), output_dir=folder / "out", **settings)
    error = ""
    try:
        evaluate_robustness(Failing(), data, ["accuracy"], **settings)
    except (ValueError, RuntimeError) as found:
        error = str(found)
    (folder / f"{rank}.json").write_text(json.dumps({"metrics": report.metrics, "error": error}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
