"""Two gloo processes with half the batch each compute what one process computes: loss, gradients, statistics."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(world: int, case: str, out: Path) -> list[dict]:
    port = str(free_port())
    children = [
        subprocess.Popen([sys.executable, TESTS / "distributed_child.py", str(r), str(world), port, case, str(out)])
        for r in range(world)
    ]
    assert [child.wait(timeout=200) for child in children] == [0] * world
    return [torch.load(f"{out}-{r}.pt", weights_only=True) for r in range(world)]


@pytest.mark.parametrize("case", ["acl-frozen", "air-frozen", "acl-sync", "air-sync"])
def test_two_processes_equal_one(tmp_path, case):
    (one,) = run(1, case, tmp_path / "one")
    first, second = run(2, case, tmp_path / "two")
    assert float(first["loss"]) == pytest.approx(float(one["loss"]), abs=1e-5)
    assert float(second["loss"]) == pytest.approx(float(one["loss"]), abs=1e-5)
    for name, expected in one["gradients"].items():
        scale = max(1.0, float(expected.abs().max()))
        for other in (first, second):
            torch.testing.assert_close(other["gradients"][name], expected, atol=1e-5 * scale, rtol=0, msg=name)
    for name, expected in one["buffers"].items():
        torch.testing.assert_close(first["buffers"][name], expected, atol=1e-5, rtol=1e-5)


def test_all_processes_attack_one_network_and_one_teacher(tmp_path):
    first, second = run(2, "dynacl-plain", tmp_path / "two")
    for part in ("buffers", "teacher"):
        assert first[part].keys() == second[part].keys() and first[part]
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
