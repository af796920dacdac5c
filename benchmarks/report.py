"""Results as a table, a JSON file and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_robust.evaluation.environment import collect_environment
from hf_robust.evaluation.picture_style import COLOURS, INK, MUTED, picture_style, save_picture

__all__ = ["plot", "table", "write_json"]

# name in a result, heading, how it is written; the last columns only where some result has them
_COLUMNS = (
    ("ratio", "ratio", "{:.2f}"),
    ("ratio_min", "min", "{:.2f}"),
    ("ratio_max", "max", "{:.2f}"),
    ("cpu_ratio", "cpu", "{:.2f}"),
    ("seconds", "seconds", "{:.4g}"),
    ("images_per_second", "images/s", "{:.4g}"),
    ("flop_ratio", "fewer FLOP", "{:.2f}"),
    ("utilisation", "of GEMM", "{:.0%}"),
    ("peak_ratio", "memory", "{:.2f}"),
    ("identical_to_pil", "as PIL", "{:.2%}"),
    ("overlap", "overlap", "{:.0%}"),
    ("efficiency", "efficiency", "{:.0%}"),
    ("synchronises", "waits", "{}"),
    ("others_share", "others", "{:.0%}"),
    ("disturbed", "disturbed", "{}"),
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in columns; a cell is empty where a number is unknown.

    Args:
        results (`Sequence[dict]`): of the benchmarks.
    """
    columns = [c for c in _COLUMNS if any(result.get(c[0]) is not None for result in results)]
    rows = [["measurement", *(heading for _, heading, _ in columns)]]
    for result in results:
        cells = [form.format(result[key]) if result.get(key) is not None else "" for key, _, form in columns]
        rows.append([result["name"], *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: Path, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write results, settings, versions, hardware and commit.

    Args:
        path (`Path`): the file.
        results (`Sequence[dict]`): of the benchmarks.
        settings (`dict`): of the run.
    """
    document = {"results": list(results), "settings": settings, "environment": collect_environment()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, default=str))


def plot(path: Path, results: Sequence[dict[str, Any]], title: str = "") -> None:
    """Draw the ratios to a published step as bars from 1, with smallest and largest round.

    What is a share of something else (`ratio_of`) is not drawn.

    Args:
        path (`Path`): the picture.
        results (`Sequence[dict]`): of the benchmarks.
        title (`str`): what it was measured on.
    """
    from matplotlib.figure import Figure

    drawn = [result for result in results if "ratio_of" not in result][::-1]
    with picture_style():
        figure = Figure(figsize=(8, 1.6 + 0.38 * max(1, len(drawn))), layout="constrained")
        axes = figure.subplots()
        groups = list(dict.fromkeys(result["name"].split("/")[0] for result in results if "ratio_of" not in result))
        for row, result in enumerate(drawn):
            middle, low, high = result["ratio"], result["ratio_min"], result["ratio_max"]
            colour = COLOURS[groups.index(result["name"].split("/")[0]) % len(COLOURS)]
            axes.barh(row, middle - 1, left=1, height=0.62, color=colour, alpha=0.8)
            axes.plot([low, high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=8)
            mark = " *" if result.get("disturbed") else ""
            axes.annotate(
                f"{middle:.2f}{mark}", (max(high, middle, 1), row), (6, 0), textcoords="offset points", va="center"
            )
        axes.axvline(1, color=MUTED, linewidth=1)
        marked = [result.get("disturbed") for result in drawn]
        axes.set_yticks(range(len(drawn)), [result["name"] for result in drawn])
        axes.grid(False, axis="y")
        values = [v for result in drawn for v in (result["ratio_min"], result["ratio_max"], 1.0)] or [1.0]
        if max(values) > 20:
            axes.set_xscale("log")
            axes.set_xlim(min(values) / 1.3, max(values) * 2)
        else:
            axes.set_xlim(math.floor(min(values) * 2) / 2 - 0.25, max(values) * 1.15 + 0.3)
        note = "\n* other processes used more than a tenth of the machine" if any(marked) else ""
        axes.set_xlabel(f"times faster than the published step: median, smallest and largest round{note}")
        axes.set_title(title)
        save_picture(figure, path)
