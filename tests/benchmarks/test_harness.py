"""The statistics are right, whatever the machine does: every clock here is made of numbers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    Budget,
    Case,
    Reading,
    busy_seconds,
    count_flops,
    interleave,
    order,
    ratio,
    record,
    time_on_cpu,
)


class FakeMachine:
    """Calls cost what a list says: wall seconds by variant and round; the processor takes a tenth more."""

    def __init__(self, seconds, others=0.0):
        self.seconds, self.others = {name: list(values) for name, values in seconds.items()}, others
        self.called, self.now = [], 0.0
        self.actions = {name: lambda name=name: self.called.append(name) for name in seconds}

    def timer(self, action):
        action()
        wall = self.seconds[self.called[-1]].pop(0)
        self.now += wall
        return Reading(wall, 1.1 * wall, self.others * wall)

    def clock(self):
        return self.now


def test_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians():
    machine = FakeMachine({"plain": [10.0, 40.0, 12.0], "fast": [5.0, 10.0, 8.0]})
    readings = interleave(machine.actions, 3, machine.timer)
    found = ratio(readings["plain"], readings["fast"])
    assert (found.median, found.low, found.high) == (2.0, 1.5, 4.0)  # of medians it would be 1.5


def test_every_variant_takes_every_place_in_turn():
    names = ["a", "b", "c"]
    rounds = [order(names, number) for number in range(6)]
    assert rounds[0] == names and rounds[1] == names[::-1]
    assert all(sorted(r) == names for r in rounds)
    places = Counter((name, place) for r in rounds for place, name in enumerate(r))
    assert set(places.values()) == {2}
    assert [order(["a", "b"], number)[0] for number in range(4)] == ["a", "b", "b", "a"]


def test_readings_follow_their_variant_through_the_orders():
    machine = FakeMachine({"plain": [1.0] * 4, "fast": [2.0] * 4, "slow": [3.0] * 4})
    readings = interleave(machine.actions, 4, machine.timer)
    assert [{r.wall for r in values} for values in readings.values()] == [{1.0}, {2.0}, {3.0}]
    assert machine.called[:3] != machine.called[3:6]


def test_a_budget_ends_before_a_round_that_does_not_fit():
    machine = FakeMachine({"plain": [4.0] * 9, "fast": [1.0] * 9})
    readings = interleave(machine.actions, 9, machine.timer, budget=Budget(17.0, machine.clock))
    assert len(readings["plain"]) == len(readings["fast"]) == 3  # 15 s; a fourth round would end at 20
    machine = FakeMachine({"plain": [4.0] * 9, "fast": [1.0] * 9})
    assert len(interleave(machine.actions, 9, machine.timer, budget=Budget(0.5, machine.clock))["plain"]) == 1


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        interleave({"a": lambda: None}, 0, time_on_cpu)


@pytest.mark.parametrize(("others", "disturbed"), [(0.1, False), (0.3, True)])
def test_record_marks_what_was_disturbed(others, disturbed):
    machine = FakeMachine({"x/plain": [10.0, 12.0, 11.0], "x/fast": [5.0, 4.0, 5.5]}, others)
    readings = interleave(machine.actions, 3, machine.timer)
    case = Case("x/fast", lambda: lambda: None, images=55, facts={"note": 1})
    result = record(case, "x/plain", readings, cores=2, flops=1e9)
    assert (result["ratio"], result["ratio_min"], result["ratio_max"]) == (2.0, 2.0, 3.0)
    assert result["cpu_ratio"] == pytest.approx(2.0) and result["rounds"] == 3 and result["note"] == 1
    assert (result["seconds"], result["reference_seconds"]) == (5.0, 11.0)
    assert result["images_per_second"] == 11.0 and result["flop_per_second"] == 2e8
    assert result["others_share"] == pytest.approx(others / 2) and result["disturbed"] is disturbed


def test_unknown_load_is_said_to_be_unknown():
    readings = {"a": [Reading(1.0, 1.0)], "b": [Reading(0.5, 0.5)]}
    result = record(Case("b", lambda: lambda: None), "a", readings)
    assert result["others_share"] is None and result["disturbed"] is None


def test_the_real_clock_tells_waiting_from_working():
    waited = time_on_cpu(lambda: time.sleep(0.05))
    assert waited.wall >= 0.05 > waited.cpu
    assert waited.others is None or waited.others >= 0
    first, second = busy_seconds(), busy_seconds()
    assert first is None or second >= first > 0


def test_operations_are_counted():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5


ROOT = Path(__file__).parents[2]
PEAK = """
import torch
from benchmarks.memory import peak_of

held = torch.ones(8 * 2**20)  # 32 MiB that exist before
print(peak_of(lambda: (held[: 6 * 2**20] + 1).sum(), "cpu"))  # 24 MiB
"""


def test_peak_is_what_the_call_needs_beyond_what_is_there():
    """In a process of its own: one that has freed memory may give that out again."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 20 * 2**20 < int(done.stdout) < 40 * 2**20
