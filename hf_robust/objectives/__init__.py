"""Objectives: one file per method; the file name is the method name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from .base import Objective, StepContext

__all__ = ["Objective", "StepContext", "load_objective", "objective_names"]


def objective_names() -> list[str]:
    """List the methods on disk, i.e. the file names of this folder.

    Returns:
        `list[str]`: sorted names that `load_objective` takes.
    """
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load_objective(name: str) -> type[Objective]:
    """Find the objective class of a method by its file name.

    Args:
        name (`str`): method name such as `"acl"`, in any case.

    Returns:
        `type[Objective]`: the dataclass; its fields are the hyper-parameters.

    Raises:
        ValueError: for a name without a file.
    """
    known = objective_names()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown objective {name!r}: {hint}known objectives are {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{name.lower()}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return found
