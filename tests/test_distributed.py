"""Gloo processes with a share of the batch each compute what one process computes: loss, gradients, statistics."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import tiny_images

from hf_robust.flags import method_names
from hf_robust.hub import load_encoder

TESTS = Path(__file__).parent
# objective - norm statistics: frozen, or of the whole batch in train mode (double: in float64)
EQUAL = [f"{method}-{norms}" for norms in ("frozen", "sync") for method in ("acl", "air", "advcl", "rocl")]
EQUAL += ["ainfonce-frozen", "deacl-double", "fare-sync"]
EQUAL += sorted({f"{method}-frozen" for method in method_names(finetuning=False)} - set(EQUAL))  # by existing
FINETUNING = [f"finetune-{method}-{norms}" for method in ("aff", "autolora", "lora") for norms in ("frozen", "sync")]
SELECTIONS = ["rcs-batch", "rcs-sample"]
SHARDED = ["shard-lars", "shard-adamw"]
IN_FLOAT64 = ["rcs64-batch", "rcs64-sample"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(world: int, cases: list[str], out: Path) -> list[dict]:
    """Run one world of processes; per rank, what each case found."""
    command = [sys.executable, TESTS / "distributed_child.py", str(world), str(free_port()), str(out), *cases]
    with subprocess.Popen(command, start_new_session=True) as parent:
        try:
            assert parent.wait(timeout=280) == 0
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)  # the forked ones, too
            raise
    return [torch.load(f"{out}-{r}.pt", weights_only=True) for r in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "rank"
    (found,) = run(1, [*EQUAL, *FINETUNING, *SELECTIONS, "shard-lars", *IN_FLOAT64], out)
    return {**found, "out": out}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "rank"
    cases = [
        *EQUAL,
        *FINETUNING,
        *SELECTIONS,
        "rcs-batch-sharded",
        "dynacl-plain",
        *SHARDED,
        "whole-adamw",
        *IN_FLOAT64,
    ]
    return [{**found, "out": out} for found in run(2, cases, out)]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    out = tmp_path_factory.mktemp("four") / "rank"
    return [{**found, "out": out} for found in run(4, ["acl-sync", "shard-lars", *IN_FLOAT64], out)]


def close(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding, on the scale of each tensor."""
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, atol=tolerance * scale, rtol=0, msg=name)


@pytest.mark.parametrize(("world", "case"), [*[("two", case) for case in EQUAL + FINETUNING], ("four", "acl-sync")])
def test_several_processes_equal_one(one, world, case, request):
    expected = one[case]
    for found in (rank[case] for rank in request.getfixturevalue(world)):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
        # TRADES divides by small class probabilities: its gradients are rounded a little more coarsely.
        close(found["gradients"], expected["gradients"], 2e-5 if case in FINETUNING else 1e-5)
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


@pytest.mark.parametrize(("world", "case"), [("two", "shard-lars"), ("two", "shard-adamw"), ("four", "shard-lars")])
def test_sharded_weights_train_as_whole_ones(one, world, case, request):
    """Losses, gradients, weights and momentum encoder after two steps; activation checkpointing along the way."""
    ranks = request.getfixturevalue(world)
    # a momentum encoder sees the statistics of its process: there the other side is plain data-parallel training
    expected = one[case] if case in one else ranks[0][case.replace("shard", "whole")]
    (whole,) = expected["held"]
    assert sum(rank[case]["held"].copy().pop() for rank in ranks) == whole, "each process holds a part"
    for found in (rank[case] for rank in ranks):
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-5) and len(found["losses"]) == 2
        assert max(found["held"]) < 0.6 * whole
        close(found["gradients"][0], expected["gradients"][0])
        for part in ("weights", "weights_teacher"):
            # in front of a norm layer a bias has no gradient but rounding, which LARS and Adam make a step of
            held = [{n: v for n, v in e[part].items() if "fc1.bias" not in n} for e in (found, expected)]
            close(*held) if expected[part] else None
        for name, value in found["weights"].items():
            assert torch.equal(value, ranks[0][case]["weights"][name]), name


@pytest.mark.parametrize(("world", "case"), [("two", "shard-lars"), ("two", "shard-adamw"), ("four", "shard-lars")])
def test_a_resumed_sharded_training_is_the_uninterrupted_one(world, case, request):
    for rank in request.getfixturevalue(world):
        for part in ("", "_teacher"):
            for name, value in rank[case][f"weights{part}"].items():
                assert torch.equal(value, rank[case][f"resumed{part}"][name]), name


def test_what_a_sharded_training_leaves_is_ordinary(one, two):
    """Its probes, its encoder, and a checkpoint that one process reads without knowing of shards."""
    (case, folder), image = (SHARDED[0], Path(f"{two[0]['out']}-2-{SHARDED[0]}")), tiny_images(4).images.float() / 255
    assert len(two[0][case]["probes"]) == 2 and two[1][case]["probes"] == []
    plain = Path(f"{one['out']}-1-{case}")
    features = [load_encoder(f / "encoder").eval()(image).pooler_output for f in (folder, plain)]
    torch.testing.assert_close(*features, atol=1e-4, rtol=1e-4)
    saved = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, two[0][case]["weights"][name]) for name, value in saved.items())
    states = [torch.load(f / "checkpoint-2" / "optimizer.pt", weights_only=True) for f in (folder, plain)]
    names = list(two[0][case]["gradients"][0])
    mine, theirs = ({names[k]: s["momentum_buffer"] for k, s in state["state"].items()} for state in states)
    assert mine.pop("projector.fc1.bias").shape == theirs.pop("projector.fc1.bias").shape  # rounding, see above
    close(mine, theirs)


def test_sharded_weights_choose_the_same_coresets(two):
    for rank in two:
        assert rank["rcs-batch-sharded"]["coresets"][0] == rank["rcs-batch"]["coresets"][0]
        assert rank["rcs-batch-sharded"]["coresets"] == two[0]["rcs-batch-sharded"]["coresets"]


@pytest.mark.parametrize("case", IN_FLOAT64)
@pytest.mark.parametrize("world", ["two", "four"])
def test_a_shared_selection_picks_what_one_process_picks(one, world, case, request):
    for found in (rank[case] for rank in request.getfixturevalue(world)):
        assert found["picks"] == one[case]["picks"]
        assert found["gains"] == pytest.approx(one[case]["gains"], rel=1e-9)
