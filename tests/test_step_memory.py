"""Peak memory of training steps, each in a process: against the published step, and against what was foreseen."""

from __future__ import annotations

import sys

import pytest

from benchmarks.__main__ import modules, parse
from benchmarks.memory import child_peak
from benchmarks.setting import build_model
from hf_robust.memory_model import step_memory
from hf_robust.objectives.acl import ACL

NEAR = 0.2  # of the count; workspaces and blocked weights, which the count does not know, are a small part


def foreseen(arguments, precision):
    """Bytes that come and go in a step; state and copies are there before the measurement begins."""
    options = parse(arguments, list(modules()))
    return step_memory(build_model(options, ACL()), ACL(), options.batch_size, precision=precision).activations


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_bf16_step_needs_at_most_0_62_of_the_memory_of_the_published_step():
    arguments = ["--only", "acl", "--model", "thin16", "--batch_size", "32", "--device", "cpu", "--quiet"]
    reference, ours = (child_peak(f"acl/{form}", arguments) for form in ("fp32/reference", "bf16/eager"))
    assert reference is not None and reference > 100e6 and ours is not None
    assert ours <= 0.62 * reference
    assert ours == pytest.approx(foreseen(arguments, "bf16"), rel=NEAR)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_memory_of_a_transformer_is_foreseen():
    arguments = ["--only", "acl", "--model", "vit_tiny", "--model_args", '{"depth": 3}', "--batch_size", "16"]
    arguments += ["--device", "cpu", "--quiet"]
    found = child_peak("acl/fp32/eager", arguments)
    assert found is not None and found == pytest.approx(foreseen(arguments, "no"), rel=NEAR)
