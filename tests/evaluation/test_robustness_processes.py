"""Two gloo processes share an evaluation: each is told the whole of it, one writes it, and an error reaches both."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import torch
from attacked import LEVELS, Ladder, ladder_images

from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.robustness import evaluate_robustness

CHILD = Path(__file__).parent / "robustness_child.py"
SETTINGS = {"eps": 7 / 255, "preset": "smoke", "batch_size": 3, "progress": False, "curve_examples": 0}


def test_two_processes_tell_what_one_tells(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [subprocess.Popen([sys.executable, CHILD, str(rank), "2", port, str(tmp_path)]) for rank in range(2)]
    assert [child.wait(timeout=250) for child in children] == [0, 0]
    one = evaluate_robustness(Ladder(), ladder_images(LEVELS), ("pgd10", "autoattack"), **SETTINGS)
    shared = EvaluationReport.load(tmp_path / "out")
    assert all(torch.equal(shared.flags[kind], one.flags[kind]) for kind in ("clean", "pgd10", "autoattack"))
    assert shared.metrics == one.metrics and shared.counts["pgd10"] == one.counts["pgd10"]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(part["metrics"] == one.metrics for part in told)
    assert "process 1 could not do its share" in told[0]["error"] and "not finite" in told[0]["error"]
    assert told[1]["error"].startswith("the model gives logits that are not finite")
