"""Stages run one after another as processes of their own: what is finished is kept, what was stopped goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import hf_robust
from hf_robust.checkpoints import latest_complete
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.stages import LastCheckpoint, Plan, Stage, row_stages, unique_stages
from hf_robust.reproduction.tables import Row

__all__ = ["command_of", "is_finished", "run_rows"]

_RESUME = ["--resume_from_checkpoint", "true"]
_STATE = "state"


def run_rows(
    rows: Sequence[Row], plan: Plan, rate: Rate, tell: Callable[[str], None] = lambda text: None
) -> dict[str, str]:
    """Run the commands of rows, each stage once; a failure ends its row, not the others.

    A stage counts as finished when the files that it leaves are there and `state/` says that this very command made
    them (or, of a command run by hand, its report does). One that was stopped goes on from its newest checkpoint.

    Args:
        rows (`Sequence[Row]`): in order.
        plan ([`Plan`]): where and how.
        rate ([`Rate`]): for the hours that are announced.
        tell (`Callable`): receives a line of progress.

    Returns:
        `dict[str, str]`: stages that failed to what went wrong, those that wait for them included.

    Raises:
        ValueError: before anything runs, where a data set is not named, a folder holds the run of another command, or
            a stage is already running.
    """
    stages, failed = unique_stages(rows, plan), dict[str, str]()
    _check_data(stages, plan)
    for stage in stages:
        is_finished(stage, plan)
        _check_idle(stage, plan)
    with _stopped_together():
        for number, stage in enumerate(stages, start=1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            broken = next((name for name in stage.needs if name in failed), None)
            if broken is not None:
                failed[stage.name] = f"waits for {broken}"
                tell(f"{head}: left out, {broken} failed")
            elif is_finished(stage, plan):
                tell(f"{head}: finished before")
            else:
                told = "" if plan.smoke else f", predicted {rate.hours(stage.work):.2g} hours"
                tell(f"{head}: {stage.command}{told}\n{shlex.join(command_of(stage, plan))}")
                seconds, problem = _run(stage, plan)
                tell(f"{head}: {problem or 'finished'} after {seconds:.0f} seconds")
                failed |= {stage.name: problem} if problem else {}
    for row in rows:
        broken = next((stage.name for stage in row_stages(row, plan) if stage.name in failed), None)
        if broken is not None:
            tell(f"row {row.name} was not reproduced: {broken} ({failed[broken]})")
    return failed


def command_of(stage: Stage, plan: Plan) -> list[str]:
    """The process of a stage, with what it has to be told to go on where it was stopped.

    Args:
        stage ([`Stage`]): what it needs is finished.
        plan ([`Plan`]): where and how.
    """
    words = [_resolved(word) for word in stage.arguments]
    resume = _RESUME if stage.command != "evaluate" and _has_begun(Path(stage.folder)) else []
    return [sys.executable, "-m", "hf_robust.commands", stage.command, *words, *resume]


def is_finished(stage: Stage, plan: Plan) -> bool:
    """Whether a stage has ended well.

    Args:
        stage ([`Stage`]): of a row.
        plan ([`Plan`]): where and how.

    Raises:
        ValueError: if its folder holds what another command has left.
    """
    folder, state = Path(stage.folder), _read_state(stage, plan)
    made = all((folder / name).is_file() for name in stage.makes)
    if state and state["arguments"] == stage.words:
        return made and state["status"] == "finished"
    if not made and not (stage.command != "evaluate" and _has_begun(folder)):
        return False
    if not state and made and _made_by(folder, stage):
        return True
    raise ValueError(
        f"{stage.folder!r} holds a run of other flags than this one would have: give another --output_dir, or remove "
        "that folder"
    )


def _made_by(folder: Path, stage: Stage) -> bool:
    """Whether the command in the report is this one, run by hand."""
    told = json.loads((folder / "report.json").read_text(encoding="utf-8")).get("command") or ""
    words = shlex.split(told)
    start = words.index(stage.command) + 1 if stage.command in words else len(words)
    flags = " ".join(words[start:]).replace(" ".join(_RESUME), "").split()
    wanted = " ".join(_resolved(word) for word in stage.arguments).split()
    return flags == wanted


def _resolved(word: str | LastCheckpoint) -> str:
    if isinstance(word, LastCheckpoint):
        return latest_complete(word.folder) or str(word)
    inside = Path(hf_robust.__file__).parents[1] / word
    return str(inside) if word.startswith("examples/") and not Path(word).is_file() and inside.is_file() else word


def _has_begun(folder: Path) -> bool:
    return bool(
        latest_complete(folder) or latest_complete(folder / "probe") or (folder / "pseudo_labels.json").exists()
    )


def _run(stage: Stage, plan: Plan) -> tuple[float, str]:
    """Seconds, and what went wrong, if anything did."""
    state, start = _read_state(stage, plan), time.monotonic()
    facts = {"arguments": stage.words, "starts": state.get("starts", 0) + 1}
    before = state.get("seconds", 0.0) if state.get("arguments") == stage.words else 0.0
    with subprocess.Popen(command_of(stage, plan)) as process:
        try:
            running = {"status": "running", "pid": process.pid, "created": _created(process.pid)}
            _write_state(stage, plan, {**facts, **running, "seconds": before})
            status = process.wait()
        except BaseException:  # stopped: Ctrl-C reaches the child, too; it gets the time to end in order
            process.terminate()
            process.wait()
            _write_state(stage, plan, {**facts, "status": "stopped", "seconds": before + time.monotonic() - start})
            raise
    seconds = time.monotonic() - start
    missing = [name for name in stage.makes if not (Path(stage.folder) / name).is_file()]
    problem = f"failed with exit status {status}" if status else ""
    problem = problem or (f"ended without writing {', '.join(missing)}" if missing else "")
    ended = {"status": "failed" if problem else "finished", "problem": problem, "seconds": before + seconds}
    _write_state(stage, plan, {**facts, **ended})
    return seconds, problem


def _check_data(stages: Sequence[Stage], plan: Plan) -> None:
    missing = {
        str(word).removeprefix("path/to/")
        for stage in stages
        for word in (stage.settings.get("dataset_name"),)
        if word is not None and str(word).startswith("path/to/") and not is_finished(stage, plan)
    }
    if missing:
        raise ValueError(
            f"the data sets {', '.join(sorted(missing))} are not on the Hub: say where yours are, "
            f"{' '.join(f'--data {name}=PATH' for name in sorted(missing))}"
        )


def _check_idle(stage: Stage, plan: Plan) -> None:
    state = _read_state(stage, plan)
    if state.get("status") == "running" and state.get("created") == _created(state["pid"]):
        raise ValueError(f"{stage.name} is running as process {state['pid']}: wait for it, or end it first")


def _created(pid: int) -> float | None:
    """When a process began; `None` for one that is not there, or has ended and nobody has asked for its status."""
    try:
        process = psutil.Process(pid)
        return process.create_time() if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _state_file(stage: Stage, plan: Plan) -> Path:
    return Path(plan.output_dir, _STATE, f"{stage.name.replace('/', '--')}.json")


def _read_state(stage: Stage, plan: Plan) -> dict[str, Any]:
    try:
        return json.loads(_state_file(stage, plan).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _write_state(stage: Stage, plan: Plan, state: dict[str, Any]) -> None:
    file = _state_file(stage, plan)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)


@contextmanager
def _stopped_together() -> Iterator[None]:
    """A request to end this process ends the stage that runs, too."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
