"""The look of all pictures: colours, lines, type, and how a figure becomes a file.

Matplotlib is used through its object API with the Agg backend: no window, no global figure state.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "GRID", "INK", "MUTED", "STYLES", "picture_style", "save_picture"]

INK, MUTED, GRID = "#1f2933", "#67727e", "#e3e7ec"
# Okabe and Ito's colours: also told apart by colour-blind readers; yellow is left out, it vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))  # five loss terms at most


@contextlib.contextmanager
def picture_style() -> Iterator[None]:
    """Our look, independent of the user's settings, which come back afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.dpi": 150,
                "savefig.dpi": 150,
                "figure.facecolor": "white",
                "figure.constrained_layout.w_pad": 0.12,
                "figure.constrained_layout.h_pad": 0.10,
                "font.size": 10.5,
                "axes.titlesize": 11.5,
                "axes.titleweight": "bold",
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": GRID,
                "text.color": INK,
                "text.parse_math": False,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "lines.linewidth": 1.9,
                "lines.markersize": 4.0,
                "legend.frameon": False,
                "legend.fontsize": 9.5,
            }
        )
        yield


def save_picture(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; its folder is made when missing.

    Args:
        figure (`matplotlib.figure.Figure`): drawn under `picture_style`.
        path (`str` or `PathLike`): the ending chooses the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
