"""The tables of docs/reproduction.md, written from the published tables and from what was reproduced.

    python docs/site/reproduction_tables.py

rewrites what stands between `<!-- reproduction -->` and `<!-- end -->`. Results are the files that `hf-robust
reproduce TABLE --run` or `--collect` writes, copied to `docs/reproduced/TABLE.json`; rows without one say "not run". A
test fails when the page is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.results import Result, markdown_table, read_collection, run_command
from hf_robust.reproduction.stages import Plan, row_stages, unique_stages
from hf_robust.reproduction.tables import Table, load_table, table_names

DOCS = Path(__file__).resolve().parents[1]
PAGE, RESULTS = DOCS / "reproduction.md", DOCS / "reproduced"
_PART = re.compile(r"<!-- reproduction -->\n.*?<!-- end -->", flags=re.DOTALL)


def load_results(folder: Path, table: Table) -> dict[str, Result]:
    """Results of a table by row.

    Args:
        folder (`Path`): holds `TABLE.json`, or not.
        table ([`Table`]): the table.

    Raises:
        ValueError: for a smoke test, whose figures mean nothing, or a row that the table does not have.
    """
    found = read_collection(folder, table)
    for result in found.values():
        if result.smoke:
            raise ValueError(
                f"{result.row!r} in {table.name}.json is of a smoke test: copy the file of a full run there"
            )
    return found


def section(table: Table, results: dict[str, Result], rate: Rate) -> list[str]:
    """Lines of one table: what differs, the rows, and what is known about single ones.

    Args:
        table ([`Table`]): the table.
        results (`dict[str, Result]`): by row.
        rate ([`Rate`]): of the predicted hours.
    """
    plan = Plan()
    hours = sum(rate.hours(stage.work) for stage in unique_stages(table.rows, plan))
    lines = [
        f"### {table.title}",
        "",
        f"All rows: `{run_command(table)}`, predicted {hours:.1f} hours.",
    ]
    lines += ["", *(f"- {note}" for note in table.notes), ""]
    lines += markdown_table(table, table.rows, results, plan, rate, commands=True)
    remarks: dict[str, list[str]] = {}
    for row in table.rows:
        told = [*row.notes, *(stage.note for stage in row_stages(row, plan)), *(p.note for p in row.published)]
        for text in dict.fromkeys(filter(None, told)):
            remarks.setdefault(text, []).append(f"`{row.name}`")
    return [
        *lines,
        "",
        *(f"- {', '.join(rows)}: {text}" for text, rows in remarks.items()),
        *([""] if remarks else []),
    ]


def rewritten(text: str, folder: Path = RESULTS) -> str:
    """The page with its tables as they are now.

    Args:
        text (`str`): Markdown.
        folder (`Path`): of the results.
    """
    rate = Rate.assumed()
    lines = [
        f"Hours are predictions (encoder, which rows share, + fine-tuning and evaluation), {rate.told}.",
        "Accuracies in percent; the interval is the 95 % interval of the last column.",
        "",
    ]
    for name in table_names():
        table = load_table(name)
        lines += section(table, load_results(folder, table), rate)
    return _PART.sub(lambda _: "\n".join(["<!-- reproduction -->", "", *lines, "<!-- end -->"]), text)


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = rewritten(before)
    PAGE.write_text(after, encoding="utf-8")
    sys.stdout.write("unchanged\n" if before == after else "rewritten\n")
