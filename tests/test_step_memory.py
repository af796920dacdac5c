"""Peak memory of a training step in bf16, against the plain eager form of the published step, each in a process."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory import child_peak


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_bf16_step_needs_at_most_0_62_of_the_memory_of_the_published_step():
    arguments = ["--only", "acl", "--model", "thin16", "--batch_size", "32", "--device", "cpu", "--quiet"]
    reference, ours = (child_peak(f"acl/{form}", arguments) for form in ("fp32/reference", "bf16/eager"))
    assert reference is not None and reference > 100e6 and ours is not None
    assert ours <= 0.62 * reference
