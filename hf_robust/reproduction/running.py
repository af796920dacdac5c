"""Stages run one after another as processes of their own: what is finished is kept, what was stopped goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import hf_robust
from hf_robust.checkpoints import latest_complete
from hf_robust.evaluation.environment import redact
from hf_robust.evaluation.report import write_text
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.stages import LastCheckpoint, Plan, Stage, flags_by_name, row_stages, unique_stages
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
        ValueError: before anything runs, where a data set is not named or not there, the output folder cannot be
            written to, a folder holds the run of another command, or a stage is already running.
    """
    stages, failed = unique_stages(rows, plan), dict[str, str]()
    _check_data(stages, plan)
    _check_folder(plan)
    for stage in stages:
        _check_idle(stage, plan)
        is_finished(stage, plan)
    with _stopped_together(tell):
        for number, stage in enumerate(stages, start=1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            broken = next((name for name in stage.needs if name in failed), None)
            if broken is not None:
                failed[stage.name] = f"waits for {broken}"
                tell(f"{head}: left out, {broken} failed")
                continue
            problem = _run_unless_finished(stage, plan, rate, head, tell)
            failed |= {stage.name: problem} if problem else {}
    for row in rows:
        broken = next((stage.name for stage in row_stages(row, plan) if stage.name in failed), None)
        if broken is not None:
            tell(f"row {row.name} was not reproduced: {broken} ({failed[broken]})")
    return failed


def _run_unless_finished(stage: Stage, plan: Plan, rate: Rate, head: str, tell: Callable[[str], None]) -> str:
    """What went wrong, if anything did."""
    try:  # again: hours may have passed, and another process may share the folder
        _check_idle(stage, plan)
        finished = is_finished(stage, plan)
    except ValueError as error:
        tell(f"{head}: left out, {error}")
        return str(error)
    if finished:
        tell(f"{head}: finished before")
        return ""
    told = "" if plan.smoke else f", predicted {rate.hours(stage.work):.2g} hours"
    tell(f"{head}: {stage.command}{told}\n{shlex.join(command_of(stage, plan))}")
    seconds, problem = _run(stage, plan)
    tell(f"{head}: {problem or 'finished'} after {seconds:.0f} seconds")
    return problem


def command_of(stage: Stage, plan: Plan) -> list[str]:
    """The process of a stage, with what it has to be told to go on where it was stopped.

    Args:
        stage ([`Stage`]): what it needs is finished.
        plan ([`Plan`]): where and how.
    """
    words = [_resolved(word) for word in stage.arguments]
    resume = _RESUME if stage.command != "evaluate" and _has_begun(stage) else []
    return [sys.executable, "-m", "hf_robust.commands", stage.command, *words, *resume]


def is_finished(stage: Stage, plan: Plan) -> bool:
    """Whether a stage has ended well.

    Args:
        stage ([`Stage`]): of a row.
        plan ([`Plan`]): where and how.

    Raises:
        ValueError: if its folder holds what another command has left, or what was made from an earlier run of a stage
            that it needs; if the entry in `state/` cannot be read.
    """
    folder, state = Path(stage.folder), _read_state(stage, plan)
    made = all((folder / name).is_file() for name in stage.makes)
    if not made and not _has_begun(stage):
        return False
    if state.get("stands_on", now := _stands_on(stage, plan)) != now:
        raise ValueError(
            f"{stage.folder!r} was made from an earlier run of {', '.join(stage.needs)}: remove that folder, or give "
            "another --output_dir"
        )
    left = state["arguments"] if state else _flags_in_report(folder)
    wanted = _told(stage, plan) if state else _as_reported(shlex.join(map(_resolved, stage.arguments)))
    if left == wanted:
        return made and state.get("status", "finished") == "finished"
    if stage.command == "evaluate" and not made:
        return False
    raise ValueError(
        f"{stage.folder!r} holds a run of other flags than this one would have ({_differences(left, wanted)}): give "
        "the flags of that run again, or another --output_dir, or remove that folder"
    )


def _told(stage: Stage, plan: Plan) -> list[str]:
    """The flags, the same wherever the output folder is moved to."""
    return [word.removeprefix(f"{plan.output_dir}/") for word in stage.words]


def _stands_on(stage: Stage, plan: Plan) -> dict[str, float | None]:
    """When the stages that it needs ended; `None` where they were run by hand."""
    return {name: _read_state(name, plan).get("ended") for name in stage.needs}


def _flags_in_report(folder: Path) -> list[str]:
    """Flags of a command that was run by hand; none where no report is left."""
    file = folder / "report.json"
    words = shlex.split((_read_json(file) if file.is_file() else {}).get("command") or "")
    start = next((k + 1 for k, word in enumerate(words) if word in ("pretrain", "finetune", "evaluate")), len(words))
    return _as_reported(shlex.join(words[start:]).replace(" ".join(_RESUME), ""))


def _as_reported(command: str) -> list[str]:
    """Words of a command as reports have it: without home folders."""
    return shlex.split(redact(command))


def _differences(left: Sequence[str], wanted: Sequence[str]) -> str:
    if not left:
        return "which are not known"
    before, now = flags_by_name(left), flags_by_name(wanted)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [
        f"--{name} {shlex.join(before.get(name, ['unset']))}, now {shlex.join(now.get(name, ['unset']))}"
        for name in names
    ]
    return "; ".join([*told[:3], *([f"and {len(told) - 3} more"] if told[3:] else [])]) or "in another order"


def _resolved(word: str | LastCheckpoint) -> str:
    if isinstance(word, LastCheckpoint):
        return latest_complete(word.folder) or str(word)
    inside = Path(hf_robust.__file__).parents[1] / word
    return str(inside) if word.startswith("examples/") and not Path(word).is_file() and inside.is_file() else word


def _has_begun(stage: Stage) -> bool:
    """Whether something is left that a second start would go on from."""
    folder = Path(stage.folder)
    if stage.command == "evaluate":
        return folder.is_dir() and any(folder.iterdir())
    return bool(
        latest_complete(folder) or latest_complete(folder / "probe") or (folder / "pseudo_labels.json").exists()
    )


def _run(stage: Stage, plan: Plan) -> tuple[float, str]:
    """Seconds, and what went wrong, if anything did."""
    state, start = _read_state(stage, plan), time.monotonic()
    facts = {
        "arguments": _told(stage, plan),
        "stands_on": _stands_on(stage, plan),
        "starts": state.get("starts", 0) + 1,
    }
    before = state.get("seconds", 0.0) if state.get("arguments") == facts["arguments"] else 0.0
    _write_state(stage, plan, {**facts, **_running(os.getpid()), "seconds": before})  # taken, before it begins
    with subprocess.Popen(command_of(stage, plan)) as process:
        try:
            _write_state(stage, plan, {**facts, **_running(process.pid), "seconds": before})
            status = process.wait()
        except BaseException:  # what is stopped here is stopped there; whole checkpoints stay
            process.terminate()
            process.wait()
            _write_state(stage, plan, {**facts, "status": "stopped", "seconds": before + time.monotonic() - start})
            raise
    seconds = time.monotonic() - start
    missing = [name for name in stage.makes if not (Path(stage.folder) / name).is_file()]
    problem = f"failed with exit status {status}" if status else ""
    problem = problem or (f"ended without writing {', '.join(missing)}" if missing else "")
    ended = {"status": "failed" if problem else "finished", "problem": problem, "seconds": before + seconds}
    _write_state(stage, plan, {**facts, **ended, "ended": time.time()})
    return seconds, problem


def _check_data(stages: Sequence[Stage], plan: Plan) -> None:
    names = {str(stage.settings["dataset_name"]) for stage in stages if not is_finished(stage, plan)}
    unnamed = sorted(name.removeprefix("path/to/") for name in names if name.startswith("path/to/"))
    if unnamed:
        raise ValueError(
            f"the data sets {', '.join(unnamed)} are not on the Hub: say where yours are, "
            f"--data {' '.join(f'{name}=PATH' for name in unnamed)}"
        )
    # An id of the Hub has one slash; what has more, or begins like a path, is one.
    absent = [name for name in sorted(names) if name.startswith(("/", ".", "~")) or name.count("/") > 1]
    absent = [name for name in absent if not Path(name).exists()]
    if absent:
        raise ValueError(f"no data set at {', '.join(map(repr, absent))}: correct --data")


def _check_folder(plan: Plan) -> None:
    folder = Path(plan.output_dir, _STATE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {plan.output_dir!r} ({error.strerror}): give another --output_dir"
        ) from None


def _check_idle(stage: Stage, plan: Plan) -> None:
    state = _read_state(stage, plan)
    if state.get("status") == "running" and state.get("created") == _created(state["pid"]):
        raise ValueError(f"{stage.name} is running as process {state['pid']}: wait for it, or end it first")


def _running(pid: int) -> dict[str, Any]:
    return {"status": "running", "pid": pid, "created": _created(pid)}


def _created(pid: int) -> float | None:
    """When a process began; `None` for one that is not there, or has ended and nobody has asked for its status."""
    try:
        process = psutil.Process(pid)
        return process.create_time() if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _state_file(name: str, plan: Plan) -> Path:
    return Path(plan.output_dir, _STATE, f"{name.replace('/', '--')}.json")


def _read_state(stage: Stage | str, plan: Plan) -> dict[str, Any]:
    file = _state_file(stage if isinstance(stage, str) else stage.name, plan)
    return _read_json(file) if file.is_file() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {str(file)!r} ({error}): it is damaged, remove it") from None


def _write_state(stage: Stage, plan: Plan, state: dict[str, Any]) -> None:
    write_text(_state_file(stage.name, plan), json.dumps(state, indent=1) + "\n")


@contextmanager
def _stopped_together(tell: Callable[[str], None]) -> Iterator[None]:
    """A request to end this process ends the stage that runs, too."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        tell("stopped. What was finished is kept: the same command goes on there.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
