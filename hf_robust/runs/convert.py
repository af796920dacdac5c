"""The run behind `hf-robust convert`: the file of somebody else becomes a folder that transformers loads."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_robust.convert_cli import parse_convert
from hf_robust.converters import convert
from hf_robust.evaluation.environment import command_line
from hf_robust.runs.console import tell

__all__ = ["main"]


def main(argv: list[str] | None = None, **parsing: Any) -> None:
    """Convert, and say how the file was read and what was left out.

    Args:
        argv (`list[str]`, *optional*): flags; default: those of the process.
        parsing (`Any`): passed on to [`parse_convert`].
    """
    run = parse_convert(argv, **parsing)
    flags = {key: value for key, value in dataclasses.asdict(run.settings).items() if key != "output_dir"}
    done = convert(run.file, run.folder, **flags, command=command_line())
    conversion, classes = done.conversion, len(done.report.label_names)
    tell(f"{run.file}: format {done.format} ({done.why})")
    for note in conversion.notes:
        tell(f"  {note}")
    arguments = f" {conversion.model_args}" if conversion.model_args else ""
    normalization = f"mean {conversion.mean}, std {conversion.std}" if conversion.mean else "none"
    what = f"classifier of {classes} classes" if classes else "encoder"
    tell(
        f"{conversion.architecture}{arguments}, {what}, norm branch {conversion.branch}, images of "
        f"{conversion.image_size} pixels, input normalisation: {normalization}"
    )
    tell(f"Output folder: {done.folder}")
    tell("The weights are the work of the file's authors: their licence holds, and nothing was measured yet.")
