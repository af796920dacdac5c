"""What the reports of finished rows say, beside what was published: figures, gap, and the budget behind them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_robust.evaluation.report import write_text
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.running import is_finished
from hf_robust.reproduction.stages import Plan, Stage, row_stages
from hf_robust.reproduction.tables import Row, Table, load_dataset

__all__ = [
    "Result",
    "collect_row",
    "collected_table",
    "markdown_table",
    "read_collection",
    "row_hours",
    "run_command",
    "write_collection",
]

NOT_RUN = "not run"
_HEADINGS = {
    "accuracy": "standard",
    "autoattack_linf_8_255_accuracy": "AutoAttack",
    "pgd20_linf_8_255_accuracy": "PGD-20",
}


@dataclass(frozen=True)
class Result:
    """What a run of ours found in a row.

    Args:
        table, row (`str`): names.
        metrics (`dict[str, float]`): accuracies in [0, 1].
        intervals (`dict[str, list[float]]`): 95 %, for the draw of the images.
        gap (`dict[str, float]`): ours minus published; empty for a smoke test and where nothing is published.
        n (`int`): images that were judged.
        seeds (`dict[str, int]`): of every stage.
        epochs (`float`): of the pre-training.
        hours (`float`): of all stages, as their reports measured them.
        hardware (`str`), commit (`str`): of the stages; several where they differ.
        commands (`list[str]`): of the stages.
        date (`str`): of the evaluation.
        smoke (`bool`): a test of the commands on the digits, whose figures mean nothing.
    """

    table: str
    row: str
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    gap: dict[str, float]
    n: int
    seeds: dict[str, int]
    epochs: float
    hours: float
    hardware: str
    commit: str
    commands: list[str] = field(default_factory=list)
    date: str | None = None
    smoke: bool = False


def collect_row(row: Row, plan: Plan) -> Result | None:
    """Read what the stages of a row have reported.

    Args:
        row ([`Row`]): of a table.
        plan ([`Plan`]): where and how it was run.

    Returns:
        [`Result`] or `None`: for a row that was not run, or not to its end.

    Raises:
        ValueError: if a folder holds the run of another command.
    """
    stages = row_stages(row, plan)
    if not all(is_finished(stage, plan) for stage in stages):
        return None
    reports = {stage.name: _report(stage) for stage in stages}
    first, last = reports[stages[0].name], reports[stages[-1].name]
    metrics = {name: float(value) for name, value in last["metrics"].items()}
    common = {} if plan.smoke else {name: row.figures[name] for name in row.figures if name in metrics}
    trainings = [report["training"] for report in reports.values() if "training" in report]
    seconds = sum(float(facts.get("seconds") or 0) for facts in trainings) + sum(last["seconds"].values())
    return Result(
        table=row.table,
        row=row.name,
        metrics=metrics,
        intervals=last["intervals"],
        gap={name: metrics[name] - published for name, published in common.items()},
        n=last["n"],
        seeds={name: (report.get("training") or report)["seed"] for name, report in reports.items()},
        epochs=float(first["training"]["epochs"]),
        hours=seconds / 3600,
        hardware=_all(map(_machine, reports.values())),
        commit=_all(report.get("commit") for report in reports.values()),
        commands=[report["command"] for report in reports.values()],
        date=last.get("date"),
        smoke=plan.smoke,
    )


def row_hours(row: Row, plan: Plan, rate: Rate) -> tuple[float, float]:
    """Predicted hours of a row that is run alone.

    Args:
        row ([`Row`]): of a table.
        plan ([`Plan`]): where and how.
        rate ([`Rate`]): how fast.

    Returns:
        `tuple[float, float]`: of the encoder, which other rows share; of fine-tuning and evaluation.
    """
    hours = [rate.hours(stage.work) for stage in row_stages(row, plan)]
    return sum(hours[:-2]), sum(hours[-2:])


def run_command(table: Table, row: Row | None = None) -> str:
    """The command that reproduces a row, or the whole table; `PATH` is for the user to fill in.

    Args:
        table ([`Table`]): the table.
        row ([`Row`], *optional*): one of its rows; default: all.
    """
    rows = table.rows if row is None else (row,)
    keys = dict.fromkeys(key for each in rows for key in (each.network.dataset, each.target))
    places = [f"{key}=PATH" for key in keys if load_dataset(key).is_missing]
    only, data = [f"--only {row.name}"] if row else [], ["--data", *places] if places else []
    return " ".join(["hf-robust reproduce", table.name, *only, "--run", *data])


def markdown_table(
    table: Table, rows: Sequence[Row], results: Mapping[str, Result], plan: Plan, rate: Rate, *, commands: bool
) -> list[str]:
    """Lines of the table: published, ours, gap, budget.

    Args:
        table ([`Table`]): of the rows.
        rows (`Sequence[Row]`): in order.
        results (`Mapping[str, Result]`): by name of the row; rows without one say "not run".
        plan ([`Plan`]): of the predicted hours.
        rate ([`Rate`]): likewise.
        commands (`bool`): with the command that reproduces the row.
    """
    names = " / ".join(_HEADINGS[name] for name in table.columns)
    headings = ["row", f"published, {names} (%)", "ours (%)", "gap", "ours: budget", "predicted hours"]
    headings += ["reproduce it by"] if commands else []
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    for row in rows:
        found, (encoder, rest) = results.get(row.name), row_hours(row, plan, rate)
        cells = [f"`{row.name}`", _published(row), NOT_RUN, "", "", f"{_short(encoder)} + {_short(rest)}"]
        if found is not None:
            cells[2:5] = [_ours(found, table.columns), _gap(found, table.columns), _budget(found)]
        cells += [f"`{run_command(table, row)}`"] if commands else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def collected_table(
    table: Table, rows: Sequence[Row], plan: Plan, rate: Rate, broken: Collection[str] = ()
) -> tuple[list[str], list[Result]]:
    """Lines for people, and the results behind them.

    Rows that were collected into the output folder before, and are not asked for now, stay.

    Args:
        table ([`Table`]): of the rows.
        rows (`Sequence[Row]`): to be collected.
        plan ([`Plan`]): where they were run.
        rate ([`Rate`]): of the predicted hours.
        broken (`Collection[str]`): rows that have just failed: not looked at.
    """
    asked = {row.name for row in rows}
    before = read_collection(plan.output_dir, table)
    found = {name: result for name, result in before.items() if name not in asked and result.smoke == plan.smoke}
    looked_at = [row for row in rows if row.name not in broken]
    found |= {row.name: result for row in looked_at if (result := collect_row(row, plan)) is not None}
    shown = [row for row in table.rows if row.name in asked or row.name in found]
    lines = [f"## {table.title}", "", *markdown_table(table, shown, found, plan, rate, commands=False), ""]
    lines += [f"Predicted hours (encoder + fine-tuning and evaluation): {rate.told}."]
    if plan.smoke:
        lines += ["", "A smoke test on a few digits: it shows that the commands work, its figures mean nothing."]
    return lines, [found[row.name] for row in shown if row.name in found]


def read_collection(folder: str | Path, table: Table) -> dict[str, Result]:
    """Read what [`write_collection`] has written.

    Args:
        folder (`str` or `Path`): holds `TABLE.json`, or not.
        table ([`Table`]): the table.

    Returns:
        `dict[str, Result]`: by row.

    Raises:
        ValueError: for another file, or a row that the table does not have.
    """
    file = Path(folder, f"{table.name}.json")
    try:
        found = [Result(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not a file of results ({error}): remove it, and collect again") from None
    known = {row.name for row in table.rows}
    for result in found:
        if result.row not in known:
            raise ValueError(f"{result.row!r} in {str(file)!r} is no row of {table.name}: remove the entry")
    return {result.row: result for result in found}


def write_collection(table: Table, lines: Sequence[str], results: Sequence[Result], folder: str | Path) -> list[Path]:
    """Write what was collected.

    Args:
        table ([`Table`]): its name is that of the files.
        lines (`Sequence[str]`): of [`collected_table`].
        results (`Sequence[Result]`): likewise.
        folder (`str` or `Path`): made when missing.

    Returns:
        `list[Path]`: `TABLE.md` and `TABLE.json`.
    """
    data = json.dumps([asdict(result) for result in results], indent=1)
    return [
        write_text(Path(folder, f"{table.name}.md"), "\n".join(lines) + "\n"),
        write_text(Path(folder, f"{table.name}.json"), data + "\n"),
    ]


def _report(stage: Stage) -> dict[str, Any]:
    return json.loads(Path(stage.folder, "report.json").read_text(encoding="utf-8"))


def _machine(report: Mapping[str, Any]) -> str | None:
    """What a stage ran on: as many GPUs as it had processes, not as many as the machine has."""
    hardware = report.get("hardware") or {}
    if "gpu" in hardware:
        return f"{report.get('training', {}).get('processes', 1)} x {hardware['gpu']}"
    return f"{hardware.get('cores', '?')} cores, {hardware['cpu']}" if "cpu" in hardware else None


def _all(texts: Any) -> str:
    return ", ".join(dict.fromkeys(text or "unknown" for text in texts))


def _percent(values: Mapping[str, float], columns: Sequence[str]) -> str:
    return " / ".join(f"{100 * values[name]:.2f}" if name in values else "–" for name in columns)


def _published(row: Row) -> str:
    several = len(row.published) > 1
    cells = [_percent(p.metrics, row.columns) + (f" ({p.origin})" if several else "") for p in row.published]
    hours = f"; {row.published_hours:g} h" if row.published_hours else ""
    return (", ".join(cells) or "no numbers") + hours


def _ours(found: Result, columns: Sequence[str]) -> str:
    shown = _percent(found.metrics, columns)
    interval = found.intervals.get(columns[-1])
    return shown + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _gap(found: Result, columns: Sequence[str]) -> str:
    if not found.gap:
        return ""
    return " / ".join(f"{100 * found.gap[name]:+.2f}" if name in found.gap else "–" for name in columns)


def _budget(found: Result) -> str:
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(found.seeds.values()))
    commits = ", ".join(commit[:7] + commit[40:] for commit in found.commit.split(", "))
    smoke = "smoke test, " if found.smoke else ""
    return (
        f"{smoke}{found.epochs:g} epochs, {found.hours:.2g} h, {found.hardware}, commit {commits}, n = {found.n}, "
        f"seeds {seeds}"
    )


def _short(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"
