"""What the studies share: a list of cells that processes share and a killed study goes on with, and their statistics.

A cell is one run of a study. `FOLDER/cells/NAME.json` says that it is finished and what it found, `NAME.lock` that a
process is at it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

__all__ = [
    "Named",
    "claim",
    "finished",
    "flags",
    "is_finished",
    "is_running",
    "load_records",
    "mean_and_spread",
    "work_through",
]

_PAUSE = 5.0  # seconds between looks at what other processes have finished


class Named(Protocol):
    """A cell, as far as the list is concerned."""

    @property
    def name(self) -> str:
        """Also its file name."""
        ...


CellType = TypeVar("CellType", bound=Named)


def work_through(
    cells: Iterable[CellType],
    run_cell: Callable[[CellType], dict[str, Any]],
    folder: Path,
    *,
    only: str | None = None,
    needs: Callable[[CellType], str | None] = lambda cell: None,
) -> None:
    """Run the cells that no file and no other process has, in their order, and write down what each found.

    Args:
        cells (`Iterable`): the whole list.
        run_cell (`Callable`): a cell to its record.
        folder (`Path`): of the study.
        only (`str`, *optional*): leave out cells whose name does not contain this.
        needs (`Callable`): the name of the cell that must be finished before this one, or `None`.
    """
    results = folder / "cells"
    results.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not only or only in cell.name]
    while True:
        waiting = []
        for cell in todo:
            before = needs(cell)
            if is_finished(folder, cell.name):
                continue
            if before is not None and not is_finished(folder, before):
                waiting.append((cell.name, before))
            elif _run_if_free(cell, run_cell, results) and waiting:
                break  # what waited may be ready now, and goes first
        else:
            if not any(is_running(folder, name) or is_finished(folder, name) for _, name in waiting):
                break
            time.sleep(_PAUSE)
    for name, before in waiting:
        print(f"{name} waits for {before}, which is neither finished nor running")
    print("no cell is left for this process")


def _run_if_free(cell: CellType, run_cell: Callable[[CellType], dict[str, Any]], results: Path) -> bool:
    path, lock = results / f"{cell.name}.json", results / f"{cell.name}.lock"
    if not claim(lock):
        return False
    if path.exists():  # finished by the other process in between
        lock.unlink()
        return False
    print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
    record = run_cell(cell)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, default=str))
    os.replace(temporary, path)
    lock.unlink()
    return True


def is_finished(folder: Path, name: str) -> bool:
    """Whether a cell has its record."""
    return (folder / "cells" / f"{name}.json").exists()


def is_running(folder: Path, name: str) -> bool:
    """Whether a living process is at a cell."""
    try:
        os.kill(int((folder / "cells" / f"{name}.lock").read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def claim(lock: Path) -> bool:
    """Take a cell, unless a living process has it."""
    try:
        with open(lock, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        pass
    try:
        os.kill(int(lock.read_text()), 0)
    except (OSError, ValueError):  # its process was killed
        lock.write_text(str(os.getpid()))
        return True
    return False


def finished(folder: Path) -> list[dict[str, Any]]:
    """What the finished cells found, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]


def load_records(folder: Path) -> list[dict[str, Any]]:
    """What the finished cells found; ends the program where there is none."""
    records = finished(folder)
    if not records:
        sys.exit(f"error: no finished cell in {folder / 'cells'}: start with `run`")
    return records


def mean_and_spread(group: list[dict[str, Any]], key: str, scale: float = 1.0, digits: int = 1) -> str:
    """Mean and sample standard deviation over seeds."""
    values = [record[key] * scale for record in group]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def flags(
    description: str | None, output_dir: str, sizes: Iterable[str], example: str, seeds: int = 3
) -> argparse.ArgumentParser:
    """A parser of the flags of a study that trains on a labelled set of images.

    Args:
        description (`str`): what `--help` begins with.
        output_dir (`str`): default of the flag.
        sizes (`Iterable[str]`): names of how large it may be; has `"cpu"`, the default.
        example (`str`): of the name of a cell.
        seeds (`int`): how many by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Labelled set with splits train and test.")
    parser.add_argument("--image_column", help="Found by type when unset.")
    parser.add_argument("--label_column", help="Found by type when unset.")
    parser.add_argument("--output_dir", default=output_dir, help="Folder of the study.")
    parser.add_argument("--size", choices=sorted(sizes), default="cpu", help="How large: see above.")
    parser.add_argument("--seeds", type=int, default=seeds, help="Seeds 1 to this.")
    parser.add_argument("--only", help=f"Run only cells whose name contains this, e.g. {example}.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of this process.")
    return parser
