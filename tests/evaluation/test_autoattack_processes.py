"""Two gloo processes share the images (H15): each is told the whole result, and an error reaches both."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attacked import Ladder
from autoattack_child import LEVELS, evaluate, facts

CHILD = Path(__file__).parent / "autoattack_child.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("share")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """Per process, what it was told in each case."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = [
        subprocess.Popen([sys.executable, CHILD, "share", str(rank), "2", port, str(folder / "two")])
        for rank in range(2)
    ]
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    return [json.loads((folder / f"two-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_tell_what_one_tells(told: list[dict[str, Any]]) -> None:
    one, two = facts(evaluate(Ladder(), None)), told[0]["good"]
    assert told[1]["good"] == two
    # The draws depend on the batches; the decisions of this classifier do not.
    assert {name: two[name] for name in ("robust", "clean")} == {name: one[name] for name in ("robust", "clean")}
    assert [stage[0] for stage in two["stages"]] == [stage[0] for stage in one["stages"]]
    assert two["stages"][0][2] == one["stages"][0][2] > len(LEVELS), "no image is attacked twice"


def test_each_process_has_its_own_state(told: list[dict[str, Any]], folder: Path) -> None:
    assert sorted(p.name for p in folder.glob("*.npz")) == ["two-state-0-of-2.npz", "two-state-1-of-2.npz"]
    assert [process["again"] for process in told] == [process["good"] for process in told]


def test_more_processes_than_images(told: list[dict[str, Any]]) -> None:
    assert told[0]["lonely"] == told[1]["lonely"] == facts(evaluate(Ladder(), None, LEVELS[:1]))


def test_an_error_of_one_process_ends_both(told: list[dict[str, Any]]) -> None:
    whole, failing = (process["failing"]["error"] for process in told)
    assert whole.startswith("RuntimeError: process 1 could not attack its share of the images: the model gives")
    assert failing.startswith("ValueError: the model gives logits that are not finite")
    assert told[0]["unspeakable"]["error"].endswith(
        "process 1 could not attack its share of the images: out of something"
    )
    assert told[1]["unspeakable"]["error"] == "Unspeakable: out of something"
    for process in told:
        assert "called with different models, images, labels or settings" in process["different"]["error"]
