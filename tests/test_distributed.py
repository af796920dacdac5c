"""Two gloo processes with half the batch each compute what one process computes: loss, gradients, statistics."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# objective - norm statistics: frozen, or of the whole batch in train mode (double: in float64)
EQUAL = [f"{method}-{norms}" for norms in ("frozen", "sync") for method in ("acl", "air", "advcl", "rocl")]
EQUAL += ["ainfonce-frozen", "deacl-frozen", "deacl-double", "fare-sync"]
FINETUNING = [f"finetune-{method}-{norms}" for method in ("aff", "autolora", "lora") for norms in ("frozen", "sync")]
SELECTIONS = ["rcs-batch", "rcs-sample"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(world: int, cases: list[str], out: Path) -> list[dict]:
    """Start the processes of one world; per rank, what each case found."""
    port = str(free_port())
    children = [
        subprocess.Popen([sys.executable, TESTS / "distributed_child.py", str(r), str(world), port, str(out), *cases])
        for r in range(world)
    ]
    assert [child.wait(timeout=280) for child in children] == [0] * world
    return [torch.load(f"{out}-{r}.pt", weights_only=True) for r in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    (found,) = run(1, [*EQUAL, *FINETUNING, *SELECTIONS], tmp_path_factory.mktemp("one") / "rank")
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(2, [*EQUAL, *FINETUNING, *SELECTIONS, "dynacl-plain"], tmp_path_factory.mktemp("two") / "rank")


@pytest.mark.parametrize("case", [*EQUAL, *FINETUNING])
def test_two_processes_equal_one(one, two, case):
    expected = one[case]
    for found in (rank[case] for rank in two):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
        assert found["gradients"].keys() == expected["gradients"].keys() != set()
        for name, gradient in expected["gradients"].items():
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-5 * scale, rtol=0, msg=name)
        for name, buffer in expected["buffers"].items():
            torch.testing.assert_close(found["buffers"][name], buffer, atol=1e-5, rtol=1e-5)


def test_all_processes_remember_what_one_would(one, two):
    expected = one["ainfonce-frozen"]["memory"]
    assert expected["distance_images"] == 8
    for rank in two:
        assert rank["ainfonce-frozen"]["memory"] == two[0]["ainfonce-frozen"]["memory"]
        assert rank["ainfonce-frozen"]["memory"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", FINETUNING)
def test_all_processes_hear_the_same_from_the_held_out_images(one, two, case):
    first, second = (rank[case]["measured"] for rank in two)
    assert first == second and len(first) == len(one[case]["measured"]) >= 2
    if "autolora" in case:  # before the first step, where the weights are equal
        assert first[0] == one[case]["measured"][0]


def test_all_processes_attack_one_network_and_one_teacher(two):
    first, second = (rank["dynacl-plain"] for rank in two)
    for part in ("buffers", "teacher"):
        assert first[part].keys() == second[part].keys() and first[part]
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name


@pytest.mark.parametrize("case", SELECTIONS)
def test_two_processes_choose_the_coreset_of_one(one, two, case):
    """The first selection sees equal weights; later ones see those of a training with statistics of half batches."""
    alone, first, second = one[case], two[0][case], two[1][case]
    assert len(first["coresets"]) == 3 and alone["pool"] == first["pool"]
    assert first["coresets"][0][0] == alone["coresets"][0][0]
    assert first["coresets"][0][1] == pytest.approx(alone["coresets"][0][1], rel=1e-4)
    assert first["coresets"] == second["coresets"]
    assert first["coresets"][0][0] != first["coresets"][1][0]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
