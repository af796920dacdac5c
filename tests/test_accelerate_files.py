"""The file for two processes without a GPU starts two: with the settings that look right accelerate starts one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "examples" / "accelerate" / "two_cpu_processes.yaml"
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
