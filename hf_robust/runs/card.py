"""The run behind `hf-robust card`: model cards written anew from their reports, or compared with them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_robust.card_cli import parse_card
from hf_robust.evaluation.report import REPORT_FILE, EncoderReport
from hf_robust.model_card import CARD_FILE, model_card_text, write_model_card
from hf_robust.model_card_metadata import EVAL_FOLDER, eval_result_files
from hf_robust.runs.console import tell

__all__ = ["main", "read_report", "stale_files"]


def read_report(folder: str | Path) -> EncoderReport:
    """The report beside an encoder, a classifier or an adapter.

    Args:
        folder (`str` or `Path`): the folder.

    Returns:
        [`EncoderReport`]: what its card is written from.

    Raises:
        ValueError: when there is no such report; the message says where one is.
    """
    folder = Path(folder).expanduser()
    file = folder / REPORT_FILE
    if not file.is_file():
        inner = [name for name in ("encoder", "classifier", "adapter") if (folder / name / REPORT_FILE).is_file()]
        hint = f"pass {str(folder / inner[0])!r}" if inner else "pass the folder of an encoder of hf_robust"
        raise ValueError(f"no {REPORT_FILE} in {str(folder)!r}, and a card is written from nothing else: {hint}")
    values = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size else None
    if isinstance(values, dict) and "kind" in values:
        raise ValueError(
            f"{str(file)!r} is the report of an evaluation: pass the folder of the model, after "
            "hf-robust evaluate --model DIR --update_card true has put the figures there"
        )
    return EncoderReport.load(folder)


def stale_files(report: EncoderReport, folder: str | Path) -> list[str]:
    """Names of the generated files that are not byte for byte what the report gives.

    Args:
        report ([`EncoderReport`]): as read from the folder.
        folder (`str` or `Path`): the folder of the card; nothing in it is changed.

    Returns:
        `list[str]`: empty when the card is up to date.
    """
    folder = Path(folder).expanduser()
    wanted = {CARD_FILE: model_card_text(report, folder)}
    wanted |= {f"{EVAL_FOLDER}/{name}": text for name, text in eval_result_files(report).items()}
    return [
        name
        for name, text in wanted.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode("utf-8")
    ]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> None:
    """Write or check the cards of some folders.

    Args:
        argv (`Sequence[str]`, *optional*): folders and flags; default: those of the process.
        prog (`str`, *optional*): name of the command in messages.
        description (`str`, *optional*): first lines of `--help`.
    """
    options = parse_card(argv, prog=prog, description=description)
    changes: dict[str, Any] = {key: getattr(options, key) for key in ("license", "hub_id")}
    changes = {key: value for key, value in changes.items() if value is not None}
    stale = []
    for folder in options.folders:
        report = read_report(folder)
        if options.check:
            found = stale_files(report, folder)
            stale += [f"{folder}/{name}" for name in found]
            tell(f"{folder}: {'not what its report gives: ' + ', '.join(found) if found else 'up to date'}")
            continue
        if changes:
            report = dataclasses.replace(report, **changes)
        write_model_card(report, Path(folder).expanduser())  # first: it refuses what cannot be published
        if changes:
            report.save(Path(folder).expanduser())
        tell(f"{folder}: {CARD_FILE} written from {REPORT_FILE}")
    if stale:
        sys.exit(f"error: {', '.join(stale)}: run the command without --check")


if __name__ == "__main__":
    from hf_robust.runs.console import run_or_exit

    run_or_exit(main, prog="python -m hf_robust.runs.card", description=__doc__)
