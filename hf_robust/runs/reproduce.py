"""The run behind `hf-robust reproduce`: published tables row by row, as commands, as a run, as a table of results."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from hf_robust.reproduce_cli import ReproduceRun, parse_reproduce
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.results import collected_table, markdown_table, row_hours, write_collection
from hf_robust.reproduction.running import run_rows
from hf_robust.reproduction.stages import Plan, row_stages, unique_stages
from hf_robust.reproduction.tables import Table, load_table, table_names
from hf_robust.runs.console import tell

__all__ = ["main"]


def list_tables(plan: Plan, rate: Rate) -> None:
    """Every table with its rows counted and its hours predicted."""
    tell("tables (hf-robust reproduce TABLE prints rows and commands; --run runs them):\n")
    for name in table_names():
        table = load_table(name)
        hours = sum(rate.hours(stage.work) for stage in unique_stages(table.rows, plan))
        tell(f"  {name:<22}{len(table.rows):>3} rows, predicted {hours:6.1f} h   {table.title}")
    tell(f"\nPredicted hours: {rate.told}. Tables share encoders, so that all of them take less than the sum.")


def print_commands(run: ReproduceRun, table: Table, rate: Rate) -> None:
    """Rows, published figures, predicted hours, notes; then the commands, each once."""
    tell("\n".join([table.title, "", *markdown_table(table, run.rows, {}, run.plan, rate, commands=False), ""]))
    for note in [*table.notes, *dict.fromkeys(note for row in run.rows for note in row.notes)]:
        tell(f"# {note}")
    tell("\n# Commands, from the root of a clone. What several rows need stands with the first of them.")
    stages = unique_stages(run.rows, run.plan)
    names = {str(stage.settings["dataset_name"]) for stage in stages}
    for name in sorted(name.removeprefix("path/to/") for name in names if name.startswith("path/to/")):
        tell(f"# path/to/{name}, also where a configuration says so, is for you to fill in: --data {name}=PATH does.")
    printed: set[str] = set()
    for row in run.rows:
        encoder, rest = row_hours(row, run.plan, rate)
        remarks = [stage.note for stage in row_stages(row, run.plan) if stage.note]
        remarks += [p.note for p in row.published if p.note]
        tell(f"\n# {row.name}: predicted {encoder:.2g} hours for the encoder, {rest:.2g} for the rest")
        for remark in dict.fromkeys(remarks):
            tell(f"# {remark}")
        for stage in row_stages(row, run.plan):
            if stage.name not in printed:
                tell(stage.shell)
            printed.add(stage.name)
    total = sum(rate.hours(stage.work) for stage in stages)
    tell(f"\n# {len(printed)} commands, predicted {total:.1f} hours ({rate.told}).")
    tell("# --run runs them and goes on where it was stopped; --smoke --run tries them on the digits first.")


def collect(run: ReproduceRun, table: Table, rate: Rate, failed: Collection[str]) -> None:
    """Print and write what is there, rows of failed stages left out."""
    broken = {row.name for row in run.rows if any(stage.name in failed for stage in row_stages(row, run.plan))}
    lines, results = collected_table(table, run.rows, run.plan, rate, broken)
    files = write_collection(table, lines, results, run.plan.output_dir)
    tell("\n" + "\n".join(lines))
    done = {result.row for result in results} & {row.name for row in run.rows}
    tell(f"\n{len(done)} of {len(run.rows)} rows; {', '.join(map(str, files))}")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> None:
    """List, print, run or collect.

    Args:
        argv (`Sequence[str]`, *optional*): flags; default: those of the process.
        prog (`str`, *optional*): name of the command in messages.
        description (`str`, *optional*): first lines of `--help`.
    """
    run = parse_reproduce(argv, prog=prog, description=description)
    rate = run.rate
    if run.table is None:
        return list_tables(run.plan, rate)
    failed = run_rows(run.rows, run.plan, rate, tell) if run.run else {}
    if run.run or run.collect:
        collect(run, run.table, rate, failed)
    else:
        print_commands(run, run.table, rate)
    if failed:
        sys.exit(f"error: {len(failed)} stages failed or wait for one that did: {', '.join(failed)}")


if __name__ == "__main__":
    from hf_robust.runs.console import run_or_exit

    run_or_exit(main, prog="python -m hf_robust.runs.reproduce", description=__doc__)
