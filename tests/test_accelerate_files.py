"""The launch files: two processes without a GPU are two, and the file for FSDP2 reaches the training arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_robust.training_args import RobustTrainingArguments

FILES = Path(__file__).parents[1] / "examples" / "accelerate"
FILE = FILES / "two_cpu_processes.yaml"
PROGRAM = """
from accelerate import PartialState

state = PartialState(cpu=True)
print(f"process {state.process_index} of {state.num_processes}, {state.backend}", flush=True)
"""


def test_two_processes_start(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILE)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_"))}
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    started = sorted(re.findall(r"process \d of \d, gloo", done.stdout))  # both write at once: lines may run together
    assert started == ["process 0 of 2, gloo", "process 1 of 2, gloo"]


def test_the_file_for_fsdp2_shares_weights_out(monkeypatch, tmp_path):
    """With the environment that accelerate launch makes of it; Accelerate itself is told to leave weights alone."""
    parsed = launch_command_parser().parse_args(["--config_file", str(FILES / "fsdp2.yaml"), "program.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    made = prepare_multi_gpu_env(parsed)
    assert made["ACCELERATE_USE_FSDP"] == "true" and made["FSDP_VERSION"] == "2" and parsed.num_processes == 4
    for name in ("ACCELERATE_USE_FSDP", "HF_ROBUST_SHARD_WEIGHTS", *made):
        monkeypatch.setenv(name, made[name]) if name.startswith(("FSDP_", "ACCELERATE_USE_F")) else None
    monkeypatch.setenv("HF_ROBUST_SHARD_WEIGHTS", "false")  # put back after the test
    for _ in range(2):  # a run may build its arguments more than once
        assert RobustTrainingArguments(output_dir=str(tmp_path), report_to="none").shard_weights
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
